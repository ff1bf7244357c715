//! The reader engines as their users see them.

use std::fmt;
use std::str::FromStr;

use crate::{IoError, ReadBatch, Slots};

/// Reads extents of one file into slots. Several requests are under way at once and finish in any order.
pub trait ReadEngine: Send {
    /// The arena. A slot can be seen once its request has come back from [`ReadEngine::wait`].
    fn slots(&self) -> &Slots;

    /// The arena, to copy between slots.
    fn slots_mut(&mut self) -> &mut Slots;

    /// Starts all requests of a batch, or none if one is wrong. Requests beyond the depth wait their turn, which
    /// comes during [`ReadEngine::wait`].
    fn submit(&mut self, batch: &ReadBatch) -> Result<(), IoError>;

    /// Blocks until `at_least` requests have finished, or all there are; appends everything finished to `done` and
    /// returns how many that were. With 0 it only looks. A failed request is a completion, not an error here; an
    /// error here means that the engine stalled or broke, and it should be dropped.
    fn wait(&mut self, at_least: usize, done: &mut Vec<Completion>) -> Result<usize, IoError>;

    /// Requests submitted and not yet returned by `wait`.
    fn in_flight(&self) -> usize;

    /// Totals since the engine was opened.
    fn counters(&self) -> Counters;

    /// `io_uring` or `threads`.
    fn name(&self) -> &'static str;

    /// What is in use and why, in words for the user.
    fn description(&self) -> &str;
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// The request's tag.
    pub tag: u64,
    /// Bytes of the request, gaps included.
    pub bytes: u64,
    /// Whether its slots are ready. After an error they are empty.
    pub result: Result<(), IoError>,
}

/// Totals of an engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads sent to the device, continuations and retries included.
    pub reads: u64,
    /// Bytes that came back, gaps and rounding included.
    pub bytes: u64,
    /// Reads repeated after an interruption, a passing error, or because the system could start no thread for them.
    pub retries: u64,
    /// Reads that went through a bounce buffer because they were not aligned.
    pub bounced: u64,
    /// Nanoseconds spent in `wait`.
    pub wait_ns: u64,
}

/// Which engine to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring, or threads where it is not available.
    #[default]
    Auto,
    /// io_uring (Linux 5.11 and later).
    IoUring,
    /// A pool of threads that read one request each.
    Threads,
}

impl FromStr for EngineChoice {
    type Err = IoError;
    fn from_str(word: &str) -> Result<Self, IoError> {
        match word {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "threads" => Ok(Self::Threads),
            _ => Err(IoError::UnknownChoice { found: word.into(), expected: "auto, io_uring, threads" }),
        }
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        })
    }
}
