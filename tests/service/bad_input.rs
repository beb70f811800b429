//! Each mistake once: a clear 4xx in the contract's shape, and nothing stored.

use anyhow::Result;
use holdfast_tests::{MODEL, ROW, TestApp};
use serde_json::{Value, json};

#[test]
fn a_dataset_with_bad_lines_is_kept_with_every_one_of_them_and_taken_by_no_job() -> Result<()> {
    let app = TestApp::with_model()?;
    let no_reply = r#"{"messages":[{"role":"user","content":"u"}]}"#;
    let content =
        [ROW, "not json", ROW, r#"{"messages":[]}"#, r#"{"messages":[{"role":"bot","content":"x"}]}"#, no_reply].join("\n");
    let file = app.upload(content.as_bytes())?;
    assert_eq!((file.status, &file.body["status"], &file.body["error_count"]), (200, &json!("error"), &json!(4)));
    let bad = |key: &str| -> Vec<Value> {
        file.body["errors"].as_array().into_iter().flatten().map(|line| line[key].clone()).collect()
    };
    assert_eq!(bad("line"), [2, 4, 5, 6].map(|line| json!(line)));
    assert_eq!(bad("path"), ["", "messages", "messages[0].role", "messages"].map(|path| json!(path)));
    assert_eq!(file.body["errors"][2]["message"], "expected system, developer, user, assistant or tool");
    let shown = app.call("GET", &format!("/v1/files/{}", file.body["id"].as_str().unwrap_or_default()), None)?;
    assert_eq!(shown.body, file.body, "the lines can be read again");
    let body = json!({"model": MODEL, "training_file": file.body["id"]}).to_string();
    let job = app.call("POST", "/v1/fine_tuning/jobs", Some(&body))?;
    assert_eq!((job.status, job.error()), (400, ("invalid_dataset", "training_file")));
    assert_eq!(job.body["error"]["errors"].as_array().map(Vec::len), Some(4));
    Ok(())
}

#[test]
fn a_file_without_rows_or_not_in_utf8_says_so() -> Result<()> {
    let app = TestApp::start()?;
    for (content, message) in [(&b""[..], "the file holds no rows"), (b"{\"messages\": \"\xff\"}\n", "not UTF-8")] {
        let file = app.upload(content)?;
        assert_eq!((file.status, &file.body["status"]), (200, &json!("error")));
        assert!(file.body["status_details"].as_str().is_some_and(|details| details.contains(message)), "{}", file.body);
    }
    Ok(())
}

#[test]
fn a_form_that_is_not_the_contract_s_is_refused() -> Result<()> {
    let app = TestApp::start()?;
    let row = ROW.as_bytes();
    type Fields<'a> = &'a [(&'a str, Option<&'a str>, &'a [u8])];
    let cases: [(Fields<'_>, (&str, &str)); 5] = [
        (&[("purpose", None, b"fine-tune")], ("missing", "file")),
        (&[("file", Some("a.jsonl"), row)], ("missing", "purpose")),
        (&[("file", Some("a.jsonl"), row), ("purpose", None, b"assistants")], ("unsupported_purpose", "purpose")),
        (&[("purpose", None, b"fine-tune"), ("file", None, row)], ("invalid_filename", "file")),
        (&[("file", Some("a.jsonl"), row), ("file", Some("b.jsonl"), row)], ("duplicate_field", "file")),
    ];
    for (fields, error) in cases {
        let answer = app.upload_form(fields)?;
        assert_eq!((answer.status, answer.error()), (400, error), "{}", answer.body);
    }
    assert_eq!(app.object_count("projects"), 0, "what was refused leaves nothing");
    assert_eq!(app.call("POST", "/v1/files", Some("{}"))?.error().0, "invalid_form");
    Ok(())
}

#[test]
fn a_path_in_a_filename_is_dropped() -> Result<()> {
    let app = TestApp::start()?;
    let answer = app.upload_form(&[("purpose", None, b"fine-tune"), ("file", Some("../../etc/x.jsonl"), ROW.as_bytes())])?;
    assert_eq!(answer.body["filename"], "x.jsonl");
    Ok(())
}

#[test]
fn a_job_that_cannot_be_is_refused_and_the_value_named() -> Result<()> {
    let app = TestApp::with_model()?;
    let file = app.uploaded(ROW.as_bytes())?;
    let missing = "file-00000000000000000000000000000000";
    let with = |rest: &str| format!(r#"{{"model":"{MODEL}","training_file":"{file}"{rest}}}"#);
    let hyper =
        |value: &str| with(&format!(r#","method":{{"type":"supervised","supervised":{{"hyperparameters":{{{value}}}}}}}"#));
    let cases = [
        ("{".to_owned(), 400, ("invalid_json", "")),
        ("{}".to_owned(), 400, ("missing", "model")),
        (format!(r#"{{"model":"m","training_file":"{missing}"}}"#), 404, ("not_found", "training_file")),
        (r#"{"model":"m","training_file":"nonsense"}"#.to_owned(), 404, ("not_found", "training_file")),
        (format!(r#"{{"model":"m","training_file":"{file}"}}"#), 404, ("not_found", "model")),
        (with(r#","seed":-1"#), 400, ("invalid_type", "seed")),
        (with(r#","seed":3000000000"#), 400, ("out_of_bounds", "seed")),
        (with(r#","suffix":"a b""#), 400, ("invalid_suffix", "suffix")),
        (with(r#","method":{"type":"dpo"}"#), 400, ("unsupported_method", "method.type")),
        (with(r#","hyperparameters":{"n_epochs":99}"#), 400, ("out_of_bounds", "hyperparameters.n_epochs")),
        (hyper(r#""n_epochs":0"#), 400, ("out_of_bounds", "method.supervised.hyperparameters.n_epochs")),
        (hyper(r#""n_epochs":"many""#), 400, ("invalid_type", "method.supervised.hyperparameters.n_epochs")),
        (hyper(r#""max_length":4096"#), 400, ("out_of_bounds", "method.supervised.hyperparameters.max_length")),
        (hyper(r#""lora_rank":1000"#), 400, ("out_of_bounds", "method.supervised.hyperparameters.lora_rank")),
        (
            hyper(r#""target_modules":["lm_head"]"#),
            400,
            ("unknown_target_module", "method.supervised.hyperparameters.target_modules[0]"),
        ),
        (with(r#","safety":{"defense":"none"}"#), 400, ("safety_below_floor", "safety.defense")),
        (with(r#","safety":{"rho":0.5}"#), 400, ("safety_below_floor", "safety.rho")),
        (with(r#","safety":{"alignment_batch_size":4}"#), 400, ("safety_below_floor", "safety.alignment_batch_size")),
        (with(r#","safety":{"alignment_batch_size":0}"#), 400, ("out_of_bounds", "safety.alignment_batch_size")),
    ];
    for (body, status, error) in cases {
        let answer = app.call("POST", "/v1/fine_tuning/jobs", Some(&body))?;
        assert_eq!((answer.status, answer.error()), (status, error), "{body}: {}", answer.body);
    }
    assert_eq!(app.call("GET", "/v1/fine_tuning/jobs", None)?.body["data"].as_array().map(Vec::len), Some(0));
    Ok(())
}

#[test]
fn an_unknown_url_and_a_wrong_method_have_the_contract_s_shape() -> Result<()> {
    let app = TestApp::start()?;
    assert_eq!(app.call("GET", "/v1/nothing", None)?.error().0, "unknown_url");
    assert_eq!(app.call("PUT", "/v1/files", None)?.error().0, "method_not_allowed");
    assert_eq!(app.call("GET", "/v1/files/%FF", None)?.error().0, "invalid_path");
    assert_eq!(app.call("GET", "/v1/files?limit=0", None)?.error(), ("out_of_bounds", "limit"));
    assert_eq!(app.call("GET", "/v1/files?after=x", None)?.error(), ("invalid_cursor", "after"));
    Ok(())
}
