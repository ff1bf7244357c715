//! Everything that can be wrong with a checkpoint, as types: what was expected, what was found, what to do next.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::families::HEADS;
use crate::model::DType;

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
    #[error("{} has no config.json: give the directory of a Hugging Face checkpoint, downloaded whole", dir.display())]
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
    #[error("{} is {}, expected {expected}: {}", path.display(), found.name(), found.way_out())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What its name promises.
        expected: &'static str,
        /// What it is.
        found: Foreign,
    },
    /// Only weights of a kind that is not read.
    #[error("{} holds no safetensors or PyTorch weights, only {file} ({}): {}", dir.display(), found.name(), found.way_out())]
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
    #[error("{} is not a valid safetensors file: {source}. {}", path.display(), source.way_out())]
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
        dir.display(), problems.len(), lines(problems), left_over(unplaced), way_out(problems, unplaced)
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
    #[error("{} holds two models, behind {first:?} and {second:?}: keep the tensors of one", dir.display())]
    TwoModels {
        /// The checkpoint directory.
        dir: PathBuf,
        /// What stands before the names of one.
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

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A key without a default is missing.
    #[error("the key {key:?} is missing; expected {expected}")]
    Missing {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A value of the wrong JSON type.
    #[error("{key:?} is {found}; expected {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
        /// The value found, shortened.
        found: String,
    },
    /// A number outside what a model can have.
    #[error("{key:?} is {found}; expected {expected}")]
    OutOfRange {
        /// The key.
        key: String,
        /// What it should be.
        expected: String,
        /// The value found.
        found: String,
    },
    /// A value that exists elsewhere and is not supported here.
    #[error("{key} {found} is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// The value found.
        found: String,
        /// What is supported.
        supported: String,
    },
    /// No family that is known.
    #[error(
        "model_type {model_type:?}{} is not supported; supported: {supported}; `flashlm-prep families` says more",
        among(architectures)
    )]
    Family {
        /// What `model_type` says.
        model_type: String,
        /// The classes it names.
        architectures: Vec<String>,
        /// Every `model_type` that is supported.
        supported: String,
    },
    /// Two keys that cannot both be true.
    #[error("{first} does not go with {second}: {rule}")]
    Contradiction {
        /// One key and its value.
        first: String,
        /// The other.
        second: String,
        /// Why not.
        rule: &'static str,
    },
    /// Weights quantised by another tool.
    #[error("the weights are quantised ({method}); start from the original float16, bfloat16 or float32 checkpoint")]
    Quantized {
        /// The method named in `quantization_config`.
        method: String,
    },
}

/// Class names in brackets, the first few.
fn among(classes: &[String]) -> String {
    if classes.is_empty() { String::new() } else { format!(" ({})", classes[..classes.len().min(3)].join(", ")) }
}

/// How a safetensors file can lie.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// Shorter than the length field.
    #[error("the file has {found} bytes; at least {expected} are needed")]
    TooShort {
        /// Bytes needed.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The header would reach beyond the file, or is absurdly long.
    #[error("the header claims {claimed} bytes; the file leaves room for {room}, and {limit} are the most allowed")]
    HeaderLength {
        /// Length claimed.
        claimed: u64,
        /// Bytes behind the length field.
        room: u64,
        /// Longest header that is read.
        limit: u64,
    },
    /// The header is not the expected JSON.
    #[error("the header is malformed: {reason}")]
    Header {
        /// What is wrong.
        reason: String,
    },
    /// One name twice.
    #[error("the tensor {tensor:?} is listed twice")]
    Duplicate {
        /// The name.
        tensor: String,
    },
    /// Shape times element size does not fit in 64 bits.
    #[error("the shape {shape:?} of {tensor:?} overflows")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The byte range is not as long as shape and dtype require.
    #[error("{tensor:?} spans {found} bytes; its shape and dtype need {expected}")]
    Size {
        /// The tensor.
        tensor: String,
        /// Bytes by shape and dtype.
        expected: u64,
        /// Bytes by offsets.
        found: u64,
    },
    /// Tensors overlap, leave a gap, or end before they begin.
    #[error("{tensor:?} stands at bytes {start}..{end} of the data; it should begin at {expected}")]
    Offsets {
        /// The tensor.
        tensor: String,
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// End of the tensor before it.
        expected: u64,
    },
    /// The tensors do not end where the file ends.
    #[error("the tensors end at byte {expected} of the data; the file has {found}")]
    Length {
        /// Data bytes by the header.
        expected: u64,
        /// Data bytes there are.
        found: u64,
    },
}

