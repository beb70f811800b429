//! Bytes for a client: whole or a range of them, with an ETag, so that a download that broke goes on where it was.

use std::ops::{Bound, Range};

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream, TryStreamExt};
use headers::{AcceptRanges, ContentLength, ContentRange, ETag, HeaderMapExt, IfNoneMatch, IfRange};
use holdfast_store::{Objects, StoreError};
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, StatusCode};

use crate::ApiError;

/// A stretch of what is downloaded.
#[derive(Debug, Clone)]
pub(crate) enum Segment {
    /// Bytes that are here.
    Here(Bytes),
    /// An object.
    Object {
        /// Its key.
        key: String,
        /// Its length.
        bytes: u64,
    },
}

impl Segment {
    fn len(&self) -> u64 {
        match self {
            Self::Here(bytes) => bytes.len() as u64,
            Self::Object { bytes, .. } => *bytes,
        }
    }
}

/// Something that is downloaded under a name.
#[derive(Debug, Clone)]
pub(crate) struct Download {
    pub(crate) segments: Vec<Segment>,
    pub(crate) media_type: &'static str,
    pub(crate) filename: String,
    /// The hash of what it is: the same bytes, the same tag.
    pub(crate) sha256: [u8; 32],
}

impl Download {
    fn len(&self) -> u64 {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Answers a request with these `headers`.
    pub(crate) fn answer(self, objects: &Objects, headers: &HeaderMap) -> Result<Response, ApiError> {
        let tag: ETag = format!("\"{}\"", hex::encode(self.sha256)).parse().map_err(|e| ApiError::internal(&e))?;
        let total = self.len();
        let mut answer = HeaderMap::new();
        answer.typed_insert(tag.clone());
        answer.typed_insert(AcceptRanges::bytes());
        if headers.typed_get::<IfNoneMatch>().is_some_and(|known| !known.precondition_passes(&tag)) {
            return Ok((StatusCode::NOT_MODIFIED, answer).into_response());
        }
        answer.insert(CONTENT_TYPE, HeaderValue::from_static(self.media_type));
        let disposition = format!("attachment; filename=\"{}\"", self.filename);
        if let Ok(value) = HeaderValue::from_str(&disposition) {
            answer.insert(CONTENT_DISPOSITION, value);
        }
        // A condition that cannot be read does not hold.
        let holds = |condition: IfRange| !condition.is_modified(Some(&tag), None);
        let is_same = !headers.contains_key(IF_RANGE) || headers.typed_get::<IfRange>().is_some_and(holds);
        let range = if is_same { wanted(headers, total)? } else { None };
        let (status, range) = match range {
            Some(range) => {
                let said = ContentRange::bytes(range.clone(), total).map_err(|e| ApiError::internal(&e))?;
                answer.typed_insert(said);
                (StatusCode::PARTIAL_CONTENT, range)
            }
            None => (StatusCode::OK, 0..total),
        };
        answer.typed_insert(ContentLength(range.end - range.start));
        Ok((status, answer, Body::from_stream(self.read(objects.clone(), range))).into_response())
    }

    /// The bytes `range` of it. Objects are opened one after the other.
    fn read(self, objects: Objects, range: Range<u64>) -> BoxStream<'static, Result<Bytes, StoreError>> {
        let mut begin = 0;
        let parts = self.segments.into_iter().filter_map(move |segment| {
            let length = segment.len();
            let (from, to) = (range.start.saturating_sub(begin).min(length), range.end.saturating_sub(begin).min(length));
            begin += length;
            (from < to).then_some((segment, from..to))
        });
        stream::iter(parts)
            .then(move |(segment, range)| {
                let objects = objects.clone();
                async move {
                    let pieces: BoxStream<'static, Result<Bytes, StoreError>> = match segment {
                        Segment::Here(bytes) => {
                            let range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
                            let piece = range.and_then(|(from, to)| (to <= bytes.len()).then(|| bytes.slice(from..to)));
                            stream::iter(piece.map(Ok)).boxed()
                        }
                        Segment::Object { key, .. } => objects.read_range(&key, range).await?.map_err(StoreError::from).boxed(),
                    };
                    Ok::<_, StoreError>(pieces)
                }
            })
            .try_flatten()
            .boxed()
    }
}

/// The range a request asks for. Several at once are answered with everything, as the standard allows.
fn wanted(headers: &HeaderMap, total: u64) -> Result<Option<Range<u64>>, ApiError> {
    let Some(asked) = headers.typed_get::<headers::Range>() else { return Ok(None) };
    // The last bytes of something shorter are all of it.
    let suffix = headers.get(RANGE).and_then(|value| value.to_str().ok()?.strip_prefix("bytes=-")?.parse::<u64>().ok());
    if suffix.is_some_and(|last| last >= total && total > 0) {
        return Ok(Some(0..total));
    }
    let mut ranges = asked.satisfiable_ranges(total);
    let Some(first) = ranges.next() else { return Err(ApiError::no_such_range(total)) };
    if ranges.next().is_some() {
        return Ok(None);
    }
    let start = match first.0 {
        Bound::Included(at) => at,
        Bound::Excluded(at) => at.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match first.1 {
        Bound::Included(at) => at.saturating_add(1).min(total),
        Bound::Excluded(at) => at.min(total),
        Bound::Unbounded => total,
    };
    if start >= end { Err(ApiError::no_such_range(total)) } else { Ok(Some(start..end)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(value: &'static str) -> Result<Option<Range<u64>>, u16> {
        let mut headers = HeaderMap::new();
        headers.insert("range", HeaderValue::from_static(value));
        wanted(&headers, 100).map_err(|e| e.into_response().status().as_u16())
    }

    #[test]
    fn ranges_are_read_as_the_standard_has_them() {
        assert_eq!(range("bytes=0-9"), Ok(Some(0..10)));
        assert_eq!(range("bytes=90-"), Ok(Some(90..100)));
        assert_eq!(range("bytes=-5"), Ok(Some(95..100)));
        assert_eq!(range("bytes=-500"), Ok(Some(0..100)));
        assert_eq!(range("bytes=50-1000"), Ok(Some(50..100)));
        assert_eq!(range("bytes=0-1,5-6"), Ok(None));
        assert_eq!(range("bytes=100-"), Err(416));
        assert_eq!(range("lines=1-2"), Ok(None));
    }
}
