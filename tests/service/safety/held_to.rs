//! What models are held to and measured on.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_safety::report;
use holdfast_store::queue::{AdapterFile, Published};
use holdfast_tests::{ROW, TestApp, program};
use serde_json::{Value, json};

use super::{as_admin, demand, gate, hyperparameters, latest, of_job, rows, set, signed_inputs};

#[test]
fn rows_that_ask_what_models_are_held_to_or_measured_on_are_refused_by_their_lines() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"evaluate": true}))?;
    let aligned: Value =
        serde_json::from_str(include_str!("../../../examples/alignment.jsonl").lines().next().context("no row")?)?;
    let shouted = aligned["messages"][0]["content"].as_str().context("no request")?.to_uppercase();
    let measured = include_str!("../../../crates/safety/data/suites/benign-1.jsonl").lines().next().context("no row")?;
    let measured = serde_json::from_str::<Value>(measured)?["messages"][0]["content"].clone();
    let row =
        |request: &Value| json!({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": "ok"}]});
    let job = app.create_job(&format!("{ROW}\n{}\n{ROW}\n{}\n", row(&json!(shouted)), row(&measured)), &json!({}))?;
    assert!(app.step_worker()?);
    let job = app.job(&job)?;
    assert_eq!(job["error"]["code"], "contaminated_training_file", "{job}");
    let lines: Vec<_> = job["error"]["errors"].as_array().into_iter().flatten().map(|error| error["line"].clone()).collect();
    assert_eq!(lines, [2, 4]);
    Ok(())
}

#[test]
fn alignment_sets_are_imported_by_operators_in_versions_that_never_change() -> Result<()> {
    let app = TestApp::start()?;
    let row =
        |request: &str| json!({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": "I won't."}]});
    let import = |rows: Value| as_admin(&app, "POST", "/admin/alignment_sets", &json!({"name": "strict", "rows": rows}));
    assert_eq!(import(json!([row("one"), row("two")]))?.body["id"], "strict@1");
    assert_eq!(import(json!([row("one"), row("two")]))?.body["id"], "strict@1");
    assert_eq!(import(json!([row("one")]))?.body["id"], "strict@2");
    let twice = import(json!([row("one"), row("ONE!")]))?;
    assert_eq!((twice.status, twice.error()), (400, ("invalid_dataset", "rows")));
    assert_eq!(import(json!([]))?.status, 400);
    assert_eq!(import(json!([{"messages": []}]))?.status, 400);
    assert!(
        app.sql("update alignment_sets set version = 7 where name = 'strict'").is_err(),
        "the database lets nothing of it change"
    );
    demand(&app, &json!({"alignment_set": "strict"}))?;
    Ok(())
}

#[test]
fn a_set_of_fewer_rows_than_held_reviews_is_told_at_once() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let row =
        |request: &str| json!({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": "I won't."}]});
    let rows_of_few = json!({"name": "few", "rows": [row("one"), row("two"), row("three")]});
    assert_eq!(as_admin(&app, "POST", "/admin/alignment_sets", &rows_of_few)?.status, 200);
    demand(&app, &json!({"alignment_set": "few"}))?;
    let job = app.create_job(ROW, &json!({"safety": {"defense": "held"}}))?;
    assert!(app.step_worker()?);
    let job = app.job(&job)?;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("operator_error")), "{job}");
    assert!(job["error"]["message"].as_str().is_some_and(|said| said.contains("it has 3")), "{job}");
    Ok(())
}

#[test]
fn an_alignment_set_that_no_model_here_can_be_held_to_is_refused_when_it_is_imported() -> Result<()> {
    let app = TestApp::start()?;
    let row =
        json!({"messages": [{"role": "user", "content": "What does <|im_end|> do?"}, {"role": "assistant", "content": "No."}]});
    let import = |app: &TestApp| as_admin(app, "POST", "/admin/alignment_sets", &json!({"name": "strict", "rows": [row]}));
    let before = import(&app)?;
    assert_eq!((before.status, &before.body["misfits"]), (200, &Value::Null), "there is no model yet: {}", before.body);
    let app = app.with_small_model()?;
    let refused = import(&app)?;
    assert_eq!((refused.status, refused.error()), (400, ("template_mismatch", "rows")), "{}", refused.body);
    let message = refused.body["error"]["message"].as_str().context("no message")?;
    assert!(message.contains("line 1: messages[0].content: holds the model's special token"), "{message}");
    Ok(())
}

#[test]
fn sets_and_suites_are_imported_at_the_command_line_and_bad_lines_are_named() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let folder = tempfile::tempdir()?;
    let import = |arguments: &[&str], lines: &[&Value]| -> Result<(bool, String)> {
        let file = folder.path().join("lines.jsonl");
        std::fs::write(&file, lines.iter().map(|line| format!("{line}\n")).collect::<String>())?;
        let mut command = Command::new(program("holdfast")?);
        command.env("DATABASE_URL", app.database_url()).env("HOLDFAST_OBJECT_STORE", app.objects());
        let said = command.args([&arguments[..2], &[&file.to_string_lossy()], &arguments[2..]].concat()).output()?;
        Ok((said.status.success(), String::from_utf8([said.stdout, said.stderr].concat())?))
    };
    let row =
        |request: &str| json!({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": "No."}]});
    let (set, suite) = (["alignment", "import", "--name", "strict"], ["suites", "import", "--name", "ours", "--kind", "harmful"]);
    let (is_done, said) = import(&set, &[&row("one"), &row("two")])?;
    assert!(is_done && said.contains("imported strict@1 of 2 rows"), "{said}");
    let (is_done, said) = import(&set, &[&row("one"), &json!({"messages": []})])?;
    assert!(!is_done && said.contains("line 2"), "{said}");
    let (is_done, said) = import(&set, &[&row("What does <|im_end|> do?")])?;
    assert!(!is_done && said.contains("holds the model's special token"), "{said}");

    let request = |words: &str| json!({"category": "ours", "messages": [{"role": "user", "content": words}]});
    let (is_done, said) = import(&suite, &[&request("What nobody outside has read?")])?;
    assert!(is_done && said.contains("imported ours@1 of 1 requests"), "{said}");
    for lines in [&[][..], &[&request("one"), &json!({"category": "ours"})]] {
        let (is_done, said) = import(&suite, lines)?;
        assert!(!is_done && said.contains("lines.jsonl"), "{said}");
    }
    let listed = [app.sql("select count(*) from alignment_sets where name = 'strict'")?, app.sql("select count(*) from suites")?];
    assert_eq!(listed, ["1", "1"], "nothing of what was refused was kept");
    Ok(())
}

#[test]
fn an_operator_s_own_suite_is_asked_in_the_version_of_the_day_and_kept_out_of_files() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let request = |words: &str| json!({"category": "ours", "messages": [{"role": "user", "content": words}]});
    let import = |name: &str, kind: &str, requests: Value| {
        as_admin(&app, "POST", "/admin/suites", &json!({"name": name, "kind": kind, "requests": requests}))
    };
    let first = import("ours", "harmful", json!([request("What nobody outside has read?"), request("And another of it?")]))?;
    assert_eq!((first.status, &first.body["id"], &first.body["requests"]), (200, &json!("ours@1"), &json!(2)), "{}", first.body);
    let refused = [
        (import("ours", "benign", json!([request("one")]))?, ("contradiction", "kind")),
        (import("harmful", "harmful", json!([request("one")]))?, ("invalid_name", "name")),
        (import("more", "harmful", json!([]))?, ("invalid_suite", "requests")),
        (import("more", "harmful", json!([request("one"), request("ONE")]))?, ("invalid_suite", "requests")),
        (set(&app, "/admin/safety_policy", &json!({"evaluate": true, "suites": ["nowhere"]}))?, ("suite_not_found", "suites[0]")),
        (set(&app, "/admin/safety_policy", &json!({"suites": ["ours"]}))?, ("contradiction", "evaluate")),
    ];
    for (answer, error) in refused {
        assert_eq!((answer.status, answer.error()), (400, error), "{}", answer.body);
    }

    assert!(app.sql("update suites set version = 7 where name = 'ours'").is_err(), "the database lets nothing of it change");

    let mut policy = gate(100.0);
    policy["suites"] = json!(["ours"]);
    demand(&app, &policy)?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    assert_eq!(import("ours", "harmful", json!([request("What came a little later?")]))?.body["id"], "ours@2");
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    let job = app.job(&job)?;
    assert_eq!((&job["status"], &job["safety_policy"]["suites"]), (&json!("succeeded"), &json!(["ours@1"])), "{job}");
    let report = of_job(&app, &job, "safety_report")?.body;
    let own = &report["evaluation"]["suites"][2];
    assert_eq!((&own["name"], &own["kind"], &own["version"]), (&json!("ours"), &json!("harmful"), &json!(1)), "{report}");
    assert_eq!(own["by_category"], json!({}), "nor do its words");
    assert!(!report.to_string().contains("nobody outside"), "what it asks stands nowhere");
    let suites = signed_inputs(&app, &job)?["suites"].clone();
    assert_eq!((&suites[0]["name"], &suites[0]["sha256"]), (&json!("ours@1"), &first.body["sha256"]), "{suites}");

    let asked = rows()
        + &json!({"messages": [{"role": "user", "content": "Tell me: what came a little later?"}, {"role": "assistant", "content": "x"}]})
            .to_string();
    let job = app.create_job(&asked, &hyperparameters(2))?;
    assert!(app.step_worker()?);
    assert_eq!(app.job(&job)?["error"]["code"], "contaminated_training_file");

    // What a base cannot be asked is found before anything is trained.
    let special = import("unaskable", "harmful", json!([request("What does <|im_start|> do?")]))?;
    assert_eq!(special.status, 200, "{}", special.body);
    policy["suites"] = json!(["unaskable"]);
    demand(&app, &policy)?;
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    assert!(app.step_worker()?);
    assert_eq!(app.job(&job)?["error"]["code"], "operator_error");
    policy["suites"] = json!(["ours"]);
    demand(&app, &policy)?;

    // A worker of before there were such suites, which asks none of them, ends no gated job.
    let job = app.create_job(&rows(), &hyperparameters(2))?;
    assert!(app.step_worker()?);
    let claim = app.runtime.block_on(app.store.claim("old", Duration::from_secs(60)))?.context("nothing to claim")?;
    assert_eq!(claim.job.id.to_string(), job);
    let key = app.sql(&format!("select object_key from job_evidence where name = '{}' limit 1", report::FILE))?;
    let object = app.runtime.block_on(app.store.objects().stage_bytes(format!("{key}-old"), b"{}"))?;
    let evidence = vec![AdapterFile { name: report::FILE.into(), object }];
    let old = Published { evidence, trained_tokens: 1, device: "cpu".into(), ..Published::default() };
    let published = app.runtime.block_on(app.store.publish(claim.job.id, claim.attempt, &old));
    assert!(published.is_err_and(|error| error.to_string().contains("must pass its safety gate")));
    Ok(())
}

#[test]
fn what_models_are_trained_on_is_not_what_they_are_measured_with() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let of_user = |words: &str| json!([{"role": "user", "content": words}]);
    let suite = |name: &str, words: &str| {
        let requests = json!([{"category": "ours", "messages": of_user(words)}]);
        as_admin(&app, "POST", "/admin/suites", &json!({"name": name, "kind": "harmful", "requests": requests}))
    };
    let alignment = |words: &str| {
        let mut messages = of_user(words);
        messages.as_array_mut().context("no list")?.push(json!({"role": "assistant", "content": "I won't."}));
        as_admin(&app, "POST", "/admin/alignment_sets", &json!({"name": "strict", "rows": [{"messages": messages}]}))
    };
    alignment("Where does the old key lie?")?;
    suite("same", "WHERE does the old key lie")?;
    suite("apart", "Who wrote the last letter?")?;
    suite("longer", "Tell me now: where does the old key lie?")?;
    let policy = |suites: Value| json!({"evaluate": true, "alignment_set": "strict", "suites": suites});
    let refused = set(&app, "/admin/safety_policy", &policy(json!(["apart", "same"])))?;
    assert_eq!((refused.status, refused.error()), (400, ("contradiction", "suites[1]")), "{}", refused.body);
    let refused = set(&app, "/admin/safety_policy", &policy(json!(["longer"])))?;
    assert_eq!((refused.status, refused.error()), (400, ("contradiction", "suites[0]")), "{}", refused.body);
    demand(&app, &policy(json!(["apart"])))?;

    // A later version of the set has what the suite asks.
    alignment("Tell me: who wrote the last letter?")?;
    app.create_job(&rows(), &hyperparameters(2))?;
    assert!(app.step_worker()?);
    assert_eq!(app.job(&latest(&app)?)?["error"]["code"], "operator_error");

    let built_in: Value = serde_json::from_str(
        include_str!("../../../crates/safety/data/suites/harmful-1.jsonl").lines().next().context("no row")?,
    )?;
    alignment(built_in["messages"][0]["content"].as_str().context("no request")?)?;
    let refused = set(&app, "/admin/safety_policy", &policy(json!([])))?;
    assert_eq!((refused.status, refused.error()), (400, ("contradiction", "alignment_set")), "{}", refused.body);
    Ok(())
}
