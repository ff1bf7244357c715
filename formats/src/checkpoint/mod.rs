//! Reading Hugging Face checkpoint directories as canonical tensors.
//!
//! [`Checkpoint::open`] reads `config.json`, finds the weight files, reads their headers, and matches what is stored with what
//! the architecture needs; everything that does not fit is a typed error then and there. Weights are read afterwards, by row
//! ranges, with positional reads into the caller's buffer: a model of any size passes through bounded memory. Nothing is
//! written, nothing is executed, and no number of a file is believed before it has been compared with the file's length.
//!
//! Canonical names and shapes are those of [`ModelSpec::resident_tensors`]; the FFN's projections are read by layer and rows.
//!
//! The tied head, where configuration and files disagree, is decided as transformers does, and said in [`Checkpoint::notes`]:
//!
//! | `tie_word_embeddings` | stored | taken |
//! |---|---|---|
//! | true (the default) | embedding only | tied |
//! | true | both, equal bytes | tied; the copy is ignored |
//! | true | both, different | **not** tied, with a note |
//! | true | `lm_head.weight` only | tied, the head serves as the embedding, with a note |
//! | false | both | not tied |
//! | false | embedding only | an error (transformers would start from random numbers) |

mod chat_files;
mod config_error;
mod directory;
mod error;
mod families;
mod file;
mod fingerprint;
mod foreign;
mod head_names;
mod index_error;
mod listing;
mod matching;
mod note;
mod pickle;
mod plan;
mod published;
mod python_json;
mod safetensors;
mod safetensors_error;
mod state_dict;
mod tensor;
mod tensor_problem;
mod tokenizer_files;
mod torch;
mod torch_error;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use chat_files::{CHAT_TEMPLATE_DIRS, CHAT_TEMPLATE_FILE};
pub use config_error::ConfigError;
pub use directory::{Format, INDEX_BYTES_MAX, index_shards};
pub use error::CheckpointError;
pub use families::{FAMILY_INFOS, FamilyInfo};
pub use foreign::Foreign;
pub use index_error::IndexError;
pub use note::Note;
pub use published::{PublishedTensor, published_tensors};
pub use safetensors_error::SafetensorsError;
pub use state_dict::{NamedTensor, read_tensors};
pub use tensor_problem::TensorProblem;
pub use tokenizer_files::{TokenizerFiles, TokenizerSource};
pub use torch_error::TorchError;

use crate::chat::{Chat, SamplingDefaults};
use crate::model::{DType, ModelSpec};
use crate::page_cache::Advice;
use directory::Weights;
use families::{Admitted, Config};
use file::{SourceFile, read_small};
use plan::CanonicalTensor;

/// Longest `config.json`; those of classifiers list thousands of labels.
const CONFIG_BYTES_MAX: u64 = 8 << 20;

/// A checkpoint directory, opened and checked.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    spec: ModelSpec,
    /// The JSON files that were read.
    json_files: Vec<SourceFile>,
    weights: Weights,
    tensors: BTreeMap<String, CanonicalTensor>,
    ffn_dtype: DType,
    model_bytes: u64,
    notes: Vec<Note>,
    unused: Vec<String>,
}

/// One of a layer's FFN projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FfnMatrix {
    /// `[ffn, hidden]`, only in gated models.
    Gate,
    /// `[ffn, hidden]`.
    Up,
    /// `[hidden, ffn]`.
    Down,
}

impl FfnMatrix {
    fn canonical(self, layer: usize) -> String {
        let which = match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        };
        format!("layers.{layer}.ffn.{which}.weight")
    }
}

/// Type and shape of a canonical tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Element type, as stored.
    pub dtype: DType,
    /// Shape; matrices are `[outputs, inputs]`.
    pub shape: &'a [usize],
}

/// A file that decides what the model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Name in the directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

