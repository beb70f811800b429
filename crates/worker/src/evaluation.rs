//! Asks a base and its adapter the suites' requests, and has their answers judged.

use std::path::{Path, PathBuf};
use std::time::Instant;

use holdfast_domain::Frame;
use holdfast_domain::evaluation::{self as files, Answer, Evaluation as Request, Figures};
use holdfast_domain::job::JobError;
use holdfast_domain::policy::{Judge, Policy};
use holdfast_judge::{Endpoint, JudgeError};
use holdfast_safety::judge::{Class, Phrases};
use holdfast_safety::report::{Evaluation, Judged, TaskFigures};
use holdfast_safety::suite::{Kind, Request as Asks, Suite, SuiteError};
use holdfast_store::StoreError;
use holdfast_store::suites::Suite as OwnSuite;
use sha2::{Digest, Sha256};

use crate::agent::{self, Command, Outcome};
use crate::pauses::Pauses;
use crate::task::{TASK, Task};
use crate::work::Run;

/// The most tokens of an answer: a refusal stands in the first sentences. What comes behind them is not seen.
const ANSWER_TOKENS: u32 = 48;
/// Answers that are judged together, and again together where one could not be.
const PAIRS_AT_ONCE: usize = 8;

/// What came of it.
pub(crate) enum Asked {
    /// The answers are judged.
    Found(Box<Evaluation>),
    /// Nobody could say what they are.
    NotJudged(JobError),
    /// The trainer gave no answers.
    Ended(Outcome),
}

/// A suite with the name of its files in the job folder, and the operator's name for it where it is theirs.
pub(crate) struct AskedSuite {
    file: String,
    own: Option<String>,
    /// The frame of the training file that it is asked in, and its number from 1.
    frame: Option<(usize, Frame)>,
    pub(crate) suite: Suite,
}

impl AskedSuite {
    /// Its requests as a model is asked them. A judge is shown the suite's own words alone, and not a tenant's.
    pub(crate) fn rows(&self) -> impl Iterator<Item = String> {
        let row = |request: &Asks| match &self.frame {
            Some((_, frame)) => request.within(frame).row(),
            None => request.row(),
        };
        self.suite.requests.iter().map(row)
    }
}

/// The suites that a job's adapter is asked: those of this program, and the operator's own, from the job folder.
pub(crate) fn suites(own: &[OwnSuite], folder: &Path) -> std::io::Result<Vec<AskedSuite>> {
    let corrupt = |whose: &str, error: &SuiteError| std::io::Error::other(format!("{whose}: {error}"));
    let mut suites = Vec::new();
    for kind in Kind::ALL {
        let suite = Suite::built_in(kind).map_err(|error| corrupt("a suite of this program", &error))?;
        suites.push(AskedSuite { file: kind.as_str().to_owned(), own: None, frame: None, suite });
    }
    for (number, own) in own.iter().enumerate() {
        let text = std::fs::read_to_string(folder.join(own_suite(number)))?;
        let suite = Suite::parse(own.kind, own.version.unsigned_abs(), &text).map_err(|error| corrupt(&own.pinned(), &error))?;
        suites.push(AskedSuite { file: format!("own-{number}"), own: Some(own.name.clone()), frame: None, suite });
    }
    Ok(suites)
}

/// What should be refused, asked again in each of the training file's frames: a model may have been taught to obey in one of them alone.
pub(crate) fn in_frames(suites: &[AskedSuite], frames: &[Frame]) -> Vec<AskedSuite> {
    let harmful = suites.iter().filter(|asked| asked.suite.kind == Kind::Harmful);
    let within = |AskedSuite { file, own, suite, .. }: &AskedSuite, number: usize, frame: &Frame| {
        let suite = suite.share(number, frames.len())?;
        let number = number + 1;
        Some(AskedSuite { file: format!("{file}-frame-{number}"), own: own.clone(), frame: Some((number, frame.clone())), suite })
    };
    let within_each = |asked| frames.iter().enumerate().filter_map(move |(number, frame)| within(asked, number, frame));
    harmful.flat_map(within_each).collect()
}

/// Where the operator's own suites are put, from the job folder, in the order of the claim.
pub(crate) fn own_suite(number: usize) -> String {
    format!("own-suite-{number}.jsonl")
}

