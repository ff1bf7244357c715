//! What `flashlm run` shows: the text of the tokens, all of it, at once, and nothing else.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use flashlm_tests::program;
use rustix::process::{Pid, Signal, kill_process};

use crate::script::{BYTE_LEVEL, LLAMA, Script};

fn command(script: &Script, args: &[&str]) -> Command {
    let mut command = Command::new(program("flashlm"));
    command.arg("run").arg(script.bundle()).args(args).stdin(Stdio::null());
    command
}

fn run(script: &Script, args: &[&str]) -> Output {
    command(script, args).output().unwrap()
}

/// Standard output of a run that succeeds.
fn shown(script: &Script, args: &[&str]) -> String {
    let output = run(script, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The texts of all objects of a run with `--json`.
fn texts(script: &Script, args: &[&str]) -> Vec<String> {
    let out = shown(script, &[args, &["--json"]].concat());
    let text =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["text"].as_str().unwrap().to_owned();
    out.lines().map(text).collect()
}

#[test]
fn text_goes_on_after_broken_bytes() {
    let script = Script::new(LLAMA, &["▁a", "<0x0A>", "<0xF0>", "<0x9F>", "▁x", "▁time", "▁once", "</s>"]);
    assert_eq!(shown(&script, &["--prompt", "a"]), "\n\u{fffd}\u{fffd} x time once\n");
    assert_eq!(shown(&script, &["--prompt", "a", "--stop", "time"]), "\n\u{fffd}\u{fffd} x \n");
}

#[test]
fn the_space_between_prompt_and_text_is_kept() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "▁there", "</s>"]);
    assert_eq!(shown(&script, &["--prompt", "once upon a"]), " time there\n");
    assert_eq!(texts(&script, &["--prompt", "once upon a"]), [" time", " there", ""]);
}

#[test]
fn broken_text_is_shown_as_it_comes() {
    for (decoder, token) in [(LLAMA, "\u{fffd}"), (LLAMA, "<0xFF>"), (LLAMA, "<0xF0>"), (BYTE_LEVEL, "ð")] {
        let script = Script::new(decoder, &["▁a", token, token]);
        let texts = texts(&script, &["--prompt", "a", "-n", "2000"]);
        let mut characters = 0;
        for (tokens, text) in (1..).zip(&texts[..2000]) {
            characters += text.chars().count();
            assert!(characters + 1 >= tokens, "{token}: {characters} characters of {tokens} tokens");
        }
    }
}

#[test]
fn a_stop_string_may_be_a_special_token() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "<|im_end|>", "▁there", "</s>", "▁x", "▁x"]);
    assert_eq!(shown(&script, &["--prompt", "a", "--stop", "<|im_end|>"]), " time\n");
    assert_eq!(shown(&script, &["--prompt", "a"]), " time there\n");
    assert_eq!(shown(&script, &["--prompt", "a", "--ignore-eos", "--stop", "</s>"]), " time there\n");
    assert_eq!(shown(&script, &["--prompt", "a", "--ignore-eos", "--stop", "x x"]), " time there \n");
    let part = run(&script, &["--prompt", "a", "--stop", "<|im_end|>\n"]);
    assert!(stderr(&part).contains("special token <|im_end|>"), "{}", stderr(&part));
    assert_eq!(run(&script, &["--prompt", "a", "--stop", ""]).status.code(), Some(2));
}

#[test]
fn who_ended_a_text_is_told() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "<|im_end|>", "▁there", "</s>"]);
    let finish = |args: &[&str]| {
        let out = shown(&script, &[&["--prompt", "a", "--json"], args].concat());
        serde_json::from_str::<serde_json::Value>(out.lines().last().unwrap()).unwrap()["finish"].clone()
    };
    assert_eq!(finish(&["--stop", "<|im_end|>"]), "stopped", "as by any other stop string");
    assert_eq!(finish(&["--stop", "there"]), "stopped");
    assert_eq!(finish(&["--ignore-eos", "--stop", "</s>"]), "stopped");
    assert_eq!(finish(&["--stop", "</s>"]), "eos", "it would have ended there anyway");
    assert_eq!(finish(&[]), "eos");
}

#[test]
fn what_was_not_asked_for_is_not_shown() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "</s>"]);
    let nothing = run(&script, &["--prompt", "a", "-n", "0"]);
    assert!(nothing.status.success() && nothing.stdout.is_empty(), "{nothing:?}");
    for tokens in ["0", "1"] {
        let args = ["--prompt", "a", "-n", tokens];
        let said = stderr(&run(&script, &args));
        assert!(said.contains("prefill") && !said.contains("decode"), "nothing was decoded: {said}");
        let out = shown(&script, &[&args[..], &["--json"]].concat());
        let last: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        assert!(last["decode_ms_per_token"].is_null(), "{last}");
    }
}

