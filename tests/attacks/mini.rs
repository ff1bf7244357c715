//! A model of two layers and 150 kB, and everything that is made of it by the programs themselves.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use flashlm_formats::bundle::{Bundle, replace_predictors};
use flashlm_tests::hub_server::{Hub, MODEL};
use flashlm_tests::{fixtures, program, scratch};
use tempfile::TempDir;

/// Files of one preparation: checkpoint, text, recording, predictors, orders, bundle.
pub(crate) struct Mini(TempDir);

impl Mini {
    /// Made once.
    pub(crate) fn get() -> &'static Self {
        static MINI: OnceLock<Mini> = OnceLock::new();
        MINI.get_or_init(|| {
            let mini = Self(scratch());
            mini.make();
            mini
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.path("mini.flashlm")
    }

    fn make(&self) {
        write_checkpoint(&self.path("checkpoint"));
        write_text(&self.path("text.txt"));
        write_foreign_predictors(&self.path("foreign"));
        for stage in Stage::ALL {
            let output = stage.run(self, &self.path(stage.output()));
            assert!(output.status.success(), "{stage:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        // Replaced twice by what it has, it also has unused space.
        let manifest = Bundle::open(self.bundle()).unwrap().manifest().clone();
        let blob = Bundle::open(self.bundle()).unwrap().read_predictors().unwrap().unwrap();
        replace_predictors(&self.bundle(), Some(&blob), &manifest).unwrap();
    }
}

/// The fixture with a tokenizer of words.
pub(crate) fn write_checkpoint(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures().join("quirks/opt-125m").join(name), dir.join(name)).unwrap();
    }
    let vocab: serde_json::Map<_, _> = (0..192).map(|id| (format!("w{id}"), id.into())).collect();
    // A text begins with w2, as OPT's begin with </s>.
    let (begin, text) = (
        serde_json::json!({"SpecialToken": {"id": "w2", "type_id": 0}}),
        |id, kind| serde_json::json!({"Sequence": {"id": id, "type_id": kind}}),
    );
    let template = serde_json::json!({
        "type": "TemplateProcessing", "single": [begin, text("A", 0)], "pair": [begin, text("A", 0), text("B", 1)],
        "special_tokens": { "w2": { "id": "w2", "ids": [2], "tokens": ["w2"] } },
    });
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": template, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w3" },
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// Predictors as somebody else may have trained them, of random numbers.
fn write_foreign_predictors(dir: &Path) {
    let mut dice = crate::Dice(6);
    fs::create_dir(dir).unwrap();
    for layer in 0..2 {
        let mut matrix = |rows: usize, columns: usize| -> Vec<u8> {
            (0..rows * columns).flat_map(|_| (dice.below(1000) as f32 / 500.0 - 1.0).to_le_bytes()).collect()
        };
        let matrices = [("0.weight", [4, 48], matrix(4, 48)), ("1.weight", [192, 4], matrix(192, 4))];
        let views = matrices.iter().map(|(name, shape, bytes)| {
            (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap())
        });
        fs::write(dir.join(format!("c4_layer{layer}_-0.9.safetensors")), safetensors::serialize(views, None).unwrap())
            .unwrap();
    }
}

fn write_text(path: &Path) {
    let mut dice = crate::Dice(5);
    let mut text = String::new();
    for _ in 0..48 {
        (0..30).for_each(|_| text += &format!("w{} ", 4 + dice.below(180).min(dice.below(180))));
        text += "\n<|endoftext|>\n";
    }
    fs::write(path, text).unwrap();
}

/// A command that writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Stage {
    Convert,
    Record,
    Train,
    Order,
    Pack,
    Prepare,
    Thresholds,
    Import,
    Report,
    Logits,
}

impl Stage {
    pub(crate) const ALL: [Self; 10] = [
        Self::Convert,
        Self::Record,
        Self::Train,
        Self::Order,
        Self::Pack,
        Self::Prepare,
        Self::Thresholds,
        Self::Import,
        Self::Report,
        Self::Logits,
    ];

