//! Where objects are kept, and how the store there is reached.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use object_store::signer::Signer;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use crate::StoreError;

/// How long a store may be silent in the middle of a request.
const SILENCE: Duration = Duration::from_secs(30);
/// How often, and for how long, a request that failed for no fault of its own is made again. Whoever waits longer than this does
/// so by a pause of its own: a request by an answer that says when to come again, a job by its next attempt.
const MAX_RETRIES: usize = 6;
const RETRIED_FOR: Duration = Duration::from_secs(20);

/// Where objects are kept: a folder, `file:///a/folder`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`,
/// with credentials and endpoints under the names their providers gave them (`AWS_ENDPOINT`, `AZURE_STORAGE_ACCOUNT_NAME`,
/// `GOOGLE_SERVICE_ACCOUNT`, …).
#[derive(Clone)]
pub struct ObjectLocation {
    url: String,
    options: Vec<(String, String)>,
}

impl ObjectLocation {
    /// A place that is reached with these settings.
    #[must_use]
    pub fn new(url: impl Into<String>, options: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { url: url.into(), options: options.into_iter().collect() }
    }

    /// A place that is reached with the settings in this process' environment.
    #[must_use]
    pub fn from_env(url: impl Into<String>) -> Self {
        let texts = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::new(url, texts)
    }

    /// A provider's builder with those settings whose names begin with `prefix` and that it knows.
    fn configure<Builder, Name: FromStr>(
        &self,
        prefix: &str,
        builder: Builder,
        set: fn(Builder, Name, String) -> Builder,
    ) -> Builder {
        let ours = self.options.iter().filter(|(name, _)| name.starts_with(prefix));
        ours.fold(builder, |builder, (name, value)| match name.to_ascii_lowercase().parse() {
            Ok(name) => set(builder, name, value.clone()),
            Err(_) => builder,
        })
    }

    /// How the store is talked to. An endpoint that the operator wrote with `http://` is meant so.
    fn client(&self) -> ClientOptions {
        let mut endpoints = self.options.iter().filter(|(name, _)| name.contains("ENDPOINT"));
        let plain = endpoints.any(|(_, value)| value.starts_with("http://"));
        // A whole object may take long; silence may not.
        ClientOptions::new().with_timeout_disabled().with_read_timeout(SILENCE).with_allow_http(plain)
    }

    /// The folder, where the place is one.
    ///
    /// # Errors
    /// When it looks like a URL and is none.
    pub fn folder(&self) -> Result<Option<&Path>, StoreError> {
        let (scheme, rest) = self.split()?;
        Ok((scheme == "file").then(|| Path::new(rest)))
    }

    /// The kind of store, and what is behind it.
    fn split(&self) -> Result<(&str, &str), StoreError> {
        if let Some(found) = self.url.split_once("://") {
            return Ok(found);
        }
        match self.url.split_once(':') {
            Some((word, _)) if !word.is_empty() && word.chars().all(|letter| letter.is_ascii_alphanumeric()) => {
                let message = format!("{}: is {word}:// meant? A folder of that name is written with ./ before it", self.url);
                Err(StoreError::Io(std::io::Error::new(std::io::ErrorKind::InvalidInput, message)))
            }
            _ => Ok(("file", &self.url)),
        }
    }

    /// Makes the client; nothing is sent yet.
    pub(super) fn open(&self) -> Result<Opened, StoreError> {
        let (scheme, rest) = self.split()?;
        let prefix = Key::parse(rest.split_once('/').map_or("", |(_, prefix)| prefix)).map_err(object_store::Error::from);
        let retry = RetryConfig { backoff: BackoffConfig::default(), max_retries: MAX_RETRIES, retry_timeout: RETRIED_FOR };
        Ok(match scheme {
            "file" => {
                // A row must not outlive its bytes when the power goes.
                let inner = Arc::new(LocalFileSystem::new_with_prefix(rest)?.with_fsync(true));
                Opened { inner, remote: None, prefix: Key::default(), signer: None, folder: Some(rest.into()) }
            }
            "s3" | "s3a" => {
                let builder = AmazonS3Builder::new().with_client_options(self.client()).with_retry(retry);
                let builder = self.configure("AWS_", builder, AmazonS3Builder::with_config);
                Opened::remote(builder.with_url(&self.url).build()?, prefix?)
            }
            "gs" => {
                let builder = GoogleCloudStorageBuilder::new().with_client_options(self.client()).with_retry(retry);
                let builder = self.configure("GOOGLE_", builder, GoogleCloudStorageBuilder::with_config);
                Opened::remote(builder.with_url(&self.url).build()?, prefix?)
            }
            "az" | "azure" => {
                let builder = MicrosoftAzureBuilder::new().with_client_options(self.client()).with_retry(retry);
                let builder = self.configure("AZURE_", builder, MicrosoftAzureBuilder::with_config);
                Opened::remote(builder.with_url(&self.url).build()?, prefix?)
            }
            _ => {
                let message = format!("{scheme}:// is no object store; use a folder, file://, s3://, gs:// or az://");
                return Err(StoreError::Io(std::io::Error::new(std::io::ErrorKind::InvalidInput, message)));
            }
        })
    }
}

// Among the settings are secrets.
impl std::fmt::Debug for ObjectLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObjectLocation").field("url", &self.url).finish_non_exhaustive()
    }
}

/// A store that takes an object in parts.
pub(super) trait RemoteStore: ObjectStore + MultipartStore {}

impl<Store: ObjectStore + MultipartStore> RemoteStore for Store {}

/// A store's client.
pub(super) struct Opened {
    pub(super) inner: Arc<dyn ObjectStore>,
    /// The same, where it takes parts; a folder does that otherwise.
    pub(super) remote: Option<Arc<dyn RemoteStore>>,
    /// Stands before every key.
    pub(super) prefix: Key,
    /// Makes URLs that lead past this service to an object, where the store has such.
    pub(super) signer: Option<Arc<dyn Signer>>,
    /// Where a local store keeps its files.
    pub(super) folder: Option<PathBuf>,
}

impl Opened {
    fn remote(store: impl RemoteStore + Signer, prefix: Key) -> Self {
        let inner = Arc::new(store);
        Self { signer: Some(inner.clone()), remote: Some(inner.clone()), inner, prefix, folder: None }
    }
}
