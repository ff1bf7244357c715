//! Files appear whole or not at all: temporary name, fsync, rename, fsync of the directory.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{RecordingError, sync_dir};

/// The name a file has until it is whole.
pub(super) fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(".tmp");
    name.into()
}

/// Makes a file written under its temporary name visible under `path`.
pub(super) fn publish_file(file: &File, path: &Path) -> Result<(), RecordingError> {
    file.sync_all().map_err(|e| RecordingError::io(path, e))?;
    std::fs::rename(temporary_path(path), path).map_err(|e| RecordingError::io(path, e))?;
    sync_dir(path)
}

/// Writes `bytes` as the whole of `path`.
pub(super) fn publish_bytes(path: &Path, bytes: &[u8]) -> Result<(), RecordingError> {
    let temporary = temporary_path(path);
    let mut file = File::create(&temporary).map_err(|e| RecordingError::io(&temporary, e))?;
    file.write_all(bytes).map_err(|e| RecordingError::io(&temporary, e))?;
    publish_file(&file, path)
}
