//! Persimmon: squared ReLU, normalised query and key heads, half of each head rotated, everything with biases.
//!
//! Keys and defaults are those of transformers' `PersimmonConfig`.

use super::config::{HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCABULARY_MAX, WIDTH_MAX, head_dim};
use super::keys::Keys;
use super::rotary::{self, RotaryKeys};
use super::{Config, Family, FamilyInfo, LM_HEAD, fused};
use crate::checkpoint::config_error::ConfigError;
use crate::checkpoint::plan::{Part, Plan};
use crate::model::{Attention, Block, FeedForward, Ffn, LayerSpec, ModelSpec, Norm, NormKind};

/// The family's row in docs/families.md.
pub(super) const INFO: FamilyInfo = FamilyInfo {
    name: "persimmon",
    model_types: &["persimmon"],
    checkpoints: "adept/persimmon-8b-*",
    covers: "squared ReLU, query and key norms, partial rotation",
    verified: "transformers",
    references: 2,
};

pub(super) static FAMILY: Family = Family {
    info: &INFO,
    model_types: &["persimmon"],
    keys: &KEYS,
    architectures: &["PersimmonForCausalLM"],
    prefixes: &["model.", ""],
    embedding: "embed_tokens.weight",
    head: LM_HEAD,
    spec,
    plan,
    is_ignorable: |_, _| false,
};

const KEYS: Keys = Keys {
    followed: &[
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
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
    // Every head has a key of its own.
    idle: &["num_key_value_heads"],
};

/// The published models say 25 000; silence has meant 10 000 since transformers 5.
const ROTARY: RotaryKeys =
    RotaryKeys { theta: "rope_theta", default_theta: 10_000.0, share: Some(("partial_rotary_factor", 0.5)) };

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let vocab_size = config.count(&["vocab_size"], Some(262_144), VOCABULARY_MAX)?;
    let hidden_size = config.count(&["hidden_size"], Some(4096), WIDTH_MAX)?;
    let heads = config.count(&["num_attention_heads"], Some(64), HEADS_MAX)?;
    let head_dim = head_dim(("hidden_size", hidden_size), ("num_attention_heads", heads))?;
    // Whoever states another width gets frequencies that do not fit the heads.
    if let Some(stated) = config.optional_count("head_dim", WIDTH_MAX)?.filter(|&stated| stated != head_dim) {
        return Err(ConfigError::Contradiction {
            first: format!("head_dim = {stated}"),
            second: format!("hidden_size / num_attention_heads = {head_dim}"),
            rule: "a persimmon's heads divide its width",
        });
    }
    let max_positions = config.count(&["max_position_embeddings"], Some(16_384), POSITIONS_MAX)?;
    let norm =
        Norm { kind: NormKind::LayerNorm, eps: config.epsilon("layer_norm_eps", 1e-5)?, weight: true, bias: true };
    let layer = LayerSpec {
        norm,
        block: Block::PreNorm,
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim,
            qkv_bias: true,
            out_bias: true,
            qk_norm: config.flag("qk_layernorm", true)?.then_some(norm),
        },
        positions: rotary::rotary(config, &ROTARY, head_dim, max_positions)?,
        feed_forward: FeedForward::Dense(Ffn {
            size: config.count(&["intermediate_size"], Some(16_384), WIDTH_MAX)?,
            activation: config.activation("hidden_act", "relu2")?,
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
        layers: vec![layer; config.count(&["num_hidden_layers"], Some(36), LAYERS_MAX)?],
        final_norm: Some(norm),
        tied_head: config.flag("tie_word_embeddings", false)?,
        head_bias: false,
        bos: config.token("bos_token_id", Some(1), vocab_size)?,
        eos: config.tokens("eos_token_id", &[2], vocab_size)?,
        thresholds: Vec::new(),
    })
}

fn plan(spec: &ModelSpec, _: &Config, prefix: &str, plan: &mut Plan) -> Result<(), ConfigError> {
    let (hidden, ffn, attention) = (spec.hidden_size, spec.ffn().size, spec.attention());
    let qkv = attention.qkv_size();
    let whole = |name: &str, shape: &[usize]| Part::whole(format!("{prefix}{name}"), shape);
    plan.add("embed.tokens", vec![whole("embed_tokens.weight", &[spec.vocab_size, hidden])]);
    for layer in 0..spec.layers.len() {
        let source = |name: &str, shape: &[usize]| whole(&format!("layers.{layer}.{name}"), shape);
        let mut add = |name: &str, parts| plan.add(format!("layers.{layer}.{name}"), parts);
        let projection = source("self_attn.query_key_value.weight", &[qkv, hidden]);
        add("attention.qkv.weight", fused::by_head(&projection, attention));
        let bias = source("self_attn.query_key_value.bias", &[qkv]);
        add("attention.qkv.bias", fused::by_head(&bias, attention));
        add("attention.out.weight", vec![source("self_attn.dense.weight", &[hidden, hidden])]);
        add("attention.out.bias", vec![source("self_attn.dense.bias", &[hidden])]);
        add("ffn.up.weight", vec![source("mlp.dense_h_to_4h.weight", &[ffn, hidden])]);
        add("ffn.up_bias", vec![source("mlp.dense_h_to_4h.bias", &[ffn])]);
        add("ffn.down.weight", vec![source("mlp.dense_4h_to_h.weight", &[hidden, ffn])]);
        add("ffn.down_bias", vec![source("mlp.dense_4h_to_h.bias", &[hidden])]);
        for kind in ["weight", "bias"] {
            if attention.qk_norm.is_some() {
                for (ours, theirs) in [("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")] {
                    let norm = source(&format!("self_attn.{theirs}.{kind}"), &[attention.head_dim]);
                    add(&format!("attention.{ours}.{kind}"), vec![norm]);
                }
            }
            add(&format!("attention_norm.{kind}"), vec![source(&format!("input_layernorm.{kind}"), &[hidden])]);
            add(&format!("ffn_norm.{kind}"), vec![source(&format!("post_attention_layernorm.{kind}"), &[hidden])]);
        }
    }
    for kind in ["weight", "bias"] {
        plan.add(format!("final_norm.{kind}"), vec![whole(&format!("final_layernorm.{kind}"), &[hidden])]);
    }
    if !spec.tied_head {
        plan.add("head.weight", vec![Part::whole(LM_HEAD, &[spec.vocab_size, hidden])]);
    }
    Ok(())
}
