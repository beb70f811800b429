//! Objects in a bucket of a real S3 server.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_tests::{ROW, TestApp, program};
use serde_json::json;

/// What a client without a key gets at a URL.
fn fetch(url: &str, range: Option<&str>) -> Result<(u16, Vec<u8>)> {
    let mut request = ureq::get(url).config().http_status_as_error(false).build();
    if let Some(range) = range {
        request = request.header("range", range);
    }
    let mut answer = request.call()?;
    Ok((answer.status().as_u16(), answer.body_mut().with_config().limit(1 << 30).read_to_vec()?))
}

#[test]
fn a_job_is_trained_from_a_bucket_and_its_adapter_comes_past_the_service() -> Result<()> {
    let app = TestApp::start_on_s3()?.import_model()?;
    let job = app.create_job(ROW, &json!({"hyperparameters": {"n_epochs": 1}}))?;
    assert!(app.step_worker()? && app.step_worker()?, "the check and the training");
    assert_eq!(app.job(&job)?["status"], "succeeded", "{}", app.job(&job)?);
    let adapter = format!("/v1/fine_tuning/jobs/{job}/adapter");
    let whole = app.call("GET", &adapter, None)?;
    assert_eq!((whole.status, whole.header("content-type")), (200, Some("application/x-tar")), "a tar is made here");

    let signed = app.call("GET", &format!("{adapter}/adapter_model.safetensors"), None)?;
    assert_eq!(signed.status, 307, "{}", signed.body);
    let url = signed.header("location").context("no location")?;
    let (status, weights) = fetch(url, None)?;
    assert_eq!(status, 200);
    assert!(weights.len() > 100 && whole.bytes.windows(weights.len()).any(|part| part == weights), "other bytes than the tar's");
    let (status, head) = fetch(url, Some("bytes=0-99"))?;
    assert_eq!((status, &head[..]), (206, &weights[..100]));
    let (status, _) = fetch(&url.replace("adapter_model", "adapter_other"), None)?;
    assert_eq!(status, 403, "a signature is good for one object");
    let (unsigned, _) = url.split_once('?').context("no signature")?;
    assert_eq!(fetch(unsigned, None)?.0, 403, "nothing is public");
    Ok(())
}

#[test]
fn a_file_in_parts_is_read_from_its_objects_and_deleted_with_them() -> Result<()> {
    let app = TestApp::start_on_s3()?;
    let content = format!("{ROW}\n{ROW}\n");
    let body = json!({"filename": "a.jsonl", "purpose": "fine-tune", "bytes": content.len(), "mime_type": "application/jsonl"});
    let upload = app.call("POST", "/v1/uploads", Some(&body.to_string()))?.body["id"].as_str().context("no id")?.to_owned();
    let mut parts = Vec::new();
    for part in [&content[..ROW.len() + 20], &content[ROW.len() + 20..]] {
        let added = app.send_form(&format!("/v1/uploads/{upload}/parts"), &[], &[("data", Some("part"), part.as_bytes())])?;
        parts.push(added.body["id"].as_str().with_context(|| added.body.to_string())?.to_owned());
    }
    let done = app.call("POST", &format!("/v1/uploads/{upload}/complete"), Some(&json!({"part_ids": parts}).to_string()))?;
    let file = done.body["file"]["id"].as_str().context("no file")?;
    assert_eq!(app.call("GET", &format!("/v1/files/{file}/content"), None)?.bytes, content.as_bytes());

    let s3 = app.s3.as_ref().context("no bucket")?;
    let of_parts = || Ok::<_, anyhow::Error>(s3.stored()?.into_iter().filter(|name| name.contains("part_")).count());
    assert_eq!(of_parts()?, 2);
    assert_eq!(app.call("DELETE", &format!("/v1/files/{file}"), None)?.status, 200);
    app.runtime.block_on(app.store.objects().sweep(Duration::ZERO))?;
    assert_eq!(of_parts()?, 0);
    Ok(())
}

#[test]
fn what_a_killed_process_left_in_the_middle_of_an_object_is_swept() -> Result<()> {
    let app = TestApp::start_on_s3()?;
    let s3 = app.s3.as_ref().context("no bucket")?;
    app.runtime.block_on(async {
        let mut writer = app.store.objects().stage("projects/x/files/y".into()).await?;
        for _ in 0..11 {
            writer.write(&[0; 1 << 20]).await?;
        }
        // As if it were killed here: nothing is finished, nothing aborted.
        std::mem::forget(writer);
        anyhow::Ok(())
    })?;
    // Two parts were full, and are still on their way.
    for _ in 0..6000 {
        std::thread::sleep(Duration::from_millis(100));
        if s3.parts_of_unfinished_objects()? == 2 {
            break;
        }
    }
    assert_eq!(s3.parts_of_unfinished_objects()?, 2, "there was nothing to sweep");
    app.runtime.block_on(app.store.objects().sweep(Duration::ZERO))?;
    assert_eq!(s3.parts_of_unfinished_objects()?, 0);
    Ok(())
}

#[test]
fn an_object_of_many_parts_comes_back_as_it_was() -> Result<()> {
    let app = TestApp::start_on_s3()?;
    let content: Vec<u8> = (0..12_000_003_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let objects = app.store.objects();
    let back = app.runtime.block_on(async {
        let object = objects.stage_bytes("projects/x/files/y".into(), &content).await?;
        let target = tempfile::NamedTempFile::new()?;
        objects.fetch(&object, target.path()).await?;
        anyhow::Ok(std::fs::read(target.path())?)
    })?;
    assert!(back == content);
    Ok(())
}

#[test]
fn a_store_that_is_down_delays_a_job_and_is_said_to_be_down() -> Result<()> {
    let mut app = TestApp::start_on_s3()?.import_model()?;
    let job = app.create_job(ROW, &json!({"hyperparameters": {"n_epochs": 1}}))?;
    app.s3.as_mut().context("no bucket")?.stop()?;
    assert!(app.step_worker()?);
    let delayed = app.job(&job)?;
    assert_eq!((&delayed["status"], &delayed["attempts"][0]["outcome"]), (&json!("validating_files"), &json!("delayed")));
    assert_eq!(delayed["attempts"][0]["reason"], "The object store could not be used");
    let refused = app.upload(ROW.as_bytes())?;
    assert_eq!((refused.status, refused.error().0), (503, "unavailable"), "{}", refused.body);
    assert!(refused.header("retry-after").is_some());

    app.s3.as_mut().context("no bucket")?.start_again()?;
    app.work_until(|| Ok(app.job(&job)?["status"] == "succeeded"))?;
    assert_eq!(app.upload(ROW.as_bytes())?.status, 200);
    Ok(())
}

#[test]
fn an_operator_learns_whether_a_store_does_what_the_service_needs() -> Result<()> {
    let app = TestApp::start_on_s3()?;
    let check = || -> Result<Command> {
        let mut command = Command::new(program("holdfast")?);
        command.arg("check-store").env("DATABASE_URL", app.database_url()).env("HOLDFAST_OBJECT_STORE", "s3://bucket/a/prefix");
        command.envs(app.s3.as_ref().context("no bucket")?.settings());
        Ok(command)
    };
    let said = check()?.output()?;
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let lines = String::from_utf8(said.stdout)?;
    assert_eq!(lines.lines().filter(|line| line.contains(": ok, ")).count(), 5, "{lines}");
    let in_a_folder = check()?.env("HOLDFAST_OBJECT_STORE", tempfile::tempdir()?.path()).output()?;
    assert!(String::from_utf8(in_a_folder.stdout)?.contains("a signed URL: none, "));
    Ok(())
}
