//! Being told: events as a stream, and webhooks.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_store::keys::NewKey;
use holdfast_tests::{PATIENCE, ROW, TestApp};
use serde_json::{Value, json};

/// What a receiver was sent: the headers of Standard Webhooks, and the body.
#[derive(Debug)]
struct Received {
    id: String,
    timestamp: i64,
    signature: String,
    body: String,
}

/// A receiver that answers with `statuses` one after the other.
fn receiver(statuses: &'static [u16]) -> Result<(String, mpsc::Receiver<Received>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/hook", listener.local_addr()?);
    let (sender, received) = mpsc::channel();
    std::thread::spawn(move || {
        for status in statuses {
            let Ok((stream, _)) = listener.accept() else { return };
            if let Ok(one) = receive(stream, *status) {
                let _ = sender.send(one);
            }
        }
    });
    Ok((url, received))
}

fn receive(mut stream: TcpStream, status: u16) -> Result<Received> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut headers = std::collections::HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.trim().to_lowercase(), value.trim().to_owned());
        }
    }
    let header = |name: &str| headers.get(name).cloned().with_context(|| format!("no {name}"));
    let mut body = vec![0; header("content-length")?.parse()?];
    reader.read_exact(&mut body)?;
    write!(stream, "HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")?;
    Ok(Received {
        id: header("webhook-id")?,
        timestamp: header("webhook-timestamp")?.parse()?,
        signature: header("webhook-signature")?,
        body: String::from_utf8(body)?,
    })
}

fn make(app: &TestApp, url: &str) -> Result<Value> {
    let made = app.call("POST", "/v1/webhook_endpoints", Some(&json!({"url": url}).to_string()))?;
    ensure!(made.status == 200, "{}", made.body);
    Ok(made.body)
}

#[test]
fn a_job_that_ends_is_told_once_signed_and_tried_again_until_it_is_taken() -> Result<()> {
    let app = TestApp::with_model()?;
    let (url, received) = receiver(&[500, 200])?;
    let webhook = make(&app, &url)?;
    let secret = webhook["signing_secret"].as_str().context("no secret")?;
    let job = app.create_job(ROW, &json!({}))?;
    app.call("POST", &format!("/v1/fine_tuning/jobs/{job}/cancel"), None)?;
    let first = received.recv_timeout(PATIENCE)?;
    let second = received.recv_timeout(PATIENCE)?;
    assert_eq!((&first.id, &first.body), (&second.id, &second.body), "a try again is the same notice");
    let told: Value = serde_json::from_str(&second.body)?;
    assert_eq!((&told["type"], &told["data"]["id"]), (&json!("fine_tuning.job.cancelled"), &json!(job)));
    assert_eq!((&told["object"], told["id"].as_str()), (&json!("event"), Some(second.id.as_str())));
    let key = base64(secret.strip_prefix("whsec_").context("no prefix")?)?;
    assert_eq!(second.signature, holdfast_webhooks::sign(&key, &second.id, second.timestamp, &second.body));

    let path = format!("/v1/webhook_endpoints/{}/deliveries", webhook["id"].as_str().context("no id")?);
    let delivery = || -> Result<Value> { Ok(app.call("GET", &path, None)?.body["data"][0].clone()) };
    let since = Instant::now();
    while delivery()?["state"] != "delivered" {
        ensure!(since.elapsed() < PATIENCE, "{}", delivery()?);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!((&delivery()?["tries"], &delivery()?["last_status"]), (&json!(2), &json!(200)));
    Ok(())
}

/// Decodes base64 with the machine's own program, so that the test does not trust the code it tests.
fn base64(text: &str) -> Result<Vec<u8>> {
    let script = "import base64, sys; sys.stdout.buffer.write(base64.b64decode(sys.argv[1]))";
    let output = std::process::Command::new("python3").args(["-c", script, text]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

#[test]
fn a_notice_that_nobody_takes_is_given_up_and_can_be_sent_anew() -> Result<()> {
    let app = TestApp::with_model()?;
    let (url, received) = receiver(&[500, 204])?;
    let webhook = make(&app, &url)?;
    let id = webhook["id"].as_str().context("no id")?;
    let job = app.create_job(ROW, &json!({}))?;
    // As if it had been tried for two days; from its first moment, as the sender may be quick.
    app.sql("alter table webhook_deliveries alter column tries set default 10")?;
    app.call("POST", &format!("/v1/fine_tuning/jobs/{job}/cancel"), None)?;
    let notice = received.recv_timeout(PATIENCE)?.id;
    let since = Instant::now();
    loop {
        let dead = app.call("GET", &format!("/v1/webhook_endpoints/{id}/deliveries?state=dead"), None)?;
        if dead.body["data"][0]["id"] == notice.as_str() {
            assert_eq!(dead.body["data"][0]["last_error"], "the receiver answered 500");
            break;
        }
        ensure!(since.elapsed() < PATIENCE, "{}", dead.body);
        std::thread::sleep(Duration::from_millis(50));
    }
    let replay = app.call("POST", &format!("/v1/webhook_endpoints/{id}/deliveries/{notice}/replay"), None)?;
    assert_eq!(replay.status, 204);
    assert_eq!(received.recv_timeout(PATIENCE)?.id, notice);
    Ok(())
}

#[test]
fn events_come_as_they_happen_and_a_reader_goes_on_where_it_was() -> Result<()> {
    let app = TestApp::with_model()?;
    let job = app.create_job(ROW, &json!({}))?;
    let path = format!("/v1/fine_tuning/jobs/{job}/events");
    let address = app.url.strip_prefix("http://").context("no address")?;
    let follow = |last: Option<&str>| -> Result<BufReader<TcpStream>> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let last = last.map_or_else(String::new, |id| format!("last-event-id: {id}\r\n"));
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\naccept: text/event-stream\r\n{last}connection: close\r\n\r\n",
            app.key
        )?;
        Ok(BufReader::new(stream))
    };
    let mut reader = follow(None)?;
    let mut next = || -> Result<Option<(String, String)>> {
        let mut id = None;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            if let Some(found) = line.strip_prefix("id:") {
                id = Some(found.trim().to_owned());
            }
            if let (Some(data), Some(id)) = (line.strip_prefix("data:"), &id) {
                let event: Value = serde_json::from_str(data.trim())?;
                assert_eq!(event["id"], id.as_str());
                return Ok(Some((id.clone(), event["message"].as_str().unwrap_or_default().to_owned())));
            }
            if line.starts_with("data:") {
                // The id may stand after the data.
                let event: Value = serde_json::from_str(line.trim_start_matches("data:").trim())?;
                let id = event["id"].as_str().unwrap_or_default().to_owned();
                return Ok(Some((id, event["message"].as_str().unwrap_or_default().to_owned())));
            }
        }
    };
    let first = next()?.context("no event")?;
    assert_eq!(first.1, format!("Created fine-tuning job: {job}"));
    next()?.context("no second event")?;
    app.call("POST", &format!("/v1/fine_tuning/jobs/{job}/cancel"), None)?;
    let last = next()?.context("the cancel was not heard of")?;
    assert_eq!(last.1, "The job was cancelled");
    assert_eq!(next()?, None, "the stream ends with the job");

    let mut rest = String::new();
    follow(Some(&first.0))?.read_to_string(&mut rest)?;
    assert!(rest.contains("Validating the files") && !rest.contains("Created fine-tuning job"), "{rest}");
    let mut nothing = String::new();
    follow(Some(&last.0))?.read_to_string(&mut nothing)?;
    assert!(nothing.starts_with("HTTP/1.1 204"), "{nothing}");
    Ok(())
}

