//! Multipart forms: read as streams, their bytes staged while they come.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use axum::extract::multipart::{Field, Multipart, MultipartError, MultipartRejection};
use holdfast_domain::limits::{FILE_LIFETIME_SECONDS, MAX_FILENAME_BYTES};
use holdfast_store::ObjectRef;
use holdfast_store::objects::ObjectWriter;
use http::StatusCode;

use crate::{ApiError, extract};

/// A form field other than the file is a word.
const MAX_FIELD_BYTES: usize = 256;
/// Fields of a form.
const MAX_FIELDS: usize = 32;

/// After how long a file must come with at least so many bytes a second, all in all: less is no upload, but a connection held.
const PATIENCE: Duration = Duration::from_secs(60);
const LEAST_BYTES_PER_SECOND: u64 = 1024;

/// The form of a request.
pub(crate) struct Form {
    form: Multipart,
    fields: usize,
}

impl Form {
    pub(crate) fn new(form: Result<Multipart, MultipartRejection>) -> Result<Self, ApiError> {
        let form =
            form.map_err(|e| ApiError::malformed("invalid_form", format!("expected multipart/form-data: {}", e.body_text())))?;
        Ok(Self { form, fields: 0 })
    }

    /// The next field.
    pub(crate) async fn next(&mut self) -> Result<Option<Field<'_>>, ApiError> {
        self.fields += 1;
        if self.fields > MAX_FIELDS {
            return Err(ApiError::malformed("invalid_form", format!("the form has more than {MAX_FIELDS} fields")));
        }
        self.form.next_field().await.map_err(|e| unreadable(&e))
    }
}

/// Writes a field's bytes, at most `max_bytes`, handing each piece to `each` on the way. Whatever ends it early, the object is
/// given up.
pub(crate) async fn store(
    mut field: Field<'_>,
    mut writer: ObjectWriter,
    max_bytes: u64,
    too_large: impl FnOnce() -> ApiError,
    mut each: impl FnMut(&[u8]),
) -> Result<ObjectRef, ApiError> {
    let mut bytes = 0;
    let since = Instant::now();
    let copied = loop {
        if since.elapsed().saturating_sub(PATIENCE).as_secs().saturating_mul(LEAST_BYTES_PER_SECOND) > bytes {
            break Err(ApiError::timeout());
        }
        match field.chunk().await {
            Ok(None) => break Ok(()),
            Ok(Some(chunk)) => {
                bytes += chunk.len() as u64;
                if bytes > max_bytes {
                    break Err(too_large());
                }
                each(&chunk);
                if let Err(error) = writer.write(&chunk).await {
                    break Err(error.into());
                }
            }
            Err(error) => break Err(unreadable(&error)),
        }
    };
    match copied {
        Ok(()) => Ok(writer.finish().await?),
        Err(error) => {
            writer.abort().await;
            Err(error)
        }
    }
}

/// A field that is a word.
pub(crate) async fn word(mut field: Field<'_>) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(|e| unreadable(&e))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_FIELD_BYTES {
            let name: String = field.name().unwrap_or_default().chars().take(MAX_FIELD_BYTES).collect();
            let message = format!("a form field other than the file has at most {MAX_FIELD_BYTES} bytes");
            return Err(ApiError::invalid(name, "too_long", message));
        }
    }
    String::from_utf8(bytes).map_err(|_| ApiError::malformed("invalid_form", "a form field is not UTF-8"))
}

/// The last part of what the client calls a file.
pub(crate) fn filename(param: &str, sent: Option<&str>) -> Result<String, ApiError> {
    let name = sent.and_then(|name| name.rsplit(['/', '\\']).next()).unwrap_or_default();
    let usable = !matches!(name, "" | "." | "..") && name.len() <= MAX_FILENAME_BYTES && !name.chars().any(char::is_control);
    if usable {
        return Ok(name.to_owned());
    }
    let message = format!("the file needs a name of 1 to {MAX_FILENAME_BYTES} bytes without control characters");
    Err(ApiError::invalid(param, "invalid_filename", message))
}

/// Makes sure that files are uploaded for what this service does.
pub(crate) fn purpose(sent: Option<&str>) -> Result<String, ApiError> {
    match sent {
        Some(PURPOSE) => Ok(PURPOSE.to_owned()),
        Some(_) => Err(ApiError::invalid("purpose", "unsupported_purpose", "purpose must be \"fine-tune\"")),
        None => Err(ApiError::invalid("purpose", "missing", "the form has no field `purpose`; it must be \"fine-tune\"")),
    }
}

/// The one purpose a client may upload for.
const PURPOSE: &str = "fine-tune";

/// How long a file is to be kept.
pub(crate) fn lifetime(anchor: Option<&str>, seconds: Option<u64>) -> Result<Option<Duration>, ApiError> {
    const BOUNDS: RangeInclusive<u64> = FILE_LIFETIME_SECONDS;
    match (anchor, seconds) {
        (None, None) => Ok(None),
        (Some("created_at"), Some(seconds)) if BOUNDS.contains(&seconds) => Ok(Some(Duration::from_secs(seconds))),
        (Some("created_at"), Some(_)) => {
            let message = format!("expires_after.seconds must be a whole number from {} to {}", BOUNDS.start(), BOUNDS.end());
            Err(ApiError::invalid("expires_after.seconds", "out_of_bounds", message))
        }
        (None, Some(_)) | (Some(_), None) => {
            let message = "expires_after takes an anchor and seconds, both";
            Err(ApiError::invalid("expires_after", "incomplete", message))
        }
        _ => {
            let message = "expires_after.anchor must be \"created_at\"";
            Err(ApiError::invalid("expires_after.anchor", "unsupported_anchor", message))
        }
    }
}

fn unreadable(error: &MultipartError) -> ApiError {
    if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return ApiError::too_large(error.body_text());
    }
    extract::unreadable(error, "invalid_form", "the multipart form ends early or is malformed")
}
