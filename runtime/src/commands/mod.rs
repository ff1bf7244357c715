//! One file per subcommand, and what they share: arguments, progress, signals.

/// None shows characters that a terminal would obey: names of files, tensors and families may hold any.
macro_rules! println {
    () => { flashlm::console::print_line(format_args!("")) };
    ($($text:tt)*) => { flashlm::console::print_line(format_args!($($text)*)) };
}
macro_rules! eprintln {
    () => { flashlm::console::note_line(format_args!("")) };
    ($($text:tt)*) => { flashlm::console::note_line(format_args!($($text)*)) };
}
macro_rules! eprint {
    ($($text:tt)*) => { flashlm::console::note(format_args!($($text)*)) };
}

pub(crate) mod bench;
pub(crate) mod disk;
pub(crate) mod doctor;
pub(crate) mod logits;
mod model_args;
pub(crate) mod named;
pub(crate) mod plan;
pub(crate) mod run;
mod values;

pub(crate) use model_args::{GuessArgs, ModelArgs, say_chosen, with_progress};

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use flashlm::neurons::counters::ReadFigures;
use flashlm::signals;

/// Lets signals be noted, so that work can end at its next step; once is enough.
pub(crate) fn watch_signals() -> anyhow::Result<()> {
    static IS_WATCHED: AtomicBool = AtomicBool::new(false);
    if IS_WATCHED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    signals::watch().context("cannot watch for Ctrl-C")
}

/// Whether an error comes from a closed standard output.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<std::io::Error>()).any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Token ids written as `2,713,16`.
pub(crate) fn parse_ids(text: &str) -> Result<Vec<u32>, String> {
    let id = |part: &str| {
        part.trim().parse().map_err(|_| format!("`{}` is not a token id; write ids like 2,713,16", part.trim()))
    };
    text.split(',').map(id).collect()
}

/// An object with the figures of reading and `more`.
pub(crate) fn with_figures(figures: ReadFigures, mut more: serde_json::Value) -> serde_json::Value {
    if let (Some(object), serde_json::Value::Object(figures)) = (more.as_object_mut(), serde_json::json!(figures)) {
        object.extend(figures);
    }
    more
}
