//! Both programs as a user meets them: results, exit codes, and messages that say the next step.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use flashlm::command_line::{FLASHLM, FLASHLM_PREP, Other};
use flashlm_formats::bundle::Bundle;
use flashlm_tests::{Golden, Said, fixtures, program, run, scratch, tiny_opt};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The example as a bundle, converted once by the program.
fn bundle() -> &'static str {
    static BUNDLE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_dir, path) = BUNDLE.get_or_init(|| {
        let dir = scratch();
        let path = dir.path().join("tiny-opt.flashlm");
        prep(&["convert", text(&tiny_opt()), "-o", text(&path)]).succeeded();
        (dir, path)
    });
    text(path)
}

fn flashlm(args: &[&str]) -> Said {
    run("flashlm", args, "")
}

fn prep(args: &[&str]) -> Said {
    run("flashlm-prep", args, "")
}

/// `flashlm run` on the example.
fn run_example(args: &[&str]) -> Said {
    let all: Vec<&str> = ["run", bundle()].iter().chain(args).copied().collect();
    flashlm(&all)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Files in a directory whose contents open as a bundle, under whatever name.
fn opening_files(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| Bundle::open(path).is_ok()).collect()
}

#[test]
fn a_prompt_is_continued_from_every_kind_of_input() {
    const PROMPT: &str = "Once upon a time";
    let expected = run_example(&["--prompt", PROMPT, "-n", "16"]);
    assert!(expected.stderr.contains("decode 15 tokens") && expected.stderr.contains("peak memory"), "{expected:?}");
    let expected = expected.succeeded();
    assert!(expected.starts_with(", there was a little girl"), "{expected}");

    let dir = scratch();
    let file = dir.path().join("prompt.txt");
    fs::write(&file, PROMPT).unwrap();
    assert_eq!(run_example(&["--prompt-file", text(&file), "-n", "16"]).succeeded(), expected);
    let piped = run("flashlm", &["run", bundle(), "--prompt-file", "-", "-n", "16"], PROMPT);
    assert_eq!(piped.succeeded(), expected);
    for ffn in ["resident", "streamed"] {
        assert_eq!(run_example(&["--prompt", PROMPT, "-n", "16", "--ffn", ffn]).succeeded(), expected);
    }
    let verbose = run_example(&["--prompt", PROMPT, "-n", "16", "--verbose"]);
    assert!(verbose.stderr.contains("KV cache") && verbose.stderr.contains("total"), "{verbose:?}");
    assert_eq!(verbose.succeeded(), expected);
}

#[test]
fn json_has_an_object_per_token_and_a_last_one() {
    let golden = Golden::read(&fixtures().join("golden/tiny-opt.safetensors"));
    let prompt = golden.ids("prompt1");
    let ids: Vec<String> = prompt.iter().map(u32::to_string).collect();
    // Without guesses, so that every token is a step.
    let how = ["--kv", "f32", "--ffn", "streamed", "--speculate", "off"];
    let ids = ids.join(",");
    let args = [&["--ids", &ids, "-n", "64", "--ignore-eos", "--json"], &how[..]].concat();
    let out = run_example(&args).succeeded();
    let mut lines: Vec<Value> = out.lines().map(json).collect();
    let last = lines.pop().unwrap();
    let found: Vec<u32> = lines.iter().map(|l| l["id"].as_u64().unwrap() as u32).collect();
    assert_eq!(found, golden.ids("greedy1"));
    assert!(lines.iter().all(|l| l["text"].is_string() && l["ms"].as_f64().unwrap() > 0.0));
    // The first comes of the prompt, and of all its layers at once.
    assert!(lines.iter().all(|l| l["bytes_read_per_token"] == last["bytes_read_per_token"]), "{lines:?}");

    assert_eq!(last["prompt_tokens"], 7);
    assert_eq!(last["tokens"], 64);
    assert!(last["prefill_ms"].as_f64().unwrap() > 0.0);
    let ms = |key: &str| last["decode_ms_per_token"][key].as_f64().unwrap();
    assert!(0.0 < ms("median") && ms("median") <= ms("p95") && ms("p95") <= ms("p99"), "{last}");
    // Every layer is read for every token; the example has no padding.
    assert_eq!(last["bytes_read_per_token"].as_f64(), Some((8 * 1024 * 256 * 2 * 2) as f64));
    let peak = last["peak_memory_bytes"].as_u64().unwrap();
    assert!((4 << 20..1 << 30).contains(&peak), "{last}");
    assert!(last["peak_memory_program_bytes"].as_u64().unwrap() < peak, "{last}");
}

