//! What a program does to the files of a directory, watched system call by system call (`ptrace`).

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// A change to files. Files are numbered, as their names come and go.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// A new, empty file.
    Create(PathBuf, usize),
    Write(usize, u64, Vec<u8>),
    Length(usize, u64),
    Directory(PathBuf),
    Link(PathBuf, PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    /// What was written to a file is durable.
    Sync(usize),
    /// What happened to the names in a directory is durable.
    SyncNames(PathBuf),
}

/// System calls of x86-64 that matter here.
mod call {
    pub(super) const READ: u64 = 0;
    pub(super) const WRITE: u64 = 1;
    pub(super) const OPEN: u64 = 2;
    pub(super) const CLOSE: u64 = 3;
    pub(super) const LSEEK: u64 = 8;
    pub(super) const MMAP: u64 = 9;
    pub(super) const PWRITE: u64 = 18;
    pub(super) const WRITEV: u64 = 20;
    pub(super) const FCNTL: u64 = 72;
    pub(super) const FSYNC: u64 = 74;
    pub(super) const FDATASYNC: u64 = 75;
    pub(super) const FTRUNCATE: u64 = 77;
    pub(super) const RENAME: u64 = 82;
    pub(super) const MKDIR: u64 = 83;
    pub(super) const RMDIR: u64 = 84;
    pub(super) const UNLINK: u64 = 87;
    pub(super) const SYMLINK: u64 = 88;
    pub(super) const OPENAT: u64 = 257;
    pub(super) const MKDIRAT: u64 = 258;
    pub(super) const UNLINKAT: u64 = 263;
    pub(super) const RENAMEAT: u64 = 264;
    pub(super) const SYMLINKAT: u64 = 266;
    pub(super) const RENAMEAT2: u64 = 316;
    /// Others that change files: sendfile, truncate, creat, link, linkat, fallocate, pwritev, copy_file_range, pwritev2. Nobody
    /// here uses them; whoever begins to has to say here what they do.
    pub(super) const UNKNOWN: [u64; 9] = [40, 76, 85, 86, 265, 285, 296, 326, 328];
}

const O_CREAT: u64 = 0o100;
const O_TRUNC: u64 = 0o1000;
const O_APPEND: u64 = 0o2000;
const F_DUPFD: [u64; 2] = [0, 1030];
const MAP_SHARED: u64 = 1;
const PROT_WRITE: u64 = 2;
/// What is in the register of the result while a call is being entered.
const NO_RESULT: i64 = -38;

/// An open file or directory.
#[derive(Clone)]
struct Open {
    path: PathBuf,
    file: Option<usize>,
    offset: u64,
    append: bool,
}

/// A call that was entered: its number, its arguments, and the memory that it was given.
struct Entered {
    number: u64,
    args: [u64; 6],
    bytes: Vec<u8>,
    paths: Vec<PathBuf>,
}

/// A program that is being watched.
struct Watched<'a> {
    root: &'a Path,
    pid: Pid,
    open: HashMap<u64, Open>,
    /// What is where.
    names: BTreeMap<PathBuf, usize>,
    lengths: Vec<u64>,
    changes: Vec<Change>,
}

