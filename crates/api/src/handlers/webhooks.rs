//! Webhooks: where a project is told what happened.

use axum::Json;
use axum::extract::State;
use holdfast_domain::ids::{NoticeId, WebhookId};
use holdfast_store::webhooks::{Sent, TYPES, WebhookChange};
use sha2::{Digest, Sha256};

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::{self, JsonBody, OptionalJsonBody, Path, QueryString};
use crate::repeatable::Repeatable;
use crate::wire::list::{Created, List};
use crate::wire::webhook::{
    CreateWebhookEndpoint, DeletedWebhookEndpoint, Delivery, ListDeliveries, ListWebhookEndpoints, NoticeTypeList, RotateSecret,
    TestWebhook, UpdateWebhookEndpoint, WebhookEndpoint, WebhookTestResult,
};
use crate::{ApiError, AppState};

/// What paths call a webhook.
const WEBHOOK: &str = "webhook_endpoint_id";

/// Make a webhook. The answer holds the secret that signs what it is told.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints", operation_id = "create_webhook_endpoint", tag = "webhooks",
    request_body = CreateWebhookEndpoint,
    responses((status = 200, description = "The webhook, with its secret", body = WebhookEndpoint))
)]
pub(crate) async fn create_webhook(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    JsonBody(body, sha256): JsonBody<CreateWebhookEndpoint>,
) -> Result<Created<WebhookEndpoint>, ApiError> {
    check_url(&state, &body.url)?;
    let types = body.event_types.unwrap_or_else(|| TYPES.map(str::to_owned).to_vec());
    let (name, once) = (body.name.unwrap_or_default(), repeatable.with_body(sha256));
    let made = state.store.create_webhook(tenant.0, &name, &body.url, &types, Some(&once)).await?;
    Ok(Created(WebhookEndpoint::new(made, true)))
}

fn check_url(state: &AppState, url: &str) -> Result<(), ApiError> {
    state.sender.check_url(url).map_err(|message| ApiError::invalid("url", "invalid_url", message))
}

/// List the project's webhooks, newest first.
#[utoipa::path(
    get, path = "/v1/webhook_endpoints", operation_id = "list_webhook_endpoints", tag = "webhooks", params(ListWebhookEndpoints),
    responses((status = 200, description = "A page of them", body = List<WebhookEndpoint>))
)]
pub(crate) async fn list_webhooks(
    tenant: Tenant,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListWebhookEndpoints>,
) -> Result<Json<List<WebhookEndpoint>>, ApiError> {
    let page = extract::page::<WebhookId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let webhooks = state.store.webhooks(tenant.0, page).await?;
    let shown = webhooks.items.into_iter().map(|row| WebhookEndpoint::new(row, false)).collect();
    Ok(Json(List::new(shown, webhooks.has_more)))
}

/// List what webhooks can be told.
#[utoipa::path(
    get, path = "/v1/webhook_event_types", operation_id = "list_webhook_event_types", tag = "webhooks",
    responses((status = 200, description = "All of it", body = NoticeTypeList))
)]
pub(crate) async fn list_event_types(_: Tenant) -> Json<NoticeTypeList> {
    Json(NoticeTypeList { object: "list", data: TYPES.to_vec() })
}

/// Get a webhook.
#[utoipa::path(
    get, path = "/v1/webhook_endpoints/{webhook_endpoint_id}", operation_id = "get_webhook_endpoint", tag = "webhooks",
    params(("webhook_endpoint_id" = String, Path, example = "wh_0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The webhook", body = WebhookEndpoint),
        (status = 404, description = "The project has no such webhook", body = ErrorBody),
    )
)]
pub(crate) async fn get_webhook(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<WebhookEndpoint>, ApiError> {
    let row = state.store.webhook(tenant.0, webhook_id(&id)?).await.map_err(|e| ApiError::of_one(e, WEBHOOK, &id))?;
    Ok(Json(WebhookEndpoint::new(row, false)))
}

/// Change a webhook, or switch it off and on.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints/{webhook_endpoint_id}", operation_id = "update_webhook_endpoint", tag = "webhooks",
    params(("webhook_endpoint_id" = String, Path, example = "wh_0192f3a4000070008000000000000001")),
    request_body = UpdateWebhookEndpoint,
    responses(
        (status = 200, description = "The webhook", body = WebhookEndpoint),
        (status = 404, description = "The project has no such webhook", body = ErrorBody),
    )
)]
pub(crate) async fn update_webhook(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
    JsonBody(body, _): JsonBody<UpdateWebhookEndpoint>,
) -> Result<Json<WebhookEndpoint>, ApiError> {
    if let Some(url) = &body.url {
        check_url(&state, url)?;
    }
    let change = WebhookChange { name: body.name, url: body.url, types: body.event_types, enabled: body.enabled };
    let updated = state.store.update_webhook(tenant.0, webhook_id(&id)?, &change).await;
    Ok(Json(WebhookEndpoint::new(updated.map_err(|e| ApiError::of_one(e, WEBHOOK, &id))?, false)))
}

