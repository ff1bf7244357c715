//! Ctrl-C and termination, at every stage: the process ends at once and removes its incomplete files.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use flashlm::signals;
use flashlm_formats::publish;
use tempfile::TempDir;

/// How soon a signal is followed.
const STEP: Duration = Duration::from_millis(20);

/// How often it is tried to remove a directory.
const REMOVALS: usize = 100;

/// The directory that is removed whatever ends the process, but for a signal that nobody can follow.
static SCRATCH: Mutex<Option<PathBuf>> = Mutex::new(None);

/// A directory for this command's own files.
pub(crate) struct Scratch(TempDir);

impl Scratch {
    /// Makes the directory; a command has one at most.
    pub(crate) fn new() -> Result<Self> {
        let made = tempfile::Builder::new().prefix("flashlm-").tempdir().context("cannot make a scratch directory")?;
        *scratch() = Some(made.path().to_owned());
        Ok(Self(made))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        *scratch() = None;
    }
}

fn scratch() -> MutexGuard<'static, Option<PathBuf>> {
    SCRATCH.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on a signal ends the process with its exit code; `goes_on`: the command, given again, continues with what it left. To
/// be called once, before there is anything to lose.
pub(crate) fn watch(goes_on: bool) -> Result<()> {
    signals::watch().context("cannot watch for Ctrl-C")?;
    // Files cannot be removed in a handler, and the work does not look at a flag while it hashes, trains or waits for the hub.
    let follow = move || {
        loop {
            if let Some(code) = signals::asked() {
                publish::abandon();
                if let Some(dir) = scratch().take() {
                    // The work goes on, and may be writing there.
                    (0..REMOVALS).any(|_| std::fs::remove_dir_all(&dir).is_ok());
                }
                let next = if goes_on { "; the same command resumes from here" } else { "" };
                eprintln!("flashlm-prep: interrupted; incomplete files are removed, downloads are kept{next}");
                std::process::exit(code.into());
            }
            std::thread::sleep(STEP);
        }
    };
    if std::thread::Builder::new().name("signals".into()).spawn(follow).is_err() {
        // Without it an unfinished file keeps its temporary name until the next run.
        signals::end_at_once(true);
    }
    Ok(())
}
