//! What a trainer reports of a job: its phase and progress, the figures of its steps, and events for its owner.

use holdfast_domain::ids::JobId;
use holdfast_domain::progress::{Progress as Line, Step};

use crate::error::{from_json, to_json};
use crate::events::{self, Level};
use crate::jobs::Progress;
use crate::{Store, StoreError, conflict_levels};

impl Store {
    /// Writes lines a trainer reported: the phase and progress of the job, its metrics, and events for its owner.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when the worker no longer holds the job.
    pub async fn report(&self, id: JobId, attempt: i32, lines: &[Line]) -> Result<(), StoreError> {
        let (mut transaction, job) = self.hold(id, attempt).await?;
        let mut steps: Vec<&Step> = Vec::new();
        for line in lines {
            match line {
                Line::Phase { phase } => {
                    sqlx::query!("update jobs set phase = $2 where id = $1", id.0, phase.as_str())
                        .execute(&mut *transaction)
                        .await?;
                }
                Line::Started { total_steps, rows, alignment_rows, trainable_parameters } => {
                    let message = format!(
                        "Training {trainable_parameters} parameters on {rows} rows and {alignment_rows} alignment rows in {total_steps} steps"
                    );
                    events::message(&mut transaction, id, Level::Info, &message).await?;
                }
                Line::Validation { step, loss, token_accuracy } => {
                    sqlx::query!(
                        "insert into job_validations (job_id, step, loss, token_accuracy) values ($1, $2, $3, $4)
                         on conflict (job_id, step) do update set loss = excluded.loss, token_accuracy = excluded.token_accuracy",
                        id.0,
                        step.cast_signed(),
                        loss,
                        token_accuracy
                    )
                    .execute(&mut *transaction)
                    .await?;
                    let data = serde_json::json!({"step": step, "valid_loss": loss, "valid_mean_token_accuracy": token_accuracy});
                    events::metrics(&mut transaction, id, &format!("Step {step}: validation loss={loss:.4}"), data).await?;
                }
                Line::Memory(plan) => {
                    let message = format!("The run needs about {} MiB of memory", plan.total_bytes().div_ceil(1 << 20));
                    events::message(&mut transaction, id, Level::Info, &message).await?;
                }
                Line::Note { message, .. } => events::message(&mut transaction, id, Level::Warn, message).await?,
                Line::Step(step) => {
                    if steps.last().is_none_or(|last| step.step <= last.step) {
                        // What was measured from there on was given up with the steps.
                        sqlx::query!(
                            "delete from job_validations where job_id = $1 and step >= $2",
                            id.0,
                            step.step.cast_signed()
                        )
                        .execute(&mut *transaction)
                        .await?;
                    }
                    steps.push(step);
                }
                // It is kept apart, once its files are.
                Line::Checkpoint { .. } => {}
            }
        }
        if let Some(last) = steps.last() {
            let progress = Progress {
                step: last.step,
                total_steps: last.total_steps,
                tokens: last.tokens,
                tokens_per_second: last.tokens_per_second,
                eta_seconds: last.eta_seconds,
            };
            sqlx::query!("update jobs set progress = $2 where id = $1", id.0, to_json(&progress)?)
                .execute(&mut *transaction)
                .await?;
            // A run that diverges goes back: what it takes anew comes in the place of all that it took from there on.
            for retaken in steps.chunk_by(|one, next| one.step < next.step) {
                let first = retaken.first().map_or(0, |step| step.step).cast_signed();
                sqlx::query!(
                    "delete from job_metrics where job_id = $1 and attempt = $2 and first_step >= $3",
                    id.0,
                    attempt,
                    first
                )
                .execute(&mut *transaction)
                .await?;
                sqlx::query!(
                    "insert into job_metrics (job_id, attempt, first_step, steps) values ($1, $2, $3, $4)",
                    id.0,
                    attempt,
                    first,
                    to_json(&retaken)?
                )
                .execute(&mut *transaction)
                .await?;
            }
            events::metrics(&mut transaction, id, &step_message(last), step_data(last)?).await?;
            if let Some(facts) = &last.alignment {
                conflict_levels::watch(&mut transaction, &job, last.step, facts.conflict_rate).await?;
            }
        }
        Ok(transaction.commit().await?)
    }

    /// Every step of a job that was kept, in order, each as it was taken last and none from beyond where a run went back; and its
    /// measurements on the validation file: step, loss, token accuracy.
    ///
    /// # Errors
    /// When the database fails, or a row is unreadable.
    pub async fn steps(&self, id: JobId) -> Result<(Vec<Step>, Vec<(u64, f64, f64)>), StoreError> {
        let chunks = sqlx::query_scalar!("select steps from job_metrics where job_id = $1 order by attempt, first_step", id.0)
            .fetch_all(&self.pool)
            .await?;
        let mut steps = std::collections::BTreeMap::new();
        for chunk in chunks {
            let chunk = from_json::<Vec<Step>>(chunk)?;
            // What was known from there on was given up.
            if let Some(first) = chunk.first() {
                steps.split_off(&first.step);
            }
            steps.extend(chunk.into_iter().map(|step| (step.step, step)));
        }
        let validations =
            sqlx::query!("select step, loss, token_accuracy from job_validations where job_id = $1 order by step", id.0)
                .fetch_all(&self.pool)
                .await?;
        let validations = validations.into_iter().map(|r| (r.step.unsigned_abs(), r.loss, r.token_accuracy)).collect();
        Ok((steps.into_values().collect(), validations))
    }
}

fn step_message(step: &Step) -> String {
    let alignment = step.alignment.as_ref().map_or_else(String::new, |a| format!(", alignment KL={:.4}", a.align_kl));
    format!("Step {}/{}: training loss={:.4}{alignment}", step.step, step.total_steps, step.task_loss)
}

/// A step's figures under the names clients of the public contract read, with ours beside them.
fn step_data(step: &Step) -> Result<serde_json::Value, StoreError> {
    let mut data = to_json(step)?;
    data["train_loss"] = step.task_loss.into();
    data["train_mean_token_accuracy"] = step.token_accuracy.into();
    Ok(data)
}
