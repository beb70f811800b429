//! What a job had learned after some of its steps: an adapter that can be downloaded and begun from, and for the newest also
//! the state from which the job itself goes on.

use holdfast_domain::ids::{CheckpointId, JobId, ProjectId};
use holdfast_domain::plan::paths;
use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::events::{self, Level};
use crate::files::object_ref;
use crate::objects::{self, keys};
use crate::queue::AdapterFile;
use crate::{Page, PageRequest, Store, StoreError, new_id};

/// The files of a checkpoint that are the adapter; the others are the run's own state.
pub const ADAPTER_FILES: [&str; 2] = [paths::ADAPTER_CONFIG, paths::ADAPTER_WEIGHTS];

/// A checkpoint's row.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Its id.
    pub id: CheckpointId,
    /// After which step.
    pub step: u64,
    /// When it was kept.
    pub created_at: OffsetDateTime,
    /// The step's figures: training loss and token accuracy.
    pub train: Option<(f64, f64)>,
    /// The last measurement on the validation file up to then: loss and token accuracy.
    pub validation: Option<(f64, f64)>,
}

/// Where a run can go on from.
#[derive(Debug, Clone)]
pub struct ResumePoint {
    /// After which step.
    pub step: u64,
    /// Its files.
    pub files: Vec<AdapterFile>,
}

impl Store {
    /// Where a checkpoint's files go: each call is another place, which gives each name its key.
    pub fn checkpoint_keys(project: ProjectId, job: JobId, attempt: i32, step: u64) -> impl Fn(&str) -> String {
        let time = new_id();
        move |name| keys::checkpoint(project, job, attempt, step, time, name)
    }