/// Runs a command, which has to give absolute paths, and tells what it did below `root`, which is empty. With its exit code.
///
/// Fails where programs cannot be watched.
pub(crate) fn watch(command: &Command, root: &Path) -> Result<(Vec<Change>, i32), String> {
    let mut stopped = Command::new("sh");
    stopped.args(["-c", "kill -STOP $$; exec \"$@\"", "sh"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => stopped.env(name, value),
            None => stopped.env_remove(name),
        };
    }
    stopped.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = stopped.spawn().map_err(|e| e.to_string())?;
    let pid = Pid::from_raw(child.id() as i32);
    let failed = |what: &str, error: nix::Error| {
        _ = kill(pid, Signal::SIGKILL);
        format!("{what}: {error}")
    };
    waitpid(pid, Some(WaitPidFlag::WUNTRACED)).map_err(|e| failed("waiting", e))?;
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::seize(pid, options).map_err(|e| failed("ptrace", e))?;
    kill(pid, Signal::SIGCONT).map_err(|e| failed("SIGCONT", e))?;
    let mut watched =
        Watched { root, pid, open: HashMap::new(), names: BTreeMap::new(), lengths: Vec::new(), changes: Vec::new() };
    let mut entered: HashMap<Pid, Entered> = HashMap::new();
    loop {
        // Of this thread's children alone: other tests have theirs.
        let status = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD));
        let (thread, signal) = match status.map_err(|e| failed("waiting", e))? {
            WaitStatus::PtraceSyscall(thread) => {
                let registers = ptrace::getregs(thread).map_err(|e| failed("registers", e))?;
                match entered.remove(&thread) {
                    Some(call) => watched.left(call, registers.rax as i64),
                    // The end of a call whose begin was not seen is that of one that began the thread, or the program.
                    None if registers.rax as i64 != NO_RESULT => {}
                    None => {
                        let r = registers;
                        let call = watched.entered(r.orig_rax, [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]);
                        entered.insert(thread, call);
                    }
                }
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::Exited(thread, code) if thread == pid => return Ok((watched.changes, code)),
            WaitStatus::Signaled(thread, signal, _) if thread == pid => return Err(format!("killed by {signal}")),
            _ => continue,
        };
        // A thread may have been ended by another one meanwhile.
        _ = ptrace::syscall(thread, signal);
    }
}

