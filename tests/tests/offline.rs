//! The offline stage on the example model: recording against PyTorch, `prepare` interrupted and resumed, evaluation.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flashlm::options::FfnChoice;
use flashlm_formats::bundle::{Bundle, verify};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::recording::Recording;
use flashlm_kernels::Threads;
use flashlm_prep::evaluate::{PredictorChoice, Windows, evaluate};
use flashlm_prep::record::{Calibration, Recorder};
use flashlm_prep::states;
use flashlm_tests::{exact, loaded, logits, program, root, scratch};

fn threads() -> Threads {
    Threads::new(std::thread::available_parallelism().unwrap()).unwrap()
}

/// The shipped recording was made by `examples/record_with_transformers.py`, from the first two layers.
#[test]
fn our_recording_agrees_with_the_one_made_with_transformers() {
    let theirs = Recording::open(&root().join("tests/fixtures/recording-tiny-opt")).unwrap();
    let checkpoint = Checkpoint::open(root().join("examples/tiny-opt")).unwrap();
    let calibration = Calibration {
        tokens: theirs.tokens().to_vec(),
        sequences: theirs.sequence_offsets().to_vec(),
        documents: theirs.documents().to_vec(),
        sequence_tokens: 48,
        ..Calibration::default()
    };
    let dir = scratch();
    let mut recorder = Recorder::open(&checkpoint, &calibration, dir.path(), threads()).unwrap();
    let (mut bits, mut different) = (0usize, 0usize);
    for layer in 0..2 {
        recorder.record(layer, true, &mut |_| ()).unwrap();
        let (mut ours, mut theirs) = (recorder.recording().layer(layer).unwrap(), theirs.layer(layer).unwrap());
        let (tokens, hidden) = (ours.tokens(), ours.hidden());
        let mut inputs = [vec![half::f16::ZERO; tokens * hidden], vec![half::f16::ZERO; tokens * hidden]];
        ours.read_inputs(0..tokens, &mut inputs[0]).unwrap();
        theirs.read_inputs(0..tokens, &mut inputs[1]).unwrap();
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let size = norm(&mut inputs[1].iter().map(|v| v.to_f64()));
        let error = norm(&mut inputs[0].iter().zip(&inputs[1]).map(|(a, b)| a.to_f64() - b.to_f64()));
        assert!(error < 1e-2 * size, "layer {layer}: inputs differ by {}", error / size);
        for token in 0..tokens {
            let pairs = ours.activity(token).iter().zip(theirs.activity(token));
            different += pairs.map(|(a, b)| (a ^ b).count_ones() as usize).sum::<usize>();
            bits += ours.ffn();
        }
        let norms = ours.summary().down_norms.iter().zip(&theirs.summary().down_norms);
        assert!(norms.into_iter().all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs()));
    }
    assert!((different as f64) < 1e-3 * bits as f64, "{different} of {bits} bits differ");
}

