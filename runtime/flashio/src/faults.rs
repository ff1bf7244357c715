//! Disks that misbehave deliberately: a wrapper around any transport that delays, shortens, fails or swallows reads.
//!
//! For tests, here and in whatever reads through an engine. It sits below the engine, so that continuing,
//! repeating and giving up are the engine's own code at work.

#![expect(unsafe_code, reason = "passes raw operations on")]

use std::io;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::transport::{Finished, IoVec, Operation, Transport};

/// What shall go wrong. The default is nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FaultPlan {
    /// So many reads go well before the others below begin to count.
    pub after: u64,
    /// Every report of finished reads comes this much later.
    pub delay: Duration,
    /// Every i-th read returns less than asked; 0 for never.
    pub short_every: u64,
    /// This many of the first reads fail.
    pub fail_first: u64,
    /// The error number they fail with; 0 stands for EIO.
    pub errno: i32,
    /// This many of the first reads never come back.
    pub stall_first: u64,
}

pub(crate) struct FaultyTransport {
    inner: Box<dyn Transport>,
    plan: FaultPlan,
    /// Reads are cut to a multiple of this.
    unit: usize,
    started: u64,
    /// One stretch for each operation that was cut.
    cut: Vec<IoVec>,
    failed: Vec<Finished>,
    stalled: Vec<u32>,
}

// SAFETY: the pointers in `cut` are only handed on, under the promise of `Transport::start`.
unsafe impl Send for FaultyTransport {}

impl FaultyTransport {
    pub(crate) fn new(inner: Box<dyn Transport>, plan: FaultPlan, unit: usize, depth: usize) -> Self {
        let cut = vec![IoVec { base: std::ptr::null_mut(), bytes: 0 }; depth];
        let (failed, stalled) = (Vec::with_capacity(depth), Vec::with_capacity(depth));
        Self { inner, plan, unit, started: 0, cut, failed, stalled }
    }
}

impl Transport for FaultyTransport {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn describe(&self) -> String {
        format!("{} with faults", self.inner.describe())
    }

    unsafe fn start(&mut self, mut operation: Operation) {
        let started = self.started;
        self.started += 1;
        let Some(number) = started.checked_sub(self.plan.after) else {
            // SAFETY: the operation is handed on as it came.
            return unsafe { self.inner.start(operation) };
        };
        if number < self.plan.stall_first {
            self.stalled.push(operation.id);
            return;
        }
        if number < self.plan.fail_first {
            let errno = if self.plan.errno == 0 { Errno::IO.raw_os_error() } else { self.plan.errno };
            self.failed.push(Finished { id: operation.id, result: -errno });
            return;
        }
        if self.plan.short_every > 0 && (number + 1).is_multiple_of(self.plan.short_every) {
            // SAFETY: our caller promises that the array is valid, and it has at least one entry.
            let first = unsafe { *operation.iovecs };
            let half = first.bytes / 2 / self.unit * self.unit;
            let bytes = if half == 0 { first.bytes } else { half };
            let cut = &mut self.cut[operation.id as usize];
            *cut = IoVec { base: first.base, bytes };
            operation.iovecs = cut;
            operation.count = 1;
        }
        // SAFETY: the same operation or the front of it; `cut` is never resized and lives as long as `inner`.
        unsafe { self.inner.start(operation) };
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }

    fn reap(&mut self, at_least: usize, timeout: Duration, done: &mut Vec<Finished>) -> io::Result<()> {
        let start = Instant::now();
        done.append(&mut self.failed);
        let missing = at_least.saturating_sub(done.len());
        self.inner.reap(missing, timeout, done)?;
        if done.len() < at_least {
            // The inner transport knows nothing of stalled reads and may return at once.
            std::thread::sleep(timeout.saturating_sub(start.elapsed()));
        }
        if !done.is_empty() {
            std::thread::sleep(self.plan.delay);
        }
        Ok(())
    }

    fn cancel(&mut self) {
        let result = -Errno::CANCELED.raw_os_error();
        self.failed.extend(self.stalled.drain(..).map(|id| Finished { id, result }));
        self.inner.cancel();
    }
}
