//! The hub's cache on disk, as all its clients lay it out.
//!
//! ```text
//! models--org--name/
//!     refs/main                     a commit
//!     blobs/<etag>                  contents; <etag>.incomplete while they arrive
//!     snapshots/<commit>/<file>     links to blobs
//! .locks/models--org--name/<etag>.lock
//! ```
//!
//! Where there are no symbolic links (exFAT, SMB, some FUSE), or the user wants none, a snapshot holds the files themselves: a blob
//! that was just fetched is moved there, and one that was there already, as other snapshots may want it, is copied.

use std::io;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::{Format, INDEX_BYTES_MAX, index_shards};
use flashlm_formats::publish::{NewFile, create_directory, publish_bytes, sync_name};
use flashlm_formats::regular::{open_regular, read_regular};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::remote::Remote;
use super::{HubError, ModelName, OLD_TOKENIZER, Settings};

/// Longest file that names a commit.
const REF_BYTES_MAX: u64 = 4096;

/// What the cache has of one model.
pub(super) struct Snapshots {
    repo: CacheRepo,
    dir: PathBuf,
    locks: PathBuf,
    revision: String,
    links: bool,
}

/// The files of one commit.
pub(super) struct Commit {
    id: String,
    dir: PathBuf,
    blobs: PathBuf,
    locks: PathBuf,
    /// Makes a symbolic link of this content and name; none where there are to be none.
    symlink: Option<Symlink>,
}

type Symlink = fn(&Path, &Path) -> io::Result<()>;

impl Snapshots {
    pub(super) fn new(settings: &Settings, name: &ModelName) -> Self {
        // Links are relative to it, and the current directory may be another one later.
        let root = std::path::absolute(&settings.cache).unwrap_or_else(|_| settings.cache.clone());
        let repo = Repo::with_revision(name.repo.clone(), RepoType::Model, name.revision.clone());
        let folder = repo.folder_name();
        let (dir, locks) = (root.join(&folder), root.join(".locks").join(&folder));
        Self { repo: Cache::new(root).repo(repo), dir, locks, revision: name.revision.clone(), links: settings.links }
    }

    /// The place for a commit's files.
    pub(super) fn of_commit(&self, id: &str) -> Result<Commit, HubError> {
        let commit = Commit {
            id: id.to_owned(),
            dir: self.repo.pointer_path(id),
            blobs: self.dir.join("blobs"),
            locks: self.locks.clone(),
            symlink: self.links.then_some(|target, path| std::os::unix::fs::symlink(target, path)),
        };
        for dir in [&commit.dir, &commit.blobs] {
            create_directory(dir).map_err(|e| HubError::io("create", dir, e))?;
        }
        Ok(commit)
    }

    /// Notes which commit the revision is.
    pub(super) fn name_commit(&self, id: &str) -> Result<(), HubError> {
        if self.revision == id || self.commit().as_deref() == Some(id) {
            return Ok(());
        }
        let path = self.dir.join("refs").join(&self.revision);
        let written =
            create_directory(path.parent().unwrap_or(&self.dir)).and_then(|()| publish_bytes(&path, id.as_bytes()));
        written.map_err(|e| HubError::io("write", &path, e))
    }

    /// Whether the revision is known to be this commit.
    pub(super) fn has_commit(&self, id: &str) -> bool {
        self.commit().as_deref() == Some(id)
    }

