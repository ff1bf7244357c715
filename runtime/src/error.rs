//! What can go wrong while a bundle is opened or run.

use std::path::PathBuf;

use flashlm_formats::bundle::BundleError;
use flashlm_formats::destination::DestinationError;
use flashlm_formats::sessions::SessionFileError;
use flashlm_io::IoError;

use crate::budget::{BudgetError, counted, human_bytes};
pub use crate::terminal::printable;

/// An error of the runtime. Numbers are in the fields; the message says the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The bundle cannot be opened or is damaged.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Reading the bundle's data failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Reading neurons failed for good.
    #[error("layer {layer}: {source}")]
    Read {
        /// The layer.
        layer: usize,
        /// File, offset and reason.
        source: IoError,
    },
    /// Reading rows of the vocabulary's matrices failed for good.
    #[error("the vocabulary's matrix: {0}")]
    ReadVocabulary(IoError),
    /// A part of the bundle does not have the checksum that its header states.
    #[error(
        "{path}: {part} is damaged: checksum {found:016x}, expected {expected:016x}; copy the bundle again or rebuild it"
    )]
    Checksum {
        /// The bundle.
        path: PathBuf,
        /// Which part.
        part: String,
        /// Checksum stated in the bundle.
        expected: u64,
        /// Checksum of the bytes read.
        found: u64,
    },
    /// Another file has the bundle's name since the bundle was opened.
    #[error("{path} was replaced while it was being loaded; run again")]
    Replaced {
        /// The bundle.
        path: PathBuf,
    },
    /// What was given as a memory budget is not one.
    #[error("{0}")]
    Budget(BudgetError),
    /// The budget cannot hold what is needed.
    #[error(
        "a memory budget of {} is too small: {} are needed for {what}; the smallest that works is --memory {needed}",
        human_bytes(*budget),
        human_bytes(*needed)
    )]
    BudgetTooSmall {
        /// The budget.
        budget: u64,
        /// The smallest budget that works.
        needed: u64,
        /// Context and FFN source that were asked for.
        what: String,
    },
    /// The budget is more than the system lets the process have.
    #[error(
        "a memory budget of {} is more than the {} that the memory cgroup {} allows: give --memory {limit} at most, or raise that limit",
        human_bytes(*budget),
        human_bytes(*limit),
        cgroup.display()
    )]
    BudgetAboveLimit {
        /// The budget.
        budget: u64,
        /// The smallest limit of the cgroups that hold the process.
        limit: u64,
        /// The cgroup whose limit that is.
        cgroup: PathBuf,
    },
    /// The tokenizer in the bundle cannot be used.
    #[error("the bundle's tokenizer cannot be used: {0}")]
    Tokenizer(String),
    /// The chat template in the bundle cannot be used.
    #[error("the chat template cannot be used: {0}; --no-chat goes without, --chat-template FILE gives another")]
    ChatTemplate(String),
    /// The model has no chat template.
    #[error("the bundle has no chat template; --chat-template FILE gives one, and --no-chat goes without")]
    NoChatTemplate,
    /// A saved conversation would go on as mere text, and lose who said what.
    #[error(
        "{} holds a conversation that a chat template wrote: go on with one (leave out --no-chat; --chat-template FILE gives one to a \
         bundle that has none)",
        path.display()
    )]
    SavedByTemplate {
        /// The saved session.
        path: PathBuf,
    },
    /// A chat template makes no text of a conversation.
    #[error("the chat template makes no text of this conversation: {0}")]
    Chat(String),
    /// A token id is outside the vocabulary.
    #[error("token id {id} is not in the model's vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Number of ids.
        vocab_size: usize,
    },
    /// More tokens than the context holds.
    #[error(
        "{wanted} tokens do not fit the context of {context}; ask for {}",
        hints(["fewer tokens", "a shorter prompt"], *context, *model_max)
    )]
    ContextFull {
        /// Tokens that would have to be held.
        wanted: usize,
        /// Tokens the context holds.
        context: usize,
        /// Longest context of the model.
        model_max: usize,
    },
    /// A context that the model cannot have.
    #[error(
        "a context of {context} tokens is not between 1 and {}; {}",
        longest(*model_max),
        if *context == 0 { "give at least one token" } else { "give fewer tokens" }
    )]
    ContextOutOfRange {
        /// Tokens asked for.
        context: usize,
        /// Longest context of the model: its positions, or the window within which it attends to everything.
        model_max: usize,
    },
    /// A key or value outside the range of half precision. Stored regardless it would be infinite, and any text from it wrong.
    #[error(
        "layer {layer} makes a key or value of {value:.0} for token {position}, and an f16 KV cache holds at most 65504; give --kv f32"
    )]
    KvRange {
        /// The layer.
        layer: usize,
        /// Position of the token that it belongs to.
        position: usize,
        /// Its magnitude.
        value: f32,
    },
    /// A key or value that is not finite.
    #[error(
        "what layer {layer} computed for token {position} is not a finite number (a key or value is {value}); {}",
        NOT_FINITE
    )]
    KvNoNumber {
        /// The layer.
        layer: usize,
        /// Position of the token that it belongs to.
        position: usize,
        /// What it is.
        value: f32,
    },
    /// The model that guesses failed.
    #[error("the draft model: {0}; the same run without --draft gives the same text")]
    Draft(Box<RuntimeError>),
    /// The ids of a draft model mean other tokens.
    #[error("{draft} cannot guess for {difference}; prepare the draft from a model with the same tokenizer")]
    OtherTokenizer {
        /// The draft's bundle.
        draft: PathBuf,
        /// The bundle that it was to guess for, and the first id that they do not agree on.
        difference: String,
    },
    /// A saved session cannot be used.
    #[error(transparent)]
    SavedSession(Box<SessionFileError>),
    /// A saved session was computed otherwise: what would go on is another text.
    #[error("{path} was saved with {difference}: it cannot go on there; give another --session")]
    OtherSession {
        /// The file.
        path: PathBuf,
        /// What it was computed with, and what it would be gone on with.
        difference: String,
    },
    /// A session cannot be saved.
    #[error(transparent)]
    Destination(Box<DestinationError>),
    /// There is nothing to start from.
    #[error("the prompt is empty and the model has no token that begins a sequence; give at least one token")]
    EmptyPrompt,
    /// There is no memory left for the keys and values of another sequence.
    #[error(
        "a sequence of {wanted} tokens needs memory for keys and values but the others leave room for {free} only; close one, or load the \
        model with room for more sequences"
    )]
    NoRoomForSequence {
        /// Tokens that it may have.
        wanted: usize,
        /// Tokens there is room for.
        free: usize,
    },
    /// A row of a sequence that was never opened, or is closed already.
    #[error("a row is of a sequence that is closed; open it before its rows are computed")]
    ClosedSequence,
    /// The forward pass ended in infinities or NaN.
    #[error(
        "what the model computed for token {position} is not a finite number (the logit of id {id} is {value}); {}",
        NOT_FINITE
    )]
    NoNumber {
        /// Position of the token that was to be chosen.
        position: usize,
        /// The first id whose logit is not finite.
        id: u32,
        /// That logit.
        value: f32,
    },
    /// The bundle describes something this build cannot compute.
    #[error("{0}")]
    Unsupported(String),
    /// What tensors are read from refused, with an error of its own: a checkpoint, while it is recorded.
    #[error(transparent)]
    Tensors(Box<dyn std::error::Error + Send + Sync>),
    /// A tensor that the architecture needs is not there.
    #[error("the model's tensor {0} is missing; convert the checkpoint again")]
    MissingTensor(String),
    /// Predictors that are no file of tensors.
    #[error("the predictors cannot be read, they are no safetensors: {0}; train and pack again")]
    Predictors(String),
    /// A predictor does not fit the model, or is not one.
    #[error("predictor tensor {tensor}: {what}; train and pack again")]
    Predictor {
        /// Which tensor.
        tensor: String,
        /// What is wrong with it.
        what: String,
    },
    /// Threads could not be started.
    #[error(
        "cannot start {threads} thread{}: {source}; {}allow more (`ulimit -u`, a container's pids limit)",
        if *threads == 1 { "" } else { "s" },
        if *threads == 1 { "" } else { "give fewer with --threads, or " }
    )]
    Threads {
        /// Number asked for.
        threads: usize,
        /// What the system said.
        source: std::io::Error,
    },
}

