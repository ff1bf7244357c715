//! The feed-forward part of a layer.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The feed-forward part of a layer, by its kind.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForward {
    /// One FFN for every token.
    Dense(Ffn),
}

/// Feed-forward shape: `down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when gated, with `act(up(x))` where that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ffn {
    /// Number of neurons.
    pub size: usize,
    /// The activation function.
    pub activation: Activation,
    /// Whether there is a gate projection, whose activation multiplies the up projection.
    pub gated: bool,
    /// Whether the activation function is applied to the up projection of a gated FFN as well (Bamboo, TurboSparse).
    #[serde(default, skip_serializing_if = "is_false")]
    pub up_activated: bool,
    /// Whether the gate projection has a bias.
    #[serde(default, skip_serializing_if = "is_false")]
    pub gate_bias: bool,
    /// Whether the up projection has a bias.
    pub up_bias: bool,
    /// Whether the down projection has a bias.
    pub down_bias: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(flag: &bool) -> bool {
    !flag
}

impl Ffn {
    /// Weight vectors of one neuron record: `[gate,] up, down`.
    pub const fn vectors(&self) -> usize {
        if self.gated { 3 } else { 2 }
    }
}

/// Activation function of an FFN.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    Relu2,
    /// `x` where `x` exceeds the threshold, else 0 (ProSparse).
    FatRelu(f32),
    /// `x * Phi(x)` with the error function.
    Gelu,
    /// The tanh approximation of GELU (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `x * sigmoid(x)`.
    Silu,
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relu => f.write_str("relu"),
            Self::Relu2 => f.write_str("relu2"),
            Self::FatRelu(threshold) => write!(f, "fatrelu with threshold {threshold}"),
            Self::Gelu => f.write_str("gelu"),
            Self::GeluTanh => f.write_str("gelu, the tanh approximation"),
            Self::Silu => f.write_str("silu"),
        }
    }
}

impl Activation {
    /// Whether most outputs can be exactly zero.
    pub const fn is_sparse(self) -> bool {
        matches!(self, Activation::Relu | Activation::Relu2 | Activation::FatRelu(_))
    }
}
