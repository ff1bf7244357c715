//! Attacks 31 to 33: one text whatever the memory plan chose, and what is said when it chose a slow way.

use std::path::{Path, PathBuf};

use flashlm_formats::bundle::{Bundle, LayoutOptions};
use flashlm_io::EngineChoice;
use flashlm_runtime::error::RuntimeError;
use flashlm_runtime::load::{FfnChoice, LoadOptions, load, plan};
use flashlm_runtime::sampler::Sampling;
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
    let mut model = loaded(bundle, options);
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: 7, ..Sampling::default() };
    prompts(bundle.spec().vocab_size)
        .iter()
        .map(|prompt| {
            let bits = logits(&mut model, prompt).into_iter().map(f32::to_bits).collect();
            (bits, continuation(&mut model, prompt, 8, sampling))
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
        let (least, most) = (smallest(&predicted, &base), predicted.manifest().model_bytes * 2 + (64 << 20));
        let dense = told(&plain, &options(64, FfnChoice::Resident));
        let mut one: Option<Vec<_>> = None;
        let mut chosen = Vec::new();
        for budget in [least, least + (most - least) / 50, least + (most - least) / 8, most] {
            for (ffn, engine) in [
                (None, EngineChoice::Auto),
                (None, EngineChoice::Threads),
                (Some(MODES[0]), EngineChoice::Auto),
                (Some(MODES[1]), EngineChoice::Threads),
                (Some(MODES[2]), EngineChoice::Auto),
            ] {
                let way = LoadOptions { budget: Some(budget), ffn, engine, ..base.clone() };
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
        for word in [words, "all neurons are read for every token", &needed.to_string()] {
            assert!(said.contains(word), "no {word:?} in {said:?}");
        }
        // Asked for, it is no surprise.
        let asked = LoadOptions { ffn: Some(FfnChoice::Streamed), ..way };
        assert!(load(bundle, &asked, &mut |_, _| ()).unwrap().notices.iter().all(|notice| !notice.important));
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
