//! Who may do what.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_store::PageRequest;
use holdfast_store::keys::NewKey;
use holdfast_tests::{ROW, TestApp};
use serde_json::Value;

/// What an operation of the contract answers to each kind of key, when its path names things that another project has.
struct Rule {
    operation: &'static str,
    /// To a key of another project.
    stranger: u16,
    /// To a key of the project that only reads.
    reader: u16,
}

/// Whether the operation asks for a key at all, and what it answers to one of another tenant and to one that only reads. An
/// operation without a row fails the test.
const RULES: [Rule; 75] = [
    rule("create_file", 400, 403),
    rule("list_files", 200, 200),
    rule("get_file", 404, 200),
    rule("delete_file", 404, 403),
    rule("get_file_content", 404, 200),
    rule("preview_file", 404, 404),
    rule("create_upload", 400, 403),
    rule("add_upload_part", 404, 403),
    rule("complete_upload", 400, 403),
    rule("cancel_upload", 404, 403),
    rule("create_fine_tuning_job", 400, 403),
    rule("estimate_fine_tuning_job", 400, 400),
    rule("list_fine_tuning_jobs", 200, 200),
    rule("get_fine_tuning_job", 404, 200),
    rule("cancel_fine_tuning_job", 404, 403),
    rule("pause_fine_tuning_job", 404, 403),
    rule("resume_fine_tuning_job", 404, 403),
    rule("list_fine_tuning_events", 404, 200),
    rule("list_fine_tuning_checkpoints", 404, 200),
    rule("get_adapter", 404, 400),
    rule("get_adapter_file", 404, 400),
    rule("get_checkpoint_adapter", 404, 404),
    rule("get_checkpoint_adapter_file", 404, 404),
    rule("get_safety_report", 404, 400),
    rule("get_manifest", 404, 400),
    rule("list_signing_keys", 200, 200),
    rule("get_safety_policy", 200, 200),
    rule("list_models", 200, 200),
    rule("get_model", 404, 404),
    rule("delete_model", 404, 403),
    rule("create_webhook_endpoint", 400, 403),
    rule("list_webhook_endpoints", 200, 200),
    rule("get_webhook_endpoint", 404, 200),
    rule("update_webhook_endpoint", 404, 403),
    rule("delete_webhook_endpoint", 404, 403),
    rule("list_webhook_event_types", 200, 200),
    rule("rotate_webhook_secret", 404, 403),
    rule("test_webhook_endpoint", 400, 403),
    rule("list_webhook_deliveries", 404, 200),
    rule("replay_webhook_delivery", 404, 403),
    admins("list_organizations"),
    admins("create_organization"),
    admins("list_members"),
    admins("create_member"),
    admins("delete_member"),
    admins("list_projects"),
    admins("create_project"),
    admins("get_project"),
    admins("set_project_quotas"),
    admins("list_api_keys"),
    admins("create_api_key"),
    admins("revoke_api_key"),
    admins("list_base_models"),
    admins("list_alignment_sets"),
    admins("create_alignment_set"),
    admins("list_suites"),
    admins("create_suite"),
    admins("get_deployment_safety_policy"),
    admins("set_deployment_safety_policy"),
    admins("delete_deployment_safety_policy"),
    admins("get_organization_safety_policy"),
    admins("set_organization_safety_policy"),
    admins("delete_organization_safety_policy"),
    admins("get_project_safety_policy"),
    admins("set_project_safety_policy"),
    admins("delete_project_safety_policy"),
    admins("list_quarantined_adapters"),
    admins("get_quarantined_safety_report"),
    admins("release_quarantined_adapter"),
    admins("discard_quarantined_adapter"),
    admins("list_conflict_levels"),
    admins("measure_conflict_level"),
    admins("list_workers"),
    admins("list_audit_entries"),
    admins("get_metrics"),
];

/// Operations that need no key.
const OPEN: [&str; 2] = ["get_health", "get_readiness"];

const fn rule(operation: &'static str, stranger: u16, reader: u16) -> Rule {
    Rule { operation, stranger, reader }
}

/// One that only operators' keys may call.
const fn admins(operation: &'static str) -> Rule {
    rule(operation, 403, 403)
}

