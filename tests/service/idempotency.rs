//! Requests that come twice make one thing.

use anyhow::{Context, Result};
use holdfast_tests::{MODEL, ROW, TestApp};
use serde_json::json;

const JOBS: &str = "/v1/fine_tuning/jobs";

fn jobs(app: &TestApp) -> Result<usize> {
    app.call("GET", JOBS, None)?.body["data"].as_array().map(Vec::len).context("no list")
}

fn request(app: &TestApp) -> Result<String> {
    Ok(json!({"model": MODEL, "training_file": app.uploaded(ROW.as_bytes())?}).to_string())
}

#[test]
fn a_retry_of_an_sdk_finds_what_its_first_try_made() -> Result<()> {
    let app = TestApp::with_model()?;
    let body = request(&app)?;
    let send = |tries: &str| app.call_with(&[("x-stainless-retry-count", tries)], "POST", JOBS, Some(&body));
    let first = send("0")?;
    let again = send("1")?;
    assert_eq!((again.status, &again.body["id"]), (200, &first.body["id"]));
    assert_eq!(jobs(&app)?, 1);
    assert_ne!(send("0")?.body["id"], first.body["id"], "a first try is a request of its own");
    assert_eq!(jobs(&app)?, 2);
    Ok(())
}

#[test]
fn tries_that_race_make_one_job() -> Result<()> {
    let app = TestApp::with_model()?;
    let body = request(&app)?;
    std::thread::scope(|scope| {
        let racing: Vec<_> =
            (0..8).map(|_| scope.spawn(|| app.call_with(&[("idempotency-key", "race")], "POST", JOBS, Some(&body)))).collect();
        for one in racing {
            let answer = one.join().map_err(|_| anyhow::anyhow!("a racer failed"))??;
            assert_eq!(answer.status, 200, "{}", answer.body);
        }
        anyhow::Ok(())
    })?;
    assert_eq!(jobs(&app)?, 1);
    Ok(())
}

#[test]
fn a_key_of_the_client_s_own_holds_and_stands_for_one_body() -> Result<()> {
    let app = TestApp::with_model()?;
    let (body, other) = (request(&app)?, request(&app)?);
    let send = |body: &str| app.call_with(&[("idempotency-key", "mine")], "POST", JOBS, Some(body));
    let first = send(&body)?;
    assert_eq!(send(&body)?.body["id"], first.body["id"]);
    let reused = send(&other)?;
    assert_eq!((reused.status, reused.error()), (400, ("idempotency_key_reused", "Idempotency-Key")));
    let (_, stranger) = app.project_key("stranger")?;
    let theirs = app.call_as(Some(&stranger), "POST", JOBS, Some(&body))?;
    assert_eq!(theirs.status, 404, "a key is its owner's");
    Ok(())
}

#[test]
fn a_retry_finds_its_job_although_it_would_be_refused_by_now() -> Result<()> {
    let app = TestApp::with_model()?;
    let file = app.uploaded(ROW.as_bytes())?;
    let body = json!({"model": MODEL, "training_file": file}).to_string();
    let send = |headers: &[(&str, &str)]| app.call_with(headers, "POST", JOBS, Some(&body));
    let named = [("idempotency-key", "lost")];
    let first = send(&named)?.body;
    app.call("POST", &format!("{JOBS}/{}/cancel", first["id"].as_str().context("no id")?), None)?;
    assert_eq!(app.call("DELETE", &format!("/v1/files/{file}"), None)?.status, 200);
    let again = send(&named)?;
    assert_eq!((again.status, &again.body["id"], &again.body["status"]), (200, &first["id"], &json!("cancelled")));
    assert_eq!(send(&[])?.status, 404, "a request of its own is refused");
    assert_eq!(send(&[("x-stainless-retry-count", "1")])?.status, 404, "and so is the retry of one that made nothing");
    Ok(())
}

#[test]
fn a_try_that_was_refused_does_not_stand_in_the_way_of_the_next() -> Result<()> {
    let app = TestApp::with_model()?;
    let missing = json!({"model": MODEL, "training_file": "file-00000000000000000000000000000000"}).to_string();
    let headers = [("idempotency-key", "again")];
    assert_eq!(app.call_with(&headers, "POST", JOBS, Some(&missing))?.status, 404);
    assert_eq!(app.call_with(&headers, "POST", JOBS, Some(&request(&app)?))?.status, 200);
    Ok(())
}

#[test]
fn a_retried_cancel_is_answered_as_the_first_was() -> Result<()> {
    let app = TestApp::with_model()?;
    let job = app.create_job(ROW, &json!({}))?;
    let cancel =
        |tries: &str| app.call_with(&[("x-stainless-retry-count", tries)], "POST", &format!("{JOBS}/{job}/cancel"), None);
    assert_eq!(cancel("0")?.body["status"], "cancelled");
    let again = cancel("1")?;
    assert_eq!((again.status, &again.body["status"]), (200, &json!("cancelled")));
    assert_eq!(cancel("0")?.error().0, "invalid_state");
    Ok(())
}

#[test]
fn a_file_that_is_sent_again_is_one_file_and_leaves_one_object() -> Result<()> {
    let app = TestApp::start()?;
    let send = |tries: &str| {
        let fields: [(&str, Option<&str>, &[u8]); 2] =
            [("file", Some("a.jsonl"), ROW.as_bytes()), ("purpose", None, b"fine-tune")];
        app.send_form("/v1/files", &[("x-stainless-retry-count", tries)], &fields)
    };
    let first = send("0")?;
    assert_eq!(send("1")?.body["id"], first.body["id"]);
    assert_eq!(app.call("GET", "/v1/files", None)?.body["data"].as_array().map(Vec::len), Some(1));
    assert_eq!(app.object_count("projects"), 1);
    Ok(())
}

#[test]
fn an_upload_s_cancel_and_a_secret_s_change_are_answered_again_as_they_were() -> Result<()> {
    let app = TestApp::start()?;
    let retried = |path: &str| -> Result<_> {
        let send = |tries: &str| app.call_with(&[("x-stainless-retry-count", tries)], "POST", path, None);
        Ok((send("0")?, send("1")?))
    };
    let body = json!({"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 10, "mime_type": "application/jsonl"});
    let upload = app.call("POST", "/v1/uploads", Some(&body.to_string()))?;
    let (first, again) = retried(&format!("/v1/uploads/{}/cancel", upload.body["id"].as_str().context("no id")?))?;
    assert_eq!((&first.body["status"], &first.body), (&json!("cancelled"), &again.body));

    let webhook = app.call("POST", "/v1/webhook_endpoints", Some(&json!({"url": "http://127.0.0.1:9/"}).to_string()))?;
    let (first, again) =
        retried(&format!("/v1/webhook_endpoints/{}/rotate_secret", webhook.body["id"].as_str().context("no id")?))?;
    assert_ne!(first.body["signing_secret"], webhook.body["signing_secret"]);
    assert_eq!(first.body["signing_secret"], again.body["signing_secret"], "the secret that was answered holds");
    Ok(())
}
