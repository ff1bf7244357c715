//! What the integration tests in `tests/tests/` share: fixtures, bundles made of them, references, and the two programs.
//!
//! Everything panics on failure: this crate is for tests only.

pub mod hub_server;
pub mod imports;

use std::collections::HashMap;
use std::fs;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

use flashlm_formats::bundle::{Bundle, LayerPredictor, LayoutOptions, PredictorDType, PredictorInfo, PredictorKind};
use flashlm_formats::checkpoint::Checkpoint;

use flashlm::engine::Forward;
use flashlm::error::RuntimeError;
use flashlm::forward::kv::KvDtype;
use flashlm::generate::{Request, generate};
use flashlm::load::load;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::sampler::{Sampler, Sampling};
use flashlm_prep::pack::{PackOptions, pack};
use flashlm_prep::tokenizer::tokenizer_json;
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

/// The project's root directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the project")
}

/// `tests/fixtures`.
pub fn fixtures() -> PathBuf {
    root().join("tests/fixtures")
}

/// The trained example, an OPT.
pub fn tiny_opt() -> PathBuf {
    root().join("examples/tiny-opt")
}

/// The trained Falcon.
pub fn tiny_falcon() -> PathBuf {
    fixtures().join("tiny-falcon")
}

/// Directory of the profile being tested: `target/release`.
fn profile_dir() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    test.ancestors().nth(2).expect("tests lie in PROFILE/deps").to_owned()
}

/// A directory of the test's own, on the disk where the project is built.
pub fn scratch() -> TempDir {
    let parent = profile_dir().join("test-scratch");
    fs::create_dir_all(&parent).expect("the target directory is writable");
    TempDir::new_in(parent).expect("the target directory is writable")
}

/// A scratch directory with a copy of the files of `from`.
pub fn copied(from: &Path) -> TempDir {
    let dir = scratch();
    for entry in fs::read_dir(from).expect("the fixture is there") {
        let path = entry.expect("the fixture can be listed").path();
        fs::copy(&path, dir.path().join(path.file_name().expect("files have names"))).expect("files can be copied");
    }
    dir
}

fn tokenizer(checkpoint: &Checkpoint) -> Vec<u8> {
    if checkpoint.dir().join("tokenizer.json").exists() {
        tokenizer_json(checkpoint).expect("the tokenizer is good")
    } else {
        b"{}".to_vec()
    }
}

