//! Atomic publication: a file appears whole under its name or not at all, whatever kills the program or the power.
//!
//! Everything is written under a temporary name, `NAME.partial`, by one process at a time; it is made durable, given its
//! name, and the name is made durable. Nothing else in the project gives files their names, but for the downloads of the hub, whose
//! temporary names are other programs' as well. What only one process needs (scratch files) has no name at all.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

/// The name that a file has until it is whole.
pub fn temporary_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// The temporary names that this process has given and not taken away yet, and the files that they were given to.
static UNDER_WAY: Mutex<Vec<(PathBuf, Metadata)>> = Mutex::new(Vec::new());

fn under_way() -> MutexGuard<'static, Vec<(PathBuf, Metadata)>> {
    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes every file of this process that is not whole; those who would begin or publish one from now on wait forever. For a
/// process that ends in the middle of its work.
pub fn abandon() {
    let names = under_way();
    for (name, file) in names.iter() {
        if name.symlink_metadata().is_ok_and(|named| is_same(&named, file)) {
            // What cannot be removed is removed by the next run.
            _ = std::fs::remove_file(name);
        }
    }
    std::mem::forget(names);
}

/// A new file under its temporary name, removed when dropped before it is published. That name is this module's alone.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    path: PathBuf,
    published: bool,
}

impl NewFile {
    /// Begins a new, empty file that will be called `path`. What an interrupted run left of it is removed.
    ///
    /// # Errors
    /// `ResourceBusy` if another process is writing it, `InvalidInput` if a pipe or a device has that name, or a link the temporary one,
    /// and whatever the system says.
    pub fn create(path: &Path) -> io::Result<Self> {
        check_replaceable(path)?;
        let temporary = temporary_path(path);
        for _ in 0..ATTEMPTS {
            remove_leftover(&temporary)?;
            match OpenOptions::new().read(true).write(true).create_new(true).open(&temporary) {
                Ok(file) => {
                    lock(&file, &temporary)?;
                    under_way().push((temporary, file.metadata()?));
                    return Ok(Self { file, path: path.to_owned(), published: false });
                }
                // Another process was quicker.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(busy())
    }

    /// The file, for writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes what was written durable and gives the file its name, durably. Nothing is written after it.
    ///
    /// # Errors
    /// What the system says.
    pub fn publish(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        if !self.is_named() {
            return Err(io::Error::other("another process took its temporary name away meanwhile"));
        }
        let temporary = temporary_path(&self.path);
        let mut names = under_way();
        std::fs::rename(&temporary, &self.path)?;
        names.retain(|(name, _)| *name != temporary);
        drop(names);
        self.published = true;
        sync_name(&self.path)
    }

    /// Whether the temporary name still leads to this file.
    fn is_named(&self) -> bool {
        let named = temporary_path(&self.path).symlink_metadata();
        named.and_then(|named| Ok(is_same(&named, &self.file.metadata()?))).unwrap_or(false)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let temporary = temporary_path(&self.path);
        let mut names = under_way();
        if !self.published && self.is_named() {
            // The lock is still held, so the name stays ours. What cannot be removed is removed by the next attempt.
            let _ = std::fs::remove_file(&temporary);
        }
        if !self.published {
            names.retain(|(name, _)| *name != temporary);
        }
    }
}

/// How often a name that others take and leave is tried.
const ATTEMPTS: usize = 8;

/// Takes away what an interrupted run left under a temporary name. It is only the name that goes: a file that has another one too,
/// as where somebody made a hard link of the source, is neither written to nor cut.
fn remove_leftover(temporary: &Path) -> io::Result<()> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    match temporary.symlink_metadata() {
        Err(error) if gone(&error) => return Ok(()),
        Ok(there) if there.is_file() => {}
        Ok(_) => {
            let what = format!("{} is not a file, and a new file has that name until it is whole", temporary.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Err(error) => return Err(error),
    }
    // What was put there in between is not followed and not waited for.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = match OpenOptions::new().read(true).write(true).custom_flags(flags).open(temporary) {
        Err(error) if gone(&error) => return Ok(()),
        opened => opened?,
    };
    lock(&file, temporary)?;
    std::fs::remove_file(temporary)
}

/// Whether two descriptions are of one file.
pub(crate) fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Refuses to put a file in place of a pipe or a device: renaming over /dev/null would take it from everybody.
fn check_replaceable(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(there) if !there.is_file() && !there.is_symlink() && !there.is_dir() => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is a pipe or a device, and no file is put in its place",
        )),
        _ => Ok(()),
    }
}

