//! Reads through io_uring: one system call starts a whole batch, one waits for it.
//!
//! The file is registered with the ring. The slots are not: pinning them was tried and showed no gain
//! (docs/measurements/disk-alignment.md), and it needs a locked-memory limit as large as the arena.

#![expect(unsafe_code, reason = "hands raw buffers to the kernel")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::io::Errno;

use crate::transport::{Finished, Operation, Transport};
use crate::{DirectFile, IoError};

const NAME: &str = "io_uring";

/// Whether the system lets this process have a ring.
pub(crate) fn is_there() -> bool {
    IoUring::new(1).is_ok()
}

/// A ring with one registered file.
pub(crate) struct UringTransport {
    ring: IoUring,
    file: Arc<DirectFile>,
    file_registered: bool,
    cooperative: bool,
}

impl UringTransport {
    pub(crate) fn new(file: Arc<DirectFile>, depth: usize) -> Result<Self, IoError> {
        let fail = |operation| move |source| IoError::Engine { engine: NAME, operation, source };
        let entries = u32::try_from(depth.max(1).next_power_of_two()).unwrap_or(u32::MAX);
        // Completions are handled when this thread enters the kernel anyway, instead of by interrupting it (Linux
        // 5.19). Not SINGLE_ISSUER: the engine may move between threads, which that flag forbids.
        let (ring, cooperative) = match IoUring::builder().dontfork().setup_coop_taskrun().build(entries) {
            Ok(ring) => (ring, true),
            Err(_) => (IoUring::builder().dontfork().build(entries).map_err(fail("create a ring"))?, false),
        };
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            let source = io::Error::new(io::ErrorKind::Unsupported, "the kernel is older than Linux 5.11");
            return Err(fail("wait with a deadline")(source));
        }
        let file_registered = ring.submitter().register_files(&[raw_fd(&file)]).is_ok();
        Ok(Self { ring, file, file_registered, cooperative })
    }

    fn entry(&self, operation: &Operation) -> squeue::Entry {
        let Operation { id, offset, iovecs, count, .. } = *operation;
        macro_rules! read {
            ($fd:expr) => {
                if count == 1 {
                    // SAFETY: `Transport::start` promises that the iovec is valid.
                    let one = unsafe { *iovecs };
                    // Single reads are below 2 GiB, as every operation.
                    opcode::Read::new($fd, one.base, one.bytes as u32).offset(offset).build()
                } else {
                    opcode::Readv::new($fd, iovecs.cast(), count).offset(offset).build()
                }
            };
        }
        let entry = if self.file_registered { read!(Fixed(0)) } else { read!(Fd(raw_fd(&self.file))) };
        entry.user_data(u64::from(id))
    }

    fn drain(&mut self, done: &mut Vec<Finished>) {
        done.extend(
            self.ring.completion().map(|entry| Finished { id: entry.user_data() as u32, result: entry.result() }),
        );
    }
}

fn raw_fd(file: &DirectFile) -> RawFd {
    file.as_fd().as_raw_fd()
}

/// Errors after which the entries are still in the ring and the call can simply be made again.
fn passing(error: &io::Error) -> bool {
    [Errno::INTR, Errno::AGAIN, Errno::BUSY, Errno::TIME]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

impl Transport for UringTransport {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> String {
        let mut text = String::from("io_uring");
        text.push_str(if self.file_registered { ", registered file" } else { ", file not registered" });
        text.push_str(if self.cooperative { ", cooperative completions" } else { "" });
        text
    }

    unsafe fn start(&mut self, operation: Operation) {
        let entry = self.entry(&operation);
        // SAFETY: our caller promises that buffers and iovecs outlive the operation.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            // The ring has room for the depth promised, so it is full only of entries not yet handed over.
            if let Err(error) = self.ring.submit()
                && !passing(&error)
            {
                // Nothing can be started any more; `reap` meets the same error and reports it.
                return;
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.ring.submit() {
            Err(error) if !passing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    fn reap(&mut self, at_least: usize, timeout: Duration, done: &mut Vec<Finished>) -> io::Result<()> {
        let before = done.len();
        self.drain(done);
        let missing = at_least.saturating_sub(done.len() - before);
        let timespec = Timespec::from(timeout);
        let args = SubmitArgs::new().timespec(&timespec);
        // Entered also when nothing is missing: cooperative completions are delivered on the way out of the kernel.
        match self.ring.submitter().submit_with_args(missing, &args) {
            Err(error) if !passing(&error) => return Err(error),
            _ => {}
        }
        self.drain(done);
        Ok(())
    }

    fn cancel(&mut self) {
        let _ = self.flush();
        // Reads already at the device finish by themselves; this ends those that still wait in the kernel.
        let short = Timespec::from(Duration::from_millis(100));
        let _ = self.ring.submitter().register_sync_cancel(Some(short), CancelBuilder::any());
    }
}
