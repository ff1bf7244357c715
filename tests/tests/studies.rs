//! What a study of predictors, caches and disks needs: the log of training, seeds and thresholds, replays, other disks' profiles.

use std::path::Path;

use flashlm_formats::bundle::Bundle;
use flashlm_formats::predictors::{LayerTraining, PredictorForm, SeedPoint, StartKind, TrainReport};
use flashlm_io::{DiskProfile, PROFILE_VERSION, RandomRate};
use flashlm_tests::{root, run, scratch};
use serde_json::Value;

fn prep(args: &[&str]) -> String {
    run("flashlm-prep", args, "").succeeded()
}

fn example(name: &str) -> String {
    root().join("examples").join(name).to_str().unwrap().to_owned()
}

/// A recording of the example model.
fn record(dir: &Path) -> String {
    let recording = dir.join("recording").to_str().unwrap().to_owned();
    let (model, text) = (example("tiny-opt"), example("synthetic.txt"));
    prep(&["record", &model, "--text", &text, "-o", &recording, "--tokens", "2500", "--sequence-tokens", "128"]);
    recording
}

#[test]
fn training_is_logged_and_follows_its_options() {
    let dir = scratch();
    let recording = record(dir.path());
    let train = |name: &str, more: &[&str]| -> (TrainReport, Vec<LayerTraining>, String) {
        let out = dir.path().join(name);
        let args = ["train", &recording, "--layers", "6..8", "--epochs", "4", "-o", out.to_str().unwrap()];
        let said = prep(&[&args[..], more].concat());
        let log = std::fs::read(out.join("training.json")).unwrap();
        (TrainReport::read(&out).unwrap(), serde_json::from_slice(&log).unwrap(), said)
    };
    let model = example("tiny-opt");
    let mixed = "8,8,8,8,8,8,projection,16";
    let (report, log, said) = train("seeds", &["--model", &model, "--rank", mixed, "--seeds", "3", "--seed", "5"]);
    assert_eq!(log.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [6, 7]);
    let fit = log[1].fit.as_ref().unwrap();
    assert_ne!(fit.start, StartKind::Principal, "the weights tell more: {fit:?}");
    let rates: Vec<f64> = fit.epochs.iter().map(|epoch| epoch.false_positive_rate).collect();
    let kept = rates[fit.kept.unwrap()];
    assert!(rates.iter().all(|rate| *rate >= kept) && rates.len() <= 4, "{fit:?}");
    assert!(kept < fit.start_false_positive_rate, "{fit:?}");
    // The quantised projection is not trained, so no seed changes it.
    assert_eq!((log[0].form, &log[0].fit), (PredictorForm::PROJECTION, &None));
    for (layer, stored) in log.iter().zip(&report.layers) {
        let of = |seed: &SeedPoint| (seed.false_negative_rate, seed.false_positive_rate);
        assert_eq!(layer.seeds.iter().map(|seed| seed.seed).collect::<Vec<_>>(), [5, 6, 7]);
        assert_eq!(of(&layer.seeds[0]), (stored.held_out.false_negative_rate, stored.held_out.false_positive_rate));
        assert_eq!(layer.seeds.iter().any(|seed| of(seed) != of(&layer.seeds[0])), layer.layer == 7, "{layer:?}");
    }
    assert!(said.contains("over 3 seeds, mean and standard deviation"), "{said}");

    // Each option changes the fit, and the same options give the same log.
    let fit_of = |name: &str, more: &[&str]| train(name, &[&["--rank", "8"], more].concat()).1[0].fit.clone().unwrap();
    let plain = fit_of("plain", &[]);
    assert_eq!(plain.start, StartKind::Principal);
    assert_eq!(plain, fit_of("again", &["--batch", "256", "--balance", "0.5", "--patience", "2"]));
    for (name, options) in
        [("lr", ["--learning-rate", "0.001"]), ("batch", ["--batch", "64"]), ("balance", ["--balance", "1"])]
    {
        assert_ne!(plain.epochs, fit_of(name, &options).epochs, "{name}");
    }
    // Of so few tokens the last layer's start at this rank is better than any epoch. The second is worse than the first:
    // patience says whether others follow.
    let wide = "8,8,8,8,8,8,projection,64";
    for (name, patience, epochs) in [("hasty", "1", 2), ("patient", "2", 4)] {
        let (_, log, _) = train(name, &["--model", &model, "--rank", wide, "--patience", patience]);
        let fit = log[1].fit.as_ref().unwrap();
        assert_eq!((fit.kept, fit.epochs.len()), (None, epochs), "{fit:?}");
    }

    // The threshold is on the trained logit: 0 for one half, ln 9 for nine tenths.
    let fixed = |name: &str, p: &str| train(name, &["--rank", "8", "--fixed-threshold", p]).0.layers[0].held_out;
    let (half, most) = (fixed("half", "0.5"), fixed("most", "0.9"));
    assert_eq!(half.threshold, 0.0);
    assert!((most.threshold - 9f32.ln()).abs() < 0.01 && most.false_negative_rate > half.false_negative_rate);
    let both = ["train", &recording, "-o", "none", "--fixed-threshold", "0.5", "--recall", "0.9"];
    run("flashlm-prep", &both, "").failed(2, &["--recall"]);
}