#[test]
fn stop_strings_end_a_text_before_they_appear() {
    let out =
        run_example(&["--prompt", "Once upon a time", "-n", "60", "--stop", "girl", "--stop", "nowhere"]).succeeded();
    assert_eq!(out, ", there was a little \n");
}

#[test]
fn the_end_of_a_text_is_kept_unless_asked_otherwise() {
    let args = |more: &[&'static str]| [&["--prompt", "Once upon a time", "-n", "400", "--json"], more].concat();
    let tokens = |out: String| json(out.lines().last().unwrap())["tokens"].as_u64().unwrap();
    let ended = run_example(&args(&[])).succeeded();
    assert!(ended.contains("\"finish\":\"eos\""), "{ended}");
    assert!(tokens(ended) < 400);
    assert_eq!(tokens(run_example(&args(&["--ignore-eos"])).succeeded()), 400);
}

#[test]
fn nothing_to_do_is_done() {
    assert_eq!(run_example(&["--ids", "2", "-n", "0"]).succeeded().trim(), "");
    let out = run_example(&["--ids", "2", "-n", "0", "--json"]).succeeded();
    let only = json(&out);
    assert_eq!((&only["tokens"], &only["prompt_tokens"]), (&0.into(), &1.into()));
    // OPT has a token that begins every text, so an empty prompt can be continued.
    let out = run_example(&["--prompt", "", "-n", "4"]).succeeded();
    assert!(out.len() > 4, "{out:?}");
}

#[test]
fn an_empty_prompt_of_a_model_without_a_first_token_is_refused() {
    let dir = scratch();
    let bundle = dir.path().join("tiny-falcon.flashlm");
    prep(&["convert", text(&fixtures().join("tiny-falcon")), "-o", text(&bundle)]).succeeded();
    flashlm(&["run", text(&bundle), "--prompt", "", "-n", "4"]).failed(1, &["prompt is empty"]);
    assert!(flashlm(&["run", text(&bundle), "--prompt", "One day", "-n", "4"]).succeeded().len() > 4);
}

#[test]
fn wrong_arguments_are_told_apart_from_failures() {
    for args in [
        &[][..],
        &["run"],
        &["frobnicate"],
        &["run", "x", "--ids", "2,x"],
        &["run", "x", "--ids", ""],
        &["run", "x", "--prompt", "a", "--ids", "2"],
        &["run", "x", "--prompt", "a", "-n", "-1"],
        &["run", "x", "--prompt", "a", "--temperature", "-1"],
        &["run", "x", "--prompt", "a", "--temperature", "nan"],
        &["run", "x", "--prompt", "a", "--top-p", "0"],
        &["run", "x", "--prompt", "a", "--memory", "many"],
        &["run", "x", "--prompt", "a", "--ffn", "cloud"],
        &["run", "x", "--prompt", "a", "--threads", "0"],
        &["run", "x", "--prompt", "a", "--engine", "steam"],
        &["run", "x", "--prompt", "a", "--direct", "perhaps"],
        &["logits", "x", "--ids", "2"],
    ] {
        flashlm(args).failed(2, &["--help"]);
    }
    prep(&["convert", "x"]).failed(2, &["--output"]);
    prep(&["convert", "x", "-o", "y", "--alignment", "much"]).failed(2, &["--alignment"]);
}

#[test]
fn wrong_paths_are_explained_once() {
    let dir = scratch();
    let out = dir.path().join("out.flashlm");
    let missing = dir.path().join("nowhere");
    let not_bundle = fixtures().join("make_goldens.py");
    let cases = [
        flashlm(&["run", text(&missing), "--prompt", "a"]).failed(1, &["nowhere", "No such file"]),
        flashlm(&["run", text(&tiny_opt()), "--prompt", "a"]).failed(1, &["directory", "flashlm-prep convert"]),
        flashlm(&["run", text(&not_bundle), "--prompt", "a"]).failed(1, &["not a flashlm bundle"]),
        run_example(&["--prompt-file", text(&missing)]).failed(1, &["nowhere", "No such file"]),
        run_example(&["--prompt-file", text(&program("flashlm"))]).failed(1, &["not UTF-8"]),
        run_example(&[]).failed(1, &["--prompt", "--ids"]),
        prep(&["convert", text(&missing), "-o", text(&out)]).failed(1, &["no directory", "nowhere"]),
        prep(&["convert", text(&not_bundle), "-o", text(&out)]).failed(1, &["no directory", "config.json"]),
        prep(&["convert", text(dir.path()), "-o", text(&out)]).failed(1, &["config.json"]),
        prep(&["convert", text(&tiny_opt()), "-o", text(&missing.join("out"))]).failed(1, &["No such file"]),
        prep(&["convert", text(&tiny_opt()), "-o", text(dir.path())]).failed(1, &["directory"]),
        prep(&["convert", text(&tiny_opt()), "-o", text(dir.path()), "--force"]).failed(1, &["directory"]),
        prep(&["convert", text(&fixtures().join("quirks/opt-125m")), "-o", text(&out)]).failed(1, &["tokenizer.json"]),
        prep(&["inspect", text(&missing)]).failed(1, &["No such file"]),
        prep(&["inspect", text(&not_bundle)]).failed(1, &["not a flashlm bundle"]),
        prep(&["verify", text(&missing)]).failed(1, &["No such file"]),
        prep(&["verify", text(dir.path())]).failed(1, &["directory"]),
        flashlm(&["logits", bundle(), "--ids", "2", "-o", text(dir.path())]).failed(1, &["cannot write"]),
        flashlm(&["logits", bundle(), "--ids", "2", "-o", text(&missing.join("x"))]).failed(1, &["No such file"]),
    ];
    for message in cases {
        assert!(message.matches("os error").count() <= 1, "said twice: {message}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something was left behind");
}

#[test]
fn ids_and_lengths_out_of_range_are_refused_before_anything_is_written() {
    for (args, words) in [
        (&["--ids", "2,4096"][..], &["4096", "vocabulary"][..]),
        (&["--ids", "4294967295"], &["4294967295"]),
        (&["--ids", "2", "-n", "512"], &["512"]),
        (&["--ids", "2", "-n", "18446744073709551615"], &["512"]),
        (&["--ids", "2", "-n", "5", "--context", "3"], &["--context"]),
        (&["--ids", "2,3,4,5", "-n", "1", "--context", "3"], &["--context"]),
        (&["--ids", "2", "-n", "5", "--context", "0"], &["--context"]),
        (&["--ids", "2", "-n", "5", "--context", "513"], &["512"]),
    ] {
        let said = run_example(args);
        assert_eq!(said.stdout, "", "{args:?}");
        said.failed(1, words);
    }
    flashlm(&["logits", bundle(), "--ids", "2,9999", "-o", "never-written"]).failed(1, &["9999"]);
    // The last token is not fed: this fits exactly.
    run_example(&["--ids", "2", "-n", "5", "--context", "5"]).succeeded();
}

#[test]
fn logits_are_written_for_every_position() {
    let golden = Golden::read(&fixtures().join("golden/tiny-opt.safetensors"));
    let ids: Vec<String> = golden.ids("prompt1").iter().map(u32::to_string).collect();
    let dir = scratch();
    let out = dir.path().join("out.safetensors");
    for ffn in ["resident", "streamed"] {
        let args = ["logits", bundle(), "--ids", &ids.join(","), "-o", text(&out), "--kv", "f32", "--ffn", ffn];
        flashlm(&args).succeeded();
        let bytes = fs::read(&out).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.names(), ["logits"]);
        assert_eq!(file.tensor("logits").unwrap().shape(), [7, 4096]);
        let (found, expected) = (Golden::read(&out).f32("logits"), golden.f32("logits1"));
        assert!(flashlm_tests::largest_difference(&found, &expected) < 1e-4);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something was left behind");
}

#[test]
fn a_bundle_is_not_replaced_unless_asked() {
    let dir = scratch();
    let out = dir.path().join("model.flashlm");
    let other = fixtures().join("bundle-v2.flashlm");
    fs::copy(&other, &out).unwrap();
    let model = tiny_opt();
    let convert = ["convert", text(&model), "-o", text(&out)];
    prep(&convert).failed(1, &["exists already", "--force"]);
    assert_eq!(fs::read(&out).unwrap(), fs::read(&other).unwrap());
    prep(&[&convert[..], &["--force"]].concat()).succeeded();
    assert_eq!(fs::read(&out).unwrap(), fs::read(bundle()).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something was left behind");
}

#[test]
fn inspect_says_the_same_of_checkpoint_and_bundle() {
    let of = |path: &str| json(&prep(&["inspect", path, "--json"]).succeeded());
    let (checkpoint, packed) = (of(text(&tiny_opt())), of(bundle()));
    for key in [
        "model",
        "model_bytes",
        "resident_bytes",
        "flash_bytes",
        "ffn_dtype",
        "record_bytes",
        "records_per_group",
        "group_bytes",
        "alignment",
        "padding_share",
    ] {
        assert!(!packed[key].is_null(), "no {key}");
        assert_eq!(checkpoint[key], packed[key], "{key}");
    }
    assert_eq!(packed["flash_bytes"], 8 * 1024 * 1024);
    assert_eq!(packed["model"]["family"], "opt");
    assert_eq!(packed["file_bytes"], fs::metadata(bundle()).unwrap().len());
    assert_eq!(packed["provenance"]["files"].as_array().unwrap().last().unwrap()["name"], "model.safetensors");
    assert!(prep(&["inspect", bundle()]).succeeded().contains("feed-forward neurons"));
}

/// A copy of the example's bundle with one byte changed at `offset`.
fn damaged(offset: u64) -> (TempDir, PathBuf) {
    let dir = scratch();
    let path = dir.path().join("damaged.flashlm");
    let mut bytes = fs::read(bundle()).unwrap();
    bytes[offset as usize] ^= 1;
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn damage_is_found_and_named() {
    assert!(prep(&["verify", bundle()]).succeeded().contains("no damage"));
    let whole = Bundle::open(bundle()).unwrap();

    let (_dir, in_group) = damaged(whole.group(3, 17).offset + 100);
    let said = prep(&["verify", text(&in_group)]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stdout.contains("layer 3") && said.stdout.contains("17"), "{said:?}");
    let said = prep(&["verify", text(&in_group), "--json"]);
    assert_eq!(said.code, Some(1));
    assert_eq!(json(&said.stdout)["damages"].as_array().unwrap().len(), 1);
    flashlm(&["run", text(&in_group), "--ids", "2", "-n", "2", "--ffn", "resident"])
        .failed(1, &["damaged", "group 17 of layer 3"]);

    let (_dir, in_resident) = damaged(whole.resident().extent.end() - 50);
    let said = prep(&["verify", text(&in_resident)]);
    assert!(said.code == Some(1) && said.stdout.contains("resident"), "{said:?}");
    flashlm(&["run", text(&in_resident), "--ids", "2", "-n", "2"]).failed(1, &["damaged", "resident"]);

    let (_dir, in_header) = damaged(20);
    prep(&["verify", text(&in_header)]).failed(1, &["damaged"]);
}

#[test]
fn a_bundle_cut_short_says_so() {
    let bytes = fs::read(bundle()).unwrap();
    let dir = scratch();
    let cut = dir.path().join("cut.flashlm");
    for length in [0, 4, 100, 4096, 100_000, bytes.len() - 1] {
        fs::write(&cut, &bytes[..length]).unwrap();
        for said in [
            flashlm(&["run", text(&cut), "--ids", "2", "-n", "1"]),
            prep(&["verify", text(&cut)]),
            prep(&["inspect", text(&cut)]),
        ] {
            let message = said.failed(1, &["cut.flashlm"]);
            assert!(message.contains("cut short") || message.contains("not a flashlm bundle"), "{length}: {message}");
        }
    }
}

/// The smallest budget that the message names.
fn smallest_budget(args: &[&str]) -> String {
    let message = run_example(&[args, &["--memory", "1MB"]].concat()).failed(1, &["too small", "smallest that works"]);
    let amount = message.split("--memory ").nth(1).unwrap();
    amount.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn too_little_memory_names_the_budget_that_works() {
    for ffn in ["resident", "streamed", "flash", "hybrid"] {
        let args = ["--prompt", "Once upon a time", "-n", "8", "--ffn", ffn];
        let smallest: u64 = smallest_budget(&args).parse().unwrap();
        let with = |bytes: u64| run_example(&[&args[..], &["--memory", &bytes.to_string()]].concat());
        with(smallest - 1).failed(1, &["too small"]);
        with(smallest).succeeded();
    }
    // Without a choice of its own, the program takes what fits.
    let [resident, streamed] = ["resident", "streamed"]
        .map(|ffn| smallest_budget(&["--ids", "2", "-n", "8", "--ffn", ffn]).parse::<u64>().unwrap());
    assert!(streamed < resident);
    let amount = ((streamed + resident) / 2).to_string();
    let out = run_example(&["--ids", "2", "-n", "8", "--json", "--memory", &amount]).succeeded();
    assert_ne!(json(out.lines().last().unwrap())["bytes_read_per_token"], 0);
}

/// A memory cgroup (version 1), removed when dropped.
struct MemoryCgroup(PathBuf);

impl MemoryCgroup {
    fn new(limit: u64) -> Result<Self, String> {
        let dir = PathBuf::from(format!("/sys/fs/cgroup/memory/flashlm-test-{}", std::process::id()));
        fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let cgroup = Self(dir);
        let limit_file = cgroup.0.join("memory.limit_in_bytes");
        fs::write(&limit_file, limit.to_string()).map_err(|e| format!("{}: {e}", limit_file.display()))?;
        Ok(cgroup)
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn the_budget_is_kept_inside_a_memory_cgroup() {
    // Flash comes last: its smallest budget is that of the cgroup below.
    let mut cgroup = None;
    let script = |cgroup: &MemoryCgroup| format!("echo $$ > {}/cgroup.procs && exec \"$@\"", cgroup.0.display());
    for ffn in ["streamed", "flash"] {
        let args = ["--prompt", "Once upon a time", "-n", "40", "--ignore-eos", "--json", "--ffn", ffn];
        let smallest = smallest_budget(&args);
        drop(cgroup.take());
        match MemoryCgroup::new(smallest.parse().unwrap()) {
            Ok(made) => cgroup = Some(made),
            Err(reason) => return eprintln!("skipped, no memory cgroup can be made: {reason}"),
        }
        let mut command = Command::new("sh");
        command.args(["-c", &script(cgroup.as_ref().unwrap()), "sh"]);
        command.arg(program("flashlm")).args(["run", bundle()]).args(args);
        let out = Said::from(command.args(["--memory", &smallest]).output().unwrap()).succeeded();
        let last = json(out.lines().last().unwrap());
        assert_eq!(last["tokens"], 40);
        assert!(last["cgroup_peak_bytes"].as_u64().unwrap() <= smallest.parse().unwrap(), "{last} in {smallest}");
    }
    let cgroup = cgroup.expect("there were two");
    let script = script(&cgroup);
    // Without --memory the limit of the cgroup is what there is; the resident model is larger than this one.
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh"]).arg(program("flashlm")).args(["run", bundle(), "--ids", "2", "-n", "40"]);
    Said::from(command.args(["--ffn", "resident"]).output().unwrap()).failed(1, &["too small"]);
}

#[test]
fn plans_and_machines_are_told() {
    let out = flashlm(&["plan", bundle(), "--memory", "100MB", "--ffn", "flash", "--json"]).succeeded();
    let plan = json(&out);
    assert_eq!(plan["ffn"], "flash");
    assert_eq!(
        plan["items"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum::<u64>(),
        plan["total_bytes"]
    );
    assert!(plan["total_bytes"].as_u64().unwrap() <= 100_000_000);
    assert_eq!(plan["cached_groups"], plan["groups"], "all of a small model fits");
    let smallest = plan["smallest_budget_bytes"].to_string();
    let at = |budget: &str| flashlm(&["plan", bundle(), "--memory", budget, "--ffn", "flash"]);
    assert!(at(&smallest).succeeded().contains("neuron tables"));
    at("1MB").failed(1, &["too small", &smallest]);

    let doctor = json(&flashlm(&["doctor", bundle(), "--json"]).succeeded());
    assert!(doctor["processors"].as_u64().unwrap() > 0 && doctor["reader"].is_string(), "{doctor}");
    assert!(doctor["advice"].to_string().contains("no predictors"), "{doctor}");
    assert!(flashlm(&["doctor"]).succeeded().contains("instruction set"));
}

#[test]
fn the_ladder_has_every_step_and_all_steps_read_what_they_say() {
    let args = ["bench", bundle(), "--memory", "70MB", "--tokens", "12", "--prompt-tokens", "20", "--repeats", "1"];
    let report = json(&flashlm(&[&args[..], &["--ladder", "--json"]].concat()).succeeded());
    let steps = report["steps"].as_array().unwrap();
    let names: Vec<_> = steps.iter().map(|step| step["name"].as_str().unwrap()).collect();
    let all = ["naive", "hybrid", "predictor", "windowing", "bundling", "storage_order", "policy", "overlap"];
    assert_eq!(names, all);
    for step in steps.iter().filter(|step| step["not_applicable"].is_null()) {
        assert!(step["decode_ms_per_token"]["median"].as_f64().unwrap() > 0.0, "{step}");
        assert!(step["peak_memory_bytes"].as_f64().unwrap() <= 70e6, "{step}");
    }
    // The whole model for every token, and a little for alignment.
    let (read, model) = (steps[0]["bytes_read_per_token"].as_f64().unwrap(), report["model_bytes"].as_f64().unwrap());
    assert!(read > 0.99 * model && read < 1.1 * model, "{read} of {model}");
    flashlm(&[&args[..], &["--steps", "naive,speed"]].concat()).failed(1, &["no step `speed`", "overlap"]);
    flashlm(&["bench", bundle(), "--memory", "1MB"]).failed(1, &["too small", "smallest that works"]);
}

#[test]
fn bench_says_how_fast_a_run_is_and_what_bounds_it() {
    let args =
        |memory| ["bench", bundle(), "--memory", memory, "--tokens", "12", "--prompt-tokens", "20", "--repeats", "1"];
    let said = flashlm(&args("70MB")).succeeded();
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[1].starts_with("prompt") && lines[2].starts_with("generation"), "{said}");
    assert!(lines.iter().all(|line| line.len() <= 80 || line.contains("flashlm:")), "{said}");
    assert!(said.contains("tokens/s") && said.contains("of memory, by "), "{said}");
    let said = flashlm(&args("1GB")).succeeded();
    assert!(said.contains("by resident") && said.contains("more memory gives nothing"), "{said}");
    let report = json(&flashlm(&[&args("70MB")[..], &["--json"]].concat()).succeeded());
    assert_eq!(report["steps"][0]["name"], "run");
    assert_eq!(report["steps"].as_array().unwrap().len(), 1);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let run = ["run", bundle(), "--ids", "2", "-n", "50"];
    let commands: [(&str, &[&str]); 7] = [
        ("flashlm", &run),
        ("flashlm", &["run", bundle(), "--ids", "2", "-n", "50", "--json"]),
        ("flashlm", &["completions", "bash"]),
        ("flashlm-prep", &["completions", "zsh"]),
        ("flashlm-prep", &["inspect", bundle()]),
        ("flashlm-prep", &["inspect", bundle(), "--json"]),
        ("flashlm-prep", &["verify", bundle()]),
    ];
    for (name, args) in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(program(name));
        command.args(args).stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
        let said = Said::from(command.output().unwrap());
        assert!(said.code == Some(0) && !said.stderr.contains("panicked"), "{name} {args:?}: {said:?}");
    }
}

/// Waits until `is_so`, or fails.
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(60), "waited without result: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn an_interrupted_run_ends_with_its_figures() {
    // A nearly full pipe holds the run up in the middle of its text, so that the interruption cannot come too late.
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&vec![b'.'; 65_536 - 4096]).unwrap();
    let mut child = Command::new(program("flashlm"))
        .args(["run", bundle(), "--ids", "2", "-n", "500", "--ignore-eos", "--json"])
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let written = |pid: u32| {
        let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        io.lines().find_map(|l| l.strip_prefix("wchar: ")?.parse::<u64>().ok()).unwrap_or(0)
    };
    wait_until("tokens", || written(child.id()) > 1000);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    // The program may have to be given the processor first.
    std::thread::sleep(Duration::from_millis(200));
    let mut out = String::new();
    reader.read_to_string(&mut out).unwrap();
    let status = child.wait().unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(status.code(), Some(130), "{stderr}");
    let last = json(out.lines().last().unwrap());
    let tokens = last["tokens"].as_u64().unwrap();
    assert!((1..500).contains(&tokens), "{last}");
    assert_eq!(last["finish"], "stopped");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// A small file system of its own, unmounted when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(bytes: u64) -> Result<Self, String> {
        let dir = scratch();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(dir.path());
        let output = mount.output().map_err(|e| e.to_string())?;
        if output.status.success() { Ok(Self(dir)) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_leaves_no_bundle() {
    let disk = match SmallDisk::new(4 << 20) {
        Ok(disk) => disk,
        Err(reason) => return eprintln!("skipped, nothing can be mounted: {reason}"),
    };
    let out = disk.0.path().join("model.flashlm");
    prep(&["convert", text(&tiny_opt()), "-o", text(&out)]).failed(1, &["bytes free", "needs"]);
    assert!(!out.exists() && opening_files(disk.0.path()).is_empty());
    // 400 positions of 4096 logits do not fit either.
    let ids = vec!["2"; 400].join(",");
    let logits = disk.0.path().join("logits.safetensors");
    flashlm(&["logits", bundle(), "--ids", &ids, "-o", text(&logits)]).failed(1, &["cannot write", "No space left"]);
    assert_eq!(fs::read_dir(disk.0.path()).unwrap().count(), 0, "something was left behind");
}

/// A disk that fills up while the bundle is written: a limit on the length of files stands in for it.
#[test]
fn a_failed_write_leaves_no_bundle() {
    let dir = scratch();
    let out = dir.path().join("model.flashlm");
    // The limit is in blocks of 512 or 1024 bytes. Whether its signal is ignored from outside or not, it is an error of the write.
    for trap in ["trap '' XFSZ; ", ""] {
        let script = format!("{trap}ulimit -f 4000 && exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh"]).arg(program("flashlm-prep"));
        let said = Said::from(command.args(["convert", text(&tiny_opt()), "-o", text(&out)]).output().unwrap());
        said.failed(1, &["cannot write", "too large"]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something was left behind");
    }
    prep(&["convert", text(&tiny_opt()), "-o", text(&out)]).succeeded();
    assert_eq!(opening_files(dir.path()), [out]);
}

#[test]
fn completions_are_printed() {
    for name in ["flashlm", "flashlm-prep"] {
        for shell in ["bash", "zsh", "fish"] {
            assert!(run(name, &["completions", shell], "").succeeded().contains(name), "{name} {shell}");
        }
        assert!(run(name, &["--help"], "").succeeded().contains("Usage"));
        assert!(run(name, &["--version"], "").succeeded().contains(env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn manual_pages_cover_every_command_and_option() {
    let dir = scratch();
    for Other { name, commands } in [FLASHLM, FLASHLM_PREP] {
        run(name, &["man", text(dir.path())], "").succeeded();
        let page = |name: &str| fs::read_to_string(dir.path().join(format!("{name}.1"))).unwrap().replace("\\-", "-");
        for command in commands {
            assert!(page(name).contains(&format!("{name}-{command}(1)")), "{name} {command}");
            let page = page(&format!("{name}-{command}"));
            let help = run(name, &[command, "--help"], "").succeeded();
            let options = help.split_whitespace().filter(|word| word.starts_with("--"));
            let options = options.map(|word| word.trim_end_matches(|c: char| !c.is_ascii_lowercase()));
            for option in options.filter(|option| option.len() > 2) {
                assert!(page.contains(option), "{name} {command}: {option}");
            }
        }
    }
    let page = dir.path().join("flashlm-prep-pack.1");
    fs::write(&page, "mine").unwrap();
    run("flashlm-prep", &["man", text(dir.path())], "").failed(1, &["flashlm-prep-pack.1", "is not a manual page"]);
    assert_eq!(fs::read_to_string(&page).unwrap(), "mine");
}

#[test]
fn a_report_is_one_page_that_needs_nothing_else() {
    let dir = scratch();
    let page = dir.path().join("report.html");
    let recording = fixtures().join("recording-tiny-opt");
    prep(&["report", text(&recording), "-o", text(&page)]).succeeded();
    let html = fs::read_to_string(&page).unwrap();
    assert!(html.starts_with("<!DOCTYPE html>") && html.contains("<svg") && html.ends_with("</html>\n"));
    assert!(!html.contains("<script") && !html.contains("http"));
    let charts = dir.path().join("charts");
    for _ in 0..2 {
        prep(&["report", text(&recording), "-o", text(&page), "--data", text(&charts)]).succeeded();
    }
    let list = json(&fs::read_to_string(charts.join("report.json")).unwrap());
    for chart in list["charts"].as_array().unwrap() {
        for kind in ["svg", "csv"] {
            assert!(charts.join(chart[kind].as_str().unwrap()).is_file(), "{chart}");
        }
    }
    let foreign = ["report", text(&recording), "-o", text(&page), "--data", text(&recording)];
    prep(&foreign).failed(1, &["which this command reads"]);
    fs::write(charts.join("report.json"), "{}").unwrap();
    prep(&["report", text(&recording), "-o", text(&page), "--data", text(&charts)])
        .failed(1, &["is not a directory of a report's charts", "`flashlm-prep report --data` did not write"]);
    let nowhere = dir.path().join("nowhere");
    let said = prep(&["report", text(&nowhere), "-o", text(&page)]);
    said.failed(1, &["a recording is a directory made by `flashlm-prep record`"]);
}
