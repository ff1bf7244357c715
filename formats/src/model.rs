//! The architecture as data.
//!
//! A [`ModelSpec`] says everything the forward pass needs to know about a model but its weights. It is
//! made from a `config.json` by one small file per family (`checkpoint/families/`), kept in the bundle's
//! manifest, and read by the only forward pass there is. It knows nothing of files.
//!
//! The tensors are named canonically here as well, so that every family looks the same from the bundle on:
//! matrices are `[outputs, inputs]`, row-major.

use serde::{Deserialize, Serialize};

/// How the elements of a weight tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single-precision number.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// The name used in manifests and messages: `f32`, `f16` or `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The architecture of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Family name, for people: `opt`, `falcon`, `llama`.
    pub family: String,
    /// Rows of the token embedding (and of the head).
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the token embedding; differs from `hidden_size` only with input and output projections (OPT-350m).
    pub embed_size: usize,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Longest sequence the model was made for, in tokens.
    pub max_positions: usize,
    /// How the residual stream is normalised.
    pub norm: Norm,
    /// How positions enter.
    pub positions: Positions,
    /// Attention shape.
    pub attention: Attention,
    /// How attention and FFN are joined.
    pub block: Block,
    /// Feed-forward shape.
    pub ffn: Ffn,
    /// Whether a norm stands before the head.
    pub final_norm: bool,
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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub thresholds: Vec<f32>,
}

/// Normalisation of the residual stream.
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

/// How positions enter the model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Positions {
    /// A learned table added to the token embedding; row of position `p` is `p + offset`.
    Learned {
        /// Rows before that of position 0.
        offset: usize,
    },
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

/// Attention shape. The fused projection holds all query heads, then all key heads, then all value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Whether each query and key head is normalised (LayerNorm with weight and bias over `head_dim`) before rotation.
    pub qk_norm: bool,
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
    /// Whether there is a norm of its own in front of (or behind) the FFN.
    pub const fn has_ffn_norm(self) -> bool {
        !matches!(self, Block::ParallelOneNorm)
    }

    /// Whether the FFN's input is known before attention has run.
    pub const fn is_parallel(self) -> bool {
        matches!(self, Block::ParallelOneNorm | Block::ParallelTwoNorms)
    }
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

impl Activation {
    /// Whether most outputs can be exactly zero.
    pub const fn is_sparse(self) -> bool {
        matches!(self, Activation::Relu | Activation::Relu2 | Activation::FatRelu(_))
    }
}

/// A tensor that stays in memory: canonical name and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResidentTensor {
    /// Canonical name, such as `layers.3.attention.qkv.weight`.
    pub name: String,
    /// Shape; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
}

impl ModelSpec {
    /// Magnitude above which a neuron of `layer` counts as active.
    pub fn threshold(&self, layer: usize) -> f32 {
        self.thresholds.get(layer).copied().unwrap_or(0.0)
    }

    /// Every resident tensor of the model, in the order in which a bundle holds them.
    ///
    /// FFN projections are not among them: they are the flash section's neuron records. The FFN's `gate_bias` and `up_bias`
    /// are, and stand in storage order like everything in a bundle that has one entry per neuron.
    pub fn resident_tensors(&self) -> Vec<ResidentTensor> {
        let (hidden, attention) = (self.hidden_size, &self.attention);
        let mut list = Vec::new();
        let mut add = |name: String, shape: &[usize]| list.push(ResidentTensor { name, shape: shape.to_vec() });
        let norm = |add: &mut dyn FnMut(String, &[usize]), name: String| {
            if self.norm.weight {
                add(format!("{name}.weight"), &[hidden]);
            }
            if self.norm.bias {
                add(format!("{name}.bias"), &[hidden]);
            }
        };
        add("embed.tokens".into(), &[self.vocab_size, self.embed_size]);
        if let Positions::Learned { offset } = self.positions {
            add("embed.positions".into(), &[self.max_positions + offset, hidden]);
        }
        if self.embed_size != hidden {
            add("embed.project_in".into(), &[hidden, self.embed_size]);
        }
        for layer in 0..self.layers {
            let p = format!("layers.{layer}");
            norm(&mut add, format!("{p}.attention_norm"));
            add(format!("{p}.attention.qkv.weight"), &[attention.qkv_size(), hidden]);
            if attention.qkv_bias {
                add(format!("{p}.attention.qkv.bias"), &[attention.qkv_size()]);
            }
            if attention.qk_norm {
                for which in ["q_norm", "k_norm"] {
                    add(format!("{p}.attention.{which}.weight"), &[attention.head_dim]);
                    add(format!("{p}.attention.{which}.bias"), &[attention.head_dim]);
                }
            }
            add(format!("{p}.attention.out.weight"), &[hidden, attention.heads * attention.head_dim]);
            if attention.out_bias {
                add(format!("{p}.attention.out.bias"), &[hidden]);
            }
            if self.block.has_ffn_norm() {
                norm(&mut add, format!("{p}.ffn_norm"));
            }
            if self.ffn.gate_bias {
                add(format!("{p}.ffn.gate_bias"), &[self.ffn.size]);
            }
            if self.ffn.up_bias {
                add(format!("{p}.ffn.up_bias"), &[self.ffn.size]);
            }
            if self.ffn.down_bias {
                add(format!("{p}.ffn.down_bias"), &[hidden]);
            }
        }
        if self.final_norm {
            norm(&mut add, "final_norm".into());
        }
        if self.embed_size != hidden {
            add("embed.project_out".into(), &[self.embed_size, hidden]);
        }
        if !self.tied_head {
            add("head.weight".into(), &[self.vocab_size, self.embed_size]);
        }
        if self.head_bias {
            add("head.bias".into(), &[self.vocab_size]);
        }
        list
    }
}
