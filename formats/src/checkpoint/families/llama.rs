//! Llama and its relatives: RMS norms, rotary positions, grouped key heads, a gated FFN.
//!
//! Keys and defaults are those of transformers' `LlamaConfig`, `MistralConfig` and `Qwen2Config`. Two relufied relatives come with code
//! of their own on the hub, known here by name: ProSparse (`sparsellama`: FATReLU with the threshold in `hidden_act_param`) and
//! Bamboo or TurboSparse (`bamboo`: a Mistral whose activation is applied to gate and up).

use super::config::{HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCABULARY_MAX, WIDTH_MAX, head_dim, unsupported};
use super::keys::Keys;
use super::{Config, Family, FamilyInfo, LM_HEAD, rotary};
use crate::checkpoint::config_error::ConfigError;
use crate::checkpoint::plan::{Part, Plan};
use crate::model::{Activation, Attention, Block, FeedForward, Ffn, LayerSpec, ModelSpec, Norm, NormKind};

/// The family's row in docs/families.md.
pub(super) const INFO: FamilyInfo = FamilyInfo {
    name: "llama",
    model_types: &["llama", "mistral", "qwen2", "sparsellama", "bamboo"],
    checkpoints: "SparseLLM/ReluLLaMA-*, prosparse-llama-2-*, PowerInfer/Bamboo-*, TurboSparse-Mistral-*; Llama, Mistral, Qwen2",
    covers: "gated FFN; relu, relu2, FATReLU, ReLU on gate and up, silu; grouped queries, head_dim, biases, llama3 and linear \
             rope scaling; a sliding window limits the context",
    verified: "transformers; for ProSparse and Bamboo its Llama and Mistral with the published FFN substituted",
    references: 9,
};

pub(super) static FAMILY: Family = Family {
    info: &INFO,
    model_types: &["llama"],
    keys: &Keys {
        followed: &[
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "hidden_act",
            "attention_bias",
            "mlp_bias",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "original_max_position_embeddings",
        ],
        refused: &[],
        idle: &["rope_interleaved", "is_llama_config"],
    },
    architectures: &[
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "SparseLlamaForCausalLM",
        "BambooForCausalLM",
    ],
    prefixes: &["model.", ""],
    embedding: "embed_tokens.weight",
    head: LM_HEAD,
    spec,
    plan,
    is_ignorable,
};

pub(super) static MISTRAL: Family = Family { model_types: &["mistral"], keys: &MISTRAL_KEYS, ..FAMILY };

/// Its code is Mistral's but for the activation.
pub(super) static BAMBOO: Family = Family { model_types: &["bamboo"], keys: &MISTRAL_KEYS, ..FAMILY };

/// Its projections have the biases they have, and no key switches them.
const MISTRAL_KEYS: Keys = Keys {
    followed: &[
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "sliding_window",
        "rms_norm_eps",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
    ],
    refused: &[],
    idle: &[],
};

/// The same with biases that no key switches, and a window that three keys do.
pub(super) static QWEN2: Family = Family {
    model_types: &["qwen2"],
    keys: &Keys {
        followed: &[
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
            "rms_norm_eps",
            "hidden_act",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "original_max_position_embeddings",
        ],
        refused: &[],
        idle: &["use_mrope"],
    },
    ..FAMILY
};

pub(super) static SPARSE: Family = Family {
    model_types: &["sparsellama"],
    keys: &Keys {
        followed: &[
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "hidden_act",
            "hidden_act_param",
            "attention_bias",
            "mlp_bias",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "original_max_position_embeddings",
        ],
        refused: &[],
        idle: &[],
    },
    ..FAMILY
};

/// What the relatives do differently where a configuration is silent.
struct Kind {
    vocab_size: usize,
    ffn_size: usize,
    kv_heads: Option<usize>,
    max_positions: usize,
    /// Biases of the query, key and value projections, where no `attention_bias` is read.
    qkv_bias: bool,
    /// How many tokens attention sees, of that many layers, if not all.
    window: fn(&Config, usize) -> Result<Option<usize>, ConfigError>,
    has_bos: bool,
}

const LIKE_LLAMA: Kind = Kind {
    vocab_size: 32_000,
    ffn_size: 11_008,
    kv_heads: None,
    max_positions: 2048,
    qkv_bias: false,
    window: |_, _| Ok(None),
    has_bos: true,
};
const LIKE_MISTRAL: Kind =
    Kind { ffn_size: 14_336, kv_heads: Some(8), max_positions: 131_072, window: stated_window, ..LIKE_LLAMA };
