//! Anonymous memory that direct I/O can read into: page-aligned, on huge pages when large.
//!
//! Knows nothing of slots or files. The bytes start as zero.

#![expect(unsafe_code, reason = "maps memory and hands it out as slices")]

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::IoError;

/// A huge page on the platforms that have them; mappings at least this large are aligned to it.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// The largest page size in common use (arm64 kernels with 64 KiB pages).
const PAGE_BYTES_MAX: usize = 64 << 10;

/// Memory taken at a time by [`AlignedMemory::populate`]; less than this is not worth a thread.
const POPULATE_BYTES: usize = 32 << 20;

/// A thread that takes pages before they are touched.
#[derive(Debug)]
struct Populating {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// An anonymous private mapping, unmapped on drop.
#[derive(Debug)]
pub struct AlignedMemory {
    base: NonNull<u8>,
    bytes: usize,
    /// What was mapped, which can begin earlier than `base`.
    mapping: *mut c_void,
    mapping_bytes: usize,
    populating: Option<Populating>,
}

// SAFETY: the mapping belongs to this value alone, and no thread-local state is tied to it.
unsafe impl Send for AlignedMemory {}
// SAFETY: through `&AlignedMemory` safe code can only read; writers go through the raw pointer, and each of them
// states in its own SAFETY sentence why nobody reads what it writes.
unsafe impl Sync for AlignedMemory {}

impl AlignedMemory {
    /// Maps `bytes` zeroed bytes. The memory is taken page by page on first touch.
    pub fn new(bytes: usize) -> Result<Self, IoError> {
        let fail = |source| IoError::Map { bytes, source };
        let too_large = || fail(std::io::Error::from(std::io::ErrorKind::OutOfMemory));
        if bytes == 0 {
            return Ok(Self {
                base: NonNull::dangling(),
                bytes: 0,
                mapping: ptr::null_mut(),
                mapping_bytes: 0,
                populating: None,
            });
        }
        let alignment = if bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { PAGE_BYTES_MAX };
        let mapping_bytes = bytes.checked_add(alignment).ok_or_else(too_large)?;
        if mapping_bytes > isize::MAX as usize {
            return Err(too_large());
        }
        // SAFETY: a new anonymous mapping at an address the kernel chooses touches no existing memory.
        let mapping = unsafe {
            mmap_anonymous(ptr::null_mut(), mapping_bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }
        .map_err(|errno| fail(errno.into()))?;
        let offset = mapping.cast::<u8>().align_offset(alignment);
        // SAFETY: `offset < alignment` and the mapping is `bytes + alignment` long, so the result lies inside it.
        let base = unsafe { mapping.cast::<u8>().add(offset) };
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE_BYTES {
            // A hint: kernels without transparent huge pages refuse it, and nothing depends on it.
            // SAFETY: the range lies inside the mapping made above, and the advice does not change its contents.
            let _ = unsafe { rustix::mm::madvise(base.cast(), bytes, rustix::mm::Advice::LinuxHugepage) };
        }
        let base = NonNull::new(base).ok_or_else(too_large)?;
        Ok(Self { base, bytes, mapping, mapping_bytes, populating: None })
    }

    /// Begins to take all pages from the system, in a thread of its own: clearing them costs as much as reading into them, and whoever
    /// touches them later need not wait for it. Changes no content; where it is not possible, pages come on first touch.
    pub fn populate(&mut self) {
        if self.bytes < POPULATE_BYTES || self.populating.is_some() {
            return;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, base, bytes) = (Arc::clone(&stop), self.base.as_ptr() as usize, self.bytes);
        let take = move || {
            for at in (0..bytes).step_by(POPULATE_BYTES) {
                if stopped.load(Ordering::Relaxed) || !take_pages(base + at, POPULATE_BYTES.min(bytes - at)) {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("populate".into()).spawn(take);
        self.populating = thread.ok().map(|thread| Populating { stop, thread });
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `base..base + bytes` is mapped, initialised (the kernel zeroes it) and lives as long as `self`.
        // Inside the crate, memory that an engine reads into is never handed out as this whole slice.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }

    /// The bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` excludes every other reference.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }

    /// Start of the memory, for engines that write behind the borrow checker's back.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

impl AsRef<[u8]> for AlignedMemory {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// Takes the pages of a range of a mapping; false where the system cannot.
fn take_pages(start: usize, bytes: usize) -> bool {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the range lies inside a mapping whose owner waits for this thread before it unmaps; the advice takes pages
        // and changes no content.
        unsafe { rustix::mm::madvise(start as *mut c_void, bytes, rustix::mm::Advice::LinuxPopulateWrite) }.is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (start, bytes);
        false
    }
}

impl Drop for AlignedMemory {
    fn drop(&mut self) {
        if let Some(Populating { stop, thread }) = self.populating.take() {
            stop.store(true, Ordering::Relaxed);
            // It cannot panic, so it has nothing to tell.
            let _ = thread.join();
        }
        if self.mapping_bytes > 0 {
            // SAFETY: exactly what `new` mapped; no reference outlives `self`, and engines keep a shared owner of
            // the memory for as long as a read may still land in it.
            let _ = unsafe { munmap(self.mapping, self.mapping_bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_writable() {
        for bytes in [1, 4096, 100_000, HUGE_PAGE_BYTES, 5 * HUGE_PAGE_BYTES + 1] {
            let mut memory = AlignedMemory::new(bytes).unwrap();
            assert_eq!(memory.len(), bytes);
            assert_eq!(memory.as_ptr() as usize % PAGE_BYTES_MAX, 0, "{bytes}");
            if bytes >= HUGE_PAGE_BYTES {
                assert_eq!(memory.as_ptr() as usize % HUGE_PAGE_BYTES, 0, "{bytes}");
            }
            assert!(memory.as_slice().iter().all(|&b| b == 0));
            memory.as_mut_slice().fill(7);
            assert_eq!(memory.as_slice()[bytes - 1], 7);
        }
    }

    #[test]
    fn populating_changes_nothing_and_can_be_left() {
        let mut memory = AlignedMemory::new(5 * POPULATE_BYTES / 2).unwrap();
        memory.as_mut_slice()[7] = 1;
        memory.populate();
        let last = memory.len() - 1;
        memory.as_mut_slice()[last] = 2;
        memory.populating.take().unwrap().thread.join().unwrap();
        let sum: u64 = memory.as_slice().iter().map(|b| u64::from(*b)).sum();
        assert_eq!((memory.as_slice()[7], memory.as_slice()[last], sum), (1, 2, 3));
        // Dropped while it goes on.
        let mut memory = AlignedMemory::new(8 * POPULATE_BYTES).unwrap();
        memory.populate();
    }

    #[test]
    fn empty_memory_has_no_mapping() {
        let memory = AlignedMemory::new(0).unwrap();
        assert!(memory.is_empty() && memory.as_slice().is_empty());
    }

    #[test]
    fn more_than_the_address_space_is_a_typed_error() {
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert!(matches!(AlignedMemory::new(bytes), Err(IoError::Map { bytes: b, .. }) if b == bytes));
        }
    }
}
