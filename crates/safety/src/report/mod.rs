//! The safety report of a job: what its training did, what its model answers before and after, and whether it passed.

use holdfast_domain::frame::Shape;
use holdfast_domain::gauge::{Clean, LEAST_STEPS};
use holdfast_domain::policy::AppliedPolicy;
use holdfast_domain::progress::Step;
use holdfast_domain::safety::Safety;
use serde::{Deserialize, Serialize};

mod evaluation;
mod gate;
mod html;
mod plot;
mod training;

pub use evaluation::{Counts, Estimate, Evaluation, Judged, Rise, SuiteFigures, TaskFigures, unwanted};
pub use gate::{Finding, Verdict, Within};
pub use training::{Point, Reviews, Training, Validation};

/// The name of a report beside its manifest.
pub const FILE: &str = "safety_report.json";
/// The form of [`Report`] this program writes.
pub const FORMAT: u32 = 1;

/// The safety report of a job. Holds no text of anybody's: rows are named by their lines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = SafetyReport))]
pub struct Report {
    /// Which form it has: 1.
    pub format: u32,
    /// The job.
    pub job: String,
    /// The claim that made it.
    pub attempt: i32,
    /// The base model's public name.
    pub base_model: String,
    /// What the training was held to.
    #[cfg_attr(feature = "schema", schema(value_type = Object))]
    pub safety: Safety,
    /// Which version of the alignment set; absent where there is none, and in reports of before they said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment_set_version: Option<u32>,
    /// The operator's policy, as it was when the job was created; what is as usual is left out of it. Absent for jobs of before there were any.
    #[cfg_attr(feature = "schema", schema(value_type = Option<Object>))]
    pub policy: Option<AppliedPolicy>,
    /// The frames that were found in the training file: whether each has a `system_prompt`, how many `earlier_turns` it has, and how many
    /// `opening_words` and `closing_words` stand around what is asked. Half of the alignment rows, where there are some, were repeated
    /// in them, and harmful suites, where any was asked, were asked in each. None of a job that made no adapter: its worker alone knew
    /// them.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Vec<Object>))]
    pub frames: Vec<Shape>,
    /// How the job ended, where it made no adapter: nothing was asked then, and no manifest has the report's hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unfinished: Option<String>,
    /// What the training did.
    pub training: Training,
    /// Whether the gradients conflicted more often than clean rows make them; absent under methods without an alignment gradient.
    pub gauge: Option<Gauge>,
    /// What the model answers; absent where nothing was asked.
    pub evaluation: Option<Evaluation>,
    /// Why there is no evaluation, where the policy asks for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_judged: Option<String>,
    /// What the gate found; absent where nothing was asked.
    pub gate: Option<Verdict>,
    /// What it found of the run's last adapter, where a checkpoint took its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced: Option<Verdict>,
    /// The rows that push hardest against the alignment, the worst first; empty where rows were not scored.
    pub worst_rows: Vec<RowScore>,
}

/// The poison gauge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = PoisonGauge))]
pub struct Gauge {
    /// The share of the run's steps in which the gradients conflicted.
    pub conflict_rate: f64,
    /// Above which a run is not like one on clean rows.
    pub alarm_level: f64,
    /// Whether the level was measured on clean rows of this base; else it is the one that counts until then.
    pub calibrated: bool,
    /// Whether the run passed the level.
    pub alarm: bool,
    /// Whether it had as many steps as an alarm needs: no alarm says nothing otherwise.
    #[serde(default = "as_before")]
    pub enough_steps: bool,
}

/// What reports did not say before they had a word for it.
const fn as_before() -> bool {
    true
}

impl Gauge {
    /// Read after a run's last step; `clean` is what was measured of runs like it, and `alarm` whether it raised one. `None` where the method
    /// counts no conflicts.
    #[must_use]
    pub fn after(last: Option<&Step>, safety: &Safety, clean: Option<Clean>, alarm: bool) -> Option<Self> {
        let step = last.filter(|_| safety.defense.projects())?;
        let conflict_rate = step.alignment.as_ref()?.conflict_rate;
        let alarm_level = clean.unwrap_or(Clean::UNMEASURED).threshold(step.step);
        let enough_steps = step.step >= LEAST_STEPS;
        Some(Self { conflict_rate, alarm_level, calibrated: clean.is_some(), alarm, enough_steps })
    }
}

/// How hard a row pushes against the alignment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct RowScore {
    /// Its line in the training file, from 1.
    pub line: u64,
    /// By its gradient: below 0 where a step along the row raises the alignment loss. Scores are compared within a job.
    pub gradient: Option<f64>,
    /// By a forward pass: how the row's loss falls where the alignment loss rises.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward: Option<f64>,
}

/// A row's text, for its owner; beside the report, and gone with the file it stands in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowText {
    /// Its line in the training file, from 1.
    pub line: u64,
    /// As it was uploaded.
    pub text: String,
}
