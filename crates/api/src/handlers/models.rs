//! Models: the operator's bases and what the project's jobs made of them.

use axum::Json;
use axum::extract::State;
use holdfast_store::StoreError;

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::Path;
use crate::wire::list::List;
use crate::wire::model::{DeletedModel, Model};
use crate::{ApiError, AppState};

/// What the names of fine-tuned models begin with.
pub(crate) const FINE_TUNED: &str = "ft:";

/// List the base models and the project's own.
#[utoipa::path(
    get, path = "/v1/models", operation_id = "list_models", tag = "models",
    responses((status = 200, description = "All of them", body = List<Model>))
)]
pub(crate) async fn list_models(tenant: Tenant, State(state): State<AppState>) -> Result<Json<List<Model>>, ApiError> {
    let bases = state.store.base_models().await?.into_iter().map(Model::from);
    let tuned = state.store.fine_tuned_models(tenant.0).await?.into_iter().map(Model::from);
    Ok(Json(List::new(bases.chain(tuned).collect(), false)))
}

/// Get a model: a base, one that a job made, or one of a job's checkpoints. Names may hold slashes, plain or as %2F.
#[utoipa::path(
    get, path = "/v1/models/{model}", operation_id = "get_model", tag = "models",
    params(("model" = String, Path, example = "SmolLM2-135M-Instruct")),
    responses(
        (status = 200, description = "The model", body = Model),
        (status = 404, description = "There is no such model", body = ErrorBody),
    )
)]
pub(crate) async fn get_model(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let found = if name.starts_with(FINE_TUNED) {
        state.store.fine_tuned_model(tenant.0, &name).await.map(Model::from)
    } else {
        state.store.base_model(&name).await.map(Model::from)
    };
    found.map(Json).map_err(|error| not_found(error, &name))
}

/// Delete a fine-tuned model or a checkpoint, with its adapter. The job that made it stays.
#[utoipa::path(
    delete, path = "/v1/models/{model}", operation_id = "delete_model", tag = "models",
    params(("model" = String, Path, example = "ft:SmolLM2-135M-Instruct:holdfast:reviews:0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "It is gone", body = DeletedModel),
        (status = 404, description = "The project has no such model", body = ErrorBody),
    )
)]
pub(crate) async fn delete_model(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(name): Path<String>,
) -> Result<Json<DeletedModel>, ApiError> {
    if !name.starts_with(FINE_TUNED) && state.store.base_model(&name).await.is_ok() {
        return Err(ApiError::forbidden(
            "base_model",
            "a base model is the operator's; a project deletes only what its jobs made",
        ));
    }
    state.store.delete_model(tenant.0, &name).await.map_err(|error| not_found(error, &name))?;
    Ok(Json(DeletedModel { id: name, object: "model", deleted: true }))
}

fn not_found(error: StoreError, name: &str) -> ApiError {
    ApiError::of_one(error, "model", name)
}
