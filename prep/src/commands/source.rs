//! Where a checkpoint comes from: a directory, or the hub.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use flashlm::budget::human_bytes;
use flashlm_formats::bundle::{Bundle, BundleError};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_prep::hub::{HubError, ModelName, Settings, Watch, fetch};

use super::Stage;

/// For the help of every command that takes a checkpoint.
pub(crate) const CHECKPOINT_HELP: &str =
    "Directory with a Hugging Face checkpoint, or a model on the Hub: org/name[@revision]";

/// Opens the checkpoint that an argument names. A directory wins over a model of the same name.
pub(crate) fn open(source: &Path) -> Result<Checkpoint> {
    if source.is_file()
        && let Some(advice) = of_file(source)
    {
        bail!("{} is {advice}", source.display());
    }
    let name = source.to_str().and_then(ModelName::parse);
    match name {
        Some(name) if !source.exists() => Ok(Checkpoint::open(from_hub(&name)?)?),
        // A directory of this name may be there by chance.
        Some(name) if !source.join("config.json").exists() => Checkpoint::open(source).with_context(|| {
            let explicit = format!("{}@{}", name.repo, name.revision);
            format!(
                "{} is taken to be the directory of that name; for the model on the hub write {explicit}",
                source.display()
            )
        }),
        _ => Ok(Checkpoint::open(source)?),
    }
}

/// What a file is that stands where a checkpoint's directory is expected, and what can be done with it.
fn of_file(path: &Path) -> Option<String> {
    let begin = match Bundle::open(path) {
        Err(BundleError::NotABundle { found, .. }) => found,
        Err(BundleError::Io { .. } | BundleError::Directory { .. }) => return None,
        _ => {
            return Some(
                "a bundle, already made from a checkpoint: `flashlm run` runs it, `flashlm-prep inspect` and `flashlm-prep verify` look \
                 at it; this command takes a checkpoint's directory"
                    .into(),
            );
        }
    };
    if begin.starts_with(b"GGUF") {
        return Some(
            "a GGUF file, whose weights were converted for other programs: give the directory of the Hugging Face checkpoint that it \
             was made from, or its name on the hub (org/name)"
                .into(),
        );
    }
    let directory = path.parent().filter(|parent| parent.join("config.json").exists())?;
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    Some(format!("one file of a checkpoint: give the directory, {}", directory.display()))
}

/// The model of the hub that an argument names, where it is no path.
pub(crate) fn model_name(source: &Path) -> Option<ModelName> {
    if source.exists() { None } else { source.to_str().and_then(ModelName::parse) }
}

/// What to call a checkpoint: as the hub does, or as its directory.
pub(crate) fn name(source: &Path) -> String {
    if let Some(name) = model_name(source) {
        return name.to_string();
    }
    // `.` and `..` are no names.
    let directory = source.canonicalize().unwrap_or_else(|_| source.to_owned());
    directory.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

fn from_hub(name: &ModelName) -> Result<PathBuf> {
    let settings = Settings::from_environment()?;
    let mut shown = Shown::new(name.to_string());
    let result = fetch(name, &settings, &mut shown);
    drop(shown.stage.take());
    if let Err(HubError::NoModel { .. } | HubError::Unreachable { .. } | HubError::Offline { .. }) = &result {
        // It may have been meant as a path.
        return result.with_context(|| format!("there is no directory {name} here, and as a model of the hub"));
    }
    let dir = result?;
    if shown.total > shown.here {
        let fetched = shown.total - shown.here;
        let seconds = shown.begin.elapsed().as_secs_f64();
        let rate = human_bytes((fetched as f64 / seconds.max(1e-3)) as u64);
        eprintln!("fetched {} in {seconds:.0} s ({rate}/s) to {}", human_bytes(fetched), dir.display());
    }
    Ok(dir)
}

/// A bar on a terminal, and a line where it begins.
pub(crate) struct Shown {
    name: String,
    stage: Option<Stage>,
    begin: Instant,
    here: u64,
    total: u64,
}

impl Shown {
    /// For what is fetched.
    pub(crate) fn new(name: String) -> Self {
        Self { name, stage: None, begin: Instant::now(), here: 0, total: 0 }
    }
}

impl Watch for Shown {
    fn begin(&mut self, total: u64, here: u64) {
        let resumed =
            if here > 0 { format!(", of which {} are here already", human_bytes(here)) } else { String::new() };
        eprintln!("fetching {}: {}{resumed}", self.name, human_bytes(total));
        let stage = Stage::bytes(format!("fetching {}", self.name));
        stage.begin_at(here, total);
        (self.stage, self.begin, self.here, self.total) = (Some(stage), Instant::now(), here, total);
    }

    fn at(&mut self, bytes: u64) {
        if let Some(stage) = &self.stage {
            stage.set(bytes, self.total);
        }
    }

    fn say(&mut self, line: &str) {
        match &self.stage {
            Some(stage) => stage.say(&format!("note: {line}")),
            None => eprintln!("note: {line}"),
        }
    }
}
