//! Recorded activations: what the predictors are trained on and the neuron order is found from.
//!
//! A recording is a directory: `recording.json` says where it comes from, `tokens.safetensors` holds the token ids and
//! where sequences and documents begin, and each `layer-NNN.safetensors` holds one layer's FFN inputs, which neurons
//! were active, and how strongly. Layers come and go one by one, so that a model far larger than the disk left over can
//! be recorded, trained and forgotten layer by layer. `docs/recording-format.md` describes every byte.
//!
//! Knows nothing of how recordings are made or used.

mod error;
mod layer_reader;
mod layer_writer;
mod split;
mod tensor_file;

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::bundle::check_model;
use crate::model::ModelSpec;
use crate::publish::{create_directory, publish_bytes};
use crate::regular::open_regular;
use crate::seal::{self, SealBroken};
pub use error::RecordingError;
pub use layer_reader::{LayerRecording, NeuronSummary};
pub use layer_writer::LayerWriter;
pub use split::{HELD_OUT, Split, hold_out};
use tensor_file::{Region, TensorFile, header_bytes};

/// The version this build writes.
pub const VERSION: u32 = 2;
/// The versions this build reads.
pub const VERSIONS_READ: std::ops::RangeInclusive<u32> = 1..=2;

const FORMAT: &str = "flashlm-recording";
const FORMAT_TOKENS: &str = "flashlm-recording-tokens";
const FORMAT_LAYER: &str = "flashlm-recording-layer";
const INFO_FILE: &str = "recording.json";
const TOKENS_FILE: &str = "tokens.safetensors";
/// Metadata of the token file: XXH3-64 of `recording.json`.
const INFO_HASH: &str = "info";
/// Longest `recording.json` that is read; real ones are about 1.5 KB.
const INFO_BYTES_MAX: u64 = 1 << 20;

/// The contents of `recording.json`: what was recorded, from what, how much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordingInfo {
    /// Always `flashlm-recording`.
    pub format: String,
    /// Format version.
    pub version: u32,
    /// Names this recording; every file of it repeats it, so that files of different recordings cannot be mixed.
    /// Chosen by the recorder from its inputs; not empty.
    pub id: String,
    /// The recorded model.
    pub model: ModelSpec,
    /// Recorded tokens, ids that begin a sequence included.
    pub tokens: u64,
    /// Number of sequences.
    pub sequences: u64,
    /// Number of documents that the tokens come from.
    pub documents: u64,
    /// Longest allowed sequence, in tokens.
    pub sequence_tokens: u64,
    /// Seed of the document sampling, when documents were sampled.
    pub seed: Option<u64>,
    /// Fingerprint of the checkpoint, for comparing only.
    pub checkpoint: String,
    /// Fingerprint of the text, for comparing only.
    pub text: String,
    /// The program that recorded, and its arithmetic.
    pub recorder: String,
}

impl RecordingInfo {
    /// An info of the current version with everything that can be counted left for [`Recording::create`] to fill in.
    pub fn new(model: ModelSpec, id: String) -> Self {
        RecordingInfo {
            format: FORMAT.into(),
            version: VERSION,
            id,
            model,
            tokens: 0,
            sequences: 0,
            documents: 0,
            sequence_tokens: 0,
            seed: None,
            checkpoint: String::new(),
            text: String::new(),
            recorder: String::new(),
        }
    }
}

/// A recording's directory, checked: its info and its tokens. Layers are opened one by one.
#[derive(Clone, Debug)]
pub struct Recording {
    dir: PathBuf,
    info: RecordingInfo,
    tokens: Vec<u32>,
    sequences: Vec<u32>,
    documents: Vec<u32>,
    /// Numbers of the documents held out; empty where the recording does not say.
    held_out: Vec<u32>,
    split: Split,
}

