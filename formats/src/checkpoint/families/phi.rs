//! Phi-1, 1.5 and 2: attention and FFN side by side after one norm, part of each head rotated, everything with biases, the head
//! too.
//!
//! Keys and defaults are those of transformers' `PhiConfig`. Files from before transformers knew the family (`phi-msft`) say the same
//! in other words.

use super::config::{HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCABULARY_MAX, WIDTH_MAX, head_dim};
use super::keys::Keys;
use super::rotary::{self, RotaryKeys};
use super::{Config, Family, FamilyInfo, LM_HEAD};
use crate::checkpoint::config_error::ConfigError;
use crate::checkpoint::plan::{Part, Plan};
use crate::model::{Attention, Block, FeedForward, Ffn, LayerSpec, ModelSpec, Norm, NormKind, Positions};

/// The family's row in docs/families.md.
pub(super) const INFO: FamilyInfo = FamilyInfo {
    name: "phi",
    model_types: &["phi", "phi-msft"],
    checkpoints: "microsoft/phi-1, phi-1_5, phi-2 and relufied ones",
    covers: "parallel block with one norm, partial rotation, head bias, names from before transformers supported it",
    verified: "transformers; phi-msft with the same weights under the old names",
    references: 2,
};

pub(super) static FAMILY: Family = Family {
    info: &INFO,
    model_types: &["phi"],
    keys: &Keys {
        followed: &[
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "layer_norm_eps",
            "hidden_act",
            "qk_layernorm",
            "rope_theta",
            "partial_rotary_factor",
            "rope_scaling",
            "rope_parameters",
            "original_max_position_embeddings",
        ],
        refused: &[],
        idle: &[],
    },
    architectures: &["PhiForCausalLM"],
    prefixes: &["model.", ""],
    embedding: "embed_tokens.weight",
    head: LM_HEAD,
    spec,
    plan,
    is_ignorable: |_, _| false,
};

/// The same models with their first names.
pub(super) static MSFT: Family = Family {
    model_types: &["phi-msft"],
    keys: &Keys {
        followed: &[
            "n_embd",
            "n_layer",
            "n_head",
            "n_head_kv",
            "n_inner",
            "n_positions",
            "rotary_dim",
            "layer_norm_epsilon",
            "activation_function",
        ],
        refused: &[],
        // The last: the stored embedding has the rows it has.
        idle: &["flash_attn", "flash_rotary", "fused_dense", "pad_vocab_size_multiple"],
    },
    prefixes: &["transformer."],
    embedding: "embd.wte.weight",
    head: "lm_head.linear.weight",
    spec: msft_spec,
    plan: msft_plan,
    ..FAMILY
};

const ROTARY: RotaryKeys =
    RotaryKeys { theta: "rope_theta", default_theta: 10_000.0, share: Some(("partial_rotary_factor", 0.5)) };

struct Sizes {
    vocab_size: usize,
    hidden_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    ffn_size: usize,
    max_positions: usize,
}

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let sizes = Sizes {
        vocab_size: config.count(&["vocab_size"], Some(51_200), VOCABULARY_MAX)?,
        hidden_size: config.count(&["hidden_size"], Some(2048), WIDTH_MAX)?,
        layers: config.count(&["num_hidden_layers"], Some(24), LAYERS_MAX)?,
        heads: config.count(&["num_attention_heads"], Some(32), HEADS_MAX)?,
        kv_heads: config.optional_count("num_key_value_heads", HEADS_MAX)?,
        head_dim: config.optional_count("head_dim", WIDTH_MAX)?,
        ffn_size: config.count(&["intermediate_size"], Some(8192), WIDTH_MAX)?,
        max_positions: config.count(&["max_position_embeddings"], Some(2048), POSITIONS_MAX)?,
    };
    let positions = |head_dim, max_positions| rotary::rotary(config, &ROTARY, head_dim, max_positions);
    build(config, &sizes, "hidden_act", "layer_norm_eps", &positions)
}

