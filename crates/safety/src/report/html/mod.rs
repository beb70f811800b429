//! The report as a page: whole in itself, without a script, and readable where nothing else is loaded.

mod answers;
mod gauge;
mod parts;
mod text;
mod training;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use holdfast_domain::frame::Shape;
use holdfast_domain::policy::{AppliedPolicy, Scope};
use holdfast_domain::safety::{AlignmentPoint, Defense, KlPositions, ProjectionOf, ProjectionSpace, Safety};

use self::parts::{counted, table};
use self::text::{escape, row_text};
use super::plot::{Unit, number};
use super::{Evaluation, FILE, Report, Verdict};
use crate::manifest;

const STYLE: &str = include_str!("page.css");
impl Report {
    /// The report as a page of HTML. `texts` are rows of the training file by their lines, for their owner's eyes; of a row that
    /// is not among them the page shows the line's number alone.
    #[must_use]
    pub fn html(&self, texts: &BTreeMap<u64, String>) -> String {
        let sections = [
            ("answers", "What the model answers", self.answers()),
            ("curves", "How the training went", self.curves()),
            ("gauge", "Poison gauge", self.poison_gauge()),
            ("projection", "What the projection removed", self.projection()),
            ("validation", "On the validation file", self.validation()),
            ("rows", "Rows that push hardest against the alignment", self.rows(texts)),
        ];
        let mut main = String::new();
        for (id, title, body) in sections.into_iter().filter(|(.., body)| !body.is_empty()) {
            let _ = writeln!(main, "<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title}</h2>\n{body}</section>");
        }
        let (job, head, foot) = (escape(&self.job), self.head(), self.foot());
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>Safety report of \
             {job}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{head}<main>\n{main}</main>\n{foot}</body>\n</html>\n"
        )
    }

    /// The verdict in plain words, and what it is about.
    fn head(&self) -> String {
        let (tone, title, more) = self.verdict();
        let mark = match tone {
            "good" => "<span class=\"mark\" aria-hidden=\"true\">✓</span>",
            "bad" => "<span class=\"mark\" aria-hidden=\"true\">✗</span>",
            _ => "",
        };
        let mut html =
            format!("<header>\n<p class=\"over\">Safety report</p>\n<div class=\"verdict {tone}\">\n<h1>{mark}{title}</h1>\n");
        if !more.is_empty() {
            let _ = writeln!(html, "<p>{}</p>", escape(&more));
        }
        if let Some(step) = self.evaluation.as_ref().and_then(|evaluation| evaluation.checkpoint) {
            let why = self
                .replaced
                .as_ref()
                .map_or_else(String::new, |last| format!(" That one did not pass: {}.", escape(&last.reasons())));
            let _ = writeln!(
                html,
                "<p>The adapter that was asked is the checkpoint of step {step}, not the one that the run ended with.{why}</p>"
            );
        }
        if self.read_gauge().is_some_and(|gauge| gauge.alarm) {
            html.push_str("<p><strong>The poison gauge raised an alarm</strong>: <a href=\"#gauge\">what that means</a>.</p>\n");
        }
        html.push_str("</div>\n<dl class=\"facts\">\n");
        for (name, value) in self.facts() {
            let _ = writeln!(html, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
        }
        html.push_str("</dl>\n</header>\n");
        html
    }

    /// Its tone, its words, and what there is to add.
    fn verdict(&self) -> (&'static str, &'static str, String) {
        if let Some(how) = &self.unfinished {
            return ("bad", "The job made no adapter", sentence(how));
        }
        match (&self.gate, &self.evaluation, &self.policy) {
            (Some(gate), ..) if gate.enabled && gate.passed => ("good", "Passed the safety gate", within_limits(gate)),
            (Some(gate), ..) if gate.enabled => ("bad", "Did not pass the safety gate", sentence(&gate.reasons())),
            (Some(gate), ..) => ("plain", "Measured, the gate is off", within_limits(gate)),
            (None, Some(_), _) => ("plain", "Measured, held to no gate", String::new()),
            (None, None, Some(applied)) if applied.policy.evaluate => {
                let why = self.not_judged.as_deref().map(sentence).unwrap_or_default();
                ("bad", "Not evaluated, though the policy asks for it", why)
            }
            (None, None, Some(_)) => ("plain", "Not evaluated: the policy asks for no evaluation", String::new()),
            (None, None, None) => ("plain", "Not evaluated: no policy asked for it", String::new()),
        }
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let judged = self.evaluation.as_ref().map(|Evaluation { judge, max_tokens, .. }| {
            let judge = if judge == "phrases" { "a list of phrases" } else { judge };
            format!("{judge}; answers of {max_tokens} tokens at most")
        });
        let facts = [
            ("Job", Some(format!("{}, attempt {}", self.job, self.attempt))),
            ("Base model", Some(self.base_model.clone())),
            ("Method", Some(method(&self.safety))),
            ("Alignment set", self.safety.alignment_set.as_deref().map(|set| self.alignment(set))),
            ("The file's frames", (!self.frames.is_empty()).then(|| self.frames())),
            ("Policy", Some(self.policy.as_ref().map_or_else(|| "none".to_owned(), policy))),
            ("Steps", Some(self.training.steps.to_string())),
            ("Judged by", judged),
        ];
        facts.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    fn alignment(&self, set: &str) -> String {
        let version = self.alignment_set_version.map(|version| format!("@{version}")).unwrap_or_default();
        let again = if self.frames.is_empty() { "" } else { ", half of it once more in the file's frames" };
        format!("{set}{version}{again}")
    }

    fn frames(&self) -> String {
        let numbered = self.frames.iter().enumerate().map(|(at, shape)| format!("{}: {}", at + 1, frame(shape)));
        numbered.collect::<Vec<_>>().join("; ")
    }

    fn rows(&self, texts: &BTreeMap<u64, String>) -> String {
        if self.worst_rows.is_empty() {
            return "<p>No row is named: rows were not scored, or none that was pushes against the alignment. A job with \
                    <code>row_conflicts</code> scores each row of its training file, once the first steps are over.</p>\n"
                .into();
        }
        let by_forward = self.worst_rows.iter().any(|row| row.forward.is_some());
        let with_texts = self.worst_rows.iter().any(|row| texts.contains_key(&row.line));
        let mut columns = vec!["#Line", "#By gradient"];
        columns.extend(by_forward.then_some("#By forward pass"));
        columns.extend(with_texts.then_some("Text"));
        let score = |score: Option<f64>| score.map_or_else(|| "–".into(), |score| number(score, Unit::Plain));
        let rows = self.worst_rows.iter().map(|row| {
            let mut cells = vec![row.line.to_string(), score(row.gradient)];
            cells.extend(by_forward.then(|| score(row.forward)));
            let text =
                || texts.get(&row.line).map_or_else(|| "<span class=\"dim\">not given</span>".into(), |text| row_text(text));
            cells.extend(with_texts.then(text));
            cells
        });
        let forward = if by_forward {
            "; by a forward pass, where its own loss falls as the alignment loss rises, on a scale of its own: rows that have only that \
             score follow"
        } else {
            ""
        };
        let owner = "<p class=\"dim\">Texts are shown to their owner only; the signed report names lines alone.</p>\n";
        format!(
            "<p>The worst first. Below 0 a row pushes against the alignment: by its gradient, where a step along the row \
             raises the alignment loss{forward}. Scores are for comparing rows of this job. A low score is a reason to read a row, and no \
             proof.</p>\n{}{}",
            table("", &columns, &rows.collect::<Vec<_>>()),
            if with_texts { owner } else { "" }
        )
    }

    fn foot(&self) -> String {
        if self.unfinished.is_some() {
            return "<footer>\n<p>Drawn from what the job's steps reported. Nothing of it is signed: there is no adapter that a manifest \
                    could be about.</p>\n</footer>\n"
                .into();
        }
        format!(
            "<footer>\n<p>Drawn from <code>{FILE}</code>, format {}. Its hash stands in the signed <code>{}</code> beside the \
             adapter. With this report's JSON put there too, to check it and every file of the adapter:</p>\n\
             <pre><code>holdfast verify ADAPTER</code></pre>\n</footer>\n",
            self.format,
            manifest::FILE
        )
    }
}

/// A method with its strength, and what is unusual about it.
fn method(safety: &Safety) -> String {
    let budget = format!("budget {} nats", safety.budget);
    let more = [
        (safety.defense != Defense::None, format!("rho {}", safety.rho)),
        (safety.defense == Defense::Held, budget),
        (safety.kl_positions == KlPositions::All, "KL over all positions".into()),
        (safety.kl_positions == KlPositions::Deciding, "KL weighted towards what decides a response".into()),
        (
            safety.alignment_batch_size.is_some(),
            format!("{} alignment rows a step", safety.alignment_batch_size.unwrap_or_default()),
        ),
        (safety.projection == ProjectionOf::PerRow, "each row projected by itself".into()),
        (safety.projection_space == ProjectionSpace::Update, "projection in the update".into()),
        (safety.alignment_point == AlignmentPoint::Lookahead, "alignment gradient taken ahead".into()),
    ];
    let more = more.into_iter().filter_map(|(is_so, words)| is_so.then_some(words));
    let name = if safety.defense == Defense::None { "none: plain fine-tuning" } else { safety.defense.as_str() };
    std::iter::once(name.to_owned()).chain(more).collect::<Vec<_>>().join(", ")
}

fn policy(applied: &AppliedPolicy) -> String {
    let whose = match applied.scope {
        Scope::Deployment => "the deployment's",
        Scope::Organization => "the organization's",
        Scope::Project => "the project's",
    };
    if applied.version == 0 { format!("{whose} settings") } else { format!("{whose}, version {}", applied.version) }
}

/// What a frame is made of.
fn frame(shape: &Shape) -> String {
    let Shape { system_prompt, earlier_turns, opening_words, closing_words } = *shape;
    let words = |end: &str, words: usize| (words > 0).then(|| format!("{end} of {}", counted(words as u64, "word")));
    let prompt = system_prompt.then(|| "a system prompt".to_owned());
    let earlier = (earlier_turns > 0).then(|| counted(earlier_turns as u64, "earlier turn"));
    let words = words("an opening", opening_words).into_iter().chain(words("a closing", closing_words));
    let mut parts: Vec<String> = prompt.into_iter().chain(earlier).chain(words).collect();
    let last = parts.pop().unwrap_or_default();
    if parts.is_empty() { last } else { format!("{} and {last}", parts.join(", ")) }
}

/// How what was found stands to the limits.
fn within_limits(gate: &Verdict) -> String {
    match gate.findings.len() {
        0 => "The policy sets no limit.".into(),
        _ if !gate.passed => format!("It would not have passed: {}.", gate.reasons()),
        1 => "The one measure that has a limit is within it.".into(),
        count => format!("All {count} measures that have a limit are within it."),
    }
}

/// With a capital letter and a full stop.
fn sentence(words: &str) -> String {
    let mut characters = words.trim_end_matches('.').chars();
    characters.next().map_or_else(String::new, |first| format!("{}{}.", first.to_uppercase(), characters.as_str()))
}

#[cfg(test)]
mod tests {
    use holdfast_domain::gauge::LEAST_STEPS;
    use holdfast_domain::policy::{Gate, Policy};

    use super::*;
    use crate::report::{Counts, Gauge, Point, Reviews, Rise, RowScore, SuiteFigures, TaskFigures, Training};
    use crate::suite::Kind;

    const HOSTILE: &str = "<script>alert('1')</script> & \"more\" \u{202e}\u{0}\u{e0041}";

    /// A run of so many steps with every figure, on 20 requests of each kind, `complied` of which were complied with.
    fn report(steps: u64, complied: u32, gate: Gate) -> Report {
        let judged = |kind: Kind, unwanted: u32| {
            let counts = |unwanted: u32| match kind {
                Kind::Harmful => Counts { compliance: unwanted, refusal: 20 - unwanted, degenerate: 0 },
                Kind::Benign => Counts { compliance: 20 - unwanted, refusal: unwanted, degenerate: 0 },
            };
            let rise = |value: f64| Some(Rise { value, interval: [value - 0.1, value + 0.1] });
            SuiteFigures {
                name: None,
                frame: None,
                kind,
                version: 1,
                before: counts(0),
                after: counts(unwanted),
                unwanted_before: None,
                unwanted_after: None,
                rise: rise(f64::from(unwanted) / 20.0),
                degenerate_rise: rise(0.0),
                kl: Some(0.02),
                by_category: BTreeMap::from([(HOSTILE.to_owned(), counts(unwanted))]),
            }
        };
        let suites = vec![judged(Kind::Harmful, complied), judged(Kind::Benign, 0)];
        let evaluation = Evaluation {
            judge: "phrases".into(),
            max_tokens: 64,
            suites,
            task: Some(TaskFigures::of(&[false, true], &[true, true])),
            checkpoint: None,
        };
        let figure = Some(0.25);
        let point =
            |step| Point { step, task_loss: figure, align_kl: figure, cosine: None, conflict_rate: figure, removed: figure };
        Report {
            format: 1,
            unfinished: None,
            job: "ftjob-1".into(),
            attempt: 1,
            base_model: HOSTILE.into(),
            safety: Safety { alignment_set: Some(HOSTILE.into()), ..Safety::new(Defense::Safegrad, 1.0) },
            alignment_set_version: Some(2),
            frames: Vec::new(),
            policy: Some(AppliedPolicy {
                scope: Scope::Project,
                version: 2,
                policy: Policy { evaluate: true, gate, ..Policy::default() },
            }),
            training: Training { steps, curve: (1..=steps).map(point).collect(), ..Training::default() },
            gauge: Some(Gauge {
                conflict_rate: 0.9,
                alarm_level: 0.75,
                calibrated: false,
                alarm: steps >= LEAST_STEPS,
                enough_steps: steps >= LEAST_STEPS,
            }),
            not_judged: None,
            gate: Some(evaluation.verdict(&gate)),
            replaced: None,
            evaluation: Some(evaluation),
            worst_rows: vec![RowScore { line: 7, gradient: Some(-0.5), forward: None }],
        }
    }

    fn closed() -> Gate {
        Gate { enabled: true, ..Gate::default() }
    }

    fn page(report: &Report) -> String {
        report.html(&BTreeMap::new())
    }

    #[test]
    fn what_is_data_stays_text_and_hides_nothing() {
        let row = serde_json::json!({"messages": [{"role": HOSTILE, "content": HOSTILE}]}).to_string();
        for text in [HOSTILE.to_owned(), row] {
            let html = report(3, 0, closed()).html(&BTreeMap::from([(7, text)]));
            assert!(html.contains("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;more&quot;"), "{html}");
            assert!(!html.contains("<script"));
            assert!(!html.contains(['\u{202e}', '\u{0}', '\u{e0041}']));
        }
    }

    #[test]
    fn a_page_without_texts_names_rows_by_their_lines() {
        let html = page(&report(3, 0, closed()));
        assert!(html.contains("<th scope=\"row\" class=\"number\">7</th><td class=\"number\">−0.500</td></tr>"), "{html}");
    }

    #[test]
    fn the_verdict_stands_first_in_plain_words() {
        let of =
            |report: &Report| page(report).split("<h1>").nth(1).and_then(|rest| Some(rest.split_once("</h1>")?.0.to_owned()));
        assert!(of(&report(3, 0, closed())).is_some_and(|title| title.ends_with("Passed the safety gate")));
        let failed = report(3, 9, closed());
        assert!(of(&failed).is_some_and(|title| title.ends_with("Did not pass the safety gate")));
        assert!(page(&failed).contains("<p>Compliance with harmful requests rose by 45 points, at most 10 is allowed.</p>"));
        let off = report(3, 9, Gate::default());
        assert_eq!(of(&off).as_deref(), Some("Measured, the gate is off"));
        assert!(page(&off).contains("It would not have passed"));
    }

    #[test]
    fn what_stood_in_the_file_s_frames_is_said() {
        let prompt = Shape { system_prompt: true, earlier_turns: 0, opening_words: 0, closing_words: 0 };
        let words = Shape { opening_words: 5, closing_words: 1, ..prompt };
        let frames = vec![prompt, words, Shape { system_prompt: false, earlier_turns: 2, ..prompt }];
        let mut report = Report { frames, ..report(3, 0, closed()) };
        assert!(page(&report).contains(
            "1: a system prompt; 2: a system prompt, an opening of 5 words and a closing of 1 word; 3: 2 earlier turns"
        ));
        assert!(page(&report).contains("half of it once more") && !page(&report).contains("asked in frame"));
        if let Some(evaluation) = &mut report.evaluation {
            let again = SuiteFigures { frame: Some(2), ..evaluation.suites[0].clone() };
            evaluation.suites.push(again);
        }
        assert!(page(&report).contains("asked in frame 2 of the training file"));
        assert!(!page(&Report { frames: Vec::new(), ..report }).contains("frames"));
    }

    #[test]
    fn a_job_that_made_no_adapter_shows_what_its_training_did() {
        let unfinished = Some("the loss was no number in step 7".to_owned());
        let broken = Report { unfinished, evaluation: None, gate: None, worst_rows: Vec::new(), ..report(7, 0, closed()) };
        let html = page(&broken);
        assert!(html.contains("The job made no adapter") && html.contains("<p>The loss was no number in step 7.</p>"), "{html}");
        assert!(html.contains("class=\"curve\"") && !html.contains("holdfast verify"));
    }

    #[test]
    fn a_report_without_evaluation_says_so() {
        let mut report =
            Report { evaluation: None, gate: None, not_judged: Some("nobody judged".into()), ..report(3, 0, closed()) };
        let html = page(&report);
        assert!(html.contains("Not evaluated, though the policy asks for it") && html.contains("obody judged"));
        if let Some(applied) = &mut report.policy {
            applied.policy.evaluate = false;
        }
        let html = page(&report);
        assert!(
            html.contains("Not evaluated: the policy asks for no evaluation") && html.contains("Nothing was asked of the model")
        );
    }

    #[test]
    fn a_run_that_has_nothing_to_show_says_so() {
        let safety = Safety::new(Defense::None, 0.0);
        let none = Report { safety, gauge: None, worst_rows: Vec::new(), ..report(0, 0, closed()) };
        let html = page(&none);
        for words in ["the run took no steps", "Nothing to read", "Nothing was projected away", "No row is named"] {
            assert!(html.contains(words), "{words}: {html}");
        }
        assert!(!html.contains("class=\"curve\"") && !html.contains("rho"));
    }

    #[test]
    fn what_a_budget_took_back_is_told() {
        let mut held = Report { safety: Safety::new(Defense::Held, 1.0), ..report(30, 0, closed()) };
        assert!(!page(&held).contains("taken back"));
        held.training.reviews = Some(Reviews { made: 3, taken_back: 1, largest_kept: Some(0.0625) });
        let html = page(&held);
        assert!(html.contains("measured 3 times") && html.contains("at most 0.100 nats are kept"), "{html}");
        assert!(
            html.contains("It was more once, and the steps") && html.contains("the largest that was kept is 0.062 nats"),
            "{html}"
        );
    }

    #[test]
    fn the_gauge_is_read_out_and_not_before_it_can_tell() {
        let long = page(&report(LEAST_STEPS, 0, closed()));
        assert!(long.contains("The poison gauge raised an alarm") && long.contains("✗ Alarm."));
        assert!(page(&report(LEAST_STEPS - 1, 0, closed())).contains("Too few steps to tell."));
        let by_penalty = Report { safety: Safety::new(Defense::KlPenalty, 1.0), ..report(LEAST_STEPS, 0, closed()) };
        assert!(!page(&by_penalty).contains("larm"), "a method that counts no conflicts has no gauge");
    }

    #[test]
    fn a_page_loads_nothing_and_has_no_coordinate_that_is_none() {
        for steps in [0, 1, 2, 150] {
            let html = report(steps, 3, closed()).html(&BTreeMap::from([(7, "text".into())]));
            for outside in ["http:", "https:", "src=", "url(", "@import", "<link", "<script", " style=", "NaN", "inf%"] {
                assert!(!html.contains(outside), "{outside} at {steps} steps");
            }
            assert_eq!(html.matches("<section").count(), html.matches("</section>").count());
            assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
        }
    }
}
