//! What the process really holds, and what it may hold.
//!
//! A limit says little by itself: others take from it too, and one that stands higher up counts as well. What may be taken is the
//! smallest of what is left, of the machine and of every memory cgroup from the process's own up to the root.

mod cgroups;

use std::fmt;
use std::fs;
use std::path::PathBuf;

use crate::budget::human_bytes;
use crate::error::{Result, RuntimeError};
use cgroups::Cgroups;

/// The most memory that was held, by this process and by its memory cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeakMemory {
    /// Bytes of this process: its peak resident size, which the system calls `VmHWM`.
    pub bytes: u64,
    /// Those of them that are pages of the program's own file, as far as they are still there. The system maps some that are
    /// never used, and shares all of them with whoever else runs the program.
    pub program_bytes: u64,
    /// Bytes of the process's memory cgroup, where a limit holds for it: page cache counts, and so does what others in it took,
    /// before and meanwhile.
    pub cgroup_bytes: Option<u64>,
}

/// The peak so far.
pub fn peak() -> PeakMemory {
    System::real().peak()
}

/// The process's memory cgroup, and the name of the file that a limit is written to.
pub fn cgroup_dir() -> Option<(PathBuf, &'static str)> {
    let cgroups = System::real().cgroups()?;
    let own = cgroups.own()?;
    Some((own.dir.clone(), own.limit_file()))
}

/// What a process may take, and what leaves it no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes for the whole process, with what it holds already.
    pub bytes: u64,
    /// Why it is not more.
    pub bound: Bound,
}

/// What bounds a process's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// What the machine has available.
    Machine,
    /// A memory cgroup: the process's own, or one above it.
    Cgroup {
        /// Its directory.
        dir: PathBuf,
        /// Bytes that it allows.
        limit: u64,
        /// Bytes of it that others hold, without what the kernel would give back.
        others: u64,
    },
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::Machine => write!(f, "what the machine has available"),
            Bound::Cgroup { dir, limit, others } => write!(
                f,
                "memory cgroup {}: {} allowed, {} of it in use by others",
                dir.display(),
                human_bytes(*limit),
                human_bytes(*others)
            ),
        }
    }
}

/// What there is to take.
pub fn room() -> Option<Room> {
    System::real().room()
}

/// Bytes that a run takes when it is not told: what there is, less a reserve for what grows meanwhile.
pub fn available() -> Option<u64> {
    room().map(|room| room.bytes - reserve(room.bytes))
}

/// The smallest limit of all memory cgroups that hold the process, and whose it is.
pub fn cgroup_limit() -> Option<(u64, PathBuf)> {
    System::real().cgroup_limit()
}

/// An error if a memory cgroup ends the process before it holds `budget`.
pub fn check_budget(budget: u64) -> Result<()> {
    match cgroup_limit() {
        // Limits are kept in whole pages, of up to 64 KiB.
        Some((limit, cgroup)) if budget >= limit.saturating_add(64 << 10) => {
            Err(RuntimeError::BudgetAboveLimit { budget, limit, cgroup })
        }
        _ => Ok(()),
    }
}

/// What is left alone: a sixteenth, at most half a GiB.
fn reserve(bytes: u64) -> u64 {
    (bytes / 16).min(512 << 20)
}

/// Where the system says what memory there is: `/proc` and what it says is mounted, below a root.
struct System {
    root: PathBuf,
}

impl System {
    fn real() -> Self {
        Self { root: "/".into() }
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    fn cgroups(&self) -> Option<Cgroups> {
        Cgroups::of_process(&self.root)
    }

    /// A line `key: n kB` of a file under `/proc`, in bytes.
    fn proc_bytes(&self, file: &str, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.path(file)).ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    }

    fn peak(&self) -> PeakMemory {
        let of_process = |key| self.proc_bytes("/proc/self/status", key).unwrap_or(0);
        let limited = self.cgroups().filter(|cgroups| cgroups.iter().any(|c| c.limit().is_some()));
        PeakMemory {
            bytes: of_process("VmHWM"),
            program_bytes: of_process("RssFile"),
            cgroup_bytes: limited.and_then(|cgroups| cgroups.own()?.peak()),
        }
    }

    fn cgroup_limit(&self) -> Option<(u64, PathBuf)> {
        let cgroups = self.cgroups()?;
        cgroups.iter().filter_map(|c| Some((c.limit()?, c.dir.clone()))).min_by_key(|(limit, _)| *limit)
    }