impl SafetensorsError {
    /// Only a file that is too short can be one that was not fetched whole.
    const fn way_out(&self) -> &'static str {
        match self {
            Self::TooShort { .. } | Self::HeaderLength { .. } | Self::Length { .. } => "Download it again",
            _ => "Download it again if it came from elsewhere; if it was made here, save it again",
        }
    }
}

/// Why a PyTorch file cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TorchError {
    /// Not a valid zip archive.
    #[error("not a valid PyTorch zip archive: {reason}. Download it again")]
    Zip {
        /// What is wrong.
        reason: String,
    },
    /// A member is missing.
    #[error("the archive has no member {member:?}. Download it again")]
    NoMember {
        /// Which one.
        member: String,
    },
    /// A member is compressed or encrypted.
    #[error(
        "the archive's member {member:?} is compressed or encrypted; PyTorch stores members plainly. Save it again with torch.save"
    )]
    NotStored {
        /// Which one.
        member: String,
    },
    /// A member reaches beyond the file.
    #[error(
        "the archive's member {member:?} claims bytes {start}..{end}; the file has {file_bytes}. Download it again"
    )]
    Bounds {
        /// Which one.
        member: String,
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// Stored on a machine with the other byte order.
    #[error(
        "the tensors are stored {found}-endian; only little-endian is read. Save it again on a little-endian machine"
    )]
    ByteOrder {
        /// What the archive says.
        found: String,
    },
    /// The pickle stream is malformed.
    #[error("malformed pickle at byte {position}: {reason}. Download it again")]
    Pickle {
        /// Byte of the offending instruction.
        position: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// An instruction outside the closed set.
    #[error(
        "the pickle uses instruction 0x{opcode:02x} at byte {position}, which plain weights do not need; it is not executed. {CONVERT}"
    )]
    Opcode {
        /// The instruction.
        opcode: u8,
        /// Its byte.
        position: usize,
    },
    /// A Python object outside the closed set.
    #[error(
        "the pickle names {module}.{name} at byte {position}, which plain weights do not need; nothing is executed. {CONVERT}"
    )]
    Global {
        /// Python module.
        module: String,
        /// Name in it.
        name: String,
        /// Byte of the instruction.
        position: usize,
    },
    /// A bound on memory was hit.
    #[error("the pickle has more than {limit} {what}: it is not a model's. {CONVERT}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// Tensors that are the same bytes again and again.
    #[error("its tensors share their storages: {listed} bytes of them in a file of {stored}. {CONVERT}")]
    Shared {
        /// Bytes of all tensors.
        listed: u64,
        /// Length of the file.
        stored: u64,
    },
    /// The unpickled object is no state dict.
    #[error("the file does not hold a dictionary of tensors but {found}. Save model.state_dict(), not the model")]
    NotAStateDict {
        /// What it holds.
        found: &'static str,
    },
    /// A tensor's description is malformed.
    #[error("the description of tensor {tensor:?} is malformed: {reason}. {CONVERT}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A tensor reaches beyond its storage.
    #[error("tensor {tensor:?} needs {needed} elements of a storage that has {stored}. Download it again")]
    Storage {
        /// The tensor.
        tensor: String,
        /// Elements needed, saturated.
        needed: u64,
        /// Elements there are.
        stored: u64,
    },
    /// One name twice.
    #[error("the tensor {tensor:?} is listed twice. {CONVERT}")]
    Duplicate {
        /// The name.
        tensor: String,
    },
}

