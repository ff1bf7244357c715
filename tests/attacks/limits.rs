//! Limits: of half precision, of a model's positions, of the memory, the threads and the files that the system allows.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use flashlm::error::RuntimeError;
use flashlm::load::load;
use flashlm::options::LoadOptions;
use flashlm_formats::bundle::Bundle;
use flashlm_tests::{Said, fixtures, pack_checkpoint, program, run, scratch};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::mini::{Mini, write_checkpoint};
use crate::skip;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = dir.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The mini checkpoint with keys, or values, of its first layer around 65504, the largest number in f16: some below, some above.
fn write_wide_checkpoint(dir: &Path, which: &str) {
    write_checkpoint(dir);
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let halves = |data: &[u8], change: &dyn Fn(f32) -> f32| -> Vec<u8> {
        let values = data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32());
        values.flat_map(|v| half::f16::from_f32(change(v)).to_le_bytes()).collect()
    };
    let changed: Vec<_> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let of_layer = name.contains(&format!("layers.0.self_attn.{which}_proj."));
            let data = match (of_layer, name.ends_with("bias")) {
                (true, true) => halves(view.data(), &|v| if v < 0.0 { -64_000.0 } else { 64_000.0 }),
                (true, false) => halves(view.data(), &|v| v * 20_000.0),
                _ => view.data().to_vec(),
            };
            (name, view.dtype(), view.shape().to_vec(), data)
        })
        .collect();
    let views = changed.iter().map(|(n, d, s, bytes)| (n.as_str(), TensorView::new(*d, s.clone(), bytes).unwrap()));
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A bundle knows from the weights whether its keys or values may be larger than f16 holds; it then runs as it should without being
/// told, and says what to do where it was told otherwise.
#[test]
fn keys_and_values_beyond_f16_are_never_infinite() {
    for which in ["k", "v"] {
        let dir = scratch();
        let (checkpoint, bundle) = (dir.path().join("checkpoint"), dir.path().join("m.flashlm"));
        write_wide_checkpoint(&checkpoint, which);
        let said = run("flashlm-prep", &["convert", text(&checkpoint), "-o", text(&bundle)], "");
        assert!(said.stderr.contains("f32"), "{said:?}");
        said.succeeded();
        assert!(Bundle::open(&bundle).unwrap().manifest().wide_kv);
        let flashlm = |prompt: usize, args: &[&str]| {
            let ids = vec!["7"; prompt].join(",");
            run("flashlm", &[&["run", text(&bundle), "--ids", &ids, "-n", "4", "--ignore-eos"], args].concat(), "")
        };
        for prompt in [1, 20] {
            let found = flashlm(prompt, &[]).succeeded();
            assert_eq!(found, flashlm(prompt, &["--kv", "f32"]).succeeded());
            flashlm(prompt, &["--kv", "f16"]).failed(1, &["layer 0", "65504", "--kv f32"]);
        }
        let out = dir.path().join("out.safetensors");
        let logits = ["logits", text(&bundle), "--ids", "7,8", "-o", text(&out), "--kv", "f16"];
        run("flashlm", &logits, "").failed(1, &["--kv f32"]);
        assert!(!out.exists());
        let kv_bytes = |bundle: &Path, args: &[&str]| -> u64 {
            let plan = run("flashlm", &[&["plan", text(bundle), "--json"], args].concat(), "").succeeded();
            serde_json::from_str::<Value>(&plan).unwrap()["items"]["KV cache"].as_u64().unwrap()
        };
        // The plan counts what is taken.
        let usual = Mini::get().bundle();
        let args = ["--context", "100"];
        assert_eq!(kv_bytes(&bundle, &args), 2 * kv_bytes(&usual, &args));
        assert!(!Bundle::open(&usual).unwrap().manifest().wide_kv);
    }
}

