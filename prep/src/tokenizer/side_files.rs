//! What stands beside the tokenizer proper: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`.
//!
//! They are laid over each other as `PreTrainedTokenizerBase._from_pretrained` of transformers 5 does: with an
//! `added_tokens_decoder` in `tokenizer_config.json` the two older files count for nothing.

use std::collections::{BTreeMap, HashMap, HashSet};

use flashlm_formats::checkpoint::TokenizerFiles;
use serde_json::{Map, Value, json};

use super::TokenizerError;

/// Names under which a configuration calls tokens special, in the order in which transformers adds them.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A token that is found in a text before it is cut up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct AddedToken {
    pub(super) content: String,
    pub(super) single_word: bool,
    pub(super) lstrip: bool,
    pub(super) rstrip: bool,
    /// Without a word: when it is not special.
    pub(super) normalized: Option<bool>,
    pub(super) special: bool,
}

impl AddedToken {
    pub(super) fn special(content: &str) -> Self {
        let content = content.to_owned();
        Self { content, single_word: false, lstrip: false, rstrip: false, normalized: None, special: true }
    }

    /// Either a text, which is special, or an object with `content` and flags.
    pub(super) fn read(value: &Value) -> Option<Self> {
        let flag = |name: &str| value.get(name).and_then(Value::as_bool);
        Some(match value {
            Value::String(content) => Self::special(content),
            object => Self {
                content: object.get("content")?.as_str()?.to_owned(),
                single_word: flag("single_word").unwrap_or(false),
                lstrip: flag("lstrip").unwrap_or(false),
                rstrip: flag("rstrip").unwrap_or(false),
                normalized: flag("normalized"),
                special: flag("special").unwrap_or(false),
            },
        })
    }

    /// As `tokenizer.json` has it.
    pub(super) fn json(&self, id: u64) -> Value {
        json!({
            "id": id, "content": self.content, "single_word": self.single_word, "lstrip": self.lstrip, "rstrip": self.rstrip,
            "normalized": self.normalized.unwrap_or(!self.special), "special": self.special,
        })
    }
}

/// What the files beside the tokenizer say.
#[derive(Debug, Default)]
pub(super) struct SideFiles {
    pub(super) model_type: String,
    pub(super) model_tokenizer_class: Option<String>,
    /// `tokenizer_config.json`, with what `special_tokens_map.json` lays over it.
    pub(super) config: Map<String, Value>,
    /// Tokens added to the vocabulary, by the id they state.
    pub(super) added: BTreeMap<u64, AddedToken>,
}

impl SideFiles {
    /// Reads what stands beside a tokenizer; `in_tokenizer` are the added tokens of `tokenizer.json`.
    pub(super) fn read(files: &TokenizerFiles, in_tokenizer: &[Value]) -> Result<Self, TokenizerError> {
        let mut config = super::object("tokenizer_config.json", files.tokenizer_config.as_deref())?;
        let mut added = BTreeMap::new();
        if let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) {
            let tokens = decoder.iter().filter_map(|(id, token)| Some((id.parse().ok()?, AddedToken::read(token)?)));
            added.extend(tokens);
        } else {
            let extra_before = extra(&config);
            for (name, token) in super::object("special_tokens_map.json", files.special_tokens_map.as_deref())? {
                // An object here is a special token, whatever it says of itself.
                let token = match token {
                    Value::Object(mut flags) => {
                        flags.insert("special".into(), true.into());
                        Value::Object(flags)
                    }
                    other => other,
                };
                config.insert(name, token);
            }
            let mut special: HashSet<String> = NAMES.iter().filter_map(|name| content(config.get(*name)?)).collect();
            // What only special_tokens_map.json calls additional comes too late to be special here.
            let extra_after = list(&config, "extra_special_tokens").unwrap_or_default();
            special.extend(extra_before.into_iter().chain(extra_after).map(|token| token.content));
            for (token, id) in super::object("added_tokens.json", files.added_tokens.as_deref())? {
                let Some(id) = id.as_u64() else { continue };
                let is_special = special.contains(&token);
                let normalized = Some(!is_special);
                added.insert(id, AddedToken { special: is_special, normalized, ..AddedToken::special(&token) });
            }
            let tokens = in_tokenizer.iter().filter_map(|t| Some((t["id"].as_u64()?, AddedToken::read(t)?)));
            added.extend(tokens);
        }
        Ok(Self {
            model_type: files.model_type.clone(),
            model_tokenizer_class: files.model_tokenizer_class.clone(),
            config,
            added,
        })
    }

    pub(super) fn tokenizer_class(&self) -> Option<&str> {
        self.config.get("tokenizer_class").and_then(Value::as_str)
    }

    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        self.config.get(name).and_then(Value::as_bool)
    }

    /// The tokens that the configuration names, in transformers' order. `defaults` are those of the class, for names that the
    /// configuration does not have at all.
    pub(super) fn named(&self, defaults: &[(&str, &str)]) -> Vec<(String, AddedToken)> {
        let by_content: HashMap<&str, &AddedToken> = self.added.values().map(|t| (t.content.as_str(), t)).collect();
        let standard = NAMES.iter().filter_map(|name| {
            let token = match self.config.get(*name) {
                Some(token) => AddedToken::read(token)?,
                None => AddedToken::special(defaults.iter().find(|(key, _)| key == name)?.1),
            };
            let known =
                self.config.contains_key(*name).then(|| by_content.get(token.content.as_str()).copied()).flatten();
            Some(((*name).to_owned(), AddedToken { special: true, ..known.cloned().unwrap_or(token) }))
        });
        // Names of the model's own, such as image_token.
        let own = self.config.iter().filter(|(name, _)| name.ends_with("_token") && !NAMES.contains(&name.as_str()));
        let own = own
            .filter_map(|(name, token)| Some((name.clone(), AddedToken { special: true, ..AddedToken::read(token)? })));
        standard.chain(own).collect()
    }

    /// Further special tokens without a name.
    pub(super) fn extra(&self) -> Vec<AddedToken> {
        extra(&self.config)
    }
}

fn extra(config: &Map<String, Value>) -> Vec<AddedToken> {
    let tokens = list(config, "extra_special_tokens").or_else(|| list(config, "additional_special_tokens"));
    tokens.unwrap_or_default()
}

/// The tokens under `name`, if there are any.
fn list(config: &Map<String, Value>, name: &str) -> Option<Vec<AddedToken>> {
    let tokens: Vec<&Value> = match config.get(name)? {
        Value::Array(tokens) => tokens.iter().collect(),
        Value::Object(tokens) => tokens.values().collect(),
        _ => return None,
    };
    let tokens: Vec<AddedToken> = tokens.into_iter().filter_map(AddedToken::read).collect();
    (!tokens.is_empty()).then_some(tokens)
}

fn content(token: &Value) -> Option<String> {
    AddedToken::read(token).map(|token| token.content)
}
