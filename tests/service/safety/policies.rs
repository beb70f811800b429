//! What an operator demands of jobs.

use anyhow::{Context, Result};
use holdfast_tests::{MODEL, ROW, TestApp};
use serde_json::{Value, json};

use super::{as_admin, demand, gate, hyperparameters, id, rows, set};

#[test]
fn the_nearest_policy_counts_and_stands_on_the_job_as_it_was() -> Result<()> {
    let app = TestApp::with_model()?;
    let project = app.project_key("default")?.0;
    let shown = app.call("GET", "/v1/fine_tuning/safety_policy", None)?.body;
    assert_eq!((&shown["scope"], &shown["version"], &shown["methods"][0]), (&json!("deployment"), &json!(0), &json!("safegrad")));
    let [deployment, organization, own] = [
        "/admin/safety_policy".into(),
        "/admin/organizations/holdfast/safety_policy".into(),
        format!("/admin/projects/{project}/safety_policy"),
    ];
    assert_eq!(set(&app, &deployment, &json!({"rho": 20.0}))?.body["version"], 1);
    let before = app.job(&app.create_job(ROW, &json!({}))?)?;
    assert_eq!((&before["safety"]["rho"], &before["safety_policy"]["version"]), (&json!(20.0), &json!(1)));

    assert_eq!(set(&app, &organization, &json!({"methods": ["held"], "budget": 0.01}))?.body["scope"], "organization");
    let refused = app.call(
        "POST",
        "/v1/fine_tuning/jobs",
        Some(&json!({"model": MODEL, "training_file": before["training_file"], "safety": {"defense": "safegrad"}}).to_string()),
    )?;
    assert_eq!((refused.status, refused.error()), (400, ("safety_below_floor", "safety.defense")));
    assert_eq!(refused.body["error"]["message"], "jobs train with `held` here; `safegrad` is not allowed");

    let inherited = set(&app, &own, &json!({"rho": 2}))?.body;
    assert_eq!(
        (&inherited["methods"], &inherited["budget"]),
        (&json!(["held"]), &json!(0.01)),
        "what it leaves out is the wider one's"
    );
    // The project's own takes the place of both, as a whole; setting the same again is no new version.
    for _ in 0..2 {
        assert_eq!(set(&app, &own, &json!({"methods": ["none"], "rho": 0.0}))?.body["version"], 2);
    }
    let after = app.job(&app.create_job(ROW, &json!({}))?)?;
    assert_eq!((&after["safety"]["defense"], &after["safety_policy"]["scope"]), (&json!("none"), &json!("project")));
    assert_eq!(as_admin(&app, "DELETE", &own, &Value::Null)?.body["scope"], "organization");
    assert_eq!(as_admin(&app, "DELETE", &organization, &Value::Null)?.body["version"], 1);
    assert_eq!(set(&app, &own, &json!({"methods": ["none"], "rho": 0.0}))?.body["version"], 4, "numbers are never used again");
    assert_eq!(app.job(id(&before)?)?["safety_policy"], before["safety_policy"], "a job keeps what it was created under");

    let earlier = |of: &str, version: &str| as_admin(&app, "GET", &format!("{of}?version={version}"), &Value::Null);
    assert_eq!(earlier(&organization, "1")?.body["budget"], 0.01, "what counts no more can still be read");
    for nowhere in ["3", "5", "4294967295"] {
        let refused = earlier(&own, nowhere)?;
        assert_eq!((refused.status, refused.error()), (404, ("not_found", "version")), "{nowhere}: {}", refused.body);
    }
    assert_eq!(earlier(&own, "latest")?.status, 400);
    Ok(())
}

#[test]
fn a_policy_can_be_set_as_it_was_read_and_null_frees_what_the_wider_one_demands() -> Result<()> {
    let app = TestApp::start()?;
    let (deployment, own) = ("/admin/safety_policy", format!("/admin/projects/{}/safety_policy", app.project_key("default")?.0));
    let strict = json!({"kl_positions": "deciding", "alignment_batch_size": 32});
    let settable = |mut read: Value| -> Result<Value> {
        read.as_object_mut().context("a policy")?.retain(|name, _| !["object", "scope", "version"].contains(&name.as_str()));
        Ok(read)
    };
    for demanded in [json!({}), json!({"methods": ["kl_penalty"]}), strict] {
        let read = settable(set(&app, deployment, &demanded)?.body)?;
        let again = set(&app, deployment, &read)?;
        assert_eq!((again.status, &again.body["methods"]), (200, &read["methods"]), "{}", again.body);
    }
    // Also where the wider one has changed since.
    set(&app, &own, &json!({"methods": ["none"]}))?;
    set(&app, deployment, &json!({"rho": 3, "kl_positions": "deciding", "alignment_batch_size": 32}))?;
    let read = settable(as_admin(&app, "GET", &own, &Value::Null)?.body)?;
    let again = set(&app, &own, &read)?;
    assert_eq!((again.status, &again.body["rho"]), (200, &json!(1.0)), "{}", again.body);
    assert_eq!(set(&app, &own, &json!({"rho": 2}))?.body["kl_positions"], "deciding", "what is absent is the wider one's");
    let free = set(&app, &own, &json!({"kl_positions": null, "alignment_batch_size": null}))?.body;
    assert_eq!((&free["kl_positions"], &free["alignment_batch_size"]), (&Value::Null, &Value::Null));
    Ok(())
}

