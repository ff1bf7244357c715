//! The limits of what a manifest may claim, so that its numbers can be used without fear of overflow.
//!
//! The limits are far beyond any model and low enough that products of any two or three of the numbers fit 64 bits.

use super::error::Fault;
use super::manifest::{Manifest, ReusePoint};
use super::section::Section;
use crate::chat::Chat;
use crate::model::{
    Activation, Attention, Ffn, LAYERS_MAX, LayerSpec, ModelSpec, Norm, NormKind, Positions, RopeScaling,
};

/// Longest manifest.
pub(super) const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Longest tokenizer.
pub(super) const TOKENIZER_BYTES_MAX: u64 = 1 << 30;
/// Longest index.
pub(super) const INDEX_BYTES_MAX: u64 = 4 << 30;

const WIDTH_MAX: usize = 1 << 20;
const NEURONS_MAX: usize = 1 << 24;
const VOCAB_MAX: usize = 1 << 24;
const POSITIONS_MAX: usize = 1 << 30;
const HEADS_MAX: usize = 1 << 14;
const OFFSET_MAX: usize = 1 << 16;
const REUSE_POINTS_MAX: usize = 256;
/// Each needs tables of its own while running.
pub(super) const KINDS_OF_POSITIONS_MAX: usize = 16;

fn within(what: &str, value: usize, least: usize, most: usize) -> Result<(), Fault> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Fault::new(Section::Manifest, what, format_args!("{least} to {most}"), value))
}

fn holds(what: &str, condition: bool, expected: &str, found: impl std::fmt::Display) -> Result<(), Fault> {
    if condition { Ok(()) } else { Err(Fault::new(Section::Manifest, what, expected, found)) }
}

fn positive(what: &str, value: f32) -> Result<(), Fault> {
    holds(what, value.is_finite() && value > 0.0, "a positive number", value)
}

/// Checks the numbers of an architecture, each for itself and with each other.
pub(crate) fn check_model(model: &ModelSpec) -> Result<(), Fault> {
    within("vocab_size", model.vocab_size, 1, VOCAB_MAX)?;
    within("hidden_size", model.hidden_size, 1, WIDTH_MAX)?;
    within("embed_size", model.embed_size, 1, WIDTH_MAX)?;
    within("max_positions", model.max_positions, 1, POSITIONS_MAX)?;
    if let Some(positions) = model.learned_positions {
        within("learned_positions.offset", positions.offset, 0, OFFSET_MAX)?;
    }
    within("layers", model.layers.len(), 1, LAYERS_MAX)?;
    for (number, layer) in model.layers.iter().enumerate() {
        check_layer(layer).map_err(|fault| fault.within(format_args!("layer {number}")))?;
    }
    model.check_shared().map_err(|mismatch| {
        let (what, expected) = (format!("layer {}: {}", mismatch.layer, mismatch.what), mismatch.expected);
        Fault::new(Section::Manifest, what, format_args!("{expected}, as in layer 0"), mismatch.found)
    })?;
    check_kinds_of_positions(model)?;
    if let Some(norm) = &model.final_norm {
        check_norm("final_norm", norm)?;
    }
    if !model.thresholds.is_empty() {
        within("number of thresholds", model.thresholds.len(), model.layers.len(), model.layers.len())?;
        for threshold in &model.thresholds {
            holds(
                "threshold of a layer",
                threshold.is_finite() && *threshold >= 0.0,
                "a number not below 0",
                threshold,
            )?;
        }
    }
    for id in model.bos.iter().chain(&model.eos) {
        within("id of a special token", *id as usize, 0, model.vocab_size - 1)?;
    }
    Ok(())
}

fn check_layer(layer: &LayerSpec) -> Result<(), Fault> {
    check_norm("norm", &layer.norm)?;
    check_attention(&layer.attention)?;
    check_positions(&layer.positions, layer.attention.head_dim)?;
    check_ffn(layer.ffn())
}

fn check_norm(what: &str, norm: &Norm) -> Result<(), Fault> {
    let eps = norm.eps;
    holds(&format!("{what}.eps"), eps.is_finite() && eps >= 0.0, "a number not below 0", eps)?;
    let is_computed = norm.kind == NormKind::LayerNorm || !norm.bias;
    holds(&format!("{what}.bias"), is_computed, "false, as the kind is rms_norm", norm.bias)
}

fn check_attention(attention: &Attention) -> Result<(), Fault> {
    within("attention.heads", attention.heads, 1, HEADS_MAX)?;
    within("attention.kv_heads", attention.kv_heads, 1, attention.heads)?;
    within("attention.head_dim", attention.head_dim, 1, WIDTH_MAX)?;
    within("width of all heads", attention.heads * attention.head_dim, 1, WIDTH_MAX)?;
    let divides = attention.heads.is_multiple_of(attention.kv_heads);
    holds("attention.kv_heads", divides, "a divisor of the number of heads", attention.kv_heads)?;
    match &attention.qk_norm {
        Some(norm) => check_norm("attention.qk_norm", norm),
        None => Ok(()),
    }
}

