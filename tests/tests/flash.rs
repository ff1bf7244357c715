//! Neurons from flash: the same bits whatever is cached, read ahead or read together, and no damage unseen.

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;

use flashlm::cache::PolicyKind;
use flashlm::disk_cost::ReadCost;
use flashlm::error::RuntimeError;
use flashlm::load::load;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::planner::ReadPlan;
use flashlm::sampler::Sampling;
use flashlm_formats::bundle::LayoutOptions;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_io::{DirectIo, EngineChoice};
use flashlm_kernels::Threads;
use flashlm_prep::evaluate::{PredictorChoice, Windows, evaluate};
use flashlm_tests::{
    budgets, bundle_with_predictors, continuation, exact, fixtures, largest_difference, loaded, logits, options,
    pack_checkpoint, scratch, tiny_falcon, tiny_opt,
};

fn flash(context: usize) -> LoadOptions {
    options(context, FfnChoice::Flash)
}

#[test]
fn text_does_not_depend_on_what_is_cached_or_read_ahead() {
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: 7, ..Sampling::default() };
    // A prompt that is streamed, and one that is decoded.
    let prompts: [Vec<u32>; 2] = [37, 5].map(|n| (0..n).map(|i| 2 + i * 97 % 4000).collect());
    for (checkpoint, look_ahead) in [(tiny_opt(), true), (tiny_falcon(), false)] {
        let dir = scratch();
        let path = dir.path().join("model.flashlm");
        let bundle = bundle_with_predictors(&checkpoint, &path, LayoutOptions::default(), look_ahead);
        let base = flash(128);
        let (smallest, largest) = budgets(&bundle, &base);
        let between = smallest + (largest - smallest) / 4;
        let mut ways = vec![base.clone()];
        for budget in [smallest, between, largest] {
            let base = LoadOptions { budget: Some(budget), ..base.clone() };
            ways.push(LoadOptions { look_ahead: false, policy: Some(PolicyKind::S3Fifo), ..base.clone() });
            ways.push(LoadOptions {
                verify: false,
                reads: Some(ReadPlan::Cost(ReadCost::new(0.0, 1.0).unwrap())),
                ..base
            });
        }
        let base = LoadOptions { budget: Some(between), ..base };
        ways.extend(PolicyKind::ALL.map(|policy| LoadOptions { policy: Some(policy), ..base.clone() }));
        ways.push(LoadOptions { engines: EngineChoice::Threads.into(), direct: DirectIo::Disabled, ..base });
        let mut first = None;
        for way in ways {
            let mut model = loaded(&bundle, &way);
            let before = model.read_counters();
            let found = prompts.clone().map(|p| (logits(&mut model, &p), continuation(&mut model, &p, 20, sampling)));
            let counters = model.read_counters().since(before);
            assert!(counters.wanted > counters.hits && counters.bytes > 0, "{counters:?} with {way:?}");
            let expected = first.get_or_insert_with(|| found.clone());
            for (found, expected) in found.iter().zip(expected.iter()) {
                assert_eq!(found.1, expected.1, "ids with {way:?}");
                assert!(found.0 == expected.0, "logits with {way:?}");
            }
        }
        let mut dense = loaded(&bundle, &exact(128, FfnChoice::Resident));
        assert!(logits(&mut dense, &prompts[0]) != first.unwrap()[0].0, "the predictors choose everything");
    }
}

#[test]
fn a_predictor_that_admits_everything_gives_the_resident_model() {
    let prompts: [Vec<u32>; 2] = [37, 5].map(|n| (0..n).map(|i| 2 + i * 97 % 4000).collect());
    for checkpoint in [tiny_opt(), tiny_falcon()] {
        let dir = scratch();
        let bundle = pack_checkpoint(&checkpoint, &dir.path().join("model.flashlm"));
        let all = LoadOptions { predict: false, ..flash(128) };
        let (smallest, largest) = budgets(&bundle, &all);
        let mut resident = loaded(&bundle, &options(128, FfnChoice::Resident));
        for budget in [smallest, (smallest + largest) / 2, largest] {
            let mut flash = loaded(&bundle, &LoadOptions { budget: Some(budget), ..all.clone() });
            for prompt in &prompts {
                assert!(logits(&mut flash, prompt) == logits(&mut resident, prompt), "{budget} bytes");
                let text = |model: &mut _| continuation(model, prompt, 30, Sampling::default());
                assert_eq!(text(&mut flash), text(&mut resident), "{budget} bytes");
            }
        }
    }
}

