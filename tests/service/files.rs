//! Files.

use anyhow::Result;
use holdfast_tests::{MAX_UPLOAD_BYTES, ROW, TestApp};

#[test]
fn a_file_is_kept_listed_read_back_and_deleted() -> Result<()> {
    let app = TestApp::start()?;
    let content = format!("{ROW}\n{ROW}\n");
    let file = app.uploaded(content.as_bytes())?;
    let shown = app.call("GET", &format!("/v1/files/{file}"), None)?;
    assert_eq!((shown.body["bytes"].as_u64(), shown.body["status"].as_str()), (Some(content.len() as u64), Some("processed")));
    assert_eq!(app.call("GET", &format!("/v1/files/{file}/content"), None)?.bytes, content.as_bytes());
    let part = app.call_with(&[("range", "bytes=0-9")], "GET", &format!("/v1/files/{file}/content"), None)?;
    assert_eq!((part.status, part.bytes.as_slice()), (206, &content.as_bytes()[..10]));
    assert_eq!(app.call("GET", "/v1/files", None)?.body["data"][0]["id"], file);
    assert_eq!(app.call("DELETE", &format!("/v1/files/{file}"), None)?.body["deleted"], true);
    assert_eq!(app.call("GET", &format!("/v1/files/{file}"), None)?.status, 404);
    Ok(())
}

#[test]
fn a_deleted_file_s_bytes_go_with_the_next_sweep() -> Result<()> {
    let app = TestApp::start()?;
    let file = app.uploaded(ROW.as_bytes())?;
    assert_eq!(app.object_count("projects"), 1);
    app.call("DELETE", &format!("/v1/files/{file}"), None)?;
    app.runtime.block_on(app.store.objects().sweep(std::time::Duration::from_secs(3600)))?;
    assert_eq!(app.object_count("projects"), 0);
    Ok(())
}

#[test]
fn the_file_may_come_before_the_purpose() -> Result<()> {
    let app = TestApp::start()?;
    let answer = app.upload_form(&[("file", Some("a.jsonl"), ROW.as_bytes()), ("purpose", None, b"fine-tune")])?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    Ok(())
}

#[test]
fn pages_neither_skip_nor_repeat_when_files_come_in_between() -> Result<()> {
    let app = TestApp::start()?;
    let mut files: Vec<String> = (0..5).map(|_| app.uploaded(ROW.as_bytes())).collect::<Result<_>>()?;
    let first = app.call("GET", "/v1/files?limit=2", None)?.body;
    assert_eq!((first["has_more"].as_bool(), first["last_id"].as_str()), (Some(true), Some(files[3].as_str())));
    app.uploaded(ROW.as_bytes())?;
    let mut seen: Vec<String> = Vec::new();
    let mut after = first["last_id"].as_str().unwrap_or_default().to_owned();
    loop {
        let page = app.call("GET", &format!("/v1/files?limit=2&after={after}"), None)?.body;
        seen.extend(page["data"].as_array().into_iter().flatten().filter_map(|f| Some(f["id"].as_str()?.to_owned())));
        after = page["last_id"].as_str().unwrap_or_default().to_owned();
        if page["has_more"] != true {
            break;
        }
    }
    files.truncate(3);
    files.reverse();
    assert_eq!(seen, files);
    Ok(())
}

#[test]
fn a_file_over_the_limit_is_413_and_leaves_nothing() -> Result<()> {
    let app = TestApp::start()?;
    let line = format!("{ROW}\n");
    let rows = usize::try_from(MAX_UPLOAD_BYTES)? / line.len() + 1;
    let answer = app.upload(line.repeat(rows).as_bytes())?;
    assert_eq!((answer.status, answer.error().0), (413, "too_large"));
    assert_eq!(app.call("GET", "/v1/files", None)?.body["data"].as_array().map(Vec::len), Some(0));
    assert_eq!(app.object_count("projects"), 0);
    Ok(())
}
