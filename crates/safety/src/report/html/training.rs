//! How the training went: its curves, what the projection removed, what the reviews of a budget found, and the validation file.

use std::fmt::Write as _;

use holdfast_domain::safety::{Defense, KlPositions, ProjectionOf, ProjectionSpace, Safety};

use super::parts::{counted, figure, table};
use crate::report::plot::{Curve, Unit, number, percent};
use crate::report::{Gauge, Point, Report, Reviews, Validation};

impl Report {
    pub(super) fn curves(&self) -> String {
        let (points, defense) = (self.training.curve.len() as u64, self.safety.defense);
        let drawn: String = self.drawn().iter().map(figure).collect();
        if drawn.is_empty() {
            return "<p>There is nothing to draw: the run took no steps.</p>\n".into();
        }
        let each = match self.training.steps.div_ceil(points.max(1)) {
            0 | 1 => "a step".to_owned(),
            steps => format!("the mean of {steps} steps"),
        };
        let missing = match defense {
            Defense::None => " Without alignment rows there is no KL and no conflict to draw.",
            _ if defense.projects() => "",
            _ => " The method projects nothing, so there is no conflict to draw.",
        };
        format!(
            "<p>Each dot is {each}; where there are many, the line is their moving mean.{missing}</p>\n\
             <div class=\"curves\">\n{drawn}</div>\n"
        )
    }

    /// Every curve there may be under the job's method.
    fn drawn(&self) -> Vec<Curve<'static>> {
        let defense = self.safety.defense;
        let curve = |name, about, unit, figure: fn(&Point) -> Option<f64>| {
            Curve::new(name, about, unit, self.training.curve.iter().map(|point| (point.step, figure(point))).collect())
        };
        let task = curve("Task loss", "nats", Unit::Plain, |point| point.task_loss);
        if defense == Defense::None {
            return vec![task];
        }
        let (name, about) = alignment_loss(&self.safety);
        let mut alignment = curve(name, about, Unit::Plain, |point| point.align_kl);
        if defense == Defense::Held {
            let words = format!("the budget, {} nats", self.safety.budget);
            alignment.levels.push((self.safety.budget, "limit", words));
        }
        let mut cosine = curve("Cosine of the two gradients", "below 0 they conflict", Unit::Plain, |point| point.cosine);
        cosine.holds = [-0.1, 0.1];
        if !defense.projects() {
            return vec![task, alignment, cosine];
        }
        let mut conflict = curve("Conflict rate", "share of steps", Unit::Share, |point| point.conflict_rate);
        conflict.holds = [0.0, 1.0];
        // A step conflicts or does not: it takes more of them for a mean that says something.
        conflict.parts = 5;
        if let Some(Gauge { conflict_rate, alarm_level, .. }) = self.gauge {
            conflict.levels = vec![
                (conflict_rate, "whole", format!("the whole run, {}", percent(conflict_rate))),
                (alarm_level, "limit", format!("alarm where the whole run is above {}", percent(alarm_level))),
            ];
        }
        let (_, about) = projected(&self.safety);
        let removed = curve("Projected away", about, Unit::Share, |point| point.removed);
        vec![task, alignment, conflict, cosine, removed]
    }

    pub(super) fn projection(&self) -> String {
        let (training, defense) = (&self.training, self.safety.defense);
        let (steps, (what, _)) = (counted(training.steps, "step"), projected(&self.safety));
        let mut words = match training.projected_steps {
            _ if !defense.projects() => format!("{} Nothing was projected away.", instead(defense)),
            0 => format!("In none of {steps} did the {what} work against the alignment: nothing was projected away."),
            projected => format!(
                "In {projected} of {steps} ({}) the {what} worked against the alignment, and the part that did was taken out.",
                percent(projected as f64 / training.steps.max(1) as f64)
            ),
        };
        if let Some(removed) = training.mean_removed.filter(|_| defense.projects()) {
            let _ = write!(words, " There it was {} of its length on average.", percent(removed));
        }
        if let Some(cosine) = training.mean_cosine.filter(|_| defense.projects()) {
            let _ =
                write!(words, " Over the whole run the mean cosine of the two gradients was {}.", number(cosine, Unit::Plain));
        }
        if let Some(loss) = training.final_kl.filter(|_| defense != Defense::None) {
            let ((name, about), loss) = (alignment_loss(&self.safety), number(loss, Unit::Plain));
            let _ = write!(words, " {name} over the last tenth of the steps: {loss} {about}.");
        }
        format!("<p>{words}</p>\n{}", training.reviews.map_or_else(String::new, |reviews| self.reviews(reviews)))
    }

    /// What came of holding the run to its budget.
    fn reviews(&self, Reviews { made, taken_back, largest_kept }: Reviews) -> String {
        let times = |count: u64| if count == 1 { "once".to_owned() } else { format!("{count} times") };
        let most = number(2.0 * self.safety.budget, Unit::Plain);
        let kept = match largest_kept {
            Some(loss) => format!("the largest that was kept is {} nats", number(loss, Unit::Plain)),
            None => "nothing that was measured was kept".to_owned(),
        };
        let back = match taken_back {
            0 => "It was never more".to_owned(),
            count => format!("It was more {}, and the steps since the measurement before were taken back", times(count)),
        };
        format!(
            "<p>The KL was measured {} on alignment rows that no step trains on, where at most {most} nats are kept, twice the \
             budget. {back}; {kept}.</p>\n",
            times(made)
        )
    }

    pub(super) fn validation(&self) -> String {
        let measured = &self.training.validation;
        let is_many = measured.len() > 2;
        let lowest = measured.iter().map(|point| point.loss).fold(f64::INFINITY, f64::min);
        let is_end = |at: usize| at == 0 || at + 1 == measured.len();
        let rows = measured.iter().enumerate().filter(|(at, point)| is_end(*at) || point.loss <= lowest);
        let rows = rows.map(|(_, Validation { step, loss, token_accuracy })| {
            let when = if *step == 0 { "Before training".to_owned() } else { format!("After step {step}") };
            let lowest = if is_many && *loss <= lowest { ", the lowest loss" } else { "" };
            vec![format!("{when}{lowest}"), number(*loss, Unit::Plain), percent(*token_accuracy)]
        });
        let rows: Vec<_> = rows.collect();
        if rows.is_empty() {
            return String::new();
        }
        let table = table("", &["Measured", "#Loss, nats", "#Tokens ranked first"], &rows);
        let points = measured.iter().map(|point| (point.step, Some(point.loss))).collect();
        let drawn = if is_many { figure(&Curve::new("Validation loss", "nats", Unit::Plain, points)) } else { String::new() };
        format!("{table}<div class=\"curves\">\n{drawn}</div>\n")
    }
}