/// Packs a checkpoint as `convert` does; miniatures have no tokenizer, and get an empty one.
pub fn pack_checkpoint(dir: &Path, bundle: &Path) -> Bundle {
    let checkpoint = Checkpoint::open(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    pack(
        &checkpoint,
        bundle,
        PackOptions { tokenizer: tokenizer(&checkpoint), ..PackOptions::default() },
        &mut |_, _| {},
    )
    .unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    Bundle::open(bundle).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// A chat template for the trained example, of which `</s>` ends turns.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{% if message.role == 'system' %}({{ message.content }}) \
    {% else %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}assistant: {% endif %}";

/// A bundle of the trained example with made-up predictors and a chat template, at `path`.
pub fn chat_bundle(path: &Path) -> Bundle {
    let checkpoint = copied(&tiny_opt());
    fs::write(checkpoint.path().join("chat_template.jinja"), CHAT_TEMPLATE).expect("the scratch directory is writable");
    bundle_with_predictors(checkpoint.path(), path, LayoutOptions::default(), true)
}

/// Rank of made-up predictors.
const RANK: usize = 8;

/// Seeded numbers.
struct Random(u64);

impl Random {
    fn halves(&mut self, count: usize) -> Vec<u8> {
        let next = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            f16::from_f32((self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5).to_le_bytes()
        };
        std::iter::repeat_with(next).take(count).flatten().collect()
    }
}

/// Every second made-up predictor is of the other kind: a quantised projection.
fn is_projection(layer: usize) -> bool {
    layer % 2 == 1
}

/// A bundle whose predictors choose about a quarter of the neurons, by no good reason: reading must obey them all the same.
pub fn bundle_with_predictors(checkpoint: &Path, path: &Path, layout: LayoutOptions, look_ahead: bool) -> Bundle {
    let checkpoint = Checkpoint::open(checkpoint).expect("the fixture is good");
    let spec = checkpoint.spec();
    let (hidden, neurons) = (spec.hidden_size, spec.ffn().size);
    let mut random = Random(3);
    let mut tensors = Vec::new();
    for layer in 0..spec.layers.len() {
        let ahead = look_ahead && layer + 1 < spec.layers.len();
        for prefix in ["", "lookahead."].into_iter().take(1 + usize::from(ahead)) {
            let name = |tensor: &str| format!("layers.{layer}.{prefix}{tensor}");
            if is_projection(layer) && prefix.is_empty() {
                // Every fifth neuron has no row.
                let rows: Vec<u32> = (0..neurons as u32).filter(|n| n % 5 != 4).collect();
                let (row_bytes, groups) = (hidden.div_ceil(32) * 16, hidden.div_ceil(PredictorDType::INT4_GROUP));
                let mut halves = random.halves(rows.len() * row_bytes / 2);
                if !hidden.is_multiple_of(32) {
                    halves.chunks_exact_mut(row_bytes).for_each(|row| row[row_bytes - 16..].fill(0));
                }
                let scales = bf16::from_f32(0.004).to_le_bytes().repeat(rows.len() * groups);
                let bias = rows.iter().flat_map(|n| (-0.3f32 - (n % 7) as f32 * 0.1).to_le_bytes()).collect();
                tensors.push((name("decoder"), Dtype::U8, vec![rows.len(), row_bytes], halves));
                tensors.push((name("decoder_scale"), Dtype::BF16, vec![rows.len(), groups], scales));
                tensors.push((name("bias"), Dtype::F32, vec![rows.len()], bias));
                let numbers = rows.iter().flat_map(|n| n.to_le_bytes()).collect();
                tensors.push((name("rows"), Dtype::U32, vec![rows.len()], numbers));
                continue;
            }
            tensors.push((name("encoder"), Dtype::F16, vec![RANK, hidden], random.halves(RANK * hidden)));
            tensors.push((name("decoder"), Dtype::F16, vec![neurons, RANK], random.halves(neurons * RANK)));
            let bias = (0..neurons).flat_map(|n| (-0.3f32 - (n % 7) as f32 * 0.1).to_le_bytes()).collect();
            tensors.push((name("bias"), Dtype::F32, vec![neurons], bias));
        }
    }
    let views =
        tensors.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).expect("the fixture is good")));
    let blob = safetensors::serialize(views, None).expect("the fixture is good");
    let layers = (0..spec.layers.len()).map(|layer| LayerPredictor {
        rank: if is_projection(layer) { hidden } else { RANK },
        dtype: if is_projection(layer) { PredictorDType::Int4 } else { PredictorDType::F16 },
        rows: is_projection(layer).then(|| (0..neurons).filter(|n| n % 5 != 4).count()),
        look_ahead_rank: (look_ahead && layer + 1 < spec.layers.len()).then_some(RANK),
    });
    let info = PredictorInfo { kind: PredictorKind::LowRank, layers: layers.collect() };
    let tokenizer = tokenizer(&checkpoint);
    let options = PackOptions { tokenizer, layout, predictors: Some((info, blob)), ..PackOptions::default() };
    pack(&checkpoint, path, options, &mut |_, _| {}).expect("the fixture is good");
    Bundle::open(path).expect("the fixture is good")
}

/// The smallest budget that the model runs in, and one that holds everything.
pub fn budgets(bundle: &Bundle, options: &LoadOptions) -> (u64, u64) {
    let smallest = match plan(bundle, &LoadOptions { budget: Some(1), ..options.clone() }) {
        Err(RuntimeError::BudgetTooSmall { needed, .. }) => needed,
        other => panic!("{:?}", other.map(|planned| planned.plan)),
    };
    let largest =
        plan(bundle, &LoadOptions { budget: Some(u64::MAX), ..options.clone() }).expect("there is always a plan");
    assert_eq!(
        largest.arena.expect("there is always a plan").slots,
        vec![bundle.layout().groups() as u32; bundle.spec().layers.len()]
    );
    (smallest, largest.plan.total())
}

/// How references are compared: exact KV cache, two threads.
pub fn options(context: usize, ffn: FfnChoice) -> LoadOptions {
    LoadOptions {
        ffn: Some(ffn),
        kv: Some(KvDtype::F32),
        threads: NonZeroUsize::new(2).expect("two is not zero"),
        ..LoadOptions::new(context)
    }
}

/// The same, with every neuron computed, whatever predictors say.
pub fn exact(context: usize, ffn: FfnChoice) -> LoadOptions {
    LoadOptions { predict: false, ..options(context, ffn) }
}