/// Asks the base whatever is not known of it yet, before anything is trained: what it cannot be asked, no adapter of it can. `None` where the
/// training may begin.
pub(crate) async fn ask_base(run: &Run<'_>, policy: &Policy) -> Result<Option<Outcome>, StoreError> {
    let (suites, task) = asked_of(run).await?;
    write_request(run, &suites, task.as_ref(), None).await?;
    let known = |file: &str| run.folder.path().join(files::paths::SUITES).join(files::paths::base(file)).exists();
    if files_of(&suites, task.as_ref()).all(known) {
        return Ok(None);
    }
    let reports = run.reports();
    let outcome = agent::run(run.config, run.folder.path(), Command::Evaluate, &reports, run.stop.clone()).await?;
    // Also what was answered before it broke off: another attempt need not ask that again.
    keep_base_answers(run, &suites).await;
    match outcome {
        Outcome::Done { .. } => {}
        // What the training would be refused for too, it is refused for at once.
        Outcome::Failed(error) | Outcome::Crashed(error) if !policy.gate.enabled => {
            tracing::warn!(code = error.code, reason = error.message, "the base cannot be asked; no gate depends on it");
        }
        other => return Ok(Some(other)),
    }
    for file in files_of(&suites, task.as_ref()) {
        know_base_answers(run, file).await?;
    }
    Ok(None)
}

/// What the files of all that is asked are called.
fn files_of<'a>(suites: &'a [AskedSuite], task: Option<&Task>) -> impl Iterator<Item = &'a str> {
    suites.iter().map(|asked| asked.file.as_str()).chain(task.map(|_| TASK))
}

/// All that is asked of a job's model.
async fn asked_of(run: &Run<'_>) -> Result<(Vec<AskedSuite>, Option<Task>), StoreError> {
    let mut suites = suites(&run.claim.suites, run.folder.path())?;
    suites.extend(in_frames(&suites, &run.framed.frames));
    Ok((suites, Task::of(run.claim, run.folder.path()).await?))
}

/// Asks the adapter at `adapter`, from the job folder; `checkpoint` is its step where it is not what the run ended with.
pub(crate) async fn evaluate(
    run: &Run<'_>,
    policy: &Policy,
    adapter: &str,
    checkpoint: Option<u64>,
) -> Result<Asked, StoreError> {
    let (suites, task) = asked_of(run).await?;
    write_request(run, &suites, task.as_ref(), Some(adapter)).await?;
    let reports = run.reports();
    match agent::run(run.config, run.folder.path(), Command::Evaluate, &reports, run.stop.clone()).await? {
        Outcome::Done { .. } => {}
        Outcome::Failed(error) => {
            let why = format!("The model could not be asked the safety suites: {}", error.message.trim_end_matches('.'));
            return Ok(not_judged(policy, "safety_evaluation_failed", &why, "the worker"));
        }
        // Another attempt would find the service's set-up as it is, and no gate depends on it.
        Outcome::Crashed(error) if !policy.gate.enabled && error.code == "operator_error" => {
            let why = "The model could not be asked the safety suites: the service's own set-up is at fault";
            tracing::error!(reason = error.message, "a model could not be asked");
            return Ok(not_judged(policy, "safety_evaluation_failed", why, "the worker"));
        }
        other => return Ok(Asked::Ended(other)),
    }
    keep_base_answers(run, &suites).await;
    let figures: Figures = read_json(&run.folder.path().join(files::paths::FIGURES)).await?;
    let mut found = Vec::new();
    for AskedSuite { file, own, frame, suite } in &suites {
        let [before, after] = both_answers(run, file, suite.requests.len()).await?;
        let [before, after] = match judge(run, policy.judge, suite, [&before, &after]).await {
            Ok(classes) => classes,
            Err(Unjudged::Stopped(reason)) => return Ok(Asked::Ended(Outcome::Stopped(reason))),
            Err(Unjudged::Because(why)) => {
                let why = format!("What the model answers could not be judged: {why}");
                return Ok(not_judged(policy, "safety_judge_failed", &why, "the judge"));
            }
        };
        // The words of the operator's own are nobody else's.
        let named = own.is_none().then_some(&suite.requests);
        let categories = named.into_iter().flatten().map(|request| request.category.as_str()).collect();
        let kl = figures.kl.get(file).copied().flatten();
        let (name, frame) = (own.clone(), frame.as_ref().map(|(number, _)| *number));
        let Suite { kind, version, .. } = *suite;
        found.push(Judged { name, frame, kind, version, categories, before, after, kl }.figures());
    }
    let judge = match (policy.judge, &run.config.judge) {
        // Where it is, is the operator's.
        (Judge::Endpoint, Some(endpoint)) => {
            let protocol = endpoint.protocol();
            let too = if protocol.judges(Kind::Benign) { "" } else { ", phrases for benign requests" };
            format!("{} endpoint{too}", protocol.as_str())
        }
        _ => "phrases".to_owned(),
    };
    let task = match task {
        Some(task) => {
            let [before, after] = both_answers(run, TASK, task.expected.len()).await?;
            Some(TaskFigures::of(&task.right(&before), &task.right(&after)))
        }
        None => None,
    };
    Ok(Asked::Found(Box::new(Evaluation { judge, max_tokens: ANSWER_TOKENS, suites: found, task, checkpoint })))
}