/// Learned positions have no row beyond the last, and beyond a sliding window the forward pass would compute another model.
#[test]
fn no_command_goes_beyond_a_models_positions_or_window() {
    let dir = scratch();
    let windowed = dir.path().join("windowed.flashlm");
    pack_checkpoint(&fixtures().join("quirks/llama-mistral-window"), &windowed);
    for (bundle, max) in [(Mini::get().bundle(), 128), (windowed, 64)] {
        let opened = Bundle::open(&bundle).unwrap();
        assert_eq!(opened.spec().max_positions, max);
        let ids = |count: usize| vec!["5"; count].join(",");
        let out = dir.path().join("out.safetensors");
        let logits = |count: usize| {
            run("flashlm", &["logits", text(&bundle), "--ids", &ids(count), "-o", text(&out), "--kv", "f32"], "")
        };
        let (beyond, limit) = ((max + 1).to_string(), max.to_string());
        logits(max + 1).failed(1, &[&beyond, &limit, "window"]);
        assert!(!out.exists());
        logits(max).succeeded();
        fs::remove_file(&out).unwrap();
        let plan = |context: &str| run("flashlm", &["plan", text(&bundle), "--context", context], "");
        plan(&limit).succeeded();
        for context in [&beyond, "0", "18446744073709551615"] {
            plan(context).failed(1, &[context, &limit]);
        }
        for (prompt, tokens) in [("1", "18446744073709551615"), ("18446744073709551615", "2"), (&limit, "2")] {
            let args = ["bench", text(&bundle), "--prompt-tokens", prompt, "--tokens", tokens, "--memory", "1GB"];
            run("flashlm", &args, "").failed(1, &[prompt, tokens, &limit]);
        }
        // The library, for whoever calls it.
        for context in [0, max + 1, usize::MAX] {
            let error = load(&opened, &LoadOptions::new(context), &mut |_, _| ()).err().unwrap();
            assert!(matches!(error, RuntimeError::ContextOutOfRange { .. }), "{error}");
        }
        let mut forward = load(&opened, &LoadOptions::new(max), &mut |_, _| ()).unwrap().forward;
        forward.feed(&vec![5; max]).unwrap();
        assert!(matches!(forward.feed(&[5]), Err(RuntimeError::ContextFull { .. })));
    }
}

/// A control group of version 1 below `/sys/fs/cgroup/CONTROLLER`, removed when dropped.
struct Group(PathBuf);

impl Group {
    fn new(controller: &str, settings: &[(&str, u64)]) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("flashlm-limits-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        Self::at(Path::new("/sys/fs/cgroup").join(controller).join(name), settings)
    }

    fn at(dir: PathBuf, settings: &[(&str, u64)]) -> Option<Self> {
        if let Err(why) = fs::create_dir(&dir) {
            skip(&format!("{}: {why}", dir.display()));
            return None;
        }
        let group = Self(dir);
        for (file, value) in settings {
            if let Err(why) = fs::write(group.0.join(file), value.to_string()) {
                skip(&format!("{file}: {why}"));
                return None;
            }
        }
        Some(group)
    }

    fn command(&self, program: &Path) -> Command {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh"]).arg(program).stdin(Stdio::null());
        command
    }

    fn run(&self, name: &str, args: &[&str]) -> Said {
        self.command(&program(name)).args(args).output().unwrap().into()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        _ = fs::remove_dir(&self.0);
    }
}

/// Something that holds memory until it is dropped.
struct Hog(Child);

