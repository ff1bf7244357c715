//! After warm-up, from a token id in to the sampled id out, nothing is allocated: by this thread or any other:
//! with predictors and without, from memory, streamed, and from flash in budgets that leave hardly any room for neurons.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use flashlm::engine::{Executor, Forward, Row};
use flashlm::error::RuntimeError;
use flashlm::forward::kv::KvDtype;
use flashlm::generate::{Generator, Request, Transcript};
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::sampler::{Sampler, Sampling};
use flashlm::speculate::{ModelDraft, Speculate, Speculation};
use flashlm_formats::bundle::LayoutOptions;
use flashlm_io::EngineChoice;
use flashlm_tests::{bundle_with_predictors, loaded, options, pack_checkpoint, scratch, tiny_falcon, tiny_opt};

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

/// Ids after warm-up, one after the other; how often was allocated meanwhile, and what was read.
fn decoded(model: &mut Forward, sampling: Sampling) -> (u64, u64) {
    let mut sampler = Sampler::new(sampling, model.spec().vocab_size);
    model.truncate(0);
    let mut id = sampler.choose(model.feed(&[2, 10, 11]).unwrap());
    for _ in 0..3 {
        id = sampler.choose(model.feed(&[id]).unwrap());
    }
    let (before, read) = (ALLOCATIONS.load(Ordering::SeqCst), model.read_counters().bytes);
    for _ in 0..40 {
        id = sampler.choose(model.feed(&[id]).unwrap());
    }
    (ALLOCATIONS.load(Ordering::SeqCst) - before, model.read_counters().bytes - read)
}

/// How often steps of several rows allocate after warm-up: rows of two sequences, some of them two of one.
fn steps(executor: &mut Executor) -> u64 {
    let open = |executor: &mut Executor| executor.open(32).unwrap();
    let (a, b) = (open(executor), open(executor));
    let run = |executor: &mut Executor, from: u32, count: u32| {
        for at in from..from + count {
            let rows = [(a, at), (b, at + 50), (a, at + 7), (b, 3 * at)].map(|(of, id)| Row::decode(of, 5 + id));
            let mut check = |_: usize, logits: &mut [f32]| {
                assert!(logits[0].is_finite());
                Ok(())
            };
            executor.step(&rows, &mut check).unwrap();
        }
    };
    run(executor, 0, 3);
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    run(executor, 3, 12);
    ALLOCATIONS.load(Ordering::SeqCst) - before
}

/// How often a text that is guessed allocates: by what it said before, and by a model.
fn guessed(executor: &mut Executor, draft: &Arc<Mutex<Executor>>, sampling: Sampling) -> (u64, u64) {
    let (sequence, vocab) = (executor.open(executor.context()).unwrap(), executor.spec().vocab_size);
    let model = ModelDraft::open(draft, sampling, vocab).unwrap();
    let speculation = Speculation::new(Speculate::Guesses(3), Some(Box::new(model)));
    let mut sampler = Sampler::new(sampling, vocab);
    let mut transcript = Transcript::new(executor, sequence, Some(speculation));
    let request = Request { prompt: &[2, 10, 11, 12, 10, 11], tokens: 50, eos: &[], stop_ids: &[] };
    let mut generator = Generator::new(executor, &mut transcript, &mut sampler, &request);
    let mut before = 0;
    for at in 0..50 {
        if at == 10 {
            before = ALLOCATIONS.load(Ordering::SeqCst);
        }
        generator.next(executor, &mut transcript, &mut sampler).unwrap();
    }
    let allocations = ALLOCATIONS.load(Ordering::SeqCst) - before;
    executor.close(sequence);
    (allocations, generator.report().speculation.drafted)
}

// The only test of its file: another one running beside it would be counted too, and so would what the harness says of a test that
// takes a minute.
#[test]
fn decoding_allocates_nothing_after_warm_up() {
    let drawn = Sampling { temperature: 0.9, top_k: 50, top_p: 0.9, repetition_penalty: 1.2, seed: 1 };
    let (mut runs, mut samplings) = (0, [Sampling::default(), drawn].into_iter().cycle());
    for checkpoint in [tiny_opt(), tiny_falcon()] {
        let dir = scratch();
        let plain = pack_checkpoint(&checkpoint, &dir.path().join("plain.flashlm"));
        let path = dir.path().join("predicted.flashlm");
        let draft = loaded(&plain, &options(64, FfnChoice::Resident)).into_executor();
        let draft = Arc::new(Mutex::new(draft));
        // With look-ahead: its own predictors, and those of the layer itself.
        let predicted = bundle_with_predictors(&checkpoint, &path, LayoutOptions::default(), true);
        for (bundle, ffn, engine, is_tight) in [
            (&plain, FfnChoice::Resident, EngineChoice::Auto, false),
            (&plain, FfnChoice::Streamed, EngineChoice::Auto, false),
            (&plain, FfnChoice::Flash, EngineChoice::Auto, true),
            (&predicted, FfnChoice::Resident, EngineChoice::Auto, false),
            (&predicted, FfnChoice::Streamed, EngineChoice::Auto, true),
            (&predicted, FfnChoice::Flash, EngineChoice::Auto, false),
            (&predicted, FfnChoice::Flash, EngineChoice::Auto, true),
            (&predicted, FfnChoice::Flash, EngineChoice::Threads, true),
        ] {
            let mut way = LoadOptions { engines: engine.into(), ..options(64, ffn) };
            if ffn == FfnChoice::Resident {
                way.kv = Some(KvDtype::Int8);
            }
            if is_tight {
                way.budget = match plan(bundle, &LoadOptions { budget: Some(1), ..way.clone() }) {
                    Err(RuntimeError::BudgetTooSmall { needed, .. }) => Some(needed + (1 << 20)),
                    other => panic!("one byte is enough: {:?}", other.map(|planned| planned.plan)),
                };
            }
            let (mut model, sampling) = (loaded(bundle, &way), samplings.next().unwrap());
            let (allocations, read) = decoded(&mut model, sampling);
            assert_eq!(allocations, 0, "40 tokens, {sampling:?}, {way:?}");
            // A tight budget is one that neurons are read in, and nothing is where all of them are in memory.
            let reads = ffn == FfnChoice::Streamed || is_tight;
            assert!(if reads { read > 0 } else { ffn == FfnChoice::Flash || read == 0 }, "{read} bytes, {way:?}");
            drop(model);
            let several =
                LoadOptions { sequences: 2, batch: 4, budget: way.budget.map(|budget| budget + (4 << 20)), ..way };
            let mut executor = loaded(bundle, &several).into_executor();
            assert_eq!(steps(&mut executor), 0, "several rows, {several:?}");
            drop(executor);
            let alone = LoadOptions { sequences: 1, ..several };
            let (allocations, drafted) = guessed(&mut loaded(bundle, &alone).into_executor(), &draft, sampling);
            assert_eq!(allocations, 0, "guesses, {sampling:?}, {alone:?}");
            assert!(drafted > 0);
            runs += 1;
        }
        // Each way meets the other sampling with the next model.
        samplings.next();
    }
    assert_eq!(runs, 16);
}
