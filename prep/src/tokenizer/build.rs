//! From the files of a tokenizer to one `tokenizer.json`, step by step as transformers 5 builds it.
//!
//! First the parts: as they are in `tokenizer.json`, or what the class makes of a vocabulary and merges. Then the added tokens are laid
//! over it, and last comes the post-processor.

use std::collections::{BTreeMap, HashMap, HashSet};

use flashlm_formats::checkpoint::{TokenizerFiles, TokenizerSource};
use serde_json::{Map, Value, json};

use super::class::{Class, class};
use super::rebuilt::{clean_up, rebuilt};
use super::sentencepiece::SentencePiece;
use super::side_files::{AddedToken, SideFiles};
use super::{TokenizerError, TokenizerNote, object};

/// A `tokenizer.json`, and what is to be known of it.
pub(super) struct Built {
    pub(super) json: Map<String, Value>,
    pub(super) notes: Vec<TokenizerNote>,
    /// Tokens that the class brought and no file names.
    pub(super) of_class: Vec<String>,
}

/// The `tokenizer.json` of `files`.
pub(super) fn build(files: &TokenizerFiles) -> Result<Built, TokenizerError> {
    let (stored, bytes) = match &files.source {
        TokenizerSource::TokenizerJson(json) => (object("tokenizer.json", Some(json))?, Some(json.as_slice())),
        _ => (Map::new(), None),
    };
    let in_tokenizer = stored.get("added_tokens").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut side = SideFiles::read(files, &in_tokenizer)?;
    let (mut class, unknown) = class(&side, bytes);
    let mut notes = Vec::new();
    // A class with merges makes nothing but noise of another kind of vocabulary, though transformers 5 lets it.
    let kind = stored.get("model").and_then(|model| model["type"].as_str()).unwrap_or("BPE");
    if class != Class::Backend && kind != "BPE" {
        notes.push(TokenizerNote::Kind { class: class.name(), kind: kind.chars().take(60).collect() });
        class = Class::Backend;
    }
    let mut extra = side.extra();
    // What a rebuilt tokenizer keeps of the file besides vocabulary and merges.
    let post_processor = stored.get("post_processor").filter(|value| !value.is_null()).cloned();
    let parts = match &files.source {
        TokenizerSource::TokenizerJson(_) if class == Class::Backend => {
            notes.extend(unknown.map(|class| TokenizerNote::Class { class }));
            stored
        }
        TokenizerSource::TokenizerJson(_) => {
            let model = stored.get("model").cloned().unwrap_or_default();
            rebuilt(class, &side, by_token(&model), model.get("merges").cloned())
        }
        TokenizerSource::VocabMerges { vocab, merges } => {
            let class = match (class, side.tokenizer_class()) {
                (Class::Llama, _) | (Class::Backend, Some(_)) => {
                    let class = side.tokenizer_class().unwrap_or_default().chars().take(60).collect();
                    return Err(TokenizerError::Class { class });
                }
                (Class::Backend, None) => Class::Gpt2,
                (class, _) => class,
            };
            let merges = merges.lines().filter(|line| !line.is_empty() && !line.starts_with("#version"));
            rebuilt(class, &side, object("vocab.json", Some(vocab))?, Some(merges.collect()))
        }
        TokenizerSource::SentencePiece(model) => {
            let model = SentencePiece::read(model)?;
            // A list in tokenizer_config.json, an empty one too, stands in place of the model's own.
            if !["extra_special_tokens", "additional_special_tokens"].iter().any(|key| side.config.contains_key(*key)) {
                extra = model.added_tokens(class != Class::Backend);
            }
            if class == Class::Backend {
                model.as_backend(&mut side)?
            } else {
                let (vocab, merges) = model.by_order()?;
                rebuilt(class, &side, vocab, Some(merges))
            }
        }
    };
    let from_json = bytes.is_some();
    let mut builder = Builder::new(parts);
    builder.add_beside(&side, class, extra)?;
    if from_json {
        builder.note_ignored(&side, class, post_processor.as_ref(), &mut notes);
    }
    builder.set_post_processor(&side, class, post_processor, from_json);
    if side.flag("clean_up_tokenization_spaces") == Some(true) {
        builder.clean_up();
    }
    let of_class = defaults(class).iter().filter(|(name, _)| !side.config.contains_key(*name));
    let of_class = of_class.map(|(_, token)| (*token).to_owned()).collect();
    Ok(Built { json: builder.finish(), notes, of_class })
}