    /// Keeps a checkpoint whose files have been staged. Of the ones before it only the adapters stay; those after it are of a way
    /// that the run has left again. `settled` says whether its adapter is one to serve.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn keep_checkpoint(
        &self,
        id: JobId,
        attempt: i32,
        step: u64,
        settled: bool,
        files: &[AdapterFile],
    ) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        // Progress: what was lost before it is made good.
        sqlx::query!(
            "update jobs set lost_workers = 0 where id = $1 and lost_workers > 0
               and $2 > all(select step from job_checkpoints where job_id = $1)",
            id.0,
            step.cast_signed()
        )
        .execute(&mut *transaction)
        .await?;
        let left =
            sqlx::query_scalar!("select id from job_checkpoints where job_id = $1 and step >= $2", id.0, step.cast_signed())
                .fetch_all(&mut *transaction)
                .await?;
        remove(&mut transaction, &left).await?;
        let keys: Vec<String> = files.iter().map(|file| file.object.key.clone()).collect();
        objects::claim(&mut transaction, &keys).await?;
        let checkpoint = sqlx::query_scalar!(
            "insert into job_checkpoints (id, job_id, step, settled) values ($1, $2, $3, $4) returning id",
            new_id(),
            id.0,
            step.cast_signed(),
            settled
        )
        .fetch_one(&mut *transaction)
        .await?;
        for file in files {
            sqlx::query!(
                "insert into checkpoint_files (checkpoint_id, name, object_key, bytes, sha256) values ($1, $2, $3, $4, $5)",
                checkpoint,
                file.name,
                file.object.key,
                file.object.bytes.cast_signed(),
                &file.object.sha256[..]
            )
            .execute(&mut *transaction)
            .await?;
        }
        let oldest_needed = oldest_needed(&mut transaction, id).await?;
        drop_state(&mut transaction, id, Some(oldest_needed)).await?;
        drop_unsettled(&mut transaction, id, Some(step)).await?;
        if settled {
            events::message(&mut transaction, job.id, Level::Info, &format!("Checkpoint created at step {step}")).await?;
        }
        Ok(transaction.commit().await?)
    }

    /// Gives up a checkpoint that a job would go on from, because it cannot be read.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn lose_checkpoint(&self, id: JobId, attempt: i32, step: u64) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let lost =
            sqlx::query_scalar!("select id from job_checkpoints where job_id = $1 and step = $2", id.0, step.cast_signed())
                .fetch_all(&mut *transaction)
                .await?;
        remove(&mut transaction, &lost).await?;
        let message =
            format!("The checkpoint of step {step} could not be read back; the training goes on from the one before it");
        events::message(&mut transaction, job.id, Level::Warn, &message).await?;
        Ok(transaction.commit().await?)
    }

    /// A job's checkpoints, newest first.
    ///
    /// # Errors
    /// When the project has no such job, or the database fails.
    pub async fn checkpoints(&self, project: ProjectId, job: JobId, page: PageRequest) -> Result<Page<Checkpoint>, StoreError> {
        self.job(project, job).await?;
        let mut connection = self.tenant(project).await?;
        let rows = sqlx::query!(
            "select c.id, c.step, c.created_at, t.loss as \"train_loss?\", t.accuracy as \"train_accuracy?\",
                    v.loss as \"valid_loss?\", v.token_accuracy as \"valid_accuracy?\"
             from job_checkpoints c
             left join lateral (
                 select (s ->> 'task_loss')::double precision as loss, (s ->> 'token_accuracy')::double precision as accuracy
                 from (select steps, attempt from job_metrics m where m.job_id = $1 and m.first_step <= c.step
                       order by m.first_step desc, m.attempt desc limit 4) m, jsonb_array_elements(m.steps) s
                 where (s ->> 'step')::bigint = c.step order by m.attempt desc limit 1) t on true
             left join lateral (
                 select loss, token_accuracy from job_validations v where v.job_id = $1 and v.step <= c.step
                 order by v.step desc limit 1) v on true
             where c.job_id = $1 and c.settled
               and c.step < coalesce((select step from job_checkpoints where job_id = $1 and id = $2), 9223372036854775807)
             order by c.step desc limit $3",
            job.0,
            page.after,
            page.fetch()
        )
        .fetch_all(&mut *connection)
        .await?;
        let checkpoints = rows.into_iter().map(|r| Checkpoint {
            id: CheckpointId(r.id),
            step: r.step.unsigned_abs(),
            created_at: r.created_at,
            train: r.train_loss.zip(r.train_accuracy),
            validation: r.valid_loss.zip(r.valid_accuracy),
        });
        Ok(Page::new(checkpoints.collect(), &page))
    }

    /// The adapters that a job left on its way and that can be served, the newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn settled_adapters(&self, job: JobId) -> Result<Vec<ResumePoint>, StoreError> {
        let mut connection = self.pool.acquire().await?;
        let steps =
            sqlx::query_scalar!("select step from job_checkpoints where job_id = $1 and settled order by step desc", job.0)
                .fetch_all(&mut *connection)
                .await?;
        let mut adapters = Vec::new();
        for step in steps.into_iter().map(i64::unsigned_abs) {
            let mut files = files_of(&mut connection, job, step).await?;
            files.retain(|file| ADAPTER_FILES.contains(&file.name.as_str()));
            adapters.push(ResumePoint { step, files });
        }
        Ok(adapters)
    }

    /// The adapter after one of a job's steps, by name.
    ///
    /// # Errors
    /// When the project has no such job, it no such checkpoint, or the database fails.
    pub async fn checkpoint_adapter(&self, project: ProjectId, job: JobId, step: u64) -> Result<Vec<AdapterFile>, StoreError> {
        let mut connection = self.tenant(project).await?;
        let mut files = settled_files_of(&mut connection, job, step).await?;
        files.retain(|file| ADAPTER_FILES.contains(&file.name.as_str()));
        if files.is_empty() { Err(StoreError::NotFound) } else { Ok(files) }
    }
}

/// The checkpoint before which nothing is gone back to. A run that diverges goes back to the newest that it left on schedule, or to
/// the one before it where no step could be taken from there; one that went on from another machine's must be able to as well.
async fn oldest_needed(connection: &mut PgConnection, job: JobId) -> Result<u64, StoreError> {
    let second = sqlx::query_scalar!(
        "select step from job_checkpoints where job_id = $1 and settled order by step desc offset 1 limit 1",
        job.0
    );
    Ok(second.fetch_optional(connection).await?.map_or(0, i64::unsigned_abs))
}

