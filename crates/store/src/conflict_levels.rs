//! The poison gauge's levels: how often gradients conflict on rows that an operator knows to be clean, by base model and method.

use std::collections::BTreeSet;

use holdfast_domain::gauge::{self, Clean};
use holdfast_domain::ids::JobId;
use holdfast_domain::{Invalid, Safety};
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::events::{self, Level};
use crate::jobs::Job;
use crate::{Store, StoreError, webhooks};

/// What was measured of a base model under a method.
#[derive(Debug, Clone, PartialEq)]
pub struct ConflictLevel {
    /// The base model's name.
    pub base_model: String,
    /// The method.
    pub defense: String,
    /// The positions its KL covers.
    pub kl_positions: String,
    /// How often gradients conflict.
    pub clean: Clean,
    /// Runs that it was measured on.
    pub jobs: u64,
    /// When.
    pub measured_at: OffsetDateTime,
}

impl Store {
    /// The levels that were measured, by base model and method.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn conflict_levels(&self) -> Result<Vec<ConflictLevel>, StoreError> {
        let rows = sqlx::query!(
            "select m.name, c.defense, c.kl_positions, c.mean, c.spread, c.steps, c.jobs, c.measured_at
             from clean_conflicts c join base_models m on m.id = c.base_model_id order by m.name, c.defense, c.kl_positions"
        )
        .fetch_all(&self.pool)
        .await?;
        let levels = rows.into_iter().map(|r| ConflictLevel {
            base_model: r.name,
            defense: r.defense,
            kl_positions: r.kl_positions,
            clean: Clean { mean: r.mean, spread: r.spread, steps: r.steps.unsigned_abs() },
            jobs: r.jobs.unsigned_abs(),
            measured_at: r.measured_at,
        });
        Ok(levels.collect())
    }

    /// Measures the level of a base model under a method, on jobs of both whose rows the operator knows to be clean.
    ///
    /// # Errors
    /// When one of them is not there, is of another base or method than the others or took too few steps with an alignment gradient; or the
    /// database fails.
    pub async fn measure_conflict_level(&self, base_model: &str, clean: &[JobId]) -> Result<ConflictLevel, StoreError> {
        let mut runs = Vec::new();
        let mut method = None;
        for id in clean.iter().collect::<BTreeSet<_>>() {
            let (safety, run) = self.clean_run(base_model, *id).await?;
            let own = method_of(&safety);
            if *method.get_or_insert(own) != own {
                let message = "the jobs trained with several methods, or KL positions; measure those of each by themselves";
                return Err(Invalid::new("clean_jobs", "contradiction", message).into());
            }
            runs.push(run);
        }
        let (Some(clean), Some((defense, kl_positions))) = (Clean::of(&runs), method) else {
            return Err(Invalid::new("clean_jobs", "missing", "name at least one job whose rows are known to be clean").into());
        };
        let row = sqlx::query!(
            "insert into clean_conflicts (base_model_id, defense, kl_positions, mean, spread, steps, jobs)
             select id, $2, $3, $4, $5, $6, $7 from base_models where name = $1
             on conflict (base_model_id, defense, kl_positions) do update
             set mean = excluded.mean, spread = excluded.spread, steps = excluded.steps, jobs = excluded.jobs, measured_at = now()
             returning jobs, measured_at",
            base_model,
            defense,
            kl_positions,
            clean.mean,
            clean.spread,
            clean.steps.cast_signed(),
            runs.len() as i64
        )
        .fetch_optional(&self.pool)
        .await?
        .ok_or(StoreError::NotFound)?;
        Ok(ConflictLevel {
            base_model: base_model.to_owned(),
            defense: defense.to_owned(),
            kl_positions: kl_positions.to_owned(),
            clean,
            jobs: row.jobs.unsigned_abs(),
            measured_at: row.measured_at,
        })
    }

    /// What was measured for jobs like this one, `None` where nothing was, and whether the job has raised its alarm.
    ///
    /// # Errors
    /// When there is no such job, or the database fails.
    pub async fn gauge_of(&self, job: &Job) -> Result<(Option<Clean>, bool), StoreError> {
        let mut connection = self.pool.acquire().await?;
        let alarmed = sqlx::query_scalar!("select alarmed_at is not null as \"alarmed!\" from jobs where id = $1", job.id.0)
            .fetch_optional(&mut *connection)
            .await?
            .ok_or(StoreError::NotFound)?;
        Ok((clean_of(&mut connection, job).await?, alarmed))
    }

    /// What a job trained with, and its rate and steps.
    async fn clean_run(&self, base_model: &str, id: JobId) -> Result<(Safety, (f64, u64)), StoreError> {
        let fault = |what: String| StoreError::from(Invalid::new("clean_jobs", "out_of_bounds", what));
        let job = match self.job_for_operator(id).await {
            Err(StoreError::NotFound) => return Err(fault(format!("there is no job {id}"))),
            job => job?,
        };
        if job.base_model != base_model {
            return Err(fault(format!("{id} trained {:?}, not {base_model:?}", job.base_model)));
        }
        if !job.safety.defense.projects() {
            return Err(fault(format!("{id} trained with `{}`, which counts no conflicts", job.safety.defense.as_str())));
        }
        if let Some(choice) = job.safety.variant() {
            return Err(fault(format!("{id} chose another {choice} than the usual, by which conflicts are others")));
        }
        let (steps, _) = self.steps(id).await?;
        let last = steps.last().filter(|step| step.step >= gauge::LEAST_CLEAN_STEPS);
        let run = last.and_then(|step| Some((step.alignment.as_ref()?.conflict_rate, step.step)));
        let run = run.ok_or_else(|| {
            fault(format!(
                "{id} did not take {} steps with an alignment gradient, or its figures are gone",
                gauge::LEAST_CLEAN_STEPS
            ))
        })?;
        Ok((job.safety, run))
    }
}

