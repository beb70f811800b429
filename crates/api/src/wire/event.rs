//! Events of a job.

use holdfast_domain::ids::EventId;
use holdfast_store::events::Event as Row;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::list::Listed;
use super::words::{EventLevel, EventType};

/// Something that happened to a job.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Event {
    #[schema(value_type = String, example = "ftevent-0192f3a4000070008000000000000001")]
    id: EventId,
    #[schema(example = "fine_tuning.job.event")]
    object: &'static str,
    /// When, in Unix seconds.
    created_at: i64,
    #[schema(value_type = EventLevel)]
    level: String,
    /// For a person.
    #[schema(example = "Step 10/80: training loss=0.7313, alignment KL=0.0021")]
    message: String,
    #[schema(value_type = EventType)]
    r#type: String,
    /// For a program: of a metric, the figures of a step.
    #[schema(value_type = Option<Object>)]
    data: Option<Value>,
}

impl From<Row> for Event {
    fn from(row: Row) -> Self {
        Self {
            id: row.id,
            object: "fine_tuning.job.event",
            created_at: row.created_at.unix_timestamp(),
            level: row.level,
            message: row.message,
            r#type: row.kind,
            data: row.data,
        }
    }
}

impl Listed for Event {
    fn id(&self) -> String {
        self.id.to_string()
    }
}
