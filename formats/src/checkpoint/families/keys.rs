//! What is done with each key of a `config.json`, as data: one table per kind of model, in its family's file.
//!
//! A family is handed the keys that its table calls followed and no others, so a key of one family cannot be honoured in
//! another. What else stands in the file is refused by name where it would change the arithmetic, ignored where it is
//! known to be without effect, and named where nobody knows. The tests at the foot walk the tables and hold them against what
//! transformers makes of the same keys (`tests/fixtures/config-keys.json`).

use serde_json::Value;

use super::config::unsupported;
use super::{Config, FAMILIES, rotary};
use crate::checkpoint::config_error::ConfigError;

/// The keys of one kind of model, besides those in [`COMMON`].
pub(crate) struct Keys {
    /// Read: what they say becomes part of the model.
    pub(crate) followed: &'static [&'static str],
    /// Not computed here.
    pub(crate) refused: &'static [Refused],
    /// Without effect on what is computed from stored weights.
    pub(crate) idle: &'static [&'static str],
}

/// A key that must not be there, but for values that mean nothing.
pub(crate) struct Refused {
    pub(crate) key: &'static str,
    pub(crate) is_harmless: fn(&Value) -> bool,
    /// What is possible, for the message.
    pub(crate) supported: &'static str,
}

/// Keys of every family.
pub(crate) const COMMON: Keys = Keys {
    followed: &[
        "model_type",
        "architectures",
        "auto_map",
        "vocab_size",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ],
    refused: &[
        // Refused with more words before these tables are asked.
        Refused { key: "quantization_config", is_harmless: Value::is_null, supported: "weights as they were trained" },
        Refused { key: "is_causal", is_harmless: |v| v.is_null() || *v == true, supported: "true" },
        Refused { key: "per_layer_config", is_harmless: is_empty, supported: "layers that are all alike" },
        Refused { key: "kv_sharing_modes", is_harmless: is_empty, supported: "a key cache of its own for each layer" },
        Refused { key: "compression_config", is_harmless: is_empty, supported: "weights that are not compressed" },
        Refused { key: "configuration_files", is_harmless: is_empty, supported: "one config.json for all versions" },
        Refused { key: "layer_types", is_harmless: is_full_attention, supported: "\"full_attention\" in every layer" },
    ],
    idle: &[
        // About the file and the program that wrote it.
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "transformers.js_config",
        "unsloth_version",
        "unsloth_fixed",
        "torch_dtype",
        "dtype",
        "tokenizer_class",
        "model_max_length",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "experts_implementation",
        "use_flash_attention_2",
        "use_cache",
        "return_dict",
        "use_return_dict",
        "output_attentions",
        "output_hidden_states",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "chunk_size_feed_forward",
        "is_decoder",
        "is_encoder_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "pruned_heads",
        // Training and its beginning.
        "initializer_range",
        "init_std",
        "gradient_checkpointing",
        "attention_dropout",
        "hidden_dropout",
        "activation_dropout",
        "classifier_dropout",
        "dropout",
        "layerdrop",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "pretraining_tp",
        // Other heads than the language model's.
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        // Other tokens, and how text is drawn: not the network's.
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "prefix",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "length_penalty",
        "exponential_decay_length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "output_scores",
        "return_dict_in_generate",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
    ],
};

/// Keys that transformers' cache reads whatever the family, and its forward pass does not: said, and not followed.
const CACHE_ONLY: &[&str] = &["attention_chunk_size"];

/// What a key is to a kind of model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Part of the model.
    Followed,
    /// Stops everything unless it says nothing.
    Refused,
    /// Known to be without effect.
    Idle,
    /// Another family's: without effect here, which is said.
    Foreign,
    /// Nobody knows.
    Unknown,
}

/// Keys that are not followed and that the user should hear of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unread {
    /// Known from other families.
    pub(crate) foreign: Vec<String>,
    /// Known nowhere.
    pub(crate) unknown: Vec<String>,
}

impl Keys {
    /// What `key` is.
    pub(crate) fn place(&self, key: &str) -> Place {
        if self.followed.contains(&key) || COMMON.followed.contains(&key) {
            return Place::Followed;
        }
        if self.refusal(key).is_some() {
            return Place::Refused;
        }
        if self.idle.contains(&key) || COMMON.idle.contains(&key) {
            return Place::Idle;
        }
        let is_elsewhere = FAMILIES.iter().any(|family| family.keys.followed.contains(&key));
        if is_elsewhere || CACHE_ONLY.contains(&key) { Place::Foreign } else { Place::Unknown }
    }