/// Gated neurons, with biases and without, and one activation or two: decoded, streamed, and as `evaluate` computes them, with
/// predictors that leave out most of what would fire.
#[test]
fn chosen_gated_neurons_are_the_same_however_they_are_computed() {
    let ids: Vec<u32> = (0..37).map(|i| 12 + i * 97 % 180).collect();
    let threads = Threads::new(NonZeroUsize::new(2).unwrap()).unwrap();
    for name in ["llama-relu-gqa", "llama-biases-head-dim", "llama-bamboo", "llama-prosparse", "llama-silu"] {
        let quirk = fixtures().join("quirks").join(name);
        let dir = scratch();
        let path = dir.path().join("model.flashlm");
        let bundle = bundle_with_predictors(&quirk, &path, LayoutOptions::default(), false);
        let (smallest, largest) = budgets(&bundle, &flash(64));
        let found = [smallest, largest].map(|budget| {
            let mut model = loaded(&bundle, &LoadOptions { budget: Some(budget), ..flash(64) });
            let streamed = logits(&mut model, &ids);
            model.truncate(0);
            let decoded: Vec<f32> = ids.iter().flat_map(|id| model.feed(&[*id]).unwrap().to_vec()).collect();
            (streamed, decoded)
        });
        assert!(found[0] == found[1], "{name}: the budget shows");
        let (streamed, decoded) = &found[0];
        let difference = largest_difference(streamed, decoded);
        assert!(difference < 1e-4, "{name}: decoding and streaming differ by {difference}");
        let dense = logits(&mut loaded(&bundle, &exact(64, FfnChoice::Resident)), &ids);
        assert!(largest_difference(streamed, &dense) > 0.01, "{name}: the predictors choose everything");

        let checkpoint = Checkpoint::open(&quirk).unwrap();
        let windows = Windows::new([&ids[..]], 64, [&[]; 2]);
        let vocab = bundle.spec().vocab_size;
        let mut compared = 0;
        let mut seen = |position: usize, [_, ours]: [&[f32]; 2]| {
            assert!(ours == &streamed[position * vocab..][..vocab], "{name}: position {position}");
            compared += 1;
        };
        let evaluated = evaluate(
            &bundle,
            &checkpoint,
            &windows,
            PredictorChoice::Bundle,
            &threads,
            dir.path(),
            &mut |_, _| (),
            &mut seen,
        );
        let layers = evaluated.unwrap().layers;
        assert_eq!(compared, ids.len() - 1);
        let sparse = bundle.spec().ffn().activation.is_sparse();
        assert!(layers.iter().all(|l| (l.active_fraction < 0.6) == sparse), "{name}: {layers:?}");
    }
}

#[test]
fn groups_of_every_size_are_found_and_only_they_are_read() {
    for group_bytes in [1, 3000, 16384] {
        let dir = scratch();
        let path = dir.path().join("model.flashlm");
        let layout = LayoutOptions { group_bytes, ..LayoutOptions::default() };
        let bundle = bundle_with_predictors(&tiny_opt(), &path, layout, false);
        let (least, largest) = budgets(&bundle, &flash(64));
        // The smallest in which nothing but neurons is read.
        let only_neurons =
            |budget: u64| plan(&bundle, &LoadOptions { budget: Some(budget), ..flash(64) }).unwrap().fallback.is_none();
        let (mut below, mut smallest) = (least, largest);
        while smallest - below > 1 {
            let middle = below.midpoint(smallest);
            if only_neurons(middle) { smallest = middle } else { below = middle }
        }
        let ids = |budget| {
            let mut model = loaded(&bundle, &LoadOptions { budget: Some(budget), ..flash(64) });
            let ids = continuation(&mut model, &[2, 50, 60], 20, Sampling::default());
            let before = model.read_counters();
            model.feed(&[9]).unwrap();
            (ids, model.read_counters().since(before))
        };
        let (small, large) = (ids(smallest), ids(largest));
        assert_eq!(small.0, large.0, "groups of {group_bytes}");
        assert!(small.1.bytes > large.1.bytes, "groups of {group_bytes}: {:?} {:?}", small.1, large.1);
        let group = bundle.layout().group_bytes() as u64;
        assert!(small.1.bytes.is_multiple_of(group) && small.1.bytes >= (small.1.wanted - small.1.hits) * group);
    }
}

