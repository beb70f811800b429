//! Projects.

use holdfast_domain::ids::ProjectId;
use holdfast_domain::model_name;

use crate::{Store, StoreError, new_id};

/// The organisation of every project until an operator names another.
const ORGANIZATION: &str = "holdfast";

impl Store {
    /// The project of this name, made when there is none.
    ///
    /// # Errors
    /// When the name cannot be used, or the database fails.
    pub async fn ensure_project(&self, name: &str) -> Result<ProjectId, StoreError> {
        model_name::check(name)?;
        // The update changes nothing; it makes the row come back when it was there before.
        let id = sqlx::query_scalar!(
            "insert into projects (id, name, organization) values ($1, $2, $3)
             on conflict (name) do update set name = excluded.name returning id",
            new_id(),
            name,
            ORGANIZATION
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(ProjectId(id))
    }
}
