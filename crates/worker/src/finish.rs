//! What becomes of a trained adapter: it is asked the suites, held to the gate, and published or kept apart.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use holdfast_domain::job::JobError;
use holdfast_domain::plan::paths;
use holdfast_domain::policy::{Otherwise, Policy};
use holdfast_safety::report::{Evaluation, SuiteFigures, Verdict};
use holdfast_safety::{hash, manifest};
use holdfast_store::queue::{AdapterFile, Published};
use holdfast_store::{Store, StoreError};

use crate::agent::{self, Outcome};
use crate::evaluation::{self, Asked};
use crate::evidence::{self, Evidence};
use crate::pauses::Pauses;
use crate::work::Run;

/// How long it is tried to ask and to publish an adapter that is trained, while the store or the database is away.
const PATIENCE: Duration = Duration::from_secs(60 * 60);
/// Checkpoints that are asked at most where the last adapter does not pass.
const CANDIDATES: usize = 5;
/// Where their adapters are put, under the job folder.
const CANDIDATES_FOLDER: &str = "candidates";

/// Why an adapter was not taken to its end.
pub(crate) enum Unfinished {
    /// What is kept could not be read or written.
    Store(StoreError),
    /// The run ends otherwise.
    Ended(Outcome),
}

impl<E: Into<StoreError>> From<E> for Unfinished {
    fn from(error: E) -> Self {
        Self::Store(error.into())
    }
}

/// A trained adapter with what was found of it.
pub(crate) struct Made {
    adapter: Vec<PathBuf>,
    pub(crate) evaluation: Option<Evaluation>,
    pub(crate) verdict: Option<Verdict>,
    /// Why there is no evaluation, where the policy asks for one.
    pub(crate) not_judged: Option<String>,
    /// What the gate found of the last adapter, where this is a checkpoint's.
    pub(crate) replaced: Option<Verdict>,
    /// Why nobody may have it.
    kept_apart: Option<JobError>,
}

impl Made {
    fn new(adapter: Vec<PathBuf>) -> Self {
        Self { adapter, evaluation: None, verdict: None, not_judged: None, replaced: None, kept_apart: None }
    }

    /// What its owner should know of what is published.
    fn note(&self) -> Option<String> {
        if self.not_judged.is_some() {
            return self.not_judged.clone();
        }
        let (step, replaced) = (self.evaluation.as_ref()?.checkpoint?, self.replaced.as_ref()?);
        Some(format!(
            "The adapter that the run ended with did not pass the safety gate: {}. The one of step {step}, which does, is published in its place",
            replaced.reasons()
        ))
    }

    /// Whether it passed a gate that is closed to what does not.
    fn passed_gate(&self) -> Option<bool> {
        if self.kept_apart.is_some() {
            return Some(false);
        }
        self.verdict.as_ref().filter(|verdict| verdict.enabled).map(|verdict| verdict.passed)
    }

    /// What was found, to be told.
    fn found(self, evaluation: Evaluation, verdict: Verdict) -> Self {
        Self { evaluation: Some(evaluation), verdict: Some(verdict), ..self }
    }
}

/// Takes a run's adapter to its end, which the store knows then.
pub(crate) async fn finish(run: &Run<'_>, adapter: Vec<PathBuf>, trained_tokens: u64) -> Result<(), Unfinished> {
    let made = match run.asking_policy() {
        None => Made::new(adapter),
        Some(policy) => {
            let mut tries = Tries::default();
            loop {
                match examine(run, policy, adapter.clone()).await {
                    Err(Unfinished::Store(error)) => tries.again(run, "asked", error).await?,
                    examined => break examined?,
                }
            }
        }
    };
    let (mut tries, mut gathered) = (Tries::default(), None);
    while let Err(error) = gather_and_publish(run, &made, &mut gathered, trained_tokens).await {
        tries.again(run, "published", error).await?;
    }
    Ok(())
}

/// How often something was tried in vain that needs the store and the database.
#[derive(Default)]
struct Tries {
    pauses: Pauses,
    /// Since when it fails: what is tried may take long by itself.
    since: Option<Instant>,
}

impl Tries {
    /// Waits to try again what failed because one of them is away: what is trained is not trained again for an outage, and the lease
    /// is kept meanwhile.
    ///
    /// # Errors
    /// `error`, where waiting is of no use, or that the worker must let go.
    async fn again(&mut self, run: &Run<'_>, what: &str, error: StoreError) -> Result<(), Unfinished> {
        let since = self.since.get_or_insert_with(Instant::now);
        if !error.is_unavailable() || since.elapsed() >= PATIENCE {
            return Err(error.into());
        }
        tracing::warn!(%error, "the adapter could not be {what}; trying again");
        let waited = self.pauses.next(&mut run.stop.clone()).await;
        waited.map_err(|reason| Unfinished::Ended(Outcome::Stopped(reason)))
    }
}

/// Publishes with evidence that is gathered once, however often it is tried.
async fn gather_and_publish(
    run: &Run<'_>,
    made: &Made,
    gathered: &mut Option<Evidence>,
    trained_tokens: u64,
) -> Result<(), StoreError> {
    let evidence = match gathered {
        Some(evidence) => evidence,
        None => gathered.insert(evidence::gather(run, made).await?),
    };
    publish(run, made, evidence, trained_tokens).await
}

