//! A limit on everything a client can make large. Units stand last in the names.

/// The longest line of an uploaded dataset. A longer one is an error of that line; what is kept in memory never exceeds it.
pub const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;

/// Bad lines that are kept with their message; more are only counted.
pub const MAX_LINE_ERRORS: usize = 1_000;

/// The largest upload unless the operator sets another: 2 GiB.
pub const DEFAULT_MAX_UPLOAD_BYTES: u64 = 2 * 1024 * 1024 * 1024;

/// The largest JSON body of a request.
pub const MAX_JSON_BODY_BYTES: usize = 1024 * 1024;

/// The longest filename kept with an upload.
pub const MAX_FILENAME_BYTES: usize = 255;

/// Messages in one conversation of a dataset.
pub const MAX_MESSAGES_PER_ROW: usize = 2_000;

/// Pairs of metadata on a job, and the longest key and value in characters.
pub const MAX_METADATA_PAIRS: usize = 16;
/// Longest key of a metadata pair, in characters.
pub const MAX_METADATA_KEY_CHARS: usize = 64;
/// Longest value of a metadata pair, in characters.
pub const MAX_METADATA_VALUE_CHARS: usize = 512;

/// Longest suffix of a fine-tuned model's name, in characters.
pub const MAX_SUFFIX_CHARS: usize = 64;

/// Setbacks a job may have without progress between them before it fails.
pub const MAX_SETBACKS: i32 = 5;

/// The largest part of an upload: what clients of the public contract cut files into.
pub const MAX_PART_BYTES: u64 = 64 * 1024 * 1024;

/// Parts of one upload.
pub const MAX_PARTS_PER_UPLOAD: usize = 10_000;

/// How long an upload takes parts.
pub const UPLOAD_LIFETIME_SECONDS: u64 = 60 * 60;

/// The shortest and the longest life of a file that expires, in seconds: an hour and thirty days.
pub const FILE_LIFETIME_SECONDS: std::ops::RangeInclusive<u64> = 3_600..=2_592_000;

/// Webhooks of one project.
pub const MAX_WEBHOOKS_PER_PROJECT: i64 = 16;
