//! Figures for the operator's monitoring, as Prometheus reads them.

use std::fmt::Write;

use axum::extract::State;
use http::header::CONTENT_TYPE;

use crate::auth::Admin;
use crate::{ApiError, AppState, telemetry};

/// The text format's media type.
const FORMAT: &str = "text/plain; version=0.0.4";

/// Read the metrics. Nothing in them names a tenant.
#[utoipa::path(
    get, path = "/metrics", operation_id = "get_metrics", tag = "health",
    responses((status = 200, description = "In Prometheus' text format", body = String, content_type = "text/plain"))
)]
pub(crate) async fn get_metrics(
    _: Admin,
    State(state): State<AppState>,
) -> Result<([(http::HeaderName, &'static str); 1], String), ApiError> {
    let mut text = telemetry::render();
    let s = state.store.statistics().await?;
    let mut gauge = |name: &str, help: &str, values: &[(String, f64)]| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
        for (labels, value) in values {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let one = |value: f64| vec![(String::new(), value)];
    let jobs: Vec<_> = s.jobs.iter().map(|(status, count)| (format!("{{status=\"{status}\"}}"), *count as f64)).collect();
    gauge("holdfast_jobs", "Jobs that have not ended, by status.", &jobs);
    gauge("holdfast_queue_oldest_seconds", "How long the oldest waiting job has waited.", &one(s.oldest_wait_seconds));
    let workers = [("busy", s.busy_workers), ("idle", s.idle_workers), ("lost", s.lost_workers)];
    let workers: Vec<_> = workers.iter().map(|(word, count)| (format!("{{state=\"{word}\"}}"), *count as f64)).collect();
    gauge("holdfast_workers", "Workers, by what they do.", &workers);
    gauge("holdfast_stored_bytes", "Bytes of all files.", &one(s.stored_bytes as f64));
    gauge("holdfast_staged_objects", "Objects that no row claims.", &one(s.staged_objects as f64));
    gauge("holdfast_safety_alarms", "Jobs that raised the alarm of the poison gauge within a day.", &one(s.safety_alarms as f64));
    gauge("holdfast_quarantined_adapters", "Adapters that the safety gate keeps back.", &one(s.quarantined_adapters as f64));
    let notices = [("pending", s.pending_notices), ("dead", s.dead_notices)];
    let notices: Vec<_> = notices.iter().map(|(word, count)| (format!("{{state=\"{word}\"}}"), *count as f64)).collect();
    gauge("holdfast_webhook_notices", "Notices for webhooks that were not taken, by what becomes of them.", &notices);
    if let Some((loss, kl, conflict_rate)) = s.training {
        gauge("holdfast_training_loss", "Mean task loss of the jobs that train, at their last step.", &one(loss));
        gauge("holdfast_training_kl", "Mean alignment loss of the jobs that train, at their last step.", &one(kl));
        gauge("holdfast_training_conflict_rate", "Mean conflict rate of the jobs that train.", &one(conflict_rate));
    }
    Ok(([(CONTENT_TYPE, FORMAT)], text))
}
