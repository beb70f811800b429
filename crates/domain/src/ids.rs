//! Typed identifiers: a prefix that says what the thing is, and a UUID in 32 hexadecimal digits.
//!
//! Two kinds of id cannot be mixed up by the compiler, and a person who reads `ftjob-…` in a log knows what it names.
//! Drawing new ones needs a clock and randomness, so that is done elsewhere; here is only their form.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

/// Why a text is not an identifier of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected `{prefix}` followed by 32 hexadecimal digits")]
pub struct ParseIdError {
    prefix: &'static str,
}

fn parse(prefix: &'static str, text: &str) -> Result<Uuid, ParseIdError> {
    let error = ParseIdError { prefix };
    let digits = text.strip_prefix(prefix).ok_or_else(|| error.clone())?;
    // `Uuid` reads other spellings too; an id has exactly one, so that it can be compared as text.
    let canonical = digits.len() == 32 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !canonical {
        return Err(error);
    }
    Uuid::try_parse(digits).map_err(|_| error)
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Uuid);

        impl $name {
            /// What every id of this kind begins with.
            pub const PREFIX: &'static str = $prefix;
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0.simple())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse($prefix, text).map(Self)
            }
        }

        impl From<$name> for Uuid {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    };
}

id!(
    /// A project: the unit that owns files, jobs and models, and that keys belong to.
    ProjectId,
    "proj_"
);
id!(
    /// An API key's row; the key itself is never stored.
    KeyId,
    "key_"
);
id!(
    /// An uploaded file, or one the service wrote.
    FileId,
    "file-"
);
id!(
    /// A fine-tuning job.
    JobId,
    "ftjob-"
);
id!(
    /// A message or a metric of a job.
    EventId,
    "ftevent-"
);
id!(
    /// What a job had learned after some of its steps.
    CheckpointId,
    "ftckpt_"
);
id!(
    /// A person of an organisation, to whom keys belong.
    MemberId,
    "mem_"
);
id!(
    /// A file that is sent in parts.
    UploadId,
    "upload_"
);
id!(
    /// A part of an upload.
    PartId,
    "part_"
);
id!(
    /// Where a project wants to be told what happened.
    WebhookId,
    "wh_"
);
id!(
    /// Something that happened, as it is told to webhooks.
    NoticeId,
    "evt_"
);
id!(
    /// An entry of the audit log.
    AuditId,
    "audit_"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_what_it_prints() {
        let id = JobId(Uuid::from_u128(0x0192_f3a4_0000_7000_8000_0000_0000_0001));
        assert_eq!(id.to_string(), "ftjob-0192f3a4000070008000000000000001");
        assert_eq!(id.to_string().parse::<JobId>(), Ok(id));
    }

    #[test]
    fn another_prefix_or_spelling_is_refused() {
        let file = FileId(Uuid::from_u128(1)).to_string();
        assert!(file.parse::<JobId>().is_err());
        assert!(file.to_uppercase().replace("FILE-", "file-").replace('0', "A").parse::<FileId>().is_err());
        assert!("file-00000000-0000-0000-0000-000000000001".parse::<FileId>().is_err());
        assert!("file-".parse::<FileId>().is_err());
    }
}
