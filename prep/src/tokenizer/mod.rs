//! A checkpoint's tokenizer as `tokenizer.json`, the one form that a bundle holds.
//!
//! A checkpoint says in many places what ids a text has: `tokenizer.json`, or the older pairs and models without it; the class that
//! `tokenizer_config.json` or the model's family names; tokens added and special tokens named beside it; `add_bos_token`. What
//! transformers 5 makes of all that (`AutoTokenizer`) is put into one `tokenizer.json` here, so that the runtime has one
//! truth and no family. Where transformers ignores a setting, a note says so. `config.json`'s `bos_token_id` counts for
//! nothing, there and here.

mod build;
mod class;
#[cfg(test)]
mod parity;
mod rebuilt;
mod sentencepiece;
mod side_files;

use std::collections::HashSet;

use flashlm::error::RuntimeError;
use flashlm::text::Tokenizer;
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, TokenizerFiles, TokenizerSource};
use serde_json::{Map, Value};

/// Why there is no tokenizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The files are missing or malformed.
    #[error(transparent)]
    Files(#[from] CheckpointError),
    /// The tokenizer library refuses them.
    #[error(
        "{file} is not a tokenizer that can be used: {reason}. Download it again, or save the tokenizer with a recent transformers"
    )]
    Invalid {
        /// Which file.
        file: &'static str,
        /// What the library says.
        reason: String,
    },
    /// `vocab.json` and `merges.txt` of another scheme than GPT-2's and its kin.
    #[error(
        "vocab.json and merges.txt belong to a {class}; only those of GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer and CodeGenTokenizer \
         are understood. Load the tokenizer in transformers and save_pretrained, which writes tokenizer.json"
    )]
    Class {
        /// `tokenizer_class` of the configuration.
        class: String,
    },
    /// An added token would get another id than its file states.
    #[error(
        "the added token {content:?} states id {stated}, but the library would give it {}: ids of added tokens must continue the vocabulary's, without a gap; \
         loading the tokenizer in transformers and save_pretrained writes it so", used.map_or("none".to_owned(), |id| id.to_string())
    )]
    AddedToken {
        /// The token.
        content: String,
        /// Id in the file.
        stated: u64,
        /// Id that the library gives it.
        used: Option<u32>,
    },
    /// The tokenizer knows ids that the model has no embedding for.
    #[error(
        "the tokenizer has token ids up to {highest}; the model's vocabulary has {vocab_size}: they do not belong together"
    )]
    Vocabulary {
        /// Highest token id.
        highest: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
}

/// Something about a tokenizer that is no error and that its user should be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerNote {
    /// A class that brings parts of its own in transformers.
    #[error("{class} is not known here: tokenizer.json is followed as it is, where transformers replaces parts of it")]
    Class {
        /// The class.
        class: String,
    },
    /// A vocabulary of another kind than the class is for.
    #[error(
        "tokenizer.json holds a {kind} and the tokenizer's class, {class}, is for BPE: tokenizer.json is followed as it is"
    )]
    Kind {
        /// The class.
        class: &'static str,
        /// The kind.
        kind: String,
    },
    /// A setting that transformers ignores.
    #[error(
        "tokenizer_config.json says {setting}, and tokenizer.json says otherwise: tokenizer.json is followed, as by transformers 5"
    )]
    Ignored {
        /// Name and value.
        setting: String,
    },
    /// Tokens beyond the model's embedding.
    #[error("{} added token(s) have no embedding in the model and are ordinary text, the first is {}", .0.len(), .0.first().map_or("", String::as_str))]
    OutOfVocabulary(Vec<String>),
}

/// The tokenizer that a bundle gets.
#[derive(Clone, Debug)]
pub struct PackedTokenizer {
    /// The `tokenizer.json`.
    pub json: Vec<u8>,
    /// What the user should be told.
    pub notes: Vec<TokenizerNote>,
}

/// The tokenizer of `checkpoint` as the contents of a `tokenizer.json`, parsed once to be sure of it.
///
/// # Errors
/// Missing or malformed files, and a tokenizer that does not go with the model.
pub fn tokenizer_json(checkpoint: &Checkpoint) -> Result<Vec<u8>, TokenizerError> {
    packed_tokenizer(checkpoint).map(|packed| packed.json)
}

