//! OPT (and Galactica, which is one): learned positions offset by 2, ReLU, everything with biases.
//!
//! Keys and defaults are those of transformers' `OPTConfig`.

use super::config::{HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, VOCABULARY_MAX, WIDTH_MAX, head_dim};
use super::keys::Keys;
use super::{Config, Family, FamilyInfo, LM_HEAD};
use crate::checkpoint::config_error::ConfigError;
use crate::checkpoint::plan::{Part, Plan};
use crate::model::{
    Attention, Block, FeedForward, Ffn, LayerSpec, LearnedPositions, ModelSpec, Norm, NormKind, Positions,
};

/// The family's row in docs/families.md.
pub(super) const INFO: FamilyInfo = FamilyInfo {
    name: "opt",
    model_types: &["opt"],
    checkpoints: "facebook/opt-125m .. 66b, Galactica",
    covers: "pre- and post-norm, projected embeddings, without biases, untied head",
    verified: "transformers; also a trained model",
    references: 5,
};

pub(super) static FAMILY: Family = Family {
    info: &INFO,
    model_types: &["opt"],
    keys: &KEYS,
    architectures: &["OPTForCausalLM"],
    // The files of 2022 were those of the bare decoder.
    prefixes: &["model.decoder.", "decoder.", ""],
    embedding: "embed_tokens.weight",
    head: LM_HEAD,
    spec,
    plan,
    is_ignorable,
};

const KEYS: Keys = Keys {
    followed: &[
        "hidden_size",
        "word_embed_proj_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "ffn_dim",
        "max_position_embeddings",
        "activation_function",
        "enable_bias",
        "layer_norm_elementwise_affine",
        "do_layer_norm_before",
        "_remove_final_layer_norm",
    ],
    refused: &[],
    // Of Galactica's files; no code reads them.
    idle: &["learned_embeddings", "scale_embeddings"],
};

/// Rows of the position table before that of position 0.
const POSITION_OFFSET: usize = 2;

fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let vocab_size = config.count(&["vocab_size"], Some(50_272), VOCABULARY_MAX)?;
    let hidden_size = config.count(&["hidden_size"], Some(768), WIDTH_MAX)?;
    let heads = config.count(&["num_attention_heads"], Some(12), HEADS_MAX)?;
    let bias = config.flag("enable_bias", true)?;
    let affine = config.flag("layer_norm_elementwise_affine", true)?;
    let pre_norm = config.flag("do_layer_norm_before", true)?;
    // The epsilon is not in the configuration: it is torch's default.
    let norm = Norm { kind: NormKind::LayerNorm, eps: 1e-5, weight: affine, bias: affine };
    let layer = LayerSpec {
        norm,
        block: if pre_norm { Block::PreNorm } else { Block::PostNorm },
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim: head_dim(("hidden_size", hidden_size), ("num_attention_heads", heads))?,
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: None,
        },
        positions: Positions::None,
        feed_forward: FeedForward::Dense(Ffn {
            size: config.count(&["ffn_dim"], Some(3072), WIDTH_MAX)?,
            activation: config.activation("activation_function", "relu")?,
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
        embed_size: config.optional_count("word_embed_proj_dim", WIDTH_MAX)?.unwrap_or(hidden_size),
        max_positions: config.count(&["max_position_embeddings"], Some(2048), POSITIONS_MAX)?,
        learned_positions: Some(LearnedPositions { offset: POSITION_OFFSET }),
        layers: vec![layer; config.count(&["num_hidden_layers"], Some(12), LAYERS_MAX)?],
        final_norm: (pre_norm && !config.flag("_remove_final_layer_norm", false)?).then_some(norm),
        tied_head: config.flag("tie_word_embeddings", true)?,
        head_bias: false,
        bos: config.token("bos_token_id", Some(2), vocab_size)?,
        eos: config.tokens("eos_token_id", &[2], vocab_size)?,
        thresholds: Vec::new(),
    })
}

fn plan(spec: &ModelSpec, _: &Config, prefix: &str, plan: &mut Plan) -> Result<(), ConfigError> {
    let (hidden, ffn) = (spec.hidden_size, spec.ffn().size);
    let whole = |name: &str, shape: &[usize]| Part::whole(format!("{prefix}{name}"), shape);
    plan.add("embed.tokens", vec![whole("embed_tokens.weight", &[spec.vocab_size, spec.embed_size])]);
    let positions = spec.max_positions + POSITION_OFFSET;
    plan.add("embed.positions", vec![whole("embed_positions.weight", &[positions, hidden])]);
    if spec.embed_size != hidden {
        plan.add("embed.project_in", vec![whole("project_in.weight", &[hidden, spec.embed_size])]);
        plan.add("embed.project_out", vec![whole("project_out.weight", &[spec.embed_size, hidden])]);
    }
    for layer in 0..spec.layers.len() {
        let source = |name: &str, shape: &[usize]| whole(&format!("layers.{layer}.{name}"), shape);
        let canonical = |name: &str| format!("layers.{layer}.{name}");
        let qkv = |kind: &str, shape: &[usize]| {
            ["q", "k", "v"].iter().map(|which| source(&format!("self_attn.{which}_proj.{kind}"), shape)).collect()
        };
        plan.add(canonical("attention.qkv.weight"), qkv("weight", &[hidden, hidden]));
        plan.add(canonical("attention.out.weight"), vec![source("self_attn.out_proj.weight", &[hidden, hidden])]);
        plan.add(canonical("ffn.up.weight"), vec![source("fc1.weight", &[ffn, hidden])]);
        plan.add(canonical("ffn.down.weight"), vec![source("fc2.weight", &[hidden, ffn])]);
        if spec.ffn().up_bias {
            plan.add(canonical("attention.qkv.bias"), qkv("bias", &[hidden]));
            plan.add(canonical("attention.out.bias"), vec![source("self_attn.out_proj.bias", &[hidden])]);
            plan.add(canonical("ffn.up_bias"), vec![source("fc1.bias", &[ffn])]);
            plan.add(canonical("ffn.down_bias"), vec![source("fc2.bias", &[hidden])]);
        }
        if spec.layers[layer].norm.weight {
            for kind in ["weight", "bias"] {
                let attention_norm = source(&format!("self_attn_layer_norm.{kind}"), &[hidden]);
                plan.add(canonical(&format!("attention_norm.{kind}")), vec![attention_norm]);
                // Within a layer this name means the norm of the FFN.
                let ffn_norm = source(&format!("final_layer_norm.{kind}"), &[hidden]);
                plan.add(canonical(&format!("ffn_norm.{kind}")), vec![ffn_norm]);
            }
        }
    }
    if spec.final_norm.is_some_and(|norm| norm.weight) {
        for kind in ["weight", "bias"] {
            plan.add(format!("final_norm.{kind}"), vec![whole(&format!("final_layer_norm.{kind}"), &[hidden])]);
        }
    }
    if !spec.tied_head {
        plan.add("head.weight", vec![Part::whole(LM_HEAD, &[spec.vocab_size, spec.embed_size])]);
    }
    Ok(())
}

/// `version` is a counter that fairseq left behind. A final norm is left out by the configuration's word.
fn is_ignorable(spec: &ModelSpec, name: &str) -> bool {
    name == "version" || (spec.final_norm.is_none() && name.starts_with("final_layer_norm."))
}
