//! The words by which programs tell errors apart. A word that is not in this list is answered by nothing; in builds with assertions,
//! and so in every test, one that is made up elsewhere is a panic.

use std::borrow::Cow;

use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Each code, and what it means.
const CODES: [(&str, &str); 69] = [
    ("adapter_mismatch", "The adapter that a job goes on from has another rank, scale or modules."),
    ("alignment_set_not_found", "There is no such alignment set."),
    ("already_made", "The request was served before, and what it made is shown once."),
    ("base_model", "A base model is the operator's to delete."),
    ("busy", "The server does as much of this as it can at a time."),
    ("checksum_mismatch", "The bytes do not have the checksum that was given."),
    ("contradiction", "Two values of the request exclude each other."),
    ("duplicate_field", "A form holds a field twice."),
    ("file_in_use", "A job that has not ended needs the file."),
    ("held_back", "The safety gate keeps the adapter back."),
    ("idempotency_key_reused", "The Idempotency-Key was sent before with another body."),
    ("incomplete", "Of values that belong together one is missing."),
    ("insufficient_quota", "The project uses as much as it may."),
    ("insufficient_scope", "The key may not do this."),
    ("internal", "The server failed."),
    ("invalid_api_key", "The key is unknown, revoked or expired."),
    ("invalid_checksum", "The text is no checksum."),
    ("invalid_cursor", "`after` is no id of a list's item."),
    ("invalid_dataset", "A dataset has bad lines; they are listed."),
    ("invalid_filename", "The text cannot name a file."),
    ("invalid_form", "The multipart form cannot be read."),
    ("invalid_id", "The text is no id of this kind."),
    ("invalid_idempotency_key", "The Idempotency-Key cannot be used."),
    ("invalid_json", "The body is no JSON object."),
    ("invalid_mime_type", "The text is no media type."),
    ("invalid_name", "The text cannot be a name."),
    ("invalid_path", "The path cannot be read."),
    ("invalid_query", "A query parameter has the wrong type."),
    ("invalid_range", "The file has no such range."),
    ("invalid_state", "What is asked for cannot follow the state it is in."),
    ("invalid_suffix", "The text cannot be a part of a model's name."),
    ("invalid_suite", "A suite holds no requests, or a line that is none."),
    ("invalid_text", "A text holds a character that cannot be kept."),
    ("invalid_type", "A value has the wrong type."),
    ("invalid_url", "The URL cannot be used."),
    ("method_not_allowed", "The URL does not take the method."),
    ("missing", "A value is missing."),
    ("missing_api_key", "The request has no key."),
    ("model_in_use", "A job that has not ended goes on from the model."),
    ("name_taken", "There is something else of this name."),
    ("no_adapter", "The job has no adapter, yet or any more."),
    ("no_evidence", "There is no report or manifest, yet or any more."),
    ("no_project", "The key belongs to no project."),
    ("not_found", "There is no such thing, or it is another project's."),
    ("out_of_bounds", "A number is too small or too large."),
    ("part_not_found", "The upload has no such part."),
    ("rate_limit_exceeded", "The key has made as many requests as it may; more come with time."),
    ("receiver_unreachable", "The webhook's receiver does not answer."),
    ("safety_below_floor", "The operator's floor is higher."),
    ("suite_not_found", "There is no such suite."),
    ("template_mismatch", "The rows of an alignment set fit the template of no base model that is here."),
    ("timeout", "The request took too long."),
    ("too_large", "The body is larger than is taken."),
    ("too_long", "A text is longer than is taken."),
    ("too_many_bytes", "The parts hold far more than the upload was begun for."),
    ("too_many_parts", "The upload has as many parts as it may."),
    ("too_many_webhooks", "The project has as many webhooks as it may."),
    ("unavailable", "The database or the object store does not answer."),
    ("unknown_field", "The body has a field that is not known."),
    ("unknown_target_module", "There is no such module."),
    ("unknown_type", "There is no such event type."),
    ("unknown_url", "There is nothing at the URL."),
    ("unreadable_body", "The body ended early."),
    ("unsupported_anchor", "Lives are counted from `created_at` only."),
    ("unsupported_integration", "No integration is supported."),
    ("unsupported_method", "Only supervised fine-tuning is done."),
    ("unsupported_purpose", "Files are for fine-tuning only."),
    ("wrong_purpose", "The file is for something else."),
    ("wrong_size", "The parts do not come to the size that was given."),
];

/// Whether `code` is in the list.
pub(crate) fn is_known(code: &str) -> bool {
    CODES.binary_search_by_key(&code, |(known, _)| known).is_ok()
}

/// The list, as the contract has it.
pub(crate) struct ErrorCodes;

impl PartialSchema for ErrorCodes {
    fn schema() -> RefOr<Schema> {
        let meanings: String = CODES.iter().map(|(code, meaning)| format!("\n- `{code}`: {meaning}")).collect();
        ObjectBuilder::new()
            .schema_type(Type::String)
            .enum_values(Some(CODES.map(|(code, _)| code)))
            .description(Some(format!("A stable word for programs.\n{meanings}")))
            .into()
    }
}

impl ToSchema for ErrorCodes {
    fn name() -> Cow<'static, str> {
        "ErrorCode".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_in_order_so_that_it_can_be_searched() {
        assert!(CODES.is_sorted());
        assert!(is_known("out_of_bounds") && !is_known("something_else"));
    }
}
