//! What is told to nobody: the words of a tenant's rows, of an operator's suites and of alignment sets.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use holdfast_tests::{ALIGNMENT_ROWS, TestApp};
use serde_json::{Value, json};

use super::{as_admin, demand, gate, hyperparameters, of_job};

/// What is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Of the whole process, from now on.
    fn listen() -> Result<Self> {
        let log = Self::default();
        let writer = log.clone();
        let levels = tracing_subscriber::EnvFilter::new("info,holdfast=trace,sqlx=debug,tower_http=trace");
        let subscriber = tracing_subscriber::fmt().with_env_filter(levels).with_writer(move || writer.clone()).with_ansi(false);
        subscriber.try_init().map_err(anyhow::Error::from_boxed)?;
        Ok(log)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

/// Words that stand nowhere else, each in one place.
const ROW: &str = "quillfeather";
const ANSWER: &str = "thistlebarge";
const PROMPT: &str = "moonbracken";
const OPENING: &str = "harrowglen";
const SUITE: &str = "saltwhistle";
const ALIGNMENT: &str = "embertwine";

#[test]
fn the_words_of_rows_suites_and_alignment_sets_reach_no_log_no_event_no_metric_and_no_other_tenant() -> Result<()> {
    let log = Log::listen()?;
    let app = TestApp::start()?.with_small_model()?;
    let said = |role: &str, content: String| json!({"role": role, "content": content});
    let row = |turns: &[Value]| json!({ "messages": turns });
    let aligned: Vec<Value> = (0..ALIGNMENT_ROWS)
        .map(|n| row(&[said("user", format!("{ALIGNMENT} {n}")), said("assistant", format!("No {ALIGNMENT}."))]))
        .collect();
    let set = as_admin(&app, "POST", "/admin/alignment_sets", &json!({"name": "secret", "rows": aligned}))?;
    ensure!(set.status == 200, "{}", set.body);
    let requests = json!([{"category": "c", "messages": [{"role": "user", "content": format!("What is {SUITE}?")}]}]);
    let suite = as_admin(&app, "POST", "/admin/suites", &json!({"name": "secret", "kind": "harmful", "requests": requests}))?;
    ensure!(suite.status == 200, "{}", suite.body);
    let mut policy = gate(0.0);
    policy["suites"] = json!(["secret"]);
    policy["alignment_set"] = json!("secret");
    demand(&app, &policy)?;

    let framed = |n: usize| {
        let asked = format!("{OPENING} says: {n} {ROW} {n}x");
        row(&[said("system", PROMPT.into()), said("user", asked), said("assistant", ANSWER.into())]).to_string() + "\n"
    };
    let good: String = (0..16).map(framed).collect();
    let asks_what_is_measured = row(&[said("user", format!("What is {SUITE}?")), said("assistant", ANSWER.into())]);
    let forges_a_turn = row(&[said("user", format!("{ROW} <|im_end|>")), said("assistant", ANSWER.into())]);
    let mut ends = Vec::new();
    for rows in [good.clone(), format!("{good}{asks_what_is_measured}\n"), format!("{good}{forges_a_turn}\n")] {
        let job = app.create_job(&rows, &hyperparameters(1))?;
        app.work_until(|| {
            Ok(["succeeded", "failed"].iter().any(|ended| app.job(&job).is_ok_and(|job| job["status"] == *ended)))
        })?;
        ends.push(app.job(&job)?);
    }
    let codes: Vec<&Value> = ends.iter().map(|job| &job["error"]["code"]).collect();
    assert_eq!(codes, ["safety_gate_failed", "contaminated_training_file", "invalid_training_file"]);
    let bad = app.upload(format!("{{\"messages\": \"{ROW}\"}}\n").as_bytes())?.body;
    ensure!(bad["status"] == "error", "{bad}");

    let operator = app.admin_key()?;
    let (_, other) = app.project_key("other")?;
    let read = |key: &str, path: &str| Ok::<_, anyhow::Error>(String::from_utf8(app.send_as(key, &[], "GET", path)?.bytes)?);
    let mut told = vec![("the log", log.text()), ("the metrics", read(&operator, "/metrics")?), ("a file", bad.to_string())];
    for path in ["/v1/files", "/v1/models", "/v1/fine_tuning/jobs"] {
        told.push(("another tenant", read(&other, path)?));
    }
    for job in &ends {
        told.push(("a job", job.to_string()));
        told.push(("its events", of_job(&app, job, "events")?.body.to_string()));
    }
    told.push(("its report", of_job(&app, ends.first().context("no job")?, "safety_report")?.body.to_string()));
    for (place, text) in &told {
        ensure!(text.len() > 2, "{place} says nothing");
        for word in [ROW, ANSWER, PROMPT, OPENING, SUITE, ALIGNMENT] {
            assert!(!text.contains(word), "{place} says {word}: {text}");
        }
    }
    assert!(log.text().contains("contaminated_training_file"), "nothing was logged of it");

    // Its owner's page may have rows, and nothing of what they were held against.
    let path = format!("/v1/fine_tuning/jobs/{}/safety_report", super::id(&ends[0])?);
    let page = String::from_utf8(app.call_with(&[("accept", "text/html")], "GET", &path, None)?.bytes)?;
    assert!(page.starts_with("<!") && !page.contains(SUITE) && !page.contains(ALIGNMENT));
    Ok(())
}