const CONVERT: &str =
    "Convert it on a machine you trust: load it with transformers and save_pretrained(.., safe_serialization=True)";

/// How an index can lie about its shards.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Not an index.
    #[error("it should be an object with \"weight_map\": {{tensor: file}}: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// A shard outside the directory.
    #[error(
        "the shard {shard:?} is not a plain file name; shards must lie beside the index. Do not use this checkpoint"
    )]
    Path {
        /// The name in the index.
        shard: String,
    },
    /// Shards that are not there.
    #[error("{} shard(s) are missing: {}. Download them", shards.len(), list(shards))]
    MissingShards {
        /// Their names.
        shards: Vec<String>,
    },
    /// Tensors that are not where the index says.
    #[error("{} tensor(s) are not in the shard named for them: {}. Download the index and the shards again", tensors.len(), list(tensors))]
    NotInShard {
        /// `tensor (shard)`.
        tensors: Vec<String>,
    },
    /// One tensor in two shards, and the index names neither.
    #[error("tensor {tensor:?} is in {first} and in {second}, and the index does not say which counts. Download again")]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: String,
        /// The other.
        second: String,
    },
    /// More shards than any model has.
    #[error("{found} shards; at most {limit} are opened")]
    TooManyShards {
        /// Number of shards.
        found: usize,
        /// The bound.
        limit: usize,
    },
}

/// One tensor that is not as the configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Not stored.
    Missing {
        /// Its name in the checkpoint.
        tensor: String,
        /// Shape it should have.
        expected: Vec<usize>,
    },
    /// Stored with another shape.
    Shape {
        /// Its name in the checkpoint.
        tensor: String,
        /// Shape it should have.
        expected: Vec<usize>,
        /// Shape it has.
        found: Vec<usize>,
    },
    /// Stored with elements that are not weights.
    Dtype {
        /// Its name in the checkpoint.
        tensor: String,
        /// Element type it has.
        found: String,
    },
    /// Parts of one matrix differ in dtype.
    Mixed {
        /// Canonical name.
        tensor: String,
        /// A part and its dtype.
        first: (String, DType),
        /// Another part and its dtype.
        second: (String, DType),
    },
    /// Stored inside the model's body but no part of the architecture that the configuration describes.
    Unexpected {
        /// Its name in the checkpoint.
        tensor: String,
    },
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { tensor, expected } => write!(f, "{tensor} is missing, expected {expected:?}"),
            Self::Shape { tensor, expected, found } => write!(f, "{tensor} is {found:?}, expected {expected:?}"),
            Self::Dtype { tensor, found } => write!(f, "{tensor} is {found}, expected f16, bf16 or f32"),
            Self::Mixed { tensor, first, second } => write!(
                f,
                "{tensor} mixes dtypes: {} is {}, {} is {}; save the model in one dtype",
                first.0, first.1, second.0, second.1
            ),
            Self::Unexpected { tensor } => {
                write!(f, "{tensor} is stored, but the architecture in config.json has no place for it")
            }
        }
    }
}

/// A file that is not what its name promises, or a format that is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Foreign {
    /// Nothing in it.
    Empty,
    /// A placeholder of git-lfs.
    GitLfsPointer,
    /// A web page.
    Html,
    /// PyTorch before 1.6: a bare pickle.
    LegacyTorch,
    /// A zip archive where none should be.
    Zip,
    /// safetensors where PyTorch's format should be.
    Safetensors,
    /// llama.cpp's format.
    Gguf,
    /// Keras / TensorFlow weights.
    TensorFlow,
    /// Flax weights.
    Flax,
    /// Original (not Hugging Face) PyTorch weights.
    OriginalTorch,
    /// Adapter weights only.
    Adapter,
    /// An exported graph.
    Onnx,
    /// Shards whose index is missing.
    ShardsWithoutIndex,
    /// Compressed.
    Gzip,
    /// Anything else.
    Unknown,
}

