//! Where a bundle is written to: the seam at which tests put a disk that loses power.
//!
//! [`FileStorage`] writes a file under a temporary name and gives it its own name at the end. It keeps little in the page cache:
//! what was written is handed to the disk at once and forgotten soon, so that writing a large bundle neither pushes other
//! things out of memory nor ends in one long flush.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, FlockOperation};

use super::error::BundleError;
use crate::regular::check_replaceable;

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

/// A new file under a temporary name, `NAME.partial` beside its final one. Removed when dropped before it is published.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    published: bool,
    /// End of what was handed to the disk.
    flushed: u64,
}

impl FileStorage {
    /// Begins a new file that will be called `path`.
    ///
    /// # Errors
    /// `Exists` if there is such a file and `overwrite` is false, `Busy` if another process writes it, `Io`.
    pub fn create(path: &Path, overwrite: bool) -> Result<Self, BundleError> {
        let Some(name) = path.file_name() else {
            return Err(BundleError::input("output path", "a file name at its end", path.display()));
        };
        if path.is_dir() {
            let found = format!("the directory {}", path.display());
            return Err(BundleError::input("output path", "the name of a file", found));
        }
        if !overwrite && path.symlink_metadata().is_ok() {
            return Err(BundleError::Exists { path: path.to_owned() });
        }
        check_replaceable(path).map_err(BundleError::io("replace", path))?;
        let mut temporary_name = name.to_owned();
        temporary_name.push(".partial");
        let temporary = path.with_file_name(temporary_name);
        // A link under that name is somebody's trap: what it leads to would be emptied.
        let no_links = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).custom_flags(no_links).open(&temporary);
        let file = file.map_err(BundleError::io("create", &temporary))?;
        lock(&file, &temporary)?;
        // What an interrupted run left there is of no use.
        file.set_len(0).map_err(BundleError::io("truncate", &temporary))?;
        Ok(Self { file, temporary, path: path.to_owned(), published: false, flushed: 0 })
    }
}

/// Takes `file` for this process alone.
pub(super) fn lock(file: &File, path: &Path) -> Result<(), BundleError> {
    let busy = || BundleError::Busy { path: path.to_owned() };
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(busy()),
        // File systems without locks: two writers at once are then the user's care.
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::NOSYS | rustix::io::Errno::NOLCK) => {}
        Err(error) => return Err(BundleError::io("lock", path)(error.into())),
    }
    // Between opening and locking, the one who held the lock may have renamed or removed the file.
    let (locked, named) = (file.metadata(), path.metadata());
    match (locked, named) {
        (Ok(locked), Ok(named)) if (locked.dev(), locked.ino()) == (named.dev(), named.ino()) => Ok(()),
        _ => Err(busy()),
    }
}

impl Storage for FileStorage {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        let end = offset + bytes.len() as u64;
        if end >= self.flushed + WRITE_BACK_BYTES {
            // This advice starts writing dirty pages back and drops those that are clean already; failing costs only memory.
            let from = self.flushed.saturating_sub(DROP_BEHIND_BYTES);
            let length = std::num::NonZeroU64::new(end - from);
            let _ = rustix::fs::fadvise(&self.file, from, length, Advice::DontNeed);
            self.flushed = end;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn publish(&mut self) -> io::Result<()> {
        std::fs::rename(&self.temporary, &self.path)?;
        self.published = true;
        sync_directory(&self.path)
    }
}

/// Makes the name of `path` durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        if !self.published {
            // The lock is still held, so the name is still ours.
            let _ = std::fs::remove_file(&self.temporary);
        }
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
    fn dropping_removes_the_temporary_file_and_keeps_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        std::fs::write(&path, "old").unwrap();
        assert!(matches!(FileStorage::create(&path, false), Err(BundleError::Exists { .. })));
        let mut storage = FileStorage::create(&path, true).unwrap();
        storage.write_at(0, b"new").unwrap();
        drop(storage);
        assert_eq!(names(dir.path()), ["m.flashlm"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn a_link_under_the_temporary_name_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, precious) = (dir.path().join("m.flashlm"), dir.path().join("precious"));
        std::fs::write(&precious, "all of it").unwrap();
        std::os::unix::fs::symlink(&precious, dir.path().join("m.flashlm.partial")).unwrap();
        assert!(matches!(FileStorage::create(&path, true), Err(BundleError::Io { .. })));
        assert_eq!(std::fs::read(&precious).unwrap(), b"all of it");
    }

    #[test]
    fn takes_over_what_a_killed_writer_left_and_never_a_living_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        std::fs::write(dir.path().join("m.flashlm.partial"), "left over, and longer").unwrap();
        let mut first = FileStorage::create(&path, false).unwrap();
        assert!(matches!(FileStorage::create(&path, false), Err(BundleError::Busy { .. })));
        first.write_at(0, b"new").unwrap();
        first.publish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
    }
}
