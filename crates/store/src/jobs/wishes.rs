//! What owners want of jobs that are there: that they end, rest or go on.

use holdfast_domain::ids::{JobId, ProjectId};
use holdfast_domain::job::{AttemptEnd, JobState, Status};
use sqlx::Connection;

use super::{Job, fetch, lock, write_state};
use crate::events::{self, Level};
use crate::once::{self, Once, Repetition};
use crate::{Store, StoreError, attempts, queue};

impl Store {
    /// Ends a job at its owner's word. A worker that runs it finds its lease gone and stops.
    ///
    /// # Errors
    /// When the project has no such job, it has ended already, or the database fails.
    pub async fn cancel_job(&self, project: ProjectId, id: JobId, once: Option<&Once>) -> Result<Job, StoreError> {
        self.change_job(project, id, once, "The job was cancelled", JobState::cancel).await
    }

    /// Lets a job wait for its owner. One that trains first writes a checkpoint.
    ///
    /// # Errors
    /// When the project has no such job, it has ended or is paused already, or the database fails.
    pub async fn pause_job(&self, project: ProjectId, id: JobId, once: Option<&Once>) -> Result<Job, StoreError> {
        self.change_job(project, id, once, "The job is paused at its owner's word", JobState::pause).await
    }

    /// Lets a paused job wait for a worker again.
    ///
    /// # Errors
    /// When the project has no such job, it is not paused, or the database fails.
    pub async fn resume_job(&self, project: ProjectId, id: JobId, once: Option<&Once>) -> Result<Job, StoreError> {
        self.change_job(project, id, once, "The job was resumed and waits for a worker", JobState::resume).await
    }

    async fn change_job(
        &self,
        project: ProjectId,
        id: JobId,
        once: Option<&Once>,
        message: &str,
        change: impl FnOnce(JobState) -> Result<JobState, holdfast_domain::job::InvalidTransition>,
    ) -> Result<Job, StoreError> {
        let mut connection = self.tenant(project).await?;
        let mut transaction = connection.begin().await?;
        let job = lock(&mut transaction, id, Some(project)).await?;
        let next = match change(job.state.clone()) {
            Ok(next) => next,
            Err(error) => {
                // A try after the first, which has done it.
                let is_done = once.is_some_and(|once| once.repetition == Repetition::Retry)
                    || once::admit(&mut transaction, once, id.0).await?.is_some();
                // Dropped alone, it would be rolled back some time later, and hide the job from workers until then.
                transaction.rollback().await?;
                return if is_done { Ok(job) } else { Err(error.into()) };
            }
        };
        let named = once.filter(|once| once.repetition == Repetition::Named);
        if once::admit(&mut transaction, named, id.0).await?.is_some() {
            transaction.rollback().await?;
            return Ok(job);
        }
        write_state(&mut transaction, &job, &next).await?;
        // One that is pausing stays its worker's until the checkpoint is written.
        match next.status() {
            Status::Pausing => {}
            Status::Cancelled => attempts::end(&mut transaction, id, AttemptEnd::Cancelled, Some(message)).await?,
            _ => attempts::end(&mut transaction, id, AttemptEnd::Paused, Some(message)).await?,
        }
        events::message(&mut transaction, id, Level::Info, message).await?;
        queue::notify(&mut transaction).await?;
        let changed = fetch(&mut transaction, id, Some(project)).await?;
        transaction.commit().await?;
        Ok(changed)
    }
}
