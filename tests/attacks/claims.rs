//! What `bench`, `plan` and `doctor` claim of the machine, and what they wait for.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use flashlm_io::{DiskProfile, PROFILE_VERSION, RandomRate, device_key};
use flashlm_tests::{program, run, scratch};
use serde_json::Value;

use crate::mini::Mini;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A bench of the mini bundle that takes a few seconds.
const SHORT: [&str; 8] = ["--memory", "30MB", "--prompt-tokens", "20", "--tokens", "20", "--repeats", "1"];

/// How a process ends within `patience`; it is killed if it does not.
fn ended(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < patience {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

#[test]
fn a_text_that_does_not_come_is_not_waited_for_when_asked_to_end() {
    let mini = Mini::get();
    let dir = scratch();
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let bench = |text: &Path| {
        let mut command = Command::new(program("flashlm"));
        command.arg("bench").arg(mini.bundle()).args(SHORT).args(["--steps", "naive", "--json", "--text"]).arg(text);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let mut child = bench(&pipe);
        std::thread::sleep(Duration::from_millis(300));
        assert!(
            Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap().success()
        );
        let status = ended(&mut child, Duration::from_secs(10)).expect("one signal is enough");
        assert!(status.code() == Some(code) || status.signal().is_some(), "{status}");
    }
    // A pipe that somebody writes to is as good as a file.
    let mut child = bench(&pipe);
    let words = fs::read(mini.path("text.txt")).unwrap();
    // The reader may have enough before the end.
    _ = File::options().write(true).open(&pipe).unwrap().write_all(&words);
    assert!(ended(&mut child, Duration::from_secs(60)).expect("it ends").success());
    // No further than it takes, so that endless text ends.
    let mut child = bench(Path::new("/dev/zero"));
    let status = ended(&mut child, Duration::from_secs(30)).expect("it ends");
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_profile_of_a_busy_minute_is_no_limit() {
    let mini = Mini::get();
    let dir = scratch();
    let rates = [4096, 65_536].map(|read_bytes| RandomRate { read_bytes, depth: 1, reads_per_s: 2.0 });
    let profile = DiskProfile {
        version: PROFILE_VERSION,
        device: device_key(&mini.bundle()),
        mode: "direct".into(),
        engine: "threads".into(),
        sequential_bytes_per_s: 1e4,
        random: rates.to_vec(),
    };
    fs::write(DiskProfile::path_in(dir.path(), &profile.device), profile.to_json()).unwrap();
    let bench = |more: &[&str]| {
        let mut command = Command::new(program("flashlm"));
        command.arg("bench").arg(mini.bundle()).args(SHORT).args(["--steps", "naive,storage_order"]).args(more);
        flashlm_tests::Said::from(command.env("FLASHLM_CACHE_DIR", dir.path()).output().unwrap()).succeeded()
    };
    let report: Value = serde_json::from_str(&bench(&["--json"])).unwrap();
    let limits = &report["machine"]["limits"];
    assert_eq!(limits["from"], "disk_profile");
    assert!(
        limits["disk_faster"]["times"].as_f64().unwrap() > 1.0 && limits["disk_faster"]["seen"].is_string(),
        "{limits}"
    );
    for step in report["steps"].as_array().unwrap() {
        let figure = |key: &str| step[key].as_f64().unwrap();
        assert!(figure("distance") >= 0.999 && (figure("io_limit_ms") > 0.0 || step["name"] != "naive"), "{step}");
        assert!(figure("io_limit_ms") <= step["decode_ms_per_token"]["median"].as_f64().unwrap() * 1.001, "{step}");
    }
    let table = bench(&[]);
    assert!(table.contains("times as fast, as ") && table.contains("in this run"), "{table}");
}

#[test]
fn what_is_not_read_rests_on_no_disk() {
    // It says how often its neurons come again.
    let bundle = Mini::get().path("prepared.flashlm");
    let plan = |args: &[&str]| run("flashlm", &[&["plan", text(&bundle)], args].concat(), "").succeeded();
    let resident = plan(&["--ffn", "resident"]);
    assert!(resident.contains("nothing is read") && !resident.contains("disk"), "{resident}");
    let rests_on = |args: &[&str]| {
        let plan: Value = serde_json::from_str(&plan(&[args, &["--json"]].concat())).unwrap();
        plan["expected"]["rests_on"].clone()
    };
    assert!(rests_on(&["--ffn", "resident"]).is_null());
    assert!(rests_on(&["--ffn", "streamed"]).is_string());
    let streamed = plan(&["--ffn", "streamed"]);
    let line = streamed.lines().find(|line| line.contains("tokens/s")).unwrap();
    assert!(streamed.contains("reckoned for a typical disk"), "{streamed}");
    // Two digits are what an estimate has.
    for number in line.split([' ', '(', ',', ';']).filter(|word| word.parse::<f64>().is_ok()) {
        let digits = number.replace('.', "");
        assert!(digits.trim_start_matches('0').trim_end_matches('0').len() <= 2, "{number} in {line}");
    }
}

#[test]
fn doctor_opens_the_bundle_as_a_run_does() {
    let bundle = Mini::get().bundle();
    let doctor: Value =
        serde_json::from_str(&run("flashlm", &["doctor", text(&bundle), "--json"], "").succeeded()).unwrap();
    let reader = doctor["reader"].as_str().unwrap();
    let args = ["run", text(&bundle), "--ids", "5", "-n", "1", "--ffn", "flash", "-v"];
    let said = run("flashlm", &args, "");
    assert!(said.stderr.contains(&format!("FFN from flash: {reader}")), "{reader:?} in {}", said.stderr);
}

#[test]
fn a_budget_that_bench_chose_itself_is_said() {
    let bundle = Mini::get().bundle();
    let args = ["bench", text(&bundle), "--prompt-tokens", "20", "--tokens", "20"];
    run("flashlm", &args, "").failed(1, &["without --memory", "half of the model", "smallest that works"]);
    let given = run("flashlm", &[&args[..], &["--memory", "50%"]].concat(), "").failed(1, &["smallest that works"]);
    assert!(!given.contains("without --memory"), "{given}");
}
