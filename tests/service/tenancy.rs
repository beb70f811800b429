//! Organisations, quotas, turns between projects, and the log of what was changed.

use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_store::jobs::Dataset;
use holdfast_store::queue::{Checked, Work};
use holdfast_tests::{Answer, MODEL, ROW, TestApp};
use serde_json::{Value, json};

const LEASE: Duration = Duration::from_secs(60);

fn as_admin(app: &TestApp, method: &str, path: &str, body: &Value) -> Result<Answer> {
    let text = (!body.is_null()).then(|| body.to_string());
    app.call_as(Some(&app.admin_key()?), method, path, text.as_deref())
}

fn own_project(app: &TestApp) -> Result<String> {
    Ok(app.project_key("default")?.0.to_string())
}

/// What a check finds of the row that these jobs train on.
fn checked() -> Checked {
    let dataset = Dataset { rows: 1, tokens: 8, supervised_tokens: 2 };
    Checked { summary: "fine".into(), warnings: Vec::new(), dataset }
}

fn limit(app: &TestApp, quotas: &Value) -> Result<()> {
    let path = format!("/admin/projects/{}/quotas", own_project(app)?);
    let answer = as_admin(app, "PUT", &path, quotas)?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    Ok(())
}

#[test]
fn an_organisation_s_members_get_keys_that_end_with_them() -> Result<()> {
    let app = TestApp::start()?;
    let made = |path: &str, body: Value| -> Result<String> {
        let answer = as_admin(&app, "POST", path, &body)?;
        assert_eq!(answer.status, 200, "{}", answer.body);
        Ok(answer.body["id"].as_str().context("no id")?.to_owned())
    };
    made("/admin/organizations", json!({"name": "acme"}))?;
    let taken = as_admin(&app, "POST", "/admin/organizations", &json!({"name": "acme"}))?;
    assert_eq!((taken.status, taken.error()), (400, ("name_taken", "name")));
    let project = made("/admin/projects", json!({"organization": "acme", "name": "default"}))?;
    let member = made("/admin/organizations/acme/members", json!({"name": "jo@example.com"}))?;
    let key = as_admin(&app, "POST", "/admin/keys", &json!({"project": project, "member": member, "scopes": ["read"]}))?;
    let secret = key.body["key"].as_str().context("no key")?;
    assert_eq!(key.body["scopes"], json!(["read"]));
    assert_eq!(app.call_as(Some(secret), "GET", "/v1/files", None)?.status, 200);
    assert_eq!(as_admin(&app, "DELETE", &format!("/admin/members/{member}"), &Value::Null)?.status, 200);
    assert_eq!(app.call_as(Some(secret), "GET", "/v1/files", None)?.status, 401);
    Ok(())
}

#[test]
fn a_project_stores_no_more_than_it_may_and_is_told_not_to_try_again() -> Result<()> {
    let app = TestApp::start()?;
    app.uploaded(ROW.as_bytes())?;
    limit(&app, &json!({"max_stored_bytes": 2 * ROW.len() + 10}))?;
    app.uploaded(ROW.as_bytes())?;
    let refused = app.upload(ROW.as_bytes())?;
    assert_eq!((refused.status, refused.error().0), (429, "insufficient_quota"));
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    assert_eq!(app.object_count("projects"), 2, "what was refused leaves nothing");
    let upload = json!({"filename": "a", "purpose": "fine-tune", "bytes": 1000, "mime_type": "text/plain"});
    assert_eq!(app.call("POST", "/v1/uploads", Some(&upload.to_string()))?.error().0, "insufficient_quota");
    let shown = as_admin(&app, "GET", &format!("/admin/projects/{}", own_project(&app)?), &Value::Null)?;
    assert_eq!(shown.body["usage"]["stored_bytes"], json!(2 * ROW.len()));
    Ok(())
}

#[test]
fn a_project_s_waiting_jobs_and_its_month_s_tokens_are_bounded() -> Result<()> {
    let app = TestApp::with_model()?;
    limit(&app, &json!({"max_queued_jobs": 1}))?;
    let job = app.create_job(ROW, &json!({}))?;
    let body = json!({"model": MODEL, "training_file": app.uploaded(ROW.as_bytes())?}).to_string();
    let refused = app.call("POST", "/v1/fine_tuning/jobs", Some(&body))?;
    assert_eq!((refused.status, refused.error().0), (429, "insufficient_quota"));
    limit(&app, &json!({"max_trained_tokens_per_month": 10}))?;
    assert!(app.step_worker()?, "the check, which counts the tokens");
    let job = app.job(&job)?;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("insufficient_quota")));
    Ok(())
}

