//! Attacks 31 to 35: one text whatever the memory plan chose, in the memory that it said, and what is said when it chose a slow way.

use std::path::{Path, PathBuf};

use flashlm::engine::Forward;
use flashlm::error::RuntimeError;
use flashlm::load::load;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::sampler::Sampling;
use flashlm_formats::bundle::{Bundle, LayoutOptions};
use flashlm_io::EngineChoice;
use flashlm_tests::{
    bundle_with_predictors, continuation, fixtures, loaded, logits, options, pack_checkpoint, run, scratch,
    tiny_falcon, tiny_opt,
};

const MODES: [FfnChoice; 3] = [FfnChoice::Resident, FfnChoice::Streamed, FfnChoice::Flash];

/// The smallest budget that these options work in.
fn smallest(bundle: &Bundle, options: &LoadOptions) -> u64 {
    match plan(bundle, &LoadOptions { budget: Some(1), ..options.clone() }) {
        Err(RuntimeError::BudgetTooSmall { needed, .. }) => needed,
        other => panic!("one byte is enough: {:?}", other.map(|planned| planned.plan)),
    }
}

/// Prompts that are computed with matrix products, and token by token.
fn prompts(vocab: usize) -> [Vec<u32>; 2] {
    [37, 5].map(|n| (0..n).map(|i| (12 + i * 97 % (vocab - 12)) as u32).collect())
}

/// Logits and texts, with their bits.
fn told(bundle: &Bundle, options: &LoadOptions) -> Vec<(Vec<u32>, Vec<u32>)> {
    told_with(&mut loaded(bundle, options))
}

fn told_with(model: &mut Forward) -> Vec<(Vec<u32>, Vec<u32>)> {
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: 7, ..Sampling::default() };
    prompts(model.spec().vocab_size)
        .iter()
        .map(|prompt| {
            let bits = logits(model, prompt).into_iter().map(f32::to_bits).collect();
            (bits, continuation(model, prompt, 8, sampling))
        })
        .collect()
}

/// Budgets from the smallest to the whole model, and none at all; every mode, and the one that the plan takes; both engines: with
/// predictors one text, and with `--exact` the text of the bundle without predictors.
#[test]
fn a31_one_text_at_every_budget_and_in_every_mode() {
    let quirk = |name: &str| fixtures().join("quirks").join(name);
    let checkpoints: [(PathBuf, bool); 4] =
        [(tiny_opt(), true), (tiny_falcon(), false), (quirk("llama-relu-gqa"), true), (quirk("llama-bamboo"), false)];
    for (checkpoint, look_ahead) in &checkpoints[..if crate::whole() { 4 } else { 3 }] {
        let dir = scratch();
        let name = checkpoint.display();
        let path = dir.path().join("predicted");
        let predicted = bundle_with_predictors(checkpoint, &path, LayoutOptions::default(), *look_ahead);
        let plain = pack_checkpoint(checkpoint, &dir.path().join("plain"));
        let base = LoadOptions { ffn: None, ..options(64, FfnChoice::Flash) };
        // An engine of threads takes more than a ring.
        let least = smallest(&predicted, &LoadOptions { engines: EngineChoice::Threads.into(), ..base.clone() });
        let most = predicted.manifest().model_bytes * 2 + (64 << 20);
        let dense = told(&plain, &options(64, FfnChoice::Resident));
        let mut one: Option<Vec<_>> = None;
        let mut chosen = Vec::new();
        for budget in [least, least + (most - least) / 40, most] {
            for (ffn, engine) in [
                (None, EngineChoice::Auto),
                (None, EngineChoice::Threads),
                (Some(MODES[0]), EngineChoice::Auto),
                (Some(MODES[1]), EngineChoice::Threads),
                (Some(MODES[2]), EngineChoice::Auto),
            ] {
                let way = LoadOptions { budget: Some(budget), ffn, engines: engine.into(), ..base.clone() };
                let Ok(planned) = plan(&predicted, &way) else {
                    assert!(ffn.is_some(), "{name}: nothing works in {budget} bytes");
                    continue;
                };
                assert!(planned.predicted && planned.plan.total() <= budget, "{name}: {way:?}");
                chosen.push(planned.choice);
                let found = told(&predicted, &way);
                assert!(*one.get_or_insert_with(|| found.clone()) == found, "{name}: another text with {way:?}");
                if budget == most || ffn.is_none() {
                    let way = LoadOptions { predict: false, ..way };
                    if let Ok(planned) = plan(&predicted, &way) {
                        assert!(!planned.predicted, "{name}: {way:?}");
                        assert!(told(&predicted, &way) == dense, "{name}: not the dense text with {way:?}");
                    }
                }
            }
        }
        for mode in MODES {
            assert!(chosen.contains(&mode), "{name}: {mode:?} was never tried");
        }
        assert!(one.unwrap() != dense, "{name}: the predictors choose everything");
    }
}

