//! The second wall between tenants: what a connection that serves one project sees, whatever its queries say.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use holdfast_tests::{ROW, TestApp};

/// Tables that belong to nobody, or to the operator; a tenant's connection may not write them, or sees them whole.
const SHARED: [&str; 19] = [
    "_sqlx_migrations",
    "alignment_references",
    "alignment_sets",
    "api_keys",
    "audit_log",
    "base_answers",
    "base_model_files",
    "base_models",
    "clean_conflicts",
    "conflict_levels",
    "members",
    "organizations",
    "quarantined_files",
    "safety_policies",
    "schema_compatibility",
    "signing_keys",
    "suites",
    "training_speeds",
    "workers",
];

#[test]
fn every_table_is_walled_or_named_as_shared() -> Result<()> {
    let app = TestApp::start()?;
    let open = app.sql("select relname from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace and not relrowsecurity order by 1")?;
    assert_eq!(open.lines().collect::<Vec<_>>(), SHARED, "a new table needs a policy, or a place in this list");
    let writable = "select table_name from information_schema.role_table_grants
                    where grantee = 'holdfast_tenant' and privilege_type <> 'SELECT' and table_name in
                          ('alignment_sets', 'api_keys', 'audit_log', 'base_answers', 'base_models', 'clean_conflicts', 'conflict_levels', 'members', 'organizations',
                           'quarantined_adapters', 'quarantined_files', 'safety_policies', 'signing_keys', 'suites', 'workers')";
    assert_eq!(app.sql(writable)?, "");
    Ok(())
}

#[test]
fn a_query_that_forgets_the_project_finds_one_project_s_rows_all_the_same() -> Result<()> {
    let app = TestApp::start()?;
    app.uploaded(ROW.as_bytes())?;
    let (stranger, key) = app.project_key("stranger")?;
    let as_project = |project: &str, query: &str| {
        app.sql(&format!("set role holdfast_tenant; select set_config('holdfast.project', '{project}', false); {query}"))
    };
    let mine = app.sql("select id from projects where name = 'default'")?;
    let count = |project: &str| -> Result<String> {
        let said = as_project(project, "select count(*) from files")?;
        Ok(said.lines().last().context("no answer")?.to_owned())
    };
    assert_eq!(count(&mine)?, "1");
    assert_eq!(count(&stranger.0.to_string())?, "0");
    for table in ["made_requests", "staged_objects"] {
        let seen = as_project(&stranger.0.to_string(), &format!("select count(*) from {table}"))?;
        assert_eq!(seen.lines().last(), Some("0"), "{table}");
    }
    let unset = app.sql("set role holdfast_tenant; select count(*) from files")?;
    assert_eq!(unset, "0", "a connection that says no project sees none");
    let stolen = as_project(&stranger.0.to_string(), "update files set filename = 'stolen'; delete from files");
    stolen?;
    assert_eq!(app.sql("select filename from files")?, "train.jsonl");
    let planted = "insert into webhooks (id, project_id, url, secret, types)
                   select gen_random_uuid(), '{mine}', 'http://x', '', array['a']"
        .replace("{mine}", &mine);
    assert!(as_project(&stranger.0.to_string(), &planted).is_err(), "a row could be planted in another project");
    assert_eq!(app.call_as(Some(&key), "GET", "/v1/files", None)?.body["data"].as_array().map(Vec::len), Some(0));
    Ok(())
}

/// Names the functions of the store that serve a tenant and still use the operator's connections, each with the reason.
const PAST_THE_WALL: [(&str, &str); 4] = [
    ("file_of_job", "a worker reads what its job needs"),
    ("waiting", "counts the jobs of all projects"),
    ("project", "the operator reads projects; a tenant's room is asked for by its own id"),
    ("set_quotas", "the operator's"),
];

fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(sources(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

#[test]
fn what_serves_a_tenant_takes_a_tenant_s_connection() -> Result<()> {
    let store = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/store/src");
    let mut past = Vec::new();
    for path in sources(&store)? {
        let source = std::fs::read_to_string(path)?;
        for function in source.split("    pub async fn ").skip(1).chain(source.split("    pub(crate) async fn ").skip(1)) {
            let name = function.split(['(', '<']).next().unwrap_or_default();
            let end = function.find("\n    }\n").unwrap_or(function.len());
            let (body, _) = function.split_at(end);
            let serves_a_tenant =
                body.split('{').next().is_some_and(|head| head.contains("project: ProjectId") || head.contains("id: ProjectId"));
            if serves_a_tenant && body.contains("self.pool") && !PAST_THE_WALL.iter().any(|(known, _)| *known == name) {
                past.push(name.to_owned());
            }
        }
    }
    assert_eq!(past, Vec::<String>::new(), "these take a project and leave the wall aside");
    Ok(())
}
