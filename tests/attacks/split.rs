//! Calibration text of every kind, one split of it for everything, and numbers that no option can mean.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flashlm_formats::recording::{Recording, Split};
use flashlm_tests::{Said, program, scratch};
use serde_json::Value;

use crate::mini::Mini;

/// Runs `flashlm-prep` on the mini model's files.
fn prep(args: &[&str]) -> Said {
    let mut command = Command::new(program("flashlm-prep"));
    command.args(args).stdin(Stdio::null());
    Said::from(command.output().expect("the program starts"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("names of tests are text")
}

/// Words of the mini model's tokenizer.
fn words(count: usize, first: usize) -> String {
    (0..count).map(|at| format!("w{}{}", 4 + (first + at) % 180, if at % 12 == 11 { ".\n" } else { " " })).collect()
}

fn record(texts: &[PathBuf], tokens: &str, output: &Path) -> Said {
    let checkpoint = Mini::get().path("checkpoint");
    let mut args = vec!["record", text(&checkpoint), "--text"];
    args.extend(texts.iter().map(|path| text(path)));
    args.extend(["--tokens", tokens, "--sequence-tokens", "40", "-o", text(output)]);
    prep(&args)
}

/// Books, notes, JSON lines, directories: each is read, and both parts of each are large enough to work with.
#[test]
fn every_kind_of_text_is_recorded() {
    let dir = scratch();
    let write = |name: &str, contents: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("it lies somewhere")).unwrap();
        fs::write(&path, contents).unwrap();
        path
    };
    let book = write("book.txt", &words(9000, 0));
    let note = write("note.txt", "w5 w6 w7");
    let three = write("three.txt", &[words(3000, 0), words(3000, 60), words(3000, 120)].join("\n <|endoftext|> \n"));
    let lines: String = (0..40).map(|n| format!("{{\"id\": {n}, \"text\": {:?}}}\n", words(30, n))).collect();
    let lines = write("lines.jsonl", &lines);
    write("directory/a.txt", &words(500, 0));
    write("directory/deep/b.jsonl", &format!("{{\"text\": {:?}}}\n", words(500, 90)));
    write("directory/c.csv", "1,2");
    for (what, texts, said) in [
        ("a book", vec![book.clone()], "<|endoftext|>"),
        ("a note beside a book", vec![note, book], "1 of 2, are cut"),
        ("three books", vec![three], "3 of 3, are cut"),
        ("JSON lines", vec![lines], ""),
        ("a directory", vec![dir.path().join("directory")], "c.csv"),
    ] {
        let output = dir.path().join(what);
        let recorded = record(&texts, "900", &output);
        assert!(recorded.code == Some(0) && recorded.stderr.contains(said), "{what}: {recorded:?}");
        let recording = Recording::open(&output).unwrap();
        assert!(recording.says_what_is_held_out(), "{what}");
        let (held_out, all) = (Split::tokens(&recording.split().held_out), recording.tokens().len());
        assert!((45..=136).contains(&held_out) && all <= 900 && all > 800, "{what}: {held_out} of {all} held out");
    }
}

/// What is refused names its format, before anything is written.
#[test]
fn text_that_cannot_be_used_is_refused_at_once() {
    let dir = scratch();
    let output = dir.path().join("recording");
    let cases: [(&str, &[u8], &str, &[&str]); 7] = [
        ("a.csv", b"id,text\n1,w5 w6\n", "900", &["a table (CSV) is not supported", ".jsonl"]),
        ("a.parquet", b"PAR1", "900", &["is not supported", "<|endoftext|>"]),
        ("a.html", b"<p>w5</p>", "900", &["HTML or XML is not supported"]),
        ("a.jsonl", b"{\"body\": \"w5\"}\n", "900", &["line 1", "\"text\""]),
        ("short.txt", b"w5 w6 w7\n", "900", &["tokens (documents: 1); at least 256", "<|endoftext|>"]),
        ("zeros.txt", &[0; 100], "900", &["not UTF-8 text"]),
        ("enough.txt", &[b'w', b'5', b' '].repeat(1000).leak()[..], "200", &["200 tokens were requested"]),
    ];
    for (name, contents, tokens, said) in cases {
        let path = dir.path().join(name);
        fs::write(&path, contents).unwrap();
        record(std::slice::from_ref(&path), tokens, &output).failed(1, said);
        assert!(!output.exists(), "{name}");
        // Nor does a preparation that never began leave anything.
        let (checkpoint, bundle) = (Mini::get().path("checkpoint"), dir.path().join("m.flashlm"));
        let prepare = ["prepare", text(&checkpoint), "--text", text(&path), "--tokens", tokens, "-o", text(&bundle)];
        flashlm_tests::run("flashlm-prep", &prepare, "").failed(1, said);
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|file| !file.to_string_lossy().starts_with("m.")), "{name}: {left:?}");
    }
    record(&[PathBuf::from("/dev/zero")], "900", &output)
        .failed(1, &["not UTF-8 text (it stops being UTF-8 at byte 0"]);
}

