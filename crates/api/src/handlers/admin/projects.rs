//! Projects, what they may use and what they use.

use axum::extract::State;
use axum::{Extension, Json};
use holdfast_domain::Invalid;
use holdfast_domain::ids::ProjectId;
use holdfast_store::StoreError;

use crate::audit::ActedOn;
use crate::auth::Admin;
use crate::error::ErrorBody;
use crate::extract::{self, JsonBody, Path, QueryString};
use crate::repeatable::Repeatable;
use crate::wire::admin::tenants::{CreateProject, ListProjects, Project, Quotas};
use crate::wire::list::{Created, List};
use crate::{ApiError, AppState};

/// List projects, newest first.
#[utoipa::path(
    get, path = "/admin/projects", operation_id = "list_projects", tag = "admin", params(ListProjects),
    responses((status = 200, description = "A page of them", body = List<Project>))
)]
pub(crate) async fn list_projects(
    _: Admin,
    State(state): State<AppState>,
    QueryString(query): QueryString<ListProjects>,
) -> Result<Json<List<Project>>, ApiError> {
    let page = extract::page::<ProjectId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let projects = state.store.projects(query.organization.as_deref(), page).await?;
    Ok(Json(List::new(projects.items.into_iter().map(|row| Project::new(row, None)).collect(), projects.has_more)))
}

/// Make a project in an organisation.
#[utoipa::path(
    post, path = "/admin/projects", operation_id = "create_project", tag = "admin", request_body = CreateProject,
    responses(
        (status = 200, description = "The project", body = Project),
        (status = 404, description = "There is no such organisation", body = ErrorBody),
    )
)]
pub(crate) async fn create_project(
    _: Admin,
    State(state): State<AppState>,
    repeatable: Repeatable,
    JsonBody(body, sha256): JsonBody<CreateProject>,
) -> Result<(Extension<ActedOn>, Created<Project>), ApiError> {
    let quotas = body.quotas.unwrap_or_default().try_into().map_err(|e: Invalid| e.within("quotas"))?;
    let created = state.store.create_project(&body.organization, &body.name, quotas, Some(&repeatable.with_body(sha256))).await;
    let created = created.map_err(|error| match error {
        StoreError::Invalid(invalid) if invalid.code == "organization_not_found" => {
            ApiError::not_found("organization", &body.organization)
        }
        other => other.into(),
    })?;
    Ok((Extension(ActedOn(created.id)), Created(Project::new(created, None))))
}

/// Get a project with what it uses.
#[utoipa::path(
    get, path = "/admin/projects/{project_id}", operation_id = "get_project", tag = "admin",
    params(("project_id" = String, Path, example = "proj_0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "The project", body = Project),
        (status = 404, description = "There is no such project", body = ErrorBody),
    )
)]
pub(crate) async fn get_project(
    _: Admin,
    State(state): State<AppState>,
    Path(project_id): Path<String>,
) -> Result<Json<Project>, ApiError> {
    let id: ProjectId = extract::id("project_id", &project_id)?;
    let project = state.store.project(id).await.map_err(|e| not_found(e, &project_id))?;
    Ok(Json(Project::new(project, Some(state.store.usage(id).await?))))
}

/// Set what a project may use. What is absent has no limit from here on; nothing that is there is taken away.
#[utoipa::path(
    put, path = "/admin/projects/{project_id}/quotas", operation_id = "set_project_quotas", tag = "admin",
    params(("project_id" = String, Path, example = "proj_0192f3a4000070008000000000000001")), request_body = Quotas,
    responses(
        (status = 200, description = "The project", body = Project),
        (status = 404, description = "There is no such project", body = ErrorBody),
    )
)]
pub(crate) async fn set_quotas(
    _: Admin,
    State(state): State<AppState>,
    Path(project_id): Path<String>,
    JsonBody(body, _): JsonBody<Quotas>,
) -> Result<(Extension<ActedOn>, Json<Project>), ApiError> {
    let id: ProjectId = extract::id("project_id", &project_id)?;
    let project = state.store.set_quotas(id, body.try_into()?).await.map_err(|e| not_found(e, &project_id))?;
    Ok((Extension(ActedOn(id)), Json(Project::new(project, None))))
}

fn not_found(error: StoreError, id: &str) -> ApiError {
    ApiError::of_one(error, "project_id", id)
}
