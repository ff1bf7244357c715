//! Where a bundle is written to: the boundary at which tests substitute a disk that loses power.
//!
//! [`FileStorage`] keeps little in the page cache:
//! what was written is handed to the disk at once and forgotten soon, so that writing a large bundle neither pushes other
//! things out of memory nor ends in one long flush.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::error::BundleError;
use crate::page_cache::{Advice, advise};
use crate::publish::{self, NewFile, temporary_path};

/// A file while it is being written.
///
/// After [`Storage::sync`] everything written before it survives a loss of power; of what was written since the last one, any
/// part may be lost, in units of a sector.
pub trait Storage {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// What the system says.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&mut self) -> io::Result<()>;

    /// Gives the file its final name, durably. Nothing is written after it.
    ///
    /// # Errors
    /// What the system says.
    fn publish(&mut self) -> io::Result<()>;
}

/// Writes are handed to the disk in pieces of this many bytes.
const WRITE_BACK_BYTES: u64 = 8 << 20;
/// Pages this far behind the last write have long been written; they are dropped from the page cache.
const DROP_BEHIND_BYTES: u64 = 64 << 20;

/// A new file, published as [`crate::publish`] says.
#[derive(Debug)]
pub struct FileStorage {
    new: NewFile,
    /// End of what was handed to the disk.
    flushed: u64,
}

impl FileStorage {
    /// Begins a new file that will be called `path`.
    ///
    /// # Errors
    /// `Exists` if there is such a file and `overwrite` is false, `Busy` if another process writes it, `Io`.
    pub fn create(path: &Path, overwrite: bool) -> Result<Self, BundleError> {
        if path.file_name().is_none() {
            return Err(BundleError::input("output path", "a file name at its end", path.display()));
        }
        if path.is_dir() {
            let found = format!("the directory {}", path.display());
            return Err(BundleError::input("output path", "the name of a file", found));
        }
        if !overwrite && path.symlink_metadata().is_ok() {
            return Err(BundleError::Exists { path: path.to_owned() });
        }
        let new = NewFile::create(path).map_err(taking(&temporary_path(path), "create"))?;
        Ok(Self { new, flushed: 0 })
    }
}

/// Takes `file` for this process alone.
pub(super) fn lock(file: &File, path: &Path) -> Result<(), BundleError> {
    publish::lock(file, path).map_err(taking(path, "lock"))
}

/// What is said when a file cannot be taken for writing.
fn taking<'a>(path: &'a Path, action: &'static str) -> impl FnOnce(io::Error) -> BundleError + 'a {
    move |error| match error.kind() {
        io::ErrorKind::ResourceBusy => BundleError::Busy { path: path.to_owned() },
        _ => BundleError::io(action, path)(error),
    }
}

impl Storage for FileStorage {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.new.file().write_all_at(bytes, offset)?;
        let end = offset + bytes.len() as u64;
        if end >= self.flushed + WRITE_BACK_BYTES {
            // This advice starts writing dirty pages back and drops those that are clean already; failing costs only memory.
            let from = self.flushed.saturating_sub(DROP_BEHIND_BYTES);
            advise(self.new.file(), from, end - from, Advice::DontNeed);
            self.flushed = end;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.new.file().sync_all()
    }

    fn publish(&mut self) -> io::Result<()> {
        self.new.publish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            dir.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn appears_under_its_name_only_when_published() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        let mut storage = FileStorage::create(&path, false).unwrap();
        storage.write_at(3, b"abc").unwrap();
        assert_eq!(names(dir.path()), ["m.flashlm.partial"]);
        storage.sync().unwrap();
        storage.publish().unwrap();
        drop(storage);
        assert_eq!(names(dir.path()), ["m.flashlm"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"\0\0\0abc");
    }

    #[test]
    fn an_old_file_is_replaced_only_when_that_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        std::fs::write(&path, "old").unwrap();
        assert!(matches!(FileStorage::create(&path, false), Err(BundleError::Exists { .. })));
        let _writer = FileStorage::create(&path, true).unwrap();
        assert!(matches!(FileStorage::create(&path, true), Err(BundleError::Busy { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
}
