//! The boundary between planning reads and carrying them out: one operation is one device read at one offset.
//!
//! A transport knows nothing of slots, retries or requests. It may return fewer bytes than asked.

#![expect(
    unsafe_code,
    reason = "declares the promise that callers of `start` make, and reads into memory named by raw pointers"
)]

use std::io::{self, IoSliceMut};
use std::time::Duration;

use crate::DirectFile;

/// One stretch of memory; the same layout as `struct iovec` and `IoSliceMut`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct IoVec {
    pub(crate) base: *mut u8,
    pub(crate) bytes: usize,
}

/// A read of `count` stretches from `offset` on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operation {
    pub(crate) id: u32,
    pub(crate) offset: u64,
    pub(crate) iovecs: *const IoVec,
    pub(crate) count: u32,
}

/// The end of an operation: bytes read, or a negated errno.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finished {
    pub(crate) id: u32,
    pub(crate) result: i32,
}

/// Carries out reads.
pub(crate) trait Transport: Send {
    /// A short name.
    fn name(&self) -> &'static str;

    /// What it is and how it was set up, for people.
    fn describe(&self) -> String;

    /// Takes an operation. It may wait for `flush` before it runs. At most the depth given at creation are open.
    ///
    /// # Safety
    ///
    /// The iovecs and the memory they name must stay mapped until the operation is reported as finished, and
    /// nobody may look at that memory before.
    unsafe fn start(&mut self, operation: Operation);

    /// Makes everything taken so far run.
    fn flush(&mut self) -> io::Result<()>;

    /// Appends finished operations, blocking until at least `at_least` or the timeout; also flushes.
    fn reap(&mut self, at_least: usize, timeout: Duration, done: &mut Vec<Finished>) -> io::Result<()>;

    /// Asks for open operations to end early. They are still reported.
    fn cancel(&mut self);
}

/// Makes a read in the calling thread: bytes read, or a negated errno.
///
/// # Safety
///
/// As for [`Transport::start`], until this returns.
pub(crate) unsafe fn read_now(file: &DirectFile, operation: Operation) -> i32 {
    // SAFETY: `IoVec` has the layout of `iovec`, which `IoSliceMut` is documented to share. Our caller promises that the
    // array and the memory are valid. The bytes are written by the kernel only; overlapping discard regions are never read by
    // anyone.
    let buffers = unsafe {
        std::slice::from_raw_parts_mut(operation.iovecs.cast_mut().cast::<IoSliceMut<'_>>(), operation.count as usize)
    };
    match rustix::io::preadv(file, buffers, operation.offset) {
        Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
        Err(errno) => -errno.raw_os_error(),
    }
}