impl Checkpoint {
    /// Open a directory with `config.json` and weights as safetensors or PyTorch files, single or sharded.
    ///
    /// # Errors
    /// Whatever does not fit; each says what was expected, what was found, and what to do.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            return Err(CheckpointError::NotADirectory { path: dir.to_owned() });
        }
        let Some((config_file, config)) = read_config(dir, "config.json")? else {
            return Err(directory::explain_missing_config(dir));
        };
        let wrong = |source| CheckpointError::Config { path: config_file.path.clone(), source: Box::new(source) };
        let Admitted { family, config, unread, unknown_code } = families::admit(config).map_err(wrong)?;
        let mut spec = (family.spec)(&config).map_err(wrong)?;
        let mut json_files = apply_side_files(dir, &mut spec)?;

        let mut weights = Weights::open(dir)?;
        let mut notes = note::of_keys(unread, config.text("model_type", "").map_err(wrong)?);
        if let Some(stated) = config.optional_count("max_position_embeddings", usize::MAX >> 1).map_err(wrong)?
            && stated > spec.max_positions
        {
            notes.push(Note::SlidingWindow { stated, taken: spec.max_positions });
        }
        if let Some(class) = unknown_code {
            notes.push(Note::CustomCode { class, family: family.info.name });
        }
        let chosen =
            matching::choose(family, &config, &mut spec, &mut weights, &mut notes).map_err(|e| e.or(dir, wrong))?;
        let tensors = chosen
            .plan
            .resolve(&weights.tensors, &weights.by_name)
            .map_err(|problems| matching::explain(dir, problems, &chosen, &weights))?;
        let mismatch = |problems| CheckpointError::Tensors { dir: dir.to_owned(), problems, unplaced: Vec::new() };
        let unused = matching::unused(family, &spec, &chosen, &weights).map_err(mismatch)?;
        if !unused.is_empty() {
            notes.push(Note::Ignored(unused.clone()));
        }
        let ffn_dtype = matching::ffn_dtype(&spec, &tensors, &weights).map_err(|problem| mismatch(vec![problem]))?;
        for file in &weights.files {
            file.advise(0, 0, Advice::Sequential);
        }
        json_files.insert(0, config_file);
        let model_bytes = matching::model_bytes(&tensors, &weights.tensors);
        Ok(Self { dir: dir.to_owned(), spec, json_files, weights, tensors, ffn_dtype, model_bytes, notes, unused })
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Say above which magnitude neurons count as active, with a number for each layer: see [`ModelSpec::thresholds`].
    ///
    /// # Errors
    /// `OutOfRange` for another number of layers, or a threshold that is none.
    pub fn set_thresholds(&mut self, thresholds: Vec<f32>) -> Result<(), ConfigError> {
        let wrong = |expected: String, found: String| {
            Err(ConfigError::OutOfRange { key: "thresholds".into(), expected, found })
        };
        if thresholds.len() != self.spec.layers.len() {
            return wrong(format!("one for each of {} layers", self.spec.layers.len()), thresholds.len().to_string());
        }
        if let Some(bad) = thresholds.iter().find(|t| !t.is_finite() || **t < 0.0) {
            return wrong("a number not below 0".into(), bad.to_string());
        }
        self.spec.thresholds = thresholds;
        Ok(())
    }

    /// The directory that was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kind of files that hold the weights.
    pub fn format(&self) -> Format {
        self.weights.format
    }

    /// What the user should be told.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Names of stored tensors that are not the language model's and are not read.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Every file that decides what the model is: configuration, index, weights.
    pub fn files(&self) -> Vec<FileInfo> {
        self.source_files().map(|file| FileInfo { name: file.name.clone(), bytes: file.bytes() }).collect()
    }

    fn source_files(&self) -> impl Iterator<Item = &SourceFile> {
        self.json_files.iter().chain(&self.weights.index).chain(&self.weights.files)
    }

    /// Stored bytes of the tensors that are used, those stored once and used twice counted once.
    pub fn model_bytes(&self) -> u64 {
        self.model_bytes
    }

    /// Element type of every FFN projection.
    pub fn ffn_dtype(&self) -> DType {
        self.ffn_dtype
    }

    /// Where the bytes lie that a pass through the first `layers` layers reads, as file names and ranges; embeddings belong to it.
    pub fn byte_ranges(&self, layers: usize) -> Vec<(&str, Range<u64>)> {
        let is_read = |name: &str| match name.strip_prefix("layers.") {
            Some(rest) => rest.split('.').next().and_then(|n| n.parse::<usize>().ok()).is_some_and(|n| n < layers),
            None => name.starts_with("embed."),
        };
        let read = self.tensors.iter().filter(|(name, _)| is_read(name));
        let stored: BTreeSet<usize> =
            read.flat_map(|(_, tensor)| tensor.parts.iter().map(|(index, _)| *index)).collect();
        let place = |index: usize| {
            let tensor = &self.weights.tensors[index];
            (self.weights.files[tensor.file].name.as_str(), tensor.offset..tensor.offset + tensor.bytes())
        };
        stored.into_iter().map(place).collect()
    }

    /// Type and shape of the resident tensor `name`.
    ///
    /// # Errors
    /// `UnknownTensor` for a name that is not among [`ModelSpec::resident_tensors`].
    pub fn resident(&self, name: &str) -> Result<TensorInfo<'_>, CheckpointError> {
        let tensor = self.resident_tensor(name)?;
        Ok(TensorInfo { dtype: tensor.dtype, shape: &tensor.shape })
    }

    /// Read the resident tensor `name`, whole, into `out`, replacing what is there.
    ///
    /// # Errors
    /// `UnknownTensor`, or whatever reading reports.
    pub fn read_resident(&self, name: &str, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        let tensor = self.resident_tensor(name)?;
        self.read(name, tensor, 0..tensor.shape[0], out)
    }

    /// Read some rows (elements, of a vector) of the resident tensor `name` into `out`, replacing what is there.
    ///
    /// # Errors
    /// `UnknownTensor`, `RowsOutOfRange`, or whatever reading reports.
    pub fn read_resident_rows(&self, name: &str, rows: Range<usize>, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        self.read(name, self.resident_tensor(name)?, rows, out)
    }

    /// Read some rows of a layer's FFN projection into `out`, replacing what is there; of [`FfnMatrix::Down`] a row is an output.
    ///
    /// # Errors
    /// `UnknownTensor` for a layer or matrix that the model has not, `RowsOutOfRange`, or whatever reading reports.
    pub fn read_ffn_rows(
        &self,
        layer: usize,
        matrix: FfnMatrix,
        rows: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let name = matrix.canonical(layer);
        let tensor = self.tensors.get(&name).ok_or_else(|| CheckpointError::UnknownTensor { name: name.clone() })?;
        self.read(&name, tensor, rows, out)
    }

    /// An error if a file changed since it was opened. Call it when all has been read, before anything is published.
    ///
    /// # Errors
    /// `Changed`, with the file.
    pub fn check_unchanged(&self) -> Result<(), CheckpointError> {
        self.source_files().try_for_each(SourceFile::check_unchanged)
    }

    /// Let the kernel forget what it cached of the weight files, so that one pass over a large checkpoint does not push
    /// everything else out of memory. Costs nothing but a later reader's time.
    pub fn drop_page_cache(&self) {
        for file in &self.weights.files {
            file.advise(0, 0, Advice::DontNeed);
        }
    }

    /// The files of the tokenizer, read and bounded; what they mean is for a tokenizer library.
    ///
    /// # Errors
    /// `NoTokenizer`, or what is wrong with a file.
    pub fn tokenizer_files(&self) -> Result<TokenizerFiles, CheckpointError> {
        TokenizerFiles::read(&self.dir)
    }

    /// How a conversation becomes text, if the checkpoint says so.
    ///
    /// # Errors
    /// What is wrong with a file.
    pub fn chat(&self) -> Result<Option<Chat>, CheckpointError> {
        chat_files::read_chat(&self.dir)
    }

    /// How the publisher wants tokens to be chosen.
    ///
    /// # Errors
    /// What is wrong with `generation_config.json`.
    pub fn sampling(&self) -> Result<SamplingDefaults, CheckpointError> {
        chat_files::read_sampling(&self.dir)
    }

    fn resident_tensor(&self, name: &str) -> Result<&CanonicalTensor, CheckpointError> {
        let is_ffn = |name: &str| name.ends_with(".weight") && name.contains(".ffn.");
        let tensor = self.tensors.get(name).filter(|_| !is_ffn(name));
        tensor.ok_or_else(|| CheckpointError::UnknownTensor { name: name.to_owned() })
    }

    fn read(
        &self,
        name: &str,
        tensor: &CanonicalTensor,
        rows: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        out.clear();
        if rows.start > rows.end || rows.end > tensor.shape[0] {
            let (start, end) = (rows.start, rows.end);
            return Err(CheckpointError::RowsOutOfRange { name: name.to_owned(), start, end, rows: tensor.shape[0] });
        }
        // First canonical row of the part at hand.
        let mut first = 0;
        for (index, part) in
            tensor.parts.iter().flat_map(|(index, blocks)| blocks.ranges().map(move |part| (index, part)))
        {
            let begin = rows.start.clamp(first, first + part.len());
            let end = rows.end.clamp(first, first + part.len());
            let wanted = part.start + (begin - first)..part.start + (end - first);
            self.weights.tensors[*index].append_rows(&self.weights.files, tensor.dtype, wanted, out)?;
            first += part.len();
        }
        Ok(())
    }
}

