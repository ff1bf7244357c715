//! Reads through io_uring: one system call starts a whole batch, one waits for it.

#![expect(unsafe_code, reason = "hands raw buffers to the kernel")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use rustix::io::Errno;

use crate::transport::{Finished, IoVec, Operation, Transport};
use crate::{AlignedMemory, DirectFile, IoError};

const NAME: &str = "io_uring";

/// A ring with one registered file.
pub(crate) struct UringTransport {
    ring: IoUring,
    file: Arc<DirectFile>,
    file_registered: bool,
    cooperative: bool,
    pinned: Pinned,
    /// Whether the kernel reads into several stretches of pinned memory at once (Linux 6.15).
    vectored_pinned: bool,
}

/// Memory registered with the ring, kept alive as long as the ring.
enum Pinned {
    No,
    Refused(io::Error),
    Yes(Arc<AlignedMemory>),
}

/// The kernel's limit for one registered buffer.
const PINNED_BYTES_MAX: usize = 1 << 30;

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
        Ok(Self { ring, file, file_registered, cooperative, pinned: Pinned::No, vectored_pinned: false })
    }

    fn entry(&self, operation: &Operation) -> squeue::Entry {
        let Operation { id, offset, iovecs, count, .. } = *operation;
        let pinned = self.pinned_index(operation);
        macro_rules! read {
            ($fd:expr) => {
                if let Some(index) = pinned
                    && count > 1
                {
                    opcode::ReadvFixed::new($fd, iovecs.cast(), count, index).offset(offset).build()
                } else if count == 1 {
                    // SAFETY: `Transport::start` promises that the iovec is valid.
                    let one = unsafe { *iovecs };
                    // Single reads are below 2 GiB, as every operation.
                    let length = one.bytes as u32;
                    match pinned {
                        Some(index) => opcode::ReadFixed::new($fd, one.base, length, index).offset(offset).build(),
                        None => opcode::Read::new($fd, one.base, length).offset(offset).build(),
                    }
                } else {
                    opcode::Readv::new($fd, iovecs.cast(), count).offset(offset).build()
                }
            };
        }
        let entry = if self.file_registered { read!(Fixed(0)) } else { read!(Fd(raw_fd(&self.file))) };
        entry.user_data(u64::from(id))
    }

    /// The registered buffer that holds all of an operation's memory.
    fn pinned_index(&self, operation: &Operation) -> Option<u16> {
        let Pinned::Yes(memory) = &self.pinned else { return None };
        if operation.count > 1 && !self.vectored_pinned {
            return None;
        }
        let base = memory.as_ptr() as usize;
        // SAFETY: `Transport::start` promises that the array is valid.
        let iovecs = unsafe { std::slice::from_raw_parts(operation.iovecs, operation.count as usize) };
        let mut index = None;
        for iovec in iovecs {
            let start = (iovec.base as usize).checked_sub(base)?;
            let end = start + iovec.bytes;
            let (first, last) = (start / PINNED_BYTES_MAX, (end - 1) / PINNED_BYTES_MAX);
            if end > memory.len() || first != last || index.is_some_and(|index| index != first) {
                return None;
            }
            index = Some(first);
        }
        index.and_then(|index| u16::try_from(index).ok())
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
        match &self.pinned {
            Pinned::No => {}
            Pinned::Refused(error) => text.push_str(&format!(", slots not pinned ({error})")),
            Pinned::Yes(_) => text.push_str(", pinned slots"),
        }
        text
    }

    fn pin(&mut self, memory: &Arc<AlignedMemory>) {
        if memory.is_empty() {
            return;
        }
        let parts: Vec<IoVec> = (0..memory.len())
            .step_by(PINNED_BYTES_MAX)
            .map(|start| IoVec {
                base: memory.as_ptr().wrapping_add(start),
                bytes: (memory.len() - start).min(PINNED_BYTES_MAX),
            })
            .collect();
        // SAFETY: `IoVec` has the layout of `iovec`. The parts lie inside `memory`, which stays mapped as long as
        // the ring, because the ring's owner keeps a share of it.
        let outcome = unsafe {
            self.ring.submitter().register_buffers(std::slice::from_raw_parts(parts.as_ptr().cast(), parts.len()))
        };
        self.pinned = match outcome {
            Ok(()) => Pinned::Yes(Arc::clone(memory)),
            Err(error) => Pinned::Refused(error),
        };
        let mut probe = Probe::new();
        self.vectored_pinned =
            self.ring.submitter().register_probe(&mut probe).is_ok() && probe.is_supported(opcode::ReadvFixed::CODE);
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
