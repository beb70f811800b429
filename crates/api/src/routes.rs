//! The table of contents: every route, and what stands around all of them.

use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use holdfast_domain::limits::MAX_JSON_BODY_BYTES;
use http::HeaderName;
use tower::ServiceBuilder;
use tower::util::MapRequestLayer;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::timeout::RequestBodyTimeoutLayer;
use tower_http::trace::TraceLayer;
use utoipa::OpenApi;
use utoipa::openapi::OpenApi as Spec;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::contract::EveryOperation;
use crate::extract::Path;
use crate::handlers::admin::{deployment, keys, organizations, projects, safety as admin_safety};
use crate::handlers::{
    adapters, checkpoints, estimate, events, files, health, jobs, metrics, models, preview, safety, uploads, webhooks,
};
use crate::wire::webhook::WebhookEvent;
use crate::{ApiError, AppState, audit, auth, contract, telemetry, trace};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// How long the next piece of a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a request may take that carries no file.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Holdfast",
        description = "Fine-tuning that holds a model to its alignment. The contract is OpenAI's fine-tuning API; what is marked as an extension is ours, and optional.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "/", description = "Where this service listens; clients of OpenAI's API take its address with `/v1` as their base URL")),
    components(schemas(WebhookEvent)),
    modifiers(&EveryOperation),
    tags(
        (name = "files", description = "Datasets"),
        (name = "uploads", description = "Datasets that come in parts"),
        (name = "fine-tuning", description = "Jobs, their events, checkpoints and adapters"),
        (name = "models", description = "Base models and fine-tuned ones"),
        (name = "webhooks", description = "Being told what happened"),
        (name = "admin", description = "The operator's calls"),
        (name = "health", description = "For load balancers and monitoring")
    )
)]
struct Contract;

/// What needs a key. What carries a file counts its own bytes and takes the time it takes; everything else is small and quick.
fn keyed() -> OpenApiRouter<AppState> {
    let heavy = OpenApiRouter::new()
        .routes(routes!(files::create_file))
        .routes(routes!(uploads::add_upload_part))
        .layer(DefaultBodyLimit::disable())
        .routes(routes!(uploads::complete_upload))
        .routes(routes!(estimate::estimate_job))
        .routes(routes!(preview::preview_file));
    let quick = OpenApiRouter::new()
        .routes(routes!(files::list_files))
        .routes(routes!(files::get_file, files::delete_file))
        .routes(routes!(files::get_file_content))
        .routes(routes!(uploads::create_upload))
        .routes(routes!(uploads::cancel_upload))
        .routes(routes!(jobs::list_jobs, jobs::create_job))
        .routes(routes!(jobs::get_job))
        .routes(routes!(jobs::cancel_job))
        .routes(routes!(jobs::pause_job))
        .routes(routes!(jobs::resume_job))
        .routes(routes!(events::list_events))
        .routes(routes!(checkpoints::list_checkpoints))
        .routes(routes!(adapters::get_adapter))
        .routes(routes!(adapters::get_adapter_file))
        .routes(routes!(adapters::get_checkpoint_adapter))
        .routes(routes!(adapters::get_checkpoint_adapter_file))
        .routes(routes!(safety::get_safety_report))
        .routes(routes!(safety::get_manifest))
        .routes(routes!(safety::list_signing_keys))
        .routes(routes!(safety::get_safety_policy))
        .routes(routes!(models::list_models))
        .routes(routes!(models::get_model, models::delete_model))
        .routes(routes!(webhooks::list_webhooks, webhooks::create_webhook))
        .routes(routes!(webhooks::get_webhook, webhooks::update_webhook, webhooks::delete_webhook))
        .routes(routes!(webhooks::rotate_secret))
        .routes(routes!(webhooks::test_webhook))
        .routes(routes!(webhooks::list_event_types))
        .routes(routes!(webhooks::list_deliveries))
        .routes(routes!(webhooks::replay_delivery))
        .routes(routes!(organizations::list_organizations, organizations::create_organization))
        .routes(routes!(organizations::list_members, organizations::create_member))
        .routes(routes!(organizations::delete_member))
        .routes(routes!(projects::list_projects, projects::create_project))
        .routes(routes!(projects::get_project))
        .routes(routes!(projects::set_quotas))
        .routes(routes!(keys::list_keys, keys::create_key))
        .routes(routes!(keys::revoke_key))
        .routes(routes!(deployment::list_base_models))
        .routes(routes!(deployment::list_alignment_sets, deployment::create_alignment_set))
        .routes(routes!(deployment::list_suites, deployment::create_suite))
        .routes(routes!(
            admin_safety::get_deployment_policy,
            admin_safety::set_deployment_policy,
            admin_safety::delete_deployment_policy
        ))
        .routes(routes!(
            admin_safety::get_organization_policy,
            admin_safety::set_organization_policy,
            admin_safety::delete_organization_policy
        ))
        .routes(routes!(admin_safety::get_project_policy, admin_safety::set_project_policy, admin_safety::delete_project_policy))
        .routes(routes!(admin_safety::list_quarantined))
        .routes(routes!(admin_safety::get_quarantined_report))
        .routes(routes!(admin_safety::release_quarantined))
        .routes(routes!(admin_safety::discard_quarantined))
        .routes(routes!(admin_safety::list_conflict_levels, admin_safety::measure_conflict_level))
        .routes(routes!(deployment::list_workers))
        .routes(routes!(deployment::list_audit_entries))
        .routes(routes!(metrics::get_metrics))
        .layer(from_fn(in_time));
    heavy.merge(quick)
}