/// A document of many megabytes is not tokenized for the sake of a few hundred tokens.
#[test]
fn memory_follows_what_is_asked_for() {
    let dir = scratch();
    let path = dir.path().join("long.txt");
    fs::write(&path, words(1_800_000, 0)).unwrap();
    let checkpoint = Mini::get().path("checkpoint");
    let mut command = Command::new("sh");
    // Addresses, as no limit of memory itself is there without rights.
    command.args(["-c", "ulimit -v 700000; exec \"$0\" \"$@\""]).arg(program("flashlm-prep"));
    command.args(["record", text(&checkpoint), "--text", text(&path), "--tokens", "600", "--sequence-tokens", "40"]);
    command.args(["--threads", "1", "-o"]).arg(dir.path().join("recording")).env("RAYON_NUM_THREADS", "1");
    let said = Said::from(command.stdin(Stdio::null()).output().unwrap());
    assert_eq!(said.code, Some(0), "{said:?}");
}

/// Training, orders, reuse and the report all go by what the recording holds out.
#[test]
fn everything_goes_by_one_split() {
    let (dir, mini) = (scratch(), Mini::get());
    let recording = Recording::open(&mini.path("recording")).unwrap();
    let (training, held_out) = (recording.split().training.clone(), recording.split().held_out.clone());
    let orders: Value = serde_json::from_slice(&fs::read(mini.path("orders/orders.json")).unwrap()).unwrap();
    assert_eq!(orders["training_tokens"], Split::tokens(&training));
    assert_eq!(orders["scored_tokens"], Split::tokens(&held_out));
    assert_eq!(orders["policy"], "by layer", "what the runtime runs");
    let (slots, groups) = (orders["slots"].as_u64().unwrap(), 192 / orders["records_per_group"].as_u64().unwrap());
    assert!(slots >= groups / 10 && slots <= groups.div_ceil(2), "{slots} of {groups}");
    // The same in what `prepare` makes.
    let prepared = mini.path("prepared.flashlm.work/orders/orders.json");
    let prepared: Value = serde_json::from_slice(&fs::read(prepared).unwrap()).unwrap();
    assert_eq!(prepared["scored_tokens"], orders["scored_tokens"]);
    assert_eq!(prepared["policy"], orders["policy"]);
    let only = prep(&["analyze", text(recording.dir()), "--held-out", "--json"]).succeeded();
    let only: Value = serde_json::from_str(&only).unwrap();
    assert_eq!(only["tokens"], Split::tokens(&held_out));
    // A recording that does not say what is held out is split all the same, and says so.
    let fixture = flashlm_tests::fixtures().join("recording-tiny-opt");
    let said = prep(&["train", text(&fixture), "--rank", "4", "--layers", "1..2", "-o", text(&dir.path().join("p"))]);
    assert!(said.code == Some(0) && said.stderr.contains("does not say what is held out"), "{said:?}");
}

