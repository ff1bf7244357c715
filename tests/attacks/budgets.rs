//! Attacks 40 to 43: budgets kept inside a memory cgroup of exactly that size, and lengths at their limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use flashlm_formats::bundle::{Bundle, LayoutOptions};
use flashlm_tests::{Said, bundle_with_predictors, program, run, scratch, tiny_opt};
use serde_json::Value;

use crate::mini::Mini;
use crate::skip;

/// A memory cgroup (version 1; page cache counts), removed when dropped.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    pub(crate) fn new(limit: u64) -> Result<Self, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("flashlm-attack-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new("/sys/fs/cgroup/memory").join(name);
        fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let cgroup = Self(dir);
        let limit_file = cgroup.0.join("memory.limit_in_bytes");
        fs::write(&limit_file, limit.to_string()).map_err(|e| format!("{}: {e}", limit_file.display()))?;
        Ok(cgroup)
    }

    pub(crate) fn command(&self, program: &Path) -> Command {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.0.display());
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh"]).arg(program).stdin(Stdio::null());
        command
    }

    fn number(&self, file: &str) -> u64 {
        fs::read_to_string(self.0.join(file)).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        _ = fs::remove_dir(&self.0);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `bundle` at budgets from the smallest to all of the model, each in a cgroup of that size. False where there are none.
fn keep_budgets(bundle: &Path, steps: usize, prompt: usize, tokens: usize) -> bool {
    let vocab = Bundle::open(bundle).unwrap().spec().vocab_size;
    let model_bytes = Bundle::open(bundle).unwrap().manifest().model_bytes;
    let ids: Vec<String> = (0..prompt).map(|i| (3 + i * 7919 % (vocab - 3)).to_string()).collect();
    let (ids, tokens) = (ids.join(","), tokens.to_string());
    let args = ["run", text(bundle), "--ids", &ids, "-n", &tokens, "--ignore-eos", "--json", "--ffn", "flash"];
    let refused = run("flashlm", &[&args[..], &["--memory", "1MB"]].concat(), "").failed(1, &["smallest that works"]);
    let smallest = refused.split("--memory ").nth(1).unwrap().split_whitespace().next().unwrap();
    let smallest: u64 = smallest.parse().unwrap();
    let largest = model_bytes.max(smallest + (smallest / 2));
    let mut expected = None;
    for step in 0..steps {
        let budget = (smallest + (largest - smallest) * step as u64 / (steps as u64 - 1)).next_multiple_of(4096);
        let cgroup = match Cgroup::new(budget) {
            Ok(cgroup) => cgroup,
            Err(why) => {
                skip(&why);
                return false;
            }
        };
        let output = cgroup.command(&program("flashlm")).args(args).args(["--memory", &budget.to_string()]).output();
        let out = Said::from(output.unwrap()).succeeded();
        let mut lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let last = lines.pop().unwrap();
        let (peak, failures) = (cgroup.number("memory.max_usage_in_bytes"), cgroup.number("memory.failcnt"));
        eprintln!(
            "budget {budget} ({:.0} %): peak {peak}, {failures} times at the limit, prefill {:.0} ms, {:.2} ms a token",
            100.0 * budget as f64 / model_bytes as f64,
            last["prefill_ms"].as_f64().unwrap(),
            last["decode_ms_per_token"]["median"].as_f64().unwrap()
        );
        assert!(peak <= budget && failures == 0, "peak {peak} of {budget}, {failures} times at the limit");
        assert!(last["cgroup_peak_bytes"].as_u64().is_some_and(|said| said <= peak), "{last}");
        let found: Vec<Value> = lines.iter().map(|line| line["id"].clone()).collect();
        assert_eq!(found.len().to_string(), tokens);
        assert_eq!(*expected.get_or_insert_with(|| found.clone()), found, "another text at {budget}");
    }
    // One byte less than the smallest is refused, with the number.
    let less = (smallest - 1).to_string();
    run("flashlm", &[&args[..], &["--memory", &less]].concat(), "").failed(1, &["too small", &smallest.to_string()]);
    true
}

#[test]
fn a40_budgets_are_kept_in_a_cgroup() {
    let dir = scratch();
    let path = dir.path().join("m.flashlm");
    bundle_with_predictors(&tiny_opt(), &path, LayoutOptions::default(), true);
    keep_budgets(&path, 3, 300, 40);
}

/// `FLASHLM_BUDGET_BUNDLES=a.flashlm,b.flashlm`: twenty budgets over these, a prompt of 1 000 tokens, 200 more.
#[test]
#[ignore = "needs large bundles and a quiet machine"]
fn a41_twenty_budgets_of_large_bundles() {
    let bundles = std::env::var("FLASHLM_BUDGET_BUNDLES").expect("FLASHLM_BUDGET_BUNDLES names bundles");
    let bundles: Vec<&str> = bundles.split(',').collect();
    for bundle in &bundles {
        eprintln!("{bundle}");
        assert!(keep_budgets(Path::new(bundle), 20_usize.div_ceil(bundles.len()), 1000, 200));
    }
}

#[test]
fn a42_lengths_at_their_limits() {
    let bundle = Mini::get().bundle();
    let max = Bundle::open(&bundle).unwrap().spec().max_positions;
    let flashlm = |args: &[&str]| run("flashlm", &[&["run", text(&bundle)], args].concat(), "");
    let ids = |count: usize| vec!["5"; count].join(",");
    // Exactly as much as the model allows, and one more.
    flashlm(&["--ids", &ids(max - 1), "-n", "1"]).succeeded();
    flashlm(&["--ids", &ids(max), "-n", "0"]).succeeded();
    flashlm(&["--ids", &ids(max), "-n", "2"]).failed(1, &["context", &max.to_string()]);
    flashlm(&["--ids", &ids(max + 1), "-n", "0"]).failed(1, &["context", &max.to_string()]);
    flashlm(&["--ids", &ids(20), "-n", "5", "--context", "10"]).failed(1, &["--context 10"]);
    // Nothing asked for is nothing written.
    assert_eq!(flashlm(&["--ids", "5", "-n", "0"]).succeeded().trim(), "");
    // An empty prompt resumes from the token that begins a text, where the model has one.
    assert!(!flashlm(&["--prompt", "", "-n", "3", "--ignore-eos"]).succeeded().trim().is_empty());
    flashlm(&["--ids", "", "-n", "3"]).failed(2, &["--help"]);
}

/// Text that is no Unicode: halves of surrogate pairs written as UTF-8, and bytes that are no text at all.
#[test]
fn a43_prompts_that_are_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let bundle = Mini::get().bundle();
    let dir = scratch();
    let file = dir.path().join("prompt");
    for bytes in [&b"w5 \xed\xa0\x80 w6"[..], b"w5 \xed\xb0\x80", b"\xff\xfe", b"w5 \xf4\x90\x80\x80", b"\xc0\xaf"] {
        fs::write(&file, bytes).unwrap();
        run("flashlm", &["run", text(&bundle), "--prompt-file", text(&file), "-n", "2"], "").failed(1, &["UTF-8"]);
        let mut command = Command::new(program("flashlm"));
        command.arg("run").arg(&bundle).arg("--prompt").arg(std::ffi::OsStr::from_bytes(bytes)).stdin(Stdio::null());
        Said::from(command.output().unwrap()).failed(2, &["UTF-8"]);
    }
    // Every character that there is, and a zero byte, is text.
    fs::write(&file, "w5 \u{0} \u{fffe} \u{10ffff} e\u{301} \u{202e}").unwrap();
    run("flashlm", &["run", text(&bundle), "--prompt-file", text(&file), "-n", "2"], "").succeeded();
}