impl Recording {
    /// Writes `recording.json` and `tokens.safetensors` into `dir` (made when missing); layers follow with
    /// [`Recording::layer_writer`].
    ///
    /// `sequences` are the start offsets of the sequences with the number of tokens after them; `documents` gives for
    /// every token the number of its document, never decreasing. `held_out` are the numbers of the documents that nothing may be
    /// trained on, ascending; without any the split is left to the rule for recordings that do not say. The counts of `info` are
    /// filled in from them.
    pub fn create(
        dir: &Path,
        mut info: RecordingInfo,
        tokens: Vec<u32>,
        sequences: Vec<u32>,
        documents: Vec<u32>,
        held_out: Vec<u32>,
    ) -> Result<Self, RecordingError> {
        info.tokens = tokens.len() as u64;
        info.sequences = sequences.len().saturating_sub(1) as u64;
        info.documents = count_documents(&documents);
        let longest = sequences.windows(2).map(|w| w[1].saturating_sub(w[0]) as u64).max().unwrap_or(0);
        info.sequence_tokens = info.sequence_tokens.max(longest);
        let recording = Self::checked(dir, info, tokens, sequences, documents, held_out)?;
        create_directory(dir).map_err(|e| RecordingError::io(dir, e))?;

        let mut parts: Vec<(&str, &[u32])> = vec![
            ("tokens", &recording.tokens),
            ("sequences", &recording.sequences),
            ("documents", &recording.documents),
        ];
        if recording.says_what_is_held_out() {
            parts.push(("held_out", &recording.held_out));
        }
        let regions: Vec<_> = parts.iter().map(|(name, data)| Region::new(name, "U32", &[data.len() as u64])).collect();
        let mut json = serde_json::to_vec_pretty(&recording.info).expect("plain data serialises");
        json.push(b'\n');
        let (version, info) = (VERSION.to_string(), format!("{:016x}", xxh3_64(&json)));
        let id = recording.info.id.as_str();
        let metadata = [("format", FORMAT_TOKENS), ("version", &version), ("recording", id), (INFO_HASH, &info)];
        let mut bytes = header_bytes(&regions, &metadata);
        for (_, data) in parts {
            bytes.extend(data.iter().flat_map(|v| v.to_le_bytes()));
        }
        seal::seal(&mut bytes);
        // The info last: without it nothing opens.
        for (name, bytes) in [(TOKENS_FILE, &bytes), (INFO_FILE, &json)] {
            let path = dir.join(name);
            publish_bytes(&path, bytes).map_err(|e| RecordingError::io(&path, e))?;
        }
        Ok(recording)
    }

