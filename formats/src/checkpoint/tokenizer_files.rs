//! Finding a checkpoint's tokenizer and reading its files within bounds. What they mean is for a tokenizer library.

use std::path::Path;

use super::error::CheckpointError;
use super::file::read_small;
use super::python_json;
use super::read_config;

/// Longest `tokenizer.json`; the largest published ones have some 40 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Longest `tokenizer.model`; the largest published ones have 4 MB.
const SENTENCE_PIECE_BYTES_MAX: u64 = 16 << 20;
/// Longest of the other files.
const SIDE_BYTES_MAX: u64 = 64 << 20;

/// A tokenizer as a checkpoint holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerFiles {
    /// The tokenizer proper.
    pub source: TokenizerSource,
    /// `tokenizer_config.json`, well-formed JSON.
    pub tokenizer_config: Option<Vec<u8>>,
    /// `special_tokens_map.json`, well-formed JSON.
    pub special_tokens_map: Option<Vec<u8>>,
    /// `added_tokens.json`, well-formed JSON.
    pub added_tokens: Option<Vec<u8>>,
    /// `model_type` of `config.json`: families have tokenizers of their own.
    pub model_type: String,
    /// `tokenizer_class` of `config.json`.
    pub model_tokenizer_class: Option<String>,
}

/// Contents of the tokenizer proper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerSource {
    /// `tokenizer.json`, well-formed JSON.
    TokenizerJson(Vec<u8>),
    /// The older pair of byte-level BPE.
    VocabMerges {
        /// `vocab.json`, well-formed JSON.
        vocab: Vec<u8>,
        /// `merges.txt`, UTF-8.
        merges: String,
    },
    /// `tokenizer.model` of sentencepiece.
    SentencePiece(Vec<u8>),
}

impl TokenizerSource {
    /// The files it was read from.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TokenizerJson(_) => "tokenizer.json",
            Self::VocabMerges { .. } => "vocab.json with merges.txt",
            Self::SentencePiece(_) => "tokenizer.model",
        }
    }
}

impl TokenizerFiles {
    /// Read the tokenizer of the checkpoint in `dir`: `tokenizer.json` if there is one, else `tokenizer.model`, else `vocab.json` with
    /// `merges.txt`.
    ///
    /// # Errors
    /// `NoTokenizer`, or what is wrong with a file.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let source = if let Some(json) = read_json(dir, "tokenizer.json", TOKENIZER_BYTES_MAX)? {
            TokenizerSource::TokenizerJson(json)
        } else if let Some((_, model)) = read_small(dir, "tokenizer.model", SENTENCE_PIECE_BYTES_MAX)? {
            TokenizerSource::SentencePiece(model)
        } else {
            let vocab = read_json(dir, "vocab.json", SIDE_BYTES_MAX)?;
            let merges = read_small(dir, "merges.txt", SIDE_BYTES_MAX)?;
            let (Some(vocab), Some((file, merges))) = (vocab, merges) else {
                return Err(CheckpointError::NoTokenizer { dir: dir.to_owned() });
            };
            let merges = String::from_utf8(merges).map_err(|e| CheckpointError::Json {
                path: file.path,
                reason: format!("{e}. Get the original again"),
            })?;
            TokenizerSource::VocabMerges { vocab, merges }
        };
        let config = read_config(dir, "config.json")?;
        let text = |key: &str| config.as_ref()?.1.get(key)?.as_str().map(str::to_owned);
        Ok(Self {
            source,
            model_type: text("model_type").unwrap_or_default(),
            model_tokenizer_class: text("tokenizer_class"),
            tokenizer_config: read_json(dir, "tokenizer_config.json", SIDE_BYTES_MAX)?,
            special_tokens_map: read_json(dir, "special_tokens_map.json", SIDE_BYTES_MAX)?,
            added_tokens: read_json(dir, "added_tokens.json", SIDE_BYTES_MAX)?,
        })
    }
}

fn read_json(dir: &Path, name: &str, limit: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    let Some((file, json)) = read_small(dir, name, limit)? else { return Ok(None) };
    python_json::standardised(json).map(Some).map_err(|reason| CheckpointError::Json { path: file.path, reason })
}
