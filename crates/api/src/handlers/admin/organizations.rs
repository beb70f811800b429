//! Organisations and their members.

use axum::Json;
use axum::extract::State;
use holdfast_domain::ids::MemberId;
use holdfast_store::StoreError;

use crate::auth::Admin;
use crate::error::ErrorBody;
use crate::extract::{self, JsonBody, Path};
use crate::repeatable::Repeatable;
use crate::wire::admin::tenants::{CreateMember, CreateOrganization, DeletedMember, Member, Organization};
use crate::wire::list::{Created, List};
use crate::{ApiError, AppState};

/// List organisations, by name.
#[utoipa::path(
    get, path = "/admin/organizations", operation_id = "list_organizations", tag = "admin",
    responses((status = 200, description = "All of them", body = List<Organization>))
)]
pub(crate) async fn list_organizations(_: Admin, State(state): State<AppState>) -> Result<Json<List<Organization>>, ApiError> {
    let organizations = state.store.organizations().await?;
    Ok(Json(List::new(organizations.into_iter().map(Organization::from).collect(), false)))
}

/// Make an organisation.
#[utoipa::path(
    post, path = "/admin/organizations", operation_id = "create_organization", tag = "admin", request_body = CreateOrganization,
    responses((status = 200, description = "The organisation", body = Organization))
)]
pub(crate) async fn create_organization(
    _: Admin,
    State(state): State<AppState>,
    repeatable: Repeatable,
    JsonBody(body, sha256): JsonBody<CreateOrganization>,
) -> Result<Created<Organization>, ApiError> {
    Ok(Created(state.store.create_organization(&body.name, Some(&repeatable.with_body(sha256))).await?.into()))
}

/// List the members of an organisation, by name.
#[utoipa::path(
    get, path = "/admin/organizations/{organization}/members", operation_id = "list_members", tag = "admin",
    params(("organization" = String, Path, example = "acme")),
    responses(
        (status = 200, description = "All of them", body = List<Member>),
        (status = 404, description = "There is no such organisation", body = ErrorBody),
    )
)]
pub(crate) async fn list_members(
    _: Admin,
    State(state): State<AppState>,
    Path(organization): Path<String>,
) -> Result<Json<List<Member>>, ApiError> {
    let members =
        state.store.members(&organization).await.map_err(|error| ApiError::of_one(error, "organization", &organization))?;
    Ok(Json(List::new(members.into_iter().map(Member::from).collect(), false)))
}

/// Add a member to an organisation.
#[utoipa::path(
    post, path = "/admin/organizations/{organization}/members", operation_id = "create_member", tag = "admin",
    params(("organization" = String, Path, example = "acme")), request_body = CreateMember,
    responses(
        (status = 200, description = "The member", body = Member),
        (status = 404, description = "There is no such organisation", body = ErrorBody),
    )
)]
pub(crate) async fn create_member(
    _: Admin,
    State(state): State<AppState>,
    repeatable: Repeatable,
    Path(organization): Path<String>,
    JsonBody(body, sha256): JsonBody<CreateMember>,
) -> Result<Created<Member>, ApiError> {
    let created = state.store.create_member(&organization, &body.name, Some(&repeatable.with_body(sha256))).await;
    let created = created.map_err(|error| match error {
        StoreError::Invalid(invalid) if invalid.code == "organization_not_found" => {
            ApiError::not_found("organization", &organization)
        }
        other => other.into(),
    })?;
    Ok(Created(created.into()))
}

/// Remove a member. Their keys are revoked.
#[utoipa::path(
    delete, path = "/admin/members/{member_id}", operation_id = "delete_member", tag = "admin",
    params(("member_id" = String, Path, example = "mem_0192f3a4000070008000000000000001")),
    responses(
        (status = 200, description = "They are gone", body = DeletedMember),
        (status = 404, description = "There is no such member", body = ErrorBody),
    )
)]
pub(crate) async fn delete_member(
    _: Admin,
    State(state): State<AppState>,
    Path(member_id): Path<String>,
) -> Result<Json<DeletedMember>, ApiError> {
    let id: MemberId = extract::id("member_id", &member_id)?;
    state.store.remove_member(id).await.map_err(|error| ApiError::of_one(error, "member_id", &member_id))?;
    state.known_keys.forget_all();
    Ok(Json(DeletedMember { id, object: "organization.member", deleted: true }))
}