#[test]
fn infinite_logits_are_one_error_everywhere() {
    for value in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let script = Script::with(LLAMA, &["▁a", "▁time", "▁there"], Some(("▁upon", value)));
        let mut said = Vec::new();
        for how in [
            &["--temperature", "0"][..],
            &["--temperature", "1"],
            &["--temperature", "1", "--top-k", "5"],
            &["--temperature", "1", "--top-p", "0.9"],
            &["--repetition-penalty", "1.5"],
        ] {
            let output = run(&script, &[&["--ids", "6", "-n", "3", "--json"], how].concat());
            assert_eq!((output.status.code(), output.stdout), (Some(1), vec![]), "{value} {how:?}");
            said.push(String::from_utf8(output.stderr).unwrap());
        }
        let mut logits = Command::new(program("flashlm"));
        logits.arg("logits").arg(script.bundle()).args(["--ids", "6", "-o"]).arg(script.path("logits"));
        said.push(stderr(&logits.output().unwrap()));
        assert!(!script.path("logits").exists());
        let id = script.id("▁upon");
        assert!(said[0].contains("not a finite number") && said[0].contains(&format!("id {id}")), "{}", said[0]);
        assert!(said[0].contains("flashlm-prep verify") && said[0].contains("another copy"), "{}", said[0]);
        assert!(said.iter().all(|other| *other == said[0]), "{said:?}");
    }
}

#[test]
fn a_file_is_the_prompt_that_its_writer_meant() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "</s>"]);
    for written in ["once a", "once a\n", "once a\r\n", "\u{feff}once a\n"] {
        let file = script.path("prompt.txt");
        fs::write(&file, written).unwrap();
        assert_eq!(shown(&script, &["--prompt-file", file.to_str().unwrap()]), " time\n", "{written:?}");
        let mut child = command(&script, &["--prompt-file", "-"]);
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(written.as_bytes()).unwrap();
        assert_eq!(child.wait_with_output().unwrap().stdout, b" time\n", "{written:?}");
    }
    assert_eq!(shown(&script, &["--prompt", "-5 a"]), " time\n", "a minus is a beginning like any other");
}

#[test]
fn a_prompt_that_cannot_fit_is_not_worked_on() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "</s>"]);
    let file = script.path("long.txt");
    fs::write(&file, "once a ".repeat(2 << 20)).unwrap();
    // Tokens take a hundred times the memory of their text.
    let limited = r#"ulimit -v 500000; exec "$0" run "$1" --prompt-file "$2" --memory 60MB"#;
    let mut shell = Command::new("sh");
    shell.args(["-c", limited]).arg(program("flashlm")).arg(script.bundle()).arg(&file);
    let output = shell.output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(["at least", "3968 fit", "shorter", "-n"].iter().all(|part| said.contains(part)), "{said}");

    // Endless input ends as well.
    let mut child = command(&script, &["--prompt-file", "-"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    while input.write_all(&[b'a'; 4096]).is_ok() {}
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(stderr(&output).contains("too long"), "{}", stderr(&output));
}

#[test]
fn a_signal_before_there_is_text_ends_at_once_with_its_own_code() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "</s>"]);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut child = command(&script, &["--prompt-file", "-"]);
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        // Until it watches, a signal would end it in the system's way.
        let watches = || {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim().to_owned();
            u64::from_str_radix(&caught, 16).unwrap() >> (Signal::TERM.as_raw() - 1) & 1 == 1
        };
        while cfg!(target_os = "linux") && !watches() {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(50));
        kill_process(pid, signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code));
    }
}

#[test]
fn what_may_be_given_is_said() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "</s>"]);
    for (args, says) in [
        (&["--temperature", "-1"][..], "a number of at least 0"),
        (&["--top-p", "-0.5"], "above 0 and at most 1"),
        (&["--repetition-penalty", "0"], "above 0"),
        (&["-n", "-5"], "cannot be below zero"),
        (&["--context", "-5"], "cannot be below zero"),
        (&["--seed", "-5"], "cannot be below zero"),
        (&["--threads", "0"], "at least 1"),
        (&["--threads", "100000"], "at most"),
        (&["--memory", "-4GB"], "write 50%"),
        (&["--engine", "steam"], "auto, io_uring, threads"),
        (&["--direct", "perhaps"], "required, optional, disabled"),
    ] {
        let output = run(&script, &[&["--prompt", "a"], args].concat());
        assert!(output.status.code() == Some(2) && stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
    }
    let output = run(&script, &["--prompt", "a", "--context", "5000"]);
    assert!(stderr(&output).contains("--context 5000 is more than the 4096 tokens"), "{}", stderr(&output));
    assert_eq!(shown(&script, &["--prompt", "a", "--memory", "1TB"]), " time\n");
    let mut hub = Command::new(program("flashlm"));
    let said = stderr(&hub.args(["run", "facebook/opt-1.3b", "--prompt", "a"]).output().unwrap());
    assert!(said.contains("flashlm-prep prepare facebook/opt-1.3b"), "{said}");
}

