//! Webhooks and what they were told.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use holdfast_domain::ids::{NoticeId, WebhookId};
use holdfast_store::webhooks::{Delivery as DeliveryRow, Webhook as Row};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::list::Listed;

/// Where a project wants to be told what happened.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WebhookEndpoint {
    #[schema(value_type = String, example = "wh_0192f3a4000070008000000000000001")]
    id: WebhookId,
    #[schema(example = "webhook_endpoint")]
    object: &'static str,
    /// In Unix seconds.
    created_at: i64,
    /// When it or its secret was last changed, in Unix seconds.
    updated_at: i64,
    #[schema(example = "alerts")]
    name: String,
    #[schema(example = "https://example.com/hooks/holdfast")]
    url: String,
    /// What it is told.
    #[schema(value_type = Vec<NoticeType>)]
    event_types: Vec<String>,
    /// Extension: whether it is told anything now.
    enabled: bool,
    /// The last characters of its secret.
    #[schema(example = "whsec_…aLaSw=")]
    signing_secret_hint: String,
    /// Signs what it is told, as Standard Webhooks has it. Shown when the webhook is made and when its secret is changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")]
    signing_secret: Option<String>,
}

impl WebhookEndpoint {
    pub(crate) fn new(row: Row, with_secret: bool) -> Self {
        let secret = STANDARD.encode(row.secret.reveal());
        Self {
            id: row.id,
            object: "webhook_endpoint",
            created_at: row.created_at.unix_timestamp(),
            updated_at: row.updated_at.unix_timestamp(),
            name: row.name,
            url: row.url,
            event_types: row.types,
            enabled: row.enabled,
            signing_secret_hint: format!("whsec_…{}", secret.get(secret.len().saturating_sub(6)..).unwrap_or_default()),
            signing_secret: with_secret.then(|| format!("whsec_{secret}")),
        }
    }
}

impl Listed for WebhookEndpoint {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// What a webhook can be told.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes words that come from the store")]
pub(crate) enum NoticeType {
    #[schema(rename = "fine_tuning.job.succeeded")]
    Succeeded,
    #[schema(rename = "fine_tuning.job.failed")]
    Failed,
    #[schema(rename = "fine_tuning.job.cancelled")]
    Cancelled,
    #[schema(rename = "fine_tuning.job.safety_alarm")]
    SafetyAlarm,
}

/// What webhooks can be told.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct NoticeTypeList {
    #[schema(example = "list")]
    pub(crate) object: &'static str,
    #[schema(value_type = Vec<NoticeType>)]
    pub(crate) data: Vec<&'static str>,
}

/// A request for a webhook.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CreateWebhookEndpoint {
    /// What people call it.
    #[schema(example = "alerts", max_length = 128, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$")]
    pub(crate) name: Option<String>,
    /// An https URL that answers POST with a status below 300. Private addresses are refused unless the operator allows them.
    #[schema(example = "https://example.com/hooks/holdfast", max_length = 2048, pattern = "^https?://")]
    pub(crate) url: String,
    /// What it is told; everything when absent.
    #[schema(value_type = Option<Vec<NoticeType>>, min_items = 1)]
    pub(crate) event_types: Option<Vec<String>>,
}

/// What a webhook is told.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what the store writes")]
pub(crate) struct WebhookEvent {
    /// As the header `webhook-id`.
    #[schema(example = "evt_0192f3a4000070008000000000000001")]
    id: String,
    #[schema(example = "event")]
    object: String,
    /// When it happened, in Unix seconds.
    created_at: i64,
    #[schema(value_type = NoticeType)]
    r#type: String,
    data: WebhookEventData,
}

/// What it happened to.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what the store writes")]
pub(crate) struct WebhookEventData {
    /// The job.
    #[schema(example = "ftjob-0192f3a4000070008000000000000001")]
    id: String,
}

