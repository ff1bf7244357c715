//! A whole model: its layers, and what comes before the first and after the last.

use serde::{Deserialize, Serialize};

use super::ffn::Ffn;
use super::layer::{Attention, LayerSpec, Norm};

/// Most layers that a model may have.
pub const LAYERS_MAX: usize = 1 << 14;

/// The architecture of a decoder-only transformer. Its JSON (`stored`) lists layers run by run.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Family name, for people: `opt`, `falcon`, `llama`.
    pub family: String,
    /// Rows of the token embedding (and of the head).
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the token embedding; differs from `hidden_size` only with input and output projections (OPT-350m).
    pub embed_size: usize,
    /// Longest sequence the model was made for, in tokens.
    pub max_positions: usize,
    /// The table of positions that is added to the token embedding, if there is one.
    pub learned_positions: Option<LearnedPositions>,
    /// The transformer blocks, first to last; at least one.
    pub layers: Vec<LayerSpec>,
    /// The norm before the head, if there is one.
    pub final_norm: Option<Norm>,
    /// Whether the head is the token embedding.
    pub tied_head: bool,
    /// Whether the head has a bias.
    pub head_bias: bool,
    /// Token id that begins a sequence by the configuration. What a text really begins with is for the tokenizer to say; only in
    /// bundles from before [`SpecialTokens`](crate::bundle::SpecialTokens) is it this.
    pub bos: Option<u32>,
    /// Token ids that end a sequence.
    pub eos: Vec<u32>,
    /// For each layer the magnitude (of what its down vectors are multiplied by) above which a neuron counts as active; empty:
    /// above zero. It says what predictors learn and what is measured. Whatever is computed is added whole all the same.
    pub thresholds: Vec<f32>,
}

/// A learned table of positions; the row of position `p` is `p + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnedPositions {
    /// Rows before that of position 0.
    pub offset: usize,
}

/// A layer that differs from the first in what all layers of a model must share.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("layer {layer}: {what} is {found}, and {expected} in layer 0; layers that differ in it are not supported")]
pub struct LayerMismatch {
    /// The first such layer.
    pub layer: usize,
    /// What differs, by its key.
    pub what: &'static str,
    /// What layer 0 has.
    pub expected: String,
    /// What this one has.
    pub found: String,
}

impl ModelSpec {
    /// The architecture as text that names it: its JSON, which later versions write alike.
    pub fn text(&self) -> String {
        serde_json::to_string(self).expect("an architecture is plain data")
    }

    /// Magnitude above which a neuron of `layer` counts as active.
    pub fn threshold(&self, layer: usize) -> f32 {
        self.thresholds.get(layer).copied().unwrap_or(0.0)
    }

    /// The FFN that every layer has: bundles have one layout of neuron records for all.
    ///
    /// # Panics
    /// If there are no layers.
    pub fn ffn(&self) -> &Ffn {
        self.layers[0].ffn()
    }

    /// The first layer's attention. Every layer has as many heads, of the same width; biases and norms are each layer's own.
    ///
    /// # Panics
    /// If there are no layers.
    pub fn attention(&self) -> &Attention {
        &self.layers[0].attention
    }

    /// Checks that the layers share what [`ModelSpec::ffn`] and [`ModelSpec::attention`] say of all of them.
    ///
    /// # Errors
    /// The first layer that differs.
    pub fn check_shared(&self) -> Result<(), LayerMismatch> {
        let Some(first) = self.layers.first().map(shared) else { return Ok(()) };
        for (layer, spec) in self.layers.iter().enumerate() {
            for ((what, expected), (_, found)) in first.iter().cloned().zip(shared(spec)) {
                if expected != found {
                    return Err(LayerMismatch { layer, what, expected, found });
                }
            }
        }
        Ok(())
    }
}

/// What every layer of a model must have in common, by key.
fn shared(layer: &LayerSpec) -> [(&'static str, String); 7] {
    let (attention, ffn) = (&layer.attention, layer.ffn());
    [
        ("attention.heads", attention.heads.to_string()),
        ("attention.kv_heads", attention.kv_heads.to_string()),
        ("attention.head_dim", attention.head_dim.to_string()),
        ("ffn.size", ffn.size.to_string()),
        ("ffn.activation", format!("{:?}", ffn.activation)),
        ("ffn.gated", ffn.gated.to_string()),
        ("ffn.up_activated", ffn.up_activated.to_string()),
    ]
}
