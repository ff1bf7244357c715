//! What the process really holds, and what it may hold.

use std::fs;
use std::path::{Path, PathBuf};

/// Peak memory of this process and where the figure comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeakMemory {
    /// Bytes.
    pub bytes: u64,
    /// `cgroup` where a limit is set (page cache counts), else `VmHWM`.
    pub source: &'static str,
}

/// The peak so far: the memory cgroup's where that has a limit, else the process's peak resident size.
pub fn peak() -> PeakMemory {
    if let Some(cgroup) = Cgroup::own().filter(|c| c.limit().is_some())
        && let Some(bytes) = cgroup.number(cgroup.peak_file())
    {
        return PeakMemory { bytes, source: "cgroup" };
    }
    PeakMemory { bytes: proc_bytes("/proc/self/status", "VmHWM").unwrap_or(0), source: "VmHWM" }
}

/// The process's memory cgroup, and the name of the file that a limit is written to.
pub fn cgroup_dir() -> Option<(PathBuf, &'static str)> {
    Cgroup::own().map(|cgroup| (cgroup.dir.clone(), cgroup.limit_file()))
}

/// Bytes that the process's memory cgroup allows, if it has a limit.
pub fn cgroup_limit() -> Option<u64> {
    Cgroup::own()?.limit()
}

/// Bytes that this process may take: what its memory cgroup leaves, or what the machine has available.
pub fn available() -> Option<u64> {
    let machine = proc_bytes("/proc/meminfo", "MemAvailable");
    [machine, cgroup_limit()].into_iter().flatten().min()
}

/// A line `key: n kB` of a file under `/proc`, in bytes.
fn proc_bytes(file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

struct Cgroup {
    dir: PathBuf,
    v1: bool,
}

impl Cgroup {
    fn own() -> Option<Self> {
        let lines = fs::read_to_string("/proc/self/cgroup").ok()?;
        let find = |root: &Path, path: &str, limit: &str| {
            // Inside a container the path may be relative to a root that is not mounted: then the mount itself is ours.
            let dir = root.join(path.trim_start_matches('/'));
            [dir, root.to_owned()].into_iter().find(|d| d.join(limit).exists())
        };
        for line in lines.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            if controllers.split(',').any(|c| c == "memory") {
                let dir = find(Path::new("/sys/fs/cgroup/memory"), path, "memory.limit_in_bytes")?;
                return Some(Self { dir, v1: true });
            }
            if controllers.is_empty()
                && let Some(dir) = find(Path::new("/sys/fs/cgroup"), path, "memory.max")
            {
                return Some(Self { dir, v1: false });
            }
        }
        None
    }

    fn peak_file(&self) -> &'static str {
        if self.v1 { "memory.max_usage_in_bytes" } else { "memory.peak" }
    }

    fn limit_file(&self) -> &'static str {
        if self.v1 { "memory.limit_in_bytes" } else { "memory.max" }
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.dir.join(file)).ok()?.trim().parse().ok()
    }

    fn limit(&self) -> Option<u64> {
        let limit = self.number(self.limit_file())?;
        // Version 1 says "no limit" with a number near 2^63.
        (limit < 1 << 60).then_some(limit)
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_at_least_what_we_touch() {
        let before = peak().bytes;
        let touched = vec![1u8; 64 << 20];
        assert!(touched.iter().map(|b| u64::from(*b)).sum::<u64>() == 64 << 20);
        assert!(peak().bytes >= before.max(64 << 20));
    }
}