const LIKE_QWEN2: Kind = Kind {
    vocab_size: 151_936,
    ffn_size: 22_016,
    kv_heads: Some(32),
    max_positions: 32_768,
    qkv_bias: true,
    window: switched_window,
    has_bos: false,
};

fn kind(config: &Config) -> Result<Kind, ConfigError> {
    Ok(match config.text("model_type", "")? {
        "mistral" | "bamboo" => LIKE_MISTRAL,
        "qwen2" => LIKE_QWEN2,
        _ => LIKE_LLAMA,
    })
}

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let kind = kind(config)?;
    let vocab_size = config.count(&["vocab_size"], Some(kind.vocab_size), VOCABULARY_MAX)?;
    let hidden_size = config.count(&["hidden_size"], Some(4096), WIDTH_MAX)?;
    let heads = config.count(&["num_attention_heads"], Some(32), HEADS_MAX)?;
    // Null means as many as query heads.
    let default_kv_heads = if config.says("num_key_value_heads") { None } else { kind.kv_heads };
    let kv_heads = config.count(&["num_key_value_heads"], Some(default_kv_heads.unwrap_or(heads)), HEADS_MAX)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(ConfigError::Contradiction {
            first: format!("num_attention_heads = {heads}"),
            second: format!("num_key_value_heads = {kv_heads}"),
            rule: "each key head serves the same number of query heads",
        });
    }
    let head_dim = match config.optional_count("head_dim", WIDTH_MAX)? {
        Some(width) => width,
        None => head_dim(("hidden_size", hidden_size), ("num_attention_heads", heads))?,
    };
    let max_positions = config.count(&["max_position_embeddings"], Some(kind.max_positions), POSITIONS_MAX)?;
    // Whoever has the key has it for all four projections.
    let attention_bias = config.flag("attention_bias", false)?;
    let (qkv_bias, out_bias) = (kind.qkv_bias || attention_bias, attention_bias);
    let layers = config.count(&["num_hidden_layers"], Some(32), LAYERS_MAX)?;
    let mlp_bias = config.flag("mlp_bias", false)?;
    let norm = Norm { kind: NormKind::RmsNorm, eps: config.epsilon("rms_norm_eps", 1e-6)?, weight: true, bias: false };
    let layer = LayerSpec {
        norm,
        block: Block::PreNorm,
        attention: Attention { heads, kv_heads, head_dim, qkv_bias, out_bias, qk_norm: None },
        positions: rotary::rotary(config, &rotary::PLAIN, head_dim, max_positions)?,
        feed_forward: FeedForward::Dense(Ffn {
            size: config.count(&["intermediate_size"], Some(kind.ffn_size), WIDTH_MAX)?,
            activation: activation(config)?,
            gated: true,
            up_activated: is_bamboo(config)?,
            gate_bias: mlp_bias,
            up_bias: mlp_bias,
            down_bias: mlp_bias,
        }),
    };
    Ok(ModelSpec {
        family: INFO.name.into(),
        vocab_size,
        hidden_size,
        embed_size: hidden_size,
        // Up to there a sliding window and full attention are the same.
        max_positions: (kind.window)(config, layers)?.map_or(max_positions, |window| window.min(max_positions)),
        learned_positions: None,
        layers: vec![layer; layers],
        final_norm: Some(norm),
        tied_head: config.flag("tie_word_embeddings", false)?,
        head_bias: false,
        bos: if kind.has_bos { config.token("bos_token_id", Some(1), vocab_size)? } else { None },
        eos: config.tokens("eos_token_id", if kind.has_bos { &[2] } else { &[] }, vocab_size)?,
        thresholds: Vec::new(),
    })
}

/// The activation on gate and up is in Bamboo's code, not in its configuration.
fn is_bamboo(config: &Config) -> Result<bool, ConfigError> {
    let named = config.architectures().iter().any(|class| class == "BambooForCausalLM");
    Ok(named || config.text("model_type", "")? == "bamboo")
}

/// ProSparse's own function besides those that all have.
fn activation(config: &Config) -> Result<Activation, ConfigError> {
    if config.text("model_type", "")? == SPARSE.model_types[0] && config.text("hidden_act", "")? == "fatrelu" {
        return Ok(Activation::FatRelu(config.positive("hidden_act_param", 0.01)?));
    }
    config.activation("hidden_act", "silu")
}

