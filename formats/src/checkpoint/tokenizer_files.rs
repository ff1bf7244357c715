//! Finding a checkpoint's tokenizer and reading its files within bounds. What they mean is for a tokenizer library.

use std::path::Path;

use super::error::CheckpointError;
use super::file::read_small;
use super::python_json;

/// Longest `tokenizer.json`; the largest published ones have some 40 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
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
}

impl TokenizerFiles {
    /// Read the tokenizer of the checkpoint in `dir`: `tokenizer.json` if there is one, else `vocab.json` with `merges.txt`.
    ///
    /// # Errors
    /// `NoTokenizer`, `SentencePiece`, or what is wrong with a file.
    pub fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let source = if let Some(json) = read_json(dir, "tokenizer.json", TOKENIZER_BYTES_MAX)? {
            TokenizerSource::TokenizerJson(json)
        } else {
            let vocab = read_json(dir, "vocab.json", SIDE_BYTES_MAX)?;
            let merges = read_small(dir, "merges.txt", SIDE_BYTES_MAX)?;
            let (Some(vocab), Some((file, merges))) = (vocab, merges) else {
                let dir = dir.to_owned();
                return Err(match dir.join("tokenizer.model").exists() {
                    true => CheckpointError::SentencePiece { dir },
                    false => CheckpointError::NoTokenizer { dir },
                });
            };
            let merges = String::from_utf8(merges).map_err(|e| CheckpointError::Json {
                path: file.path,
                reason: format!("{e}. Take the original again"),
            })?;
            TokenizerSource::VocabMerges { vocab, merges }
        };
        Ok(Self {
            source,
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
