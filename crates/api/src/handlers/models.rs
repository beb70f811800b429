//! Models: the operator's bases and what the project's jobs made of them.

use axum::Json;
use axum::extract::State;
use holdfast_store::StoreError;

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::Path;
use crate::wire::list::List;
use crate::wire::model::Model;
use crate::{ApiError, AppState};

/// List the base models and the project's own.
#[utoipa::path(
    get, path = "/v1/models", operation_id = "list_models", tag = "models",
    responses(
        (status = 200, description = "All of them", body = List<Model>),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
    )
)]
pub(crate) async fn list_models(tenant: Tenant, State(state): State<AppState>) -> Result<Json<List<Model>>, ApiError> {
    let bases = state.store.base_models().await?.into_iter().map(Model::from);
    let tuned = state.store.fine_tuned_models(tenant.0).await?.into_iter().map(Model::from);
    Ok(Json(List::new(bases.chain(tuned).collect(), false)))
}

/// Get a model. Names may hold slashes, plain or as %2F.
#[utoipa::path(
    get, path = "/v1/models/{model}", operation_id = "get_model", tag = "models", params(("model" = String, Path)),
    responses(
        (status = 200, description = "The model", body = Model),
        (status = 401, description = "No key, or an unknown one", body = ErrorBody),
        (status = 404, description = "There is no such model", body = ErrorBody),
    )
)]
pub(crate) async fn get_model(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let found = if name.starts_with("ft:") {
        state.store.fine_tuned_model(tenant.0, &name).await.map(Model::from)
    } else {
        state.store.base_model(&name).await.map(Model::from)
    };
    found.map(Json).map_err(|error| match error {
        StoreError::NotFound => ApiError::not_found("model", &name),
        other => other.into(),
    })
}