/// A loaded model.
pub fn loaded(bundle: &Bundle, options: &LoadOptions) -> Forward {
    load(bundle, options, &mut |_, _| {}).unwrap_or_else(|e| panic!("{}: {e}", bundle.path().display())).forward
}

/// Logits of every position of `ids`, `[tokens, vocab]`; the model is emptied first.
pub fn logits(forward: &mut Forward, ids: &[u32]) -> Vec<f32> {
    forward.truncate(0);
    let mut all = Vec::new();
    let keep = &mut |_: usize, logits: &[f32]| {
        all.extend_from_slice(logits);
        Ok(())
    };
    forward.feed_all(ids, keep).expect("the ids are good");
    all
}

/// `tokens` ids that follow `prompt`, whatever ends a text; the model is emptied first.
pub fn continuation(forward: &mut Forward, prompt: &[u32], tokens: usize, sampling: Sampling) -> Vec<u32> {
    forward.truncate(0);
    let mut sampler = Sampler::new(sampling, forward.spec().vocab_size);
    let mut ids = Vec::new();
    generate(forward, &mut sampler, &Request { prompt, tokens, eos: &[], stop_ids: &[] }, &mut |token| {
        ids.push(token.id);
        ControlFlow::Continue(())
    })
    .expect("the prompt is good");
    ids
}

/// Tensors of a reference file.
pub struct Golden(HashMap<String, Vec<u8>>);

impl Golden {
    /// Reads a safetensors file.
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self(tensors.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect())
    }

    fn words<const N: usize>(&self, name: &str) -> impl Iterator<Item = [u8; N]> {
        let bytes = self.0.get(name).unwrap_or_else(|| panic!("the reference has no {name}"));
        assert!(bytes.len().is_multiple_of(N), "{name} is of another type");
        bytes.chunks_exact(N).map(|word| word.try_into().expect("words have their length"))
    }

    /// An f32 tensor.
    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.words(name).map(f32::from_le_bytes).collect()
    }

    /// The only element of an f64 tensor.
    pub fn f64(&self, name: &str) -> f64 {
        self.words(name).map(f64::from_le_bytes).next().expect("tensors are not empty")
    }

    /// An i64 tensor of token ids.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.words(name).map(|id| i64::from_le_bytes(id).try_into().expect("ids are small")).collect()
    }
}

/// The largest distance between two equally long slices, not a number if any element is not one.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |max, d| if d.is_nan() || d > max { d } else { max })
}

/// Path of an example, built as the tests were.
pub fn example(name: &str) -> PathBuf {
    program("examples").join(name)
}

/// Path of `flashlm` or `flashlm-prep`, built as the tests were.
pub fn program(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let dir = BUILT.get_or_init(|| {
        let dir = profile_dir();
        let profile = match dir.file_name().and_then(|n| n.to_str()) {
            Some("debug") | None => "dev",
            Some(name) => name,
        };
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into()));
        cargo.current_dir(root()).args(["build", "--bins", "--examples", "--locked", "--quiet", "--profile", profile]);
        // What cargo says of the test's own package: build scripts that look at it (ring's) would run again, and all that stands
        // on them be compiled again, each time that cargo is called from inside a test and from outside by turns.
        for (name, _) in std::env::vars_os() {
            let is_of_package =
                ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|of| name.to_string_lossy().starts_with(of));
            if is_of_package {
                cargo.env_remove(name);
            }
        }
        cargo.arg("--target-dir").arg(dir.parent().expect("profiles lie in the target directory"));
        assert!(cargo.status().expect("cargo starts").success(), "the programs do not build");
        dir
    });
    dir.join(name)
}

/// What a program said.
#[derive(Debug)]
pub struct Said {
    /// Exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("programs write UTF-8");
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Said {
    /// Asserts success, and gives standard output.
    #[track_caller]
    pub fn succeeded(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// Asserts an exit code and that standard error has every one of `words`; a panic is never an answer.
    #[track_caller]
    pub fn failed(self, code: i32, words: &[&str]) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {self:?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        self.stderr
    }
}

/// Runs a program to its end, with `stdin` as its standard input.
pub fn run(name: &str, args: &[&str], stdin: &str) -> Said {
    let mut command = assert_cmd::Command::new(program(name));
    command.args(args).write_stdin(stdin).timeout(Duration::from_secs(120));
    command.output().expect("the program starts").into()
}
