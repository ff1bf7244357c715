//! Thresholds, from the checkpoint to a run from flash: they are measured, predictors learn what is above them, and what is
//! computed is computed whole.

use std::fs;

use flashlm::options::FfnChoice;
use flashlm_formats::bundle::Bundle;
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::thresholds::ThresholdFile;
use flashlm_kernels::Threads;
use flashlm_prep::evaluate::{Evaluation, PredictorChoice, Windows, evaluate};
use flashlm_tests::{copied, exact, largest_difference, loaded, logits, options, root, run, tiny_falcon, tiny_opt};

/// A model of its own for a test. One with ReLU: of trained models only such are shipped, and thresholds do the same to it.
fn falcon() -> tempfile::TempDir {
    copied(&tiny_falcon())
}

#[test]
fn a_model_is_prepared_with_thresholds() {
    let dir = falcon();
    let (checkpoint, text) = (dir.path().to_str().unwrap(), root().join("examples/synthetic.txt"));
    let (text, path) = (text.to_str().unwrap(), dir.path().join("model.flashlm"));
    let args = ["prepare", checkpoint, "--text", text, "-o", path.to_str().unwrap(), "--tokens", "800"];
    let said = run("flashlm-prep", &[&args[..], &["--quality-loss", "5%"]].concat(), "");
    assert_eq!(said.code, Some(0), "{said:?}");
    for word in ["energy cut", "At a loss of 5.0 %", "before caching"] {
        assert!(said.stderr.contains(word), "no {word} in {}", said.stderr);
    }
    let bundle = Bundle::open(&path).unwrap();
    let active: f32 = bundle.manifest().sparsity.iter().flatten().map(|layer| layer.active).sum();
    assert!(active < 0.26, "{active}: ReLU alone leaves 4.4 % of the neurons of each of six layers");
    let spec = bundle.spec();
    assert!(
        spec.thresholds.len() == spec.layers.len() && spec.thresholds.iter().all(|t| *t > 0.0),
        "{:?}",
        spec.thresholds
    );

    // The thresholds are the bundle's: the checkpoint itself has none, and they are one model all the same.
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let ids: Vec<u32> = (0..300).map(|i| 300 + (i * 37) % 900).collect();
    let windows = Windows::new([&ids[..]], 128, [&[]; 2]);
    let threads = Threads::new(std::thread::available_parallelism().unwrap()).unwrap();
    let evaluated = |choice| -> Evaluation {
        evaluate(&bundle, &checkpoint, &windows, choice, &threads, dir.path(), &mut |_, _| (), &mut |_, _| ()).unwrap()
    };
    let all = evaluated(PredictorChoice::All);
    assert!(all.kl_mean < 1e-8 && all.layers.iter().all(|l| l.predicted_fraction == 1.0 && l.active_fraction < 0.3));
    let active = evaluated(PredictorChoice::Active);
    for layer in &active.layers {
        assert_eq!((layer.false_negative_rate, layer.false_positive_rate), (0.0, Some(0.0)));
        assert!(layer.active_fraction == layer.predicted_fraction && layer.energy_recall < 1.0, "{layer:?}");
    }
    assert!(active.kl_mean > 1e-6, "nothing was left out");
    let predicted = evaluated(PredictorChoice::Bundle);
    assert!(predicted.layers.iter().all(|l| l.predicted_fraction > 0.0 && l.predicted_fraction < 1.0));

    // Whatever is chosen is computed whole: with everything chosen, the thresholds show nowhere.
    let ids = &ids[..40];
    let resident = logits(&mut loaded(&bundle, &exact(64, FfnChoice::Resident)), ids);
    assert!(logits(&mut loaded(&bundle, &exact(64, FfnChoice::Flash)), ids) == resident);
    let chosen = logits(&mut loaded(&bundle, &options(64, FfnChoice::Flash)), ids);
    assert!(largest_difference(&chosen, &resident) > 0.0);
}

#[test]
fn thresholds_belong_to_their_checkpoint() {
    let dir = falcon();
    let (text, file) = (root().join("examples/synthetic.txt"), dir.path().join("thresholds.json"));
    let (text, file_name) = (text.to_str().unwrap(), file.to_str().unwrap());
    let args =
        ["thresholds", dir.path().to_str().unwrap(), "--text", text, "--tokens", "600", "-o", file_name, "--json"];
    let said = run("flashlm-prep", &args, "").succeeded();
    assert_eq!(said.trim_end(), fs::read_to_string(&file).unwrap().trim_end());
    let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
    let measured = ThresholdFile::apply(&file, &mut checkpoint).unwrap().measured;
    assert_eq!(checkpoint.spec().thresholds, measured.thresholds);
    let falls = measured.levels.windows(2).all(|pair| pair[0].active > pair[1].active);
    assert!(falls && measured.levels[7].perplexity > measured.perplexity, "{measured:?}");

    // Recorded with them, as many neurons are active as was said.
    let recording = dir.path().join("recording");
    let record = |checkpoint: &str| {
        let to = ["-o", recording.to_str().unwrap(), "--tokens", "600", "--thresholds", file_name];
        run("flashlm-prep", &[&["record", checkpoint, "--text", text], &to[..]].concat(), "")
    };
    record(tiny_opt().to_str().unwrap()).failed(1, &["another checkpoint", "find thresholds for this one"]);
    assert_eq!(record(dir.path().to_str().unwrap()).code, Some(0));
    let recording = flashlm_formats::recording::Recording::open(&recording).unwrap();
    assert_eq!(recording.info().model.thresholds, measured.thresholds);
    for (layer, expected) in measured.active.iter().enumerate() {
        let found = recording.layer(layer).unwrap().active_fraction();
        assert!((found - expected).abs() < 1e-4, "layer {layer}: {found} active, expected {expected}");
    }
}