impl Foreign {
    /// What it is, for a sentence.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::GitLfsPointer => "a git-lfs pointer",
            Self::Html => "a web page",
            Self::LegacyTorch => "a PyTorch file from before version 1.6",
            Self::Zip => "a zip archive",
            Self::Safetensors => "safetensors",
            Self::Gguf => "GGUF",
            Self::TensorFlow => "TensorFlow weights",
            Self::Flax => "Flax weights",
            Self::OriginalTorch => "original PyTorch weights",
            Self::Adapter => "adapter weights",
            Self::Onnx => "ONNX",
            Self::ShardsWithoutIndex => "a shard without its index",
            Self::Gzip => "compressed",
            Self::Unknown => "of an unknown format",
        }
    }

    /// What to do about it.
    pub const fn way_out(self) -> &'static str {
        match self {
            Self::Empty | Self::Unknown => "download it again",
            Self::GitLfsPointer => "the weights were not fetched; run `git lfs pull` in the directory",
            Self::Html => "the download saved an error or login page; download it again with access to the model",
            Self::LegacyTorch => "load it with PyTorch 1.6 or later and save it again with torch.save",
            Self::Zip => "unpack it, or rename it if it is a pytorch_model.bin",
            Self::Safetensors => "rename it to model.safetensors",
            Self::Gguf => "GGUF is not read; start from the original Hugging Face checkpoint",
            Self::TensorFlow => "load it in transformers with from_tf=True and save_pretrained",
            Self::Flax => "load it in transformers with from_flax=True and save_pretrained",
            Self::OriginalTorch => "convert it to Hugging Face format with the model's conversion script",
            Self::Adapter => "merge it into its base model (peft: merge_and_unload) and save_pretrained",
            Self::Onnx => "start from the original Hugging Face checkpoint",
            Self::ShardsWithoutIndex => {
                "download the index file (model.safetensors.index.json or pytorch_model.bin.index.json) too"
            }
            Self::Gzip => "decompress it first",
        }
    }
}

/// At most this many names in one message.
const NAMES_MAX: usize = 20;

fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "nothing".into();
    }
    let mut text = names.iter().take(NAMES_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > NAMES_MAX {
        text += &format!(" and {} more", names.len() - NAMES_MAX);
    }
    text
}

/// The other side of missing tensors.
fn left_over(unplaced: &[String]) -> String {
    if unplaced.is_empty() {
        return String::new();
    }
    format!("\n  The files hold {} tensor(s) that the model has no place for: {}", unplaced.len(), list(unplaced))
}

/// What to do about weights that are stored as something else.
fn way_out(problems: &[TensorProblem], unplaced: &[String]) -> &'static str {
    if problems.iter().any(|problem| matches!(problem, TensorProblem::Dtype { .. })) {
        "\n  Of a quantised model take the original 16-bit checkpoint (`prepare --dtype int8` makes smaller bundles from it); \
         any other load with transformers and save as float16: model.half().save_pretrained(..)"
    } else if matches!(problems, [TensorProblem::Missing { tensor, .. }] if HEADS.contains(&tensor.as_str())) {
        "\n  config.json says that the head is not tied to the embedding; if it is, set \"tie_word_embeddings\": true"
    } else if unplaced.iter().any(|name| name.contains(".lora_") || name.contains(".base_layer.")) {
        "\n  There is an adapter beside the weights: merge it into them (peft: merge_and_unload) and save_pretrained"
    } else {
        ""
    }
}

fn lines(problems: &[TensorProblem]) -> String {
    let mut text: String = problems.iter().take(NAMES_MAX).map(|problem| format!("\n  {problem}")).collect();
    if problems.len() > NAMES_MAX {
        text += &format!("\n  and {} more", problems.len() - NAMES_MAX);
    }
    text
}
