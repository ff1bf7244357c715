//! A memory cgroup for a child process, below our own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use flashlm::memory;

/// What the names of these groups begin with; the id of the process that made the group follows.
const PREFIX: &str = "flashlm-bench-";

/// A memory cgroup with a limit, removed when it is dropped.
pub(super) struct LimitedGroup {
    dir: PathBuf,
}

impl LimitedGroup {
    /// Makes one, where that is permitted.
    pub(super) fn new(limit: u64) -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (parent, limit_file) = memory::cgroup_dir().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        remove_left_over(&parent, Path::new("/proc"));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let group = Self { dir: parent.join(format!("{PREFIX}{}-{number}", std::process::id())) };
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

/// Removes the groups below `parent` whose makers were killed: `processes` has no directory for them any more. A group that still
/// holds a process is not removed by the kernel.
fn remove_left_over(parent: &Path, processes: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let maker = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if maker.is_some_and(|maker| !processes.join(maker.to_string()).exists()) {
            _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_dead_processes_go_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (parent, processes) = (dir.path().join("groups"), dir.path().join("proc"));
        for name in ["flashlm-bench-7-0", "flashlm-bench-8-1", "flashlm-bench-x", "other-7-0"] {
            fs::create_dir_all(parent.join(name)).unwrap();
        }
        fs::create_dir_all(processes.join("8")).unwrap();
        remove_left_over(&parent, &processes);
        let mut left: Vec<_> = parent.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["flashlm-bench-8-1", "flashlm-bench-x", "other-7-0"]);
    }
}