/// Writes `bytes` as the whole of `path`, in place of what may be there.
///
/// # Errors
/// As [`NewFile::create`] and [`NewFile::publish`].
pub fn publish_bytes(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = NewFile::create(path)?;
    new.file().write_all(bytes)?;
    new.publish()
}

/// Makes the directory `path`, and those above it that are missing, durably.
///
/// # Errors
/// What the system says.
pub fn create_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        // A run that was killed may have made it and told nobody. Where its parent cannot be opened, it is not ours either.
        let _ = sync_name(path);
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        create_directory(parent)?;
    }
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made?,
    }
    sync_name(path)
}

/// Makes durable what happened to the name `path`: that it came, went, or became another's.
///
/// # Errors
/// What the system says.
pub fn sync_name(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

fn busy() -> io::Error {
    io::Error::new(io::ErrorKind::ResourceBusy, "another process is writing it")
}

/// Takes `file`, which was opened as `path`, for this process alone.
///
/// # Errors
/// `ResourceBusy` if another process has it.
pub fn lock(file: &File, path: &Path) -> io::Result<()> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(busy()),
        // File systems without locks: two writers at once are then the user's care.
        // (NFS wants files to be writable for that, which directories never are.)
        Err(Errno::NOTSUP | Errno::NOSYS | Errno::NOLCK | Errno::BADF) => {}
        Err(error) => return Err(error.into()),
    }
    // Between opening and locking, the one who held the lock may have renamed or removed the file.
    let (locked, named) = (file.metadata(), path.metadata());
    match (locked, named) {
        (Ok(locked), Ok(named)) if is_same(&locked, &named) => Ok(()),
        _ => Err(busy()),
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
    fn a_file_has_its_name_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let mut new = NewFile::create(&path).unwrap();
        new.file().write_all(b"abc").unwrap();
        assert_eq!(names(dir.path()), ["a.json.partial"]);
        new.publish().unwrap();
        drop(new);
        assert_eq!(names(dir.path()), ["a.json"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
    }

    #[test]
    fn directories_are_made_where_they_are_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/c");
        create_directory(&path).unwrap();
        create_directory(&path).unwrap();
        assert!(path.is_dir());
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(create_directory(&dir.path().join("file")).is_err());
        assert!(create_directory(&dir.path().join("file/below")).is_err());
    }

    #[test]
    fn one_that_is_given_up_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        publish_bytes(&path, b"old").unwrap();
        let new = NewFile::create(&path).unwrap();
        new.file().write_all(b"new").unwrap();
        drop(new);
        assert_eq!(names(dir.path()), ["a.json"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn what_a_killed_writer_left_is_taken_over_and_never_a_living_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::fs::write(temporary_path(&path), "left over, and longer").unwrap();
        let mut first = NewFile::create(&path).unwrap();
        assert_eq!(NewFile::create(&path).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        first.file().write_all(b"new").unwrap();
        first.publish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_hard_link_under_the_temporary_name_loses_its_name_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (path, precious) = (dir.path().join("m.flashlm"), dir.path().join("precious"));
        std::fs::write(&precious, "all of it").unwrap();
        std::fs::hard_link(&precious, temporary_path(&path)).unwrap();
        publish_bytes(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&precious).unwrap(), b"all of it");
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["m.flashlm", "precious"]);
    }

    #[test]
    fn a_temporary_name_that_became_anothers_is_left_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let mut new = NewFile::create(&path).unwrap();
        std::fs::remove_file(temporary_path(&path)).unwrap();
        std::fs::write(temporary_path(&path), "theirs").unwrap();
        assert!(new.publish().is_err());
        drop(new);
        assert_eq!(names(dir.path()), ["a.json.partial"]);
    }

    #[test]
    fn links_and_devices_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (path, precious) = (dir.path().join("m.flashlm"), dir.path().join("precious"));
        std::fs::write(&precious, "all of it").unwrap();
        std::os::unix::fs::symlink(&precious, dir.path().join("m.flashlm.partial")).unwrap();
        assert!(NewFile::create(&path).is_err());
        assert_eq!(std::fs::read(&precious).unwrap(), b"all of it");
        assert_eq!(NewFile::create(Path::new("/dev/null")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
