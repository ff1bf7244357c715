//! Attacks 10 to 12: programs killed at random moments, and signals that ask politely.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flashlm_formats::bundle::{Bundle, verify};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_tests::{program, scratch};
use rustix::process::{Pid, Signal, kill_process};

use crate::mini::{Mini, Stage, contents};
use crate::{Dice, rounds};

/// Files that open as bundles, under whatever name, are whole.
fn no_bundle_is_wrong(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && Bundle::open(&path).is_ok() {
            let report = verify(&path, &mut |_, _| ()).unwrap();
            assert!(report.damages.is_empty(), "{}: {:?}", path.display(), report.damages);
        }
    }
}

/// What is there under its final name is as it will be in the end. Scratch files of a stage may be anything.
fn nothing_is_wrong(stage: Stage, found: &Path, whole: &Path) {
    if stage.output().ends_with(".flashlm") {
        no_bundle_is_wrong(found.parent().unwrap());
        if found.exists() {
            assert_eq!(
                fs::read(found).unwrap(),
                fs::read(whole).unwrap(),
                "{stage:?}: a file under its name is not whole"
            );
        }
    } else if found.exists() {
        let expected = contents(whole);
        for (name, bytes) in contents(found) {
            if !name.starts_with("states") && !name.starts_with(".") {
                let whole = expected.iter().find(|(n, _)| *n == name);
                assert!(whole.is_none_or(|(_, whole)| *whole == bytes), "{stage:?}: {} is not whole", name.display());
            }
        }
    }
}

/// The end result: a bundle, or the files of a directory.
fn result(stage: Stage, output: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    if stage.output().ends_with(".flashlm") {
        vec![(Default::default(), fs::read(output).unwrap())]
    } else {
        contents(output)
    }
}

#[test]
fn a10_killed_at_any_moment_and_run_again() {
    let mini = Mini::get();
    let mut dice = Dice::of("kill -9");
    for stage in Stage::ALL {
        let dir = scratch();
        let whole = dir.path().join("whole").join(stage.output());
        fs::create_dir(whole.parent().unwrap()).unwrap();
        let begin = Instant::now();
        assert!(stage.run(mini, &whole).status.success());
        let time = begin.elapsed();
        let (mut killed, mut left_something) = (0, 0);
        for round in 0..rounds(3, 200) {
            let here = dir.path().join(format!("round-{round}"));
            fs::create_dir(&here).unwrap();
            let output = here.join(stage.output());
            // Up to twice, the second time on what the first left.
            for _ in 0..1 + round % 2 {
                let mut child = stage.command(mini, &output).stderr(Stdio::null()).spawn().unwrap();
                std::thread::sleep(time.mul_f64(dice.below(1000) as f64 / 950.0));
                killed += usize::from(child.try_wait().unwrap().is_none());
                child.kill().unwrap();
                child.wait().unwrap();
                nothing_is_wrong(stage, &output, &whole);
            }
            left_something += usize::from(fs::read_dir(&here).unwrap().count() > 0);
            let again = stage.run(mini, &output);
            assert!(again.status.success(), "{stage:?}: {}", String::from_utf8_lossy(&again.stderr));
            assert!(result(stage, &output) == result(stage, &whole), "{stage:?} gave other bytes after being killed");
            fs::remove_dir_all(&here).unwrap();
        }
        eprintln!("kill -9: {stage:?}: {killed} killed at work, {left_something} left something, none of it wrong");
    }
}

#[test]
fn a11_synthesize_killed_leaves_no_checkpoint() {
    let command = |output: &Path| {
        let mut command = Command::new(program("flashlm-prep"));
        command.args(["synthesize", "--geometry", "opt-125m", "--layers", "1", "-o"]).arg(output);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let dir = scratch();
    let whole = dir.path().join("whole");
    let begin = Instant::now();
    assert!(command(&whole).status().unwrap().success());
    let (time, expected) = (begin.elapsed(), contents(&whole));
    let mut dice = Dice::of("kill -9 of synthesize");
    let mut opened = 0;
    for round in 0..rounds(1, 200) {
        let here = dir.path().join(format!("round-{round}"));
        let mut child = command(&here).spawn().unwrap();
        std::thread::sleep(time.mul_f64(dice.below(1000) as f64 / 950.0));
        child.kill().unwrap();
        child.wait().unwrap();
        if Checkpoint::open(&here).is_ok() {
            opened += 1;
            assert!(contents(&here) == expected, "a checkpoint that opens is not whole");
        } else {
            // What was published before config.json is whole too; the same command then asks for an empty directory.
            if !command(&here).status().unwrap().success() {
                fs::remove_dir_all(&here).unwrap();
                assert!(command(&here).status().unwrap().success());
            }
            assert!(contents(&here) == expected);
        }
        _ = fs::remove_dir_all(&here);
    }
    eprintln!("kill -9 of synthesize: {opened} were done, the others left nothing that opens");
}

#[test]
#[cfg(target_os = "linux")]
fn a12_every_signal_that_asks_ends_cleanly() {
    let bundle = Mini::get().bundle();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut child = Command::new(program("flashlm"))
            .arg("run")
            .arg(&bundle)
            .args(["--ids", "5", "-n", "120", "--ignore-eos", "--json"])
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Nobody reads: the pipe fills, and the run waits in the middle of its text, or is done.
        std::thread::sleep(Duration::from_millis(150));
        kill_process(Pid::from_child(&child), signal).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let text = std::io::read_to_string(reader).unwrap();
        let status = child.wait().unwrap();
        let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
        assert!(matches!(status.code(), Some(0 | 130)), "{signal:?}: {status} {said}");
        assert!(!said.contains("panicked"), "{said}");
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert!(last["finish"].is_string(), "{signal:?}: no figures at the end");
    }
    let run = |script: &str| {
        let mut sh = Command::new("sh");
        sh.args(["-c", script, "sh"]).arg(program("flashlm")).arg("run").arg(&bundle).args(["--ids", "5", "-n", "9"]);
        let out = sh.stdin(Stdio::null()).output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    let closed = run("exec \"$@\" >&-");
    assert!(closed.0 == Some(0) && !closed.1.contains("panicked"), "{closed:?}");
    let full = run("exec \"$@\" >/dev/full");
    assert!(full.0 == Some(1) && full.1.contains("No space left") && !full.1.contains("panicked"), "{full:?}");
}
