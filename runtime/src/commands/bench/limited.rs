//! A memory cgroup for a child process, below our own.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use flashlm_runtime::memory;

/// A memory cgroup with a limit, removed when it is dropped.
pub(super) struct LimitedGroup {
    dir: PathBuf,
}

impl LimitedGroup {
    /// Makes one, where that is permitted.
    pub(super) fn new(limit: u64) -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (parent, limit_file) = memory::cgroup_dir().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let group = Self { dir: parent.join(format!("flashlm-bench-{}-{number}", std::process::id())) };
        fs::create_dir(&group.dir)?;
        fs::write(group.dir.join(limit_file), limit.to_string())?;
        Ok(group)
    }

    /// The file that a process writes its id to, to join.
    pub(super) fn processes(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }
}

impl Drop for LimitedGroup {
    fn drop(&mut self) {
        _ = fs::remove_dir(&self.dir);
    }
}
