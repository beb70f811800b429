//! The evidence of a job: what its safety report says, and the manifest that binds what went in to what came out.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::OnceLock;

use holdfast_domain::Frame;
use holdfast_domain::plan::paths;
use holdfast_domain::progress::Step;
use holdfast_safety::hash;
use holdfast_safety::manifest::{self, Inputs, Manifest, Named, Outputs, Program};
use holdfast_safety::report::{self, Gauge, Report, RowScore, RowText, Training};
use holdfast_store::evidence;
use holdfast_store::queue::{AdapterFile, Published};
use holdfast_store::{Store, StoreError};

use crate::WorkerConfig;
use crate::finish::Made;
use crate::results;
use crate::work::Run;

/// Rows that a report names.
const WORST_ROWS: usize = 50;

/// What computes and decides, by the hashes of its programs as they are now: an upgrade may put others in their place while a run lasts.
pub(crate) async fn program(config: &WorkerConfig) -> std::io::Result<Program> {
    static OWN: OnceLock<String> = OnceLock::new();
    let (trainer, device) = (config.trainer.clone(), config.device.clone());
    let read = move || {
        let trainer_sha256 = hash::of_file(&trainer).map(hex::encode).map_err(|error| {
            std::io::Error::new(error.kind(), format!("cannot read the trainer {}: {error}", trainer.display()))
        })?;
        let worker_sha256 = match OWN.get() {
            Some(known) => known.clone(),
            // What runs, also once another file bears its name.
            None => {
                let own = hash::of_file(Path::new("/proc/self/exe")).map(hex::encode)?;
                OWN.get_or_init(|| own).clone()
            }
        };
        let version = env!("CARGO_PKG_VERSION").into();
        Ok(Program { version, trainer_sha256, worker_sha256: Some(worker_sha256), device })
    };
    tokio::task::spawn_blocking(read).await.map_err(std::io::Error::other)?
}

/// What is kept of a run beside its adapter.
pub(crate) struct Evidence {
    report: Vec<u8>,
    /// The texts of the rows that the report names.
    texts: Vec<u8>,
    /// The figures of every step, as CSV.
    pub(crate) table: String,
    plan_sha256: String,
}

/// What the job folder says.
struct Files {
    worst_rows: Vec<RowScore>,
    texts: Vec<u8>,
    plan_sha256: String,
}

/// Puts together what a run and what was found of it come to.
pub(crate) async fn gather(run: &Run<'_>, made: &Made) -> Result<Evidence, StoreError> {
    let (steps, validations) = run.store.steps(run.claim.job.id).await?;
    let folder = run.folder.path().to_owned();
    // A tenant's file may be large, and the lease is renewed on this thread.
    let files = tokio::task::spawn_blocking(move || Files::read(&folder)).await.map_err(std::io::Error::other)??;
    let table = results::csv(&steps, &validations);
    let report = report(run, made, Training::of(&steps, &validations), steps.last(), files.worst_rows).await?;
    Ok(Evidence {
        report: serde_json::to_vec_pretty(&report).map_err(std::io::Error::other)?,
        texts: files.texts,
        table,
        plan_sha256: files.plan_sha256,
    })
}

impl Files {
    fn read(folder: &Path) -> std::io::Result<Self> {
        let worst_rows = worst_rows(&folder.join(paths::ROW_CONFLICTS))?;
        let texts = if worst_rows.is_empty() { Vec::new() } else { texts(&worst_rows, &folder.join(paths::TRAIN))? };
        Ok(Self { worst_rows, texts, plan_sha256: hex::encode(hash::of_file(&folder.join(paths::PLAN))?) })
    }
}

async fn report(
    run: &Run<'_>,
    made: &Made,
    training: Training,
    last: Option<&Step>,
    worst_rows: Vec<RowScore>,
) -> Result<Report, StoreError> {
    let job = &run.claim.job;
    let (clean, alarm) = run.store.gauge_of(job).await?;
    Ok(Report {
        format: report::FORMAT,
        job: job.id.to_string(),
        attempt: run.claim.attempt,
        base_model: job.base_model.clone(),
        safety: job.safety.clone(),
        alignment_set_version: job.alignment_set_version,
        frames: run.framed.frames.iter().map(Frame::shape).collect(),
        policy: job.policy.clone(),
        unfinished: None,
        training,
        gauge: Gauge::after(last, &job.safety, clean, alarm),
        evaluation: made.evaluation.clone(),
        not_judged: made.not_judged.clone(),
        gate: made.verdict.clone(),
        replaced: made.replaced.clone(),
        worst_rows,
    })
}

/// The rows that push hardest against the alignment, of those that do; none where they were not scored. A row that was seen only while the
/// scores by gradients did not count yet has one by the forward pass at most: those follow, as many again.
fn worst_rows(scores: &Path) -> std::io::Result<Vec<RowScore>> {
    let text = match std::fs::read_to_string(scores) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let rows: Vec<RowScore> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>().map_err(std::io::Error::other)?;
    let worst = |rows: Vec<RowScore>, score: fn(&RowScore) -> Option<f64>| {
        let mut scored: Vec<_> =
            rows.into_iter().filter_map(|row| Some((score(&row).filter(|score| *score < 0.0)?, row))).collect();
        scored.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        scored.truncate(WORST_ROWS);
        scored.into_iter().map(|(_, row)| row)
    };
    let (by_gradient, others): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row.gradient.is_some());
    Ok(worst(by_gradient, |row| row.gradient).chain(worst(others, |row| row.forward)).collect())
}