/// Files under a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn layers_are_deleted_one_by_one() {
    let dir = scratch();
    let path = dir.path().join("model.flashlm");
    let mut child = prepare(&path, &[]).spawn().unwrap();
    let recording = dir.path().join("model.flashlm.work/recording");
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        if let Ok(entries) = std::fs::read_dir(&recording) {
            let name = |e: std::io::Result<std::fs::DirEntry>| e.ok()?.file_name().into_string().ok();
            most = most.max(
                entries.filter_map(name).filter(|n| n.starts_with("layer-") && n.ends_with(".safetensors")).count(),
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(most, 1, "recorded layers at a time");
    let kept = files(&dir.path().join("model.flashlm.work"));
    assert!(
        kept.iter().all(|f| !f.to_str().unwrap().contains("recording") && !f.to_str().unwrap().contains("pilot")),
        "{kept:?}"
    );

    // With a look-ahead two layers are looked at together, and the bundle's look-ahead predicts.
    let ahead = dir.path().join("ahead.flashlm");
    succeed(prepare(&ahead, &["--look-ahead", "8"]));
    let bundle = Bundle::open(&ahead).unwrap();
    let ranks: Vec<Option<usize>> =
        bundle.manifest().predictors.as_ref().unwrap().layers.iter().map(|l| l.look_ahead_rank).collect();
    assert_eq!(ranks[..7], [Some(8); 7]);
    assert_eq!(ranks[7], None);
}

fn prepare(output: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(program("flashlm-prep"));
    command.arg("prepare").arg(root().join("examples/tiny-opt"));
    command.arg("--text").arg(root().join("examples/synthetic.txt"));
    command.arg("-o").arg(output).args(["--tokens", "2500", "--sequence-tokens", "128"]).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn succeed(mut command: Command) -> String {
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{message}");
    message
}

#[test]
fn prepare_killed_anywhere_resumes_to_the_same_bytes() {
    let dir = scratch();
    let whole = dir.path().join("whole.flashlm");
    let begin = Instant::now();
    succeed(prepare(&whole, &[]));
    let seconds = begin.elapsed().as_secs_f64();
    let expected = std::fs::read(&whole).unwrap();
    assert!(verify(&whole, &mut |_, _| ()).unwrap().damages.is_empty());
    reuse_is_known(&Bundle::open(&whole).unwrap());
    assert!(succeed(prepare(&whole, &[])).contains("up to date"));

    let kills = std::env::var("FLASHLM_KILLS").ok().and_then(|k| k.parse().ok()).unwrap_or(4);
    for kill in 0..kills {
        let output = dir.path().join(format!("killed-{kill}.flashlm"));
        let mut child = prepare(&output, &[]).spawn().unwrap();
        // Moments spread over the whole run, the same on every machine in proportion.
        std::thread::sleep(Duration::from_secs_f64(seconds * (kill as f64 + 0.5) / kills as f64));
        child.kill().unwrap();
        child.wait().unwrap();
        if output.exists() {
            Bundle::open(&output).unwrap();
        }
        succeed(prepare(&output, &[]));
        assert!(std::fs::read(&output).unwrap() == expected, "killed at {kill} of {kills}: other bytes");
    }
}

/// The bundle says what caches of all sizes miss, and the plan says what that means.
fn reuse_is_known(bundle: &Bundle) {
    let groups = bundle.layout().groups() as u32;
    for layer in bundle.manifest().sparsity.as_ref().unwrap() {
        let predicted = layer.predicted.unwrap();
        assert!(predicted > 0.0 && predicted < 0.6, "{layer:?}");
        let (first, last) = (layer.reuse[0], *layer.reuse.last().unwrap());
        assert_eq!((first.slots, last.slots), (0, groups));
        assert!(first.missed > 4.0 * last.missed && first.missed >= first.runs && first.runs > 0.0, "{layer:?}");
        let falls = layer.reuse.windows(2).all(|pair| pair[1].missed <= 1.02 * pair[0].missed + 0.5);
        assert!(falls, "a larger cache misses more: {layer:?}");
    }
    let path = bundle.path().to_str().unwrap();
    let expected = |memory: &str| {
        let mut plan = Command::new(program("flashlm"));
        plan.args(["plan", path, "--ffn", "flash", "--memory", memory, "--json"]);
        let output = plan.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let figure = |name: &str| plan["expected"][name].as_f64().unwrap();
        assert!(figure("tokens_per_s_least") > 0.0 && figure("dram_limit_ms") > 0.0);
        assert!(figure("tokens_per_s_least") < figure("tokens_per_s_most"), "{plan}");
        assert!(figure("io_limit_ms") <= figure("io_most_ms"), "{plan}");
        (figure("bytes_read_per_token"), figure("io_limit_ms"), figure("io_most_ms"))
    };
    let (small, large) = (expected("24MB"), expected("28MB"));
    assert!(small.0 > large.0 && small.1 > large.1 && small.2 > large.2, "{small:?} {large:?}");
}

fn flash_bytes(path: &Path) -> (u64, Vec<u8>) {
    use std::os::unix::fs::MetadataExt;
    let bundle = Bundle::open(path).unwrap();
    let mut bytes = vec![0; bundle.flash().bytes as usize];
    bundle.read_at(bundle.flash().offset, &mut bytes).unwrap();
    (std::fs::metadata(path).unwrap().ino(), bytes)
}

#[test]
fn other_predictors_leave_the_flash_section_in_place() {
    let dir = scratch();
    let path: PathBuf = dir.path().join("model.flashlm");
    succeed(prepare(&path, &["--keep-recordings"]));
    let (before, predictors) = (flash_bytes(&path), Bundle::open(&path).unwrap().read_predictors().unwrap());
    succeed(prepare(&path, &["--keep-recordings", "--size-budget", "4%"]));
    assert!(flash_bytes(&path) == before, "the file was replaced or its neurons rewritten");
    let changed = Bundle::open(&path).unwrap().read_predictors().unwrap();
    assert!(changed.is_some() && changed != predictors);
    assert!(verify(&path, &mut |_, _| ()).unwrap().damages.is_empty());

    let bundle = Bundle::open(&path).unwrap();
    let checkpoint = Checkpoint::open(root().join("examples/tiny-opt")).unwrap();
    let ids: Vec<u32> = (0..400).map(|i| 300 + (i * 37) % 900).collect();
    let windows = Windows::new([&ids[..]], 128, [bundle.spec().bos.as_slice(); 2]);
    let threads = threads();
    let run = |choice, seen: &mut dyn FnMut(usize, [&[f32]; 2])| {
        evaluate(&bundle, &checkpoint, &windows, choice, &threads, dir.path(), &mut |_, _| (), seen).unwrap()
    };
    // With all neurons: bit for bit what the resident bundle computes.
    let mut resident = loaded(&bundle, &exact(128, FfnChoice::Resident));
    let expected: Vec<Vec<f32>> =
        windows.offsets.windows(2).map(|w| logits(&mut resident, &windows.ids[w[0]..w[1]])).collect();
    let vocab = bundle.spec().vocab_size;
    let mut positions = 0;
    let all = run(PredictorChoice::All, &mut |position, [_, ours]| {
        let window = windows.offsets.partition_point(|&start| start <= position) - 1;
        let at = (position - windows.offsets[window]) * vocab;
        let same = ours.iter().zip(&expected[window][at..at + vocab]).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "logits of position {position} differ from the resident bundle's");
        positions += 1;
    });
    assert_eq!(positions, windows.ids.len() - expected.len());
    assert_eq!(all.top1_agreement, 1.0);
    assert!((all.perplexity.bundle / all.perplexity.dense - 1.0).abs() < 1e-5 && all.kl_mean < 1e-8);
    assert!(all.layers.iter().all(|l| l.false_negative_rate == 0.0 && l.predicted_fraction == 1.0));
    let chosen = run(PredictorChoice::Bundle, &mut |_, _| ());
    // These ids are no text, and the predictors are small: only the kind of result is asserted.
    let (predicted, kept) = (chosen.mean(|l| l.predicted_fraction), chosen.mean(|l| l.energy_recall));
    assert!(predicted > 0.0 && predicted < 0.6 && kept > 0.3 && kept < 1.0, "{:?}", chosen.layers);
    assert!(chosen.kl_mean > 0.0);
    assert!(chosen.predictor_bytes as f64 <= 0.041 * chosen.ffn_bytes as f64);
    states::remove_dir(&dir.path().join("bundle")).unwrap();
}