#[test]
fn damage_is_reported_with_its_place_and_the_model_can_go_on() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let bundle = bundle_with_predictors(&tiny_opt(), &path, LayoutOptions::default(), false);
    let (smallest, largest) = budgets(&bundle, &flash(64));
    let options = LoadOptions { budget: Some(smallest), ..flash(64) };
    let good = continuation(&mut loaded(&bundle, &options), &[2, 50, 60], 10, Sampling::default());

    // Every group of layer 2 but the first half of them is damaged, so the first token meets one.
    let whole = fs::read(&path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    for group in bundle.layout().groups() / 2..bundle.layout().groups() {
        let offset = bundle.group(2, group).offset + 40;
        file.write_all_at(&[!whole[offset as usize]], offset).unwrap();
    }
    // Decoded and streamed; with damage that is read again each time, and with damage that could stay in the cache.
    for (prompt, budget) in [(vec![2, 50, 60], smallest), (vec![2, 50, 60], largest), ((2..40).collect(), largest)] {
        let mut model = loaded(&bundle, &LoadOptions { budget: Some(budget), ..options.clone() });
        for _ in 0..2 {
            match model.feed(&prompt) {
                Err(RuntimeError::Checksum { part, .. }) => assert!(part.ends_with("of layer 2"), "{part}"),
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("damaged weights were computed with"),
            }
            model.truncate(0);
        }
        file.write_all_at(&whole, 0).unwrap();
        assert_eq!(continuation(&mut model, &[2, 50, 60], 10, Sampling::default()), good, "after the repair");
        for group in bundle.layout().groups() / 2..bundle.layout().groups() {
            let offset = bundle.group(2, group).offset + 40;
            file.write_all_at(&[!whole[offset as usize]], offset).unwrap();
        }
    }
    let trusting = LoadOptions { verify: false, ..options };
    assert!(load(&bundle, &trusting, &mut |_, _| {}).unwrap().forward.feed(&[2, 50, 60]).is_ok(), "asked not to look");
}

/// Whatever is planned and tried, the bundle is opened for reading once. (Openings side by side are one event to inotify.)
#[cfg(target_os = "linux")]
#[test]
fn a_load_opens_its_bundle_once() {
    use std::mem::MaybeUninit;

    use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};

    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let bundle = bundle_with_predictors(&tiny_opt(), &path, LayoutOptions::default(), false);
    // Three sources are tried.
    let options = LoadOptions { ffn: None, ..flash(64) };
    let least = |ffn| match plan(&bundle, &LoadOptions { ffn: Some(ffn), budget: Some(1), ..options.clone() }) {
        Err(RuntimeError::BudgetTooSmall { needed, .. }) => needed,
        other => panic!("one byte is enough: {:?}", other.map(|planned| planned.plan)),
    };
    let budget = Some(least(FfnChoice::Flash).min(least(FfnChoice::Streamed)));
    let watch = init(CreateFlags::NONBLOCK).unwrap();
    add_watch(&watch, &path, WatchFlags::OPEN | WatchFlags::CLOSE_NOWRITE).unwrap();
    let model = loaded(&bundle, &LoadOptions { budget, ..options });
    let (mut buffer, mut opened) = ([MaybeUninit::uninit(); 4096], 0);
    let mut events = Reader::new(&watch, &mut buffer);
    while let Ok(event) = events.next() {
        opened += u32::from(event.events().contains(ReadFlags::OPEN));
    }
    assert_eq!(opened, 1);
    drop(model);
}
