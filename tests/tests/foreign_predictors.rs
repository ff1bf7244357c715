//! Predictors of others, from their files to a bundle that runs.

use std::fs;
use std::path::Path;

use flashlm_formats::bundle::{Bundle, PredictorKind};
use flashlm_formats::predictors::TrainReport;
use flashlm_formats::recording::Recording;
use flashlm_prep::train::{LowRankPredictor, training_set};
use flashlm_tests::{root, run, scratch, tiny_falcon, tiny_opt};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

fn save(path: &Path, tensors: &[(&str, Vec<usize>, Vec<f32>)]) {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes);
    let views = views.map(|(t, b)| (t.0, TensorView::new(Dtype::F32, t.1.clone(), b).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn imported_predictors_decide_as_they_did_where_they_come_from() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let model = tiny_opt();
    let model = model.to_str().unwrap();
    let text = root().join("examples/synthetic.txt");
    let recording = path("recording");
    let sampling = ["--tokens", "1000", "--sequence-tokens", "128", "-o", &recording];
    run("flashlm-prep", &[&["record", model, "--text", text.to_str().unwrap()][..], &sampling].concat(), "")
        .succeeded();
    let opened = Recording::open(&dir.path().join("recording")).unwrap();
    let layers = opened.info().model.layers.len();

    // One predictor in both forms: with A over -A and B beside -B a ReLU between them changes nothing.
    for form in ["dejavu", "powerinfer"] {
        fs::create_dir(dir.path().join(form)).unwrap();
    }
    for layer in 0..layers {
        use linfa::ParamGuard;
        use linfa::traits::Fit;
        let set = training_set(&opened, layer, layer).unwrap();
        let fitted = LowRankPredictor::params(8).epochs(1).check().unwrap().fit(&set).unwrap();
        let (a, b) = (&fitted.encoder, &fitted.decoder);
        let (rank, hidden, ffn) = (a.nrows(), a.ncols(), b.nrows());
        let rows = |scale: f32| a.iter().map(move |v| v * scale);
        // Scores beyond the range that curves count in.
        let bias: Vec<f32> = fitted.bias.iter().map(|v| 100.0 * v).collect();
        save(
            &dir.path().join(format!("dejavu/c4_layer{layer}_-0.9.safetensors")),
            &[
                ("0.weight", vec![rank, hidden], rows(100.0).collect()),
                ("1.weight", vec![ffn, rank], b.iter().copied().collect()),
                ("1.bias", vec![ffn], bias.clone()),
            ],
        );
        let beside = b.rows().into_iter().flat_map(|row| {
            let row: Vec<f32> = row.iter().copied().chain(row.iter().map(|v| -v)).collect();
            row
        });
        save(
            &dir.path().join(format!("powerinfer/model_{layer}.safetensors")),
            &[
                ("fc1.weight", vec![2 * rank, hidden], rows(100.0).chain(rows(-100.0)).collect()),
                ("fc2.weight", vec![ffn, 2 * rank], beside.collect()),
                ("fc2.bias", vec![ffn], bias),
            ],
        );
    }

    let mut chosen = Vec::new();
    for (form, kind) in [("dejavu", PredictorKind::LowRank), ("powerinfer", PredictorKind::LowRankRelu)] {
        let [out, bundle] = ["predictors", "flashlm"].map(|name| path(&format!("{form}.{name}")));
        let arguments = ["import-predictors", &path(form), "--recording", &recording, "-o", &out, "--dtype", "f16"];
        run("flashlm-prep", &arguments, "").succeeded();
        let report: Value =
            serde_json::from_slice(&fs::read(Path::new(&out).join("predictors.json")).unwrap()).unwrap();
        let of_layers = report["layers"].as_array().unwrap();
        assert_eq!(of_layers.len(), layers);
        let numbers: Vec<[f64; 2]> = of_layers
            .iter()
            .map(|l| ["false_negative_rate", "predicted_fraction"].map(|key| l["held_out"][key].as_f64().unwrap()))
            .collect();
        // On text that the thresholds were not chosen on, a hundred tokens of it.
        assert!(numbers.iter().all(|[misses, predicted]| *misses <= 0.08 && *predicted < 0.9), "{form}: {numbers:?}");
        let recorded = ["pack", model, "--predictors", &out, "--recording", &recording, "-o", &bundle];
        run("flashlm-prep", &recorded, "").succeeded();
        let manifest = Bundle::open(Path::new(&bundle)).unwrap().manifest().clone();
        assert_eq!(manifest.predictors.unwrap().kind, kind);
        // What the runtime's predictor chooses, in single tokens, is what the threshold was chosen for.
        let packed: Vec<f64> = manifest.sparsity.unwrap().iter().map(|l| f64::from(l.predicted.unwrap())).collect();
        for ([_, expected], found) in numbers.iter().zip(&packed) {
            assert!((expected - found).abs() < 0.05, "{form}: {numbers:?} {packed:?}");
        }
        let story = run("flashlm", &["run", &bundle, "--prompt", "Once upon a time", "-n", "12"], "").succeeded();
        chosen.push((numbers, packed, story));
    }
    let [(linear, linear_packed, story), (relu, relu_packed, relu_story)] = &chosen[..] else { panic!() };
    for (a, b) in linear.iter().flatten().chain(linear_packed).zip(relu.iter().flatten().chain(relu_packed)) {
        assert!((a - b).abs() < 0.01, "{linear:?} {relu:?}");
    }
    assert_eq!(story, relu_story);

    // On a recording of other text they are judged by the figures that `train` prints for one.
    let other = path("other");
    let more = ["--tokens", "500", "--seed", "1", "--sequence-tokens", "128", "-o", &other];
    run("flashlm-prep", &[&["record", model, "--text", text.to_str().unwrap()][..], &more].concat(), "").succeeded();
    let judged = path("judged");
    let arguments =
        ["import-predictors", &path("dejavu"), "--recording", &recording, "--held-out", &other, "-o", &judged];
    let said = run("flashlm-prep", &[&arguments[..], &["--dtype", "f16"]].concat(), "").succeeded();
    assert!(said.contains("(the recording held out)"), "{said}");
    let layers = TrainReport::read(Path::new(&judged)).unwrap().layers;
    let before = TrainReport::read(Path::new(&path("dejavu.predictors"))).unwrap().layers;
    for (layer, before) in layers.iter().zip(&before) {
        // The thresholds stay those that the first recording decides, and another text another figure.
        assert_eq!((layer.held_out, before.validation), (before.held_out, None));
        let on_other = layer.validation.unwrap();
        assert_eq!(on_other.threshold, layer.held_out.threshold);
        assert_ne!(on_other.active_fraction, layer.held_out.active_fraction);
        assert!(on_other.false_negative_rate < 0.2 && on_other.predicted_fraction < 0.9, "{on_other:?}");
    }
    let mean = layers.iter().map(|layer| 100.0 * layer.judged().false_negative_rate).sum::<f64>() / layers.len() as f64;
    assert!(said.contains(&format!("mean: misses {mean:.2} %")), "{said}");
    let (falcon, of_falcon) = (tiny_falcon().to_str().unwrap().to_owned(), path("falcon"));
    let sampling = ["--tokens", "300", "-o", &of_falcon];
    run("flashlm-prep", &[&["record", &falcon, "--text", text.to_str().unwrap()][..], &sampling].concat(), "")
        .succeeded();
    let arguments = ["import-predictors", &path("dejavu"), "--recording", &recording, "-o", &path("x")];
    run("flashlm-prep", &[&arguments[..], &["--held-out", &of_falcon]].concat(), "")
        .failed(1, &["--held-out:", "is a recording of another model"]);
    let train = ["train", &recording, "-o", &path("x"), "--validation", &of_falcon];
    run("flashlm-prep", &train, "").failed(1, &["--validation:", "is a recording of another model"]);

    let refused = run(
        "flashlm-prep",
        &["import-predictors", &path("recording"), "--recording", &recording, "-o", &path("x")],
        "",
    );
    refused.failed(1, &["0.weight and 1.weight", "fc1.weight"]);
}
