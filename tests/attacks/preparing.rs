//! What stands where `flashlm-prep` has files of its own, what follows a bundle's end, files made by hand to cost much, and what is
//! said of all that.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flashlm_tests::{Said, program, scratch};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;
use tempfile::TempDir;

use crate::hostile::ends;
use crate::mini::{Mini, Stage, contents};

/// Runs `flashlm-prep`, which ends by itself.
fn prep(args: &[&str]) -> Said {
    let mut command = Command::new(program("flashlm-prep"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    ends(command, &format!("{args:?}"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("names of tests are text")
}

/// A preparation of the mini model that has ended, and the command that made it.
fn prepared(more: &[&str]) -> (TempDir, PathBuf, impl Fn(&[&str]) -> Said) {
    let (dir, mini) = (scratch(), Mini::get());
    let output = dir.path().join("m.flashlm");
    let (checkpoint, calibration, out) = (mini.path("checkpoint"), mini.path("text.txt"), output.clone());
    let run = move |more: &[&str]| {
        let args = ["prepare", text(&checkpoint), "--text", text(&calibration), "-o", text(&out), "--tokens", "1400"];
        prep(&[&args[..], &["--sequence-tokens", "40", "--size-budget", "15%", "--anyway"], more].concat())
    };
    run(more).succeeded();
    (dir, output, run)
}

fn pipe(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

/// A pipe or directory in place of any file of the work directory is refused by its name, before anything is done or removed.
#[test]
fn what_is_no_file_in_a_work_directory_is_named() {
    let (_dir, output, run) = prepared(&["--keep-recordings"]);
    let work = output.with_extension("flashlm.work");
    let files = contents(&work).into_iter().map(|(name, _)| work.join(name));
    let mut files: Vec<PathBuf> = files.filter(|path| !path.to_string_lossy().contains("/bundle.")).collect();
    files.push(work.join("source"));
    files.push(work.join("predictors/ranks.json.partial"));
    assert!(files.len() > 20, "{files:?}");
    for path in files {
        let kept = path.with_extension("kept");
        let was_there = fs::rename(&path, &kept).is_ok();
        for is_pipe in [true, false] {
            if is_pipe {
                pipe(&path)
            } else {
                fs::create_dir(&path).unwrap()
            }
            let before = fs::read(&output).unwrap();
            run(&["--keep-recordings"]).failed(1, &[text(&path), "a directory, a pipe or a device", "move it away"]);
            assert!(fs::read(&output).unwrap() == before && path.exists(), "{}", path.display());
            if is_pipe { fs::remove_file(&path).unwrap() } else { fs::remove_dir(&path).unwrap() }
        }
        if was_there {
            fs::rename(&kept, &path).unwrap();
        }
    }
    let said = run(&["--keep-recordings"]);
    assert!(said.code == Some(0) && said.stderr.contains("is up to date"), "{said:?}");
}

/// The same in directories that other commands write: said before the work, not at its end.
#[test]
fn what_is_no_file_in_an_output_directory_is_named() {
    let (dir, mini) = (scratch(), Mini::get());
    for (stage, name) in [
        (Stage::Train, "predictor-001.safetensors"),
        (Stage::Order, "layer-001.order.safetensors"),
        (Stage::Record, "layer-001.safetensors"),
        (Stage::Import, "predictors.json"),
    ] {
        for is_pipe in [true, false] {
            let output = dir.path().join(format!("{stage:?}{is_pipe}"));
            let path = output.join(name);
            fs::create_dir(&output).unwrap();
            if is_pipe {
                pipe(&path)
            } else {
                fs::create_dir(&path).unwrap()
            }
            let said = ends(stage.command(mini, &output), &format!("{stage:?}"));
            said.failed(1, &[text(&path), "move it away"]);
            assert_eq!(fs::read_dir(&output).unwrap().count(), 1, "{stage:?}");
        }
    }
}

/// Bytes after a bundle's end: the bundle is what it was, and the file is not.
#[test]
fn bytes_behind_a_bundle_are_said_and_cut_off() {
    let (_dir, output, run) = prepared(&[]);
    let whole = fs::read(&output).unwrap();
    let grow = || fs::File::options().append(true).open(&output).unwrap().write_all(b"appended").unwrap();
    grow();
    let said = prep(&["verify", text(&output)]);
    assert_eq!(said.code, Some(1), "{said:?}");
    let place = format!("ends at byte {}, followed by 8 bytes", whole.len());
    let mends = format!("truncate -s {} {}", whole.len(), output.display());
    assert!(
        said.stdout.contains(&place) && said.stderr.contains(&mends) && !said.stderr.contains("rebuild"),
        "{said:?}"
    );
    let said = prep(&["verify", "--json", text(&output)]);
    let report: Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!((said.code, &report["ok"], &report["trailing_bytes"]), (Some(1), &false.into(), &8.into()));
    // `prepare` knows whose the bundle is, and cuts it back.
    let said = run(&[]);
    assert!(said.stderr.contains("8 bytes after the end") && said.stderr.contains("is up to date"), "{said:?}");
    assert!(fs::read(&output).unwrap() == whole);
    // Not where another name leads to the same file: that is packed again.
    let other = output.with_extension("other");
    fs::hard_link(&output, &other).unwrap();
    grow();
    assert!(run(&[]).stderr.contains("packed again"));
    assert!(fs::read(&output).unwrap() == whole && fs::read(&other).unwrap().len() == whole.len() + 8);
    prep(&["verify", text(&output)]).succeeded();
}

/// What is made again is said with its reason.
#[test]
fn the_option_that_changed_is_named() {
    let (_dir, output, run) = prepared(&[]);
    let said = run(&["--seed", "7"]);
    assert!(said.stderr.contains("predictors: made again, because --seed was 1 and is 7"), "{said:?}");
    assert!(said.stderr.contains("sparsity: made again, because --seed was 1 and is 7"), "{said:?}");
    let said = run(&["--seed", "7", "--recall", "0.9"]);
    assert!(said.stderr.contains("predictors: made again, because --recall was 0.968 and is 0.9\n"), "{said:?}");
    assert!(!said.stderr.contains("orders: made again"), "{said:?}");
    // A stamp of a version that wrote the name alone still serves.
    let stamp = output.with_extension("flashlm.work").join("orders/made-from");
    let name = fs::read_to_string(&stamp).unwrap().lines().next().unwrap().to_owned();
    fs::write(&stamp, name).unwrap();
    assert!(run(&["--seed", "7", "--recall", "0.9"]).stderr.contains("is up to date"));
}

/// A preparation that fails before it has anything to keep leaves nothing.
#[test]
fn a_refused_preparation_leaves_no_directory() {
    let (dir, mini) = (scratch(), Mini::get());
    let (checkpoint, calibration, output) =
        (mini.path("checkpoint"), mini.path("text.txt"), dir.path().join("m.flashlm"));
    let table = dir.path().join("table.csv");
    fs::write(&table, "1,2").unwrap();
    let nowhere = dir.path().join("nowhere");
    for (checkpoint, text_file) in [(&checkpoint, &table), (&checkpoint, &nowhere), (&nowhere, &calibration)] {
        prep(&["prepare", text(checkpoint), "--text", text(text_file), "-o", text(&output)]).failed(1, &[]);
        assert!(!output.exists() && !output.with_extension("flashlm.work").exists(), "{}", text_file.display());
    }
}

/// What comes before a document is no part of it: the order of documents changes no figure, unless one stream is asked for.
#[test]
fn evaluations_do_not_reach_from_one_document_into_the_next() {
    let (dir, mini) = (scratch(), Mini::get());
    let words = |from: usize| (0..60).map(|at| format!("w{} ", 4 + (from + at * 7) % 180)).collect::<String>();
    let documents: Vec<String> = (0..6).map(|number| words(31 * number)).collect();
    let write = |name: &str, documents: &[String]| {
        let path = dir.path().join(name);
        fs::write(&path, documents.join("\n<|endoftext|>\n")).unwrap();
        path
    };
    let turned: Vec<String> = documents.iter().rev().cloned().collect();
    let texts = [write("a.txt", &documents), write("b.txt", &turned)];
    let (bundle, checkpoint) = (mini.bundle(), mini.path("checkpoint"));
    let run = |path: &Path, more: &[&str]| {
        let args = ["evaluate", text(&bundle), "--against", text(&checkpoint), "--text", text(path), "--window", "100"];
        prep(&[&args[..], more].concat()).succeeded()
    };
    let dense = |path: &PathBuf, more: &[&str]| {
        let found: Value = serde_json::from_str(&run(path, &[&["--json"][..], more].concat())).unwrap();
        (found["perplexity"]["dense"].as_f64().unwrap(), found["layers"][1]["active_fraction"].as_f64().unwrap())
    };
    let [a, b] = [0, 1].map(|n| dense(&texts[n], &[]));
    assert!((a.0 / b.0 - 1.0).abs() < 1e-9 && a.1 == b.1, "{a:?} {b:?}");
    let [a, b] = [0, 1].map(|n| dense(&texts[n], &["--join-documents"]));
    assert!((a.0 / b.0 - 1.0).abs() > 1e-6, "one stream is cut elsewhere: {a:?} {b:?}");
    assert!(run(&texts[0], &[]).contains("360 positions in 6 windows, none with tokens of two documents"));
    assert!(run(&texts[0], &["--join-documents"]).contains("windows, of the documents joined to one stream"));
}

/// Lines of JSON and empty files: what is said names one place, and the right one.
#[test]
fn odd_texts_and_empty_files_are_named() {
    let (dir, mini) = (scratch(), Mini::get());
    let checkpoint = mini.path("checkpoint");
    let deep = ["{\"x\": ", &"[".repeat(400_000), &"]".repeat(400_000), ", \"text\": \"w5\"}\n"].concat();
    let endless = ["{\"text\": \"", &"w5 ".repeat(23 << 20)].concat();
    for (contents, words) in [
        ("{\"text\": \"w5\"}\nw5 w6\n", "a.jsonl, line 2: expected value (column 1)"),
        ("[\"w5 w6\"]\n", "line 1: it is no object"),
        ("{\"text\": \"w5 \\udc00\\ud83d\"}\n", "line 1: lone leading surrogate"),
        (&deep, "the text has only"),
        (&endless, "its first line does not end within the first 67108864 bytes"),
    ] {
        let path = dir.path().join("a.jsonl");
        fs::write(&path, contents).unwrap();
        let output = dir.path().join("recording");
        let args = ["record", text(&checkpoint), "--text", text(&path), "--tokens", "600", "-o", text(&output)];
        let said = prep(&args).failed(1, &[words]);
        assert!(said.matches("line ").count() <= 2 && said.len() < 2000, "{said}");
    }
    let empty = dir.path().join("empty.flashlm");
    fs::write(&empty, "").unwrap();
    prep(&["verify", text(&empty)]).failed(1, &["is not a flashlm bundle (it is empty)"]);
    fs::write(&empty, "<!DOCTYPE html>").unwrap();
    prep(&["verify", text(&empty)]).failed(1, &["it begins with \"<!DOCTYP\""]);
}

/// A field of protobuf.
fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    let mut length = bytes.len();
    let mut out = vec![tag << 3 | 2];
    while length > 127 {
        out.push(length as u8 | 128);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
    out
}

fn piece(text: &str, kind: u8) -> Vec<u8> {
    field(1, &[field(1, text.as_bytes()), vec![3 << 3, kind]].concat())
}

/// Models of sentencepiece, made by hand: what costs more than they are long is refused, in little memory and at once.
#[test]
fn sentencepiece_models_that_cost_too_much_are_refused() {
    let (dir, mini) = (scratch(), Mini::get());
    let checkpoint = dir.path().join("checkpoint");
    fs::create_dir(&checkpoint).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(mini.path("checkpoint").join(name), checkpoint.join(name)).unwrap();
    }
    // All texts of two letters: each can be put together from two others wherever it is cut.
    let binary = |number: usize| -> String {
        let digits = usize::BITS - number.leading_zeros() - 1;
        (0..digits).map(|bit| if number >> bit & 1 == 1 { 'a' } else { 'b' }).collect()
    };
    let halves: Vec<u8> = (2..300_000).flat_map(|number| piece(&binary(number), 1)).collect();
    let many = |kind: u8| -> Vec<u8> { (0..400_000).flat_map(|number| piece(&format!("u{number:x}"), kind)).collect() };
    let bpe = field(2, &[3 << 3, 2]);
    let nested = (0..3000).fold(Vec::new(), |inside, _| field(1, &inside));
    for (what, model, words) in [
        ("halves", [&halves[..], &bpe].concat(), "can be merged in more than 2097152 ways"),
        ("control pieces", [&many(3)[..], &bpe].concat(), "control and user-defined pieces have"),
        ("user-defined pieces", [&many(4)[..], &bpe].concat(), "control and user-defined pieces have"),
        ("a length of 2^63", vec![0x0a, 255, 255, 255, 255, 255, 255, 255, 255, 127, 1], "not a SentencePiece model"),
        ("an endless number", [&[0x0a][..], &[255; 1000]].concat(), "not a SentencePiece model"),
        ("open groups", vec![0x4b; 1 << 20], "not a SentencePiece model"),
        ("nested pieces", nested, "not a SentencePiece model"),
        ("a million of nothing", piece("", 1).repeat(1 << 20), "do not belong together"),
    ] {
        fs::write(checkpoint.join("tokenizer.model"), model).unwrap();
        for class in ["{\"tokenizer_class\": \"LlamaTokenizer\"}", "{}"] {
            fs::write(checkpoint.join("tokenizer_config.json"), class).unwrap();
            let mut shell = Command::new("sh");
            shell.args(["-c", "ulimit -v 1500000; exec \"$0\" convert \"$1\" -o \"$2\""]).arg(program("flashlm-prep"));
            shell.arg(&checkpoint).arg(dir.path().join("m.flashlm")).stdin(Stdio::null());
            shell.stdout(Stdio::piped()).stderr(Stdio::piped());
            ends(shell, what).failed(1, &[words]);
        }
    }
}

/// A file of no layer that a model can have is not ignored.
#[test]
fn a_predictor_of_an_impossible_layer_is_named() {
    let (dir, mini) = (scratch(), Mini::get());
    let foreign = dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    for (name, bytes) in contents(&mini.path("foreign")) {
        fs::write(foreign.join(name), bytes).unwrap();
    }
    fs::write(foreign.join("c4_layer99999999999999999999999_-0.9.safetensors"), "x").unwrap();
    let (recording, output) = (mini.path("recording"), dir.path().join("imported"));
    prep(&["import-predictors", text(&foreign), "--recording", text(&recording), "-o", text(&output)])
        .failed(1, &["c4_layer99999999999999999999999_-0.9.safetensors", "expected one file for each of 2 layers"]);
}