/// A vocabulary as ids by token, whatever the model.
fn by_token(model: &Value) -> Map<String, Value> {
    match &model["vocab"] {
        Value::Object(vocab) => vocab.clone(),
        Value::Array(list) => {
            let name = |entry: &Value| entry.as_str().or_else(|| entry.get(0)?.as_str()).map(str::to_owned);
            list.iter().enumerate().filter_map(|(id, entry)| Some((name(entry)?, id.into()))).collect()
        }
        _ => Map::new(),
    }
}

/// Special tokens that a class names where the configuration does not.
fn defaults(class: Class) -> &'static [(&'static str, &'static str)] {
    const END: &str = "<|endoftext|>";
    match class {
        Class::Backend => &[],
        Class::Llama => &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
        Class::Gpt2 | Class::CodeGen => &[("unk_token", END), ("bos_token", END), ("eos_token", END)],
        Class::NeoX => &[("unk_token", END), ("bos_token", END), ("eos_token", END), ("pad_token", "<|padding|>")],
        Class::Qwen2 => &[("unk_token", END), ("eos_token", END), ("pad_token", END)],
    }
}

/// A `tokenizer.json` in the making.
struct Builder {
    parts: Map<String, Value>,
    added: BTreeMap<u64, AddedToken>,
    ids: HashMap<String, u64>,
    /// Entries of the model's vocabulary.
    vocab_size: u64,
}

impl Builder {
    fn new(mut parts: Map<String, Value>) -> Self {
        let tokens = parts.remove("added_tokens");
        let tokens = tokens.as_ref().and_then(Value::as_array).into_iter().flatten();
        let added: BTreeMap<u64, AddedToken> =
            tokens.filter_map(|t| Some((t["id"].as_u64()?, AddedToken::read(t)?))).collect();
        let vocab = parts.get("model").map(by_token).unwrap_or_default();
        let vocab_size = vocab.len() as u64;
        let mut ids: HashMap<String, u64> =
            vocab.into_iter().filter_map(|(token, id)| Some((token, id.as_u64()?))).collect();
        ids.extend(added.iter().map(|(id, token)| (token.content.clone(), *id)));
        Self { parts, added, ids, vocab_size }
    }

    /// Lays the tokens that stand beside the tokenizer over it.
    fn add_beside(&mut self, side: &SideFiles, class: Class, extra: Vec<AddedToken>) -> Result<(), TokenizerError> {
        let named = side.named(defaults(class));
        let mut tokens: Vec<AddedToken> = side.added.values().cloned().collect();
        // Sets throughout: there may be hundreds of thousands.
        let special: HashSet<&str> = named.iter().map(|(_, named)| named.content.as_str()).collect();
        tokens.iter_mut().for_each(|token| token.special |= special.contains(token.content.as_str()));
        let known: HashSet<String> = self.added.values().chain(&tokens).map(|token| token.content.clone()).collect();
        let mut taken: HashSet<&AddedToken> = HashSet::new();
        for token in named.iter().map(|(_, token)| token).chain(&extra) {
            if !known.contains(&token.content) && taken.insert(token) {
                tokens.push(token.clone());
            }
        }
        self.add(&tokens);
        if class == Class::Qwen2 {
            let again = named.iter().map(|(_, token)| token).chain(&extra);
            let again: Vec<AddedToken> = again.map(|token| AddedToken::special(&token.content)).collect();
            self.add(&again);
        }
        for (&stated, token) in &side.added {
            let used = self.ids.get(&token.content).copied();
            if used != Some(stated) {
                let content = token.content.chars().take(60).collect();
                return Err(TokenizerError::AddedToken {
                    content,
                    stated,
                    used: used.and_then(|id| u32::try_from(id).ok()),
                });
            }
        }
        Ok(())
    }

    /// As the library's `add_tokens`: what the vocabulary has keeps its id, the others follow.
    fn add(&mut self, tokens: &[AddedToken]) {
        let highest = self.added.keys().max().copied();
        let mut next = match highest {
            Some(highest) if highest >= self.vocab_size => highest + 1,
            _ => self.vocab_size,
        };
        for token in tokens.iter().filter(|token| !token.content.is_empty()) {
            let id = *self.ids.entry(token.content.clone()).or_insert_with(|| {
                next += 1;
                next - 1
            });
            self.added.insert(id, token.clone());
        }
    }

