//! Clients that mean harm, or are broken: each gets an answer in the contract's shape or a closed connection, and costs little.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use holdfast_tests::{ROW, TestApp};
use serde_json::{Value, json};

fn connect(app: &TestApp) -> Result<TcpStream> {
    let stream = TcpStream::connect(app.url.strip_prefix("http://").context("no address")?)?;
    stream.set_read_timeout(Some(Duration::from_secs(25)))?;
    Ok(stream)
}

/// What is answered until the connection ends.
fn answer(mut stream: TcpStream) -> String {
    let (mut said, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = stream.read(&mut piece) {
        said.extend_from_slice(piece.get(..read).unwrap_or_default());
    }
    String::from_utf8_lossy(&said).into_owned()
}

fn head(app: &TestApp, method: &str, path: &str, more: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n{more}connection: close\r\n\r\n", app.key)
}

#[test]
fn who_sends_nothing_or_a_head_drop_by_drop_is_shown_the_door() -> Result<()> {
    let app = TestApp::start()?;
    let since = Instant::now();
    let silent = connect(&app)?;
    let mut slow = connect(&app)?;
    slow.write_all(b"GET /v1/files HTTP/1.1\r\nhost: x\r\n")?;
    let drip = std::thread::spawn(move || {
        // A header a second, for ever.
        while slow.write_all(b"x-drop: 1\r\n").is_ok() && since.elapsed() < Duration::from_secs(40) {
            std::thread::sleep(Duration::from_secs(1));
        }
        since.elapsed()
    });
    assert_eq!(answer(silent), "");
    let closed = drip.join().map_err(|_| anyhow::anyhow!("the client failed"))?;
    assert!(since.elapsed() < Duration::from_secs(25) && closed < Duration::from_secs(25), "{closed:?}");
    Ok(())
}

#[test]
fn a_body_without_end_is_cut_off_where_the_limit_is() -> Result<()> {
    let app = TestApp::start()?;
    for (path, kind) in [("/v1/fine_tuning/jobs", "application/json"), ("/v1/files", "multipart/form-data; boundary=b")] {
        let mut stream = connect(&app)?;
        stream
            .write_all(head(&app, "POST", path, &format!("content-type: {kind}\r\ntransfer-encoding: chunked\r\n")).as_bytes())?;
        let begin = "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n";
        write!(stream, "{:x}\r\n{begin}\r\n", begin.len())?;
        let piece = format!("10000\r\n{}\r\n", "[".repeat(0x10000));
        let mut reader = stream.try_clone()?;
        let writer = std::thread::spawn(move || (0..4096).take_while(|_| stream.write_all(piece.as_bytes()).is_ok()).count());
        let mut said = [0; 64];
        let read = reader.read(&mut said)?;
        let said = String::from_utf8_lossy(said.get(..read).unwrap_or_default()).into_owned();
        assert!(said.starts_with("HTTP/1.1 413") || said.starts_with("HTTP/1.1 400"), "{path}: {said}");
        drop(reader);
        let _ = writer.join();
    }
    assert_eq!(app.object_count("projects"), 0);
    Ok(())
}

#[test]
fn a_body_in_single_bytes_takes_no_more_memory_than_its_size() -> Result<()> {
    let app = TestApp::start()?;
    let resident = || -> Result<u64> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? / 1024)
    };
    let mut stream = connect(&app)?;
    stream.set_nodelay(true)?;
    stream.write_all(head(&app, "POST", "/v1/fine_tuning/jobs", "transfer-encoding: chunked\r\n").as_bytes())?;
    stream.write_all(b"a\r\n{\"model\":\"\r\n")?;
    let before = resident()?;
    for _ in 0..60_000 {
        stream.write_all(b"1\r\na\r\n")?;
    }
    let grown = resident()?.saturating_sub(before);
    stream.write_all(b"2\r\n\"}\r\n0\r\n\r\n")?;
    assert!(answer(stream).starts_with("HTTP/1.1 400"));
    // Other tests run beside this one.
    assert!(grown < 150, "{grown} MiB");
    Ok(())
}

#[test]
fn a_refusal_is_heard_while_a_file_is_sent() -> Result<()> {
    let app = TestApp::start()?;
    for _ in 0..10 {
        let mut stream = connect(&app)?;
        let body = vec![b'x'; 2 << 20];
        let head = format!(
            "POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer wrong\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        for piece in body.chunks(64 << 10) {
            if let Err(error) = stream.write_all(piece) {
                assert_ne!(error.kind(), ErrorKind::BrokenPipe, "the connection was cut while the file was sent");
            }
        }
        assert!(answer(stream).starts_with("HTTP/1.1 401"));
    }
    Ok(())
}

#[test]
fn a_head_of_a_megabyte_is_refused() -> Result<()> {
    let app = TestApp::start()?;
    let mut stream = connect(&app)?;
    let head = head(&app, "GET", "/v1/files", &format!("x-long: {}\r\n", "a".repeat(1 << 20)));
    let _ = stream.write_all(head.as_bytes());
    let said = answer(stream);
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 431"), "{said}");
    assert_eq!(app.call("GET", "/v1/files", None)?.status, 200);
    Ok(())
}