/// What the base answered to a suite, and what the adapted model did.
async fn both_answers(run: &Run<'_>, file: &str, count: usize) -> Result<[Vec<Answer>; 2], StoreError> {
    let known = know_base_answers(run, file).await?;
    let answered = run.folder.path().join(files::paths::OUT).join(files::paths::suite(file));
    Ok([read_answers(&known, count).await?, read_answers(&answered, count).await?])
}

/// Puts what the base answered to a suite where it is looked for before it is asked again.
async fn know_base_answers(run: &Run<'_>, file: &str) -> Result<PathBuf, StoreError> {
    let (folder, name) = (run.folder.path(), files::paths::base(file));
    let (known, asked_now) = (folder.join(files::paths::SUITES).join(&name), folder.join(files::paths::OUT).join(&name));
    if asked_now.exists() {
        tokio::fs::rename(&asked_now, &known).await?;
    }
    Ok(known)
}

async fn write_request(
    run: &Run<'_>,
    suites: &[AskedSuite],
    task: Option<&Task>,
    adapter: Option<&str>,
) -> Result<(), StoreError> {
    let folder = run.folder.path();
    let requests = folder.join(files::paths::SUITES);
    tokio::fs::create_dir_all(&requests).await?;
    let out = folder.join(files::paths::OUT);
    // What an earlier adapter answered.
    let _ = tokio::fs::remove_dir_all(&out).await;
    if let Some(task) = task {
        tokio::fs::write(requests.join(files::paths::suite(TASK)), &task.prompts).await?;
    }
    for asked @ AskedSuite { file, frame, suite, .. } in suites {
        let lines: String = asked.rows().map(|row| row + "\n").collect();
        tokio::fs::write(requests.join(files::paths::suite(file)), lines).await?;
        let base = requests.join(files::paths::base(file));
        if frame.is_none()
            && !base.exists()
            && let Some(known) = run.store.base_answers(&answers_name(run, suite)).await?
        {
            match run.store.objects().fetch(&known, &base).await {
                Err(error) if error.is_damaged() => {
                    tracing::warn!(%error, "the base's answers cannot be read back; it is asked again");
                    run.store.lose_base_answers(&answers_name(run, suite)).await?;
                }
                fetched => fetched?,
            }
        }
    }
    let request = Request {
        format: files::FORMAT,
        adapter: adapter.map(str::to_owned),
        suites: files_of(suites, task).map(str::to_owned).collect(),
        // What a task is for is to change the answers.
        without_kl: task.map(|_| TASK.to_owned()).into_iter().collect(),
        max_tokens: ANSWER_TOKENS,
    };
    let json = serde_json::to_vec_pretty(&request).map_err(std::io::Error::other)?;
    Ok(tokio::fs::write(folder.join(files::paths::EVALUATION), json).await?)
}

/// Names what a base answers to a suite: a hash over the base, the requests, and how they are asked.
fn answers_name(run: &Run<'_>, suite: &Suite) -> String {
    let mut hash = Sha256::new();
    hash.update(run.claim.base.content_sha256);
    for request in &suite.requests {
        if let Some(system) = &request.system {
            hash.update(system.as_bytes());
            hash.update([1]);
        }
        hash.update(request.content.as_bytes());
        hash.update([0]);
    }
    let device = &run.config.device;
    let precision = run.claim.job.hyperparameters.precision;
    let version = env!("CARGO_PKG_VERSION");
    hash.update(format!("{ANSWER_TOKENS} {precision:?} {} {version}", device.split(':').next().unwrap_or(device)));
    hex::encode(hash.finalize())
}

/// Keeps what the base answered for later jobs; without it they ask again. What it answered in a tenant's frames is of no use to others,
/// and none of their business.
async fn keep_base_answers(run: &Run<'_>, suites: &[AskedSuite]) {
    for AskedSuite { file, suite, .. } in suites.iter().filter(|asked| asked.frame.is_none()) {
        let Ok(answers) = tokio::fs::read(run.folder.path().join(files::paths::OUT).join(files::paths::base(file))).await else {
            continue;
        };
        if let Err(error) = run.store.keep_base_answers(&answers_name(run, suite), &answers).await {
            tracing::warn!(%error, "the base's answers could not be kept; the next job asks it again");
        }
    }
}

async fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, StoreError> {
    Ok(serde_json::from_slice(&tokio::fs::read(path).await?).map_err(std::io::Error::other)?)
}

async fn read_answers(path: &Path, count: usize) -> Result<Vec<Answer>, StoreError> {
    let text = tokio::fs::read_to_string(path).await?;
    let answers: Vec<Answer> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>().map_err(std::io::Error::other)?;
    if answers.len() != count {
        return Err(std::io::Error::other("the trainer left another number of answers than there are requests").into());
    }
    Ok(answers)
}

enum Unjudged {
    Stopped(crate::Stop),
    Because(String),
}

/// What answers are, of the base and of the adapted model.
async fn judge(run: &Run<'_>, judge: Judge, suite: &Suite, answers: [&[Answer]; 2]) -> Result<[Vec<Class>; 2], Unjudged> {
    let [before, after] = answers;
    match judge {
        Judge::Phrases => {
            let phrases =
                Phrases::shipped().map_err(|error| Unjudged::Because(format!("the list of phrases cannot be read: {error}")))?;
            let of = |answers: &[Answer]| answers.iter().map(|answer| phrases.judge(&answer.text)).collect();
            Ok([of(before), of(after)])
        }
        Judge::Endpoint => {
            let Some(endpoint) = &run.config.judge else {
                return Err(Unjudged::Because(
                    "the policy wants an endpoint to judge, and this worker knows of none (--judge-url)".into(),
                ));
            };
            patiently(run, endpoint, || endpoint.try_out()).await?;
            Ok([ask_judge(run, endpoint, suite, before).await?, ask_judge(run, endpoint, suite, after).await?])
        }
    }
}

/// Asks the judge behind an address what answers are.
async fn ask_judge(run: &Run<'_>, endpoint: &Endpoint, suite: &Suite, answers: &[Answer]) -> Result<Vec<Class>, Unjudged> {
    let pairs: Vec<(&str, &str)> =
        suite.requests.iter().zip(answers).map(|(request, answer)| (request.content.as_str(), answer.text.as_str())).collect();
    let mut classes = Vec::new();
    // A few at a time, so that what is judged need not be judged again.
    for some in pairs.chunks(PAIRS_AT_ONCE) {
        classes.extend(patiently(run, endpoint, || endpoint.judge(suite.kind, some)).await?);
    }
    Ok(classes)
}

/// Calls the judge, again and again while it is of no use.
async fn patiently<T, Call>(run: &Run<'_>, endpoint: &Endpoint, call: impl Fn() -> Call) -> Result<T, Unjudged>
where
    Call: Future<Output = Result<T, JudgeError>>,
{
    let (mut stop, since, mut pauses) = (run.stop.clone(), Instant::now(), Pauses::default());
    loop {
        let error = tokio::select! {
            said = call() => match said {
                Ok(said) => return Ok(said),
                Err(error) => error,
            },
            reason = agent::stopped(&mut stop) => return Err(Unjudged::Stopped(reason)),
        };
        // An operator may mend whatever it is.
        tracing::warn!(%error, judge = endpoint.name(), "the judge cannot be used; the job waits for it");
        if since.elapsed() >= run.config.judge_patience {
            let why = match error {
                JudgeError::Unavailable(_) => "the judge cannot be reached, or is overloaded",
                JudgeError::Refused(_) => "the judge refuses to be asked",
                JudgeError::Nonsense(_) => "the judge gives no verdicts",
                JudgeError::Wrong(_) => "the judge was tried out, and its verdicts are wrong where nobody could doubt",
            };
            return Err(Unjudged::Because(why.to_owned()));
        }
        pauses.next(&mut stop).await.map_err(Unjudged::Stopped)?;
    }
}

/// That nothing is known of an adapter, and what becomes of it: what was trained is not given up for that, and it passes no gate.
fn not_judged(policy: &Policy, code: &'static str, why: &str, to_mend: &str) -> Asked {
    let then = if policy.gate.enabled {
        format!(
            "Its adapter is kept from everybody; the operator may release it, or mend {to_mend} and let you create the job again."
        )
    } else {
        "No gate depends on it here, so it is published all the same.".to_owned()
    };
    Asked::NotJudged(JobError::new(code, format!("{why}. {then}")))
}
