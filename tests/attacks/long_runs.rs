//! Attacks 50 to 52: long lives and many at once.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flashlm::generate::Percentiles;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::sampler::Sampling;
use flashlm_formats::bundle::LayoutOptions;
use flashlm_formats::publish::temporary_path;
use flashlm_tests::{Said, budgets, bundle_with_predictors, continuation, loaded, options, program, scratch, tiny_opt};

use crate::crash::result;
use crate::mini::{Mini, Stage};
use crate::rounds;

/// Resident bytes, and open files.
fn held() -> (u64, usize) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap().trim().trim_end_matches(" kB");
    (kib.parse::<u64>().unwrap() * 1024, fs::read_dir("/proc/self/fd").unwrap().count())
}

/// Run in a process of its own by the test below.
#[test]
#[ignore = "the body of a50"]
fn a50_child() {
    let tokens = rounds(1500, 50_000);
    let dir = scratch();
    let bundle = bundle_with_predictors(&tiny_opt(), &dir.path().join("m"), LayoutOptions::default(), true);
    let base = options(128, FfnChoice::Flash);
    let (smallest, _) = budgets(&bundle, &base);
    let mut model = loaded(&bundle, &LoadOptions { budget: Some(smallest), ..base });
    let mut times = Vec::new();
    let mut first = None;
    let mut done = 0;
    while done < tokens {
        // Sequences of several lengths, prompts that are streamed and prompts that are decoded.
        let length = [3, 40, 9][done % 3];
        let prompt: Vec<u32> = (0..length).map(|i| 2 + (i * 31 + done as u32 * 7) % 4000).collect();
        let begin = Instant::now();
        let count = 50.min(tokens - done);
        let ids =
            continuation(&mut model, &prompt, count, Sampling { temperature: 0.9, seed: 3, ..Sampling::default() });
        times.push(begin.elapsed() / count as u32);
        assert_eq!(ids.len(), count);
        done += count;
        if done * 10 >= tokens {
            first.get_or_insert_with(held);
        }
    }
    let (first, last) = (first.unwrap(), held());
    let tenth = times.len() / 10 + 1;
    let (early, late) = (Percentiles::of(&times[tenth..2 * tenth]), Percentiles::of(&times[times.len() - tenth..]));
    eprintln!("long run: {done} tokens; memory {} -> {} bytes, files {} -> {}", first.0, last.0, first.1, last.1);
    eprintln!("long run: ms a token, prompt included: {:.2} early, {:.2} late", early.median, late.median);
    assert!(last.0 <= first.0 + (1 << 20), "memory grew from {} to {}", first.0, last.0);
    assert_eq!(first.1, last.1, "open files");
    // Other tests share the machine: this finds growth, not noise.
    assert!(late.median < 3.0 * early.median, "slower and slower: {early:?}, {late:?}");
}

#[test]
fn a50_fifty_thousand_tokens_in_one_process() {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["long_runs::a50_child", "--exact", "--ignored", "--nocapture", "--test-threads", "1"]);
    let output = child.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    eprint!("{}", said.lines().filter(|l| l.starts_with("long run")).map(|l| format!("{l}\n")).collect::<String>());
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
    assert!(said.contains("long run: "), "the child ran nothing: {said}");
}

#[test]
fn a51_two_and_eight_processes_on_one_bundle() {
    let bundle = Mini::get().bundle();
    let start = || {
        let mut command = Command::new(program("flashlm"));
        command.arg("run").arg(&bundle).args(["--ids", "5,6,7", "-n", "80", "--ignore-eos", "--threads", "2"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let alone = Said::from(start().wait_with_output().unwrap()).succeeded();
    for count in [2, 8] {
        let running: Vec<_> = (0..count).map(|_| start()).collect();
        for child in running {
            assert_eq!(Said::from(child.wait_with_output().unwrap()).succeeded(), alone);
        }
    }
}

/// Two recordings or preparations into one directory: any of them may fail, but none is wrong, and one more ends in the same bytes.
#[test]
fn a52_two_writers_of_one_directory() {
    let mini = Mini::get();
    for stage in [Stage::Record, Stage::Train, Stage::Order, Stage::Prepare] {
        for _ in 0..rounds(1, 20) {
            let dir = scratch();
            let output = dir.path().join(stage.output());
            let running: Vec<_> = (0..3).map(|_| stage.command(mini, &output).spawn().unwrap()).collect();
            let said: Vec<_> = running.into_iter().map(|child| Said::from(child.wait_with_output().unwrap())).collect();
            assert!(
                said.iter().all(|said| matches!(said.code, Some(0 | 1)) && !said.stderr.contains("panicked")),
                "{said:?}"
            );
            Said::from(stage.run(mini, &output)).succeeded();
            assert!(result(stage, &output) == result(stage, &mini.path(stage.output())), "{stage:?}: {said:?}");
        }
    }
}

/// Whatever file another process is writing, the command says so and leaves it; afterwards it ends in the same bytes.
#[test]
fn a52_what_another_process_is_writing_is_left_to_it() {
    let mini = Mini::get();
    for stage in Stage::ALL {
        let expected = result(stage, &mini.path(stage.output()));
        for (name, _) in &expected {
            let dir = scratch();
            let output = dir.path().join(stage.output());
            let file = if stage.is_file() { output.clone() } else { output.join(name) };
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            let partial = temporary_path(&file);
            fs::write(&partial, "theirs").unwrap();
            let theirs = File::open(&partial).unwrap();
            theirs.lock().unwrap();
            let named = file.file_name().unwrap().to_str().unwrap();
            Said::from(stage.run(mini, &output)).failed(1, &["another process", named]);
            assert_eq!(fs::read(&partial).unwrap(), b"theirs", "{stage:?}: {name:?}");
            drop(theirs);
            Said::from(stage.run(mini, &output)).succeeded();
            // The mini model's own bundle was changed after it had been packed.
            assert!(stage == Stage::Pack || result(stage, &output) == expected, "{stage:?}: {name:?}");
        }
    }
}

/// Two writers of one file: one of them is told so, and what is there in the end is whole.
#[test]
fn a52_two_writers_of_one_bundle() {
    let mini = Mini::get();
    let dir = scratch();
    let out = dir.path().join("out.flashlm");
    for _ in 0..rounds(2, 50) {
        let stage = Stage::Convert;
        let running: Vec<_> = (0..3).map(|_| stage.command(mini, &out).spawn().unwrap()).collect();
        let mut done = 0;
        for child in running {
            let said = Said::from(child.wait_with_output().unwrap());
            match said.code {
                Some(0) => done += 1,
                _ => assert!(said.stderr.contains("another process"), "{said:?}"),
            }
        }
        assert!(done > 0);
        assert_eq!(fs::read(&out).unwrap(), fs::read(mini.path("converted.flashlm")).unwrap());
        std::thread::sleep(Duration::from_millis(1));
    }
}
