//! Lists.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::audit::Made;

/// A page of a list. The next one begins `after` the `last_id`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct List<T> {
    #[schema(example = "list")]
    object: &'static str,
    /// The page's items.
    data: Vec<T>,
    /// Whether another page follows.
    has_more: bool,
    /// The id of the first item.
    first_id: Option<String>,
    /// The id of the last item.
    last_id: Option<String>,
}

/// Something that can stand in a list.
pub(crate) trait Listed {
    /// Its id.
    fn id(&self) -> String;
}

impl<T: Listed> List<T> {
    pub(crate) fn new(data: Vec<T>, has_more: bool) -> Self {
        let (first_id, last_id) = (data.first().map(T::id), data.last().map(T::id));
        Self { object: "list", data, has_more, first_id, last_id }
    }
}

/// Something a call has made. Its id goes into the audit log.
#[derive(Debug)]
pub(crate) struct Created<T>(pub(crate) T);

impl<T: Listed + Serialize> IntoResponse for Created<T> {
    fn into_response(self) -> Response {
        let made = Made(self.0.id());
        let mut response = Json(self.0).into_response();
        response.extensions_mut().insert(made);
        response
    }
}
