//! Models.

use holdfast_store::base_models::BaseModel;
use holdfast_store::fine_tuned_models::FineTunedModel;
use serde::Serialize;
use utoipa::ToSchema;

use super::list::Listed;

/// A base model, or one a job made.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Model {
    #[schema(example = "SmolLM2-135M-Instruct")]
    id: String,
    #[schema(example = "model")]
    object: &'static str,
    /// When it appeared, in Unix seconds.
    created: i64,
    /// `operator` for base models, else the organisation.
    owned_by: String,
}

impl From<BaseModel> for Model {
    fn from(row: BaseModel) -> Self {
        Self { id: row.name, object: "model", created: row.created_at.unix_timestamp(), owned_by: "operator".into() }
    }
}

impl From<FineTunedModel> for Model {
    fn from(row: FineTunedModel) -> Self {
        Self { id: row.name, object: "model", created: row.created_at.unix_timestamp(), owned_by: row.organization }
    }
}

impl Listed for Model {
    fn id(&self) -> String {
        self.id.clone()
    }
}

/// The news that a model is gone.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DeletedModel {
    #[schema(example = "ft:SmolLM2-135M-Instruct:holdfast:reviews:0192f3a4000070008000000000000001")]
    pub(crate) id: String,
    #[schema(example = "model")]
    pub(crate) object: &'static str,
    pub(crate) deleted: bool,
}