/// Mistral's window: of every layer, and of 4096 tokens where the configuration is silent; null is none.
fn stated_window(config: &Config, _: usize) -> Result<Option<usize>, ConfigError> {
    match config.says("sliding_window") {
        true => config.optional_count("sliding_window", POSITIONS_MAX),
        false => Ok(Some(4096)),
    }
}

/// Qwen2's window: of the layers that are named, or of those from a certain one on, where it is switched on.
fn switched_window(config: &Config, layers: usize) -> Result<Option<usize>, ConfigError> {
    let window = match config.flag("use_sliding_window", false)? {
        true => stated_window(config, layers)?,
        false => None,
    };
    let contradiction = |first: String, second: String, rule| ConfigError::Contradiction { first, second, rule };
    let does_any_slide = match config.get("layer_types") {
        None => config.whole("max_window_layers", 0..=POSITIONS_MAX)?.unwrap_or(28) < layers,
        Some(types) => {
            let supported = "a list of full_attention and sliding_attention";
            let list = types.as_array().ok_or_else(|| unsupported("layer_types", types, supported))?;
            let mut does_any_slide = false;
            for kind in list {
                match kind.as_str() {
                    Some("full_attention" | "attention") => {}
                    Some("sliding_attention") => does_any_slide = true,
                    _ => return Err(unsupported("layer_types", kind, supported)),
                }
            }
            if list.len() != layers {
                let (first, second) = (format!("{} layer_types", list.len()), format!("num_hidden_layers = {layers}"));
                return Err(contradiction(first, second, "each layer has one"));
            }
            if does_any_slide && window.is_none() {
                let first = "sliding_attention in layer_types".into();
                return Err(contradiction(first, "no sliding_window".into(), "what slides has a window"));
            }
            does_any_slide
        }
    };
    Ok(window.filter(|_| does_any_slide))
}

fn plan(spec: &ModelSpec, _: &Config, prefix: &str, plan: &mut Plan) -> Result<(), ConfigError> {
    let (hidden, ffn, attention) = (spec.hidden_size, spec.ffn().size, spec.attention());
    let (queries, keys) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
    let whole = |name: &str, shape: &[usize]| Part::whole(format!("{prefix}{name}"), shape);
    plan.add("embed.tokens", vec![whole("embed_tokens.weight", &[spec.vocab_size, hidden])]);
    for layer in 0..spec.layers.len() {
        let source = |name: &str, shape: &[usize]| whole(&format!("layers.{layer}.{name}"), shape);
        let mut add = |name: &str, parts| plan.add(format!("layers.{layer}.{name}"), parts);
        let rows = [("q", queries), ("k", keys), ("v", keys)];
        let qkv = rows.map(|(which, rows)| source(&format!("self_attn.{which}_proj.weight"), &[rows, hidden]));
        add("attention.qkv.weight", qkv.into());
        add("attention.out.weight", vec![source("self_attn.o_proj.weight", &[hidden, queries])]);
        if attention.qkv_bias {
            let qkv = rows.map(|(which, rows)| source(&format!("self_attn.{which}_proj.bias"), &[rows]));
            add("attention.qkv.bias", qkv.into());
        }
        if attention.out_bias {
            add("attention.out.bias", vec![source("self_attn.o_proj.bias", &[hidden])]);
        }
        add("ffn.gate.weight", vec![source("mlp.gate_proj.weight", &[ffn, hidden])]);
        add("ffn.up.weight", vec![source("mlp.up_proj.weight", &[ffn, hidden])]);
        add("ffn.down.weight", vec![source("mlp.down_proj.weight", &[hidden, ffn])]);
        if spec.ffn().up_bias {
            add("ffn.gate_bias", vec![source("mlp.gate_proj.bias", &[ffn])]);
            add("ffn.up_bias", vec![source("mlp.up_proj.bias", &[ffn])]);
            add("ffn.down_bias", vec![source("mlp.down_proj.bias", &[hidden])]);
        }
        add("attention_norm.weight", vec![source("input_layernorm.weight", &[hidden])]);
        add("ffn_norm.weight", vec![source("post_attention_layernorm.weight", &[hidden])]);
    }
    plan.add("final_norm.weight", vec![whole("norm.weight", &[hidden])]);
    if !spec.tied_head {
        plan.add("head.weight", vec![Part::whole(LM_HEAD, &[spec.vocab_size, hidden])]);
    }
    Ok(())
}

/// TurboSparse files keep the predictors that it was trained with, which see another input.
fn is_ignorable(spec: &ModelSpec, name: &str) -> bool {
    spec.ffn().up_activated && name.contains(".mlp.predictor.")
}
