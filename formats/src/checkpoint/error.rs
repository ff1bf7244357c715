//! Everything that can be wrong with a checkpoint: what was expected, what was found, what to do next. What a single parser finds
//! is described beside it.

use std::io;
use std::path::PathBuf;

use super::config_error::ConfigError;
use super::foreign::Foreign;
use super::index_error::IndexError;
use super::listing::list;
use super::safetensors_error::SafetensorsError;
use super::tensor_problem::{TensorProblem, hint, left_over, lines};
use super::torch_error::TorchError;

/// Why a checkpoint cannot be opened or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `open`, `read`.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system lets the process open no more files.
    #[error(
        "cannot open {}: {limit} files are open, and the system allows this process no more. Allow more (`ulimit -n 4096`; where \
         the shell may not, the hard limit: limits.conf, LimitNOFILE= of a service, --ulimit nofile= of a container) and start again",
        path.display()
    )]
    TooManyOpenFiles {
        /// The file.
        path: PathBuf,
        /// How many the process may have open.
        limit: u64,
    },
    /// The path is not a directory.
    #[error("there is no directory {}: give the directory that holds config.json and the weights", path.display())]
    NotADirectory {
        /// The path given.
        path: PathBuf,
    },
    /// No configuration.
    #[error("{} has no config.json: give the directory of a Hugging Face checkpoint, downloaded completely", dir.display())]
    NoConfig {
        /// The checkpoint directory.
        dir: PathBuf,
    },
    /// A device, a pipe, a socket or a directory stands where a file should be.
    #[error("{} is {kind}, not a regular file: replace it by the file itself", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A small file is suspiciously large.
    #[error("{} has {bytes} bytes, more than the {limit} a file of this kind may have: it is not what its name says", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The longest that is read.
        limit: u64,
    },
    /// A file holds something else than its name says.
    #[error("{} is {}, expected {expected}: {}", path.display(), found.name(), found.hint())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What its name promises.
        expected: &'static str,
        /// What it is.
        found: Foreign,
    },
    /// Only weights of a kind that is not read.
    #[error("{} holds no safetensors or PyTorch weights, only {file} ({}): {}", dir.display(), found.name(), found.hint())]
    OtherFormat {
        /// The checkpoint directory.
        dir: PathBuf,
        /// A file of the other kind.
        file: String,
        /// What it is.
        found: Foreign,
    },
    /// No weights at all.
    #[error(
        "{} holds no weights: expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or \
         pytorch_model.bin.index.json; found {}. Download the whole repository", dir.display(), list(found)
    )]
    NoWeights {
        /// The checkpoint directory.
        dir: PathBuf,
        /// Names of what is there (at most 20).
        found: Vec<String>,
    },
    /// A JSON file is malformed.
    #[error("{} is not well-formed: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column, and what helps.
        reason: String,
    },
    /// `config.json` (or `generation_config.json`) says something impossible or unsupported.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<ConfigError>,
    },
    /// A safetensors file lies about itself.
    #[error("{} is not a valid safetensors file: {source}. {}", path.display(), source.hint())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<SafetensorsError>,
    },
    /// A PyTorch file cannot be read.
    #[error("{}: {source}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<TorchError>,
    },
    /// The index of a sharded checkpoint does not fit its shards.
    #[error("{}: {source}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong.
        source: Box<IndexError>,
    },
    /// The stored tensors are not those that `config.json` describes; all differences at once.
    #[error(
        "{}: the weights do not fit config.json, {} tensor(s) differ:{}{}{}",
        dir.display(), problems.len(), lines(problems), left_over(unplaced), hint(problems, unplaced)
    )]
    Tensors {
        /// The checkpoint directory.
        dir: PathBuf,
        /// Every difference.
        problems: Vec<TensorProblem>,
        /// Where some are missing: what is stored and has no place, sorted. A name may only be another one.
        unplaced: Vec<String>,
    },
    /// Two models in one checkpoint, and nothing says which is meant.
    #[error("{} holds two models, with the prefixes {first:?} and {second:?}: keep the tensors of one", dir.display())]
    TwoModels {
        /// The checkpoint directory.
        dir: PathBuf,
        /// What comes before the names of one.
        first: String,
        /// And of the other.
        second: String,
    },
    /// A file changed after it was opened.
    #[error("{} changed while it was being read ({change}): start again once nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What changed.
        change: String,
    },
    /// A name that the model does not have.
    #[error("the model has no tensor {name:?}; see ModelSpec::resident_tensors")]
    UnknownTensor {
        /// The name asked for.
        name: String,
    },
    /// Rows that the matrix does not have.
    #[error("rows {start}..{end} of {name} were asked for; it has {rows}")]
    RowsOutOfRange {
        /// The matrix.
        name: String,
        /// First row asked for.
        start: usize,
        /// Row after the last asked for.
        end: usize,
        /// Rows there are.
        rows: usize,
    },
    /// The buffer for a tensor does not fit in memory.
    #[error("{bytes} bytes for {name} cannot be allocated")]
    OutOfMemory {
        /// The tensor.
        name: String,
        /// Bytes asked for.
        bytes: usize,
    },
    /// No tokenizer.
    #[error("{} has no tokenizer: expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt; copy them from the model's repository", dir.display())]
    NoTokenizer {
        /// The checkpoint directory.
        dir: PathBuf,
    },
}