/// The same, with notes.
///
/// # Errors
/// Those of [`tokenizer_json`].
pub fn packed_tokenizer(checkpoint: &Checkpoint) -> Result<PackedTokenizer, TokenizerError> {
    let vocab_size = checkpoint.spec().vocab_size;
    let (packed, tokenizer) = from_files(&checkpoint.tokenizer_files()?, vocab_size)?;
    let highest = tokenizer.highest_id().into_iter().chain(tokenizer.first_ids().iter().copied()).max();
    match highest {
        Some(highest) if highest as usize >= vocab_size => Err(TokenizerError::Vocabulary { highest, vocab_size }),
        _ => Ok(packed),
    }
}

fn from_files(files: &TokenizerFiles, vocab_size: usize) -> Result<(PackedTokenizer, Tokenizer), TokenizerError> {
    let file = files.source.name();
    let invalid = |error: RuntimeError| match error {
        RuntimeError::Tokenizer(reason) => TokenizerError::Invalid { file, reason },
        other => TokenizerError::Invalid { file, reason: other.to_string() },
    };
    if let TokenizerSource::TokenizerJson(json) = &files.source {
        // Before anything is made of it.
        Tokenizer::check_limits(json).map_err(invalid)?;
    }
    let build::Built { json: mut tokenizer, mut notes, of_class } = build::build(files)?;
    let mut out_of_vocabulary = take_out_of_vocabulary(&mut tokenizer, vocab_size);
    let of_class: HashSet<String> = of_class.into_iter().collect();
    out_of_vocabulary.retain(|token| !of_class.contains(token));
    if !out_of_vocabulary.is_empty() {
        notes.push(TokenizerNote::OutOfVocabulary(out_of_vocabulary));
    }
    let added = tokenizer.get("added_tokens").cloned();
    let json = Value::Object(tokenizer).to_string().into_bytes();
    let tokenizer = Tokenizer::from_json(&json).map_err(invalid)?;
    check_added_ids(added.as_ref(), &tokenizer)?;
    Ok((PackedTokenizer { json, notes }, tokenizer))
}

/// Takes out added tokens that the model has no embedding for. Copies of Llama 2 have such a one, `<pad>`, added for training in batches;
/// in a text it is ordinary text then. Gives their names.
fn take_out_of_vocabulary(tokenizer: &mut Map<String, Value>, vocab_size: usize) -> Vec<String> {
    let Some(added) = tokenizer.get_mut("added_tokens").and_then(Value::as_array_mut) else { return Vec::new() };
    let is_stranger = |token: &Value| token["id"].as_u64().is_some_and(|id| id >= vocab_size as u64);
    let out_of_vocabulary: Vec<String> =
        added.iter().filter(|t| is_stranger(t)).filter_map(|t| t["content"].as_str().map(str::to_owned)).collect();
    added.retain(|token| !is_stranger(token));
    if let Some(vocab) = tokenizer.get_mut("model").and_then(|model| model.get_mut("vocab")?.as_object_mut()) {
        out_of_vocabulary.iter().for_each(|name| _ = vocab.remove(name));
    }
    out_of_vocabulary
}

/// The library renumbers added tokens whose ids leave a hole behind the vocabulary, and says nothing.
fn check_added_ids(added: Option<&Value>, tokenizer: &Tokenizer) -> Result<(), TokenizerError> {
    for token in added.and_then(Value::as_array).into_iter().flatten() {
        let (Some(content), Some(stated)) = (token["content"].as_str(), token["id"].as_u64()) else { continue };
        let used = tokenizer.id_of(content);
        if used.map(u64::from) != Some(stated) {
            return Err(TokenizerError::AddedToken { content: content.chars().take(60).collect(), stated, used });
        }
    }
    Ok(())
}

