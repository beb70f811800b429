//! What the model answers, and what the gate makes of it.

use std::fmt::Write as _;

use holdfast_domain::policy::Measure;

use super::parts::{counted, key, table};
use super::text::escape;
use crate::judge::Class;
use crate::report::plot::{self, Unit, number, percent, tenths};
use crate::report::{Finding, Report, Rise, SuiteFigures, TaskFigures, Verdict};
use crate::share::Share;
use crate::suite::Kind;

/// Where the scale of the bars ends: at the first of these that holds them all, else at 1.
const SCALES: [f64; 4] = [0.2, 0.4, 0.6, 0.8];

impl Report {
    pub(super) fn answers(&self) -> String {
        let Some(evaluation) = &self.evaluation else { return "<p>Nothing was asked of the model.</p>\n".into() };
        let gate = self.gate.as_ref();
        let mut html = String::from(
            "<p>The same requests, put to the base model and to the fine-tuned one. Bars show the share of answers that should \
             not be; the thin lines are 95 % intervals. Rises have theirs by the paired bootstrap over the requests, and by \
             Newcombe's scores where those are wider.</p>\n",
        );
        html.push_str(&gate.map_or_else(String::new, findings));
        let suites: Vec<_> = evaluation.suites.iter().map(|suite| (suite, Bar::both(suite, gate))).collect();
        let most = suites.iter().flat_map(|(_, measures)| measures).map(Bar::most).fold(0.0, f64::max);
        let most = SCALES.into_iter().find(|end| *end >= most).unwrap_or(1.0);
        let drawn: String = suites.iter().map(|(figures, measures)| suite(figures, measures, most)).collect();
        let _ = writeln!(html, "<div class=\"suites\">\n{drawn}</div>");
        html.push_str(&evaluation.task.as_ref().map_or_else(String::new, task));
        html
    }
}

/// A share of a suite's answers that should be small, before and after.
struct Bar<'a> {
    name: &'static str,
    class: Class,
    suite: &'a SuiteFigures,
    rise: Option<Rise>,
    /// The largest share that passes.
    closes_at: Option<f64>,
}

impl<'a> Bar<'a> {
    /// What should not be, and what is no answer.
    fn both(suite: &'a SuiteFigures, gate: Option<&Verdict>) -> [Self; 2] {
        let (name, class) = (unwanted_words(suite.kind), crate::report::unwanted(suite.kind));
        // Of a frame by itself only what is certain counts, which no mark on its share can show.
        let gate = gate.filter(|_| suite.frame.is_none());
        let finding = |measure: Measure| gate?.findings.iter().find(|finding| finding.measure == measure);
        let closes_at = |class: Class, measure: Measure| {
            let limit = finding(measure)?.limit;
            Some((suite.before.share(class).value() + limit).min(1.0))
        };
        let limit = closes_at(
            class,
            match suite.kind {
                Kind::Harmful => Measure::HarmfulComplianceRise,
                Kind::Benign => Measure::OverRefusalRise,
            },
        );
        let degenerate = closes_at(Class::Degenerate, Measure::DegenerateRise);
        [
            Self { name, class, suite, rise: suite.rise, closes_at: limit },
            Self {
                name: "No answer at all",
                class: Class::Degenerate,
                suite,
                rise: suite.degenerate_rise,
                closes_at: degenerate,
            },
        ]
    }

    /// The end of a scale that has room for it.
    fn most(&self) -> f64 {
        let ends = [self.suite.before, self.suite.after].map(|counts| counts.share(self.class).interval()[1]);
        ends.into_iter().chain(self.closes_at).fold(0.0, f64::max)
    }

    fn html(&self, most: f64) -> String {
        let mut html = format!("<h4>{}</h4>\n", self.name);
        let sides = [("Base", self.suite.before, "before", None), ("Fine-tuned", self.suite.after, "after", self.closes_at)];
        for (name, counts, class, limit) in sides {
            let share = counts.share(self.class);
            let [low, high] = share.interval().map(|end| tenths(100.0 * end));
            let _ = writeln!(
                html,
                "<div class=\"share\"><span>{name}</span><span><strong>{} of {}</strong>, {} <span class=\"dim\">({low} to \
                 {high})</span></span></div>\n{}",
                share.count,
                share.of,
                percent(share.value()),
                plot::bar(name, share, class, most, limit)
            );
        }
        let (scale, rise) = (plot::scale(most), self.rise.as_ref().map_or_else(|| "not known".to_owned(), rise));
        let _ = writeln!(html, "{scale}<div class=\"share\"><span>Rise</span><span>{rise}</span></div>");
        html
    }
}

/// What should not become of a kind of requests.
const fn unwanted_words(kind: Kind) -> &'static str {
    match kind {
        Kind::Harmful => "Complied with",
        Kind::Benign => "Refused",
    }
}

fn rise(rise: &Rise) -> String {
    format!("<strong>{}</strong>{}", points(rise.value), interval(rise))
}

fn interval(rise: &Rise) -> String {
    let [low, high] = rise.interval.map(signed_tenths);
    format!(" <span class=\"dim\">({low} to {high})</span>")
}

/// A difference of shares.
fn points(share: f64) -> String {
    format!("{}\u{a0}points", signed_tenths(share))
}

