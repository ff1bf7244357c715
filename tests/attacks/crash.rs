//! Attacks 10 to 12: programs killed at random moments, and signals that ask politely.

use std::fs;
use std::io::Write;
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
pub(crate) fn nothing_is_wrong(stage: Stage, found: &Path, whole: &Path) {
    if stage.output().ends_with(".flashlm") {
        no_bundle_is_wrong(found.parent().unwrap());
    }
    if stage.is_file() {
        let is_wrong = found.exists() && fs::read(found).unwrap() != fs::read(whole).unwrap();
        assert!(!is_wrong, "{stage:?}: a file under its name is not whole");
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
pub(crate) fn result(stage: Stage, output: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    if stage.is_file() { vec![(Default::default(), fs::read(output).unwrap())] } else { contents(output) }
}

/// Rounds after which a command is timed again: on a machine with other work the last time says little of the next one.
const TIMED_EVERY: usize = 20;

/// When to kill: spread over the time that the command takes.
struct Moments {
    dice: Dice,
    time: Duration,
}

impl Moments {
    fn new(campaign: &str) -> Self {
        Self { dice: Dice::of(campaign), time: Duration::ZERO }
    }

    /// Times the command before the rounds that ask for it; it is given a directory of its own.
    fn time(&mut self, round: usize, dir: &Path, run: impl FnOnce(&Path)) {
        if round.is_multiple_of(TIMED_EVERY) {
            let here = dir.join("timed");
            fs::create_dir(&here).unwrap();
            let begin = Instant::now();
            run(&here);
            self.time = begin.elapsed();
            fs::remove_dir_all(&here).unwrap();
        }
    }

    /// Starts the command and kills it at some moment. Whether it was still at work.
    fn kill(&mut self, command: &mut Command) -> bool {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(self.time.mul_f64(self.dice.below(1000) as f64 / 1000.0));
        let at_work = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        at_work
    }
}

/// The stages that a campaign is to kill: all, or those that `FLASHLM_STAGES=train,order` names.
fn stages() -> Vec<Stage> {
    let asked = std::env::var("FLASHLM_STAGES").ok();
    let is_asked = |stage: &Stage| {
        let name = format!("{stage:?}").to_lowercase();
        asked.as_ref().is_none_or(|asked| asked.split(',').any(|one| one == name))
    };
    Stage::ALL.into_iter().filter(is_asked).collect()
}

#[test]
fn a10_killed_at_any_moment_and_run_again() {
    let mini = Mini::get();
    for stage in stages() {
        let dir = scratch();
        let whole = dir.path().join("whole").join(stage.output());
        fs::create_dir(whole.parent().unwrap()).unwrap();
        assert!(stage.run(mini, &whole).status.success());
        let mut moments = Moments::new(&format!("kill -9 of {stage:?}"));
        let (mut killed, mut left_something, mut done) = (0, 0, 0);
        let rounds = rounds(3, 200);
        // A busy machine may end the work before every kill.
        while done < rounds || (killed == 0 && done < 10 * rounds) {
            moments.time(done, dir.path(), |here| {
                assert!(stage.run(mini, &here.join(stage.output())).status.success());
            });
            let here = dir.path().join(format!("round-{done}"));
            fs::create_dir(&here).unwrap();
            let output = here.join(stage.output());
            // Up to twice, the second time on what the first left.
            for _ in 0..1 + done % 2 {
                killed += usize::from(moments.kill(&mut stage.command(mini, &output)));
                nothing_is_wrong(stage, &output, &whole);
            }
            left_something += usize::from(fs::read_dir(&here).unwrap().count() > 0);
            let again = stage.run(mini, &output);
            assert!(again.status.success(), "{stage:?}: {}", String::from_utf8_lossy(&again.stderr));
            assert!(result(stage, &output) == result(stage, &whole), "{stage:?} gave other bytes after being killed");
            fs::remove_dir_all(&here).unwrap();
            done += 1;
        }
        eprintln!(
            "kill -9: {stage:?}: {done} rounds, {killed} killed at work, {left_something} left something, none of it wrong"
        );
        assert!(killed > 0, "{stage:?} was never killed at work");
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
    assert!(command(&whole).status().unwrap().success());
    let expected = contents(&whole);
    let mut moments = Moments::new("kill -9 of synthesize");
    let (mut killed, mut left_something, mut opened, mut done) = (0, 0, 0, 0);
    let rounds = rounds(1, 200);
    while done < rounds {
        moments.time(done, dir.path(), |here| assert!(command(&here.join("timed")).status().unwrap().success()));
        let here = dir.path().join(format!("round-{done}"));
        killed += usize::from(moments.kill(&mut command(&here)));
        left_something += usize::from(here.exists());
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
        done += 1;
    }
    eprintln!(
        "kill -9: synthesize: {done} rounds, {killed} killed at work, {left_something} left something, {opened} were done"
    );
}

/// What a pipe holds.
const PIPE_BYTES: usize = 65536;

#[test]
#[cfg(target_os = "linux")]
fn a12_every_signal_that_asks_ends_cleanly() {
    let bundle = Mini::get().bundle();
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        // Nobody reads, and the pipe is all but full: the run waits in the middle of its text.
        writer.write_all(&[b'\n'; PIPE_BYTES - 4096]).unwrap();
        let mut child = Command::new(program("flashlm"))
            .arg("run")
            .arg(&bundle)
            .args(["--ids", "5", "-n", "120", "--ignore-eos", "--json"])
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let waits = |child: &std::process::Child| {
            let stat = fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default();
            stat.contains("pipe")
        };
        let begin = Instant::now();
        while !waits(&child) && begin.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(5));
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let text = std::io::read_to_string(reader).unwrap();
        let status = child.wait().unwrap();
        let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
        assert_eq!(status.code(), Some(code), "{signal:?}: {status} {said}");
        assert!(!said.contains("panicked"), "{said}");
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last["finish"], "stopped", "{signal:?}: {last}");
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
