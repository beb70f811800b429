//! What a job would take: the request is decided and its files are checked as for a job, and nothing is created.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Json;
use axum::extract::State;
use futures::TryStreamExt;
use holdfast_base_model::memory;
use holdfast_dataset::check::encode_file;
use holdfast_dataset::encode::EncodeOptions;
use holdfast_dataset::files::check_files;
use holdfast_dataset::frames;
use holdfast_domain::hyperparameters::{LongRows, Precision};
use holdfast_domain::steps;
use holdfast_store::StoreError;
use holdfast_store::base_models::BaseModel;
use holdfast_store::jobs::NewJob;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::auth::Tenant;
use crate::error::ErrorBody;
use crate::extract::JsonBody;
use crate::handlers::jobs::resolve;
use crate::wire::estimate::{Estimate, FileEstimate, TimeEstimate};
use crate::wire::job_request::CreateJob;
use crate::{ApiError, AppState};

/// Estimate a job without creating it.
///
/// The body is that of a job. The answer has every bad line of its files, every hyperparameter with the reason for what was left
/// open, and the steps, tokens, memory and time the job would take. Whether the files hold what models are held to or measured on is looked at
/// by the job alone.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/estimate", operation_id = "estimate_fine_tuning_job", tag = "fine-tuning",
    request_body = CreateJob,
    responses(
        (status = 200, description = "Extension: what the job would take", body = Estimate),
        (status = 404, description = "The project has no such file, or there is no such model", body = ErrorBody),
        (status = 413, description = "The body is larger than 1 MiB", body = ErrorBody),
    )
)]
pub(crate) async fn estimate_job(
    tenant: Tenant,
    State(state): State<AppState>,
    JsonBody(body, _): JsonBody<CreateJob>,
) -> Result<Json<Estimate>, ApiError> {
    let resolved = resolve(&state, tenant, body).await?;
    let job = &resolved.job;
    let _turn = state.tokenizers.turn()?;
    let known = state.tokenizers.get(&state.store, &job.base_model).await?;
    let gone = Gone::default();
    let rows = |keys: &[String]| reader(&state, keys.to_vec(), &gone);
    let [training, again] = [(); 2].map(|()| rows(&resolved.training.content.keys));
    let validation = resolved.validation.as_ref().map(|file| rows(&file.content.keys));
    let alignment = match &job.safety.alignment_set {
        Some(name) => Some(rows(&[state.store.alignment_set(name).await.map_err(|e| no_set(e, name))?.object.key])),
        None => None,
    };
    let h = job.hyperparameters.clone();
    let options = EncodeOptions { max_length: h.max_length as usize, long_rows: h.long_rows };
    // The operator's rows are never cut.
    let whole = EncodeOptions { max_length: usize::MAX, long_rows: LongRows::Error };
    let tokenize = move || {
        let mut lengths = Vec::new();
        if let Some(mut alignment) = alignment {
            let mut set = Vec::new();
            alignment.read_to_end(&mut set)?;
            let set = frames::framed(&set, &frames::of_file(again)?)?;
            let length = |_, row: holdfast_dataset::Example| lengths.push((row.ids.len() as u64, row.supervised_count() as u64));
            encode_file(&set[..], &known.tokenizer, whole, length)?;
        }
        Ok::<_, std::io::Error>((check_files(training, validation, &known.tokenizer, options)?, lengths, known))
    };
    let found = tokio::task::spawn_blocking(tokenize).await.map_err(|e| ApiError::internal(&e))?;
    let (found, alignment, known) = found.map_err(StoreError::from)?;
    let longest: Vec<(u64, u64)> = found.training.longest.iter().map(|&(t, s)| (t as u64, s as u64)).collect();
    let trained_tokens = found.training.report.tokens * u64::from(h.n_epochs);
    let warnings = found.warnings();
    let files_can_be_used = found.files().all(|(_, file)| file.report.error_count == 0);
    Ok(Json(Estimate {
        object: "fine_tuning.job.estimate",
        files_can_be_used,
        warnings,
        steps: steps::total(&h, &job.safety, found.training.report.rows),
        trained_tokens,
        memory: memory::predict(&known.architecture, &h, &job.safety, &longest, &alignment).into(),
        time: time(&state, job, &resolved.base, trained_tokens).await?,
        training_file: FileEstimate::new(resolved.training.id, found.training),
        validation_file: resolved
            .validation
            .as_ref()
            .zip(found.validation)
            .map(|(file, found)| FileEstimate::new(file.id, found)),
        hyperparameters: h.into(),
        decided: resolved.decided.into_iter().map(Into::into).collect(),
        safety: resolved.job.safety.into(),
        model: resolved.job.model,
        base_model: resolved.job.base_model,
    }))
}

fn no_set(error: StoreError, name: &str) -> ApiError {
    match error {
        StoreError::NotFound => {
            ApiError::invalid("safety.alignment_set", "alignment_set_not_found", format!("there is no alignment set {name:?}"))
        }
        other => other.into(),
    }
}

/// How long the training would take: as the run that is most like it, or as that one would with a model of this one's size.
async fn time(state: &AppState, job: &NewJob, base: &BaseModel, trained_tokens: u64) -> Result<Option<TimeEstimate>, ApiError> {
    let (precision, defense) = (job.hyperparameters.precision, job.safety.defense);
    let Some(speed) = state.store.speed_like(&job.base_model, precision, defense).await? else { return Ok(None) };
    // The work of a token grows with the numbers it goes through.
    let scale = speed.parameter_count as f64 / base.parameter_count.max(1) as f64;
    let tokens_per_second = speed.tokens_per_second * scale;
    let mut basis =
        format!("measured on {} with {} in {} under {}", speed.device, speed.base_model, speed.precision, speed.defense);
    if speed.base_model != job.base_model {
        basis.push_str(&format!(", and carried over to {} by its size", job.base_model));
    }
    let word = match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    };
    if speed.precision != word || speed.defense != defense.as_str() {
        basis.push_str(&format!("; {word} under {} was not measured yet and may differ", defense.as_str()));
    }
    Ok(Some(TimeEstimate { seconds: trained_tokens as f64 / tokens_per_second, tokens_per_second, basis }))
}

/// Ends the reading of a file when the request it is for is dropped.
#[derive(Default)]
struct Gone(Arc<AtomicBool>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The bytes of objects for a thread that may wait for them.
fn reader(state: &AppState, keys: Vec<String>, gone: &Gone) -> impl Read + Send + 'static {
    let pieces = state.store.objects().read_all(keys).map_err(std::io::Error::other);
    WhileWanted { reader: SyncIoBridge::new(StreamReader::new(pieces)), gone: Arc::clone(&gone.0) }
}

struct WhileWanted<R> {
    reader: R,
    gone: Arc<AtomicBool>,
}

impl<R: Read> Read for WhileWanted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("nobody waits for it any more"));
        }
        self.reader.read(buffer)
    }
}
