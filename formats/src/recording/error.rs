use std::path::{Path, PathBuf};

use crate::bundle::Fault;
use crate::seal::SealBroken;

/// What can be wrong with a recording.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordingError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `recording.json` or a tensor file's header is not the JSON it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// File.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// `recording.json` is absurdly long.
    #[error("{}: {bytes} bytes, at most {limit} expected", path.display())]
    InfoTooLong {
        /// File.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The longest that is read.
        limit: u64,
    },
    /// The recorded model is none that can be.
    #[error("{}: {}: expected {}, found {}", path.display(), fault.what, fault.expected, fault.found)]
    Model {
        /// File.
        path: PathBuf,
        /// Which number, what it has to be, and what it is.
        fault: Fault,
    },
    /// The file is something else.
    #[error("{}: expected format {expected:?}, found {found:?}", path.display())]
    Format {
        /// File.
        path: PathBuf,
        /// Format name that belongs there.
        expected: &'static str,
        /// What it says.
        found: String,
    },
    /// Written by a later version of flashlm.
    #[error("{}: recording version {found} is newer than {newest}, the newest that this build reads", path.display())]
    TooNew {
        /// File.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The newest known one.
        newest: u32,
    },
    /// No version, or one that was never written.
    #[error("{}: no valid version ({found:?})", path.display())]
    Version {
        /// File.
        path: PathBuf,
        /// What is there.
        found: Option<u64>,
    },
    /// The file is not as it was written.
    #[error("{}: {source}; record again", path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// The checksums.
        source: SealBroken,
    },
    /// The file belongs to another recording.
    #[error("{}: belongs to recording {found}, not to {expected}", path.display())]
    Mixed {
        /// File.
        path: PathBuf,
        /// Id in `recording.json`.
        expected: String,
        /// Id in this file.
        found: String,
    },
    /// A layer file's number is not the one in its name.
    #[error("{}: holds layer {found:?}, expected {expected}", path.display())]
    WrongLayer {
        /// File.
        path: PathBuf,
        /// Number in its name.
        expected: usize,
        /// Number that it says.
        found: Option<String>,
    },
    /// Nothing is recorded, or the sizes are beyond all bounds.
    #[error("{}: no id, or no usable size: {tokens} tokens, hidden {hidden}, {ffn} neurons", dir.display())]
    Empty {
        /// Directory.
        dir: PathBuf,
        /// Tokens.
        tokens: usize,
        /// Hidden size.
        hidden: usize,
        /// Neurons of a layer.
        ffn: usize,
    },
    /// The token file contradicts itself or the info.
    #[error("{}: {what}[{at}] is {found}, expected {expected}", path.display())]
    Tokens {
        /// File.
        path: PathBuf,
        /// Tensor.
        what: &'static str,
        /// Index in it.
        at: usize,
        /// What would be right.
        expected: String,
        /// What is there.
        found: u64,
    },
    /// The model has no such layer.
    #[error("layer {layer} of a model with {layers} layers")]
    NoSuchLayer {
        /// Asked for.
        layer: usize,
        /// There are.
        layers: usize,
    },
    /// The model has it, and it is not there.
    #[error(
        "{} has no layer {layer}: recording was interrupted, or its file was removed; give the same `flashlm-prep record` again, which \
         goes on from what is there",
        dir.display()
    )]
    NotRecorded {
        /// The recording.
        dir: PathBuf,
        /// The layer.
        layer: usize,
    },
    /// A tensor file's header length or layout is impossible.
    #[error("{}: {what}: expected {expected}, found {found}", path.display())]
    Layout {
        /// File.
        path: PathBuf,
        /// Which quantity.
        what: &'static str,
        /// What would be right.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// A tensor is missing.
    #[error("{}: no tensor {name:?}", path.display())]
    MissingTensor {
        /// File.
        path: PathBuf,
        /// Its name.
        name: &'static str,
    },
    /// A tensor has another type or shape.
    #[error("{}: tensor {name:?} is {found}, expected {expected}", path.display())]
    TensorShape {
        /// File.
        path: PathBuf,
        /// Its name.
        name: &'static str,
        /// Type and shape that belong there.
        expected: String,
        /// Type and shape found.
        found: String,
    },
    /// Activity, magnitudes and summaries contradict one another.
    #[error("{}: {what} at {at}: expected {expected}, found {found}", path.display())]
    Activity {
        /// File.
        path: PathBuf,
        /// Which contradiction.
        what: &'static str,
        /// Token or neuron.
        at: usize,
        /// What would agree.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// A number that must be finite and, but for inputs, not negative.
    #[error("{}: {what}[{at}] is {value}", path.display())]
    NotFinite {
        /// File.
        path: PathBuf,
        /// Tensor.
        what: &'static str,
        /// Index in it.
        at: usize,
        /// The number.
        value: f32,
    },
    /// A block handed to the writer has the wrong length.
    #[error("{}: a block's {what} has {found} numbers, expected {expected}", path.display())]
    Block {
        /// File being written.
        path: PathBuf,
        /// Which slice.
        what: &'static str,
        /// Length that fits.
        expected: usize,
        /// Length given.
        found: usize,
    },
    /// More or fewer tokens were written than the recording has.
    #[error("{}: {found} tokens written, the recording has {expected}", path.display())]
    TokenCount {
        /// File being written.
        path: PathBuf,
        /// Tokens of the recording.
        expected: u64,
        /// Tokens written.
        found: u64,
    },
}

impl RecordingError {
    pub(super) fn io(path: &Path, source: std::io::Error) -> Self {
        RecordingError::Io { path: path.to_path_buf(), source }
    }
}