/// The figures of a replay, by policy and size.
fn replay(args: &[&str]) -> Value {
    serde_json::from_str(&prep(&[&["replay"], args, &["--json"]].concat())).unwrap()
}

#[test]
fn replays_agree_with_bundles_and_traces() {
    let dir = scratch();
    let recording = record(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (predictors, orders, bundle, traces) = (path("predictors"), path("orders"), path("m.flashlm"), path("traces"));
    prep(&["train", &recording, "--rank", "8", "--epochs", "1", "-o", &predictors]);
    prep(&["order", &recording, "--strategy", "frequency", "-o", &orders]);
    let packed = ["--predictors", &predictors, "--orders", &orders];
    prep(&[&["pack", &example("tiny-opt"), "--recording", &recording, "-o", &bundle], &packed[..]].concat());

    let sizes = ["--cache", "10%,30%,60"];
    let of_files = replay(&[&[recording.as_str()], &packed[..], &sizes].concat());
    let of_bundle =
        replay(&[&[recording.as_str(), "--bundle", &bundle, "--write-traces", &traces], &sizes[..]].concat());
    assert_eq!(of_files, of_bundle);
    let text = |value: &Value| value.to_string();
    let (warm_up, bytes) = (text(&of_bundle["warm_up"]), text(&of_bundle["group_bytes"]));
    let groups = text(&of_bundle["groups"]);
    let of_traces = ["--traces", &traces, "--warm-up", &warm_up, "--groups", &groups, "--group-bytes", &bytes];
    assert_eq!(replay(&[&of_traces[..], &sizes].concat()), of_bundle);

    let results = of_bundle["results"].as_array().unwrap();
    assert_eq!(results.len(), 3 * 6);
    let missed = |result: &Value| result["missed_per_token"].as_f64().unwrap();
    for of_size in results.chunks(6) {
        let (optimum, policies) = of_size.split_last().unwrap();
        assert_eq!(optimum["policy"], "belady");
        assert!(
            missed(optimum) > 0.0 && policies.iter().all(|policy| missed(policy) >= missed(optimum)),
            "{of_size:?}"
        );
    }
    // What the bundle itself says of the policy that each of its layers has.
    let half_lives = "lfu:4,lfu:8,lfu:16,lfu:32,lfu:64,lfu:128,lfu:256,lfu:1024";
    let lfu = replay(&[&[recording.as_str()], &packed[..], &["--cache", "10%", "--policy", half_lives]].concat());
    for (layer, said) in Bundle::open(&bundle).unwrap().manifest().sparsity.as_ref().unwrap().iter().enumerate() {
        let half_life = serde_json::to_value(said).unwrap()["half_life"].as_u64().unwrap_or(64);
        let of_policy = |result: &&Value| result["policy"] == format!("lfu:{half_life}");
        let replayed = &lfu["results"].as_array().unwrap().iter().find(of_policy).unwrap()["layers"][layer];
        let point = said.reuse.iter().find(|point| replayed["slots"] == point.slots).unwrap();
        assert!((missed(replayed) - f64::from(point.missed)).abs() < 1e-3, "{replayed} {point:?}");
    }

    // A directory with files in it stays as it is.
    run("flashlm-prep", &["replay", &recording, "--write-traces", &orders], "").failed(1, &["not empty"]);
    run("flashlm-prep", &["replay", "--traces", &orders], "").failed(1, &["holds no traces"]);
    run("flashlm-prep", &["replay", &recording, "--policy", "fifo"], "").failed(2, &["unknown cache policy"]);

    other_disks(&bundle, dir.path());
}

/// Plans, runs and benches take the disk that they are told.
fn other_disks(bundle: &str, dir: &Path) {
    let profile = |name: &str, us: f64| {
        let rate = |read_bytes: u64| RandomRate {
            read_bytes,
            depth: 32,
            reads_per_s: 1e6 / (us + read_bytes as f64 / 1000.0),
        };
        let profile = DiskProfile {
            version: PROFILE_VERSION,
            device: name.into(),
            mode: "direct".into(),
            engine: "io_uring".into(),
            sequential_bytes_per_s: 1e9,
            random: [4096, 65_536, 1 << 20].map(rate).to_vec(),
        };
        let path = dir.join(name);
        std::fs::write(&path, profile.to_json()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (slow, quick) = (profile("slow", 5000.0), profile("quick", 1.0));
    let flash = [bundle, "--memory", "24MB", "--ffn", "flash", "--speculate", "off"];
    let plan = |disk: &str| -> f64 {
        let args = [&["plan"], &flash[..], &["--json", "--disk", disk]].concat();
        let plan: Value = serde_json::from_str(&run("flashlm", &args, "").succeeded()).unwrap();
        plan["expected"]["io_most_ms"].as_f64().unwrap()
    };
    let [slow_ms, typical_ms, quick_ms] = [&slow, "none", &quick].map(plan);
    assert!(slow_ms > 10.0 * typical_ms && typical_ms > 1.3 * quick_ms, "{slow_ms} {typical_ms} {quick_ms}");

    let text = |disk: &str| {
        let args = [&["run"], &flash[..], &["--ids", "2,713,16", "-n", "8", "--verbose", "--disk", disk]].concat();
        let said = run("flashlm", &args, "");
        assert!(said.stderr.contains("reads are planned for a given cost"), "{said:?}");
        said.succeeded()
    };
    assert_eq!(text(&slow), text("none"));

    let bench = |disk: &str| -> Value {
        let few = ["--steps", "overlap", "--prompt-tokens", "8", "--tokens", "4", "--repeats", "1", "--json"];
        let args = [&["bench", bundle, "--memory", "24MB", "--disk", disk], &few[..]].concat();
        serde_json::from_str::<Value>(&run("flashlm", &args, "").succeeded()).unwrap()["machine"].take()
    };
    assert_eq!(bench(&slow)["disk_profile"]["device"], "slow");
    let machine = bench("none");
    assert!(machine["disk_profile"].is_null() && machine["limits"]["from"] == "bandwidth", "{machine}");

    let other = example("tiny-opt/config.json");
    for command in [&["run", bundle, "--ids", "2"][..], &["bench", bundle]] {
        let with = |disk| run("flashlm", &[command, &["--disk", disk]].concat(), "");
        with(&other).failed(1, &["not a disk profile"]);
        with("absent").failed(1, &["cannot read the disk profile absent"]);
    }
}
