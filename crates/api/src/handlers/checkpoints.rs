//! Checkpoints of a job.

use axum::Json;
use axum::extract::State;
use holdfast_domain::ids::CheckpointId;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::{self, Path, QueryString};
use crate::handlers::jobs::{job_id, not_found};
use crate::wire::checkpoint::Checkpoint;
use crate::wire::list::List;
use crate::{ApiError, AppState};

/// Which checkpoints.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListCheckpoints {
    /// The `last_id` of the page before.
    #[param(pattern = "^ftckpt_[0-9a-f]{32}$")]
    after: Option<String>,
    /// 1 to 100.
    #[param(default = 10, minimum = 1, maximum = 100)]
    limit: Option<u32>,
}

/// List a job's checkpoints, newest first.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", operation_id = "list_fine_tuning_checkpoints",
    tag = "fine-tuning",
    params(("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001"), ListCheckpoints),
    responses(
        (status = 200, description = "A page of the job's checkpoints", body = List<Checkpoint>),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn list_checkpoints(
    tenant: Tenant,
    State(state): State<AppState>,
    Path(id): Path<String>,
    QueryString(query): QueryString<ListCheckpoints>,
) -> Result<Json<List<Checkpoint>>, ApiError> {
    let page = extract::page::<CheckpointId>(query.after.as_deref(), query.limit, 10, 100, false)?;
    let job = state.store.job(tenant.0, job_id(&id)?).await.map_err(|e| not_found(e, &id))?;
    let checkpoints = state.store.checkpoints(tenant.0, job.id, page).await?;
    Ok(Json(List::new(checkpoints.items.iter().map(|row| Checkpoint::new(row, &job)).collect(), checkpoints.has_more)))
}
