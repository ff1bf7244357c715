//! Our files are what their documents say, and what we print is what they hold, as read by programs that share no code with us:
//! `examples/flashlm_read.py`, and `tests/recomputed`.

use std::process::Command;

use flashlm_formats::predictors::TrainReport;
use flashlm_formats::recording::Recording;
use flashlm_tests::{root, run, scratch};

/// A Python with numpy. Where `FLASHLM_PYTHON` names one, it must have it.
fn python() -> Option<String> {
    let named = std::env::var("FLASHLM_PYTHON").ok();
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let there = Command::new(&python).args(["-c", "import numpy"]).output().is_ok_and(|out| out.status.success());
    assert!(there || named.is_none(), "{python} has no numpy");
    there.then_some(python)
}

/// The numbers of a line's words, in turn.
fn numbers(line: &str) -> Vec<f64> {
    line.split(|c: char| !(c.is_ascii_digit() || c == '.')).filter_map(|word| word.parse().ok()).collect()
}

#[test]
fn what_we_write_is_read_with_numpy() {
    let Some(python) = python() else {
        println!("skipped: python3 has no numpy; name one that has in FLASHLM_PYTHON");
        return;
    };
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let model = root().join("examples/tiny-opt").to_str().unwrap().to_owned();
    let text = root().join("examples/synthetic.txt").to_str().unwrap().to_owned();
    let (recording, orders, bundle) = (path("recording"), path("orders"), path("model.flashlm"));
    let prep = |args: &[&str]| run("flashlm-prep", args, "").succeeded();
    prep(&["record", &model, "--text", &text, "-o", &recording, "--tokens", "2500", "--sequence-tokens", "128"]);
    prep(&["order", &recording, "--strategy", "frequency", "-o", &orders]);
    // Every form that a predictor has: the projection in four bits, low ranks in both types, rows for some neurons only.
    let trained = ["int8", "f16"].map(|dtype| {
        let predictors = path(dtype);
        let ranks = "16,projection,8,projection,8,8,8,8";
        prep(&["train", &recording, "--model", &model, "--rank", ranks, "--dtype", dtype, "-o", &predictors]);
        predictors
    });
    prep(&["pack", &model, "--predictors", &trained[0], "--orders", &orders, "-o", &bundle]);

    let script = root().join("examples/flashlm_read.py");
    let mut command = Command::new(python);
    command.arg(script).args([&recording, &trained[0], &trained[1], &orders, &bundle]);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let part = |path: &str| -> Vec<&str> {
        let lines = said.lines().skip_while(|line| *line != path).skip(1);
        lines.take_while(|line| line.starts_with("  ")).collect()
    };

    let recorded = Recording::open(recording.as_ref()).unwrap();
    let held_out = recorded.split().held_out.iter().map(|part| part.len()).sum::<usize>();
    let lines = part(&recording);
    assert_eq!(numbers(lines[0]), [recorded.tokens().len() as f64, held_out as f64], "{said}");
    let layers = recorded.info().model.layers.len();
    for layer in 0..layers {
        let active = 100.0 * recorded.layer(layer).unwrap().active_fraction();
        assert!((numbers(lines[1 + layer])[1] - active).abs() < 1e-3, "{said}");
    }
    for predictors in &trained {
        let report = TrainReport::read(predictors.as_ref()).unwrap();
        assert_eq!(report.layers.len(), layers);
        assert!(report.layers.iter().any(|layer| layer.rows.is_some()), "every neuron has a row");
        for (layer, line) in report.layers.iter().zip(part(predictors)) {
            let [.., misses, alarms] = numbers(line)[..] else { panic!("{said}") };
            let expected = &layer.held_out;
            assert!((misses / 100.0 - expected.false_negative_rate).abs() < 1e-3, "{line}: {expected:?}");
            assert!((alarms / 100.0 - expected.false_positive_rate).abs() < 1e-3, "{line}: {expected:?}");
        }
    }
    let (ordered, packed) = (part(&orders), part(&bundle));
    assert!(packed[0].contains("8 layers of 1024 neurons, f16, frequency order"), "{said}");
    for layer in 0..layers {
        let (order, stored) = (numbers(ordered[layer]), numbers(packed[1 + layer]));
        assert!(ordered[layer].ends_with("every neuron once") && order[..5] == stored[..5], "{said}");
        // The first record is that of the order's first neuron, whose down vector the recording has measured.
        let length = f64::from(recorded.layer(layer).unwrap().summary().down_norms[order[1] as usize]);
        assert!((stored[5] - length).abs() < 1e-3 * length, "{said}");
    }
}

#[test]
fn what_we_print_is_recomputed_with_numpy() {
    let Some(python) = python() else {
        println!("skipped: python3 has no numpy; name one that has in FLASHLM_PYTHON");
        return;
    };
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let model = root().join("examples/tiny-opt").to_str().unwrap().to_owned();
    let text = root().join("examples/synthetic.txt").to_str().unwrap().to_owned();
    let recording = path("recording");
    let prep = |args: &[&str]| run("flashlm-prep", args, "").succeeded();
    let to_file = |name: &str, args: &[&str]| std::fs::write(dir.path().join(name), prep(args)).unwrap();
    prep(&["record", &model, "--text", &text, "-o", &recording, "--tokens", "1200", "--sequence-tokens", "128"]);
    to_file("analysis.json", &["analyze", &recording, "--json"]);
    // With a policy of its own, a cache of its own, and the default.
    prep(&["order", &recording, "--strategy", "path", "--policy", "s3-fifo", "--cache", "0.3", "-o", &path("path")]);
    prep(&["order", &recording, "--strategy", "frequency", "-o", &path("orders")]);
    let ranks = "16,projection,8,projection,8,8,8,8";
    for dtype in ["f16", "int8"] {
        let train = ["train", &recording, "--model", &model, "--rank", ranks, "--epochs", "2", "--dtype", dtype];
        to_file(&format!("{dtype}.txt"), &[&train[..], &["-o", &path(dtype)]].concat());
    }
    let of = ["--predictors", &path("int8"), "--orders", &path("orders"), "--data", &path("charts")];
    prep(&[&["report", &recording, "-o", &path("report.html")][..], &of].concat());

    let mut command = Command::new(python);
    command.arg("-B").arg(root().join("tests/recomputed/recompute.py")).arg(&recording);
    let said = [
        ("analyze", "analysis.json"),
        ("order", "path"),
        ("order", "orders"),
        ("train", "f16"),
        ("printed", "f16.txt"),
        ("train", "int8"),
        ("printed", "int8.txt"),
        ("report", "charts"),
    ];
    said.iter().for_each(|(what, name)| _ = command.arg(format!("{what}={}", path(name))));
    let output = command.output().unwrap();
    let (printed, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{printed}");
    assert!(output.status.success(), "{printed}{complaint}");
    assert_eq!(printed.matches(" numbers recomputed").count(), said.len(), "{printed}");
}