fn msft_spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let hidden_size = config.count(&["n_embd"], Some(1024), WIDTH_MAX)?;
    let sizes = Sizes {
        vocab_size: config.count(&["vocab_size"], Some(50_304), VOCABULARY_MAX)?,
        hidden_size,
        layers: config.count(&["n_layer"], Some(20), LAYERS_MAX)?,
        heads: config.count(&["n_head"], Some(16), HEADS_MAX)?,
        kv_heads: config.optional_count("n_head_kv", HEADS_MAX)?,
        head_dim: None,
        ffn_size: config.optional_count("n_inner", WIDTH_MAX)?.unwrap_or(4 * hidden_size),
        max_positions: config.count(&["n_positions"], Some(2048), POSITIONS_MAX)?,
    };
    let positions = |head_dim: usize, _| {
        let dims = config.count(&["rotary_dim"], Some(32), WIDTH_MAX)?.min(head_dim);
        if !dims.is_multiple_of(2) {
            return Err(ConfigError::Contradiction {
                first: format!("heads of width {head_dim}"),
                second: format!("rotary_dim = {dims}"),
                rule: "rotary positions need an even number of dimensions",
            });
        }
        Ok(Positions::Rotary { dims, theta: 10_000.0, scaling: None })
    };
    build(config, &sizes, "activation_function", "layer_norm_epsilon", &positions)
}

fn build(
    config: &Config,
    sizes: &Sizes,
    activation: &str,
    eps: &str,
    positions: &dyn Fn(usize, usize) -> Result<Positions, ConfigError>,
) -> Result<ModelSpec, ConfigError> {
    let &Sizes { vocab_size, hidden_size, layers, heads, kv_heads, ffn_size, max_positions, .. } = sizes;
    let head_dim = match sizes.head_dim {
        Some(width) => width,
        None => head_dim(("the width", hidden_size), ("the number of heads", heads))?,
    };
    let qk_norm = config.flag("qk_layernorm", false)?;
    if qk_norm && head_dim * heads != hidden_size {
        return Err(ConfigError::Contradiction {
            first: format!("head_dim = {head_dim}"),
            second: "qk_layernorm = true".into(),
            rule: "the norms are as wide as hidden_size / num_attention_heads",
        });
    }
    let kv_heads = kv_heads.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(ConfigError::Contradiction {
            first: format!("{heads} heads"),
            second: format!("{kv_heads} key heads"),
            rule: "each key head serves the same number of query heads",
        });
    }
    let norm = Norm { kind: NormKind::LayerNorm, eps: config.epsilon(eps, 1e-5)?, weight: true, bias: true };
    let layer = LayerSpec {
        norm,
        block: Block::ParallelOneNorm,
        attention: Attention {
            heads,
            kv_heads,
            head_dim,
            qkv_bias: true,
            out_bias: true,
            qk_norm: qk_norm.then_some(norm),
        },
        positions: positions(head_dim, max_positions)?,
        feed_forward: FeedForward::Dense(Ffn {
            size: ffn_size,
            activation: config.activation(activation, "gelu_new")?,
            gated: false,
            up_activated: false,
            gate_bias: false,
            up_bias: true,
            down_bias: true,
        }),
    };
    Ok(ModelSpec {
        family: INFO.name.into(),
        vocab_size,
        hidden_size,
        embed_size: hidden_size,
        max_positions,
        learned_positions: None,
        layers: vec![layer; layers],
        final_norm: Some(norm),
        tied_head: config.flag("tie_word_embeddings", false)?,
        head_bias: true,
        // The tokenizer puts nothing in front of a text.
        bos: None,
        eos: config.tokens("eos_token_id", &[], vocab_size)?,
        thresholds: Vec::new(),
    })
}

