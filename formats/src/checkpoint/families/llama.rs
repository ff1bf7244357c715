//! Llama and what is built like it: RMS norms, rotary positions, grouped key heads, a gated FFN.
//!
//! Keys and defaults are those of transformers' `LlamaConfig`, `MistralConfig` and `Qwen2Config`. Two relufied relatives come with code
//! of their own on the hub, known here by name: ProSparse (`sparsellama`: FATReLU with the threshold in `hidden_act_param`) and
//! Bamboo or TurboSparse (`bamboo`: a Mistral whose activation is applied to gate and up).

use super::config::{HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCABULARY_MAX, WIDTH_MAX, head_dim};
use super::{Config, Family, LM_HEAD, rotary};
use crate::checkpoint::error::ConfigError;
use crate::checkpoint::plan::{Part, Plan};
use crate::model::{Attention, Block, Ffn, ModelSpec, Norm, NormKind};

pub(super) static FAMILY: Family = Family {
    name: "llama",
    model_types: &["llama", "mistral", "qwen2", "sparsellama", "bamboo"],
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

/// What the relatives do differently where a configuration is silent.
struct Kind {
    vocab_size: usize,
    ffn_size: usize,
    kv_heads: Option<usize>,
    max_positions: usize,
    /// Tokens that attention sees at most, where the configuration does not say.
    sliding_window: Option<usize>,
    /// Biases of the query, key and value projections, and of the output projection, where there is no `attention_bias`.
    biases: (bool, bool),
    has_bos: bool,
}

const LLAMA: Kind = Kind {
    vocab_size: 32_000,
    ffn_size: 11_008,
    kv_heads: None,
    max_positions: 2048,
    sliding_window: None,
    biases: (false, false),
    has_bos: true,
};
const MISTRAL: Kind =
    Kind { ffn_size: 14_336, kv_heads: Some(8), max_positions: 131_072, sliding_window: Some(4096), ..LLAMA };
const QWEN2: Kind = Kind {
    vocab_size: 151_936,
    ffn_size: 22_016,
    kv_heads: Some(32),
    max_positions: 32_768,
    biases: (true, false),
    has_bos: false,
    ..LLAMA
};

fn kind(config: &Config) -> Result<Kind, ConfigError> {
    Ok(match config.text("model_type", "")? {
        "mistral" | "bamboo" => MISTRAL,
        "qwen2" => QWEN2,
        _ => LLAMA,
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
    let (qkv_bias, out_bias) = match config.says("attention_bias") {
        true => [config.flag("attention_bias", false)?; 2].into(),
        false => kind.biases,
    };
    let mlp_bias = config.flag("mlp_bias", false)?;
    Ok(ModelSpec {
        family: FAMILY.name.into(),
        vocab_size,
        hidden_size,
        embed_size: hidden_size,
        layers: config.count(&["num_hidden_layers"], Some(32), LAYERS_MAX)?,
        // Up to there a sliding window and full attention are the same.
        max_positions: sliding_window(config, &kind)?.map_or(max_positions, |window| window.min(max_positions)),
        norm: Norm { kind: NormKind::RmsNorm, eps: config.epsilon("rms_norm_eps", 1e-6)?, weight: true, bias: false },
        positions: rotary::rotary(config, &rotary::PLAIN, head_dim, max_positions)?,
        attention: Attention { heads, kv_heads, head_dim, qkv_bias, out_bias, qk_norm: false },
        block: Block::PreNorm,
        ffn: Ffn {
            size: config.count(&["intermediate_size"], Some(kind.ffn_size), WIDTH_MAX)?,
            activation: config.activation("hidden_act", "silu")?,
            gated: true,
            up_activated: is_bamboo(config)?,
            gate_bias: mlp_bias,
            up_bias: mlp_bias,
            down_bias: mlp_bias,
        },
        final_norm: true,
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

/// How many tokens attention sees, if not all.
fn sliding_window(config: &Config, kind: &Kind) -> Result<Option<usize>, ConfigError> {
    if !config.flag("use_sliding_window", kind.sliding_window.is_some())? {
        return Ok(None);
    }
    match config.says("sliding_window") {
        true => config.optional_count("sliding_window", POSITIONS_MAX),
        false => Ok(kind.sliding_window),
    }
}

fn plan(spec: &ModelSpec, _: &Config, prefix: &str, plan: &mut Plan) -> Result<(), ConfigError> {
    let (hidden, ffn, attention) = (spec.hidden_size, spec.ffn.size, &spec.attention);
    let (queries, keys) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
    let whole = |name: &str, shape: &[usize]| Part::whole(format!("{prefix}{name}"), shape);
    plan.add("embed.tokens", vec![whole("embed_tokens.weight", &[spec.vocab_size, hidden])]);
    for layer in 0..spec.layers {
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
        if spec.ffn.up_bias {
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

/// Old files keep the rotary frequencies; TurboSparse files the predictors that it was trained with, which see another input.
fn is_ignorable(spec: &ModelSpec, name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (spec.ffn.up_activated && name.contains(".mlp.predictor."))
}