    /// Opens the recording in `dir` and checks its info and tokens.
    pub fn open(dir: &Path) -> Result<Self, RecordingError> {
        let path = dir.join(INFO_FILE);
        let io = |e| RecordingError::io(&path, e);
        let mut file = open_regular(&path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length > INFO_BYTES_MAX {
            return Err(RecordingError::InfoTooLong { path, bytes: length, limit: INFO_BYTES_MAX });
        }
        let mut json = Vec::new();
        file.read_to_end(&mut json).map_err(io)?;
        // The version is looked at first: a newer file may have fields that this build does not know.
        let value: serde_json::Value =
            serde_json::from_slice(&json).map_err(|source| RecordingError::Json { path: path.clone(), source })?;
        check_format(&path, value["format"].as_str(), FORMAT)?;
        check_version(&path, value["version"].as_u64())?;
        let info: RecordingInfo =
            serde_json::from_value(value).map_err(|source| RecordingError::Json { path: path.clone(), source })?;

        let (info_path, path) = (path, dir.join(TOKENS_FILE));
        let mut file = TensorFile::open(&path)?;
        check_format(&path, file.metadata("format"), FORMAT_TOKENS)?;
        check_version(&path, file.metadata("version").and_then(|v| v.parse().ok()))?;
        check_id(&path, file.metadata("recording"), &info.id)?;
        // Recordings from elsewhere need not say it.
        if let Some(expected) = file.metadata(INFO_HASH).map(|hash| u64::from_str_radix(hash, 16).unwrap_or(0)) {
            let found = xxh3_64(&json);
            if found != expected {
                return Err(RecordingError::Damaged { path: info_path, source: SealBroken { expected, found } });
            }
        }
        let tokens = file.read_u32("tokens", &[info.tokens])?;
        let sequences = file.read_u32("sequences", &[info.sequences.saturating_add(1)])?;
        let documents = file.read_u32("documents", &[info.tokens])?;
        let held_out = match file.length_of("held_out") {
            Ok(count) => file.read_u32("held_out", &[count])?,
            Err(_) => Vec::new(),
        };
        Self::checked(dir, info, tokens, sequences, documents, held_out)
    }

    fn checked(
        dir: &Path,
        info: RecordingInfo,
        tokens: Vec<u32>,
        sequences: Vec<u32>,
        documents: Vec<u32>,
        held_out: Vec<u32>,
    ) -> Result<Self, RecordingError> {
        let dir = dir.to_path_buf();
        let mut recording = Recording { dir, info, tokens, sequences, documents, held_out, split: Split::default() };
        recording.validate()?;
        recording.split = match recording.says_what_is_held_out() {
            true => Split::of_documents(&recording.documents, &recording.held_out),
            false => Split::by_rule(&recording.documents),
        };
        Ok(recording)
    }

    fn validate(&self) -> Result<(), RecordingError> {
        let lie = |what, at: usize, expected: String, found: u64| {
            Err(RecordingError::Tokens { path: self.dir.join(TOKENS_FILE), what, at, expected, found })
        };
        let (info, total) = (&self.info, self.tokens.len());
        let (hidden, ffn) = (info.model.hidden_size, info.model.ffn().size);
        if info.id.is_empty() || total == 0 || total > u32::MAX as usize || hidden == 0 || ffn == 0 {
            return Err(RecordingError::Empty { dir: self.dir.clone(), tokens: total, hidden, ffn });
        }
        // The largest tensor must have a size that offsets can express.
        if (total as u64).checked_mul(4).and_then(|n| n.checked_mul(hidden.max(ffn) as u64)).is_none() {
            return Err(RecordingError::Empty { dir: self.dir.clone(), tokens: total, hidden, ffn });
        }
        check_model(&info.model).map_err(|fault| RecordingError::Model { path: self.dir.join(INFO_FILE), fault })?;
        if self.documents.len() != total {
            return lie("documents", 0, format!("{total} entries"), self.documents.len() as u64);
        }
        if self.sequences.len() < 2 {
            return lie("sequences", 0, "at least 2 offsets".into(), self.sequences.len() as u64);
        }
        if self.sequences[0] != 0 {
            return lie("sequences", 0, "0".into(), self.sequences[0] as u64);
        }
        for (at, w) in self.sequences.windows(2).enumerate() {
            let longest = (w[0] as u64).saturating_add(info.sequence_tokens);
            if w[1] <= w[0] || w[1] as u64 > longest {
                return lie("sequences", at + 1, format!("above {} and at most {longest}", w[0]), w[1] as u64);
            }
        }
        let end = self.sequences[self.sequences.len() - 1];
        if end as usize != total {
            return lie("sequences", self.sequences.len() - 1, total.to_string(), end as u64);
        }
        if let Some(at) = self.documents.windows(2).position(|w| w[1] < w[0]) {
            let before = self.documents[at];
            return lie("documents", at + 1, format!("at least {before}"), self.documents[at + 1] as u64);
        }
        let documents = count_documents(&self.documents);
        if documents != info.documents {
            return lie("documents", 0, format!("{} documents", info.documents), documents);
        }
        if let Some(at) = self.held_out.windows(2).position(|w| w[1] <= w[0]) {
            return lie("held_out", at + 1, format!("above {}", self.held_out[at]), self.held_out[at + 1] as u64);
        }
        if let Some(at) = self.held_out.iter().position(|number| self.documents.binary_search(number).is_err()) {
            return lie("held_out", at, "the number of a document".into(), self.held_out[at] as u64);
        }
        if self.held_out.len() as u64 >= documents {
            return lie("held_out", 0, format!("fewer than all {documents} documents"), self.held_out.len() as u64);
        }
        if let Some(at) = self.tokens.iter().position(|&t| t as usize >= info.model.vocab_size) {
            return lie("tokens", at, format!("an id below {}", info.model.vocab_size), self.tokens[at] as u64);
        }
        Ok(())
    }

    /// Where the recording lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `recording.json` says.
    pub fn info(&self) -> &RecordingInfo {
        &self.info
    }

    /// The recorded token ids.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Start offsets of the sequences in [`Recording::tokens`], with the number of tokens after them.
    pub fn sequence_offsets(&self) -> &[u32] {
        &self.sequences
    }

    /// The token ranges of the sequences, in order.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = std::ops::Range<usize>> + '_ {
        self.sequences.windows(2).map(|w| w[0] as usize..w[1] as usize)
    }

