//! What can go wrong, with the numbers needed to act on it.

use std::io;
use std::path::PathBuf;

/// An error of this crate. Offsets and lengths are in bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The file could not be opened or examined.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of our own (scratch, profile) could not be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Direct I/O was required and refused.
    #[error(
        "direct I/O is required but {path} (on {filesystem}) refuses it: {reason}; move the file to a local disk \
         (ext4, xfs, btrfs), or allow buffered reads with direct I/O `optional`"
    )]
    DirectRefused {
        /// The file.
        path: PathBuf,
        /// Name of the filesystem, or its magic number.
        filesystem: String,
        /// What was tried and what came back.
        reason: String,
    },
    /// Memory could not be mapped.
    #[error("cannot map {bytes} bytes of memory: {source}")]
    Map {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        source: io::Error,
    },
    /// An arena too large to address.
    #[error("{count} slots of {slot_bytes} bytes do not fit the address space")]
    ArenaTooLarge {
        /// Slots asked for.
        count: usize,
        /// Bytes of each.
        slot_bytes: usize,
    },
    /// A read failed for good.
    #[error("reading {length} bytes at offset {offset} of {path} failed after {retries} retries: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Where the failing read began.
        offset: u64,
        /// How many bytes it wanted.
        length: u64,
        /// Retries made before giving up.
        retries: u32,
        /// What the system said; `raw_os_error` has the number.
        source: io::Error,
    },
    /// The file ended before the read did.
    #[error(
        "{path} ended early: {expected} bytes wanted at offset {offset}, {found} there; \
         it was {length_at_open} bytes long when opened, {length_now} now"
    )]
    UnexpectedEnd {
        /// The file.
        path: PathBuf,
        /// Where the request began.
        offset: u64,
        /// Bytes wanted.
        expected: u64,
        /// Bytes found.
        found: u64,
        /// Length at opening.
        length_at_open: u64,
        /// Length when the error was made.
        length_now: u64,
    },
    /// A read made no progress within the deadline.
    #[error("a read of {length} bytes at offset {offset} of {path} has not finished after {waited_s:.1} s")]
    Stalled {
        /// The file.
        path: PathBuf,
        /// Where the stalled request began.
        offset: u64,
        /// How many bytes it wants.
        length: u64,
        /// Seconds since it was started.
        waited_s: f64,
    },
    /// The file is no longer the one that was opened.
    #[error("{path} changed while in use: {what} was {expected}, is {found}; open it again")]
    FileChanged {
        /// The file.
        path: PathBuf,
        /// Which property changed.
        what: &'static str,
        /// Its value at opening.
        expected: String,
        /// Its value now.
        found: String,
    },
    /// An arena laid out for a finer alignment than the file has.
    #[error("slots lie {stride} bytes apart, but the file needs a multiple of {needed}; make them with its alignment")]
    SlotAlignment {
        /// Bytes from slot to slot.
        stride: usize,
        /// What direct reads of the file need.
        needed: usize,
    },
    /// A slot number outside the arena.
    #[error("slot {slot} does not exist, the arena has {count}")]
    SlotOutOfRange {
        /// The slot named.
        slot: u32,
        /// Slots there are.
        count: usize,
    },
    /// A slot named by a read while an earlier read still owns it.
    #[error("slot {slot} is named by two reads at once")]
    SlotInFlight {
        /// The slot named.
        slot: u32,
    },
    /// A piece that is empty or does not fit its slot.
    #[error("a piece of {bytes} bytes does not fit slot {slot} of {slot_bytes} bytes")]
    PieceLength {
        /// The slot named.
        slot: u32,
        /// Bytes of the piece.
        bytes: u32,
        /// Bytes of a slot.
        slot_bytes: usize,
    },
    /// A request that reads into no slot.
    #[error("request {tag} reads into no slot")]
    EmptyRequest {
        /// The request's tag.
        tag: u64,
    },
    /// A request that reaches past the end of the file.
    #[error("{length} bytes at offset {offset} reach past the end of {path}, which is {file_length} bytes long")]
    BeyondEnd {
        /// The file.
        path: PathBuf,
        /// Where the request begins.
        offset: u64,
        /// How many bytes it wants.
        length: u64,
        /// Length of the file at opening.
        file_length: u64,
    },
    /// An engine could not be set up or broke as a whole.
    #[error("the {engine} engine failed to {operation}: {source}")]
    Engine {
        /// The engine's name.
        engine: &'static str,
        /// What it was doing.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// No thread can be started.
    #[error("cannot start a reader thread: {source}; allow more (`ulimit -u`, a container's pids limit)")]
    Thread {
        /// What the system said.
        source: io::Error,
    },
    /// A word that names no choice.
    #[error("`{found}` is not one of {expected}")]
    UnknownChoice {
        /// What was given.
        found: String,
        /// What is understood.
        expected: &'static str,
    },
}

impl IoError {
    /// Where in the file reading failed.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Read { offset, .. }
            | Self::UnexpectedEnd { offset, .. }
            | Self::Stalled { offset, .. }
            | Self::BeyondEnd { offset, .. } => Some(*offset),
            _ => None,
        }
    }
}