/// Where a job goes on from: its checkpoints that still have the run's state, the newest first.
pub(crate) async fn resume_points(connection: &mut PgConnection, job: JobId) -> Result<Vec<ResumePoint>, StoreError> {
    let steps = sqlx::query_scalar!(
        "select c.step from job_checkpoints c where c.job_id = $1 and exists (
             select 1 from checkpoint_files f where f.checkpoint_id = c.id and f.name <> all($2))
         order by c.step desc",
        job.0,
        &ADAPTER_FILES.map(str::to_owned)[..]
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut points = Vec::new();
    for step in steps.into_iter().map(i64::unsigned_abs) {
        points.push(ResumePoint { step, files: files_of(connection, job, step).await? });
    }
    Ok(points)
}

/// Gives up the run's state in the checkpoints of a job, all or those before `newest`: nothing goes on from them.
pub(crate) async fn drop_state(connection: &mut PgConnection, job: JobId, newest: Option<u64>) -> Result<(), StoreError> {
    let dropped: Vec<String> = sqlx::query_scalar!(
        "delete from checkpoint_files f using job_checkpoints c
         where c.id = f.checkpoint_id and c.job_id = $1 and ($2::bigint is null or c.step < $2) and f.name <> all($3)
         returning f.object_key",
        job.0,
        newest.map(u64::cast_signed),
        &ADAPTER_FILES.map(str::to_owned)[..]
    )
    .fetch_all(&mut *connection)
    .await?;
    objects::disown(connection, &dropped).await
}

/// Gives up checkpoints that were there for the run alone, all or those before `newest`.
pub(crate) async fn drop_unsettled(connection: &mut PgConnection, job: JobId, newest: Option<u64>) -> Result<(), StoreError> {
    let dropped = sqlx::query_scalar!(
        "select id from job_checkpoints where job_id = $1 and not settled and ($2::bigint is null or step < $2)",
        job.0,
        newest.map(u64::cast_signed)
    )
    .fetch_all(&mut *connection)
    .await?;
    remove(connection, &dropped).await
}

/// Removes every checkpoint of a job.
pub(crate) async fn remove_all(connection: &mut PgConnection, job: JobId) -> Result<(), StoreError> {
    let all = sqlx::query_scalar!("select id from job_checkpoints where job_id = $1", job.0).fetch_all(&mut *connection).await?;
    remove(connection, &all).await
}

/// Removes checkpoints with their files.
pub(crate) async fn remove(connection: &mut PgConnection, checkpoints: &[Uuid]) -> Result<(), StoreError> {
    let keys =
        sqlx::query_scalar!("delete from checkpoint_files where checkpoint_id = any($1) returning object_key", checkpoints)
            .fetch_all(&mut *connection)
            .await?;
    objects::disown(&mut *connection, &keys).await?;
    sqlx::query!("delete from job_checkpoints where id = any($1)", checkpoints).execute(connection).await?;
    Ok(())
}

/// The files of a checkpoint that can be served; none when it cannot.
pub(crate) async fn settled_files_of(
    connection: &mut PgConnection,
    job: JobId,
    step: u64,
) -> Result<Vec<AdapterFile>, StoreError> {
    let settled =
        sqlx::query_scalar!("select settled from job_checkpoints where job_id = $1 and step = $2", job.0, step.cast_signed())
            .fetch_optional(&mut *connection)
            .await?;
    if settled == Some(true) { files_of(connection, job, step).await } else { Ok(Vec::new()) }
}

async fn files_of(connection: &mut PgConnection, job: JobId, step: u64) -> Result<Vec<AdapterFile>, StoreError> {
    let rows = sqlx::query!(
        "select f.name, f.object_key, f.bytes, f.sha256 from checkpoint_files f join job_checkpoints c on c.id = f.checkpoint_id
         where c.job_id = $1 and c.step = $2 order by f.name",
        job.0,
        step.cast_signed()
    )
    .fetch_all(connection)
    .await?;
    rows.into_iter().map(|r| Ok(AdapterFile { name: r.name, object: object_ref(r.object_key, r.bytes, &r.sha256)? })).collect()
}