#[test]
fn a_stream_ends_with_the_key_that_opened_it() -> Result<()> {
    let app = TestApp::with_model()?;
    let job = app.create_job(ROW, &json!({}))?;
    let (project, _) = app.project_key("default")?;
    let (key, row) = app
        .runtime
        .block_on(app.store.create_key(&NewKey { project: Some(project), read_only: true, ..NewKey::default() }, None))?;
    let mut stream = TcpStream::connect(app.url.strip_prefix("http://").context("no address")?)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let key = key.reveal();
    write!(
        stream,
        "GET /v1/fine_tuning/jobs/{job}/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\naccept: text/event-stream\r\nconnection: close\r\n\r\n"
    )?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with("data:") {
        line.clear();
        ensure!(reader.read_line(&mut line)? > 0, "no event came");
    }
    app.runtime.block_on(app.store.revoke_key(row.id))?;
    // It ends although the job has not.
    std::io::copy(&mut reader, &mut std::io::sink())?;
    Ok(())
}

#[test]
fn a_secret_that_was_kept_for_a_day_signs_beside_the_new_one() -> Result<()> {
    let app = TestApp::with_model()?;
    let (url, received) = receiver(&[204])?;
    let webhook = make(&app, &url)?;
    let id = webhook["id"].as_str().context("no id")?;
    let keep = json!({"keep_old_secret_active_for_24_hours": true}).to_string();
    let rotated = app.call("POST", &format!("/v1/webhook_endpoints/{id}/rotate_secret"), Some(&keep))?.body;
    let body = json!({"event_type": "fine_tuning.job.failed"}).to_string();
    assert_eq!(app.call("POST", &format!("/v1/webhook_endpoints/{id}/test"), Some(&body))?.status, 200);
    let told = received.recv_timeout(PATIENCE)?;
    for secret in [&rotated["signing_secret"], &webhook["signing_secret"]] {
        let key = base64(secret.as_str().and_then(|secret| secret.strip_prefix("whsec_")).context("no secret")?)?;
        let signature = holdfast_webhooks::sign(&key, &told.id, told.timestamp, &told.body);
        assert!(told.signature.split(' ').any(|one| one == signature), "{}", told.signature);
    }
    let wrong = app.call("POST", &format!("/v1/webhook_endpoints/{id}/test"), Some(r#"{"event_type":"x"}"#))?;
    assert_eq!((wrong.status, wrong.error()), (400, ("unknown_type", "event_type")));
    Ok(())
}
