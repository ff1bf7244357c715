//! Falcon in its three architectures, and under the names it had before transformers supported it (RefinedWeb).
//!
//! Keys and defaults are those of transformers' `FalconConfig`. The fused attention projection is stored in another order in
//! each architecture; here it becomes all queries, all keys, all values.

use super::config::{HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCABULARY_MAX, WIDTH_MAX, head_dim};
use super::keys::{Keys, Refused};
use super::{Config, Family, FamilyInfo, LM_HEAD, fused, rotary};
use crate::checkpoint::config_error::ConfigError;
use crate::checkpoint::plan::{Part, Plan};
use crate::model::{Attention, Block, FeedForward, Ffn, LayerSpec, ModelSpec, Norm, NormKind, Positions};

/// The family's row in docs/families.md.
pub(super) const INFO: FamilyInfo = FamilyInfo {
    name: "falcon",
    model_types: &["falcon", "RefinedWebModel", "RefinedWeb"],
    checkpoints: "tiiuae/falcon-7b, -40b, -11b, -rw; relufied ones are the sparse ones",
    covers: "multi-query, grouped, ALiBi, one or two norms, names from before transformers supported it",
    verified: "transformers; also a trained model",
    references: 10,
};

pub(super) static FAMILY: Family = Family {
    info: &INFO,
    model_types: &["falcon"],
    keys: &Keys {
        followed: &[
            "hidden_size",
            "n_embed",
            "num_hidden_layers",
            "num_attention_heads",
            "num_kv_heads",
            "ffn_hidden_size",
            "max_position_embeddings",
            "layer_norm_epsilon",
            "activation",
            "bias",
            "alibi",
            "new_decoder_architecture",
            "multi_query",
            "parallel_attn",
            "num_ln_in_parallel_attn",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "original_max_position_embeddings",
        ],
        refused: &[
            Refused { key: "head_dim", is_harmless: |_| false, supported: "hidden_size / num_attention_heads alone" },
            Refused { key: "rotary", is_harmless: |_| false, supported: "\"alibi\" alone" },
        ],
        // transformers' code has no such connection.
        idle: &["apply_residual_connection_post_layernorm"],
    },
    architectures: &["FalconForCausalLM", "RWForCausalLM"],
    prefixes: &["transformer.", ""],
    embedding: "word_embeddings.weight",
    head: LM_HEAD,
    spec,
    plan,
    is_ignorable: |_, _| false,
};

/// The same models with their first names: RefinedWebModel was the 7b and the rw models, RefinedWeb the 40b.
pub(super) static REFINED_WEB: Family = Family {
    model_types: &["RefinedWebModel", "RefinedWeb"],
    keys: &Keys {
        followed: &[
            "hidden_size",
            "n_embed",
            "num_hidden_layers",
            "n_layer",
            "num_attention_heads",
            "n_head",
            "num_kv_heads",
            "n_head_kv",
            "ffn_hidden_size",
            "max_position_embeddings",
            "layer_norm_epsilon",
            "activation",
            "bias",
            "alibi",
            "new_decoder_architecture",
            "multi_query",
            "parallel_attn",
            "num_ln_in_parallel_attn",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "original_max_position_embeddings",
        ],
        refused: &[Refused {
            key: "apply_residual_connection_post_layernorm",
            is_harmless: |value| value.is_null() || *value == false,
            supported: "false",
        }],
        idle: &[],
    },
    ..FAMILY
};

const HIDDEN: &[&str] = &["hidden_size", "n_embed"];
const HEADS: &[&str] = &["num_attention_heads", "n_head"];
const KV_HEADS: &[&str] = &["num_kv_heads", "n_head_kv"];

/// Order of the fused projection's rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fused {
    /// 40b: for each key head its queries, the key, the value.
    Grouped,
    /// 7b: all queries, one key, one value. The canonical order.
    MultiQuery,
    /// rw: for each head query, key, value.
    PerHead,
}

fn row_order(config: &Config) -> Result<Fused, ConfigError> {
    let is_old_40b = config.text("model_type", "")? == "RefinedWeb";
    Ok(if config.flag("new_decoder_architecture", is_old_40b)? {
        Fused::Grouped
    } else if config.flag("multi_query", true)? {
        Fused::MultiQuery
    } else {
        Fused::PerHead
    })
}

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let fused = row_order(config)?;
    let vocab_size = config.count(&["vocab_size"], Some(65_024), VOCABULARY_MAX)?;
    let hidden_size = config.count(HIDDEN, Some(4544), WIDTH_MAX)?;
    let heads = config.count(HEADS, Some(71), HEADS_MAX)?;
    let head_dim = head_dim(("hidden_size", hidden_size), ("num_attention_heads", heads))?;
    let stated_kv_heads = config.count(KV_HEADS, Some(heads), HEADS_MAX)?;
    let kv_heads = match fused {
        Fused::Grouped => stated_kv_heads,
        Fused::MultiQuery => 1,
        Fused::PerHead => heads,
    };
    if !heads.is_multiple_of(kv_heads) || (fused == Fused::PerHead && stated_kv_heads != heads) {
        return Err(ConfigError::Contradiction {
            first: format!("num_attention_heads = {heads}"),
            second: format!("num_kv_heads = {stated_kv_heads}"),
            rule: "each key head serves the same number of query heads, and without new_decoder_architecture or multi_query exactly one",
        });
    }
    let max_positions = config.count(&["max_position_embeddings"], Some(2048), POSITIONS_MAX)?;
    let positions = if config.flag("alibi", false)? {
        Positions::Alibi
    } else {
        rotary::rotary(config, &rotary::PLAIN, head_dim, max_positions)?
    };
    let bias = config.flag("bias", false)?;
    let ffn_size = match config.optional_count("ffn_hidden_size", WIDTH_MAX)? {
        Some(size) => size,
        None => 4 * hidden_size,
    };
    let norm =
        Norm { kind: NormKind::LayerNorm, eps: config.epsilon("layer_norm_epsilon", 1e-5)?, weight: true, bias: true };
    let layer = LayerSpec {
        norm,
        block: block(config, fused)?,
        attention: Attention { heads, kv_heads, head_dim, qkv_bias: bias, out_bias: bias, qk_norm: None },
        positions,
        feed_forward: FeedForward::Dense(Ffn {
            size: ffn_size,
            activation: config.activation("activation", "gelu")?,
            gated: false,
            up_activated: false,
            gate_bias: false,
            up_bias: bias,
            down_bias: bias,
        }),
    };
    Ok(ModelSpec {
        family: INFO.name.into(),
        vocab_size,
        hidden_size,
        embed_size: hidden_size,
        max_positions,
        learned_positions: None,
        layers: vec![layer; config.count(&["num_hidden_layers", "n_layer"], Some(32), LAYERS_MAX)?],
        final_norm: Some(norm),
        tied_head: config.flag("tie_word_embeddings", true)?,
        head_bias: false,
        // The published models saw no token in front of a text.
        bos: None,
        eos: config.tokens("eos_token_id", &[11], vocab_size)?,
        thresholds: Vec::new(),
    })
}