    fn refusal(&self, key: &str) -> Option<&'static Refused> {
        self.refused.iter().chain(COMMON.refused).find(|refused| refused.key == key)
    }

    /// The part of a configuration that is followed; and what else it says, if it says anything.
    pub(crate) fn admit(&self, mut config: Config) -> Result<(Config, Unread), ConfigError> {
        let mut unread = Unread::default();
        for (key, value) in config.entries() {
            match self.place(key) {
                Place::Followed | Place::Idle => {}
                Place::Refused => {
                    let refused = self.refusal(key).filter(|refused| !(refused.is_harmless)(value));
                    if let Some(refused) = refused {
                        return Err(unsupported(key, value, refused.supported));
                    }
                }
                Place::Foreign | Place::Unknown if value.is_null() => {}
                Place::Foreign => unread.foreign.push(key.to_owned()),
                Place::Unknown => unread.unknown.push(key.to_owned()),
            }
        }
        if self.followed.contains(&rotary::OBJECTS[0]) {
            unread.unknown.extend(rotary::unknown_keys(&config));
        }
        unread.foreign.sort();
        unread.unknown.sort();
        config.retain(|key| self.place(key) == Place::Followed);
        Ok((config, unread))
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn is_full_attention(value: &Value) -> bool {
    // The second is what the first was called before transformers 5.
    let is_full = |kind: &Value| kind == "full_attention" || kind == "attention";
    value.is_null() || value.as_array().is_some_and(|layers| layers.iter().all(is_full))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde::Deserialize;
    use serde_json::{Map, json};

    use super::*;
    use crate::model::ModelSpec;

    /// What transformers makes of the keys: see `tests/fixtures/make_config_keys.py`.
    #[derive(Deserialize)]
    struct Measured {
        families: BTreeMap<String, Asked>,
    }

    #[derive(Deserialize)]
    struct Asked {
        base: Map<String, Value>,
        declared: Vec<String>,
        probes: Vec<Probe>,
    }

    #[derive(Deserialize)]
    struct Probe {
        key: String,
        before: Map<String, Value>,
        after: Map<String, Value>,
        verdict: String,
    }

    impl std::fmt::Display for Probe {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            let [before, after] = [&self.before, &self.after].map(|map| Value::from(map.clone()));
            write!(f, "{before} -> {after}, {} in transformers", self.verdict)
        }
    }

    fn measured() -> BTreeMap<String, Asked> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/config-keys.json");
        let measured: Measured = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        measured.families
    }

    fn keys(model_type: &str) -> &'static Keys {
        FAMILIES.iter().find(|family| family.model_types.contains(&model_type)).unwrap().keys
    }

    fn spec(base: &Map<String, Value>, changes: &Map<String, Value>) -> Result<ModelSpec, ConfigError> {
        let mut config = base.clone();
        config.extend(changes.clone());
        let config = Config::parse(Value::from(config).to_string().as_bytes()).unwrap();
        let admitted = super::super::admit(config)?;
        (admitted.family.spec)(&admitted.config)
    }

    /// Kinds of stretching that are not computed; odd numbers of rotated dimensions; two widths at once.
    const REFUSED_VALUES: &[&str] = &[
        "falcon n_embed",
        "falcon rope_parameters",
        "gpt_neox head_dim",
        "gpt_neox hidden_size",
        "gpt_neox rope_parameters",
        "llama rope_parameters",
        "mistral rope_parameters",
        "persimmon rope_parameters",
        "phi rope_parameters",
        "qwen2 rope_parameters",
    ];

    /// What must agree where transformers sees no difference: everything but the longest context, which is a bound of ours.
    fn computed(mut spec: ModelSpec) -> ModelSpec {
        if spec.learned_positions.is_none() {
            spec.max_positions = 0;
        }
        spec
    }

    #[test]
    fn every_key_that_transformers_asks_for_has_its_place() {
        let mut unlisted = Vec::new();
        for (model_type, asked) in measured() {
            let unknown = asked.declared.iter().filter(|key| keys(&model_type).place(key) == Place::Unknown);
            unlisted.extend(unknown.map(|key| format!("{model_type}: {key}")));
        }
        assert!(unlisted.is_empty(), "{unlisted:#?}");
    }

    #[test]
    fn a_change_of_a_key_does_what_it_does_in_transformers() {
        let (mut faults, mut refused) = (Vec::new(), BTreeSet::new());
        for (model_type, asked) in measured() {
            for probe in &asked.probes {
                let (before, after) = (spec(&asked.base, &probe.before), spec(&asked.base, &probe.after));
                // What precedes a text is the tokenizer's affair.
                if probe.key == "bos_token_id" {
                    continue;
                }
                let fault = match probe.verdict.as_str() {
                    "shape" | "logits" | "ids" => match (&before, &after) {
                        (Ok(before), Ok(after)) if before == after => Some("no change here".to_owned()),
                        (Ok(_), Err(_)) if keys(&model_type).place(&probe.key) == Place::Followed => {
                            refused.insert(format!("{model_type} {}", probe.key));
                            None
                        }
                        _ => None,
                    },
                    // The second: transformers' forward pass and its cache disagree, and the forward pass is followed.
                    "same" | "cache" => match (before, after) {
                        (Ok(before), Ok(after)) => {
                            (computed(before) != computed(after)).then(|| "another model here".to_owned())
                        }
                        // Whoever computes stretched positions in no way need not compute them in two.
                        (Err(_), Err(_)) => None,
                        (_, Err(error)) => Some(format!("refused here: {error}")),
                        (Err(error), _) => Some(format!("refused earlier: {error}")),
                    },
                    "fails" => None,
                    other => Some(format!("unknown verdict {other}")),
                };
                faults.extend(fault.map(|fault| format!("{model_type} {} {probe}: {fault}", probe.key)));
            }
        }
        assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
        // Followed keys of which some value that transformers computes is refused here.
        assert_eq!(refused.into_iter().collect::<Vec<_>>(), REFUSED_VALUES);
    }

    #[test]
    fn what_a_table_calls_followed_makes_a_difference_and_what_it_calls_idle_makes_none() {
        let mut faults = Vec::new();
        for (model_type, asked) in measured() {
            let verdicts = |key: &str| -> Vec<&str> {
                asked.probes.iter().filter(|probe| probe.key == key).map(|probe| probe.verdict.as_str()).collect()
            };
            let table = keys(&model_type);
            for key in table.followed {
                let found = verdicts(key);
                // The longest context of rotary positions is a bound that transformers does not keep.
                if *key != "max_position_embeddings" && !found.iter().any(|v| ["shape", "logits", "fails"].contains(v))
                {
                    faults.push(format!("{model_type} follows {key}: {found:?}"));
                }
            }
            let idle = table.idle.iter().chain(COMMON.idle).filter(|key| asked.declared.iter().any(|d| d == *key));
            for key in idle {
                let found = verdicts(key);
                if found.is_empty() || found.iter().any(|verdict| *verdict != "same") {
                    faults.push(format!("{model_type} passes over {key}: {found:?}"));
                }
            }
        }
        assert!(faults.is_empty(), "{faults:#?}");
    }

    /// Kinds that transformers does not know, by what their own code does.
    #[test]
    fn relatives_follow_their_own_keys() {
        let llama = json!({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
            "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2});
        let falcon = json!({"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64, "eos_token_id": 2});
        let phi = json!({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 48, "vocab_size": 64, "n_positions": 64,
            "rotary_dim": 8, "eos_token_id": 2});
        let changes: [(&str, &Value, &[(&str, Value, bool)]); 5] = [
            (
                "sparsellama",
                &llama,
                &[
                    ("hidden_act", json!("fatrelu"), true),
                    ("attention_bias", json!(true), true),
                    ("sliding_window", json!(16), false),
                ],
            ),
            (
                "bamboo",
                &llama,
                &[
                    ("sliding_window", json!(16), true),
                    ("use_sliding_window", json!(false), false),
                    ("attention_bias", json!(true), false),
                    ("hidden_act_param", json!(0.5), false),
                ],
            ),
            (
                "RefinedWebModel",
                &falcon,
                &[
                    ("n_layer", json!(3), true),
                    ("n_head", json!(8), true),
                    ("apply_residual_connection_post_layernorm", json!(true), true),
                    ("apply_residual_connection_post_layernorm", json!(false), false),
                    ("alibi", json!(true), true),
                ],
            ),
            ("RefinedWeb", &falcon, &[("n_head_kv", json!(2), true), ("multi_query", json!(false), false)]),
            (
                "phi-msft",
                &phi,
                &[
                    ("rotary_dim", json!(16), true),
                    ("n_head_kv", json!(2), true),
                    ("qk_layernorm", json!(true), false),
                    ("rope_theta", json!(500.0), false),
                    ("flash_attn", json!(true), false),
                ],
            ),
        ];
        for (model_type, base, changes) in changes {
            let mut base = base.as_object().unwrap().clone();
            base.insert("model_type".into(), model_type.into());
            let before = spec(&base, &Map::new()).unwrap();
            for (key, value, differs) in changes {
                let after = spec(&base, &Map::from_iter([((*key).to_owned(), value.clone())]));
                assert_eq!(after.as_ref() != Ok(&before), *differs, "{model_type} {key} = {value}: {after:?}");
            }
        }
    }

    #[test]
    fn no_key_has_two_places() {
        for family in FAMILIES {
            let refused = family.keys.refused.iter().chain(COMMON.refused).map(|refused| refused.key);
            let all: Vec<&str> = [family.keys.followed, COMMON.followed, family.keys.idle, COMMON.idle].concat();
            let mut all: Vec<&str> = all.into_iter().chain(refused.filter(|key| *key != "layer_types")).collect();
            let count = all.len();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), count, "{:?}", family.model_types);
        }
    }

    #[test]
    fn what_is_not_followed_is_named_once() {
        let config = br#"{"model_type": "mistral", "use_sliding_window": false, "attention_bias": null, "twist": 3,
            "use_cache": true, "rope_scaling": {"type": "linear", "factor": 2, "knots": 5}, "layer_types": []}"#;
        let admitted = super::super::admit(Config::parse(config).unwrap()).unwrap();
        let unknown = vec!["rope_scaling.knots".to_owned(), "twist".to_owned()];
        assert_eq!(admitted.unread, Unread { foreign: vec!["use_sliding_window".to_owned()], unknown });
        assert_eq!(admitted.config.entries().map(|(key, _)| key).collect::<Vec<_>>(), ["model_type", "rope_scaling"]);
    }
}
