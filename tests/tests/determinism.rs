//! The same seed gives the same text, however many threads compute and however the weights are read.

use std::num::NonZeroUsize;

use flashlm::forward::kv::KvDtype;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::sampler::Sampling;
use flashlm_io::{DirectIo, EngineChoice};
use flashlm_tests::{continuation, loaded, logits, options, pack_checkpoint, scratch, tiny_falcon, tiny_opt};

/// Every way to run the same model.
fn ways() -> Vec<LoadOptions> {
    let mut ways = Vec::new();
    for threads in [1, 2, 3] {
        let base = LoadOptions {
            threads: NonZeroUsize::new(threads).unwrap(),
            kv: Some(KvDtype::F16),
            ..options(128, FfnChoice::Resident)
        };
        ways.push(base.clone());
        for engine in [EngineChoice::Auto, EngineChoice::Threads] {
            for direct in [DirectIo::Disabled, DirectIo::Optional] {
                ways.push(LoadOptions {
                    engines: engine.into(),
                    direct,
                    ffn: Some(FfnChoice::Streamed),
                    ..base.clone()
                });
            }
        }
    }
    ways
}

#[test]
fn every_way_to_run_a_model_gives_the_same_bits() {
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, repetition_penalty: 1.1, seed: 7, ..Sampling::default() };
    // Longer than a register tile in every direction, and no multiple of anything.
    let prompt: Vec<u32> = (0..37).map(|i| 2 + i * 97 % 4000).collect();
    for checkpoint in [tiny_opt(), tiny_falcon()] {
        let dir = scratch();
        let bundle = pack_checkpoint(&checkpoint, &dir.path().join("model.flashlm"));
        let mut first = None;
        for way in ways() {
            let mut model = loaded(&bundle, &way);
            let found = (logits(&mut model, &prompt), continuation(&mut model, &prompt, 40, sampling));
            let expected = first.get_or_insert_with(|| found.clone());
            assert_eq!(found.1, expected.1, "ids with {way:?}");
            assert!(found.0 == expected.0, "logits with {way:?}");
        }
        let (_, ids) = first.unwrap();
        let other = Sampling { seed: 8, ..sampling };
        let mut model = loaded(&bundle, &ways()[0]);
        assert_ne!(continuation(&mut model, &prompt, 40, other), ids, "another seed, the same text");
    }
}

#[test]
fn a_context_with_room_to_spare_changes_nothing() {
    let dir = scratch();
    let bundle = pack_checkpoint(&tiny_opt(), &dir.path().join("model.flashlm"));
    let prompt: Vec<u32> = (0..300).map(|i| 2 + i * 31 % 4000).collect();
    let ids = |context| {
        let mut model = loaded(&bundle, &options(context, FfnChoice::Resident));
        continuation(&mut model, &prompt, 20, Sampling::default())
    };
    assert_eq!(ids(320), ids(512));
}

#[test]
fn a_prompt_fed_in_parts_gives_the_same_text() {
    let dir = scratch();
    let bundle = pack_checkpoint(&tiny_opt(), &dir.path().join("model.flashlm"));
    let mut model = loaded(&bundle, &options(128, FfnChoice::Streamed));
    let prompt: Vec<u32> = (0..50).map(|i| 2 + i * 31 % 4000).collect();
    let whole = model.feed(&prompt).unwrap().to_vec();
    model.truncate(0);
    for part in prompt.chunks(7) {
        model.feed(part).unwrap();
    }
    model.truncate(prompt.len() - 1);
    let parts = model.feed(&prompt[prompt.len() - 1..]).unwrap();
    let difference = flashlm_tests::largest_difference(&whole, parts);
    assert!(difference < 1e-4, "{difference:e}");
}