    fn room(&self) -> Option<Room> {
        // What this process holds already is part of its budget, and of everybody's figures.
        let own = self.proc_bytes("/proc/self/status", "RssAnon").unwrap_or(0);
        let machine = self
            .proc_bytes("/proc/meminfo", "MemAvailable")
            .map(|bytes| Room { bytes: bytes.saturating_add(own), bound: Bound::Machine });
        let cgroups = self.cgroups();
        let cgroups = cgroups.iter().flat_map(Cgroups::iter).filter_map(|cgroup| {
            let limit = cgroup.soft_limit()?;
            let others = cgroup.working_set().saturating_sub(own);
            let bound = Bound::Cgroup { dir: cgroup.dir.clone(), limit, others };
            Some(Room { bytes: limit.saturating_sub(others), bound })
        });
        machine.into_iter().chain(cgroups).min_by_key(|room| room.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system made of files: each as `path: contents`.
    fn system(files: &[(&str, &str)]) -> (tempfile::TempDir, System) {
        let dir = tempfile::tempdir().unwrap();
        let system = System { root: dir.path().to_owned() };
        for (path, text) in files {
            let path = system.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        (dir, system)
    }

    const MEMINFO: (&str, &str) = ("/proc/meminfo", "MemTotal: 900000 kB\nMemAvailable:   800000 kB\n");
    const STATUS: (&str, &str) =
        ("/proc/self/status", "VmHWM:\t  30000 kB\nRssAnon:\t   10000 kB\nRssFile:\t    4000 kB\n");
    fn peak(cgroup_bytes: Option<u64>) -> PeakMemory {
        PeakMemory { bytes: 30_000 * 1024, program_bytes: 4000 * 1024, cgroup_bytes }
    }

    const V2: (&str, &str) = (
        "/proc/self/mountinfo",
        "22 1 0:21 / /sys rw - sysfs sysfs rw\n30 22 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    );
    const V1: (&str, &str) = (
        "/proc/self/mountinfo",
        "31 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n32 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    );

    #[test]
    fn without_cgroups_the_machine_counts() {
        let (_dir, system) = system(&[MEMINFO, STATUS]);
        assert_eq!(system.room(), Some(Room { bytes: (800_000 + 10_000) * 1024, bound: Bound::Machine }));
        assert_eq!(system.cgroup_limit(), None);
        assert_eq!(system.peak(), peak(None));
        let nothing = System { root: "/nonexistent".into() };
        assert_eq!((nothing.room(), nothing.cgroup_limit(), nothing.peak().bytes), (None, None, 0));
    }

    #[test]
    fn version_2_counts_every_group_up_to_the_root() {
        let slice = "/sys/fs/cgroup/user.slice";
        let (_dir, system) = system(&[
            MEMINFO,
            STATUS,
            V2,
            ("/proc/self/cgroup", "0::/user.slice/session.scope\n"),
            // The root has no limit file; the own group has none set; the slice in between has one, and others in it.
            (&format!("{slice}/memory.max"), "300000000\n"),
            (&format!("{slice}/memory.high"), "max\n"),
            (&format!("{slice}/memory.current"), "160000000\n"),
            (&format!("{slice}/memory.stat"), "anon 1\nfile 2\ninactive_file 40000000\nactive_file 5\n"),
            (&format!("{slice}/session.scope/memory.max"), "max\n"),
            (&format!("{slice}/session.scope/memory.high"), "max\n"),
            (&format!("{slice}/session.scope/memory.current"), "20000000\n"),
            (&format!("{slice}/session.scope/memory.peak"), "25000000\n"),
            (&format!("{slice}/session.scope/memory.stat"), "inactive_file 0\n"),
        ]);
        let dir = system.path(slice);
        let others = 160_000_000 - 40_000_000 - 10_000 * 1024;
        let bound = Bound::Cgroup { dir: dir.clone(), limit: 300_000_000, others };
        assert_eq!(system.room(), Some(Room { bytes: 300_000_000 - others, bound }));
        assert_eq!(system.cgroup_limit(), Some((300_000_000, dir.clone())));
        assert_eq!(system.peak(), peak(Some(25_000_000)));
        // From `memory.high` on everything in the group is slowed to a crawl.
        fs::write(dir.join("memory.high"), "200000000").unwrap();
        assert_eq!(system.room().unwrap().bytes, 200_000_000 - others);
        assert_eq!(system.cgroup_limit().unwrap().0, 300_000_000);
        // The own group's limit, where it leaves less.
        fs::write(dir.join("session.scope/memory.max"), "50000000").unwrap();
        assert_eq!(system.room().unwrap().bytes, 50_000_000 - (20_000_000 - 10_000 * 1024));
        // More in use than is allowed leaves nothing, and no overflow.
        fs::write(dir.join("memory.current"), "900000000").unwrap();
        assert_eq!(system.room().unwrap().bytes, 0);
    }

    #[test]
    fn version_1_counts_parents_and_what_is_not_seen_of_them() {
        let job = "/sys/fs/cgroup/memory/jobs/7";
        let unlimited = "9223372036854771712";
        let (_dir, system) = system(&[
            MEMINFO,
            STATUS,
            V1,
            ("/proc/self/cgroup", "9:name=systemd:/x\n4:memory:/jobs/7\n0::/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", unlimited),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "700000000"),
            ("/sys/fs/cgroup/memory/memory.stat", "total_inactive_file 1\n"),
            ("/sys/fs/cgroup/memory/jobs/memory.limit_in_bytes", "100000000"),
            ("/sys/fs/cgroup/memory/jobs/memory.usage_in_bytes", "60000000"),
            ("/sys/fs/cgroup/memory/jobs/memory.stat", "inactive_file 1\ntotal_inactive_file 20000000\n"),
            (&format!("{job}/memory.limit_in_bytes"), unlimited),
            (&format!("{job}/memory.usage_in_bytes"), "30000000"),
            (&format!("{job}/memory.max_usage_in_bytes"), "33000000"),
            (&format!("{job}/memory.stat"), "hierarchical_memory_limit 100000000\ntotal_inactive_file 0\n"),
        ]);
        let others = 60_000_000 - 20_000_000 - 10_000 * 1024;
        assert_eq!(system.room().unwrap().bytes, 100_000_000 - others);
        assert_eq!(system.cgroup_limit(), Some((100_000_000, system.path("/sys/fs/cgroup/memory/jobs"))));
        assert_eq!(system.peak(), peak(Some(33_000_000)));
        // A group above that is not mounted here: only its limit is known.
        fs::write(system.path(job).join("memory.stat"), "hierarchical_memory_limit 45000000\ntotal_inactive_file 0\n")
            .unwrap();
        assert_eq!(system.cgroup_limit(), Some((45_000_000, system.path(job))));
        assert_eq!(system.room().unwrap().bytes, 45_000_000 - (30_000_000 - 10_000 * 1024));
        // A parent that does not count its children does not bound them.
        fs::write(system.path(job).join("memory.stat"), "").unwrap();
        fs::write(system.path("/sys/fs/cgroup/memory/jobs/memory.use_hierarchy"), "0").unwrap();
        assert_eq!(system.cgroup_limit(), None);
        assert_eq!(system.room().unwrap().bound, Bound::Machine);
    }

    #[test]
    fn in_a_container_the_mount_is_the_own_group() {
        for (root, own) in [("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/", "/../../elsewhere")] {
            let mount = format!("32 30 0:29 {root} /sys/fs/cgroup/mem\\040ory ro - cgroup cgroup rw,memory\n");
            let (_dir, system) = system(&[
                MEMINFO,
                ("/proc/self/mountinfo", &mount),
                ("/proc/self/cgroup", &format!("4:memory:{own}\n")),
                ("/sys/fs/cgroup/mem ory/memory.limit_in_bytes", "70000000"),
                ("/sys/fs/cgroup/mem ory/memory.usage_in_bytes", "1000000"),
            ]);
            assert_eq!(system.room().unwrap().bytes, 69_000_000, "{root} {own}");
        }
    }

    #[test]
    fn a_reserve_is_left() {
        assert_eq!(reserve(160), 10);
        assert_eq!(reserve(1 << 40), 512 << 20);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_is_at_least_what_we_touch() {
        let before = super::peak().bytes;
        let touched = vec![1u8; 64 << 20];
        assert!(touched.iter().map(|b| u64::from(*b)).sum::<u64>() == 64 << 20);
        assert!(super::peak().bytes >= before.max(64 << 20));
        let room = room().unwrap();
        assert!(room.bytes >= 64 << 20 && available().unwrap() < room.bytes * 2, "{room:?}");
    }
}
