//! Gated FFNs (gate, up and down in a record) through the whole of preparation, on miniatures: from the checkpoint to a run from flash.
//! Then quantised bundles on the same way.

use std::fs;
use std::path::Path;

use flashlm::options::{FfnChoice, LoadOptions};
use flashlm_formats::bundle::{Bundle, verify};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_kernels::Threads;
use flashlm_prep::evaluate::{Evaluation, PredictorChoice, Windows, evaluate};
use flashlm_tests::{budgets, copied, exact, fixtures, largest_difference, loaded, logits, options, run};
use serde_json::json;
use tempfile::TempDir;

/// Of the miniatures.
const VOCABULARY: u32 = 192;

/// A miniature with a tokenizer of one token for each word, and a text of these words.
fn miniature(quirk: &str) -> TempDir {
    let dir = copied(&fixtures().join("quirks").join(quirk));
    let vocabulary: serde_json::Map<_, _> = (0..VOCABULARY).map(|id| (format!("w{id}"), id.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "w3" },
    });
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    // The smaller of two draws: some words are frequent, some rare.
    let mut seed = 1u64;
    let mut word = || {
        let mut draw = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            12 + (seed >> 33) as u32 % (VOCABULARY - 12)
        };
        format!("w{}", draw().min(draw()))
    };
    let documents: Vec<String> = (0..60).map(|_| (0..40).map(|_| word()).collect::<Vec<_>>().join(" ")).collect();
    fs::write(dir.path().join("text.txt"), documents.join("\n<|endoftext|>\n")).unwrap();
    dir
}

/// `flashlm-prep prepare` of a miniature, and what it said.
fn prepared(dir: &TempDir, more: &[&str]) -> (Bundle, String) {
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (model, text, output) = (path(""), path("text.txt"), path("model.flashlm"));
    let args =
        ["prepare", &model, "--text", &text, "-o", &output, "--tokens", "1200", "--sequence-tokens", "64", "--anyway"];
    let said = run("flashlm-prep", &[&args[..], more].concat(), "");
    assert_eq!(said.code, Some(0), "{said:?}");
    let report = verify(Path::new(&output), &mut |_, _| ()).unwrap();
    assert!(report.damages.is_empty() && report.unused_bytes == 0, "{report:?}");
    (Bundle::open(Path::new(&output)).unwrap(), said.stderr)
}

/// The bundle against its checkpoint, on words that it was not prepared with.
fn evaluated(bundle: &Bundle, dir: &TempDir, choice: PredictorChoice) -> Evaluation {
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let ids: Vec<u32> = (0..300).map(|i| 12 + (i * i * 7 + i * 37) % (VOCABULARY - 12)).collect();
    let windows = Windows::new([&ids[..]], 64, [bundle.spec().bos.as_slice(); 2]);
    let threads = Threads::new(std::thread::available_parallelism().unwrap()).unwrap();
    evaluate(bundle, &checkpoint, &windows, choice, &threads, dir.path(), &mut |_, _| (), &mut |_, _| ()).unwrap()
}

/// Flash gives what memory gives when the predictors' choice is ignored, at the smallest budget and a large one; and something else
/// when they are heard.
fn runs_from_flash(bundle: &Bundle) {
    let ids: Vec<u32> = (12..60).collect();
    let resident = logits(&mut loaded(bundle, &exact(64, FfnChoice::Resident)), &ids);
    let everything = exact(64, FfnChoice::Flash);
    let (smallest, largest) = budgets(bundle, &everything);
    for budget in [smallest, largest] {
        let everything = LoadOptions { budget: Some(budget), ..everything.clone() };
        assert!(logits(&mut loaded(bundle, &everything), &ids) == resident, "with all neurons in {budget} bytes");
    }
    let decoded = |budget| {
        let mut model = loaded(bundle, &LoadOptions { budget: Some(budget), ..options(64, FfnChoice::Flash) });
        // One by one: many together are computed whole.
        model.truncate(0);
        let mut all = Vec::new();
        ids.iter().for_each(|&id| all.extend_from_slice(model.feed(&[id]).unwrap()));
        all
    };
    let (smallest, largest) = budgets(bundle, &options(64, FfnChoice::Flash));
    let chosen = decoded(smallest);
    assert!(chosen == decoded(largest), "the budget shows in the logits");
    assert!(largest_difference(&chosen, &resident) > 0.0, "the predictors choose everything");
}