impl Drop for Hog {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

const MIB: u64 = 1 << 20;

/// The figures at the end of a run with `--json`.
fn last_line(said: Said) -> Value {
    serde_json::from_str(said.succeeded().lines().last().unwrap()).unwrap()
}

#[test]
fn the_default_budget_is_what_the_groups_leave() {
    let bundle = Mini::get().bundle();
    let limit = 200 * MIB;
    let Some(parent) = Group::new("memory", &[("memory.limit_in_bytes", limit)]) else { return };
    let Some(child) = Group::at(parent.0.join("child"), &[]) else { return };
    let doctor = |group: &Group| -> Value {
        serde_json::from_str(&group.run("flashlm", &["doctor", "--json"]).succeeded()).unwrap()
    };
    let bytes = |report: &Value, key: &str| report[key].as_u64().unwrap_or_else(|| panic!("no {key} in {report}"));
    for group in [&parent, &child] {
        let report = doctor(group);
        assert_eq!(bytes(&report, "memory_cgroup_limit_bytes"), limit);
        assert!(report["memory_bound"].as_str().unwrap().contains(text(&parent.0)), "{report}");
        let (left, default) = (bytes(&report, "memory_available_bytes"), bytes(&report, "memory_default_bytes"));
        assert!((limit - 20 * MIB..=limit).contains(&left), "{report}");
        assert!(default < left && default > left / 2, "a reserve is left: {report}");
        let plan = group.run("flashlm", &["plan", text(&bundle), "--json"]).succeeded();
        let plan: Value = serde_json::from_str(&plan).unwrap();
        assert!(bytes(&plan, "budget_bytes") < limit && plan["budget_from"].is_string(), "{plan}");
        // More than the kernel would let it have is refused, and not tried.
        let args = ["run", text(&bundle), "--ids", "5,6", "-n", "2"];
        group.run("flashlm", &args).succeeded();
        let more = (limit + MIB).to_string();
        let refused = group.run("flashlm", &[&args[..], &["--memory", &more]].concat());
        refused.failed(
            1,
            &[&more, &limit.to_string(), text(&parent.0)].map(|word| if word == more { "budget" } else { word }),
        );
        group.run("flashlm", &[&args[..], &["--memory", "190MiB"]].concat()).succeeded();
        // A plan that no run here could follow is none.
        group.run("flashlm", &["plan", text(&bundle), "--memory", &more]).failed(1, &["budget", text(&parent.0)]);
        let last = last_line(group.run("flashlm", &[&args[..], &["--json"]].concat()));
        assert!(bytes(&last, "cgroup_peak_bytes") <= limit, "{last}");
    }
    // What another process of the group holds is not there to take: 100 MiB in the memory of a `tail` that waits for a line's end.
    let script = "{ head -c 104857600 /dev/zero; sleep 600; } | tail -n 1";
    let mut hog = parent.command(Path::new("sh"));
    hog.args(["-c", &format!("trap 'kill 0' TERM; {script}")]);
    let hog = Hog(std::os::unix::process::CommandExt::process_group(&mut hog, 0).spawn().unwrap());
    let usage = || fs::read_to_string(parent.0.join("memory.usage_in_bytes")).unwrap().trim().parse::<u64>().unwrap();
    for _ in 0..600 {
        if usage() > 100 * MIB {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(usage() > 100 * MIB, "the hog has its memory");
    for group in [&parent, &child] {
        let report = doctor(group);
        assert!(bytes(&report, "memory_available_bytes") <= 100 * MIB, "{report}");
        // Asked for all the same, it is tried, and said.
        let args = ["run", text(&bundle), "--ids", "5,6", "-n", "2"];
        group.run("flashlm", &args).succeeded();
    }
    // What the process took is told from what the group holds.
    let last = last_line(parent.run("flashlm", &["run", text(&bundle), "--ids", "5,6", "-n", "2", "--json"]));
    assert!(bytes(&last, "cgroup_peak_bytes") > 100 * MIB && bytes(&last, "peak_memory_bytes") < 50 * MIB, "{last}");
    let kill = Command::new("kill").args(["-KILL", "--", &format!("-{}", hog.0.id())]).status().unwrap();
    assert!(kill.success());
    drop(hog);
    for _ in 0..100 {
        if fs::read_to_string(parent.0.join("cgroup.procs")).unwrap().is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `ulimit -f`: the system would end the process without a word.
#[test]
fn a_file_size_limit_is_said_and_leaves_nothing() {
    let mini = Mini::get();
    let dir = scratch();
    let limited = |name: &str, args: &[&str]| {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -f 8 && exec \"$@\"", "sh"]).arg(program(name)).args(args).stdin(Stdio::null());
        Said::from(command.current_dir(dir.path()).env("TMPDIR", dir.path()).output().unwrap())
    };
    let (checkpoint, bundle, words) = (mini.path("checkpoint"), mini.bundle(), mini.path("text.txt"));
    let ids = vec!["5"; 100].join(",");
    limited("flashlm-prep", &["convert", text(&checkpoint), "-o", "m.flashlm"]).failed(1, &["ulimit -f"]);
    limited("flashlm-prep", &["record", text(&checkpoint), "--text", text(&words), "-o", "rec"])
        .failed(1, &["ulimit -f"]);
    limited("flashlm-prep", &["evaluate", text(&bundle), "--against", text(&checkpoint), "--text", text(&words)])
        .failed(1, &["ulimit -f"]);
    limited("flashlm", &["logits", text(&bundle), "--ids", &ids, "-o", "out.safetensors"]).failed(1, &["ulimit -f"]);
    limited("flashlm", &["disk", "."]).failed(1, &["ulimit -f"]);
    limited("flashlm-prep", &["synthesize", "--geometry", "opt-125m", "--layers", "1", "-o", "new"])
        .failed(1, &["ulimit -f"]);
    for name in names(dir.path()) {
        assert!(!name.ends_with(".partial") && name == "rec", "{name} was left");
    }
}

/// A container's pids limit, as `ulimit -u` does for users: no thread can be started.
#[test]
fn where_no_thread_is_to_be_had_the_limit_is_named() {
    let mini = Mini::get();
    let dir = scratch();
    let (checkpoint, bundle, words) = (mini.path("checkpoint"), mini.bundle(), mini.path("text.txt"));
    let out = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let recording = mini.path("recording");
    let ids = ["--ids", "5,6"];
    let flashlm: [&[&str]; 4] = [
        &["run", text(&bundle), ids[0], ids[1], "-n", "2", "--threads", "4"],
        &["run", text(&bundle), ids[0], ids[1], "-n", "2", "--threads", "1", "--engine", "threads"],
        &["logits", text(&bundle), ids[0], ids[1], "-o", &out("l"), "--threads", "4"],
        &["bench", text(&bundle), "--memory", "30MB", "--prompt-tokens", "9", "--tokens", "9", "--threads", "4"],
    ];
    let prep: [&[&str]; 7] = [
        &["convert", text(&checkpoint), "-o", &out("m.flashlm")],
        &["record", text(&checkpoint), "--text", text(&words), "--threads", "4", "-o", &out("recording")],
        &["train", text(&recording), "-o", &out("predictors")],
        &["order", text(&recording), "-o", &out("orders")],
        &["evaluate", text(&bundle), "--against", text(&checkpoint), "--text", text(&words), "--threads", "4"],
        &["prepare", text(&checkpoint), "--text", text(&words), "--threads", "4", "-o", &out("p.flashlm")],
        &["synthesize", "--geometry", "opt-125m", "--layers", "1", "--threads", "4", "-o", &out("s")],
    ];
    // One: the process itself. Two: one thread more, so that a second one is missing.
    for pids in [1, 2] {
        let Some(group) = Group::new("pids", &[("pids.max", pids)]) else { return };
        for (name, commands) in [("flashlm", &flashlm[..]), ("flashlm-prep", &prep[..])] {
            for args in commands {
                let said = group.run(name, args);
                if said.code == Some(0) && pids == 2 {
                    continue;
                }
                said.failed(1, &["thread", "ulimit -u", "pids limit"]);
            }
        }
    }
    // A run that needs no thread starts none.
    let Some(group) = Group::new("pids", &[("pids.max", 1)]) else { return };
    let args = ["run", text(&bundle), "--ids", "5,6", "-n", "2", "--threads", "1"];
    let said = group.run("flashlm", &args);
    assert!(said.code == Some(0) || said.stderr.contains("ulimit -u"), "{said:?}");
    let args = ["bench", text(&bundle), "--memory", "30MB", "--prompt-tokens", "9", "--tokens", "9", "--threads", "1"];
    let args = [&args[..], &["--steps", "naive", "--repeats", "1"]].concat();
    group.run("flashlm", &args).failed(1, &["cannot start", "ulimit -u", "pids limit"]);
    // What the error advises can be done: bench and its step, each with a thread of its own.
    let Some(group) = Group::new("pids", &[("pids.max", 2)]) else { return };
    group.run("flashlm", &args).succeeded();
}

/// io_uring starts a thread for what it cannot read at once: a file just written, whose pages are not on the disk yet, or one that
/// is read through the page cache. Where the kernel may start none it cancels the read, again and again.
#[test]
fn a_file_just_written_is_read_where_no_thread_is_to_be_had() {
    let bundle = Mini::get().bundle();
    let args = ["--ids", "5,6", "-n", "3", "--ignore-eos", "--json", "--threads", "1", "--ffn", "streamed"];
    let expected = run("flashlm", &[&["run", text(&bundle)], &args[..]].concat(), "").succeeded();
    let ids = |out: &str| -> Vec<Value> {
        out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].clone()).collect()
    };
    for (engine, direct) in [("auto", "optional"), ("io_uring", "optional"), ("io_uring", "disabled")] {
        let Some(group) = Group::new("pids", &[("pids.max", 1)]) else { return };
        let dir = scratch();
        let fresh = dir.path().join("fresh.flashlm");
        fs::copy(&bundle, &fresh).unwrap();
        let said = group
            .run("flashlm", &[&["run", text(&fresh)], &args[..], &["--engine", engine, "--direct", direct]].concat());
        assert_eq!(ids(&said.succeeded()), ids(&expected), "{engine} {direct}");
    }
}

/// Ends `command` with KILL after a while, and tells whether that came before its end.
fn killed(mut command: Command, after: Duration) -> bool {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(after);
    child.kill().unwrap();
    !child.wait().unwrap().success()
}

/// What only one process needs has no name: whatever ends the process, nothing is left of it.
#[test]
fn measurements_that_are_killed_leave_nothing() {
    let mini = Mini::get();
    let (checkpoint, bundle, words) = (mini.path("checkpoint"), mini.bundle(), mini.path("text.txt"));
    let commands: [(&str, &[&str]); 4] = [
        ("flashlm-prep", &["thresholds", text(&checkpoint), "--text", text(&words), "--tokens", "1400"]),
        ("flashlm-prep", &["evaluate", text(&bundle), "--against", text(&checkpoint), "--text", text(&words)]),
        ("flashlm", &["disk", ".", "--scratch", "64"]),
        ("flashlm", &["bench", text(&bundle), "--memory", "30MB", "--prompt-tokens", "20", "--tokens", "20"]),
    ];
    for (name, args) in commands {
        let dir = scratch();
        let mut in_time = 0;
        for ms in [20, 40, 80, 160] {
            let mut command = Command::new(program(name));
            command.args(args).current_dir(dir.path()).env("TMPDIR", dir.path()).env("FLASHLM_CACHE_DIR", dir.path());
            in_time += usize::from(killed(command, Duration::from_millis(ms)));
            assert_eq!(names(dir.path()), [""; 0], "{name} {args:?} killed after {ms} ms");
        }
        assert!(in_time > 0, "{name} {args:?} was never killed in time");
    }
}

/// A bench that is killed takes its step with it, and the next one takes its group away.
#[test]
fn a_killed_bench_is_cleaned_up_after() {
    let Some(outer) = Group::new("memory", &[]) else { return };
    let bundle = Mini::get().bundle();
    let groups = || outer.0.read_dir().unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count();
    let bench = |steps: &str| {
        let mut command = outer.command(&program("flashlm"));
        command.args(["bench", text(&bundle), "--memory", "100MB", "--prompt-tokens", "20", "--repeats", "1"]);
        command.args(["--tokens", "50", "--steps", steps]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let mut seen = false;
    for _ in 0..20 {
        let mut child = bench("naive,naive,naive,naive").spawn().unwrap();
        for _ in 0..2000 {
            seen |= groups() > 0;
            if seen || child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if seen && groups() > 0 {
            break;
        }
    }
    assert!(groups() > 0, "killed while a step had a group");
    Said::from(bench("naive").output().unwrap()).succeeded();
    assert_eq!(groups(), 0);
    // Asked to end, by whichever signal, it takes its group away itself, and at once.
    for (signal, code) in [("QUIT", 131), ("TERM", 143), ("INT", 130), ("HUP", 129)] {
        let mut child = bench("naive,naive,naive,naive").spawn().unwrap();
        for _ in 0..2000 {
            if groups() > 0 || child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(
            Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap().success()
        );
        assert_eq!(child.wait().unwrap().code(), Some(code), "{signal}");
        assert_eq!(groups(), 0, "{signal}");
    }
}

#[test]
fn numbers_at_their_ends_are_answered_with_a_sentence() {
    let bundle = Mini::get().bundle();
    let dir = scratch();
    let large = "18446744073709551615";
    for number in ["0", "1", "-1", large, "18446744073709551616", "1e9", "nan", ""] {
        for args in [
            &["plan", text(&bundle), "--context", number][..],
            &["bench", text(&bundle), "--tokens", number, "--prompt-tokens", large],
            &["bench", text(&bundle), "--prompt-tokens", number, "--tokens", large],
            &["bench", text(&bundle), "--repeats", number, "--tokens", large],
            &["bench", text(&bundle), "--memory", number, "--tokens", large],
            &["disk", text(dir.path()), "--seconds", number, "--scratch", "1"],
            &["disk", text(dir.path()), "--scratch", number, "--seconds", "0"],
            &["logits", text(&bundle), "--ids", number, "-o", "/nonexistent/out"],
        ] {
            let said = run("flashlm", args, "");
            let answered = matches!(said.code, Some(0..=2)) && !said.stderr.contains("panicked");
            assert!(answered, "{args:?}: {said:?}");
            assert!(said.code != Some(0) || args[0] == "plan" && number == "1", "{args:?}: {said:?}");
        }
    }
    run("flashlm", &["doctor", "/nonexistent"], "").failed(1, &["/nonexistent"]);
    run("flashlm", &["doctor", "/dev/null"], "").failed(1, &["/dev/null"]);
    run("flashlm", &["disk", "/nonexistent"], "").failed(1, &["/nonexistent"]);
}
