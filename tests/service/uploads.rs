//! Files that come in parts.

use anyhow::{Context, Result};
use holdfast_tests::{Answer, MAX_UPLOAD_BYTES, ROW, TestApp};
use serde_json::{Value, json};

fn begin(app: &TestApp, bytes: usize) -> Result<String> {
    let body = json!({"filename": "train.jsonl", "purpose": "fine-tune", "bytes": bytes, "mime_type": "application/jsonl"});
    let upload = app.call("POST", "/v1/uploads", Some(&body.to_string()))?;
    assert_eq!((upload.status, &upload.body["status"]), (200, &json!("pending")), "{}", upload.body);
    Ok(upload.body["id"].as_str().context("no id")?.to_owned())
}

fn add(app: &TestApp, upload: &str, part: &[u8]) -> Result<Answer> {
    app.send_form(&format!("/v1/uploads/{upload}/parts"), &[], &[("data", Some("part"), part)])
}

fn complete(app: &TestApp, upload: &str, body: &Value) -> Result<Answer> {
    app.call("POST", &format!("/v1/uploads/{upload}/complete"), Some(&body.to_string()))
}

#[test]
fn parts_that_came_side_by_side_are_a_file_in_the_order_that_is_asked_for() -> Result<()> {
    let app = TestApp::start()?;
    // Cut inside a line, so that only the whole is sound.
    let content = format!("{ROW}\n{ROW}\n");
    let (head, tail) = content.split_at(ROW.len() + 20);
    let upload = begin(&app, content.len())?;
    let parts: Vec<String> = std::thread::scope(|scope| {
        let sent: Vec<_> = [head, tail].map(|part| scope.spawn(|| add(&app, &upload, part.as_bytes()))).into_iter().collect();
        sent.into_iter()
            .map(|part| {
                let part = part.join().map_err(|_| anyhow::anyhow!("a sender failed"))??;
                Ok(part.body["id"].as_str().context("no id")?.to_owned())
            })
            .collect::<Result<_>>()
    })?;
    let wrong = complete(&app, &upload, &json!({"part_ids": parts, "md5": "0".repeat(32)}))?;
    assert_eq!((wrong.status, wrong.error()), (400, ("checksum_mismatch", "md5")));
    let unsound = complete(&app, &upload, &json!({"part_ids": [parts[0]]}))?;
    assert_eq!((unsound.status, unsound.error()), (400, ("wrong_size", "part_ids")));
    let twice = complete(&app, &upload, &json!({"part_ids": [parts[0], parts[0]]}))?;
    assert_eq!((twice.status, twice.error()), (400, ("part_not_found", "part_ids[1]")));
    let done = complete(&app, &upload, &json!({"part_ids": parts}))?;
    assert_eq!(
        (done.status, &done.body["status"], &done.body["file"]["status"]),
        (200, &json!("completed"), &json!("processed"))
    );
    let file = done.body["file"]["id"].as_str().context("no file")?;
    assert_eq!(app.call("GET", &format!("/v1/files/{file}/content"), None)?.bytes, content.as_bytes());
    assert_eq!(complete(&app, &upload, &json!({"part_ids": parts}))?.body["file"]["id"], file, "again gives the same");
    let late = add(&app, &upload, b"x")?;
    assert_eq!((late.status, late.error()), (400, ("invalid_state", "upload_id")));
    Ok(())
}

#[test]
fn a_file_in_parts_is_checked_like_one_that_came_whole() -> Result<()> {
    let app = TestApp::start()?;
    let content = format!("{ROW}\nnot json\n");
    let upload = begin(&app, content.len())?;
    let part = add(&app, &upload, content.as_bytes())?;
    let done = complete(&app, &upload, &json!({"part_ids": [part.body["id"]]}))?;
    assert_eq!((&done.body["file"]["status"], &done.body["file"]["errors"][0]["line"]), (&json!("error"), &json!(2)));
    Ok(())
}

#[test]
fn a_cancelled_upload_s_parts_go_with_the_next_sweep() -> Result<()> {
    let app = TestApp::start()?;
    let upload = begin(&app, 10)?;
    add(&app, &upload, b"0123456789")?;
    assert_eq!(app.object_count("projects"), 1);
    let cancelled = app.call("POST", &format!("/v1/uploads/{upload}/cancel"), None)?;
    assert_eq!(cancelled.body["status"], "cancelled");
    assert_eq!(app.call("POST", &format!("/v1/uploads/{upload}/cancel"), None)?.error().0, "invalid_state");
    app.runtime.block_on(app.store.objects().sweep(std::time::Duration::from_secs(3600)))?;
    assert_eq!(app.object_count("projects"), 0);
    Ok(())
}

#[test]
fn an_upload_of_more_than_the_deployment_takes_is_413_before_a_byte_is_sent() -> Result<()> {
    let app = TestApp::start()?;
    let body = json!({"filename": "a", "purpose": "fine-tune", "bytes": MAX_UPLOAD_BYTES + 1, "mime_type": "text/plain"});
    assert_eq!(app.call("POST", "/v1/uploads", Some(&body.to_string()))?.status, 413);
    Ok(())
}