/// Every operation of the contract: its id, method, and path with its parameters filled in from `ids`.
fn operations(ids: &[(&str, String)]) -> Result<Vec<(String, String, String)>> {
    let contract = serde_json::to_value(holdfast_api::openapi())?;
    let mut found = Vec::new();
    for (path, methods) in contract["paths"].as_object().context("no paths")? {
        let mut filled = path.clone();
        for (param, id) in ids {
            filled = filled.replace(&format!("{{{param}}}"), id);
        }
        // The preview cannot be asked for without a model.
        if filled.ends_with("/preview") {
            filled.push_str("?model=none");
        }
        ensure!(!filled.contains('{'), "{filled}: the test knows no id for a parameter");
        for (method, operation) in methods.as_object().context("no methods")? {
            let id = operation["operationId"].as_str().with_context(|| format!("{method} {path} has no operation id"))?;
            found.push((id.to_owned(), method.to_uppercase(), filled.clone()));
        }
    }
    Ok(found)
}

/// A project's things, one of each kind, by the names that paths give them.
fn things(app: &TestApp) -> Result<Vec<(&'static str, String)>> {
    let base = tempfile::tempdir()?;
    std::fs::write(base.path().join("config.json"), "{}")?;
    let facts = holdfast_store::base_models::BaseModelFacts { parameter_count: 1, context_length: 2048 };
    app.runtime.block_on(app.store.create_base_model("m", base.path(), facts))?;
    let file = app.uploaded(ROW.as_bytes())?;
    let body = format!(r#"{{"model":"m","training_file":"{file}"}}"#);
    let made = |path: &str, body: &str| -> Result<String> {
        let answer = app.call("POST", path, Some(body))?;
        ensure!(answer.status == 200, "{path}: {}", answer.body);
        Ok(answer.body["id"].as_str().context("no id")?.to_owned())
    };
    Ok(vec![
        ("file_id", file),
        ("fine_tuning_job_id", made("/v1/fine_tuning/jobs", &body)?),
        (
            "upload_id",
            made("/v1/uploads", r#"{"filename":"a.jsonl","purpose":"fine-tune","bytes":10,"mime_type":"application/jsonl"}"#)?,
        ),
        ("webhook_endpoint_id", made("/v1/webhook_endpoints", r#"{"url":"http://127.0.0.1:9/"}"#)?),
        ("notice_id", "evt_00000000000000000000000000000001".into()),
        ("model", "ft:m:holdfast::00000000000000000000000000000001".into()),
        ("file", "adapter_config.json".into()),
        ("step", "1".into()),
        ("organization", "holdfast".into()),
        ("member_id", "mem_00000000000000000000000000000001".into()),
        ("project_id", "proj_00000000000000000000000000000001".into()),
        ("key_id", "key_00000000000000000000000000000001".into()),
    ])
}

#[test]
fn every_operation_answers_each_kind_of_key_as_the_table_says() -> Result<()> {
    let app = TestApp::start()?;
    let (project, _) = app.project_key("default")?;
    let revoked = app.make_key(&NewKey { project: Some(project), ..NewKey::default() })?;
    let last = PageRequest { after: None, limit: 1, ascending: false };
    let id = app.runtime.block_on(app.store.keys(None, last))?.items.first().context("no key")?.id;
    app.runtime.block_on(app.store.revoke_key(id))?;
    let expired =
        app.make_key(&NewKey { project: Some(project), lifetime: Some(Duration::from_millis(1)), ..NewKey::default() })?;
    let reader = app.make_key(&NewKey { project: Some(project), read_only: true, ..NewKey::default() })?;
    let (_, stranger) = app.project_key("stranger")?;
    let wrong = format!("hf-{}", "0".repeat(64));

    let mut seen = BTreeSet::new();
    for (operation, method, path) in operations(&things(&app)?)? {
        let call = |key: Option<&str>| app.call_as(key, &method, &path, (method != "GET" && method != "DELETE").then_some("{}"));
        seen.insert(operation.clone());
        if OPEN.contains(&operation.as_str()) {
            assert_eq!(call(None)?.status, 200, "{operation}");
            continue;
        }
        let rule = RULES.iter().find(|rule| rule.operation == operation);
        let rule = rule.with_context(|| format!("{operation} has no row in the table of this test"))?;
        for (who, key, code) in [
            ("without a key", None, "missing_api_key"),
            ("with a wrong key", Some(&wrong), "invalid_api_key"),
            ("with a revoked key", Some(&revoked), "invalid_api_key"),
            ("with an expired key", Some(&expired), "invalid_api_key"),
        ] {
            let answer = call(key.map(String::as_str))?;
            assert_eq!((answer.status, answer.error().0), (401, code), "{operation} {who}: {}", answer.body);
            assert!(answer.request_id.is_some(), "{operation} {who} has no x-request-id");
        }
        for (who, key, expected) in [("a stranger", &stranger, rule.stranger), ("a reader", &reader, rule.reader)] {
            let answer = call(Some(key))?;
            assert_eq!(answer.status, expected, "{operation} for {who}: {}", answer.body);
            if expected == 403 {
                assert_eq!(answer.error().0, "insufficient_scope", "{operation} for {who}");
            }
        }
    }
    let rows: BTreeSet<String> = RULES.iter().map(|rule| rule.operation.to_owned()).chain(OPEN.map(str::to_owned)).collect();
    assert_eq!(rows.difference(&seen).collect::<Vec<_>>(), Vec::<&String>::new(), "rows of operations that are gone");
    Ok(())
}

#[test]
fn a_reader_changes_nothing_and_a_stranger_sees_nothing() -> Result<()> {
    let app = TestApp::start()?;
    let ids = things(&app)?;
    let (_, stranger) = app.project_key("stranger")?;
    for list in ["/v1/files", "/v1/fine_tuning/jobs", "/v1/webhook_endpoints"] {
        let mine = app.call("GET", list, None)?;
        assert_eq!(mine.body["data"].as_array().map(Vec::len), Some(1), "{list}");
        let theirs = app.call_as(Some(&stranger), "GET", list, None)?;
        assert_eq!(theirs.body["data"].as_array().map(Vec::len), Some(0), "{list}");
    }
    let file = &ids.iter().find(|(name, _)| *name == "file_id").context("no file")?.1;
    let body = format!(r#"{{"model":"m","training_file":"{file}"}}"#);
    let answer = app.call_as(Some(&stranger), "POST", "/v1/fine_tuning/jobs", Some(&body))?;
    assert_eq!((answer.status, answer.error()), (404, ("not_found", "training_file")));
    Ok(())
}

#[test]
fn a_key_that_is_revoked_is_unknown_to_the_next_request() -> Result<()> {
    let app = TestApp::start()?;
    let admin = app.admin_key()?;
    let (project, _) = app.project_key("default")?;
    let body = serde_json::json!({"project": project, "name": "temporary"}).to_string();
    let made = app.call_as(Some(&admin), "POST", "/admin/keys", Some(&body))?;
    let (id, key) = (made.body["id"].as_str().context("no id")?, made.body["key"].as_str().context("no key")?);
    for _ in 0..3 {
        assert_eq!(app.call_as(Some(key), "GET", "/v1/files", None)?.status, 200);
    }
    assert_eq!(app.call_as(Some(&admin), "DELETE", &format!("/admin/keys/{id}"), None)?.status, 200);
    assert_eq!(app.call_as(Some(key), "GET", "/v1/files", None)?.status, 401);
    let listed = app.call_as(Some(&admin), "GET", &format!("/admin/keys?project={project}"), None)?;
    let row = listed.body["data"].as_array().into_iter().flatten().find(|row| row["id"] == id).context("not listed")?.clone();
    assert!(row["revoked_at"].is_u64() && row["last_used_at"].is_u64() && row["key"] == Value::Null, "{row}");
    Ok(())
}

#[test]
fn a_key_s_rate_is_its_own_and_the_wait_is_honest() -> Result<()> {
    let app = TestApp::start()?;
    let (project, _) = app.project_key("default")?;
    let slow = app.make_key(&NewKey { project: Some(project), requests_per_minute: Some(60), ..NewKey::default() })?;
    for _ in 0..60 {
        assert_eq!(app.call_as(Some(&slow), "GET", "/v1/models", None)?.status, 200);
    }
    let refused = loop {
        // Some of the bucket fills again while the requests run.
        let answer = app.call_as(Some(&slow), "GET", "/v1/models", None)?;
        if answer.status != 200 {
            break answer;
        }
    };
    assert_eq!((refused.status, refused.error().0), (429, "rate_limit_exceeded"));
    let wait: u64 = refused.header("retry-after-ms").context("no retry-after-ms")?.parse()?;
    assert!(wait <= 1000 && refused.header("retry-after").is_some(), "{wait} ms");
    assert_eq!(app.call("GET", "/v1/models", None)?.status, 200, "another key is not held up");
    std::thread::sleep(Duration::from_millis(wait));
    assert_eq!(app.call_as(Some(&slow), "GET", "/v1/models", None)?.status, 200, "who waits as told gets through");
    Ok(())
}
