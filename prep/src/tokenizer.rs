//! A checkpoint's tokenizer as `tokenizer.json`, the one form that a bundle holds.
//!
//! Most checkpoints have that file. OPT as published has GPT-2's older pair instead, `vocab.json` and `merges.txt`, from which
//! the same tokenizer is built here. Post-processing is left out: a bundle's tokenizer is used without special tokens, and the
//! runtime itself puts `ModelSpec::bos` in front of a text.

use std::collections::BTreeMap;

use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, TokenizerFiles, TokenizerSource};
use flashlm_runtime::error::RuntimeError;
use flashlm_runtime::text::Tokenizer;
use serde_json::{Map, Value, json};

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
    /// `vocab.json` and `merges.txt` of another scheme than GPT-2's.
    #[error(
        "vocab.json and merges.txt belong to a {class}; only GPT2Tokenizer's are understood. Load the tokenizer in transformers \
         with use_fast=True and save_pretrained, which writes tokenizer.json"
    )]
    Class {
        /// `tokenizer_class` of the configuration.
        class: String,
    },
    /// An added token would get another id than its file states.
    #[error(
        "the added token {content:?} states id {stated}, but would be used as {used:?}: its ids must follow on the vocabulary's"
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

/// The tokenizer of `checkpoint` as the contents of a `tokenizer.json`, parsed once to be sure of it.
///
/// # Errors
/// Missing or malformed files, and a tokenizer that does not go with the model.
pub fn tokenizer_json(checkpoint: &Checkpoint) -> Result<Vec<u8>, TokenizerError> {
    let vocab_size = checkpoint.spec().vocab_size;
    let (json, tokenizer) = from_files(checkpoint.tokenizer_files()?, vocab_size)?;
    match tokenizer.highest_id() {
        Some(highest) if highest as usize >= vocab_size => Err(TokenizerError::Vocabulary { highest, vocab_size }),
        _ => Ok(json),
    }
}

fn from_files(files: TokenizerFiles, vocab_size: usize) -> Result<(Vec<u8>, Tokenizer), TokenizerError> {
    let (file, json) = match &files.source {
        TokenizerSource::TokenizerJson(json) => ("tokenizer.json", json.clone()),
        TokenizerSource::VocabMerges { vocab, merges } => {
            let description = byte_level_bpe(&files, vocab, merges)?;
            ("vocab.json with merges.txt", description.to_string().into_bytes())
        }
    };
    let json = without_strangers(json, vocab_size)?;
    let invalid = |error: RuntimeError| match error {
        RuntimeError::Tokenizer(reason) => TokenizerError::Invalid { file, reason },
        other => TokenizerError::Invalid { file, reason: other.to_string() },
    };
    let tokenizer = Tokenizer::from_json(&json).map_err(invalid)?;
    check_added_ids(&json, &tokenizer)?;
    Ok((json, tokenizer))
}

/// Takes out added tokens that the model has no embedding for. Copies of Llama 2 have such a one, `<pad>`, added for training in batches;
/// in a text it is ordinary text then.
fn without_strangers(json: Vec<u8>, vocab_size: usize) -> Result<Vec<u8>, TokenizerError> {
    let mut tokenizer = object("tokenizer.json", Some(&json))?;
    let Some(added) = tokenizer.get_mut("added_tokens").and_then(Value::as_array_mut) else { return Ok(json) };
    let is_stranger = |token: &Value| token["id"].as_u64().is_some_and(|id| id >= vocab_size as u64);
    let strangers: Vec<String> =
        added.iter().filter(|t| is_stranger(t)).filter_map(|t| t["content"].as_str().map(str::to_owned)).collect();
    if strangers.is_empty() {
        return Ok(json);
    }
    added.retain(|token| !is_stranger(token));
    if let Some(vocab) = tokenizer.get_mut("model").and_then(|model| model.get_mut("vocab")?.as_object_mut()) {
        strangers.iter().for_each(|name| _ = vocab.remove(name));
    }
    Ok(Value::Object(tokenizer).to_string().into_bytes())
}

