//! GPT-NeoX (Pythia and its relatives): attention and FFN side by side with a norm each, a quarter of each head rotated.
//!
//! Keys and defaults are those of transformers' `GPTNeoXConfig`.

use super::config::{HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCABULARY_MAX, WIDTH_MAX, head_dim};
use super::keys::Keys;
use super::rotary::{self, RotaryKeys};
use super::{Config, Family, FamilyInfo, fused};
use crate::checkpoint::config_error::ConfigError;
use crate::checkpoint::head_names::EMBED_OUT;
use crate::checkpoint::plan::{Part, Plan};
use crate::model::{Attention, Block, FeedForward, Ffn, LayerSpec, ModelSpec, Norm, NormKind};

/// The family's row in docs/families.md.
pub(super) const INFO: FamilyInfo = FamilyInfo {
    name: "gpt_neox",
    model_types: &["gpt_neox"],
    checkpoints: "EleutherAI/pythia-*, gpt-neox-20b and relufied ones",
    covers: "parallel and sequential blocks, partial rotation, with and without attention biases",
    verified: "transformers",
    references: 2,
};

pub(super) static FAMILY: Family = Family {
    info: &INFO,
    model_types: &["gpt_neox"],
    keys: &KEYS,
    architectures: &["GPTNeoXForCausalLM"],
    prefixes: &["gpt_neox.", ""],
    embedding: "embed_in.weight",
    head: EMBED_OUT,
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
        "attention_bias",
        "use_parallel_residual",
        "rotary_emb_base",
        "rotary_pct",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
    ],
    refused: &[],
    idle: &["hidden_dropout_prob", "attention_probs_dropout_prob"],
};

const ROTARY: RotaryKeys =
    RotaryKeys { theta: "rotary_emb_base", default_theta: 10_000.0, share: Some(("rotary_pct", 0.25)) };

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let vocab_size = config.count(&["vocab_size"], Some(50_432), VOCABULARY_MAX)?;
    let hidden_size = config.count(&["hidden_size"], Some(6144), WIDTH_MAX)?;
    let heads = config.count(&["num_attention_heads"], Some(64), HEADS_MAX)?;
    let head_dim = head_dim(("hidden_size", hidden_size), ("num_attention_heads", heads))?;
    let rotated = config.optional_count("head_dim", WIDTH_MAX)?;
    let max_positions = config.count(&["max_position_embeddings"], Some(2048), POSITIONS_MAX)?;
    let attention_bias = config.flag("attention_bias", true)?;
    let parallel = config.flag("use_parallel_residual", true)?;
    let norm =
        Norm { kind: NormKind::LayerNorm, eps: config.epsilon("layer_norm_eps", 1e-5)?, weight: true, bias: true };
    let layer = LayerSpec {
        norm,
        block: if parallel { Block::ParallelTwoNorms } else { Block::PreNorm },
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            qk_norm: None,
        },
        // A stated width of heads decides how much of them is rotated and nothing else.
        positions: rotary::rotary_part(config, &ROTARY, rotated.unwrap_or(head_dim), head_dim, max_positions)?,
        feed_forward: FeedForward::Dense(Ffn {
            size: config.count(&["intermediate_size"], Some(24_576), WIDTH_MAX)?,
            activation: config.activation("hidden_act", "gelu")?,
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
        layers: vec![layer; config.count(&["num_hidden_layers"], Some(44), LAYERS_MAX)?],
        final_norm: Some(norm),
        tied_head: config.flag("tie_word_embeddings", false)?,
        head_bias: false,
        // The tokenizer puts nothing in front of a text.
        bos: None,
        eos: config.tokens("eos_token_id", &[2], vocab_size)?,
        thresholds: Vec::new(),
    })
}

fn plan(spec: &ModelSpec, _: &Config, prefix: &str, plan: &mut Plan) -> Result<(), ConfigError> {
    let (hidden, ffn, attention) = (spec.hidden_size, spec.ffn().size, spec.attention());
    let qkv = attention.qkv_size();
    let whole = |name: &str, shape: &[usize]| Part::whole(format!("{prefix}{name}"), shape);
    plan.add("embed.tokens", vec![whole("embed_in.weight", &[spec.vocab_size, hidden])]);
    for layer in 0..spec.layers.len() {
        let source = |name: &str, shape: &[usize]| whole(&format!("layers.{layer}.{name}"), shape);
        let mut add = |name: &str, parts| plan.add(format!("layers.{layer}.{name}"), parts);
        let projection = source("attention.query_key_value.weight", &[qkv, hidden]);
        add("attention.qkv.weight", fused::by_head(&projection, attention));
        add("attention.out.weight", vec![source("attention.dense.weight", &[hidden, hidden])]);
        if attention.qkv_bias {
            let bias = source("attention.query_key_value.bias", &[qkv]);
            add("attention.qkv.bias", fused::by_head(&bias, attention));
            add("attention.out.bias", vec![source("attention.dense.bias", &[hidden])]);
        }
        add("ffn.up.weight", vec![source("mlp.dense_h_to_4h.weight", &[ffn, hidden])]);
        add("ffn.up_bias", vec![source("mlp.dense_h_to_4h.bias", &[ffn])]);
        add("ffn.down.weight", vec![source("mlp.dense_4h_to_h.weight", &[hidden, ffn])]);
        add("ffn.down_bias", vec![source("mlp.dense_4h_to_h.bias", &[hidden])]);
        for kind in ["weight", "bias"] {
            add(&format!("attention_norm.{kind}"), vec![source(&format!("input_layernorm.{kind}"), &[hidden])]);
            add(&format!("ffn_norm.{kind}"), vec![source(&format!("post_attention_layernorm.{kind}"), &[hidden])]);
        }
    }
    for kind in ["weight", "bias"] {
        plan.add(format!("final_norm.{kind}"), vec![whole(&format!("final_layer_norm.{kind}"), &[hidden])]);
    }
    if !spec.tied_head {
        plan.add("head.weight", vec![Part::whole(EMBED_OUT, &[spec.vocab_size, hidden])]);
    }
    Ok(())
}