fn object(file: &'static str, json: Option<&[u8]>) -> Result<Map<String, Value>, TokenizerError> {
    let Some(json) = json else { return Ok(Map::new()) };
    serde_json::from_slice(json).map_err(|e| TokenizerError::Invalid { file, reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    use tokenizers::Tokenizer as HfTokenizer;

    fn example() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples/tiny-opt")
    }

    /// Of no family in particular, with nothing beside.
    fn files(source: TokenizerSource) -> TokenizerFiles {
        TokenizerFiles {
            source,
            tokenizer_config: None,
            special_tokens_map: None,
            added_tokens: None,
            model_type: String::new(),
            model_tokenizer_class: None,
        }
    }

    fn pair(vocab: &str, merges: &str) -> TokenizerFiles {
        files(TokenizerSource::VocabMerges { vocab: vocab.into(), merges: merges.into() })
    }

    /// tiny-opt's tokenizer from the older pair of files.
    fn rebuilt() -> HfTokenizer {
        let dir = tempfile::tempdir().unwrap();
        for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
            std::fs::copy(example().join(name), dir.path().join(name)).unwrap();
        }
        let json = from_files(&TokenizerFiles::read(dir.path()).unwrap(), usize::MAX).unwrap().0.json;
        HfTokenizer::from_bytes(json).unwrap()
    }

    #[test]
    fn the_older_files_give_the_same_ids_and_texts() {
        let checkpoint = Checkpoint::open(example()).unwrap();
        let shipped = HfTokenizer::from_bytes(tokenizer_json(&checkpoint).unwrap()).unwrap();
        let rebuilt = rebuilt();
        let story = std::fs::read_to_string(example().join("../synthetic.txt")).unwrap();
        for text in [
            "",
            " ",
            "Once upon a time",
            " leading, trailing ",
            "tabs\tand\n\nnew lines\r\n",
            "don't can't I'll we've 12345 3.14",
            "Übergröße, naïve café, ¡señor!",
            "日本語 и русский, العربية, 한국어",
            "🙂👩‍👩‍👧‍👦 \u{200b}\u{feff} e\u{301}",
            "</s>one</s> two<pad>three </s>",
            "</s",
            "<pad",
            "\0\u{1}\u{7f}",
            &story[..20_000],
        ] {
            let expected = shipped.encode(text, false).unwrap();
            let found = rebuilt.encode(text, false).unwrap();
            assert_eq!(found.get_ids(), expected.get_ids(), "{text:?}");
            for skip in [false, true] {
                let (a, b) = (rebuilt.decode(found.get_ids(), skip), shipped.decode(expected.get_ids(), skip));
                assert_eq!(a.unwrap(), b.unwrap(), "{text:?}");
            }
        }
        assert_eq!(rebuilt.token_to_id("</s>"), Some(2));
    }

    #[test]
    fn added_tokens_come_from_every_file() {
        let vocab = r#"{"a": 0, "b": 1, "ab": 2, "<end>": 3, "<m>": 4}"#;
        let older = TokenizerFiles {
            special_tokens_map: Some(
                br#"{"eos_token": {"content": "<end>"}, "bos_token": "<m>", "unk_token": null, "additional_special_tokens": ["<m>"]}"#.to_vec(),
            ),
            added_tokens: Some(br#"{"<later>": 5}"#.to_vec()),
            ..pair(vocab, "#version: 0.2\na b\n")
        };
        let library = |files| HfTokenizer::from_bytes(from_files(&files, usize::MAX).unwrap().0.json).unwrap();
        let ids = |tokenizer: &HfTokenizer, text| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        let tokenizer = library(older.clone());
        assert_eq!(ids(&tokenizer, "bb<end>b<m><later>b"), [1, 1, 3, 1, 4, 5, 1]);
        assert_eq!(tokenizer.decode(&[2, 3, 5], true).unwrap(), "ab<later>");
        // With an added_tokens_decoder it alone counts.
        let decoder = br#"{"eos_token": "<end>", "bos_token": null, "unk_token": null,
            "added_tokens_decoder": {"5": {"content": "<x>", "special": true, "lstrip": true}}}"#;
        let tokenizer = library(TokenizerFiles { tokenizer_config: Some(decoder.to_vec()), ..older });
        assert_eq!(ids(&tokenizer, "aab<end>ba <x>"), [0, 2, 3, 1, 0, 5]);
    }

    #[test]
    fn what_is_passed_over_is_said() {
        let tokenizer = std::fs::read(example().join("tokenizer.json")).unwrap();
        let notes = |config: &str| {
            let source = TokenizerSource::TokenizerJson(tokenizer.clone());
            let files = TokenizerFiles { tokenizer_config: Some(config.into()), ..files(source) };
            let notes = from_files(&files, usize::MAX).unwrap().0.notes;
            notes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        };
        let agreeing =
            r#"{"bos_token": "</s>", "add_bos_token": true, "add_eos_token": false, "add_prefix_space": false}"#;
        assert_eq!(notes(agreeing), "");
        let said =
            notes(r#"{"bos_token": "</s>", "add_bos_token": false, "add_eos_token": true, "add_prefix_space": true}"#);
        for setting in ["add_bos_token: false", "add_eos_token: true", "add_prefix_space: true"] {
            assert!(said.contains(setting), "{said}");
        }
        assert!(notes(r#"{"tokenizer_class": "T5Tokenizer"}"#).contains("T5Tokenizer is not known here"));
        let words = br#"{"pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"#;
        let source = TokenizerSource::TokenizerJson(words.to_vec());
        let (packed, tokenizer) = from_files(&TokenizerFiles { model_type: "opt".into(), ..files(source) }, 1).unwrap();
        assert_eq!(tokenizer.encode("a b").unwrap(), [0, 0]);
        assert_eq!(packed.notes, [TokenizerNote::Kind { class: "GPT2Tokenizer", kind: "WordLevel".into() }]);
    }

    #[test]
    fn what_cannot_be_a_tokenizer_is_refused() {
        let files = |vocab: &str, merges: &str, config: &str| TokenizerFiles {
            tokenizer_config: Some(config.into()),
            ..pair(vocab, merges)
        };
        let refused = |files| from_files(&files, usize::MAX).map(drop).expect_err("it was taken");
        let unknown = refused(files(r#"{"a": 0}"#, "a b", "{}"));
        assert!(matches!(unknown, TokenizerError::Invalid { file: "vocab.json with merges.txt", .. }), "{unknown}");
        assert!(matches!(refused(files("[]", "", "{}")), TokenizerError::Invalid { file: "vocab.json", .. }));
        assert!(matches!(refused(files(r#"{"a": -1}"#, "", "{}")), TokenizerError::Invalid { .. }));
        let class = refused(files("{}", "", r#"{"tokenizer_class": "CLIPTokenizer"}"#));
        assert!(matches!(class, TokenizerError::Class { .. }), "{class}");
    }

    #[test]
    fn added_tokens_that_would_be_renumbered_are_refused() {
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(example().join("tokenizer.json")).unwrap()).unwrap();
        let mut token = json["added_tokens"][0].clone();
        token["content"] = "<far>".into();
        token["id"] = 5000.into();
        json["added_tokens"].as_array_mut().unwrap().push(token);
        let source = TokenizerSource::TokenizerJson(json.to_string().into_bytes());
        let refused = from_files(&files(source), usize::MAX).map(drop).unwrap_err();
        assert!(matches!(refused, TokenizerError::AddedToken { stated: 5000, used: Some(4096), .. }), "{refused}");
    }

    #[test]
    fn an_added_token_beyond_the_embedding_is_ordinary_text() {
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(example().join("tokenizer.json")).unwrap()).unwrap();
        let mut token = json["added_tokens"][0].clone();
        token["content"] = "<extra>".into();
        token["id"] = 4096.into();
        json["added_tokens"].as_array_mut().unwrap().push(token);
        let ids = |vocab_size| {
            let source = TokenizerSource::TokenizerJson(json.to_string().into_bytes());
            let tokenizer = from_files(&files(source), vocab_size).unwrap().1;
            tokenizer.encode_bare("a<extra>").unwrap()
        };
        assert_eq!(ids(4097)[1], 4096);
        let without = ids(4096);
        assert!(without.len() > 2 && without.iter().all(|&id| id < 4096), "{without:?}");

        // As the older files have it.
        let files = TokenizerFiles { added_tokens: Some(br#"{"<a": 2}"#.to_vec()), ..pair(r#"{"a": 0, "<": 1}"#, "") };
        let tokenizer = from_files(&files, 2).unwrap().1;
        assert_eq!(tokenizer.encode("<aa").unwrap(), [1, 0, 0]);
        assert_eq!(tokenizer.highest_id(), Some(1));
    }

    #[test]
    fn a_tokenizer_of_another_model_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let quirk = example().join("../../tests/fixtures/quirks/opt-125m");
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(quirk.join(name), dir.path().join(name)).unwrap();
        }
        std::fs::copy(example().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let refused = tokenizer_json(&Checkpoint::open(dir.path()).unwrap()).unwrap_err();
        assert!(matches!(refused, TokenizerError::Vocabulary { highest: 4095, vocab_size: 192 }), "{refused}");
    }
}
