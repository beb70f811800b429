//! The table of contents: every route, and what stands around all of them.

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::response::{IntoResponse, Response};
use holdfast_domain::limits::MAX_JSON_BODY_BYTES;
use http::{HeaderName, Request};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer};
use tower_http::trace::TraceLayer;
use utoipa::openapi::OpenApi as Spec;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::extract::Path;
use crate::handlers::{adapters, files, health, jobs, models};
use crate::{ApiError, AppState};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Holdfast",
        description = "Fine-tuning that holds a model to its alignment. The contract is OpenAI's fine-tuning API; what is marked as an extension is ours, and optional.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    modifiers(&BearerKey),
    security(("bearer_key" = [])),
    tags(
        (name = "files", description = "Datasets"),
        (name = "fine-tuning", description = "Jobs, their events and their adapters"),
        (name = "models", description = "Base models and fine-tuned ones"),
        (name = "health", description = "For load balancers")
    )
)]
struct Contract;

struct BearerKey;

impl Modify for BearerKey {
    fn modify(&self, openapi: &mut Spec) {
        let scheme =
            HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("A key made with `holdfast keys create`")).build();
        openapi.components.get_or_insert_default().add_security_scheme("bearer_key", SecurityScheme::Http(scheme));
    }
}

fn table() -> OpenApiRouter<AppState> {
    // An upload counts its own bytes against the operator's limit.
    let uploads = OpenApiRouter::new().routes(routes!(files::list_files, files::create_file)).layer(DefaultBodyLimit::disable());
    OpenApiRouter::with_openapi(Contract::openapi())
        .merge(uploads)
        .routes(routes!(files::get_file, files::delete_file))
        .routes(routes!(files::get_file_content))
        .routes(routes!(jobs::list_jobs, jobs::create_job))
        .routes(routes!(jobs::get_job))
        .routes(routes!(jobs::cancel_job))
        .routes(routes!(jobs::list_events))
        .routes(routes!(adapters::get_adapter))
        .routes(routes!(adapters::get_adapter_file))
        .routes(routes!(models::list_models))
        .routes(routes!(models::get_model))
        .routes(routes!(health::get_health))
}

/// The contract, as openapi.yaml has it.
#[must_use]
pub fn openapi() -> Spec {
    table().into_openapi()
}

/// The service.
pub fn router(state: AppState) -> Router {
    let (router, _) = table().split_for_parts();
    router
        // Names of models may hold plain slashes; the contract has no word for that.
        .route("/v1/models/{owner}/{*rest}", axum::routing::get(model_with_slashes))
        .fallback(health::no_route)
        .method_not_allowed_fallback(health::method_not_allowed)
        .layer(
            ServiceBuilder::new()
                .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
                .layer(TraceLayer::new_for_http().make_span_with(span))
                .layer(PropagateRequestIdLayer::new(REQUEST_ID))
                .layer(CatchPanicLayer::custom(panicked))
                .layer(DefaultBodyLimit::max(MAX_JSON_BODY_BYTES)),
        )
        .with_state(state)
}

async fn model_with_slashes(
    tenant: crate::auth::Tenant,
    state: axum::extract::State<AppState>,
    Path((owner, rest)): Path<(String, String)>,
) -> Result<axum::Json<crate::wire::model::Model>, ApiError> {
    models::get_model(tenant, state, Path(format!("{owner}/{rest}"))).await
}

/// Method, path and request id; never a query string or a header, which may hold what is not ours to log.
fn span<B>(request: &Request<B>) -> tracing::Span {
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok()).unwrap_or_default();
    tracing::info_span!("request", method = %request.method(), path = request.uri().path(), request_id = id)
}

#[expect(clippy::needless_pass_by_value, reason = "the layer hands the panic over")]
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    ApiError::internal(&format!("panicked: {}", text.unwrap_or("without a message"))).into_response()
}
