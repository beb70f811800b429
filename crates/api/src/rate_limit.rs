//! How many requests a key may make: a bucket that fills evenly and holds a minute's worth, for each key in each process.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use holdfast_domain::ids::KeyId;
use http::{HeaderMap, HeaderValue};

use crate::ApiError;

type Bucket = RateLimiter<NotKeyed, InMemoryState, DefaultClock, StateInformationMiddleware>;

/// The buckets of the keys that have called.
#[derive(Debug, Default)]
pub(crate) struct RateLimits(Mutex<HashMap<KeyId, (NonZeroU32, Arc<Bucket>)>>);

/// Buckets that are remembered; one that is forgotten is full again.
const REMEMBERED: usize = 100_000;

/// What is left to a key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowance {
    limit: u32,
    remaining: u32,
}

impl Allowance {
    /// Says it in the headers that clients of the public contract read.
    pub(crate) fn say(self, headers: &mut HeaderMap) {
        headers.insert("x-ratelimit-limit-requests", HeaderValue::from(self.limit));
        headers.insert("x-ratelimit-remaining-requests", HeaderValue::from(self.remaining));
    }
}

impl RateLimits {
    /// Takes one request out of the key's bucket of `per_minute`; without a limit there is no bucket.
    pub(crate) fn take(&self, key: KeyId, per_minute: Option<u32>) -> Result<Option<Allowance>, ApiError> {
        let Some(limit) = per_minute.and_then(NonZeroU32::new) else { return Ok(None) };
        let bucket = {
            let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if buckets.len() >= REMEMBERED {
                buckets.clear();
            }
            match buckets.get(&key) {
                Some((known, bucket)) if *known == limit => Arc::clone(bucket),
                _ => {
                    let bucket = RateLimiter::direct(Quota::per_minute(limit)).with_middleware::<StateInformationMiddleware>();
                    let bucket = Arc::new(bucket);
                    buckets.insert(key, (limit, Arc::clone(&bucket)));
                    bucket
                }
            }
        };
        match bucket.check() {
            Ok(state) => Ok(Some(Allowance { limit: limit.get(), remaining: state.remaining_burst_capacity() })),
            Err(early) => {
                let wait = early.wait_time_from(DefaultClock::default().now());
                Err(ApiError::too_many_requests(limit.get(), wait.max(Duration::from_millis(1))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_domain::ids::KeyId;

    use super::*;

    #[test]
    fn a_key_has_its_share_and_another_key_its_own() {
        let (limits, key) = (RateLimits::default(), KeyId(uuid::Uuid::from_u128(1)));
        for _ in 0..3 {
            assert!(limits.take(key, Some(3)).is_ok());
        }
        assert!(limits.take(key, Some(3)).is_err());
        assert!(limits.take(KeyId(uuid::Uuid::from_u128(2)), Some(3)).is_ok());
        assert!(limits.take(key, None).is_ok(), "no limit, no bucket");
    }
}