/// The library renumbers added tokens whose ids leave a hole behind the vocabulary, and says nothing.
fn check_added_ids(json: &[u8], tokenizer: &Tokenizer) -> Result<(), TokenizerError> {
    let json = object("tokenizer.json", Some(json))?;
    for token in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let (Some(content), Some(stated)) = (token["content"].as_str(), token["id"].as_u64()) else { continue };
        let used = tokenizer.id_of(content);
        if used.map(u64::from) != Some(stated) {
            return Err(TokenizerError::AddedToken { content: content.chars().take(60).collect(), stated, used });
        }
    }
    Ok(())
}

/// GPT-2's byte-level BPE in the form of a `tokenizer.json`.
fn byte_level_bpe(files: &TokenizerFiles, vocab: &[u8], merges: &str) -> Result<Value, TokenizerError> {
    let config = object("tokenizer_config.json", files.tokenizer_config.as_deref())?;
    if let Some(class) = config.get("tokenizer_class").and_then(Value::as_str)
        && !["GPT2Tokenizer", "GPT2TokenizerFast"].contains(&class)
    {
        return Err(TokenizerError::Class { class: class.chars().take(60).collect() });
    }
    let add_prefix_space = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
    let mut vocab = object("vocab.json", Some(vocab))?;
    let merges: Vec<&str> = merges.lines().filter(|line| !line.is_empty() && !line.starts_with("#version")).collect();
    let added_tokens = added_tokens(files, &config, &vocab)?;
    // In the vocabulary too: the library numbers added tokens that are not in it as it likes, whatever id they state.
    for token in &added_tokens {
        if let Some(content) = token["content"].as_str() {
            vocab.entry(content).or_insert_with(|| token["id"].clone());
        }
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": true},
        "post_processor": template(&config, &added_tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    }))
}

