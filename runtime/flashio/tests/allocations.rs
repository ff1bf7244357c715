//! After warm-up, submitting and waiting allocates nothing, on this thread or on reader threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flashlm_io::{DirectFile, DirectIo, EngineChoice, Engines, ReadBatch, Slots};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[expect(unsafe_code, reason = "an allocator is an unsafe trait; this one counts and passes on")]
// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: our caller keeps `alloc`'s promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: our caller keeps `dealloc`'s promises.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: our caller keeps `realloc`'s promises.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn reading_allocates_nothing_after_warm_up() {
    let mut scratch = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    scratch.write_all(&vec![1; 4 << 20]).unwrap();
    scratch.as_file().sync_all().unwrap();
    let file = Arc::new(DirectFile::open(scratch.path(), DirectIo::Optional).unwrap());
    for choice in [EngineChoice::Auto, EngineChoice::Threads] {
        let slots = Slots::new(96, 8192, file.alignment()).unwrap();
        let mut engine = Engines::from(choice).open(Arc::clone(&file), slots, 16).unwrap();
        let (mut batch, mut done) = (ReadBatch::new(), Vec::with_capacity(96));
        let mut round = |seed: u64| {
            batch.clear();
            // Runs of changing lengths with gaps between, beyond the depth; some unaligned.
            let mut slot = 0u32;
            while slot + 6 <= 96 {
                let run = 1 + (u64::from(slot) * 7 + seed * 5) % 6;
                batch.begin(u64::from(slot), (u64::from(slot) * 37 + seed) % 300 * 8192 + seed % 3);
                for _ in 0..run {
                    batch.slot(slot, 8192);
                    batch.gap(4096);
                    slot += 1;
                }
            }
            engine.submit(&batch).unwrap();
            while engine.in_flight() > 0 {
                done.clear();
                engine.wait(1, &mut done).unwrap();
                assert!(done.iter().all(|c| c.result.is_ok()));
            }
        };
        for seed in 0..30 {
            round(seed);
        }
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        for seed in 30..90 {
            round(seed);
        }
        assert_eq!(ALLOCATIONS.load(Ordering::SeqCst) - before, 0, "{choice}");
    }
}
