//! What both programs say and how they end: hostile names on terminals, signals at every stage, arguments that cannot be meant.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::targets::mend::bundle_with;
use flashlm::command_line::{FLASHLM, FLASHLM_PREP, Other};
use flashlm_formats::bundle::{Bundle, Section, SourceFile};
use flashlm_tests::hub_server::{Behaviour, Hub, MODEL};
use flashlm_tests::{Said, copied, fixtures, program, root, run, scratch, tiny_opt};
use rustix::process::{Pid, Signal, kill_process};

/// Sets a title, clears the screen in two ways, and deletes.
const EVIL: &str = "e\u{1b}]0;x\u{7}\u{9b}2J\u{7f}\rvil";

/// Neither stream may hold what a terminal obeys.
fn harmless(what: &str, said: &Said) {
    for text in [&said.stdout, &said.stderr] {
        assert!(!text.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{what}: {said:?}");
    }
    assert!(!said.stderr.contains("panicked"), "{what}: {said:?}");
}

/// The commands that `--help` lists.
fn commands_of(program: &str) -> Vec<String> {
    let help = run(program, &["--help"], "").succeeded();
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
}

#[test]
fn every_command_is_known_to_the_other_program() {
    for Other { name, commands } in [FLASHLM, FLASHLM_PREP] {
        let mut listed = commands_of(name);
        listed.retain(|name| !["help", "completions", "man"].contains(&name.as_str()));
        assert_eq!(listed, commands, "{name}");
        let help = run(name, &["--help"], "").succeeded();
        assert!(["130", "143", "129"].iter().all(|code| help.contains(code)), "{help}");
    }
    run("flashlm", &["prepare", "x"], "").failed(1, &["flashlm-prep: there is no directory x"]);
    run("flashlm-prep", &["run", "m.flashlm", "-n", "3"], "").failed(2, &["flashlm run m.flashlm -n 3"]);
}

#[test]
fn names_that_a_terminal_would_obey_are_written_out_by_every_command() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let checkpoint = path(EVIL);
    fs::rename(copied(&tiny_opt()).keep(), &checkpoint).unwrap();
    let (bundle, text) = (path(&format!("{EVIL}.flashlm")), path(&format!("{EVIL}.txt")));
    fs::copy(root().join("examples/synthetic.txt"), &text).unwrap();
    // What succeeds, and shows the names.
    for (name, args) in [
        ("flashlm-prep", vec!["convert", &checkpoint, "-o", &bundle]),
        ("flashlm-prep", vec!["verify", &bundle]),
        ("flashlm-prep", vec!["inspect", &bundle]),
        ("flashlm-prep", vec!["inspect", &checkpoint]),
        ("flashlm-prep", vec!["inspect", &checkpoint, "--json"]),
        ("flashlm", vec!["plan", &bundle]),
        ("flashlm", vec!["man", &path(&format!("man-{EVIL}"))]),
    ] {
        let said = run(name, &args, "");
        harmless(args[0], &said);
        said.succeeded();
    }
    // What fails, in whatever way, with the name as each of its arguments.
    for (name, mut commands) in [("flashlm", commands_of("flashlm")), ("flashlm-prep", commands_of("flashlm-prep"))] {
        commands.push(EVIL.into());
        for command in &commands {
            let evil = path("not-there-").clone() + EVIL;
            for args in [
                vec![command.as_str(), &evil],
                vec![command, &evil, "-o", &evil],
                vec![command, &evil, "--text", &evil, "-o", &evil],
                vec![command, &evil, "--against", &evil, "--text", &evil],
                vec![command, &evil, "--recording", &evil, "--predictors", &evil, "--orders", &evil, "-o", &evil],
                vec![command, &evil, "--prompt", EVIL],
                vec![command, "--threads", EVIL],
                vec![command, &format!("--{EVIL}")],
            ] {
                // These go on for long, or write where nobody asked them to, once they have what they need.
                if !["help", "completions", "man"].contains(&args[0]) {
                    harmless(&format!("{args:?}"), &run(name, &args, ""));
                }
            }
        }
    }
    // JSON means the same as before.
    let manifest: serde_json::Value =
        serde_json::from_str(&run("flashlm-prep", &["inspect", &bundle, "--json"], "").succeeded()).unwrap();
    assert_eq!(manifest["kind"], "bundle");
}