#[test]
fn workers_take_turns_between_projects_and_hold_to_their_quotas() -> Result<()> {
    let app = TestApp::with_model()?;
    let ((_, own), (_, other)) = (app.project_key("default")?, app.project_key("other")?);
    let mine: Vec<String> = (0..3).map(|_| app.create_job(ROW, &json!({}))).collect::<Result<_>>()?;
    let app = app.with_key(other);
    let theirs = app.create_job(ROW, &json!({}))?;
    let app = app.with_key(own);
    limit(&app, &json!({"max_running_jobs": 2}))?;
    let claimed = app.runtime.block_on(async {
        let mut claimed = Vec::new();
        while let Some(claim) = app.store.claim("test", LEASE).await? {
            match claim.work {
                Work::Check => app.store.accept_files(claim.job.id, claim.attempt, &checked()).await?,
                Work::Train => claimed.push(claim.job.id.to_string()),
            }
        }
        anyhow::Ok(claimed)
    })?;
    assert_eq!(claimed, [theirs, mine[0].clone(), mine[1].clone()], "the other project does not wait behind three of this one");
    let waiting = app.job(&mine[2])?;
    assert_eq!(waiting["waiting_reason"], "no worker was heard of in the last minute; the operator must start one");
    app.runtime.block_on(app.store.worker_is_here("w", "cpu", "0", true))?;
    assert_eq!(app.job(&mine[2])?["waiting_reason"], "2 jobs of this project train, and its quota allows 2");
    Ok(())
}

#[test]
fn every_change_stands_in_the_audit_log_with_who_what_where_and_outcome() -> Result<()> {
    let app = TestApp::start()?;
    let file = app.uploaded(ROW.as_bytes())?;
    app.call("DELETE", &format!("/v1/files/{file}"), None)?;
    app.call("DELETE", &format!("/v1/files/{file}"), None)?;
    let entries = |filter: &str| -> Result<Vec<Value>> {
        let page = as_admin(&app, "GET", &format!("/admin/audit_log{filter}"), &Value::Null)?;
        assert_eq!(page.status, 200, "{}", page.body);
        Ok(page.body["data"].as_array().cloned().unwrap_or_default())
    };
    let all = entries("")?;
    let seen: Vec<(&str, u64)> =
        all.iter().map(|e| (e["operation"].as_str().unwrap_or_default(), e["status"].as_u64().unwrap_or_default())).collect();
    assert_eq!(seen, [("delete_file", 404), ("delete_file", 200), ("create_file", 200)]);
    assert_eq!(all[2]["target"], format!("/v1/files/{file}"), "what was made is named");
    assert_eq!((&all[0]["code"], &all[0]["address"]), (&json!("not_found"), &json!("127.0.0.1")));
    assert!(all.iter().all(|entry| entry["actor"].as_str().is_some_and(|actor| app.key.starts_with(actor))));
    assert_eq!(entries("?succeeded=false")?.len(), 1);
    assert_eq!(entries("?operation=create_file")?.len(), 1);
    assert_eq!(entries(&format!("?project={}", own_project(&app)?))?.len(), 3);
    assert_eq!(entries("?until=1")?.len(), 0);
    for change in ["delete from audit_log", "update audit_log set actor = 'nobody'", "truncate audit_log"] {
        assert!(app.sql(change).is_err(), "{change}");
    }
    Ok(())
}

#[test]
fn what_an_operator_does_to_a_project_is_found_by_that_project() -> Result<()> {
    let app = TestApp::start()?;
    let admin = app.admin_key()?;
    let (project, _) = app.project_key("reviews")?;
    let quotas = json!({"max_running_jobs": 1}).to_string();
    assert_eq!(app.call_as(Some(&admin), "PUT", &format!("/admin/projects/{project}/quotas"), Some(&quotas))?.status, 200);
    let key = json!({"project": project}).to_string();
    assert_eq!(app.call_as(Some(&admin), "POST", "/admin/keys", Some(&key))?.status, 200);
    let found = app.call_as(Some(&admin), "GET", &format!("/admin/audit_log?project={project}"), None)?;
    let operations: Vec<_> = found.body["data"].as_array().into_iter().flatten().map(|e| e["operation"].clone()).collect();
    assert_eq!(operations, ["create_api_key", "set_project_quotas"]);
    assert_eq!(found.body["data"][0]["acted_on"], json!(project));
    Ok(())
}

#[test]
fn an_operator_s_request_that_comes_twice_makes_one_thing() -> Result<()> {
    let app = TestApp::start()?;
    let admin = app.admin_key()?;
    let app = app.with_key(admin);
    let send = |path: &str, body: &Value| app.call_with(&[("idempotency-key", "once")], "POST", path, Some(&body.to_string()));
    for (path, body) in [
        ("/admin/organizations", json!({"name": "acme"})),
        ("/admin/organizations/acme/members", json!({"name": "jo"})),
        ("/admin/projects", json!({"organization": "acme", "name": "reviews"})),
    ] {
        let (first, again) = (send(path, &body)?, send(path, &body)?);
        assert_eq!((first.status, again.status, &first.body), (200, 200, &again.body), "{path}");
    }
    let key = json!({"scopes": ["admin"]});
    let (first, again) = (send("/admin/keys", &key)?, send("/admin/keys", &key)?);
    assert_eq!((first.status, again.status, again.error().0), (200, 400, "already_made"));
    assert!(again.body.to_string().contains(first.body["id"].as_str().context("no id")?), "the key that was made is named");
    let made = first.body["key"].as_str().context("no key")?;
    assert_eq!(app.call_as(Some(made), "POST", "/admin/organizations", Some(r#"{"name":"b"}"#))?.status, 200, "admin writes");
    Ok(())
}
