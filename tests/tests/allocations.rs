//! After warm-up, from a token id in to the sampled id out, nothing is allocated: by this thread or any other.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use flashlm_runtime::load::FfnChoice;
use flashlm_runtime::sampler::{Sampler, Sampling};
use flashlm_tests::{loaded, options, pack_checkpoint, scratch, tiny_falcon, tiny_opt};

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

// The only test of its file: another one running beside it would be counted too.
#[test]
fn decoding_allocates_nothing_after_warm_up() {
    let drawn = Sampling { temperature: 0.9, top_k: 50, top_p: 0.9, repetition_penalty: 1.2, seed: 1 };
    for checkpoint in [tiny_opt(), tiny_falcon()] {
        let dir = scratch();
        let bundle = pack_checkpoint(&checkpoint, &dir.path().join("model.flashlm"));
        for ffn in [FfnChoice::Resident, FfnChoice::Streamed, FfnChoice::Flash] {
            for sampling in [Sampling::default(), drawn] {
                let mut model = loaded(&bundle, &options(64, ffn));
                let mut sampler = Sampler::new(sampling, model.spec().vocab_size);
                let mut id = sampler.choose(model.feed(&[2, 10, 11]).unwrap());
                for _ in 0..3 {
                    id = sampler.choose(model.feed(&[id]).unwrap());
                }
                let before = ALLOCATIONS.load(Ordering::SeqCst);
                for _ in 0..40 {
                    id = sampler.choose(model.feed(&[id]).unwrap());
                }
                let allocations = ALLOCATIONS.load(Ordering::SeqCst) - before;
                assert_eq!(allocations, 0, "{ffn:?}, {sampling:?}: 40 tokens");
            }
        }
    }
}