fn check_ffn(ffn: &Ffn) -> Result<(), Fault> {
    within("ffn.size", ffn.size, 1, NEURONS_MAX)?;
    if let Activation::FatRelu(threshold) = ffn.activation {
        holds("ffn.activation threshold", threshold.is_finite(), "a finite number", threshold)?;
    }
    holds(
        "ffn of two vectors",
        ffn.gated || !ffn.up_activated && !ffn.gate_bias,
        "no gate",
        "one that is activated or biased",
    )
}

fn check_positions(positions: &Positions, head_dim: usize) -> Result<(), Fault> {
    let Positions::Rotary { dims, theta, scaling } = *positions else { return Ok(()) };
    within("positions.dims", dims, 2, head_dim)?;
    holds("positions.dims", dims.is_multiple_of(2), "an even number", dims)?;
    positive("positions.theta", theta)?;
    match scaling {
        None => Ok(()),
        Some(RopeScaling::Linear { factor }) => positive("positions.scaling.factor", factor),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions }) => {
            positive("positions.scaling.factor", factor)?;
            positive("positions.scaling.low_freq_factor", low_freq_factor)?;
            positive("positions.scaling.high_freq_factor", high_freq_factor)?;
            within("positions.scaling.original_positions", original_positions, 1, POSITIONS_MAX)
        }
    }
}

fn check_kinds_of_positions(model: &ModelSpec) -> Result<(), Fault> {
    let mut kinds: Vec<&Positions> = Vec::new();
    for layer in &model.layers {
        if !kinds.contains(&&layer.positions) {
            kinds.push(&layer.positions);
            within("kinds of positions in the layers", kinds.len(), 1, KINDS_OF_POSITIONS_MAX)?;
        }
    }
    Ok(())
}

/// Checks what a manifest says beside the architecture and the layout of records.
pub(super) fn check_facts(manifest: &Manifest) -> Result<(), Fault> {
    let layers = manifest.model.layers.len();
    for format in manifest.resident.formats() {
        holds("resident", format.is_quantised(), "int8 or int4, or no such key", format)?;
    }
    if let Some(predictors) = &manifest.predictors {
        within("number of predictors", predictors.layers.len(), layers, layers)?;
        for predictor in &predictors.layers {
            within("rank of a predictor", predictor.rank, 1, WIDTH_MAX)?;
            if let Some(rows) = predictor.rows {
                within("rows of a predictor", rows, 1, WIDTH_MAX)?;
            }
            if let Some(rank) = predictor.look_ahead_rank {
                within("rank of a look-ahead predictor", rank, 1, WIDTH_MAX)?;
            }
        }
    }
    if let Some(sparsity) = &manifest.sparsity {
        within("number of sparsity entries", sparsity.len(), layers, layers)?;
        for layer in sparsity {
            holds("active share of a layer", (0.0..=1.0).contains(&layer.active), "0 to 1", layer.active)?;
            if let Some(predicted) = layer.predicted {
                holds("predicted share of a layer", (0.0..=1.0).contains(&predicted), "0 to 1", predicted)?;
            }
            if let Some(missed) = layer.missed {
                holds("missed share of a layer", (0.0..=1.0).contains(&missed), "0 to 1", missed)?;
            }
            if let Some(half_life) = layer.half_life {
                within("half-life of a layer's cache", half_life as usize, 1, HALF_LIFE_MAX)?;
            }
            check_reuse(&layer.reuse)?;
        }
    }
    if let Some((what, most, found)) = manifest.chat.as_ref().and_then(Chat::excess) {
        within(what, found, 0, most)?;
    }
    if let Some((name, expected, found)) = manifest.sampling.fault() {
        holds(&format!("sampling.{name}"), false, expected, found)?;
    }
    Ok(())
}

/// A use that counts half after so many tokens never fades.
const HALF_LIFE_MAX: usize = 1 << 16;

/// Checks one layer's reuse curve.
fn check_reuse(reuse: &[ReusePoint]) -> Result<(), Fault> {
    within("number of points of a reuse curve", reuse.len(), 0, REUSE_POINTS_MAX)?;
    let ascend = reuse.windows(2).all(|pair| pair[0].slots < pair[1].slots);
    holds("slots of a reuse curve", ascend, "ascending numbers", reuse.len())?;
    for point in reuse {
        within("slots of a reuse curve", point.slots as usize, 0, NEURONS_MAX)?;
        let groups = 0.0..=NEURONS_MAX as f32;
        holds("missed groups of a reuse curve", groups.contains(&point.missed), "0 or more", point.missed)?;
        holds(
            "runs of a reuse curve",
            (0.0..=point.missed).contains(&point.runs),
            "0 to the missed groups",
            point.runs,
        )?;
    }
    Ok(())
}