/// What a level is measured by, beside the base: the method, and the positions of its KL.
const fn method_of(safety: &Safety) -> (&'static str, &'static str) {
    (safety.defense.as_str(), safety.kl_positions.as_str())
}

/// What was measured for jobs like this one: none that projects in a way of its own is.
async fn clean_of(connection: &mut PgConnection, job: &Job) -> Result<Option<Clean>, StoreError> {
    if job.safety.variant().is_some() {
        return Ok(None);
    }
    let (defense, kl_positions) = method_of(&job.safety);
    let row = sqlx::query!(
        "select c.mean, c.spread, c.steps from clean_conflicts c join base_models m on m.id = c.base_model_id
         where m.name = $1 and c.defense = $2 and c.kl_positions = $3",
        job.base_model,
        defense,
        kl_positions
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|r| Clean { mean: r.mean, spread: r.spread, steps: r.steps.unsigned_abs() }))
}

/// Raises the alarm of a job whose gradients conflict too often for a run of so many steps, once.
pub(crate) async fn watch(connection: &mut PgConnection, job: &Job, step: u64, conflict_rate: f64) -> Result<(), StoreError> {
    if step < gauge::LEAST_STEPS || !job.safety.defense.projects() {
        return Ok(());
    }
    let threshold = clean_of(connection, job).await?.unwrap_or(Clean::UNMEASURED).threshold(step);
    if conflict_rate <= threshold {
        return Ok(());
    }
    let raised = sqlx::query!("update jobs set alarmed_at = now() where id = $1 and alarmed_at is null", job.id.0)
        .execute(&mut *connection)
        .await?;
    if raised.rows_affected() == 0 {
        return Ok(());
    }
    tracing::warn!(job = %job.id, step, conflict_rate, threshold, "a job raised the alarm of the poison gauge");
    let message = format!(
        "Safety alarm: the task's gradient worked against the alignment in {:.0} % of the first {step} steps, and clean rows stay below {:.0} %; look at the rows that the safety report names",
        100.0 * conflict_rate,
        100.0 * threshold
    );
    events::message(connection, job.id, Level::Warn, &message).await?;
    webhooks::safety_alarm(connection, job).await
}
