//! One file per subcommand, and what they share: arguments, progress, Ctrl-C.

pub(crate) mod bench;
pub(crate) mod disk;
pub(crate) mod doctor;
pub(crate) mod logits;
mod model_args;
pub(crate) mod plan;
pub(crate) mod run;

pub(crate) use model_args::{ModelArgs, load_with_progress};

use std::sync::atomic::{AtomicBool, Ordering};

use flashlm_runtime::model::ffn::ReadFigures;

/// Set by Ctrl-C or a polite request to end.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Set while the user is being asked for input: then Ctrl-C ends the program.
static AT_PROMPT: AtomicBool = AtomicBool::new(false);

/// Exit code of a run that was interrupted, as shells have it.
pub(crate) const EXIT_INTERRUPTED: u8 = 130;

/// Lets Ctrl-C, SIGTERM and SIGHUP end work at the next token; a second one ends at once.
pub(crate) fn watch_signals() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if AT_PROMPT.load(Ordering::SeqCst) || INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(EXIT_INTERRUPTED.into());
        }
    })?;
    Ok(())
}

/// Whether an end was asked for.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Forgets an interruption, so that the next turn can begin.
pub(crate) fn clear_interrupt() {
    INTERRUPTED.store(false, Ordering::SeqCst);
}

/// Tells the signal handler whether the user is being asked.
pub(crate) fn at_prompt(waiting: bool) {
    AT_PROMPT.store(waiting, Ordering::SeqCst);
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