/// A change of a webhook; what is absent stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateWebhookEndpoint {
    #[schema(example = "alerts", max_length = 128, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$")]
    pub(crate) name: Option<String>,
    #[schema(example = "https://example.com/hooks/holdfast", max_length = 2048, pattern = "^https?://")]
    pub(crate) url: Option<String>,
    #[schema(value_type = Option<Vec<NoticeType>>, min_items = 1)]
    pub(crate) event_types: Option<Vec<String>>,
    /// Extension: one that is not enabled is told nothing; what waits for it waits on.
    pub(crate) enabled: Option<bool>,
}

/// A change of a webhook's secret.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct RotateSecret {
    /// Whether the secret it had signs beside the new one for a day.
    pub(crate) keep_old_secret_active_for_24_hours: Option<bool>,
}

/// A request to send a notice that tells of nothing.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TestWebhook {
    #[schema(value_type = NoticeType)]
    pub(crate) event_type: String,
}

/// How a receiver answered a notice that tells of nothing.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WebhookTestResult {
    #[schema(example = "webhook_endpoint.test")]
    pub(crate) object: &'static str,
    #[schema(value_type = String, example = "wh_0192f3a4000070008000000000000001")]
    pub(crate) webhook_endpoint_id: WebhookId,
    #[schema(value_type = NoticeType)]
    pub(crate) event_type: String,
    /// What the receiver answered.
    #[schema(example = 200)]
    pub(crate) status_code: u16,
    /// That it answered.
    pub(crate) success: bool,
}

/// Which webhooks.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListWebhookEndpoints {
    /// The `last_id` of the page before.
    #[param(pattern = "^wh_[0-9a-f]{32}$")]
    pub(crate) after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    pub(crate) limit: Option<u32>,
}

/// The news that a webhook is gone.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DeletedWebhookEndpoint {
    #[schema(value_type = String, example = "wh_0192f3a4000070008000000000000001")]
    pub(crate) id: WebhookId,
    #[schema(example = "webhook_endpoint.deleted")]
    pub(crate) object: &'static str,
    pub(crate) deleted: bool,
}

/// Something a webhook was told, or is to be told.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Delivery {
    /// The notice: `webhook-id` of the request.
    #[schema(value_type = String, example = "evt_0192f3a4000070008000000000000001")]
    id: NoticeId,
    #[schema(example = "webhook.delivery")]
    object: &'static str,
    /// In Unix seconds.
    created_at: i64,
    #[schema(value_type = NoticeType)]
    r#type: String,
    #[schema(value_type = DeliveryState)]
    state: String,
    /// How often it was sent.
    tries: u32,
    /// When it is sent next, in Unix seconds, while it is pending.
    next_try_at: Option<i64>,
    /// The status of the last answer.
    last_status: Option<u16>,
    /// What went wrong at the last try.
    last_error: Option<String>,
}

impl From<DeliveryRow> for Delivery {
    fn from(row: DeliveryRow) -> Self {
        Self {
            id: row.notice,
            object: "webhook.delivery",
            created_at: row.created_at.unix_timestamp(),
            next_try_at: (row.state == "pending").then(|| row.next_try_at.unix_timestamp()),
            r#type: row.kind,
            state: row.state,
            tries: row.tries,
            last_status: row.last_status,
            last_error: row.last_error,
        }
    }
}

impl Listed for Delivery {
    fn id(&self) -> String {
        self.id.to_string()
    }
}

/// Which deliveries.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListDeliveries {
    /// Only those of this state.
    #[param(inline, value_type = DeliveryState, required = false)]
    pub(crate) state: Option<DeliveryState>,
    /// The `last_id` of the page before.
    #[param(pattern = "^evt_[0-9a-f]{32}$")]
    pub(crate) after: Option<String>,
    /// 1 to 100.
    #[param(default = 20, minimum = 1, maximum = 100)]
    pub(crate) limit: Option<u32>,
}

/// What has become of a notice.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DeliveryState {
    /// It is to be sent.
    Pending,
    /// It was taken.
    Delivered,
    /// It was given up.
    Dead,
}

impl DeliveryState {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Dead => "dead",
        }
    }
}