    fn commit(&self) -> Option<String> {
        let known = read_regular(&self.dir.join("refs").join(&self.revision), REF_BYTES_MAX).ok();
        let known = known.map(|text| String::from_utf8_lossy(&text).trim().to_owned());
        known.filter(|id| !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit())).or_else(|| {
            let is_commit = self.revision.len() >= 7 && self.revision.bytes().all(|b| b.is_ascii_hexdigit());
            (is_commit && self.repo.pointer_path(&self.revision).is_dir()).then(|| self.revision.clone())
        })
    }

    /// The directory of the revision, if all that is needed is there; nothing is asked of anybody.
    pub(super) fn complete(&self, name: &ModelName, settings: &Settings) -> Result<PathBuf, HubError> {
        let incomplete = |missing: Vec<String>| HubError::Offline {
            model: name.to_string(),
            cache: settings.cache.clone(),
            missing,
        };
        let Some(commit) = self.commit() else {
            return Err(incomplete(vec![format!("the whole model at revision {}", self.revision)]));
        };
        let dir = self.repo.pointer_path(&commit);
        let has = |file: &str| dir.join(file).exists();
        let mut missing: Vec<String> = Vec::new();
        if !has("config.json") {
            missing.push("config.json".into());
        }
        // vocab.json without merges.txt is half a tokenizer; none at all is for the reader to judge.
        let old = OLD_TOKENIZER.map(&has);
        if !has("tokenizer.json") && old[0] != old[1] {
            missing.push(OLD_TOKENIZER[usize::from(old[0])].into());
        }
        match Format::ALL.into_iter().find(|format| has(format.file_name())) {
            None => missing.push("the weights".into()),
            Some(format) if format.is_sharded() => {
                let json = read_regular(&dir.join(format.file_name()), INDEX_BYTES_MAX).unwrap_or_default();
                // What is wrong with an index is for the reader to say.
                missing.extend(index_shards(&json).unwrap_or_default().into_iter().filter(|shard| !has(shard)));
            }
            Some(_) => {}
        }
        if missing.is_empty() { Ok(dir) } else { Err(incomplete(missing)) }
    }
}

impl Commit {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    pub(super) fn blobs(&self) -> &Path {
        &self.blobs
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    pub(super) fn blob(&self, remote: &Remote) -> PathBuf {
        self.blobs.join(&remote.etag)
    }

    pub(super) fn part(&self, remote: &Remote) -> PathBuf {
        self.blobs.join(format!("{}.incomplete", remote.etag))
    }

    pub(super) fn lock(&self, remote: &Remote) -> PathBuf {
        self.locks.join(format!("{}.lock", remote.etag))
    }

    /// Bytes of a file that are here.
    pub(super) fn part_bytes(&self, remote: &Remote) -> u64 {
        let length = |path: PathBuf| path.metadata().map(|m| m.len()).ok();
        let here = length(self.blob(remote)).or_else(|| length(self.part(remote))).unwrap_or(0);
        if here > remote.bytes { 0 } else { here }
    }

    /// Puts a file into the snapshot, whose blob is here since long or new. Tells whether it is a link.
    pub(super) fn place(&self, file: &str, remote: &Remote, is_new: bool) -> Result<bool, HubError> {
        let path = self.path(file);
        if let Some(dir) = path.parent().filter(|dir| *dir != self.dir) {
            create_directory(dir).map_err(|e| HubError::io("create", dir, e))?;
        }
        if self.link(&path, remote)? || path.exists() {
            // What is a file already says nothing of links.
            return Ok(self.symlink.is_some());
        }
        let blob = self.blob(remote);
        if is_new {
            let moved = std::fs::rename(&blob, &path).and_then(|()| sync_name(&path));
            return moved.map(|()| false).map_err(|e| HubError::io("move a file to", &path, e));
        }
        let copied = NewFile::create(&path).and_then(|mut new| {
            io::copy(&mut open_regular(&blob)?, &mut new.file())?;
            new.publish()
        });
        copied.map(|()| false).map_err(|e| HubError::io("copy a file to", &path, e))
    }