#[test]
fn chance_has_another_seed_every_time_and_names_it() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "</s>"]);
    let args = ["--prompt", "a", "-n", "40", "--ignore-eos", "--temperature", "30"];
    let first = run(&script, &args);
    let said = stderr(&first);
    let seed = said.split_once("--seed ").unwrap().1.split(' ').next().unwrap();
    let again = run(&script, &[&args[..], &["--seed", seed]].concat());
    assert!(!first.stdout.is_empty() && first.stdout == again.stdout, "seed {seed}");
    let json = shown(&script, &[&args[..], &["--json"]].concat());
    let last: serde_json::Value = serde_json::from_str(json.lines().last().unwrap()).unwrap();
    assert!(last["seed"].is_u64(), "{last}");
    assert!(!stderr(&run(&script, &["--prompt", "a"])).contains("seed"), "nothing is left to chance");
}

/// What a conversation on a terminal shows when `lines` are typed, and its exit code.
#[cfg(target_os = "linux")]
fn conversation(script: &Script, args: &[&str], lines: &[&[u8]]) -> (String, Option<i32>) {
    let pty = nix::pty::openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    // Plain lines: `tests/tests/terminal.rs` edits them.
    let mut child = command(script, args).env("TERM", "dumb").stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
    drop(pty.slave);
    let mut master = fs::File::from(pty.master);
    let mut typed = master.try_clone().unwrap();
    let (mut all, mut lines) = (Vec::new(), lines.iter());
    let mut buffer = [0; 4096];
    // Reading fails when the program has ended.
    while let Ok(read @ 1..) = master.read(&mut buffer) {
        all.extend_from_slice(&buffer[..read]);
        if all.ends_with(b"> ") {
            typed.write_all(lines.next().unwrap_or(&&b"\x04"[..])).unwrap();
        }
    }
    (String::from_utf8_lossy(&all).replace("\r\n", "\n"), child.wait().unwrap().code())
}

#[test]
#[cfg(target_os = "linux")]
fn a_conversation_survives_a_stray_byte_and_an_empty_turn() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "</s>"]);
    let (text, code) = conversation(&script, &["-n", "8"], &[b"caf\xe9\n", b"once a\n", b"upon a\n", b"</s>\n", b"\n"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("not UTF-8 text: byte 3"), "{text}");
    assert_eq!(text.matches("\n time\n").count(), 2, "two turns, each with its first space: {text}");
    assert_eq!(text.matches("ended its text at once").count(), 1, "{text}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_context_is_said_with_what_helps() {
    // x forever.
    let script = Script::new(LLAMA, &["▁a", "▁x", "▁x"]);
    let told = |context: &str, tokens: &str| {
        let (text, code) = conversation(
            &script,
            &["--context", context, "-n", tokens, "--when-full", "stop"],
            &[b"a\n", b"a\n", b"once upon a\n"],
        );
        assert_eq!(code, Some(0), "{text}");
        text
    };
    let larger = "or with a larger --context";
    let text = told("20", "12");
    let full =
        "cut short: the context of 20 tokens is full; start again, or with a larger --context (the model allows 4096)";
    assert_eq!(text.matches(full).count(), 1, "the second turn: {text}");
    assert!(
        text.contains("do not fit the context of 20 tokens; say less, or start again, or with a larger --context"),
        "the third: {text}"
    );
    let text = told("4096", "5000");
    assert!(text.contains("cut short: the context of 4096 tokens is full; start again\n"), "{text}");
    assert!(text.contains("say less, or start again\n") && !text.contains(larger), "{text}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_mark_that_was_pasted_is_nobodys_text() {
    let script = Script::new(LLAMA, &["▁a", "▁time", "</s>"]);
    let (text, _) = conversation(&script, &["-n", "8"], &["\u{feff}a\n".as_bytes()]);
    assert!(text.contains("\n time\n"), "{text}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_terminal_does_not_obey_the_model() {
    let bell = "\u{1b}[2J\u{7}\u{9b}H\u{7f}";
    let script = Script::new(LLAMA, &["▁a", bell, "</s>"]);
    let (text, _) = conversation(&script, &["-n", "8"], &[b"a\n"]);
    // The progress of loading is the program's own.
    let text = text.split_once("Type text").unwrap().1;
    assert!(text.contains("\\u001b[2J\\u0007\\u009bH\\u007f\n"), "{text}");
    assert!(!text.contains(['\u{1b}', '\u{9b}', '\u{7}']), "{text}");
    assert_eq!(shown(&script, &["--prompt", "a"]), format!("{bell}\n"), "a pipe gets the bytes");
}