fn read_config(dir: &Path, name: &'static str) -> Result<Option<(SourceFile, Config)>, CheckpointError> {
    let Some((file, json)) = read_small(dir, name, CONFIG_BYTES_MAX)? else { return Ok(None) };
    match Config::parse(&json) {
        Ok(config) => Ok(Some((file, config))),
        Err(reason) => Err(CheckpointError::Json { path: file.path, reason }),
    }
}

/// `generation_config.json` has the last word on what ends a text, as in transformers; and a tokenizer that says outright that
/// it puts nothing in front of a text is believed.
fn apply_side_files(dir: &Path, spec: &mut ModelSpec) -> Result<Vec<SourceFile>, CheckpointError> {
    let mut files = Vec::new();
    let wrong = |path: &Path, source| CheckpointError::Config { path: path.to_owned(), source: Box::new(source) };
    if let Some((file, config)) = read_config(dir, "generation_config.json")? {
        if config.get("eos_token_id").is_some() {
            spec.eos = config.tokens("eos_token_id", &[], spec.vocab_size).map_err(|e| wrong(&file.path, e))?;
        }
        files.push(file);
    }
    if let Some((file, config)) = read_config(dir, "tokenizer_config.json")? {
        if !config.flag("add_bos_token", true).map_err(|e| wrong(&file.path, e))? {
            spec.bos = None;
        }
        files.push(file);
    }
    Ok(files)
}