    /// Whether there is a link to the blob now; not where the file system has none, or says it may have none.
    fn link(&self, path: &Path, remote: &Remote) -> Result<bool, HubError> {
        let Some(symlink) = self.symlink else { return Ok(false) };
        let depth = path.strip_prefix(&self.dir).map_or(1, |file| file.components().count());
        let target = Path::new(&"../".repeat(depth + 1)).join("blobs").join(&remote.etag);
        // A link to a blob that somebody deleted.
        if path.is_symlink() && !path.exists() {
            _ = std::fs::remove_file(path);
        }
        match symlink(&target, path) {
            Ok(()) => Ok(true),
            Err(error) if has_no_links(&error) || error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(HubError::io("make the link", path, error)),
        }
    }
}

/// Whether an error says that there are no symbolic links. The directory was just made or written to, so that a refusal concerns
/// the link alone.
fn has_no_links(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    matches!(error.kind(), PermissionDenied | Unsupported | InvalidInput)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote() -> Remote {
        let url = "https://hub.co/a".parse().unwrap();
        Remote { file: "a".into(), url, etag: "e".into(), bytes: 3, sha256: None }
    }

    fn commit(root: &Path, symlink: Option<Symlink>) -> Commit {
        let [dir, blobs, locks] = ["snapshots/abc", "blobs", "locks"].map(|name| root.join(name));
        [&dir, &blobs].iter().for_each(|dir| create_directory(dir).unwrap());
        Commit { id: "abc".into(), dir, blobs, locks, symlink }
    }

    #[test]
    fn a_file_system_without_links_holds_the_files_themselves() {
        let refused: Symlink = |_, _| Err(io::Error::from_raw_os_error(1));
        let remote = remote();
        for symlink in [None, Some(refused)] {
            let root = tempfile::tempdir().unwrap();
            let commit = commit(root.path(), symlink);
            std::fs::write(commit.blob(&remote), "new").unwrap();
            assert!(!commit.place("a", &remote, true).unwrap());
            assert!(!commit.path("a").is_symlink() && !commit.blob(&remote).exists());
            assert_eq!(std::fs::read(commit.path("a")).unwrap(), b"new");
            // Again, and over what is there.
            std::fs::write(commit.blob(&remote), "old").unwrap();
            commit.place("a", &remote, false).unwrap();
            assert_eq!(std::fs::read(commit.path("a")).unwrap(), b"new", "what is there stays");
            commit.place("b", &remote, false).unwrap();
            assert_eq!(std::fs::read(commit.path("b")).unwrap(), b"old");
            assert!(commit.blob(&remote).exists(), "others may want it");
        }
    }

    #[test]
    fn a_file_in_a_directory_leads_to_its_blob() {
        let root = tempfile::tempdir().unwrap();
        let commit = commit(root.path(), Some(|target, path| std::os::unix::fs::symlink(target, path)));
        let remote = remote();
        std::fs::write(commit.blob(&remote), "new").unwrap();
        assert!(commit.place("chat_templates/a", &remote, true).unwrap());
        assert_eq!(std::fs::read(commit.path("chat_templates/a")).unwrap(), b"new");
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let root = tempfile::tempdir().unwrap();
        let commit = commit(root.path(), Some(|_, _| Err(io::Error::from_raw_os_error(1))));
        let remote = remote();
        std::fs::write(commit.blob(&remote), "new").unwrap();
        std::fs::remove_dir(&commit.dir).unwrap();
        let error = commit.place("a", &remote, true).unwrap_err().to_string();
        assert!(error.contains("No such file") && !error.contains("link"), "{error}");
    }

    #[test]
    fn a_failure_is_not_taken_for_a_file_system_without_links() {
        let root = tempfile::tempdir().unwrap();
        let remote = remote();
        for (symlink, words) in [
            ((|_, _| Err(io::Error::from_raw_os_error(28))) as Symlink, "No space left"),
            (|_, _| Err(io::Error::from_raw_os_error(5)), "the disk failed"),
            (|_, _| Err(io::Error::from_raw_os_error(30)), "can be written to"),
        ] {
            let commit = commit(root.path(), Some(symlink));
            std::fs::write(commit.blob(&remote), "new").unwrap();
            let error = commit.place("a", &remote, true).unwrap_err().to_string();
            assert!(error.contains(words) && commit.blob(&remote).exists(), "{error}");
        }
    }

    #[test]
    fn a_link_to_nothing_is_made_anew() {
        let root = tempfile::tempdir().unwrap();
        let commit = commit(root.path(), Some(|target, path| std::os::unix::fs::symlink(target, path)));
        let remote = remote();
        std::os::unix::fs::symlink("../../blobs/gone", commit.path("a")).unwrap();
        std::fs::write(commit.blob(&remote), "new").unwrap();
        assert!(commit.place("a", &remote, true).unwrap());
        assert_eq!(std::fs::read_link(commit.path("a")).unwrap(), Path::new("../../blobs/e"));
        assert_eq!(std::fs::read(commit.path("a")).unwrap(), b"new");
    }
}
