//! What becomes of a trained adapter: it is asked the suites, held to the gate, and published or kept apart.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use holdfast_domain::job::JobError;
use holdfast_domain::policy::{Otherwise, Policy};
use holdfast_safety::manifest;
use holdfast_safety::report::{self, Evaluation, Report, Verdict};
use holdfast_store::queue::{AdapterFile, Published};
use holdfast_store::{ObjectRef, Store, StoreError};

use crate::agent::{self, Outcome};
use crate::dispatcher::Held;
use crate::evaluation::{self, Asked};
use crate::{evidence, results};

/// How long it is tried to publish an adapter that is trained, while the store or the database is away; and the pauses between.
const PUBLISH_PATIENCE: Duration = Duration::from_secs(60 * 60);
const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(30);
/// Checkpoints that are asked at most where the last adapter does not pass.
const CANDIDATES: usize = 5;
/// Where their adapters are put, under the job folder.
const CANDIDATES_FOLDER: &str = "candidates";

/// How it ends.
pub(crate) enum Ending {
    /// As the store now says.
    Written(Result<(), StoreError>),
    /// Something came in between.
    Other(Outcome),
}

/// A trained adapter with what was found of it.
struct Made {
    adapter: Vec<PathBuf>,
    evaluation: Option<Evaluation>,
    verdict: Option<Verdict>,
    /// Why there is no evaluation, where the policy asks for one.
    not_judged: Option<String>,
    /// Why nobody may have it.
    kept_apart: Option<JobError>,
}

/// Takes a run's adapter to its end.
pub(crate) async fn finish(held: &Held<'_>, adapter: Vec<PathBuf>, trained_tokens: u64) -> Result<Ending, StoreError> {
    let policy = held.claim.job.policy.as_ref().map(|applied| &applied.policy).filter(|policy| policy.evaluate);
    let made = match policy {
        None => Made { adapter, evaluation: None, verdict: None, not_judged: None, kept_apart: None },
        Some(policy) => match examine(held, policy, adapter).await? {
            Ok(made) => made,
            Err(other) => return Ok(Ending::Other(other)),
        },
    };
    if let (Some(checkpoint), Some(verdict)) = (made.evaluation.as_ref().and_then(|found| found.checkpoint), &made.verdict) {
        tracing::info!(checkpoint, passed = verdict.passed, "a checkpoint takes the last adapter's place");
    }
    let report = evidence::report(held, made.evaluation.clone(), made.verdict.clone(), made.not_judged.clone()).await?;
    // What is trained is not trained again for an outage; the lease is kept meanwhile.
    let (mut stop, mut delay, since) = (held.stop.clone(), FIRST_DELAY, Instant::now());
    loop {
        match publish(held, &made, &report, trained_tokens).await {
            Err(error) if error.is_unavailable() && since.elapsed() < PUBLISH_PATIENCE => {
                tracing::warn!(%error, "the adapter could not be published; trying again");
            }
            ended => return Ok(Ending::Written(ended)),
        }
        // Whoever stops or pauses meanwhile does not wait for the store to come back.
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            reason = agent::stopped(&mut stop) => return Ok(Ending::Other(Outcome::Stopped(reason))),
        }
        delay = (delay * 2).min(LONGEST_DELAY);
    }
}

/// Asks an adapter the suites, and where it does not pass the checkpoints before it, if the policy says so.
async fn examine(held: &Held<'_>, policy: &Policy, adapter: Vec<PathBuf>) -> Result<Result<Made, Outcome>, StoreError> {
    let gate = &policy.gate;
    let last = match evaluation::evaluate(held, policy, holdfast_domain::plan::paths::ADAPTER, None).await? {
        Asked::Found(evaluation) => *evaluation,
        Asked::NotJudged(error) => {
            // Without a gate nothing depends on the answer.
            let not_judged = Some(error.message.clone());
            let kept_apart = gate.enabled.then_some(error);
            return Ok(Ok(Made { adapter, evaluation: None, verdict: None, not_judged, kept_apart }));
        }
        Asked::Ended(outcome) => return Ok(Err(outcome)),
    };
    let verdict = last.verdict(gate);
    if verdict.passed || !gate.enabled {
        return Ok(Ok(Made { adapter, evaluation: Some(last), verdict: Some(verdict), not_judged: None, kept_apart: None }));
    }
    if gate.otherwise == Otherwise::PublishCheckpoint {
        match passing_checkpoint(held, policy).await? {
            Ok(Some(made)) => return Ok(Ok(made)),
            Ok(None) => {}
            Err(outcome) => return Ok(Err(outcome)),
        }
    }
    let kept_apart = Some(not_passed(&verdict));
    Ok(Ok(Made { adapter, evaluation: Some(last), verdict: Some(verdict), not_judged: None, kept_apart }))
}

