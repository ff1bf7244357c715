//! A model of two layers and 150 KB, and everything that is made of it by the programs themselves.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use flashlm_formats::bundle::{Bundle, replace_predictors};
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
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w3" },
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
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
}

impl Stage {
    pub(crate) const ALL: [Self; 6] =
        [Self::Convert, Self::Record, Self::Train, Self::Order, Self::Pack, Self::Prepare];

    pub(crate) fn output(self) -> &'static str {
        match self {
            Self::Convert => "converted.flashlm",
            Self::Record => "recording",
            Self::Train => "predictors",
            Self::Order => "orders",
            Self::Pack => "mini.flashlm",
            Self::Prepare => "prepared.flashlm",
        }
    }

    /// The command, from the mini model's files to `output`. Given again, it goes on.
    pub(crate) fn command(self, mini: &Mini, output: &Path) -> Command {
        let path = |name: &str| mini.path(name).into_os_string();
        let mut command = Command::new(program("flashlm-prep"));
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
                command.args(["--tokens", "1400", "--sequence-tokens", "40", "--size-budget", "15%"])
            }
        };
        command.arg("-o").arg(output).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(self, mini: &Mini, output: &Path) -> Output {
        self.command(mini, output).output().expect("the program starts")
    }
}

/// All files under `dir` but temporary ones, by their path in it, with their contents.
pub(crate) fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let mut temporary = path.extension().is_some_and(|e| e == "tmp" || e == "partial");
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