/// With room for everything, everything is read once: nothing while text is written, or a prompt is read.
#[test]
fn a32_where_everything_fits_nothing_is_read() {
    let dir = scratch();
    let bundle = bundle_with_predictors(&tiny_opt(), &dir.path().join("m"), LayoutOptions::default(), true);
    let free = LoadOptions { ffn: None, ..options(64, FfnChoice::Flash) };
    for way in [free.clone(), LoadOptions { predict: false, ..free.clone() }] {
        assert_eq!(plan(&bundle, &way).unwrap().choice, FfnChoice::Resident);
        let mut model = loaded(&bundle, &way);
        for prompt in prompts(4096) {
            continuation(&mut model, &prompt, 8, Sampling::default());
        }
        assert_eq!(model.read_counters().bytes, 0, "{way:?}");
    }
}

/// A plan that reads every neuron for every token, though nobody asked for that, is announced with what would avoid it.
#[test]
fn a33_a_fallback_is_said() {
    let dir = scratch();
    let predicted = bundle_with_predictors(&tiny_opt(), &dir.path().join("m"), LayoutOptions::default(), false);
    let plain = pack_checkpoint(&tiny_opt(), &dir.path().join("plain"));
    for (bundle, better, words) in
        [(&predicted, FfnChoice::Flash, "a neuron cache does"), (&plain, FfnChoice::Resident, "all neurons do")]
    {
        // One byte less than the better way needs, if a slower one works there.
        let needed = smallest(bundle, &options(64, better));
        let way = LoadOptions { ffn: None, budget: Some(needed - 1), ..options(64, better) };
        let planned = plan(bundle, &way).unwrap_or_else(|e| panic!("nothing slower is smaller: {e}"));
        assert_eq!(planned.choice, FfnChoice::Streamed);
        let said: Vec<String> = load(bundle, &way, &mut |_, _| ())
            .unwrap()
            .notices
            .into_iter()
            .filter(|notice| notice.important)
            .map(|notice| notice.text)
            .collect();
        let said = said.join("; ");
        for word in [words, " are read for every token", &needed.to_string()] {
            assert!(said.contains(word), "no {word:?} in {said:?}");
        }
        // Asked for, it is no surprise.
        let asked = LoadOptions { ffn: Some(FfnChoice::Streamed), ..way };
        let notices = load(bundle, &asked, &mut |_, _| ()).unwrap().notices;
        assert!(!notices.iter().any(|notice| notice.text.contains(" are read for every token")));
    }
    exact_on_the_command_line(&dir.path().join("m"));
}

fn exact_on_the_command_line(bundle: &Path) {
    let text = |more: &[&str]| {
        let args = ["run", bundle.to_str().unwrap(), "--ids", "2,50,60", "-n", "30", "--ignore-eos"];
        run("flashlm", &[&args[..], more].concat(), "")
    };
    let predicted = text(&[]).succeeded();
    let dense = text(&["--exact"]).succeeded();
    assert!(predicted != dense);
    for ffn in ["resident", "streamed", "flash"] {
        assert_eq!(text(&["--ffn", ffn]).succeeded(), predicted, "{ffn}");
        assert_eq!(text(&["--ffn", ffn, "--exact"]).succeeded(), dense, "{ffn}");
    }
    // The baselines are what others do, without predictors.
    assert_eq!(text(&["--ffn", "naive"]).succeeded(), dense);
    assert_eq!(text(&["--ffn", "hybrid"]).succeeded(), dense);
    text(&["--predictor", "all"]).failed(2, &["--exact"]);
}