#[test]
fn strange_arguments_are_answered_in_words() {
    let prep = |args: &[&str]| run("flashlm-prep", args, "");
    for (args, words) in [
        (&["record", "x", "--random-ids", "-o", "y", "--tokens", "-5"][..], "expected an integer from 1"),
        (&["record", "x", "--random-ids", "-o", "y", "--threads", "0"], "it must be at least 1"),
        (&["record", "x", "--random-ids", "-o", "y", "--threads", "100000"], "it must be at most"),
        (&["synthesize", "--geometry", "gpt-5", "-o", "y"], "falcon-7b"),
        (&["families", "opt"], "unexpected argument"),
        (&["verify"], "<BUNDLE>"),
    ] {
        prep(args).failed(2, &[words, "--help"]);
    }
    run("flashlm", &["run", "x", "--threads", "100000"], "").failed(2, &["it must be at most"]);
    let dir = scratch();
    let gguf = dir.path().join("m.gguf");
    fs::write(&gguf, b"GGUF\x03\0\0\0and more").unwrap();
    let bundle = fixtures().join("bundle-v2.flashlm");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    for command in ["convert", "record", "pack", "thresholds", "prepare"] {
        let with = |source: &Path| {
            let (source, out) = (text(source), text(&dir.path().join("out")));
            let source_text = text(&root().join("examples/synthetic.txt"));
            let mut args = vec![command, &source, "-o", &out];
            match command {
                "pack" => args.extend(["--predictors", "p"]),
                "convert" => {}
                _ => args.extend(["--text", &source_text]),
            }
            prep(&args)
        };
        with(&bundle).failed(1, &["is a bundle", "flashlm run"]);
        with(&gguf).failed(1, &["GGUF", "Hugging Face checkpoint"]);
        with(&tiny_opt().join("model.safetensors")).failed(1, &["one file of a checkpoint", "tiny-opt"]);
    }
    for args in [["inspect", &text(&gguf)], ["verify", &text(&gguf)]] {
        prep(&args).failed(1, &["not a flashlm bundle", "GGUF", "flashlm-prep prepare"]);
    }
    run("flashlm", &["run", &text(&gguf), "--prompt", "x"], "").failed(1, &["GGUF", "flashlm-prep prepare"]);
    let weights = text(&tiny_opt().join("model.safetensors"));
    prep(&["verify", &weights]).failed(1, &["weights", "`convert`"]);
}

/// Unfinished files anywhere below.
fn unfinished(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(unfinished(&path));
        } else if path.extension().is_some_and(|extension| extension == "partial") {
            found.push(path);
        }
    }
    found
}

fn wait_for(child: &mut Child, what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what} takes too long");
        assert!(child.try_wait().unwrap().is_none(), "it ended before {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_signal_ends_preparing_at_every_stage_and_leaves_nothing_unfinished() {
    let names = ["config.json", "tokenizer.json", "model.safetensors"];
    let hub = Hub::start(names.map(|name| (name.to_owned(), fs::read(tiny_opt().join(name)).unwrap())));
    let text = root().join("examples/synthetic.txt");
    let (model, text) = (tiny_opt(), text.to_str().unwrap().to_owned());
    let local = model.to_str().unwrap();
    let stages: [(&str, &str, Signal, i32); 4] = [
        ("home/hub/models--some-org--tiny/blobs", MODEL, Signal::TERM, 143),
        ("work", local, Signal::HUP, 129),
        ("work/recording/layer-000.safetensors.partial", local, Signal::INT, 130),
        ("work/predictors", local, Signal::TERM, 143),
    ];
    for (stage, source, signal, code) in stages {
        // The hub falls silent in the middle of the weights.
        hub.behave(Behaviour { cuts: vec![(3_000_000, true)], ..Behaviour::default() });
        let dir = scratch();
        let mut command = Command::new(program("flashlm-prep"));
        let output = dir.path().join("m.flashlm");
        command.args(["prepare", source, "--text", &text, "--tokens", "4000", "--work"]).arg(dir.path().join("work"));
        command.arg("-o").arg(&output).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.env("HF_HOME", dir.path().join("home")).env("HF_ENDPOINT", &hub.endpoint).env_remove("HF_HUB_OFFLINE");
        let mut child = command.spawn().unwrap();
        wait_for(&mut child, stage, || dir.path().join(stage).exists());
        kill_process(Pid::from_child(&child), signal).unwrap();
        let asked = Instant::now();
        let status = child.wait().unwrap();
        // At once; machines that are very busy take their time.
        assert!(asked.elapsed() < Duration::from_secs(8), "{stage}: {:?}", asked.elapsed());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(status.code(), Some(code), "{stage}: {said}");
        assert!(said.contains("interrupted") && said.contains("the same command resumes from here"), "{stage}: {said}");
        assert_eq!(unfinished(dir.path()), [] as [PathBuf; 0], "{stage}");
        assert!(!output.exists());
    }
}

#[test]
fn a_long_manifest_is_inspected_in_little_memory() {
    let good = fs::read(fixtures().join("bundle-v2.flashlm")).unwrap();
    let bundle = Bundle::open(fixtures().join("bundle-v2.flashlm")).unwrap();
    let mut manifest = bundle.manifest().clone();
    manifest.provenance.files = vec![SourceFile { name: String::new(), bytes: 0 }; 500_000];
    let json = serde_json::to_vec(&manifest).unwrap();
    let dir = scratch();
    let path = dir.path().join("m.flashlm");
    fs::write(&path, bundle_with(&good, Section::Manifest, &json)).unwrap();
    for json in ["", "--json"] {
        // As a tree of JSON values these 11 MB would take 400.
        let line = format!("ulimit -v 300000; exec \"$0\" inspect \"$1\" {json} > \"$2\"");
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(line).arg(program("flashlm-prep")).arg(&path).arg(dir.path().join("said"));
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{json}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