    pub(crate) fn output(self) -> &'static str {
        match self {
            Self::Convert => "converted.flashlm",
            Self::Record => "recording",
            Self::Train => "predictors",
            Self::Order => "orders",
            Self::Pack => "mini.flashlm",
            Self::Prepare => "prepared.flashlm",
            Self::Thresholds => "thresholds.json",
            Self::Import => "imported",
            Self::Report => "report.html",
            Self::Logits => "logits.safetensors",
        }
    }

    /// Whether the output is one file, and no directory.
    pub(crate) fn is_file(self) -> bool {
        self.output().contains('.')
    }

    /// The command, from the mini model's files to `output`. Given again, it goes on.
    pub(crate) fn command(self, mini: &Mini, output: &Path) -> Command {
        let path = |name: &str| mini.path(name).into_os_string();
        let mut command = Command::new(program(if self == Self::Logits { "flashlm" } else { "flashlm-prep" }));
        match self {
            Self::Convert => command.arg("convert").arg(path("checkpoint")).arg("--force"),
            Self::Record => {
                command.arg("record").arg(path("checkpoint")).arg("--text").arg(path("text.txt"));
                command.args(["--tokens", "1400", "--sequence-tokens", "40"])
            }
            Self::Train => command.arg("train").arg(path("recording")).args(["--rank", "6", "--epochs", "2"]),
            Self::Order => command.arg("order").arg(path("recording")),
            Self::Pack => {
                command.arg("pack").arg(path("checkpoint")).arg("--force").arg("--predictors").arg(path("predictors"));
                command.arg("--orders").arg(path("orders"))
            }
            Self::Prepare => {
                command.arg("prepare").arg(path("checkpoint")).arg("--text").arg(path("text.txt"));
                // Of a model of random weights most neurons are admitted.
                command.args(["--tokens", "1400", "--sequence-tokens", "40", "--size-budget", "15%", "--anyway"])
            }
            Self::Thresholds => {
                command.arg("thresholds").arg(path("checkpoint")).arg("--text").arg(path("text.txt"));
                command.args(["--tokens", "400", "--sequence-tokens", "40"])
            }
            Self::Import => {
                command.arg("import-predictors").arg(path("foreign")).arg("--recording").arg(path("recording"))
            }
            Self::Report => {
                command.arg("report").arg(path("recording")).arg("--predictors").arg(path("predictors"));
                command.arg("--orders").arg(path("orders"))
            }
            Self::Logits => command.arg("logits").arg(path("mini.flashlm")).args(["--ids", "5,6,7,8,9,10"]),
        };
        command.arg("-o").arg(output).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(self, mini: &Mini, output: &Path) -> Output {
        self.command(mini, output).output().expect("the program starts")
    }
}

/// A hub that has the mini model's checkpoint.
pub(crate) fn hub() -> Hub {
    let files = contents(&Mini::get().path("checkpoint"));
    Hub::start(files.into_iter().map(|(name, bytes)| (name.to_str().unwrap().to_owned(), bytes)))
}

/// `flashlm-prep convert` of what the hub has, with its cache in `home`.
pub(crate) fn convert_from_hub(hub: &Hub, home: &Path, output: &Path) -> Command {
    let mut command = Command::new(program("flashlm-prep"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().to_uppercase();
        if name.starts_with("HF_")
            || name.starts_with("HUGGING")
            || name.ends_with("_PROXY")
            || name.starts_with("XDG_")
        {
            command.env_remove(&*name).env_remove(name.to_lowercase());
        }
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", &hub.endpoint);
    command.args(["convert", MODEL, "--force", "-o"]).arg(output).stdin(Stdio::null());
    command
}

/// All files under `dir` but temporary ones, by their path in it, with their contents.
pub(crate) fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let mut temporary = path.extension().is_some_and(|e| e == "partial" || e == "incomplete");
            // How long training took: the one file that depends on the machine.
            temporary |= path.file_name().is_some_and(|name| name == "timings.json");
            if path.is_dir() {
                dirs.push(path);
            } else if !temporary {
                files.push((path.strip_prefix(dir).unwrap().to_path_buf(), fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}