/// Prompts at every length that is cut otherwise by smaller scratch: the same bits as with scratch for whole pieces.
#[test]
fn a34_the_room_for_a_prompt_changes_no_bit() {
    for (checkpoint, context) in [(tiny_opt(), 512), (fixtures().join("quirks/llama-relu-gqa"), 128)] {
        let dir = scratch();
        let bundle = bundle_with_predictors(&checkpoint, &dir.path().join("m"), LayoutOptions::default(), false);
        let context = context.min(bundle.spec().max_positions);
        let vocab = bundle.spec().vocab_size as u32;
        for ffn in [FfnChoice::Flash, FfnChoice::Streamed] {
            let roomy = LoadOptions { budget: Some(1 << 40), ..options(context, ffn) };
            let tight = LoadOptions { budget: Some(smallest(&bundle, &roomy)), ..roomy.clone() };
            let scratch_tokens = [&roomy, &tight].map(|way| plan(&bundle, way).unwrap().scratch_tokens);
            assert_eq!(scratch_tokens, [256, 32]);
            let (mut roomy, mut tight) = (loaded(&bundle, &roomy), loaded(&bundle, &tight));
            for length in [1, 15, 16, 31, 32, 33, 63, 64, 65, 100, 127, 255, 256, 257, 271, 300, 512] {
                if length > context || length > 300 && ffn == FfnChoice::Streamed && !crate::whole() {
                    continue;
                }
                let ids: Vec<u32> = (0..length as u32).map(|i| 12 + (i * 97 + length as u32) % (vocab - 12)).collect();
                let [expected, found] = [&mut roomy, &mut tight].map(|model| {
                    model.truncate(0);
                    let last = model.feed(&ids).unwrap().to_vec();
                    // What was left in the KV cache shows in what follows.
                    model.truncate(length - 1);
                    (last, model.feed(&ids[length - 1..]).unwrap().to_vec())
                });
                assert!(expected == found, "{length} tokens, {ffn:?}");
            }
        }
    }
}

/// Budgets that do not hold the vocabulary: rows of it are read, and verified against checksums; embedding and head of their own, and
/// one matrix for both.
#[test]
fn a35_a_vocabulary_on_flash_gives_the_same_text_and_is_checked() {
    for checkpoint in [tiny_opt(), tiny_falcon()] {
        let dir = scratch();
        let path = dir.path().join("m");
        let bundle = bundle_with_predictors(&checkpoint, &path, LayoutOptions::default(), true);
        let base = options(64, FfnChoice::Flash);
        let expected = told(&bundle, &base);
        let least = smallest(&bundle, &base);
        let (spec, mut cut) = (bundle.spec().clone(), Vec::new());
        for step in 0..8 {
            let way = LoadOptions { budget: Some(least + step * (512 << 10)), ..base.clone() };
            let planned = plan(&bundle, &way).unwrap();
            cut.push(planned.tables.head);
            assert_eq!(planned.tables.head < spec.vocab_size, planned.fallback.is_some(), "{:?}", planned.fallback);
            assert!(told(&bundle, &way) == expected, "{:?} of {}", planned.tables, checkpoint.display());
        }
        assert!(cut.is_sorted() && cut[0] < spec.vocab_size / 8 && cut[7] == spec.vocab_size, "{cut:?}");

        // The last row of the matrix is damaged after it was loaded: seen when it is read again.
        let way = LoadOptions { budget: Some(least), ..base.clone() };
        let mut model = loaded(&bundle, &way);
        let name = if spec.tied_head { "embed.tokens" } else { "head.weight" };
        let tensor = bundle.resident_tensor(name).unwrap().extent;
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        use std::os::unix::fs::FileExt;
        let (mut byte, at) = ([0], tensor.offset + tensor.bytes - 3);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
        // What was read ahead was read before: the second token meets it at the latest.
        let error =
            (0..3).find_map(|_| model.feed(&[5]).err()).expect("damaged weights were computed with").to_string();
        let row = format!("row {} of the vocabulary's matrix", spec.vocab_size - 1);
        assert!(error.contains(&row) && error.contains(path.to_str().unwrap()), "{error}");
        file.write_all_at(&byte, at).unwrap();
        assert!(told_with(&mut model) == expected, "after the repair");
    }
}
