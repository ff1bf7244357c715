//! What the hub says about a file.

use url::Url;

/// A file as the hub describes it.
pub(super) struct Remote {
    pub(super) file: String,
    pub(super) url: Url,
    /// Its name in the cache.
    pub(super) etag: String,
    pub(super) bytes: u64,
    pub(super) sha256: Option<String>,
}
