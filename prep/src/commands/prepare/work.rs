//! The work directory: what earlier runs left, and what it was made from.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flashlm_formats::bundle::checksum;
use flashlm_formats::destination::{DestinationError, Directory, DirectoryKind};
use flashlm_formats::publish::{create_directory, sync_name};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::publish;

/// Name of the file in a stage's directory that says what the stage is made from.
const MADE_FROM: &str = "made-from";

/// Intermediate files of one bundle, for this process alone.
pub(super) struct Work {
    pub(super) dir: PathBuf,
    _taken: Directory,
}

impl Work {
    /// Uses `dir`, which need not be there; a directory of anything else is refused.
    pub(super) fn open(dir: &Path, inputs: &[PathBuf]) -> Result<Self, DestinationError> {
        let taken = Directory::take(dir, DirectoryKind::Work, inputs)?;
        Ok(Work { dir: dir.to_owned(), _taken: taken })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The directory of a stage. What other inputs left in it is removed.
    pub(super) fn stage(&self, name: &str, made_from: &str) -> Result<PathBuf> {
        let dir = self.path(name);
        let stamp = dir.join(MADE_FROM);
        if fs::read(&stamp).is_ok_and(|found| found == made_from.as_bytes()) {
            return Ok(dir);
        }
        // The stamp first: half a directory must not be taken for a whole one.
        if fs::remove_file(&stamp).is_ok() {
            sync_name(&stamp).with_context(|| format!("cannot empty {}", dir.display()))?;
        }
        self.clear(name)?;
        create_directory(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        publish(&stamp, made_from.as_bytes())?;
        Ok(dir)
    }

    /// Whether a step that leaves no files here was finished with these inputs.
    pub(super) fn is_done(&self, step: &str, made_from: &str) -> bool {
        fs::read(self.path(&format!("{step}.done"))).is_ok_and(|found| found == made_from.as_bytes())
    }

    /// Says that it was.
    pub(super) fn done(&self, step: &str, made_from: &str) -> Result<()> {
        publish(&self.path(&format!("{step}.done")), made_from.as_bytes())
    }

    /// Says that it was not.
    pub(super) fn undo(&self, step: &str) -> Result<()> {
        self.clear(&format!("{step}.done"))
    }

    /// Removes a file or directory, if it is there.
    pub(super) fn clear(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        // Durably: a mark that came back after a loss of power would speak for what is written from now on.
        match removed.and_then(|()| sync_name(&path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// [`publish`] of JSON.
pub(super) fn publish_json(path: &Path, value: &impl Serialize) -> Result<()> {
    publish(path, &serde_json::to_vec_pretty(value)?)
}

/// What [`publish_json`] wrote, if it is there.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// A short name for inputs.
pub(super) fn fingerprint(parts: &[&str]) -> String {
    format!("{:016x}", checksum(parts.join("|").as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_kept_for_the_same_inputs_and_emptied_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let work = Work::open(&dir.path().join("work"), &[]).unwrap();
        let stage = work.stage("orders", "a").unwrap();
        fs::write(stage.join("x"), "1").unwrap();
        assert!(work.stage("orders", "a").unwrap().join("x").exists());
        assert!(!work.stage("orders", "b").unwrap().join("x").exists());
        // Without a stamp nothing is trusted.
        fs::write(stage.join("x"), "1").unwrap();
        fs::remove_file(stage.join(MADE_FROM)).unwrap();
        assert!(!work.stage("orders", "b").unwrap().join("x").exists());

        assert!(!work.is_done("pack", "a"));
        work.done("pack", "a").unwrap();
        assert!(work.is_done("pack", "a") && !work.is_done("pack", "b"));
        work.undo("pack").unwrap();
        work.undo("pack").unwrap();
        assert!(!work.is_done("pack", "a"));
    }
}