#[test]
fn a_policy_that_cannot_hold_is_refused_by_the_field_at_fault() -> Result<()> {
    let app = TestApp::start()?;
    let cases = [
        (json!({"methods": []}), "contradiction", "methods"),
        (json!({"methods": ["prayer"]}), "invalid_type", "methods[0]"),
        (json!({"rho": -1}), "out_of_bounds", "rho"),
        (json!({"alignment_set": "nowhere"}), "alignment_set_not_found", "alignment_set"),
        (json!({"evaluate": false, "gate": {"enabled": true}}), "contradiction", "evaluate"),
        (json!({"methods": ["safegrad"], "budget": 0.01}), "contradiction", "budget"),
        (json!({"methods": ["none"], "rho": 50}), "contradiction", "rho"),
        (json!({"methods": ["kl_penalty"], "variants": false}), "contradiction", "variants"),
        (json!({"judge": "endpoint"}), "contradiction", "judge"),
        (json!({"evaluate": true, "gate": {"enabled": true}}), "contradiction", "gate"),
        (json!({"evaluate": true, "gate": {"enabled": true, "kl": 1000}}), "out_of_bounds", "gate.kl"),
        (json!({"strength": 1}), "unknown_field", "strength"),
    ];
    for (policy, code, param) in cases {
        let refused = set(&app, "/admin/safety_policy", &policy)?;
        assert_eq!((refused.status, refused.error()), (400, (code, param)), "{policy}: {}", refused.body);
    }
    assert_eq!(set(&app, "/admin/organizations/nobody/safety_policy", &json!({}))?.status, 404);
    assert_eq!(app.sql("select count(*) from safety_policies")?, "0", "nothing was written");
    let changed = app.sql("insert into safety_policies (scope, subject, version) values ('deployment', '', 1); update safety_policies set version = 2");
    assert!(changed.is_err(), "the database lets nothing of it change");
    Ok(())
}

#[test]
fn a_model_that_was_trained_below_the_floor_is_not_gone_on_from() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"methods": ["none", "safegrad"]}))?;
    let go_on = |from: &Value, safety: Value| {
        let body = json!({"model": from["fine_tuned_model"], "training_file": from["training_file"], "safety": safety});
        app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))
    };
    let weak = app.create_job(&rows(), &json!({}))?;
    while app.step_worker()? {}
    let weak = app.job(&weak)?;
    let next = go_on(&weak, json!({"defense": "safegrad"}))?;
    assert_eq!(next.status, 200, "{}", next.body);
    while app.step_worker()? {}
    let next = app.job(id(&next.body)?)?;
    demand(&app, &json!({"methods": ["safegrad"]}))?;
    for from in [&weak, &next] {
        let refused = go_on(from, json!({}))?;
        assert_eq!((refused.status, refused.error()), (400, ("safety_below_floor", "model")), "{}", refused.body);
    }
    Ok(())
}

#[test]
fn a_model_that_had_to_pass_no_gate_is_not_gone_on_from_where_jobs_must_pass_one() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    let job = app.create_job(&rows(), &hyperparameters(1))?;
    while app.step_worker()? {}
    let job = app.job(&job)?;
    assert_eq!(job["safety"]["alignment_set_version"], 1, "{job}");
    let goes_on = || {
        let body = json!({"model": job["fine_tuned_model"], "training_file": job["training_file"]});
        app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))
    };
    assert_eq!(goes_on()?.status, 200);
    demand(&app, &gate(1.0))?;
    let refused = goes_on()?;
    assert_eq!((refused.status, refused.error()), (400, ("safety_below_floor", "model")), "{}", refused.body);
    assert!(refused.body.to_string().contains("without a safety gate"), "{}", refused.body);
    Ok(())
}

#[test]
fn under_held_only_what_is_within_its_budget_is_gone_on_from() -> Result<()> {
    let app = TestApp::start()?.with_small_model()?;
    demand(&app, &json!({"methods": ["none", "held"], "budget": 0.0001}))?;
    let mut plainly = hyperparameters(4);
    plainly["method"]["supervised"]["hyperparameters"]["row_conflicts"] = json!(false);
    let under_held = json!({"safety": {"defense": "held"}});
    for (first, outcome) in [(&plainly, json!("outside_budget")), (&under_held, Value::Null)] {
        let job = app.create_job(&rows(), first)?;
        while app.step_worker()? {}
        let job = app.job(&job)?;
        let body =
            json!({"model": job["fine_tuned_model"], "training_file": job["training_file"], "safety": {"defense": "held"}});
        let next = app.call("POST", "/v1/fine_tuning/jobs", Some(&body.to_string()))?.body;
        while app.step_worker()? {}
        let next = app.job(id(&next)?)?;
        assert_eq!(next["error"]["code"], outcome, "{next}");
    }
    Ok(())
}