impl From<SessionFileError> for RuntimeError {
    fn from(error: SessionFileError) -> Self {
        Self::SavedSession(Box::new(error))
    }
}

impl From<DestinationError> for RuntimeError {
    fn from(error: DestinationError) -> Self {
        Self::Destination(Box::new(error))
    }
}

/// What helps when a computed value is not finite.
const NOT_FINITE: &str = "if `flashlm-prep verify` finds the bundle whole, the checkpoint that it was made from has weights that \
    are no finite numbers, or become too large, as in a float16 copy of a bfloat16 model: get another copy and convert that";

/// The longest context of a model, in words.
pub fn longest(model_max: usize) -> String {
    format!(
        "the {} that this model allows (its positions, or the window of its attention)",
        counted(model_max, "token")
    )
}

/// A larger context as a remedy, where the model allows one.
pub fn larger_context(context: usize, model_max: usize) -> Option<String> {
    (context < model_max).then(|| format!("a larger --context (the model allows {model_max})"))
}

/// Remedies for a context that is too short, as a list: the one that always works, and a larger context where the model allows it.
pub fn hints(always: [&str; 2], context: usize, model_max: usize) -> String {
    let [one, other] = always;
    match larger_context(context, model_max) {
        Some(larger) => format!("{one}, {other}, or {larger}"),
        None => format!("{one} or {other}"),
    }
}