/// Delete a webhook, and what it was still to be told.
#[utoipa::path(
    delete, path = "/v1/webhook_endpoints/{webhook_endpoint_id}", operation_id = "delete_webhook_endpoint", tag = "webhooks",
    params(("webhook_endpoint_id" = String, Path, example = "wh_0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "It is gone", body = DeletedWebhookEndpoint),
        (status = 404, description = "The project has no such webhook", body = ErrorBody),
    )
)]
pub(crate) async fn delete_webhook(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<DeletedWebhookEndpoint>, ApiError> {
    let webhook = webhook_id(&id)?;
    state.store.delete_webhook(tenant.0, webhook).await.map_err(|e| ApiError::of_one(e, WEBHOOK, &id))?;
    Ok(Json(DeletedWebhookEndpoint { id: webhook, object: "webhook_endpoint.deleted", deleted: true }))
}

/// Give a webhook another secret.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret", operation_id = "rotate_webhook_secret", tag = "webhooks",
    params(("webhook_endpoint_id" = String, Path, example = "wh_0192f3a4000070008000000000000001")),
    request_body = Option<RotateSecret>,
    responses(
        (status = 200, description = "The webhook, with its secret", body = WebhookEndpoint),
        (status = 404, description = "The project has no such webhook", body = ErrorBody),
    )
)]
pub(crate) async fn rotate_secret(
    tenant: Tenant,
    State(state): State<AppState>,
    repeatable: Repeatable,
    Path(id): Path<String>,
    OptionalJsonBody(body): OptionalJsonBody<RotateSecret>,
) -> Result<Json<WebhookEndpoint>, ApiError> {
    let keep_old = body.unwrap_or_default().keep_old_secret_active_for_24_hours.unwrap_or(false);
    let once = repeatable.with_body(Sha256::digest([u8::from(keep_old)]).into());
    let rotated = state.store.rotate_webhook_secret(tenant.0, webhook_id(&id)?, keep_old, Some(&once)).await;
    Ok(Json(WebhookEndpoint::new(rotated.map_err(|e| ApiError::of_one(e, WEBHOOK, &id))?, true)))
}

/// Send a webhook a notice that tells of nothing, once, and say what it answered.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints/{webhook_endpoint_id}/test", operation_id = "test_webhook_endpoint", tag = "webhooks",
    params(("webhook_endpoint_id" = String, Path, example = "wh_0192f3a4000070008000000000000001")),
    request_body = TestWebhook,
    responses(
        (status = 200, description = "The receiver answered", body = WebhookTestResult),
        (status = 404, description = "The project has no such webhook", body = ErrorBody),
    )
)]
pub(crate) async fn test_webhook(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
    JsonBody(body, _): JsonBody<TestWebhook>,
) -> Result<Json<WebhookTestResult>, ApiError> {
    let webhook = webhook_id(&id)?;
    let notice =
        state.store.trial_notice(tenant.0, webhook, &body.event_type).await.map_err(|e| ApiError::of_one(e, WEBHOOK, &id))?;
    let status_code = match state.sender.send(&notice).await {
        Sent::Taken { status } | Sent::Failed { status: Some(status), .. } => status,
        Sent::Failed { status: None, error } => return Err(ApiError::invalid(WEBHOOK, "receiver_unreachable", error)),
    };
    Ok(Json(WebhookTestResult {
        object: "webhook_endpoint.test",
        webhook_endpoint_id: webhook,
        event_type: body.event_type,
        status_code,
        success: true,
    }))
}

/// List what a webhook was told and is to be told, newest first.
#[utoipa::path(
    get, path = "/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries", operation_id = "list_webhook_deliveries", tag = "webhooks",
    params(("webhook_endpoint_id" = String, Path, example = "wh_0192f3a4000070008000000000000001"), ListDeliveries),
    responses(
        (status = 200, description = "A page of them", body = List<Delivery>),
        (status = 404, description = "The project has no such webhook", body = ErrorBody),
    )
)]
pub(crate) async fn list_deliveries(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
    QueryString(query): QueryString<ListDeliveries>,
) -> Result<Json<List<Delivery>>, ApiError> {
    let page = extract::page::<NoticeId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let deliveries = state.store.deliveries(tenant.0, webhook_id(&id)?, query.state.map(|state| state.as_str()), page).await;
    let deliveries = deliveries.map_err(|e| ApiError::of_one(e, WEBHOOK, &id))?;
    Ok(Json(List::new(deliveries.items.into_iter().map(Delivery::from).collect(), deliveries.has_more)))
}

/// Send a notice to a webhook again, whatever became of it.
#[utoipa::path(
    post, path = "/v1/webhook_endpoints/{webhook_endpoint_id}/deliveries/{notice_id}/replay", operation_id = "replay_webhook_delivery", tag = "webhooks",
    params(
        ("webhook_endpoint_id" = String, Path, example = "wh_0192f3a4000070008000000000000001"),
        ("notice_id" = String, Path, example = "evt_0192f3a4000070008000000000000001")
    ),
    responses(
        (status = 204, description = "It is sent again"),
        (status = 404, description = "The project has no such webhook, or it no such notice", body = ErrorBody),
    )
)]
pub(crate) async fn replay_delivery(
    tenant: Tenant,
    State(state): State<AppState>,
    Path((id, notice)): Path<(String, String)>,
) -> Result<http::StatusCode, ApiError> {
    let parsed: NoticeId = extract::id("notice_id", &notice)?;
    let replayed = state.store.replay_delivery(tenant.0, webhook_id(&id)?, parsed).await;
    replayed.map_err(|e| ApiError::of_one(e, "notice_id", &notice))?;
    Ok(http::StatusCode::NO_CONTENT)
}

fn webhook_id(text: &str) -> Result<WebhookId, ApiError> {
    extract::id(WEBHOOK, text)
}
