//! How fast workers train, as the latest runs of each kind measured it: what estimates are made from.

use holdfast_domain::hyperparameters::Precision;
use holdfast_domain::safety::Defense;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::jobs::Job;
use crate::{Store, StoreError};

/// A measured speed, and how like the wanted run the measured one was.
#[derive(Debug, Clone)]
pub struct Speed {
    /// Tokens of the training file in a second.
    pub tokens_per_second: f64,
    /// The base model it was measured on.
    pub base_model: String,
    /// Numbers in that model.
    pub parameter_count: u64,
    /// Where it was measured.
    pub device: String,
    /// In what numbers.
    pub precision: String,
    /// Under which method.
    pub defense: String,
}

impl Store {
    /// The measured speed that is most like a run of `base_model`: of the same base, precision and method before others. `None`
    /// when no worker has finished a run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn speed_like(
        &self,
        base_model: &str,
        precision: Precision,
        defense: Defense,
    ) -> Result<Option<Speed>, StoreError> {
        let row = sqlx::query!(
            "select s.tokens_per_second, m.name, m.parameter_count, s.device, s.precision, s.defense
             from training_speeds s join base_models m on m.id = s.base_model_id
             order by (m.name = $1) desc, (s.precision = $2) desc, (s.defense = $3) desc, s.measured_at desc limit 1",
            base_model,
            word(&precision),
            defense.as_str()
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|r| Speed {
            tokens_per_second: r.tokens_per_second,
            base_model: r.name,
            parameter_count: r.parameter_count.unsigned_abs(),
            device: r.device,
            precision: r.precision,
            defense: r.defense,
        }))
    }
}

/// Keeps the speed of a run that ended, if it reported one.
pub(crate) async fn keep(connection: &mut PgConnection, job: &Job, base_model: Uuid, device: &str) -> Result<(), StoreError> {
    let mean = sqlx::query_scalar!(
        "select avg((s ->> 'tokens_per_second')::double precision) from job_metrics m, jsonb_array_elements(m.steps) s
         where m.job_id = $1 and (s ->> 'tokens_per_second')::double precision > 0",
        job.id.0
    )
    .fetch_one(&mut *connection)
    .await?;
    let Some(tokens_per_second) = mean else { return Ok(()) };
    sqlx::query!(
        "insert into training_speeds (base_model_id, device, precision, defense, tokens_per_second) values ($1, $2, $3, $4, $5)
         on conflict (base_model_id, device, precision, defense) do update
             set tokens_per_second = excluded.tokens_per_second, measured_at = now()",
        base_model,
        device,
        word(&job.hyperparameters.precision),
        job.safety.defense.as_str(),
        tokens_per_second
    )
    .execute(connection)
    .await?;
    Ok(())
}

fn word(precision: &Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}