#[test]
fn json_that_is_a_bomb_is_a_refusal() -> Result<()> {
    let app = TestApp::start()?;
    let nested =
        format!(r#"{{"model":"m","training_file":"f","metadata":{}1{}}}"#, r#"{"a":"#.repeat(100_000), "}".repeat(100_000));
    let many = format!(r#"{{"model":"m","training_file":"f",{}"seed":1}}"#, r#""seed":1,"#.repeat(100_000));
    let huge = format!(r#"{{"model":"m","training_file":"f","seed":{}}}"#, "9".repeat(900_000));
    for (what, body) in [("nested", nested), ("a key often", many), ("a long number", huge), ("brackets", "[".repeat(1 << 20))] {
        let since = Instant::now();
        let answer = app.call("POST", "/v1/fine_tuning/jobs", Some(&body))?;
        assert_eq!(answer.status, 400, "{what}: {}", answer.body);
        assert!(since.elapsed() < Duration::from_secs(5) && answer.bytes.len() < 4096, "{what}");
    }
    Ok(())
}

#[test]
fn filenames_that_lead_elsewhere_lose_their_way_or_are_refused() -> Result<()> {
    let app = TestApp::start()?;
    let send = |name: &str| app.upload_form(&[("purpose", None, b"fine-tune"), ("file", Some(name), ROW.as_bytes())]);
    for (name, kept) in
        [("../../etc/passwd", "passwd"), ("..\\\\x.jsonl", "x.jsonl"), ("/a/b.jsonl", "b.jsonl"), ("été.jsonl", "été.jsonl")]
    {
        assert_eq!(send(name)?.body["filename"], kept, "{name}");
    }
    for name in ["..", "a/..", ".", "", &"x".repeat(256)] {
        let answer = send(name)?;
        assert_eq!((answer.status, answer.error()), (400, ("invalid_filename", "file")), "{name:?}");
    }
    let control = send("a\u{7}b")?;
    assert_eq!((control.status, control.error().0), (400, "invalid_form"), "no form's head holds a control character");
    Ok(())
}

#[test]
fn a_character_that_no_database_keeps_is_refused_wherever_it_stands() -> Result<()> {
    let app = TestApp::start()?;
    let file = app.uploaded(ROW.as_bytes())?;
    let body = json!({"model": "a\0b", "training_file": file}).to_string();
    let hook = json!({"url": "https://example.com/\0"}).to_string();
    let calls: [(&str, &str, Option<&str>); 6] = [
        ("GET", "/v1/files?purpose=%00", None),
        ("GET", "/v1/models/%00", None),
        ("DELETE", "/v1/models/ft:%00", None),
        ("GET", "/v1/models/a/%00", None),
        ("POST", "/v1/fine_tuning/jobs", Some(&body)),
        ("POST", "/v1/webhook_endpoints", Some(&hook)),
    ];
    for (method, path, body) in calls {
        let answer = app.call(method, path, body)?;
        assert_eq!(answer.status, 400, "{method} {path}: {}", answer.body);
    }
    Ok(())
}

#[test]
fn a_request_s_own_id_is_believed_only_when_it_is_one() -> Result<()> {
    let app = TestApp::start()?;
    let id = |sent: &str| -> Result<Option<String>> {
        Ok(app.call_with(&[("x-request-id", sent)], "GET", "/v1/files", None)?.request_id)
    };
    assert_eq!(id("mine-1")?.as_deref(), Some("mine-1"));
    for odd in ["a b", &"x".repeat(200)] {
        assert!(id(odd)?.is_some_and(|id| id.len() == 36), "{odd}");
    }
    Ok(())
}

#[test]
fn hundreds_of_tiny_parts_are_a_file_and_no_upload_has_more_than_ten_thousand() -> Result<()> {
    let app = TestApp::start()?;
    let begin = |bytes: usize| -> Result<String> {
        let body = json!({"filename": "a", "purpose": "fine-tune", "bytes": bytes, "mime_type": "application/jsonl"});
        Ok(app.call("POST", "/v1/uploads", Some(&body.to_string()))?.body["id"].as_str().context("no id")?.to_owned())
    };
    let upload = begin(ROW.len())?;
    let add =
        |upload: &str, part: &[u8]| app.send_form(&format!("/v1/uploads/{upload}/parts"), &[], &[("data", Some("p"), part)]);
    let parts: Vec<Value> =
        ROW.as_bytes().iter().map(|byte| Ok(add(&upload, &[*byte])?.body["id"].clone())).collect::<Result<_>>()?;
    assert!(parts.len() > 90);
    let done = app.call("POST", &format!("/v1/uploads/{upload}/complete"), Some(&json!({"part_ids": parts}).to_string()))?;
    assert_eq!(done.body["file"]["status"], "processed", "{}", done.body);

    let full = begin(1_000_000)?;
    app.sql(&format!(
        "insert into upload_parts (id, upload_id, object_key, bytes)
         select gen_random_uuid(), '{}', n::text, 1 from generate_series(1, 10000) n",
        full.trim_start_matches("upload_")
    ))?;
    let refused = add(&full, b"x")?;
    assert_eq!((refused.status, refused.error()), (400, ("too_many_parts", "data")));
    Ok(())
}
