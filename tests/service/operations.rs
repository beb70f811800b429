//! What operators look at: whether the service can work, and how it does.

use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_store::retention::{Removed, Retention};
use holdfast_tests::{ROW, TestApp};
use serde_json::json;

#[test]
fn the_service_is_ready_while_its_stores_are_and_lives_without_them() -> Result<()> {
    let app = TestApp::start()?;
    let ready = app.call_as(None, "GET", "/readyz", None)?;
    assert_eq!((ready.status, ready.bytes.as_slice()), (200, b"ready\n".as_slice()));
    app.sql("delete from _sqlx_migrations where version = (select max(version) from _sqlx_migrations)")?;
    let behind = app.call_as(None, "GET", "/readyz", None)?;
    assert_eq!((behind.status, behind.bytes.as_slice()), (503, b"the database is not ready\n".as_slice()));
    assert_eq!(app.call_as(None, "GET", "/healthz", None)?.status, 200);
    Ok(())
}

#[test]
fn metrics_count_by_route_and_name_no_tenant() -> Result<()> {
    let app = TestApp::start()?;
    let file = app.uploaded(ROW.as_bytes())?;
    app.call("GET", &format!("/v1/files/{file}"), None)?;
    assert_eq!(app.call("GET", "/metrics", None)?.error().0, "insufficient_scope");
    let answer = app.call_as(Some(&app.admin_key()?), "GET", "/metrics", None)?;
    let text = String::from_utf8(answer.bytes)?;
    for line in [
        r#"holdfast_http_requests_total{method="GET",route="/v1/files/{file_id}",status="200"}"#,
        "holdfast_upload_bytes_total",
        "holdfast_queue_oldest_seconds 0",
        r#"holdfast_workers{state="busy"} 0"#,
        "holdfast_stored_bytes",
    ] {
        assert!(text.contains(line), "no {line} in\n{text}");
    }
    assert!(!text.contains("file-") && !text.contains("proj_"), "{text}");
    Ok(())
}

#[test]
fn a_program_runs_on_a_newer_schema_until_that_says_it_is_too_old() -> Result<()> {
    let app = TestApp::start()?;
    app.sql("insert into _sqlx_migrations (version, description, success, checksum, execution_time) values (9000, 'of a newer version', true, '', 0)")?;
    app.runtime.block_on(app.store.migrate())?;
    app.sql("update schema_compatibility set oldest_schema = 9000")?;
    let refused = app.runtime.block_on(app.store.migrate()).err().context("it started on a schema that does not take it")?;
    assert!(refused.to_string().contains("upgrade this program"), "{refused}");
    Ok(())
}

#[test]
fn what_was_kept_long_enough_goes_and_what_is_needed_stays() -> Result<()> {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let app = TestApp::with_model()?;
    let job = app.create_job(ROW, &json!({"hyperparameters": {"n_epochs": 2}}))?;
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    let next = app.create_job(ROW, &json!({"model": app.job(&job)?["fine_tuned_model"]}))?;
    let from_checkpoint = format!("{}:ckpt-step-1", app.job(&job)?["fine_tuned_model"].as_str().context("no model")?);
    app.create_job(ROW, &json!({"model": from_checkpoint}))?;
    app.call("POST", &format!("/v1/fine_tuning/jobs/{next}/cancel"), None)?;
    let policy = Retention { events: Some(DAY), checkpoints: Some(DAY), audit: Some(40 * DAY), deliveries: Some(DAY) };
    let retire = || Ok::<_, anyhow::Error>(app.runtime.block_on(app.store.retire(&policy))?);
    assert_eq!(retire()?, Removed::default(), "all of it is new");

    app.sql("update jobs set finished_at = now() - interval '2 days' where finished_at is not null; update job_events set created_at = now() - interval '2 days'")?;
    let removed = retire()?;
    assert!(removed.events > 10, "{removed:?}");
    // The checkpoint that a job begins from stays.
    let steps = |job: &str| -> Result<Vec<u64>> {
        let page = app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/checkpoints"), None)?.body;
        Ok(page["data"].as_array().into_iter().flatten().filter_map(|c| c["step_number"].as_u64()).collect())
    };
    assert_eq!((removed.checkpoints, steps(&job)?), (1, vec![1]));
    assert_eq!(app.call("GET", &format!("/v1/fine_tuning/jobs/{job}/adapter"), None)?.status, 200, "the model stays");
    assert_eq!(removed.figures, 0, "a checkpoint shows them");
    app.sql("update jobs set finished_at = now() - interval '2 days', status = 'cancelled' where finished_at is null")?;
    let removed = retire()?;
    assert_eq!((removed.checkpoints, removed.figures > 0, steps(&job)?), (1, true, vec![]));

    // The log lets go only what is old enough, and only to the policy.
    app.sql("set session_replication_role = replica; update audit_log set at = now() - interval '50 days' where operation = 'create_file'")?;
    assert!(app.sql("delete from audit_log").is_err());
    assert_eq!(retire()?.audit, 3);
    Ok(())
}

#[test]
fn a_dump_and_a_copy_of_the_objects_make_the_service_again() -> Result<()> {
    let app = TestApp::start()?;
    let file = app.uploaded(ROW.as_bytes())?;
    let restored = app.restored()?;
    app.call("DELETE", &format!("/v1/files/{file}"), None)?;
    let content = restored.call("GET", &format!("/v1/files/{file}/content"), None)?;
    assert_eq!((content.status, content.bytes.as_slice()), (200, ROW.as_bytes()), "with the key it had");
    assert_eq!(restored.uploaded(ROW.as_bytes())?.len(), file.len(), "it takes new ones");
    assert!(restored.sql("delete from audit_log").is_err(), "the log's guard is there again");
    let stranger = restored.sql("set role holdfast_tenant; select count(*) from files")?;
    assert_eq!(stranger, "0", "and so are the walls");
    Ok(())
}
