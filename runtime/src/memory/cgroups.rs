//! The memory cgroups that hold this process, from its own up to the root of what is mounted; versions 1 and 2.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// One memory cgroup.
pub(super) struct Cgroup {
    pub(super) dir: PathBuf,
    v1: bool,
    /// Limit of a group above that is not seen from here, as this one tells it.
    inherited: Option<u64>,
}

/// The process's own group first, then those above it.
pub(super) struct Cgroups(Vec<Cgroup>);

impl Cgroups {
    /// Those of the running process, in a system whose root directory is `root`.
    pub(super) fn of_process(root: &Path) -> Option<Self> {
        let read = |path: &str| fs::read_to_string(root.join(path)).ok();
        let (memberships, mounts) = (read("proc/self/cgroup")?, read("proc/self/mountinfo")?);
        memberships.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, own) = (fields.next()?, fields.next()?);
            let v1 = controllers.split(',').any(|c| c == "memory");
            if !v1 && !controllers.is_empty() {
                return None;
            }
            let mount = mounts.lines().filter_map(Mount::parse).find(|mount| mount.is_memory(v1))?;
            let top = root.join(mount.point.trim_start_matches('/'));
            let groups = Self::up_to(&top, &mount.inside(own), v1);
            // Version 2 may be mounted beside version 1, without a say on memory.
            (!groups.0.is_empty()).then_some(groups)
        })
    }

    fn up_to(top: &Path, inside: &Path, v1: bool) -> Self {
        let own = top.join(inside);
        let own = if own.is_dir() { own } else { top.to_owned() };
        let mut groups = Vec::new();
        for dir in own.ancestors().take_while(|dir| dir.starts_with(top)) {
            let group = Cgroup { dir: dir.to_owned(), v1, inherited: None };
            // In version 1 a group may keep no account of those below it.
            if v1 && !groups.is_empty() && group.number("memory.use_hierarchy") == Some(0) {
                break;
            }
            if dir.join(group.limit_file()).exists() {
                groups.push(group);
            }
        }
        // The own group repeats the smallest limit above it. That counts where the group whose limit it is cannot be seen.
        let seen = groups.iter().filter_map(Cgroup::limit).min().unwrap_or(u64::MAX);
        if let Some(own) = groups.first_mut() {
            own.inherited = own.statistic("hierarchical_memory_limit").and_then(finite).filter(|limit| *limit < seen);
        }
        Self(groups)
    }

    pub(super) fn own(&self) -> Option<&Cgroup> {
        self.0.first()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Cgroup> {
        self.0.iter()
    }
}

impl Cgroup {
    pub(super) fn limit_file(&self) -> &'static str {
        if self.v1 { "memory.limit_in_bytes" } else { "memory.max" }
    }

    /// Bytes beyond which the kernel ends a process of the group, if there is a limit.
    pub(super) fn limit(&self) -> Option<u64> {
        self.inherited.or_else(|| self.number(self.limit_file()).and_then(finite))
    }

    /// Bytes beyond which the group is slowed down, or has to end.
    pub(super) fn soft_limit(&self) -> Option<u64> {
        [self.limit(), self.number("memory.high")].into_iter().flatten().min()
    }

    /// Bytes in use by the group and those below it, without file pages that the kernel drops first.
    pub(super) fn working_set(&self) -> u64 {
        let (usage, inactive) = match self.v1 {
            true => ("memory.usage_in_bytes", "total_inactive_file"),
            false => ("memory.current", "inactive_file"),
        };
        self.number(usage).unwrap_or(0).saturating_sub(self.statistic(inactive).unwrap_or(0))
    }

    /// The most that the group ever used, where the kernel keeps that.
    pub(super) fn peak(&self) -> Option<u64> {
        self.number(if self.v1 { "memory.max_usage_in_bytes" } else { "memory.peak" })
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.dir.join(file)).ok()?.trim().parse().ok()
    }

    fn statistic(&self, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.dir.join("memory.stat")).ok()?;
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
    }
}

/// Version 1 says "no limit" with a number near 2^63.
fn finite(limit: u64) -> Option<u64> {
    (limit < 1 << 60).then_some(limit)
}

/// A line of `/proc/self/mountinfo`.
struct Mount {
    /// What of the file system is mounted.
    root: String,
    /// Where.
    point: String,
    kind: String,
    options: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (place, what) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let mut what = what.split(' ');
        Some(Self {
            root: unescaped(place.next()?),
            point: unescaped(place.next()?),
            kind: what.next()?.to_owned(),
            options: what.nth(1)?.to_owned(),
        })
    }

    fn is_memory(&self, v1: bool) -> bool {
        match v1 {
            true => self.kind == "cgroup" && self.options.split(',').any(|option| option == "memory"),
            false => self.kind == "cgroup2",
        }
    }

    /// Where below the mount the group called `own` lies. A path that is not below what is mounted is of another namespace: then
    /// the mount itself is the nearest that can be seen.
    fn inside(&self, own: &str) -> PathBuf {
        let own = Path::new(own);
        let is_plain = |path: &&Path| path.components().all(|part| part != Component::ParentDir);
        own.strip_prefix(&self.root).ok().filter(is_plain).map(Path::to_owned).unwrap_or_default()
    }
}

/// Blanks and the like stand as octal numbers in `mountinfo`.
fn unescaped(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (code, character)| text.replace(code, character))
}
