//! `tokenizer.model`: sentencepiece's own file, a small protobuf, as the parts of a `tokenizer.json`.
//!
//! Two ways lead there, as in transformers 5: a class with merges takes vocabulary and merges alone and brings the other parts itself
//! ([`SentencePiece::by_order`]); without a class everything follows from the file ([`SentencePiece::as_backend`]).

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

use flashlm::text::ADDED_BYTES_MAX;

use super::TokenizerError;
use super::rebuilt::from_metaspace;
use super::side_files::{AddedToken, SideFiles};

/// Longest piece, in characters: merges are looked for at every place of a piece. Published ones have some 30.
const PIECE_CHARS_MAX: usize = 128;
/// Most merges that are made of the pieces: each takes hundreds of bytes, and a file of 16 MiB can stand for ten millions.
/// Published: 600 000.
const MERGES_MAX: usize = 2 << 20;

/// What of sentencepiece_model.proto is needed.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40", default = "0")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41", default = "1")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    eos_id: Option<i32>,
    #[prost(string, optional, tag = "45", default = "<unk>")]
    unk_piece: Option<String>,
    #[prost(string, optional, tag = "46", default = "<s>")]
    bos_piece: Option<String>,
    #[prost(string, optional, tag = "47", default = "</s>")]
    eos_piece: Option<String>,
}

const UNIGRAM: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escape_whitespaces: Option<bool>,
}

/// A sentencepiece model.
pub(super) struct SentencePiece {
    pieces: Vec<Piece>,
    trainer: TrainerSpec,
    normalizer: NormalizerSpec,
}

impl SentencePiece {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let invalid = |reason: String| TokenizerError::Invalid { file: "tokenizer.model", reason };
        let model = ModelProto::decode(bytes).map_err(|e| invalid(format!("it is not a SentencePiece model: {e}")))?;
        if model.pieces.is_empty() {
            return Err(invalid("it is not a SentencePiece model: it has no pieces".into()));
        }
        if let Some(long) = model.pieces.iter().find(|piece| piece.piece().chars().count() > PIECE_CHARS_MAX) {
            let length = long.piece().chars().count();
            return Err(invalid(format!("a piece of {length} characters; at most {PIECE_CHARS_MAX} are allowed")));
        }
        let is_added = |piece: &&Piece| matches!(piece.kind(), CONTROL | USER_DEFINED);
        let added: usize = model.pieces.iter().filter(is_added).map(|piece| piece.piece().len()).sum();
        if added > ADDED_BYTES_MAX {
            return Err(invalid(format!(
                "its control and user-defined pieces have {added} bytes; at most {ADDED_BYTES_MAX} are allowed"
            )));
        }
        let (trainer, normalizer) = (model.trainer_spec.unwrap_or_default(), model.normalizer_spec.unwrap_or_default());
        Ok(Self { pieces: model.pieces, trainer, normalizer })
    }

    /// Control symbols, which are special, and where `user_defined` the symbols that users defined.
    pub(super) fn added_tokens(&self, user_defined: bool) -> Vec<AddedToken> {
        let kinds = self.pieces.iter().filter(|p| p.kind() == CONTROL || (user_defined && p.kind() == USER_DEFINED));
        kinds
            .map(|piece| AddedToken {
                special: piece.kind() == CONTROL,
                normalized: Some(false),
                ..AddedToken::special(piece.piece())
            })
            .collect()
    }

    /// Ids by piece, and every way to put a piece together from two others, in the order of the ids.
    ///
    /// # Errors
    /// If there are too many ways.
    pub(super) fn by_order(&self) -> Result<(Map<String, Value>, Value), TokenizerError> {
        let ids = self.ids(|_| true);
        let mut pieces: Vec<(&str, usize)> = ids.iter().map(|(piece, id)| (*piece, *id)).collect();
        pieces.sort_unstable_by_key(|(_, id)| *id);
        // The shorter left half comes first.
        let merges = pieces
            .iter()
            .flat_map(|(piece, _)| halves(piece))
            .filter(|(left, right)| ids.contains_key(left) && ids.contains_key(right));
        let merges = bounded(merges)?.into_iter().map(|(left, right)| json!([left, right])).collect();
        let vocab = pieces.iter().map(|(piece, id)| ((*piece).to_owned(), json!(id))).collect();
        Ok((vocab, merges))
    }

    fn ids(&self, is_wanted: impl Fn(&Piece) -> bool) -> HashMap<&str, usize> {
        let wanted = self.pieces.iter().enumerate().filter(|(_, piece)| is_wanted(piece));
        wanted.map(|(id, piece)| (piece.piece(), id)).collect()
    }

    /// The parts of a tokenizer that follows the file's own settings. What `side` says of added tokens is changed as transformers
    /// changes it: special tokens that nobody names get the file's names.
    ///
    /// # Errors
    /// If there are too many merges.
    pub(super) fn as_backend(&self, side: &mut SideFiles) -> Result<Map<String, Value>, TokenizerError> {
        let (trainer, spec) = (&self.trainer, &self.normalizer);
        let is_unigram = trainer.model_type() == UNIGRAM;
        let names = if is_unigram { self.names(&SideFiles::default()) } else { self.names(side) };
        let user_defined: Vec<&str> = self
            .pieces
            .iter()
            .zip(&names)
            .filter(|(piece, _)| piece.kind() == USER_DEFINED)
            .map(|(_, name)| name.as_str())
            .collect();
        let model = if is_unigram {
            let vocab: Vec<Value> = self.pieces.iter().map(|p| json!([p.piece(), f64::from(p.score())])).collect();
            json!({"type": "Unigram", "unk_id": trainer.unk_id(), "vocab": vocab, "byte_fallback": trainer.byte_fallback()})
        } else {
            let vocab: Map<String, Value> =
                names.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
            json!({
                "type": "BPE", "dropout": null, "unk_token": trainer.unk_piece(), "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": trainer.byte_fallback(),
                "ignore_merges": !user_defined.is_empty(), "vocab": vocab, "merges": self.merges_by_score(&names)?,
            })
        };
        let legacy = side.config.get("legacy").is_none_or(|legacy| legacy.as_bool() == Some(true));
        let prefix = spec.add_dummy_prefix();
        if prefix {
            // Found in the raw text, so that each piece between them gets its own prefix.
            side.added.values_mut().for_each(|token| token.normalized = Some(false));
        }
        for (name, id, piece) in [
            ("bos_token", trainer.bos_id(), trainer.bos_piece()),
            ("eos_token", trainer.eos_id(), trainer.eos_piece()),
            ("unk_token", trainer.unk_id(), trainer.unk_piece()),
        ] {
            if id >= 0 {
                side.config.entry(name).or_insert_with(|| piece.into());
            }
        }
        let parts = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "post_processor": null,
            "normalizer": {"type": "Sequence", "normalizers": self.normalizers(prefix && legacy)},
            "pre_tokenizer": pre_tokenizer(prefix.then_some(legacy), &user_defined),
            "decoder": from_metaspace(trainer.byte_fallback(), prefix),
            "model": model,
        });
        Ok(match parts {
            Value::Object(parts) => parts,
            _ => Map::new(),
        })
    }

    /// The pieces' names; a configuration may give a place-holder another one.
    fn names(&self, side: &SideFiles) -> Vec<String> {
        let renamed = |id: usize| side.added.get(&(id as u64)).map(|token| token.content.as_str());
        let kept: std::collections::HashSet<&str> =
            self.pieces.iter().enumerate().filter(|(id, _)| renamed(*id).is_none()).map(|(_, p)| p.piece()).collect();
        let name = |(id, piece): (usize, &Piece)| {
            renamed(id).filter(|name| !kept.contains(name)).unwrap_or(piece.piece()).to_owned()
        };
        self.pieces.iter().enumerate().map(name).collect()
    }

    /// Every way to put a normal piece together from two others, the best score first.
    fn merges_by_score(&self, names: &[String]) -> Result<Value, TokenizerError> {
        let normal: HashMap<&str, (f32, usize)> = self
            .pieces
            .iter()
            .enumerate()
            .filter(|(_, piece)| piece.kind() == NORMAL)
            .map(|(id, piece)| (names[id].as_str(), (piece.score(), id)))
            .collect();
        let merges = normal
            .iter()
            .flat_map(|(token, (score, id))| halves(token).map(|(left, right)| (*score, *id, left, right)))
            .filter(|(_, _, left, right)| normal.contains_key(left) && normal.contains_key(right));
        let mut merges: Vec<(f32, usize, &str, &str)> = bounded(merges)?;
        merges.sort_unstable_by(|a, b| {
            let by_score = b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal);
            by_score.then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
        });
        Ok(merges.into_iter().map(|(_, _, left, right)| json!([left, right])).collect())
    }

    fn normalizers(&self, double_prefix: bool) -> Vec<Value> {
        let spec = &self.normalizer;
        let replace =
            |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let mut steps = Vec::new();
        if !spec.precompiled_charsmap().is_empty() {
            let table = STANDARD.encode(spec.precompiled_charsmap());
            steps.push(json!({"type": "Precompiled", "precompiled_charsmap": table}));
        }
        if spec.remove_extra_whitespaces() {
            steps.push(replace(json!({"Regex": r"\A +| +\z"}), ""));
            steps.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        if spec.escape_whitespaces() {
            steps.push(replace(json!({"String": " "}), "▁"));
        }
        if double_prefix {
            // Metaspace leaves out the prefix where a text begins with one; sentencepiece does not.
            steps.push(replace(json!({"Regex": r"\A▁"}), "▁▁"));
        }
        steps
    }
}

