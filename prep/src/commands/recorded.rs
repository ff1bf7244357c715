//! Recordings as commands open them.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flashlm_formats::recording::{Recording, Split};

/// Opens a recording, and says it where its recorder did not decide what is held out.
pub(crate) fn open(dir: &Path) -> Result<Recording> {
    let recording = Recording::open(dir).context(
        "a recording is a directory made by `flashlm-prep record`, or `recording` in the work directory of \
         `prepare --keep-recordings`",
    )?;
    if !recording.says_what_is_held_out() {
        let held_out = Split::tokens(&recording.split().held_out);
        eprintln!(
            "note: {} does not say what is held out (it was made by an earlier version, or by another recorder): {held_out} of {} tokens \
             are, by the rule of docs/recording-format.md",
            dir.display(),
            recording.tokens().len()
        );
    }
    Ok(recording)
}

/// Opens another recording of the same model, which `option` names.
pub(crate) fn open_other(option: &str, dir: &Path, recording: &Recording) -> Result<Recording> {
    let other = Recording::open(dir).with_context(|| option.to_owned())?;
    let shape = |recording: &Recording| {
        let model = &recording.info().model;
        (model.layers.len(), model.hidden_size, model.ffn().size)
    };
    let ((layers, hidden, neurons), found) = (shape(recording), shape(&other));
    ensure!(
        found == (layers, hidden, neurons),
        "{option}: {} is a recording of another model: {} layers of {} x {} neurons, where {} has {layers} of {hidden} x {neurons}",
        dir.display(),
        found.0,
        found.1,
        found.2,
        recording.dir().display()
    );
    Ok(other)
}

/// Reads `3`, `2..5` (2, 3, 4), `2..` and `..5`.
pub(crate) fn layer_range(text: Option<&str>, recording: &Recording) -> Result<Vec<usize>> {
    let layers = recording.info().model.layers.len();
    let chosen = match text {
        None => 0..layers,
        Some(text) => {
            let number = |part: &str, default| if part.is_empty() { Ok(default) } else { part.parse::<usize>() };
            let range = match text.split_once("..") {
                Some((from, to)) => number(from, 0).and_then(|f| Ok(f..number(to, layers)?)),
                None => text.parse::<usize>().map(|l| l..l + 1),
            };
            range.with_context(|| format!("--layers {text}: expected a layer, or a range such as 2..5"))?
        }
    };
    if chosen.is_empty() || chosen.end > layers {
        bail!("--layers {}..{}: the model has layers 0..{layers}", chosen.start, chosen.end);
    }
    let here: Vec<usize> = chosen.clone().filter(|&l| recording.has_layer(l)).collect();
    if text.is_some() && here.len() < chosen.len() {
        bail!("{} holds only some of the layers {}..{}", recording.dir().display(), chosen.start, chosen.end);
    }
    ensure!(!here.is_empty(), "{} holds no layers; record some first", recording.dir().display());
    Ok(here)
}
