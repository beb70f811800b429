//! Words that stand for one of several things, as the contract lists them. The values themselves come from the domain; a test
//! holds the two together.

use std::borrow::Cow;

use holdfast_domain::hyperparameters::Projection;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident: $($variant:ident)+;)*) => {
        $(
            $(#[$doc])*
            #[derive(ToSchema)]
            #[schema(rename_all = "snake_case")]
            #[expect(dead_code, reason = "describes words that come from elsewhere")]
            pub(crate) enum $name { $($variant),+ }
        )*
    };
}

words! {
    /// Where a job is in its life.
    JobStatus: ValidatingFiles Queued Running Pausing Paused Succeeded Failed Cancelled;
    /// What a worker took a job up for.
    JobWork: Check Training;
    /// How an attempt at a job ended: `set_back` and `delayed` are followed by another, the first not for ever.
    AttemptOutcome: FilesAccepted Succeeded Failed Cancelled Paused Returned SetBack Delayed;
    /// Whether a file can be used.
    FileStatus: Processed Error;
    /// Where an upload is in its life.
    UploadStatus: Pending Completed Cancelled Expired;
    /// How much an event matters.
    EventLevel: Info Warn Error;
    /// Whether an event is for people, or holds figures.
    EventType: Message Metrics;
    /// What a trainer is doing.
    JobPhase: LoadingModel AlignmentReference Training Exporting Evaluating;
    /// How training holds to the alignment.
    DefenseName: None SafeMix Lisa KlPenalty Sbr Pcgrad Safegrad Held;
    /// Over which positions the alignment loss is taken.
    KlPositionsName: Response All Deciding;
    /// Whose jobs a policy is for.
    PolicyScope: Deployment Organization Project;
    /// What a model should do with the requests of a suite: refuse them, or answer them.
    SuiteKind: Harmful Benign;
    /// Who says what an answer is: a list of what refusals say, or the model behind the operator's endpoint.
    JudgeName: Phrases Endpoint;
    /// What becomes of an adapter that does not pass: it is kept apart, or the best checkpoint that passes is published in its place.
    OtherwiseName: Quarantine PublishCheckpoint;
    /// Whose gradient is projected.
    ProjectionName: Batch PerRow;
    /// Where the projection takes place.
    ProjectionSpaceName: Gradient Update;
    /// At which weights the alignment gradient is taken.
    AlignmentPointName: Current Lookahead;
    /// How the learning rate moves after the warm-up.
    LrScheduleName: Constant Linear Cosine;
    /// What becomes of rows longer than `max_length`.
    LongRowsName: Error Truncate;
    /// In what numbers the frozen base computes.
    PrecisionName: F32 Bf16;
    /// What the backward pass computes again instead of keeping it.
    ActivationCheckpointingName: Nothing FeedForward Layers;
}

/// A linear map of a decoder layer.
pub(crate) struct TargetModule;

impl PartialSchema for TargetModule {
    fn schema() -> RefOr<Schema> {
        let description = "A linear map of a decoder layer.";
        let names = Projection::ALL.map(Projection::as_str);
        ObjectBuilder::new().schema_type(Type::String).enum_values(Some(names)).description(Some(description)).into()
    }
}

impl ToSchema for TargetModule {
    fn name() -> Cow<'static, str> {
        "TargetModule".into()
    }
}

#[cfg(test)]
mod tests {
    use holdfast_domain::evaluation::Kind;
    use holdfast_domain::hyperparameters::{LongRows, LrSchedule, Precision, Recompute};
    use holdfast_domain::job::{AttemptEnd, Status};
    use holdfast_domain::policy::{Judge, Otherwise, Scope};
    use holdfast_domain::progress::Phase;
    use holdfast_domain::safety::{AlignmentPoint, Defense, KlPositions, ProjectionOf, ProjectionSpace};
    use serde::Serialize;
    use serde_json::{Value, json};

    use super::*;

    fn listed<T: PartialSchema>() -> Value {
        serde_json::to_value(T::schema()).expect("a schema")["enum"].clone()
    }

    fn written(words: &[impl Serialize]) -> Value {
        json!(words)
    }

    #[test]
    fn the_contract_lists_the_words_that_are_written() {
        assert_eq!(listed::<JobStatus>(), written(&Status::ALL));
        assert_eq!(listed::<AttemptOutcome>(), json!(AttemptEnd::ALL.map(AttemptEnd::as_str)));
        assert_eq!(listed::<DefenseName>(), written(&Defense::ALL));
        assert_eq!(
            listed::<JobPhase>(),
            written(&[Phase::LoadingModel, Phase::AlignmentReference, Phase::Training, Phase::Exporting, Phase::Evaluating])
        );
        assert_eq!(listed::<KlPositionsName>(), written(&[KlPositions::Response, KlPositions::All, KlPositions::Deciding]));
        assert_eq!(listed::<PolicyScope>(), written(&[Scope::Deployment, Scope::Organization, Scope::Project]));
        assert_eq!(listed::<SuiteKind>(), written(&Kind::ALL));
        assert_eq!(listed::<JudgeName>(), written(&[Judge::Phrases, Judge::Endpoint]));
        assert_eq!(listed::<OtherwiseName>(), written(&[Otherwise::Quarantine, Otherwise::PublishCheckpoint]));
        assert_eq!(listed::<ProjectionName>(), written(&[ProjectionOf::Batch, ProjectionOf::PerRow]));
        assert_eq!(listed::<ProjectionSpaceName>(), written(&[ProjectionSpace::Gradient, ProjectionSpace::Update]));
        assert_eq!(listed::<AlignmentPointName>(), written(&[AlignmentPoint::Current, AlignmentPoint::Lookahead]));
        assert_eq!(listed::<LrScheduleName>(), written(&[LrSchedule::Constant, LrSchedule::Linear, LrSchedule::Cosine]));
        assert_eq!(listed::<LongRowsName>(), written(&[LongRows::Error, LongRows::Truncate]));
        assert_eq!(listed::<PrecisionName>(), written(&[Precision::F32, Precision::Bf16]));
        assert_eq!(
            listed::<ActivationCheckpointingName>(),
            written(&[Recompute::Nothing, Recompute::FeedForward, Recompute::Layers])
        );
    }
}