fn open() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(health::get_health)).routes(routes!(health::get_readiness))
}

/// The contract, as openapi.yaml has it.
#[must_use]
pub fn openapi() -> Spec {
    let mut spec = OpenApiRouter::<AppState>::new().merge(keyed()).merge(open()).into_openapi();
    let contract = Contract::openapi();
    spec.info = contract.info;
    spec.tags = contract.tags;
    spec.servers = contract.servers;
    spec.webhooks = Some(contract::webhooks());
    if let (Some(all), Some(told)) = (&mut spec.components, contract.components) {
        all.schemas.extend(told.schemas);
    }
    utoipa::Modify::modify(&EveryOperation, &mut spec);
    contract::with_named_lists(spec)
}

/// The service.
pub fn router(state: AppState) -> Router {
    let (keyed, _) = keyed().split_for_parts();
    let (open, _) = open().split_for_parts();
    // Names of models may hold plain slashes; the contract has no word for that.
    let with_slashes = axum::routing::get(get_model_with_slashes).delete(delete_model_with_slashes);
    keyed
        .route(audit::MODEL_WITH_SLASHES, with_slashes)
        .route_layer(from_fn_with_state(state.clone(), audit::audit))
        .route_layer(from_fn_with_state(state.clone(), auth::authenticate))
        .merge(open)
        .route_layer(from_fn(telemetry::count))
        .fallback(health::no_route)
        .method_not_allowed_fallback(health::method_not_allowed)
        .layer(
            ServiceBuilder::new()
                .layer(MapRequestLayer::new(without_odd_id))
                .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
                .layer(TraceLayer::new_for_http().make_span_with(trace::span).on_response(trace::answered))
                .layer(PropagateRequestIdLayer::new(REQUEST_ID))
                .layer(CatchPanicLayer::custom(panicked))
                .layer(RequestBodyTimeoutLayer::new(BODY_TIMEOUT))
                .layer(DefaultBodyLimit::max(MAX_JSON_BODY_BYTES)),
        )
        .with_state(state)
}

async fn get_model_with_slashes(
    tenant: auth::Tenant,
    state: axum::extract::State<AppState>,
    Path((owner, rest)): Path<(String, String)>,
) -> Result<impl IntoResponse, ApiError> {
    models::get_model(tenant, state, Path(format!("{owner}/{rest}"))).await
}

async fn delete_model_with_slashes(
    tenant: auth::Tenant,
    state: axum::extract::State<AppState>,
    Path((owner, rest)): Path<(String, String)>,
) -> Result<impl IntoResponse, ApiError> {
    models::delete_model(tenant, state, Path(format!("{owner}/{rest}"))).await
}

/// Ends a request that takes too long, most often because its body does not come.
async fn in_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::timeout().into_response(),
    }
}

/// Leaves a client its own id for a request only where it is one that can stand in logs and headers.
fn without_odd_id<B>(mut request: http::Request<B>) -> http::Request<B> {
    const MAX_ID_BYTES: usize = 128;
    let usable = |id: &[u8]| {
        (1..=MAX_ID_BYTES).contains(&id.len()) && id.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    if request.headers().get(&REQUEST_ID).is_some_and(|id| !usable(id.as_bytes())) {
        request.headers_mut().remove(&REQUEST_ID);
    }
    request
}

#[expect(clippy::needless_pass_by_value, reason = "the layer hands the panic over")]
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    ApiError::internal(&format!("panicked: {}", text.unwrap_or("without a message"))).into_response()
}