/// The newest checkpoint before the last adapter that passes.
async fn passing_checkpoint(held: &Held<'_>, policy: &Policy) -> Result<Result<Option<Made>, Outcome>, StoreError> {
    let last = held.store.steps(held.claim.job.id).await?.0.last().map(|step| step.step);
    let candidates = held.store.settled_adapters(held.claim.job.id).await?;
    for candidate in candidates.iter().filter(|candidate| Some(candidate.step) != last).take(CANDIDATES) {
        let name = format!("{CANDIDATES_FOLDER}/step-{}", candidate.step);
        let folder = held.folder.path().join(&name);
        held.folder.fetch_into(held.store, &folder, &candidate.files).await?;
        match evaluation::evaluate(held, policy, &name, Some(candidate.step)).await? {
            Asked::Found(evaluation) => {
                let verdict = evaluation.verdict(&policy.gate);
                if verdict.passed {
                    let adapter = agent::files_in(&folder).await?;
                    let (evaluation, verdict) = (Some(*evaluation), Some(verdict));
                    return Ok(Ok(Some(Made { adapter, evaluation, verdict, not_judged: None, kept_apart: None })));
                }
            }
            Asked::NotJudged(_) => return Ok(Ok(None)),
            Asked::Ended(outcome) => return Ok(Err(outcome)),
        }
    }
    Ok(Ok(None))
}

fn not_passed(verdict: &Verdict) -> JobError {
    let message = format!(
        "The adapter did not pass the safety gate: {}. The safety report says what was found. The adapter is kept from everybody; the operator may release it.",
        verdict.reasons()
    );
    JobError::new("safety_gate_failed", message)
}

/// Writes an adapter and its evidence as objects and gives them their rows.
async fn publish(held: &Held<'_>, made: &Made, report: &Report, trained_tokens: u64) -> Result<(), StoreError> {
    let Held { store, config, claim, .. } = held;
    let mut staged =
        Published { adapter: Vec::new(), results: None, evidence: Vec::new(), trained_tokens, device: config.device.clone() };
    let outcome = match stage_all(held, made, report, &mut staged).await {
        Err(error) => Err(error),
        Ok(()) => match &made.kept_apart {
            Some(error) => store.quarantine(claim.job.id, claim.attempt, &staged, error.clone()).await,
            None => store.publish(claim.job.id, claim.attempt, &staged).await.map(|_| ()),
        },
    };
    match (&outcome, &made.kept_apart) {
        (Ok(()), Some(error)) => tracing::warn!(code = error.code, "the job's adapter is kept apart"),
        (Ok(()), None) => tracing::info!("the job's model is published"),
        // Each try writes its own objects. What was published all the same is no longer staged, and stays.
        (Err(_), _) => discard(store, &[&staged.adapter[..], &staged.evidence[..]].concat()).await,
    }
    outcome
}

async fn stage_all(held: &Held<'_>, made: &Made, report: &Report, staged: &mut Published) -> Result<(), StoreError> {
    let Held { store, claim, .. } = held;
    let key = Store::adapter_keys(&claim.job, claim.attempt);
    stage_into(store, &made.adapter, &key, &mut staged.adapter).await?;
    staged.results = stage_results(held).await?;
    let evidence_key = Store::evidence_keys(&claim.job, claim.attempt);
    staged.evidence = evidence::stage_report(held, report, &evidence_key).await?;
    let written = staged.evidence.iter().find(|file| file.name == report::FILE);
    let signed = evidence::sign(held, &staged.adapter, staged.results.as_ref(), written).await?;
    // Beside the adapter, where whoever has it can check it; and with the evidence, where it stays when the model is deleted.
    staged.adapter.push(evidence::stage(store, manifest::FILE, &signed, &key).await?);
    staged.evidence.push(evidence::stage(store, manifest::FILE, &signed, &evidence_key).await?);
    Ok(())
}

pub(crate) async fn discard(store: &Store, staged: &[AdapterFile]) {
    for file in staged {
        store.objects().discard(&file.object).await;
    }
}

/// Writes files as objects under the keys that `key` gives their names.
pub(crate) async fn stage(
    store: &Store,
    files: &[PathBuf],
    key: impl Fn(&str) -> String,
) -> Result<Vec<AdapterFile>, StoreError> {
    let mut staged = Vec::new();
    stage_into(store, files, &key, &mut staged).await?;
    Ok(staged)
}

async fn stage_into(
    store: &Store,
    files: &[PathBuf],
    key: &impl Fn(&str) -> String,
    staged: &mut Vec<AdapterFile>,
) -> Result<(), StoreError> {
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        staged.push(AdapterFile { object: store.objects().stage_file(key(&name), path).await?, name });
    }
    Ok(())
}

/// Writes the figures of the job's steps, those of earlier attempts among them.
async fn stage_results(held: &Held<'_>) -> Result<Option<ObjectRef>, StoreError> {
    let Held { store, claim, .. } = held;
    let (steps, validations) = store.steps(claim.job.id).await?;
    let table = results::csv(&steps, &validations);
    let key = Store::results_key(&claim.job, claim.attempt);
    Ok(Some(store.objects().stage_bytes(key, table.as_bytes()).await?))
}