fn plan(spec: &ModelSpec, _: &Config, prefix: &str, plan: &mut Plan) -> Result<(), ConfigError> {
    let (hidden, attention) = (spec.hidden_size, spec.attention());
    let whole = |name: &str, shape: &[usize]| Part::whole(format!("{prefix}{name}"), shape);
    plan.add("embed.tokens", vec![whole("embed_tokens.weight", &[spec.vocab_size, hidden])]);
    let (queries, keys) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
    for layer in 0..spec.layers.len() {
        let source = |name: &str, shape: &[usize]| whole(&format!("layers.{layer}.{name}"), shape);
        let rows = [("q", queries), ("k", keys), ("v", keys)];
        let qkv = rows.map(|(which, rows)| source(&format!("self_attn.{which}_proj.weight"), &[rows, hidden]));
        let bias = rows.map(|(which, rows)| source(&format!("self_attn.{which}_proj.bias"), &[rows]));
        plan.add(format!("layers.{layer}.attention.qkv.weight"), qkv.into());
        plan.add(format!("layers.{layer}.attention.qkv.bias"), bias.into());
        if attention.qk_norm.is_some() {
            for (ours, theirs) in [("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")] {
                for kind in ["weight", "bias"] {
                    let norm = source(&format!("self_attn.{theirs}.{kind}"), &[attention.head_dim]);
                    plan.add(format!("layers.{layer}.attention.{ours}.{kind}"), vec![norm]);
                }
            }
        }
        block(spec, layer, ("self_attn.dense", "input_layernorm"), &source, plan);
    }
    for kind in ["weight", "bias"] {
        plan.add(format!("final_norm.{kind}"), vec![whole(&format!("final_layernorm.{kind}"), &[hidden])]);
    }
    if !spec.tied_head {
        plan.add("head.weight", vec![Part::whole(LM_HEAD, &[spec.vocab_size, hidden])]);
    }
    plan.add("head.bias", vec![Part::whole("lm_head.bias", &[spec.vocab_size])]);
    Ok(())
}

fn msft_plan(spec: &ModelSpec, _: &Config, prefix: &str, plan: &mut Plan) -> Result<(), ConfigError> {
    let (hidden, qkv) = (spec.hidden_size, spec.attention().qkv_size());
    let whole = |name: &str, shape: &[usize]| Part::whole(format!("{prefix}{name}"), shape);
    plan.add("embed.tokens", vec![whole("embd.wte.weight", &[spec.vocab_size, hidden])]);
    for layer in 0..spec.layers.len() {
        let source = |name: &str, shape: &[usize]| whole(&format!("h.{layer}.{name}"), shape);
        // All queries, all keys, all values already.
        plan.add(format!("layers.{layer}.attention.qkv.weight"), vec![source("mixer.Wqkv.weight", &[qkv, hidden])]);
        plan.add(format!("layers.{layer}.attention.qkv.bias"), vec![source("mixer.Wqkv.bias", &[qkv])]);
        block(spec, layer, ("mixer.out_proj", "ln"), &source, plan);
    }
    for kind in ["weight", "bias"] {
        plan.add(format!("final_norm.{kind}"), vec![Part::whole(format!("lm_head.ln.{kind}"), &[hidden])]);
    }
    if !spec.tied_head {
        plan.add("head.weight", vec![Part::whole(MSFT.head, &[spec.vocab_size, hidden])]);
    }
    plan.add("head.bias", vec![Part::whole("lm_head.linear.bias", &[spec.vocab_size])]);
    Ok(())
}

/// What both namings have but for two names: output projection and norm.
fn block(
    spec: &ModelSpec,
    layer: usize,
    (out, norm): (&str, &str),
    source: &dyn Fn(&str, &[usize]) -> Part,
    plan: &mut Plan,
) {
    let (hidden, ffn) = (spec.hidden_size, spec.ffn().size);
    let heads = spec.attention().heads * spec.attention().head_dim;
    let mut add = |name: &str, part| plan.add(format!("layers.{layer}.{name}"), vec![part]);
    add("attention.out.weight", source(&format!("{out}.weight"), &[hidden, heads]));
    add("attention.out.bias", source(&format!("{out}.bias"), &[hidden]));
    add("ffn.up.weight", source("mlp.fc1.weight", &[ffn, hidden]));
    add("ffn.up_bias", source("mlp.fc1.bias", &[ffn]));
    add("ffn.down.weight", source("mlp.fc2.weight", &[hidden, ffn]));
    add("ffn.down_bias", source("mlp.fc2.bias", &[hidden]));
    for kind in ["weight", "bias"] {
        add(&format!("attention_norm.{kind}"), source(&format!("{norm}.{kind}"), &[hidden]));
    }
}
