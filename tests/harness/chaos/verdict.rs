//! What must hold after everything went wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::faults::Kind;
use super::steps::{Standstill, Steps};
use super::{Job, Wish, checkpoint_interval};
use crate::{LEASE, World, stored_as};

/// What came of a run.
#[derive(Debug)]
pub struct Report {
    /// Faults, by what they were.
    faults: BTreeMap<Kind, usize>,
    /// Jobs, by how they ended.
    jobs: BTreeMap<String, usize>,
    /// Attempts that were needed for them.
    pub attempts: usize,
    /// The most steps that one attempt took again of the one before it, in checkpoint intervals.
    pub steps_again: f64,
    /// The same where the store, the database or the worker itself stood still while a checkpoint was due, so that it could not
    /// be kept.
    pub steps_again_held_up: f64,
    /// The longest that a lost worker's job waited until it was free again.
    pub recovery_seconds: f64,
}

impl Report {
    /// How often something was struck.
    #[must_use]
    pub fn faults(&self) -> usize {
        self.faults.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "faults: {:?}", self.faults)?;
        writeln!(f, "jobs: {:?} in {} attempts", self.jobs, self.attempts)?;
        writeln!(
            f,
            "steps taken again: {:.2} checkpoint intervals at most, {:.2} where a checkpoint was held up; a lost job was free after {:.1} s at most, with a lease of {} s",
            self.steps_again,
            self.steps_again_held_up,
            self.recovery_seconds,
            LEASE.as_secs()
        )
    }
}

/// What was written down while faults struck, in seconds since 1970.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Claims that were lost with their worker, as SQL writes them: job, attempt, when.
    pub(super) losses: Vec<String>,
    /// When no checkpoint could be kept.
    pub(super) standstills: Vec<Standstill>,
    /// What was trained.
    pub(super) steps: Option<Steps>,
}

pub(super) fn judge(
    world: &World,
    jobs: &[Job],
    ended: &BTreeMap<String, String>,
    uploads: &[(String, String)],
    seen: &Seen,
    faults: BTreeMap<Kind, usize>,
) -> Result<Report> {
    let mut by_end = BTreeMap::new();
    for job in jobs {
        let status = ended.get(&job.id).context("a job is gone")?;
        *by_end.entry(status.clone()).or_insert(0) += 1;
        let as_asked = match (job.wish, job.asked) {
            (Wish::Cancel(_), 1..) => status == "cancelled",
            _ => status == "succeeded",
        };
        if !as_asked {
            let shown = world.call("GET", &format!("/v1/fine_tuning/jobs/{}", job.id), None, "")?;
            anyhow::bail!("{} was asked for {:?} and {status}: {} {}", job.id, job.wish, shown["error"], shown["attempts"]);
        }
    }
    ensure!(ended.len() == jobs.len(), "{} jobs were asked for and {} are there", jobs.len(), ended.len());
    published_once(world, by_end.get("succeeded").copied().unwrap_or(0))?;
    same_adapters(world, jobs, ended)?;
    uploads_are_whole(world, uploads)?;
    // A worker whose job was cancelled a moment ago may still be writing what the sweep is to find.
    let since = Instant::now();
    while world.workers.iter().any(|worker| worker.jobs().read_dir().is_ok_and(|mut jobs| jobs.next().is_some())) {
        ensure!(since.elapsed() < crate::PATIENCE, "a worker does not let go");
        std::thread::sleep(Duration::from_millis(50));
    }
    no_orphans(world)?;
    let kinds: BTreeMap<&str, usize> = jobs.iter().map(|job| (job.id.as_str(), job.kind)).collect();
    let steps = seen.steps.as_ref().context("nobody watched the steps")?;
    let again = steps.again(&seen.standstills, |job| checkpoint_interval(*kinds.get(job)?));
    Ok(Report {
        faults,
        jobs: by_end,
        attempts: number(world, "select count(*) from job_attempts")?,
        steps_again: again.most,
        steps_again_held_up: again.held_up,
        recovery_seconds: recovery(world, &seen.losses)?,
    })
}