/// All of them, unless they are more than are followed.
fn bounded<T>(merges: impl Iterator<Item = T>) -> Result<Vec<T>, TokenizerError> {
    let merges: Vec<T> = merges.take(MERGES_MAX + 1).collect();
    if merges.len() > MERGES_MAX {
        let reason = format!("its pieces can be merged in more than {MERGES_MAX} ways, the most that are supported");
        return Err(TokenizerError::Invalid { file: "tokenizer.model", reason });
    }
    Ok(merges)
}

/// All ways to cut a text in two, the shorter left half first.
fn halves(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.char_indices().skip(1).map(|(at, _)| text.split_at(at))
}

/// `prefix` says whether there is one, and if so whether for each piece between added tokens.
fn pre_tokenizer(prefix: Option<bool>, user_defined: &[&str]) -> Value {
    let mut steps = Vec::new();
    if let Some(always) = prefix {
        let scheme = if always { PrependScheme::Always } else { PrependScheme::First };
        steps.push(json!(Metaspace::new('▁', scheme, false)));
    }
    if !user_defined.is_empty() {
        let mut longest_first = user_defined.to_vec();
        longest_first.sort_by_key(|piece| Reverse(piece.chars().count()));
        let pattern: Vec<String> = longest_first.into_iter().map(escaped).collect();
        let pattern = json!({"Regex": pattern.join("|")});
        steps.push(json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false}));
    }
    if steps.is_empty() { Value::Null } else { json!({"type": "Sequence", "pretokenizers": steps}) }
}

/// A text as a pattern that means itself.
fn escaped(text: &str) -> String {
    text.chars()
        .flat_map(|c| (c.is_ascii_punctuation() && !"<>_".contains(c)).then_some('\\').into_iter().chain([c]))
        .collect()
}