    /// For every token the number of the document that it comes from; never decreasing.
    pub fn documents(&self) -> &[u32] {
        &self.documents
    }

    /// Which tokens are trained on and which are held out: the same for everything that is made from the recording.
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// Whether the recorder decided what is held out. Recordings of version 1 do not say it, and those of other recorders need
    /// not: then the rule of `docs/recording-format.md` does.
    pub fn says_what_is_held_out(&self) -> bool {
        !self.held_out.is_empty()
    }

    /// Where the file of `layer` lies, or would lie.
    pub fn layer_path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("layer-{layer:03}.safetensors"))
    }

    /// Whether the file of `layer` is there (it is checked when opened).
    pub fn has_layer(&self, layer: usize) -> bool {
        self.layer_path(layer).is_file()
    }

    /// Starts writing a layer. Nothing is visible under its name before [`LayerWriter::finish`].
    pub fn layer_writer(&self, layer: usize) -> Result<LayerWriter, RecordingError> {
        self.check_layer(layer)?;
        LayerWriter::create(&self.layer_path(layer), &self.info, layer)
    }

    /// Opens and checks a layer. Activity and magnitudes are read into memory, inputs when asked for.
    pub fn layer(&self, layer: usize) -> Result<LayerRecording, RecordingError> {
        self.check_layer(layer)?;
        if !self.has_layer(layer) {
            return Err(RecordingError::NotRecorded { dir: self.dir.clone(), layer });
        }
        LayerRecording::open(&self.layer_path(layer), &self.info, layer)
    }

    /// Deletes a layer's file.
    pub fn remove_layer(&self, layer: usize) -> Result<(), RecordingError> {
        let path = self.layer_path(layer);
        std::fs::remove_file(&path).map_err(|e| RecordingError::io(&path, e))
    }

    fn check_layer(&self, layer: usize) -> Result<(), RecordingError> {
        let layers = self.info.model.layers.len();
        if layer < layers { Ok(()) } else { Err(RecordingError::NoSuchLayer { layer, layers }) }
    }
}

fn count_documents(documents: &[u32]) -> u64 {
    let changes = documents.windows(2).filter(|w| w[1] != w[0]).count() as u64;
    if documents.is_empty() { 0 } else { changes + 1 }
}

fn check_format(path: &Path, found: Option<&str>, expected: &'static str) -> Result<(), RecordingError> {
    if found == Some(expected) {
        return Ok(());
    }
    let found = found.unwrap_or("nothing").chars().take(60).collect();
    Err(RecordingError::Format { path: path.to_path_buf(), expected, found })
}

fn check_version(path: &Path, found: Option<u64>) -> Result<(), RecordingError> {
    match found {
        Some(v) if VERSIONS_READ.contains(&u32::try_from(v).unwrap_or(u32::MAX)) => Ok(()),
        Some(found) if found > VERSION as u64 => {
            Err(RecordingError::TooNew { path: path.to_path_buf(), found, newest: VERSION })
        }
        found => Err(RecordingError::Version { path: path.to_path_buf(), found }),
    }
}

fn check_id(path: &Path, found: Option<&str>, expected: &str) -> Result<(), RecordingError> {
    if found == Some(expected) {
        return Ok(());
    }
    let found = found.unwrap_or("none").chars().take(60).collect();
    Err(RecordingError::Mixed { path: path.to_path_buf(), expected: expected.into(), found })
}

#[cfg(test)]
mod tests;
