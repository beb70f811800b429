//! Who may do what.

use anyhow::{Context, Result};
use holdfast_tests::{ROW, TestApp};

/// Operations that need no key.
const OPEN: [&str; 1] = ["/healthz"];

#[test]
fn every_operation_of_the_contract_wants_a_known_key() -> Result<()> {
    let app = TestApp::start()?;
    let contract = serde_json::to_value(holdfast_api::openapi())?;
    let mut seen = 0;
    for (path, methods) in contract["paths"].as_object().context("no paths")? {
        for method in methods.as_object().context("no methods")?.keys() {
            let method = method.to_uppercase();
            let expected = if OPEN.contains(&path.as_str()) { 200 } else { 401 };
            for key in [None, Some("hf-0000000000000000000000000000000000000000000000000000000000000000")] {
                let answer = app.call_as(key, &method, &path.replace(['{', '}'], ""), None)?;
                assert_eq!(answer.status, expected, "{method} {path}");
                assert!(answer.request_id.is_some(), "{method} {path} has no x-request-id");
            }
            seen += 1;
        }
    }
    assert!(seen >= 14, "only {seen} operations");
    Ok(())
}

#[test]
fn what_belongs_to_another_project_is_not_found() -> Result<()> {
    let app = TestApp::start()?;
    let file = app.uploaded(ROW.as_bytes())?;
    let (_, stranger) = app.project_key("stranger")?;
    for (method, path) in [("GET", ""), ("GET", "/content"), ("DELETE", "")] {
        let answer = app.call_as(Some(&stranger), method, &format!("/v1/files/{file}{path}"), None)?;
        assert_eq!((answer.status, answer.error()), (404, ("not_found", "file_id")), "{method} {path}");
    }
    let body = format!(r#"{{"model":"m","training_file":"{file}"}}"#);
    let answer = app.call_as(Some(&stranger), "POST", "/v1/fine_tuning/jobs", Some(&body))?;
    assert_eq!((answer.status, answer.error()), (404, ("not_found", "training_file")));
    let list = app.call_as(Some(&stranger), "GET", "/v1/files", None)?;
    assert_eq!(list.body["data"].as_array().map(Vec::len), Some(0));
    assert_eq!(app.call("GET", &format!("/v1/files/{file}"), None)?.status, 200);
    Ok(())
}
