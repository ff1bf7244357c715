//! Checkpoints that lie: each lie is a typed error that says what was expected and found, and none is a panic.

mod archives;
mod configurations;
mod damage;
mod directories;
mod weights;

use std::fs;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::{Checkpoint, CheckpointError};
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures")
}

fn fixture(path: &str) -> Vec<u8> {
    fs::read(fixtures().join(path)).unwrap()
}

/// A directory with these files beside the configuration of opt-125m.
fn directory<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), fixture("quirks/opt-125m/config.json")).unwrap();
    for (name, content) in files {
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn open(dir: &TempDir) -> CheckpointError {
    Checkpoint::open(dir.path()).expect_err("a lie was believed")
}

fn open_with(name: &str, content: &[u8]) -> CheckpointError {
    open(&directory([(name, content)]))
}

/// Every message names a file or directory, and says more than that.
fn check_message(error: &CheckpointError) {
    let message = error.to_string();
    assert!(message.len() > 30 && message.contains('/'), "{message}");
}
