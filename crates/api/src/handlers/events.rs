//! Events of a job, in pages or as a stream.

use std::convert::Infallible;

use axum::Json;
use axum::extract::State;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use holdfast_domain::ids::{EventId, JobId, ProjectId};
use http::header::ACCEPT;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use tokio::sync::watch;
use utoipa::IntoParams;

use crate::auth::{BELIEVED, KeyHash, Tenant};
use crate::error::ErrorBody;
use crate::extract::{self, Path, QueryString};
use crate::handlers::jobs::{job_id, not_found};
use crate::server::is_true;
use crate::wire::event::Event;
use crate::wire::list::{List, Listed};
use crate::{ApiError, AppState};

/// Events a stream reads at a time.
const READ_AT_ONCE: u32 = 100;

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListEvents {
    /// The `last_id` of the page before.
    #[param(pattern = "^ftevent-[0-9a-f]{32}$")]
    after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    limit: Option<u32>,
}

/// List a job's events, newest first; or, with `Accept: text/event-stream`, follow them as they come, oldest first.
///
/// A stream begins with the first event, or after the one that `Last-Event-ID` names, and ends with the job, or with the key. One that is asked for
/// again when nothing can follow is answered with 204, which keeps browsers from asking for ever.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", operation_id = "list_fine_tuning_events", tag = "fine-tuning",
    params(
        ("fine_tuning_job_id" = String, Path, example = "ftjob-0192f3a4000070008000000000000001"),
        ("Last-Event-ID" = Option<String>, Header, description = "Where a stream goes on: the id of the last event that was seen", example = "ftevent-0192f3a4000070008000000000000001"),
        ListEvents
    ),
    responses(
        (status = 200, description = "A page of the job's events, or a stream of them: each message has the event's `id`, and the event as its `data`", content(
            (List<Event> = "application/json"),
            (String = "text/event-stream")
        )),
        (status = 204, description = "The job has ended and the stream has been read to its end"),
        (status = 404, description = "The project has no such job", body = ErrorBody),
    )
)]
pub(crate) async fn list_events(
    tenant: Tenant,
    key: KeyHash,
    State(state): State<AppState>,
    Path(id): Path<String>,
    headers: HeaderMap,
    QueryString(query): QueryString<ListEvents>,
) -> Result<Response, ApiError> {
    let job = job_id(&id)?;
    let wants_stream =
        headers.get_all(ACCEPT).iter().any(|value| value.to_str().is_ok_and(|types| types.contains("text/event-stream")));
    if wants_stream {
        return follow(state, tenant, key, job, &id, &headers).await;
    }
    let page = extract::page::<EventId>(query.after.as_deref(), query.limit, 20, 100, false)?;
    let events = state.store.events(tenant.0, job, page).await.map_err(|e| not_found(e, &id))?;
    Ok(Json(List::new(events.items.into_iter().map(Event::from).collect(), events.has_more)).into_response())
}

/// Where a reader is.
struct Reader {
    state: AppState,
    project: ProjectId,
    job: JobId,
    seq: i64,
    news: watch::Receiver<i64>,
    stopping: watch::Receiver<bool>,
    key: KeyHash,
    is_over: bool,
}

async fn follow(
    state: AppState,
    tenant: Tenant,
    key: KeyHash,
    job: JobId,
    id: &str,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok()).and_then(|id| id.parse::<EventId>().ok());
    let seq = match last {
        Some(event) => state.store.event_seq(tenant.0, job, event).await?,
        None => 0,
    };
    let (rest, ended) = state.store.events_after(tenant.0, job, seq, 1).await.map_err(|e| not_found(e, id))?;
    if last.is_some() && ended && rest.is_empty() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let (news, stopping) = (state.streams.subscribe(job), state.stopping.clone());
    let reader = Reader { project: tenant.0, job, seq, news, stopping, key, is_over: false, state };
    Ok(Sse::new(read(reader)).keep_alive(KeepAlive::default()).into_response())
}

fn read(reader: Reader) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    stream::unfold(reader, |mut reader| async move {
        let events = reader.next().await?;
        Some((stream::iter(events), reader))
    })
    .flatten()
    .map(Ok)
}

impl Reader {
    /// The next events; `None` when nothing can follow.
    async fn next(&mut self) -> Option<Vec<sse::Event>> {
        while !self.is_over {
            if !self.state.known_keys.still_holds(&self.state.store, &self.key).await {
                return None;
            }
            self.news.mark_unchanged();
            let (events, ended) = match self.state.store.events_after(self.project, self.job, self.seq, READ_AT_ONCE).await {
                Ok(found) => found,
                Err(error) => {
                    // The client comes back by itself, and says where it was.
                    tracing::warn!(%error, "a stream of events was cut off");
                    return None;
                }
            };
            self.is_over = ended && events.len() < READ_AT_ONCE as usize;
            if let Some(last) = events.last() {
                self.seq = last.seq;
                let messages = events.into_iter().filter_map(|row| {
                    let event = Event::from(row);
                    sse::Event::default().id(event.id()).json_data(event).ok()
                });
                return Some(messages.collect());
            }
            if self.is_over {
                break;
            }
            tokio::select! {
                changed = self.news.changed() => changed.ok()?,
                () = tokio::time::sleep(BELIEVED) => {}
                () = is_true(&mut self.stopping) => return None,
            }
        }
        None
    }
}
