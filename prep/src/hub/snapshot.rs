//! The hub's cache on disk, as all its clients lay it out.
//!
//! ```text
//! models--org--name/
//!     refs/main                     a commit
//!     blobs/<etag>                  contents; <etag>.incomplete while they arrive
//!     snapshots/<commit>/<file>     links to blobs
//! .locks/models--org--name/<etag>.lock
//! ```

use std::io;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::{Format, INDEX_BYTES_MAX, index_shards};
use flashlm_formats::publish::create_directory;
use flashlm_formats::regular::read_regular;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::download::Remote;
use super::{HubError, ModelName, OLD_TOKENIZER, Settings};

/// Longest file that names a commit.
const REF_BYTES_MAX: u64 = 4096;

/// What the cache has of one model.
pub(super) struct Snapshots {
    repo: CacheRepo,
    dir: PathBuf,
    locks: PathBuf,
    revision: String,
}

/// The files of one commit.
pub(super) struct Commit {
    id: String,
    dir: PathBuf,
    blobs: PathBuf,
    locks: PathBuf,
}

impl Snapshots {
    pub(super) fn new(settings: &Settings, name: &ModelName) -> Self {
        // Links are relative to it, and the current directory may be another one later.
        let root = std::path::absolute(&settings.cache).unwrap_or_else(|_| settings.cache.clone());
        let repo = Repo::with_revision(name.repo.clone(), RepoType::Model, name.revision.clone());
        let folder = repo.folder_name();
        let (dir, locks) = (root.join(&folder), root.join(".locks").join(&folder));
        Self { repo: Cache::new(root).repo(repo), dir, locks, revision: name.revision.clone() }
    }

    /// The place for a commit's files.
    pub(super) fn of_commit(&self, id: &str) -> Result<Commit, HubError> {
        let commit = Commit {
            id: id.to_owned(),
            dir: self.repo.pointer_path(id),
            blobs: self.dir.join("blobs"),
            locks: self.locks.clone(),
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
        self.repo.create_ref(id).map_err(|e| HubError::io("write", &self.dir.join("refs").join(&self.revision), e))
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

    /// Puts a file, whose blob is here, into the snapshot.
    pub(super) fn link(&self, file: &str, remote: &Remote) -> Result<(), HubError> {
        let path = self.path(file);
        let target = Path::new("../../blobs").join(&remote.etag);
        let failed = |e| HubError::io("link", &path, e);
        match std::os::unix::fs::symlink(&target, &path) {
            // A link to a blob that somebody deleted.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && !path.exists() => {
                std::fs::remove_file(&path).and_then(|()| std::os::unix::fs::symlink(&target, &path)).map_err(failed)
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result.map_err(failed),
        }
    }
}