    /// Says which settings transformers ignores where there is a tokenizer.json.
    fn note_ignored(
        &self,
        side: &SideFiles,
        class: Class,
        post_processor: Option<&Value>,
        notes: &mut Vec<TokenizerNote>,
    ) {
        let mut note = |setting: String| notes.push(TokenizerNote::Ignored { setting });
        // What a class without a template of its own is left with.
        let kept = if class == Class::NeoX { None } else { post_processor };
        for (flag, name) in [("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")] {
            let Some(wanted) = side.flag(flag) else { continue };
            let token =
                side.named(defaults(class)).into_iter().find(|(key, _)| key == name).map(|(_, token)| token.content);
            let follows =
                token.is_some_and(|token| kept.is_some_and(|kept| mentions(kept, &token, name == "bos_token")));
            if wanted != follows {
                note(format!("{flag}: {wanted}"));
            }
        }
        if class == Class::Backend
            && let Some(wanted) = side.flag("add_prefix_space")
            && let Some(found) = self.parts.get("pre_tokenizer").and_then(prefix_space)
            && wanted != found
        {
            note(format!("add_prefix_space: {wanted}"));
        }
    }

    fn set_post_processor(&mut self, side: &SideFiles, class: Class, stored: Option<Value>, from_json: bool) {
        // Beside a tokenizer.json transformers takes no heed of add_bos_token and add_eos_token.
        let flag = |name: &str| !from_json && side.flag(name) == Some(true);
        let post_processor = match stored {
            Some(stored) if class != Class::NeoX => stored,
            _ => {
                let named = side.named(defaults(class));
                let token = |name: &str| {
                    let token = named.iter().find(|(key, _)| key == name)?.1.content.clone();
                    let id = *self.ids.get(&token)?;
                    Some((token, id))
                };
                let first = flag("add_bos_token").then(|| token("bos_token")).flatten();
                let last = flag("add_eos_token").then(|| token("eos_token")).flatten();
                template(first, last)
            }
        };
        self.parts.insert("post_processor".into(), post_processor);
    }

    /// transformers' `clean_up_tokenization`, which it leaves to those who are no BPE.
    fn clean_up(&mut self) {
        let is_bpe = self.parts.get("model").is_some_and(|model| model["type"] == "BPE");
        let Some(decoder) = self.parts.get_mut("decoder").filter(|decoder| !is_bpe && !decoder.is_null()) else {
            return;
        };
        let steps: Vec<Value> = [decoder.take()].into_iter().chain(clean_up().map(|step| json!(step))).collect();
        *decoder = json!({"type": "Sequence", "decoders": steps});
    }

    fn finish(mut self) -> Map<String, Value> {
        let added = self.added.iter().map(|(id, token)| token.json(*id)).collect();
        self.parts.insert("added_tokens".into(), added);
        self.parts
    }
}

/// A template with what precedes and follows a text.
fn template(first: Option<(String, u64)>, last: Option<(String, u64)>) -> Value {
    let piece = |token: &(String, u64)| json!({"SpecialToken": {"id": token.0, "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let around =
        |text: Value| -> Vec<Value> { first.iter().map(piece).chain([text]).chain(last.iter().map(piece)).collect() };
    let special: Map<String, Value> = first
        .iter()
        .chain(&last)
        .map(|(token, id)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    let pair = [around(sequence("A")), around(sequence("B"))].concat();
    json!({"type": "TemplateProcessing", "single": around(sequence("A")), "pair": pair, "special_tokens": special})
}

/// Whether a post-processor puts `token` in front of a text, or after it.
fn mentions(post_processor: &Value, token: &str, in_front: bool) -> bool {
    let is_token = |pair: &Value| pair[0].as_str() == Some(token);
    match post_processor["type"].as_str() {
        Some("TemplateProcessing") => {
            let pieces = post_processor["single"].as_array().map(Vec::as_slice).unwrap_or_default();
            let at = pieces.iter().position(|piece| piece.get("Sequence").is_some()).unwrap_or(pieces.len());
            let side = if in_front { &pieces[..at] } else { &pieces[at..] };
            side.iter().any(|piece| piece["SpecialToken"]["id"].as_str() == Some(token))
        }
        Some("Sequence") => {
            let list = post_processor["processors"].as_array().into_iter().flatten();
            list.into_iter().any(|processor| mentions(processor, token, in_front))
        }
        Some("BertProcessing" | "RobertaProcessing") => is_token(&post_processor[if in_front { "cls" } else { "sep" }]),
        _ => false,
    }
}

/// Whether a pre-tokenizer puts a space in front of a text, where it has a word on that.
fn prefix_space(pre_tokenizer: &Value) -> Option<bool> {
    match pre_tokenizer["type"].as_str()? {
        "ByteLevel" => pre_tokenizer["add_prefix_space"].as_bool(),
        "Metaspace" => {
            let scheme = pre_tokenizer["prepend_scheme"].as_str().map(|scheme| scheme != "never");
            scheme.or_else(|| pre_tokenizer["add_prefix_space"].as_bool())
        }
        "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.iter().find_map(prefix_space),
        _ => None,
    }
}