/// Asks an adapter the suites, and where it does not pass the checkpoints before it, if the policy says so.
async fn examine(run: &Run<'_>, policy: &Policy, adapter: Vec<PathBuf>) -> Result<Made, Unfinished> {
    let gate = &policy.gate;
    let last = match evaluation::evaluate(run, policy, paths::ADAPTER, None).await? {
        Asked::Found(evaluation) => *evaluation,
        Asked::NotJudged(error) => {
            // Without a gate nothing depends on the answer.
            let not_judged = Some(error.message.clone());
            let kept_apart = gate.enabled.then_some(error);
            return Ok(Made { not_judged, kept_apart, ..Made::new(adapter) });
        }
        Asked::Ended(outcome) => return Err(Unfinished::Ended(outcome)),
    };
    let verdict = last.verdict(gate);
    if verdict.passed || !gate.enabled {
        return Ok(Made::new(adapter).found(last, verdict));
    }
    if gate.otherwise == Otherwise::PublishCheckpoint
        && let Some(made) = passing_checkpoint(run, policy, &adapter).await?
    {
        return Ok(Made { replaced: Some(verdict), ..made });
    }
    let kept_apart = Some(not_passed(&verdict));
    Ok(Made { kept_apart, ..Made::new(adapter).found(last, verdict) })
}

/// The best checkpoint that passes and is not `adapter`, which did not: by the loss on the validation file where there is one, else the
/// newest.
async fn passing_checkpoint(run: &Run<'_>, policy: &Policy, adapter: &[PathBuf]) -> Result<Option<Made>, Unfinished> {
    let failed = match adapter.iter().find(|file| file.ends_with(paths::ADAPTER_WEIGHTS)).cloned() {
        // The lease is renewed on this thread.
        Some(weights) => {
            Some(tokio::task::spawn_blocking(move || hash::of_file(&weights)).await.map_err(std::io::Error::other)??)
        }
        None => None,
    };
    let (_, validations) = run.store.steps(run.claim.job.id).await?;
    let loss_at = |step: u64| validations.iter().rev().find(|(at, ..)| *at <= step).map_or(f64::INFINITY, |(_, loss, _)| *loss);
    let mut candidates = run.store.settled_adapters(run.claim.job.id).await?;
    // What the run published may be its best and not its last.
    candidates.retain(|candidate| {
        let weights = candidate.files.iter().find(|file| file.name == paths::ADAPTER_WEIGHTS);
        weights.map(|file| file.object.sha256) != failed
    });
    candidates.sort_by(|a, b| loss_at(a.step).total_cmp(&loss_at(b.step)));
    for candidate in candidates.iter().take(CANDIDATES) {
        let name = format!("{CANDIDATES_FOLDER}/step-{}", candidate.step);
        let folder = run.folder.path().join(&name);
        match run.folder.fetch_into(run.store, &folder, &candidate.files).await {
            Err(error) if error.is_damaged() => {
                tracing::warn!(%error, step = candidate.step, "a checkpoint cannot be read back");
                continue;
            }
            fetched => fetched?,
        }
        match evaluation::evaluate(run, policy, &name, Some(candidate.step)).await? {
            Asked::Found(evaluation) => {
                let verdict = evaluation.verdict(&policy.gate);
                if verdict.passed {
                    let made = Made::new(agent::files_in(&folder).await?);
                    return Ok(Some(made.found(*evaluation, verdict)));
                }
            }
            Asked::NotJudged(_) => return Ok(None),
            Asked::Ended(outcome) => return Err(Unfinished::Ended(outcome)),
        }
    }
    Ok(None)
}

fn not_passed(verdict: &Verdict) -> JobError {
    let message = format!(
        "The adapter did not pass the safety gate: {}. The safety report says what was found. The adapter is kept from everybody; the operator may release it.",
        verdict.reasons()
    );
    JobError::new("safety_gate_failed", message)
}

/// Writes an adapter and its evidence as objects and gives them their rows.
async fn publish(run: &Run<'_>, made: &Made, evidence: &Evidence, trained_tokens: u64) -> Result<(), StoreError> {
    let Run { store, config, claim, .. } = run;
    let is_own = |suite: &&SuiteFigures| suite.name.is_some() && suite.frame.is_none();
    let own_suites = made.evaluation.as_ref().map_or(0, |found| found.suites.iter().filter(is_own).count());
    let mut staged =
        Published { own_suites, note: made.note(), trained_tokens, device: config.device.clone(), ..Published::default() };
    let outcome = match stage_all(run, made, evidence, &mut staged).await {
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
        (Err(_), _) => {
            discard(store, &[&staged.adapter[..], &staged.evidence[..]].concat()).await;
            if let Some(results) = &staged.results {
                store.objects().discard(results).await;
            }
        }
    }
    outcome
}

async fn stage_all(run: &Run<'_>, made: &Made, evidence: &Evidence, staged: &mut Published) -> Result<(), StoreError> {
    let Run { store, claim, .. } = run;
    let key = Store::adapter_keys(&claim.job, claim.attempt);
    stage_into(store, &made.adapter, &key, &mut staged.adapter).await?;
    let results_key = Store::results_key(&claim.job, claim.attempt);
    staged.results = Some(store.objects().stage_bytes(results_key, evidence.table.as_bytes()).await?);
    let evidence_key = Store::evidence_keys(&claim.job, claim.attempt);
    evidence.stage_into(store, &evidence_key, &mut staged.evidence).await?;
    let signed = evidence.sign(run, staged, made.passed_gate()).await?;
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
