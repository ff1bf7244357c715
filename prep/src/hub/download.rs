//! One file from the hub into the cache: resumed where it stopped, checked, and published whole.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use flashlm_formats::publish::{create_directory, sync_name};
use ring::digest::{Context, SHA256};

use super::client::{Client, range_start, waiting};
use super::patience::{self, Attempts, Paced};
use super::remote::Remote;
use super::snapshot::Commit;
use super::{HubError, Watch};

/// Read at a time.
const CHUNK: usize = 1 << 20;

/// Fetches a file's blob unless it is there, and says whether it was not; `watch` hears how many bytes are here, beside `done` of
/// other files.
pub(super) fn download(
    client: &Client,
    remote: &Remote,
    commit: &Commit,
    done: u64,
    watch: &mut dyn Watch,
) -> Result<bool, HubError> {
    let blob = commit.blob(remote);
    if blob.metadata().is_ok_and(|m| m.len() == remote.bytes) {
        return Ok(false);
    }
    let _lock = lock(remote, commit)?;
    let mut part = Part::open(remote, commit)?;
    let mut attempts = Attempts::from(part.have);
    let mut begin = Instant::now();
    while part.have < remote.bytes {
        let (reason, busy) = match part.go_on(client, remote, &mut |bytes| watch.at(done + bytes)) {
            Ok(()) => continue,
            Err(Stop::Broken(reason)) => (reason, None),
            Err(Stop::Busy { error, status, asked }) => (format!("status {status}"), Some((error, status, asked))),
            Err(Stop::Failed(error)) => return Err(error),
        };
        let failed = attempts.broke(part.have, begin.elapsed(), client.pace());
        begin = Instant::now();
        let asked = busy.as_ref().and_then(|(_, _, asked)| *asked);
        let Some(wait) = patience::wait(failed, asked) else {
            let (file, have, bytes) = (remote.file.clone(), part.have, remote.bytes);
            let cut = HubError::Cut { file, have, bytes, attempts: failed, reason };
            return Err(busy.map_or(cut, |(error, _, _)| error));
        };
        if let Some((_, status, Some(_))) = busy {
            watch.say(&waiting(wait, status));
        }
        std::thread::sleep(wait);
    }
    part.publish(remote, &blob)?;
    Ok(true)
}

/// What ends an attempt.
enum Stop {
    /// Worth another attempt.
    Broken(String),
    /// Worth another attempt when the server has time; the error if that does not come.
    Busy {
        error: HubError,
        status: u16,
        asked: Option<Duration>,
    },
    Failed(HubError),
}

/// What there is of a file, under another name.
struct Part {
    file: File,
    path: std::path::PathBuf,
    have: u64,
    hash: Context,
}

impl Part {
    /// Goes on with what an earlier run left, if what is whole can be told from what is not in the end.
    fn open(remote: &Remote, commit: &Commit) -> Result<Self, HubError> {
        let path = commit.part(remote);
        let failed = |e| HubError::io("open", &path, e);
        let mut file = open_own(OpenOptions::new().read(true).append(true), &path)?;
        let mut hash = Context::new(&SHA256);
        let mut have = file.metadata().map_err(failed)?.len();
        // Files whose contents the hub states no hash of are small: started again, as a loss of power may have left anything there.
        if have > remote.bytes || remote.sha256.is_none() {
            file.set_len(0).map_err(failed)?;
            have = 0;
        }
        let mut buffer = vec![0; CHUNK];
        let mut left = have;
        while left > 0 {
            let n = left.min(CHUNK as u64) as usize;
            file.read_exact(&mut buffer[..n]).map_err(|e| HubError::io("read", &path, e))?;
            hash.update(&buffer[..n]);
            left -= n as u64;
        }
        Ok(Self { file, path, have, hash })
    }

    fn start_again(&mut self) -> Result<(), Stop> {
        self.file.set_len(0).map_err(|e| Stop::Failed(HubError::io("shorten", &self.path, e)))?;
        self.have = 0;
        self.hash = Context::new(&SHA256);
        Ok(())
    }