fn signed_tenths(share: f64) -> String {
    let points = tenths(100.0 * share);
    if share > 0.0 && points != "0" { format!("+{points}") } else { points }
}

fn suite(suite: &SuiteFigures, measures: &[Bar<'_>; 2], most: f64) -> String {
    let title = match suite.kind {
        Kind::Harmful => "Requests it should refuse",
        Kind::Benign => "Requests it should answer",
    };
    let asked = counted(suite.after.share(Class::Refusal).of.into(), "request");
    let whose = suite.name.as_ref().map_or_else(String::new, |name| format!(" of the operator's own suite {}", escape(name)));
    let within = suite.frame.map_or_else(String::new, |number| format!(", asked in frame {number} of the training file"));
    let mut html =
        format!("<article>\n<h3>{title}</h3>\n<p class=\"dim\">{asked}{whose}, version {}{within}</p>\n", suite.version);
    html.extend(measures.iter().map(|measure| measure.html(most)));
    if measures.iter().any(|measure| measure.closes_at.is_some()) {
        let _ = writeln!(html, "<p class=\"keys\">{}</p>", key("limit", "the most that passes, from where the base stands"));
    }
    if let Some(kl) = suite.kl {
        let kl = number(kl, Unit::Plain);
        let _ = writeln!(html, "<p>Mean KL to the base over the base's own answers: <strong>{kl}</strong> nats a token.</p>");
    }
    if suite.by_category.is_empty() {
        html.push_str("</article>\n");
        return html;
    }
    let rows = suite.by_category.iter().map(|(name, counts)| {
        let share = counts.share(crate::report::unwanted(suite.kind));
        let count = format!("{} of {}", share.count, share.of);
        vec![escape(name), count, percent(share.value()), counts.degenerate.to_string()]
    });
    let columns = ["Category", &format!("#{}", unwanted_words(suite.kind)), "#Share", "#No answer"];
    let table = table("", &columns, &rows.collect::<Vec<_>>());
    let _ =
        writeln!(html, "<details>\n<summary>The fine-tuned model's answers by category</summary>\n{table}</details>\n</article>");
    html
}

/// How often the job's own validation rows were answered as they are.
fn task(task: &TaskFigures) -> String {
    let [before, after] = task.shares();
    let cells = |name: &str, share: Share| {
        let [low, high] = share.interval().map(|end| tenths(100.0 * end));
        let found = format!("{} <span class=\"dim\">({low} to {high})</span>", percent(share.value()));
        vec![name.to_owned(), format!("{} of {}", share.count, share.of), found]
    };
    let rows = [cells("Base", before), cells("Fine-tuned", after)];
    let rise = task.rise.as_ref().map_or_else(|| "not known".to_owned(), rise);
    format!(
        "<p>Rows of the job's validation file with short answers, answered word for word as they are, but for case and spaces:</p>\n{}         <p>Rise: {rise}</p>\n",
        table("The job's own task", &["Model", "#As in the file", "#Share (95 % interval)"], &rows)
    )
}

/// What a gate found, measure by measure.
fn findings(gate: &Verdict) -> String {
    let rows = gate.findings.iter().map(|Finding { measure, value, interval: ends, within, limit, passed, .. }| {
        let name = named(*measure).to_owned() + &within.map_or_else(String::new, |within| format!(", {within}"));
        let of = value.zip(*ends).map(|(value, interval)| Rise { value, interval });
        let shown = |value: f64| {
            if *measure == Measure::Kl { format!("{}\u{a0}nats", number(value, Unit::Plain)) } else { points(value) }
        };
        let found = value.map_or_else(|| "not measured".to_owned(), shown) + &of.as_ref().map_or_else(String::new, interval);
        let result = match (passed, value) {
            (true, _) => "<strong class=\"good\">✓\u{a0}within</strong>",
            (false, Some(_)) => "<strong class=\"bad\">✗\u{a0}beyond</strong>",
            (false, None) => "<strong class=\"bad\">✗\u{a0}unknown</strong>",
        };
        vec![name, found, shown(*limit), result.to_owned()]
    });
    let rows: Vec<_> = rows.collect();
    let caption = if gate.enabled { "What the gate holds it to" } else { "What the gate would hold it to; it is off" };
    if rows.is_empty() {
        String::new()
    } else {
        let blind: String = gate.findings.iter().map(blind).collect();
        table(caption, &["Measure", "#Found (95 % interval)", "#At most", "Result"], &rows) + &blind
    }
}

/// Where a measure could not have been beyond its limit.
fn blind(finding: &Finding) -> String {
    let places: Vec<String> = finding.blind.iter().map(ToString::to_string).collect();
    if places.is_empty() {
        return String::new();
    }
    format!(
        "<p><strong>{}</strong> could not be seen {}: the base itself is too near the most there can be.</p>\n",
        named(finding.measure),
        places.join(", ")
    )
}

/// A measure of a gate in words.
const fn named(measure: Measure) -> &'static str {
    match measure {
        Measure::HarmfulComplianceRise => "Rise in compliance, harmful requests",
        Measure::OverRefusalRise => "Rise in refusals, benign requests",
        Measure::DegenerateRise => "Rise in degenerate answers, worse suite",
        Measure::Kl => "KL to the base, worse suite",
    }
}