/// Result with a [`RuntimeError`].
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

/// What helps, where the system's own message does not say it.
fn next_step(error: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    let error = error.downcast_ref::<std::io::Error>()?;
    // Only the system's own: a file that we refuse to read is too large as well.
    let is_of_system = error.raw_os_error().is_some();
    match error.kind() {
        std::io::ErrorKind::FileTooLarge if is_of_system => {
            Some("allow larger files (`ulimit -f`), or write to a file system that holds them")
        }
        _ => None,
    }
}

/// An error with its causes as one sentence, for the command line; a cause that the text already contains is not repeated.
pub fn sentence(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next_step = next_step(error);
    let mut cause = error.source();
    while let Some(error) = cause {
        next_step = next_step.or(self::next_step(error));
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text.extend(next_step.map(|step| format!("; {step}")));
    printable(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_not_told_what_to_do() {
        let error = std::io::Error::other("a\u{1b}]0;title\u{7}\n\u{9b}2Jé");
        assert_eq!(sentence(&error), "a\\u001b]0;title\\u0007\n\\u009b2Jé");
    }

    #[test]
    fn a_cause_is_said_once() {
        let system = || std::io::Error::other("the disk is gone");
        let says = RuntimeError::Threads { threads: 2, source: system() };
        assert!(sentence(&says).starts_with("cannot start 2 threads: the disk is gone; give fewer with --threads"));
        assert_eq!(sentence(&says).matches("the disk is gone").count(), 1);
        let one = RuntimeError::Threads { threads: 1, source: system() };
        assert!(sentence(&one).starts_with("cannot start 1 thread: the disk is gone; allow more (`ulimit -u`"));
        let limit = anyhow::Error::new(std::io::Error::from_raw_os_error(27)).context("cannot write x");
        assert!(
            sentence(limit.as_ref())
                .ends_with("; allow larger files (`ulimit -f`), or write to a file system that holds them")
        );
        let input = std::io::Error::new(std::io::ErrorKind::FileTooLarge, "it has 9 bytes, and 8 are the most");
        assert!(sentence(anyhow::Error::new(input).context("x.json").as_ref()).ends_with("and 8 are the most"));
        let hides = anyhow::Error::new(system()).context("cannot write x");
        assert_eq!(sentence(hides.as_ref()), "cannot write x: the disk is gone");
    }
}