/// The texts of a report's rows, for their owner: a [`RowText`] a line.
fn texts(rows: &[RowScore], file: &Path) -> std::io::Result<Vec<u8>> {
    let wanted: BTreeSet<u64> = rows.iter().map(|row| row.line).collect();
    let mut written = Vec::new();
    let mut reader = BufReader::new(std::fs::File::open(file)?);
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(written);
        }
        number += 1;
        if wanted.contains(&number) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            serde_json::to_writer(&mut written, &RowText { line: number, text }).map_err(std::io::Error::other)?;
            written.push(b'\n');
        }
    }
}

/// Writes bytes as an object of that name.
pub(crate) async fn stage(
    store: &Store,
    name: &str,
    bytes: &[u8],
    key: &impl Fn(&str) -> String,
) -> Result<AdapterFile, StoreError> {
    Ok(AdapterFile { name: name.to_owned(), object: store.objects().stage_bytes(key(name), bytes).await? })
}

impl Evidence {
    /// Writes the report, and the texts of its rows where there are any, as objects.
    pub(crate) async fn stage_into(
        &self,
        store: &Store,
        key: &impl Fn(&str) -> String,
        staged: &mut Vec<AdapterFile>,
    ) -> Result<(), StoreError> {
        staged.push(stage(store, report::FILE, &self.report, key).await?);
        if !self.texts.is_empty() {
            staged.push(stage(store, evidence::TEXTS, &self.texts, key).await?);
        }
        Ok(())
    }

    /// Signs what went into a job and what came out, `staged`: the bytes of [`manifest::FILE`].
    pub(crate) async fn sign(&self, run: &Run<'_>, staged: &Published, passed_gate: Option<bool>) -> Result<Vec<u8>, StoreError> {
        let Run { store, config, claim, .. } = run;
        let named = |name: String, sha256: &[u8; 32]| Named { name, sha256: hex::encode(sha256) };
        let verify_key = config.signing_key.verify_key();
        store.know_signing_key(&verify_key.id(), &verify_key.to_pem().map_err(std::io::Error::other)?).await?;
        let checkpoints = store.settled_adapters(claim.job.id).await?;
        let report = staged.evidence.iter().find(|file| file.name == report::FILE);
        let manifest = Manifest {
            format: manifest::FORMAT,
            job: claim.job.id.to_string(),
            attempt: claim.attempt,
            model: claim.job.model_name(),
            earlier_programs: earlier_programs(run).await?,
            program: run.program.clone(),
            inputs: Inputs {
                base_model: named(claim.job.base_model.clone(), &claim.base.content_sha256),
                training_file: named(claim.training.id.to_string(), &claim.training.content.sha256),
                validation_file: claim.validation.as_ref().map(|file| named(file.id.to_string(), &file.content.sha256)),
                alignment_set: claim
                    .alignment
                    .as_ref()
                    .map(|set| named(format!("{}@{}", set.name, set.version), &set.object.sha256)),
                alignment_rows_sha256: run.framed.alignment_sha256.clone(),
                suites: claim.suites.iter().map(|suite| named(suite.pinned(), &suite.object.sha256)).collect(),
                start: claim.start.as_deref().map(hashes).unwrap_or_default(),
                plan_sha256: self.plan_sha256.clone(),
            },
            safety: claim.job.safety.clone(),
            outputs: Outputs {
                adapter: hashes(&staged.adapter),
                checkpoints: checkpoints.iter().map(|point| (point.step, hashes(&point.files))).collect(),
                results_sha256: staged.results.as_ref().map(|object| hex::encode(object.sha256)),
                report_sha256: report.map(|file| hex::encode(file.object.sha256)),
            },
            passed_gate,
        };
        Ok(config.signing_key.sign(&manifest).map_err(std::io::Error::other)?)
    }
}

/// What the attempts before this one were computed by, if not by the same, where it went on from a checkpoint of theirs.
async fn earlier_programs(run: &Run<'_>) -> Result<Vec<Program>, StoreError> {
    if run.claim.resume.is_empty() {
        return Ok(Vec::new());
    }
    let mut others = Vec::new();
    for known in run.store.programs_before(run.claim.job.id, run.claim.attempt).await? {
        let known: Program = serde_json::from_value(known).map_err(std::io::Error::other)?;
        if known != run.program && !others.contains(&known) {
            others.push(known);
        }
    }
    Ok(others)
}

/// The hash of each file by its name.
fn hashes(files: &[AdapterFile]) -> BTreeMap<String, String> {
    files.iter().map(|file| (file.name.clone(), hex::encode(file.object.sha256))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_rows_are_named_with_their_own_texts() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let (scores, file) = (folder.path().join("scores"), folder.path().join("rows"));
        assert_eq!(worst_rows(&scores)?, []);
        std::fs::write(
            &scores,
            "{\"line\":1,\"gradient\":0.5,\"forward\":null}\n{\"line\":2,\"gradient\":null}\n{\"line\":3,\"gradient\":-0.5}\n{\"line\":4,\"gradient\":-0.25}\n",
        )?;
        std::fs::write(&file, "one\ntwo\nthree\nfour")?;
        let rows = worst_rows(&scores)?;
        assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [3, 4]);
        let written = texts(&rows, &file)?;
        assert_eq!(String::from_utf8_lossy(&written), "{\"line\":3,\"text\":\"three\"}\n{\"line\":4,\"text\":\"four\"}\n");
        Ok(())
    }
}
