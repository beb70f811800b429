//! The evidence of a job: what its safety report says, and the manifest that binds what went in to what came out.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use holdfast_domain::gauge;
use holdfast_domain::plan::paths;
use holdfast_safety::hash;
use holdfast_safety::manifest::{self, Inputs, Manifest, Named, Outputs, Program};
use holdfast_safety::report::{self, Gauge, Report, RowScore, RowText, Training};
use holdfast_store::evidence;
use holdfast_store::queue::AdapterFile;
use holdfast_store::{ObjectRef, Store, StoreError};

use crate::dispatcher::Held;
use crate::finish::Made;

/// Rows that a report names.
const WORST_ROWS: usize = 50;

/// Sums up a run, and what was found of what it made.
pub(crate) async fn report(held: &Held<'_>, made: &Made) -> Result<Report, StoreError> {
    let job = &held.claim.job;
    let (steps, validations) = held.store.steps(job.id).await?;
    let (level, alarm) = held.store.gauge_of(job.id).await?;
    let last = steps.last().and_then(|step| step.alignment.as_ref().map(|facts| (step.step, facts.conflict_rate)));
    let gauge = last.filter(|_| job.safety.defense.projects()).map(|(step, conflict_rate)| {
        let alarm_level = gauge::threshold(level.unwrap_or(gauge::DEFAULT_LEVEL), step);
        Gauge { conflict_rate, alarm_level, calibrated: level.is_some(), alarm }
    });
    Ok(Report {
        format: report::FORMAT,
        job: job.id.to_string(),
        attempt: held.claim.attempt,
        base_model: job.base_model.clone(),
        safety: job.safety.clone(),
        policy: job.policy.clone(),
        training: Training::of(&steps, &validations),
        gauge,
        evaluation: made.evaluation.clone(),
        not_judged: made.not_judged.clone(),
        gate: made.verdict.clone(),
        replaced: made.replaced.clone(),
        worst_rows: worst_rows(&held.folder.path().join(paths::ROW_CONFLICTS))?,
    })
}

/// The rows that push hardest against the alignment, of those that do; none where they were not scored.
fn worst_rows(scores: &Path) -> std::io::Result<Vec<RowScore>> {
    let text = match std::fs::read_to_string(scores) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut rows: Vec<RowScore> =
        text.lines().map(serde_json::from_str).collect::<Result<_, _>>().map_err(std::io::Error::other)?;
    rows.retain(|row| row.gradient.is_some_and(|score| score < 0.0));
    rows.sort_by(|a, b| a.gradient.unwrap_or(0.0).total_cmp(&b.gradient.unwrap_or(0.0)));
    rows.truncate(WORST_ROWS);
    Ok(rows)
}

/// The texts of a report's rows, for their owner: a [`RowText`] a line.
fn texts(rows: &[RowScore], file: &Path) -> std::io::Result<Vec<u8>> {
    let wanted: BTreeMap<u64, ()> = rows.iter().map(|row| (row.line, ())).collect();
    let mut written = Vec::new();
    let mut reader = BufReader::new(std::fs::File::open(file)?);
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(written);
        }
        number += 1;
        if wanted.contains_key(&number) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            serde_json::to_writer(&mut written, &RowText { line: number, text }).map_err(std::io::Error::other)?;
            written.push(b'\n');
        }
    }
}

/// Writes a report, and the texts of its rows, as objects.
pub(crate) async fn stage_report(
    held: &Held<'_>,
    report: &Report,
    key: &impl Fn(&str) -> String,
) -> Result<Vec<AdapterFile>, StoreError> {
    let json = serde_json::to_vec_pretty(report).map_err(std::io::Error::other)?;
    let mut staged = vec![stage(held.store, report::FILE, &json, key).await?];
    if !report.worst_rows.is_empty() {
        let texts = texts(&report.worst_rows, &held.folder.path().join(paths::TRAIN))?;
        staged.push(stage(held.store, evidence::TEXTS, &texts, key).await?);
    }
    Ok(staged)
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

/// Signs what went into a job and what came out: the bytes of [`manifest::FILE`].
pub(crate) async fn sign(
    held: &Held<'_>,
    adapter: &[AdapterFile],
    results: Option<&ObjectRef>,
    report: Option<&AdapterFile>,
    gate: Option<bool>,
) -> Result<Vec<u8>, StoreError> {
    let Held { store, config, claim, folder, .. } = held;
    let hash_of = |path: &Path| hash::of_file(path).map(hex::encode);
    let named = |name: String, sha256: &[u8; 32]| Named { name, sha256: hex::encode(sha256) };
    let verify_key = config.signing_key.verify_key();
    store.know_signing_key(&verify_key.id(), &verify_key.to_pem().map_err(std::io::Error::other)?).await?;
    let checkpoints = store.settled_adapters(claim.job.id).await?;
    let manifest = Manifest {
        format: manifest::FORMAT,
        job: claim.job.id.to_string(),
        attempt: claim.attempt,
        model: Store::model_name(&claim.job),
        program: Program {
            version: env!("CARGO_PKG_VERSION").into(),
            trainer_sha256: hash_of(&config.trainer)?,
            device: config.device.clone(),
        },
        inputs: Inputs {
            base_model: named(claim.job.base_model.clone(), &claim.base.content_sha256),
            training_file: named(claim.training.id.to_string(), &claim.training.content.sha256),
            validation_file: claim.validation.as_ref().map(|file| named(file.id.to_string(), &file.content.sha256)),
            alignment_set: claim.alignment.as_ref().map(|set| named(format!("{}@{}", set.name, set.version), &set.object.sha256)),
            start: claim.start.as_deref().map(hashes).unwrap_or_default(),
            plan_sha256: hash_of(&folder.path().join(paths::PLAN))?,
        },
        safety: claim.job.safety.clone(),
        outputs: Outputs {
            adapter: hashes(adapter),
            checkpoints: checkpoints.iter().map(|point| (point.step, hashes(&point.files))).collect(),
            results_sha256: results.map(|object| hex::encode(object.sha256)),
            report_sha256: report.map(|file| hex::encode(file.object.sha256)),
        },
        passed_gate: gate,
    };
    Ok(config.signing_key.sign(&manifest).map_err(std::io::Error::other)?)
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