/// What a method holds alignment rows to, and its unit.
fn alignment_loss(safety: &Safety) -> (&'static str, &'static str) {
    match safety.defense {
        Defense::Held => ("Weighted KL on alignment rows", "nats"),
        Defense::KlPenalty | Defense::Pcgrad | Defense::Safegrad if safety.kl_positions == KlPositions::Deciding => {
            ("Weighted KL on alignment rows", "nats")
        }
        Defense::None | Defense::KlPenalty | Defense::Pcgrad | Defense::Safegrad => ("Mean KL on alignment rows", "nats"),
        Defense::SafeMix | Defense::Lisa => ("Loss on alignment rows", "nats"),
        Defense::Sbr => ("Mean squared distance to the base's states", "on alignment prompts"),
    }
}

/// What a method takes a part away of, and what that part is a share of.
const fn projected(safety: &Safety) -> (&'static str, &'static str) {
    match (safety.projection_space, safety.projection) {
        (ProjectionSpace::Update, _) => ("optimiser's update", "share of the update's length"),
        (ProjectionSpace::Gradient, ProjectionOf::PerRow) => ("gradient of some row", "share of the task gradient's length"),
        (ProjectionSpace::Gradient, ProjectionOf::Batch) => ("task's gradient", "share of the task gradient's length"),
    }
}

/// What a method does that does not project.
const fn instead(defense: Defense) -> &'static str {
    match defense {
        Defense::SafeMix => "The method mixes alignment rows into the training.",
        Defense::Lisa => "The method trains on alignment rows and on the job's own in turns.",
        Defense::KlPenalty => "The method adds the KL to the base as a penalty.",
        Defense::Sbr => "The method holds the hidden states on alignment prompts to the base's.",
        _ => "This is plain fine-tuning: nothing held the model to its alignment.",
    }
}
