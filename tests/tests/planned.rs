//! What is planned for tables and scratch is what they take from the heap.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flashlm::cache::{LayerCache, PolicyKind};
use flashlm::disk_cost::ReadCost;
use flashlm::engine::Room;
use flashlm::forward::kv::KvDtype;
use flashlm::neurons::flash::{ArenaPlan, FlashFfn, FlashOptions};
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::planner::ReadPlan;
use flashlm_formats::bundle::Bundle;
use flashlm_io::{DirectFile, DirectIo, Engines};
use flashlm_tests::{loaded, options, pack_checkpoint, scratch, tiny_falcon, tiny_opt};

struct Counting;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

#[expect(unsafe_code, reason = "an allocator is an unsafe trait; this one counts and passes on")]
// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.fetch_add(layout.size(), Ordering::SeqCst);
        // SAFETY: our caller keeps `alloc`'s promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: our caller keeps `dealloc`'s promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of the heap that what `make` gives holds.
fn held<T>(make: impl FnOnce() -> T) -> u64 {
    let before = TAKEN.load(Ordering::SeqCst);
    let made = make();
    let after = TAKEN.load(Ordering::SeqCst);
    drop(made);
    (after - before) as u64
}

/// The tables of a layer's cache, whatever the policy.
fn check_caches() {
    for policy in PolicyKind::ALL.into_iter().chain([PolicyKind::Lfu { half_life: 10_000 }]) {
        for (groups, slots) in [(4000, 0), (4000, 300), (4000, 4000), (1, 1)] {
            // The least of three: what runs the test allocates, too, now and then.
            let taken =
                [(); 3].map(|()| held(|| LayerCache::new(groups, slots, policy))).into_iter().min().unwrap_or(0);
            let planned = LayerCache::bytes(groups, slots, policy);
            // The policy itself is no table.
            let said = format!("{policy}: {taken} bytes for {slots} of {groups} groups, {planned} planned");
            assert!(taken >= planned && taken - planned < 256, "{said}");
        }
    }
}

/// Everything that the source of neurons keeps beside its arena.
fn check_flash(bundle: &Bundle) {
    for policy in PolicyKind::ALL {
        let file = Arc::new(DirectFile::open(bundle.path(), DirectIo::Optional).unwrap());
        let (groups, layers) = (bundle.layout().groups() as u32, bundle.spec().layers.len());
        let arena = ArenaPlan { slots: vec![groups; layers], transient: groups };
        let policies = vec![policy; layers];
        let planned = FlashFfn::working_bytes(bundle.layout(), &arena, &policies, 4, false);
        let reads = ReadPlan::Cost(ReadCost::USUAL);
        let engines = Engines::default();
        let options = FlashOptions { arena, policies, reads, engines, verify: false, look_ahead: true, batch: 4 };
        let taken = held(|| FlashFfn::new(bundle, file, None, &options).unwrap());
        assert!(taken <= planned, "{policy}: {taken} bytes, {planned} planned");
    }
}

/// Scratch and tables of a loaded model grow with context and batch as planned.
fn check_scratch(bundle: &Bundle) {
    let measured = |context: usize, batch: usize| {
        let options = LoadOptions { batch, ..options(context, FfnChoice::Resident) };
        let scratch_tokens = plan(bundle, &options).unwrap().scratch_tokens;
        let room = Room { context, sequences: 1, kv: KvDtype::F32, scratch_tokens, batch };
        // What products grow by is not taken yet.
        let planned = room.working_bytes(bundle.spec(), 2);
        (held(|| loaded(bundle, &options)) as i64, planned as i64)
    };
    let small = measured(300, 1);
    for (context, batch) in [(bundle.spec().max_positions, 1), (300, 8)] {
        let large = measured(context, batch);
        let (taken, planned) = (large.0 - small.0, large.1 - small.1);
        let said = format!("{taken} bytes more for {context} tokens and a batch of {batch}, {planned} planned");
        // Beside keys and values a context takes tables of positions, where positions are not learned.
        let grows = batch > 1 || bundle.spec().learned_positions.is_none();
        assert!((planned > 5000 || !grows) && taken.abs_diff(planned) < 512, "{said}");
    }
}

// The only test of its file: what another one takes meanwhile would be counted.
#[test]
fn what_is_planned_is_what_is_taken() {
    check_caches();
    for checkpoint in [tiny_opt(), tiny_falcon()] {
        let dir = scratch();
        let bundle = pack_checkpoint(&checkpoint, &dir.path().join("model.flashlm"));
        check_flash(&bundle);
        check_scratch(&bundle);
    }
}