#[test]
fn gated_miniatures_are_prepared_evaluated_and_run_from_flash() {
    for (quirk, more, is_sparse) in [
        ("llama-relu-gqa", &[][..], true),
        ("llama-prosparse", &[], true),
        ("llama-bamboo", &["--look-ahead", "4"], true),
        ("llama-silu", &["--quality-loss", "5%"], false),
    ] {
        let dir = miniature(quirk);
        let (bundle, said) = prepared(&dir, more);
        assert_eq!(bundle.layout().record_bytes(), 3 * 48 * 2, "{quirk}");
        let spec = bundle.spec();
        assert_eq!(spec.thresholds.len(), if is_sparse { 0 } else { spec.layers.len() }, "{quirk}: {said}");
        assert_eq!(said.contains("At a loss of 5.0 %"), !is_sparse, "{quirk}: {said}");
        assert!(spec.thresholds.iter().all(|t| *t > 0.0), "{quirk}: {:?}", spec.thresholds);

        let all = evaluated(&bundle, &dir, PredictorChoice::All);
        assert!(all.kl_mean < 1e-8 && all.top1_agreement == 1.0, "{quirk}: {all:?}");
        let active = evaluated(&bundle, &dir, PredictorChoice::Active);
        for layer in &active.layers {
            assert!(layer.active_fraction > 0.02 && layer.active_fraction < 0.9, "{quirk}: {layer:?}");
            assert_eq!((layer.false_negative_rate, layer.false_positive_rate), (0.0, Some(0.0)), "{quirk}");
        }
        // Only where there are thresholds does leaving out the inactive change anything.
        assert_eq!(active.kl_mean > 1e-6, !is_sparse, "{quirk}: {active:?}");
        let chosen = evaluated(&bundle, &dir, PredictorChoice::Bundle);
        for layer in &chosen.layers {
            assert!(layer.predicted_fraction > 0.05 && layer.predicted_fraction < 1.0, "{quirk}: {layer:?}");
            // Better than chance: of what is active a larger share is found than of the rest.
            let found = 1.0 - layer.false_negative_rate;
            assert!(found > 0.75 && found > layer.false_positive_rate.unwrap() + 0.05, "{quirk}: {layer:?}");
        }
        runs_from_flash(&bundle);
    }
}

#[test]
fn quantised_bundles_are_prepared_evaluated_and_run_from_flash() {
    let dir = miniature("llama-relu-gqa");
    let (plain, _) = prepared(&dir, &[]);
    let plain_bytes = plain.file_bytes();
    for (ffn, resident, most) in [("int8/32", "int8/32", 0.003), ("int4/32", "int4/32", 0.3)] {
        // Predictors and orders are made for the bytes that neurons take.
        let (bundle, _) = prepared(&dir, &["--dtype", ffn, "--resident-dtype", resident]);
        let manifest = bundle.manifest();
        assert_eq!(manifest.ffn.dtype.to_string(), ffn);
        assert_eq!(manifest.resident.matrices.unwrap().to_string(), resident);
        assert_eq!(manifest.resident.embedding.unwrap().to_string(), "int8/32");
        assert!(bundle.file_bytes() < plain_bytes, "{ffn}: {} and {plain_bytes} bytes", bundle.file_bytes());
        let all = evaluated(&bundle, &dir, PredictorChoice::All);
        assert!(all.kl_mean > 0.0 && all.kl_mean < most, "{ffn}: {all:?}");
        let chosen = evaluated(&bundle, &dir, PredictorChoice::Bundle);
        for layer in &chosen.layers {
            assert!(layer.false_negative_rate < 0.06, "{ffn}: predictors miss {layer:?}");
        }
        runs_from_flash(&bundle);
    }
}

#[test]
fn an_order_made_for_other_groups_is_not_packed_in_silence() {
    let dir = miniature("llama-relu-gqa");
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (model, text, recording, predictors) = (path(""), path("text.txt"), path("recording"), path("predictors"));
    run("flashlm-prep", &["record", &model, "--text", &text, "--tokens", "1200", "-o", &recording], "").succeeded();
    run("flashlm-prep", &["train", &recording, "--rank", "8", "-o", &predictors], "").succeeded();
    for (made_for, packed_as, is_other) in [("f16", "int4/32", true), ("int4", "int4/32", false)] {
        let (orders, output) = (path("orders"), path("model.flashlm"));
        run("flashlm-prep", &["order", &recording, "--dtype", made_for, "-o", &orders], "").succeeded();
        let pack = ["pack", &model, "--predictors", &predictors, "--orders", &orders, "--dtype", packed_as];
        let said = run("flashlm-prep", &[&pack[..], &["-o", &output, "--force"]].concat(), "");
        assert_eq!(said.code, Some(0), "{said:?}");
        let asked_for = format!(
            "`flashlm-prep order --dtype {}",
            packed_as.parse::<flashlm_formats::weight_format::WeightFormat>().unwrap()
        );
        assert_eq!(said.stderr.contains(&asked_for), is_other, "{made_for} packed as {packed_as}: {said:?}");
        runs_from_flash(&Bundle::open(Path::new(&output)).unwrap());
    }
}