/// A preparation that gains nothing stops after the pilot, says what is better, and goes on when it is told to.
#[test]
fn no_gain_is_said_before_the_long_work() {
    let (dir, mini) = (scratch(), Mini::get());
    let (checkpoint, calibration) = (mini.path("checkpoint"), mini.path("text.txt"));
    let output = dir.path().join("dense.flashlm");
    let args = ["prepare", text(&checkpoint), "--text", text(&calibration), "--tokens", "1400", "-o", text(&output)];
    // To miss hardly any of them, nearly all have to be let in.
    let all = [&args[..], &["--sequence-tokens", "40", "--size-budget", "15%", "--recall", "0.99999"]].concat();
    let better = format!("flashlm-prep convert {} -o {}", checkpoint.display(), output.display());
    let refused = prep(&all);
    assert!(refused.code == Some(1) && !output.exists(), "{refused:?}");
    let last = refused.stderr.trim_end().lines().next_back().unwrap_or_default().to_owned();
    assert!(last.contains(&better) && last.contains("--anyway"), "{refused:?}");
    let went_on = prep(&[&all[..], &["--anyway"]].concat());
    let last = went_on.stderr.trim_end().lines().next_back().unwrap_or_default().to_owned();
    assert!(went_on.code == Some(0) && last.contains(&format!("{better} --force")), "{went_on:?}");
    assert!(!went_on.stderr.contains("This model is"), "sparse, and yet nearly all is admitted: {went_on:?}");
    let shown = prep(&["inspect", text(&output)]).succeeded();
    assert!(shown.contains("admitted") && shown.contains("flashlm-prep convert"), "{shown}");
    // What the last line names can be done.
    prep(&["convert", text(&checkpoint), "-o", text(&output), "--force"]).succeeded();
}

/// Every numeric option of the offline commands with numbers that mean nothing: refused before any work, and never a panic.
#[test]
fn numbers_that_mean_nothing_are_refused() {
    let mini = Mini::get();
    let path = |name: &str| text(&mini.path(name)).to_owned();
    let dir = scratch();
    let out = text(&dir.path().join("out")).to_owned();
    let (checkpoint, calibration, recording, bundle) =
        (path("checkpoint"), path("text.txt"), path("recording"), path("mini.flashlm"));
    let commands: [(Vec<&str>, &[&str], &[&str]); 8] = [
        // The command, options of which 0 means nothing either, and those where it does.
        (
            vec!["record", &checkpoint, "--text", &calibration, "-o", &out],
            &["tokens", "sequence-tokens", "threads"],
            &[],
        ),
        (
            vec!["train", &recording, "-o", &out],
            &["recall", "size-budget", "epochs", "tokens", "look-ahead", "rank"],
            &["worth", "over-fetch"],
        ),
        (vec!["order", &recording, "-o", &out], &["tokens", "alignment", "records", "request-max"], &["cache"]),
        (vec!["analyze", &recording], &["tokens", "windows", "window", "partners"], &[]),
        (
            vec!["thresholds", &checkpoint, "--text", &calibration, "-o", &out],
            &["tokens", "sequence-tokens", "quality-loss", "threads"],
            &[],
        ),
        (
            vec!["evaluate", &bundle, "--against", &checkpoint, "--text", &calibration],
            &["tokens", "window", "threads"],
            &[],
        ),
        (vec!["synthesize", "--geometry", "opt-125m", "-o", &out], &["layers", "threads"], &[]),
        (
            vec!["prepare", &checkpoint, "--text", &calibration, "-o", &out],
            &["tokens", "sequence-tokens", "size-budget", "recall", "quality-loss", "look-ahead", "threads"],
            &[],
        ),
    ];
    for (command, options, with_zero) in &commands {
        for (option, zero) in options.iter().map(|o| (o, true)).chain(with_zero.iter().map(|o| (o, false))) {
            let mut numbers = vec!["nan", "-1", "18446744073709551615", "1e999", "x"];
            numbers.extend(zero.then_some("0"));
            for number in numbers {
                // A thread for each processor is all there is to have, and somebody else's affair.
                if *option == "threads" && number.starts_with('1') {
                    continue;
                }
                let number = if matches!(*option, "size-budget" | "quality-loss") {
                    format!("{number}%")
                } else {
                    number.into()
                };
                let said = prep(&[&command[..], &[&format!("--{option}={number}")]].concat());
                let what = format!("{} --{option}={number}: {said:?}", command[0]);
                assert!(matches!(said.code, Some(1 | 2)) && !said.stderr.contains("panicked"), "{what}");
                assert!(said.stderr.len() < 2000 && !Path::new(&out).exists(), "{what}");
            }
        }
    }
}