fn number<Number: FromStr>(world: &World, query: &str) -> Result<Number> {
    let rows = world.sql(query)?;
    let first = rows.first().context("no answer")?;
    first.parse().map_err(|_| anyhow::anyhow!("{first} is no number"))
}

fn published_once(world: &World, succeeded: usize) -> Result<()> {
    let models = number::<usize>(world, "select count(*) from fine_tuned_models")?;
    ensure!(models == succeeded, "{succeeded} jobs succeeded and {models} models are there");
    let twice = world.sql("select job_id from job_attempts where outcome = 'succeeded' group by job_id having count(*) > 1")?;
    ensure!(twice.is_empty(), "published twice: {twice:?}");
    let open = world.sql("select job_id from job_attempts where ended_at is null")?;
    ensure!(open.is_empty(), "attempts that never ended: {open:?}");
    Ok(())
}

/// Jobs of a kind end with the same bytes, those of the calm run among them.
fn same_adapters(world: &World, jobs: &[Job], ended: &BTreeMap<String, String>) -> Result<()> {
    let rows = world.sql(
        "select 'ftjob-' || replace(job_id::text, '-', ''), encode(sha256, 'hex') from adapter_files where name = 'adapter_model.safetensors'",
    )?;
    let hashes: BTreeMap<&str, &str> = rows.iter().filter_map(|row| row.split_once('|')).collect();
    let mut calm = BTreeMap::new();
    for job in jobs.iter().filter(|job| ended.get(&job.id).is_some_and(|status| status == "succeeded")) {
        let hash = hashes.get(job.id.as_str()).with_context(|| format!("{} has no adapter", job.id))?;
        let first = calm.entry(job.kind).or_insert(hash);
        ensure!(first == &hash, "{} ended with another adapter than the calm run of its kind", job.id);
    }
    Ok(())
}

fn uploads_are_whole(world: &World, uploads: &[(String, String)]) -> Result<()> {
    let ids: BTreeSet<&String> = uploads.iter().map(|(id, _)| id).collect();
    ensure!(ids.len() == uploads.len(), "two uploads became one file");
    for (id, content) in uploads {
        let file: Value = world.call("GET", &format!("/v1/files/{id}"), None, "")?;
        ensure!(file["bytes"] == content.len(), "{id} has {} bytes of {}", file["bytes"], content.len());
    }
    Ok(())
}

/// What the store holds is what rows name.
fn no_orphans(world: &World) -> Result<()> {
    world.sweep()?;
    let staged = world.sql("select key from staged_objects")?;
    ensure!(staged.is_empty(), "staged and neither claimed nor swept: {staged:?}");
    let keys = world.sql(
        "select unnest(object_keys) from files union all select object_key from upload_parts
         union all select object_key from adapter_files union all select object_key from job_evidence
         union all select object_key from quarantined_files union all select object_key from base_answers union all select object_key from checkpoint_files
         union all select object_key from base_model_files union all select object_key from alignment_sets
         union all select object_key from suites
         union all select object_key from alignment_references",
    )?;
    let mark = holdfast_store::MARK.to_owned();
    let named: BTreeSet<String> = keys.iter().chain([&mark]).map(|key| stored_as(&format!("a/prefix/{key}"))).collect();
    let stored: BTreeSet<String> = world.s3.stored()?.into_iter().collect();
    let orphans: Vec<_> = stored.difference(&named).collect();
    ensure!(orphans.is_empty(), "objects that no row names: {orphans:?}");
    let missing: Vec<_> = named.difference(&stored).collect();
    ensure!(missing.is_empty(), "rows name objects that are not there: {missing:?}");
    ensure!(world.s3.parts_of_unfinished_objects()? == 0, "parts of unfinished objects are left");
    Ok(())
}

/// The longest that a job whose worker was lost waited until it was free again.
fn recovery(world: &World, losses: &[String]) -> Result<f64> {
    if losses.is_empty() {
        return Ok(0.0);
    }
    number(
        world,
        &format!(
            "select coalesce(max(extract(epoch from a.ended_at) - l.at), 0) from (values {}) l (job, attempt, at)
             join job_attempts a on a.job_id = l.job and a.attempt = l.attempt where a.outcome = 'set_back'",
            losses.join(", ")
        ),
    )
}
