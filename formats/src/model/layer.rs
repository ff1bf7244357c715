//! One transformer block as data.

use serde::{Deserialize, Serialize};

use super::ffn::{FeedForward, Ffn};

/// What the forward pass needs to know about one block but its weights. Layers of a model may differ in everything but
/// what [`ModelSpec::check_shared`](super::ModelSpec::check_shared) names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerSpec {
    /// The norms of attention and FFN.
    pub norm: Norm,
    /// How attention and FFN are joined.
    pub block: Block,
    /// Attention.
    pub attention: Attention,
    /// How attention sees positions.
    pub positions: Positions,
    /// The feed-forward part.
    pub feed_forward: FeedForward,
}

impl LayerSpec {
    /// The FFN whose neurons the layer has.
    pub const fn ffn(&self) -> &Ffn {
        let FeedForward::Dense(ffn) = &self.feed_forward;
        ffn
    }

    /// The same, to be changed.
    pub const fn ffn_mut(&mut self) -> &mut Ffn {
        let FeedForward::Dense(ffn) = &mut self.feed_forward;
        ffn
    }
}

/// Normalisation of a vector: of the residual stream, or of a head's query or key.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// Which formula.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
    /// Whether there is a weight.
    pub weight: bool,
    /// Whether there is a bias.
    pub bias: bool,
}

/// Normalisation formula.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Subtract the mean, divide by the standard deviation.
    LayerNorm,
    /// Divide by the root mean square.
    RmsNorm,
}

/// How a layer's attention sees positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Positions {
    /// Not at all: they enter with the embedding, or through other layers.
    None,
    /// Rotary embedding (rotate-half) of the first `dims` dimensions of each query and key head.
    Rotary {
        /// Rotated dimensions of a head; even.
        dims: usize,
        /// Base of the frequencies.
        theta: f32,
        /// Stretching of the frequencies, if any.
        scaling: Option<RopeScaling>,
    },
    /// A bias linear in the distance, added to the scores before they are divided by `sqrt(head_dim)`; slopes rounded to bf16.
    Alibi,
}

/// Stretching of rotary frequencies for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// All positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3's: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Wavelengths longer than `original_positions / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths shorter than `original_positions / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context the model was first trained for.
        original_positions: usize,
    },
}

/// Attention of a layer. The fused projection holds all query heads, then all key heads, then all value heads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// How each query and key head is normalised before rotation, if it is; weight and bias are `head_dim` wide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<Norm>,
}

impl Attention {
    /// Width of the fused query, key and value vector.
    pub const fn qkv_size(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// How attention and FFN are joined to the residual stream `x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// `h = x + attention(norm_a(x))`, `out = h + ffn(norm_f(h))`.
    PreNorm,
    /// `h = norm_a(x + attention(x))`, `out = norm_f(h + ffn(h))` (OPT-350m).
    PostNorm,
    /// `out = x + attention(norm_a(x)) + ffn(norm_a(x))` (Falcon-7b).
    ParallelOneNorm,
    /// `out = x + attention(norm_a(x)) + ffn(norm_f(x))` (Falcon-40b).
    ParallelTwoNorms,
}

impl Block {
    /// Whether there is a norm of its own in front of (or after) the FFN.
    pub const fn has_ffn_norm(self) -> bool {
        !matches!(self, Block::ParallelOneNorm)
    }

    /// Whether the FFN's input is known before attention has run.
    pub const fn is_parallel(self) -> bool {
        matches!(self, Block::ParallelOneNorm | Block::ParallelTwoNorms)
    }
}
