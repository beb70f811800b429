//! The poison gauge's levels: how often gradients conflict on rows that an operator knows to be clean, by base model.

use std::collections::BTreeSet;

use holdfast_domain::ids::JobId;
use holdfast_domain::{Invalid, gauge};
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::events::{self, Level};
use crate::jobs::{self, Job};
use crate::{Store, StoreError, webhooks};

/// The level of a base model.
#[derive(Debug, Clone, PartialEq)]
pub struct ConflictLevel {
    /// The base model's name.
    pub base_model: String,
    /// Above which a run is not like one on clean rows.
    pub alarm_level: f64,
    /// Runs that it was measured on.
    pub jobs: u64,
    /// When.
    pub measured_at: OffsetDateTime,
}

impl Store {
    /// The levels that were measured, by base model.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn conflict_levels(&self) -> Result<Vec<ConflictLevel>, StoreError> {
        let rows = sqlx::query!(
            "select m.name, l.alarm_level, l.jobs, l.measured_at from conflict_levels l join base_models m on m.id = l.base_model_id
             order by m.name"
        )
        .fetch_all(&self.pool)
        .await?;
        let levels = rows.into_iter().map(|r| ConflictLevel {
            base_model: r.name,
            alarm_level: r.alarm_level,
            jobs: r.jobs.unsigned_abs(),
            measured_at: r.measured_at,
        });
        Ok(levels.collect())
    }

    /// Measures the level of a base model on jobs whose rows the operator knows to be clean.
    ///
    /// # Errors
    /// When one of them is not there, is of another base or took too few steps with an alignment gradient; or the database fails.
    pub async fn measure_conflict_level(&self, base_model: &str, clean: &[JobId]) -> Result<ConflictLevel, StoreError> {
        let mut rates = Vec::new();
        for id in clean.iter().collect::<BTreeSet<_>>() {
            rates.push(self.clean_rate(base_model, *id).await?);
        }
        let level = gauge::level(&rates)
            .ok_or_else(|| Invalid::new("clean_jobs", "missing", "name at least one job whose rows are known to be clean"))?;
        let row = sqlx::query!(
            "insert into conflict_levels (base_model_id, alarm_level, jobs)
             select id, $2, $3 from base_models where name = $1
             on conflict (base_model_id) do update set alarm_level = excluded.alarm_level, jobs = excluded.jobs, measured_at = now()
             returning alarm_level, jobs, measured_at",
            base_model,
            level,
            rates.len() as i64
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::NotFound)?;
        Ok(ConflictLevel {
            base_model: base_model.to_owned(),
            alarm_level: row.alarm_level,
            jobs: row.jobs.unsigned_abs(),
            measured_at: row.measured_at,
        })
    }

    /// The level that counts for a job, `None` where none was measured, and whether the job has passed it.
    ///
    /// # Errors
    /// When there is no such job, or the database fails.
    pub async fn gauge_of(&self, job: JobId) -> Result<(Option<f64>, bool), StoreError> {
        let row = sqlx::query!(
            "select l.alarm_level as \"alarm_level?\", j.alarmed_at is not null as \"alarmed!\"
             from jobs j left join conflict_levels l on l.base_model_id = j.base_model_id where j.id = $1",
            job.0
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::NotFound)?;
        Ok((row.alarm_level, row.alarmed))
    }

    async fn clean_rate(&self, base_model: &str, id: JobId) -> Result<f64, StoreError> {
        let fault = |what: String| StoreError::from(Invalid::new("clean_jobs", "out_of_bounds", what));
        let job = match jobs::fetch(&mut *self.pool.acquire().await?, id, None).await {
            Err(StoreError::NotFound) => return Err(fault(format!("there is no job {id}"))),
            job => job?,
        };
        if job.base_model != base_model {
            return Err(fault(format!("{id} trained {:?}, not {base_model:?}", job.base_model)));
        }
        if !job.safety.defense.projects() {
            return Err(fault(format!("{id} trained with `{}`, which counts no conflicts", job.safety.defense.as_str())));
        }
        let (steps, _) = self.steps(id).await?;
        let last = steps.last().filter(|step| step.step >= gauge::LEAST_CLEAN_STEPS).and_then(|step| step.alignment.as_ref());
        last.map(|facts| facts.conflict_rate).ok_or_else(|| {
            fault(format!(
                "{id} did not take {} steps with an alignment gradient, or its figures are gone",
                gauge::LEAST_CLEAN_STEPS
            ))
        })
    }
}

/// Raises the alarm of a job whose gradients conflict too often for a run of so many steps, once.
pub(crate) async fn watch(connection: &mut PgConnection, job: &Job, step: u64, conflict_rate: f64) -> Result<(), StoreError> {
    if step < gauge::LEAST_STEPS || !job.safety.defense.projects() {
        return Ok(());
    }
    let level = sqlx::query_scalar!(
        "select coalesce(l.alarm_level, $2) as \"level!\" from jobs j left join conflict_levels l on l.base_model_id = j.base_model_id
         where j.id = $1 and j.alarmed_at is null",
        job.id.0,
        gauge::DEFAULT_LEVEL
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(threshold) = level.map(|level| gauge::threshold(level, step)).filter(|threshold| conflict_rate > *threshold) else {
        return Ok(());
    };
    sqlx::query!("update jobs set alarmed_at = now() where id = $1 and alarmed_at is null", job.id.0)
        .execute(&mut *connection)
        .await?;
    let message = format!(
        "Safety alarm: the task's gradient worked against the alignment in {:.0} % of the first {step} steps, and clean rows stay below {:.0} %; look at the rows that the safety report names",
        100.0 * conflict_rate,
        100.0 * threshold
    );
    events::message(connection, job.id, Level::Warn, &message).await?;
    webhooks::safety_alarm(connection, job).await
}