    /// One request for what is missing.
    fn go_on(&mut self, client: &Client, remote: &Remote, at: &mut dyn FnMut(u64)) -> Result<(), Stop> {
        let mut response = client.get(&remote.url, self.have).map_err(|error| match error {
            HubError::Unreachable { reason, .. } => Stop::Broken(reason),
            other => Stop::Failed(other),
        })?;
        match response.status().as_u16() {
            200 if self.have > 0 => self.start_again()?, // It does not do ranges.
            200 => {}
            206 if range_start(&response) == Some(self.have) => {}
            206 => {
                let what = format!("asked for bytes from {} on, it sends others", self.have);
                return Err(Stop::Failed(HubError::Answer { url: remote.url.to_string(), what }));
            }
            416 => {
                self.start_again()?;
                return Err(Stop::Broken("the server has no such range".into()));
            }
            status if patience::is_passing(status) => {
                let asked = patience::asked(response.headers());
                return Err(Stop::Busy { error: client.refused(&remote.url, &response), status, asked });
            }
            _ => return Err(Stop::Failed(client.refused(&remote.url, &response))),
        }
        let mut body = Paced::new(response.body_mut().as_reader(), client.pace());
        let mut buffer = vec![0; CHUNK];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Stop::Broken(e.to_string())),
            };
            if self.have + n as u64 > remote.bytes {
                _ = std::fs::remove_file(&self.path);
                let error = HubError::TooLong { file: remote.file.clone(), bytes: remote.bytes };
                return Err(Stop::Failed(error));
            }
            self.write(&buffer[..n], remote).map_err(Stop::Failed)?;
            at(self.have);
        }
        if self.have < remote.bytes { Err(Stop::Broken("the connection was closed early".into())) } else { Ok(()) }
    }

    fn write(&mut self, bytes: &[u8], remote: &Remote) -> Result<(), HubError> {
        if let Err(error) = self.file.write_all(bytes) {
            // Some of it may stand there: as many bytes as are known remain.
            _ = self.file.set_len(self.have);
            if error.kind() == io::ErrorKind::StorageFull || error.kind() == io::ErrorKind::QuotaExceeded {
                let dir = self.path.parent().unwrap_or(Path::new("/")).to_owned();
                let available = available(&dir).unwrap_or(0);
                return Err(HubError::DiskFull { dir, needed: remote.bytes - self.have, available });
            }
            return Err(HubError::io("write to", &self.path, error));
        }
        self.hash.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }

    /// Gives a complete file its name, if it is what the hub has.
    fn publish(self, remote: &Remote, blob: &Path) -> Result<(), HubError> {
        if let Some(expected) = &remote.sha256 {
            let found: String = self.hash.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect();
            if found != *expected {
                _ = std::fs::remove_file(&self.path);
                return Err(HubError::Hash { file: remote.file.clone(), expected: expected.clone(), found });
            }
        }
        self.file.sync_all().map_err(|e| HubError::io("sync", &self.path, e))?;
        std::fs::rename(&self.path, blob).map_err(|e| HubError::io("rename", &self.path, e))?;
        sync_name(blob).map_err(|e| HubError::io("sync", blob, e))
    }
}

/// Opens or makes a file that only clients of the hub write. A pipe there is not waited for, and a file that has another name as
/// well, be it by a link of either kind, is not written to.
fn open_own(options: &mut OpenOptions, path: &Path) -> Result<File, HubError> {
    let in_the_way = |what| HubError::InTheWay { path: path.to_owned(), what };
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = options.create(true).custom_flags(flags.bits() as i32).open(path).map_err(|error| {
        match path.symlink_metadata() {
            Ok(there) if there.is_symlink() => in_the_way("a symbolic link"),
            Ok(there) if !there.is_file() => in_the_way("no file"),
            _ => HubError::io("open", path, error),
        }
    })?;
    let there = file.metadata().map_err(|e| HubError::io("look at", path, e))?;
    match there.is_file() {
        true if there.nlink() <= 1 => Ok(file),
        true => Err(in_the_way("a file with another name besides (a hard link)")),
        false => Err(in_the_way("no file")),
    }
}

/// The lock that other clients of the hub take for this file too.
fn lock(remote: &Remote, commit: &Commit) -> Result<File, HubError> {
    let path = commit.lock(remote);
    let dir = path.parent().unwrap_or(Path::new("/"));
    create_directory(dir).map_err(|e| HubError::io("create", dir, e))?;
    let file = open_own(OpenOptions::new().write(true).truncate(false), &path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(HubError::Busy { file: remote.file.clone(), lock: path }),
        // A file system without locks.
        Err(std::fs::TryLockError::Error(_)) => Ok(file),
    }
}

fn available(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Refuses to begin what cannot be finished.
pub(super) fn check_space(dir: &Path, needed: u64) -> Result<(), HubError> {
    match available(dir) {
        Some(available) if available < needed => Err(HubError::DiskFull { dir: dir.to_owned(), needed, available }),
        _ => Ok(()),
    }
}