impl Watched<'_> {
    fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        // Opened each time: a program that becomes another has other memory.
        let memory = File::open(format!("/proc/{}/mem", self.pid)).expect("the program lives");
        memory.read_exact_at(&mut bytes, at).expect("memory of the watched program");
        bytes
    }

    /// A path in the program's memory, below a directory that it has open.
    fn path(&self, directory: u64, at: u64) -> PathBuf {
        let mut bytes = Vec::new();
        // Up to the end of a page at a time: after it there may be nothing.
        while !bytes.contains(&0) {
            let from = at + bytes.len() as u64;
            bytes.extend(self.read(from, (4096 - from % 4096) as usize));
        }
        bytes.truncate(bytes.iter().position(|b| *b == 0).expect("looked for"));
        let path = PathBuf::from(String::from_utf8(bytes).expect("tests have plain paths"));
        let base = if (directory as i32) < 0 {
            fs::read_link(format!("/proc/{}/cwd", self.pid)).expect("the program lives")
        } else {
            self.open.get(&directory).map(|open| open.path.clone()).unwrap_or_default()
        };
        let mut whole = PathBuf::new();
        for part in base.join(path).components() {
            match part {
                Component::CurDir => {}
                Component::ParentDir => _ = whole.pop(),
                part => whole.push(part),
            }
        }
        whole
    }

    fn entered(&self, number: u64, args: [u64; 6]) -> Entered {
        const HERE: u64 = u64::MAX;
        let paths = match number {
            call::OPEN | call::MKDIR | call::RMDIR | call::UNLINK => vec![self.path(HERE, args[0])],
            call::OPENAT | call::MKDIRAT | call::UNLINKAT => vec![self.path(args[0], args[1])],
            call::RENAME => vec![self.path(HERE, args[0]), self.path(HERE, args[1])],
            call::RENAMEAT | call::RENAMEAT2 => vec![self.path(args[0], args[1]), self.path(args[2], args[3])],
            call::SYMLINK => vec![self.path(HERE, args[1])],
            call::SYMLINKAT => vec![self.path(args[1], args[2])],
            _ => Vec::new(),
        };
        let is_ours = self.open.get(&args[0]).is_some_and(|open| open.file.is_some());
        let bytes = match number {
            call::WRITE | call::PWRITE if is_ours => self.read(args[1], args[2] as usize),
            call::SYMLINK | call::SYMLINKAT => {
                let mut target = Vec::new();
                while target.last() != Some(&0) {
                    target.extend(self.read(args[0] + target.len() as u64, 1));
                }
                target.pop();
                target
            }
            call::WRITEV if is_ours => {
                let parts = self.read(args[1], 16 * args[2] as usize);
                let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight"));
                let parts = parts.chunks(16).map(|part| self.read(word(&part[..8]), word(&part[8..]) as usize));
                parts.collect::<Vec<_>>().concat()
            }
            _ => Vec::new(),
        };
        Entered { number, args, bytes, paths }
    }

    fn is_ours(&self, path: &Path) -> bool {
        path.starts_with(self.root)
    }

    fn left(&mut self, call: Entered, result: i64) {
        if result < 0 {
            return;
        }
        let Entered { number, args, bytes, mut paths } = call;
        let done = result as u64;
        match number {
            call::OPEN | call::OPENAT => {
                let flags = if number == call::OPEN { args[1] } else { args[2] };
                self.opened(done, paths.remove(0), flags);
            }
            call::CLOSE => _ = self.open.remove(&args[0]),
            call::FCNTL if F_DUPFD.contains(&args[1]) => {
                if let Some(open) = self.open.get(&args[0]).cloned() {
                    self.open.insert(done, open);
                }
            }
            call::READ | call::LSEEK | call::WRITE | call::WRITEV | call::PWRITE => {
                let Some(open) = self.open.get_mut(&args[0]) else { return };
                let Some(file) = open.file else { return };
                let end = self.lengths[file];
                let at = match number {
                    call::PWRITE => args[3],
                    _ if open.append => end,
                    _ => open.offset,
                };
                match number {
                    call::READ => open.offset += done,
                    call::LSEEK => open.offset = done,
                    call::PWRITE => {}
                    _ => open.offset = at + done,
                }
                if matches!(number, call::WRITE | call::WRITEV | call::PWRITE) {
                    self.lengths[file] = end.max(at + done);
                    self.changes.push(Change::Write(file, at, bytes[..done as usize].to_vec()));
                }
            }
            call::FTRUNCATE => {
                if let Some(file) = self.open.get(&args[0]).and_then(|open| open.file) {
                    self.lengths[file] = args[1];
                    self.changes.push(Change::Length(file, args[1]));
                }
            }
            call::FSYNC | call::FDATASYNC => match self.open.get(&args[0]) {
                Some(Open { file: Some(file), .. }) => self.changes.push(Change::Sync(*file)),
                Some(open) if self.is_ours(&open.path) => {
                    let path = open.path.clone();
                    self.changes.push(Change::SyncNames(path));
                }
                _ => {}
            },
            call::RENAME | call::RENAMEAT | call::RENAMEAT2 if self.is_ours(&paths[1]) => {
                let to = paths.remove(1);
                let from = paths.remove(0);
                if let Some(file) = self.names.remove(&from) {
                    self.names.insert(to.clone(), file);
                }
                self.changes.push(Change::Rename(from, to));
            }
            call::MKDIR | call::MKDIRAT if self.is_ours(&paths[0]) => {
                self.changes.push(Change::Directory(paths.remove(0)));
            }
            call::RMDIR | call::UNLINK | call::UNLINKAT if self.is_ours(&paths[0]) => {
                self.names.remove(&paths[0]);
                self.changes.push(Change::Remove(paths.remove(0)));
            }
            call::SYMLINK | call::SYMLINKAT if self.is_ours(&paths[0]) => {
                let target = PathBuf::from(String::from_utf8(bytes).expect("tests have plain paths"));
                self.changes.push(Change::Link(paths.remove(0), target));
            }
            call::MMAP if args[3] & MAP_SHARED != 0 && args[2] & PROT_WRITE != 0 => {
                let is_ours = self.open.get(&args[4]).is_some_and(|open| open.file.is_some());
                assert!(!is_ours || args[3] & 0x20 != 0, "a file is written to through a map: not understood here");
            }
            number => assert!(!call::UNKNOWN.contains(&number), "system call {number} is not understood here"),
        }
    }

    fn opened(&mut self, number: u64, path: PathBuf, flags: u64) {
        let mut file = None;
        // A link of the hub's cache leads to a file with a name of its own.
        let real = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        if self.is_ours(&path) && !real.is_dir() {
            let known = self.names.get(&real).copied();
            if known.is_none() && flags & O_CREAT != 0 {
                let new = self.lengths.len();
                self.lengths.push(0);
                self.names.insert(real.clone(), new);
                self.changes.push(Change::Create(real, new));
                file = Some(new);
            } else if let Some(known) = known {
                if flags & O_TRUNC != 0 {
                    self.lengths[known] = 0;
                    self.changes.push(Change::Length(known, 0));
                }
                file = Some(known);
            }
        }
        self.open.insert(number, Open { path, file, offset: 0, append: flags & O_APPEND != 0 });
    }
}