/// The post-processor that `add_bos_token` and `add_eos_token` ask for.
fn template(config: &Map<String, Value>, added_tokens: &[Value]) -> Value {
    let token = |flag: &str, key: &str| {
        let name = match config.get(key) {
            Some(token) => token.as_str().or_else(|| token.get("content")?.as_str()),
            None => Some("<|endoftext|>"),
        };
        let wanted = config.get(flag).and_then(Value::as_bool).unwrap_or(false);
        added_tokens.iter().find(|token| wanted && token["content"].as_str() == name)
    };
    let (first, last) = (token("add_bos_token", "bos_token"), token("add_eos_token", "eos_token"));
    let piece = |token: &Value| json!({"SpecialToken": {"id": token["content"], "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let single: Vec<Value> = first.map(piece).into_iter().chain([sequence("A")]).chain(last.map(piece)).collect();
    let special: Map<String, Value> = first
        .into_iter()
        .chain(last)
        .filter_map(|token| {
            let name = token["content"].as_str()?;
            Some((name.to_owned(), json!({"id": name, "ids": [token["id"]], "tokens": [name]})))
        })
        .collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": [sequence("A"), sequence("B")], "special_tokens": special})
}

/// Tokens matched in the text before it is cut up, by id: those that the configuration calls special, and those added to the
/// vocabulary later. `<s>` and `<unk>` of OPT are not among them: they are in the vocabulary, but GPT-2's tokenizer, which OPT
/// names, never matches them in a text.
fn added_tokens(
    files: &TokenizerFiles,
    config: &Map<String, Value>,
    vocab: &Map<String, Value>,
) -> Result<Vec<Value>, TokenizerError> {
    const NAMES: [&str; 7] =
        ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let later = object("added_tokens.json", files.added_tokens.as_deref())?;
    let map = object("special_tokens_map.json", files.special_tokens_map.as_deref())?;
    let mut tokens: BTreeMap<u64, Value> = BTreeMap::new();
    let mut add = |id: Option<u64>, token: &Value, special: bool| {
        // Either a text or an object with `content` and flags.
        let content = token.as_str().or_else(|| token.get("content")?.as_str());
        let id = id.or_else(|| later.get(content?).or_else(|| vocab.get(content?))?.as_u64());
        let (Some(content), Some(id)) = (content, id) else { return };
        let flag = |name: &str, default: bool| token.get(name).and_then(Value::as_bool).unwrap_or(default);
        tokens.entry(id).or_insert_with(|| {
            json!({
                "id": id, "content": content, "single_word": flag("single_word", false), "lstrip": flag("lstrip", false),
                "rstrip": flag("rstrip", false), "normalized": flag("normalized", !special), "special": flag("special", special),
            })
        });
    };
    if let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) {
        for (id, token) in decoder {
            add(id.parse().ok(), token, false);
        }
    }
    for source in [config, &map] {
        for token in NAMES.iter().filter_map(|name| source.get(*name)) {
            add(None, token, true);
        }
        for token in source.get("additional_special_tokens").and_then(Value::as_array).into_iter().flatten() {
            add(None, token, true);
        }
    }
    for (content, id) in &later {
        add(id.as_u64(), &Value::String(content.clone()), false);
    }
    Ok(tokens.into_values().collect())
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

    /// tiny-opt's tokenizer from the older pair of files.
    fn rebuilt() -> HfTokenizer {
        let dir = tempfile::tempdir().unwrap();
        for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
            std::fs::copy(example().join(name), dir.path().join(name)).unwrap();
        }
        let json = from_files(TokenizerFiles::read(dir.path()).unwrap(), usize::MAX).unwrap().0;
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
        let files = TokenizerFiles {
            source: TokenizerSource::VocabMerges {
                vocab: br#"{"a": 0, "b": 1, "ab": 2, "<end>": 3, "<m>": 4}"#.to_vec(),
                merges: "#version: 0.2\na b\n".into(),
            },
            tokenizer_config: Some(
                br#"{"added_tokens_decoder": {"7": {"content": "<x>", "special": true, "lstrip": true}}}"#.to_vec(),
            ),
            special_tokens_map: Some(
                br#"{"eos_token": {"content": "<end>"}, "additional_special_tokens": ["<m>", "<nowhere>"]}"#.to_vec(),
            ),
            added_tokens: Some(br#"{"<later>": 5}"#.to_vec()),
        };
        let tokenizer = HfTokenizer::from_bytes(from_files(files, usize::MAX).unwrap().0).unwrap();
        let ids = |text| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids("aab<end>b<m><later>a <x>"), [0, 2, 3, 1, 4, 5, 0, 7]);
        assert_eq!(tokenizer.decode(&[2, 3, 5], true).unwrap(), "ab<later>");
    }

    #[test]
    fn what_cannot_be_a_tokenizer_is_refused() {
        let files = |vocab: &str, merges: &str, config: &str| TokenizerFiles {
            source: TokenizerSource::VocabMerges { vocab: vocab.into(), merges: merges.into() },
            tokenizer_config: Some(config.into()),
            special_tokens_map: None,
            added_tokens: None,
        };
        let refused = |files| from_files(files, usize::MAX).map(drop).expect_err("it was taken");
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
        let files = TokenizerFiles { source, tokenizer_config: None, special_tokens_map: None, added_tokens: None };
        let refused = from_files(files, usize::MAX).map(drop).unwrap_err();
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
        let files = || TokenizerFiles {
            source: TokenizerSource::TokenizerJson(json.to_string().into_bytes()),
            tokenizer_config: None,
            special_tokens_map: None,
            added_tokens: None,
        };
        let ids = |vocab_size| {
            let tokenizer = from_files(files(), vocab_size).unwrap().1;
            tokenizer.encode("a<extra>").unwrap()
        };
        assert_eq!(ids(4097)[1], 4096);
        let without = ids(4096);
        assert!(without.len() > 2 && without.iter().all(|&id| id < 4096), "{without:?}");

        // As the older files have it.
        let files = TokenizerFiles {
            source: TokenizerSource::VocabMerges { vocab: br#"{"a": 0, "<": 1}"#.to_vec(), merges: String::new() },
            tokenizer_config: None,
            special_tokens_map: None,
            added_tokens: Some(br#"{"<a": 2}"#.to_vec()),
        };
        let tokenizer = from_files(files, 2).unwrap().1;
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