fn block(config: &Config, fused: Fused) -> Result<Block, ConfigError> {
    let norms = config.optional_count("num_ln_in_parallel_attn", WIDTH_MAX)?;
    // The 40b architecture is parallel whatever parallel_attn says.
    let parallel = fused == Fused::Grouped || config.flag("parallel_attn", true)?;
    match (parallel, fused, norms) {
        (false, ..) => Ok(Block::PreNorm),
        (true, Fused::Grouped, None | Some(2)) => Ok(Block::ParallelTwoNorms),
        (true, Fused::Grouped, Some(1)) | (true, _, None | Some(1)) => Ok(Block::ParallelOneNorm),
        (true, _, Some(other)) => Err(ConfigError::Unsupported {
            key: "num_ln_in_parallel_attn".into(),
            found: other.to_string(),
            supported: "1, or 2 with new_decoder_architecture".into(),
        }),
    }
}

fn plan(spec: &ModelSpec, config: &Config, prefix: &str, plan: &mut Plan) -> Result<(), ConfigError> {
    let (hidden, ffn, attention) = (spec.hidden_size, spec.ffn().size, spec.attention());
    let fused = row_order(config)?;
    let whole = |name: &str, shape: &[usize]| Part::whole(format!("{prefix}{name}"), shape);
    plan.add("embed.tokens", vec![whole("word_embeddings.weight", &[spec.vocab_size, hidden])]);
    for layer in 0..spec.layers.len() {
        let source = |name: &str, shape: &[usize]| whole(&format!("h.{layer}.{name}"), shape);
        let canonical = |name: &str| format!("layers.{layer}.{name}");
        let qkv = attention.qkv_size();
        let weight = source("self_attention.query_key_value.weight", &[qkv, hidden]);
        plan.add(canonical("attention.qkv.weight"), unfuse(&weight, fused, spec));
        plan.add(canonical("attention.out.weight"), vec![source("self_attention.dense.weight", &[hidden, hidden])]);
        plan.add(canonical("ffn.up.weight"), vec![source("mlp.dense_h_to_4h.weight", &[ffn, hidden])]);
        plan.add(canonical("ffn.down.weight"), vec![source("mlp.dense_4h_to_h.weight", &[hidden, ffn])]);
        if attention.qkv_bias {
            let bias = source("self_attention.query_key_value.bias", &[qkv]);
            plan.add(canonical("attention.qkv.bias"), unfuse(&bias, fused, spec));
            plan.add(canonical("attention.out.bias"), vec![source("self_attention.dense.bias", &[hidden])]);
            plan.add(canonical("ffn.up_bias"), vec![source("mlp.dense_h_to_4h.bias", &[ffn])]);
            plan.add(canonical("ffn.down_bias"), vec![source("mlp.dense_4h_to_h.bias", &[hidden])]);
        }
        let (attention_norm, ffn_norm) = match spec.layers[layer].block {
            Block::ParallelTwoNorms => ("ln_attn", Some("ln_mlp")),
            Block::ParallelOneNorm => ("input_layernorm", None),
            Block::PreNorm | Block::PostNorm => ("input_layernorm", Some("post_attention_layernorm")),
        };
        for kind in ["weight", "bias"] {
            let attention_norm = source(&format!("{attention_norm}.{kind}"), &[hidden]);
            plan.add(canonical(&format!("attention_norm.{kind}")), vec![attention_norm]);
            if let Some(ffn_norm) = ffn_norm {
                let ffn_norm = source(&format!("{ffn_norm}.{kind}"), &[hidden]);
                plan.add(canonical(&format!("ffn_norm.{kind}")), vec![ffn_norm]);
            }
        }
    }
    for kind in ["weight", "bias"] {
        plan.add(format!("final_norm.{kind}"), vec![whole(&format!("ln_f.{kind}"), &[hidden])]);
    }
    if !spec.tied_head {
        plan.add("head.weight", vec![Part::whole(LM_HEAD, &[spec.vocab_size, hidden])]);
    }
    Ok(())
}

/// The rows of a fused projection as all queries, all keys, all values.
fn unfuse(projection: &Part, order: Fused, spec: &ModelSpec) -> Vec<Part> {
    match order {
        Fused::MultiQuery => vec![projection.clone()],
        Fused::Grouped | Fused::PerHead => fused::by_head(projection, spec.attention()),
    }
}
