//! The poison gauge: how often the two gradients conflicted, beside what chance and clean rows make of it.

use holdfast_domain::gauge::LEAST_STEPS;

use super::parts::{counted, key};
use crate::report::plot::{self, percent};
use crate::report::{Gauge, Report};

/// Standard deviations that a 95 % interval reaches to either side.
const REACH: f64 = 1.96;

impl Report {
    /// The gauge, where there is something that it measures.
    pub(super) fn read_gauge(&self) -> Option<&Gauge> {
        self.gauge.as_ref().filter(|_| self.safety.defense.projects())
    }

    pub(super) fn poison_gauge(&self) -> String {
        let Some(gauge) = self.read_gauge() else {
            let words = if self.safety.defense.projects() {
                "Nothing to read: the run compared no gradients."
            } else {
                "Nothing to read: this method does not project the task's gradient, and conflicts are not counted."
            };
            return format!("<p>{words}</p>\n");
        };
        let (rate, level, steps) = (percent(gauge.conflict_rate), percent(gauge.alarm_level), self.training.steps);
        let count = counted(steps, "step");
        let is_above = gauge.conflict_rate > gauge.alarm_level;
        let reading = if gauge.alarm {
            let above = if is_above {
                format!("above the level of {level}")
            } else {
                format!("and in more than the level allowed at some step on the way there; it is {level} for the whole run")
            };
            format!(
                "<strong class=\"bad\">✗ Alarm.</strong> The two gradients conflicted in {rate} of {count}, {above}: this run is not like one on clean rows. Rows that undo the alignment make a run look like this. The \
                 alarm closes no gate by itself; it is a reason to read the file, beginning with the rows below where they were \
                 scored."
            )
        } else if steps < LEAST_STEPS {
            format!(
                "<strong>Too few steps to tell.</strong> The two gradients conflicted in {rate} of {count}; no alarm is raised \
                 before {LEAST_STEPS} steps, and above {level} then."
            )
        } else if is_above {
            format!(
                "<strong>No alarm was raised.</strong> The two gradients conflicted in {rate} of {count}. The level was {level} when \
                 this report was made, and another while the job ran."
            )
        } else {
            format!(
                "<strong class=\"good\">✓ No alarm.</strong> The two gradients conflicted in {rate} of {count}; the alarm is \
                 raised above {level}."
            )
        };
        let calibrated = if gauge.calibrated {
            "The level was measured on clean rows of this base model under this method."
        } else {
            "The level is a general one: nothing like this run was measured on clean rows of this base model, so read it as a hint."
        };
        let spread = REACH * (0.25 / steps.max(1) as f64).sqrt();
        let [low, high] = [0.5 - spread, 0.5 + spread].map(|end| end.clamp(0.0, 1.0));
        let keys = [("after", "this run"), ("chance", "chance alone"), ("limit", "alarm level")];
        format!(
            "<p>{reading}</p>\n<div class=\"gauge\">{}{}</div>\n<p class=\"keys\">{}</p>\n<p>{calibrated} On clean rows the \
             gradients conflict about as often as not; in {count} chance alone gives between {} and {}. Rows that undo the \
             alignment make them conflict in most steps.</p>\n",
            plot::gauge(gauge.conflict_rate, [low, high], gauge.alarm_level),
            plot::scale(1.0),
            keys.map(|(class, words)| key(class, words)).concat(),
            percent(low),
            percent(high),
        )
    }
}
