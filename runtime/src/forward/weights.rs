//! What stays in memory of attention, norms and the vocabulary: matrices as they are stored, vectors widened to f32.

use flashlm_formats::model::{ModelSpec, Positions};
use flashlm_kernels::{Element, Matrix, ScaleGroup};

use crate::error::Result;
use crate::tensors::{BytesRange, TensorBytes, TensorSource, checked, element, optional_vector, scale_group, vector};

/// A weight matrix `[outputs, inputs]` that keeps its memory alive.
#[derive(Clone)]
pub struct Weight {
    data: BytesRange,
    scales: Option<(BytesRange, ScaleGroup)>,
    element: Element,
    rows: usize,
    cols: usize,
}

impl Weight {
    fn load(source: &mut dyn TensorSource, name: &str, rows: usize, cols: usize) -> Result<Self> {
        let TensorBytes { format, data, scales, .. } = checked(source, name, &[rows, cols])?;
        let (rows, scales) = (source.rows_kept(name).unwrap_or(rows), scales.zip(scale_group(format)));
        Ok(Self { data, scales, element: element(format), rows, cols })
    }

    /// The matrix, for the kernels.
    pub fn matrix(&self) -> Matrix<'_> {
        let matrix = Matrix::new(self.element, self.data.get(), self.rows, self.cols);
        let matrix = matrix.expect("the length was checked when the weight was loaded");
        match &self.scales {
            None => matrix,
            Some((scales, group)) => {
                let stride = group.scale_bytes(self.cols);
                // Those of all rows, where some rows are elsewhere.
                let scaled = matrix.with_scales(&scales.get()[..self.rows * stride], stride, *group);
                scaled.expect("their length was checked when the weight was loaded")
            }
        }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() + self.scales.as_ref().map_or(0, |(scales, _)| scales.len())
    }
}

/// A projection: matrix and optional bias.
pub struct Linear {
    /// `[outputs, inputs]`.
    pub weight: Weight,
    /// `[outputs]`.
    pub bias: Option<Vec<f32>>,
}

/// A norm's weight and bias, where it has them.
pub struct NormWeights {
    /// `[hidden]`.
    pub weight: Option<Vec<f32>>,
    /// `[hidden]`.
    pub bias: Option<Vec<f32>>,
}

impl NormWeights {
    fn load(source: &mut dyn TensorSource, spec: &ModelSpec, name: &str) -> Result<Self> {
        Ok(Self {
            weight: optional_vector(source, spec.norm.weight, &format!("{name}.weight"), spec.hidden_size)?,
            bias: optional_vector(source, spec.norm.bias, &format!("{name}.bias"), spec.hidden_size)?,
        })
    }
}

/// LayerNorm of each query and key head.
pub struct QkNorm {
    /// Query weight and bias, `[head_dim]` each.
    pub query: (Vec<f32>, Vec<f32>),
    /// Key weight and bias.
    pub key: (Vec<f32>, Vec<f32>),
}

/// The resident weights of one block.
pub struct LayerWeights {
    /// Norm of the attention.
    pub attention_norm: NormWeights,
    /// Fused query, key and value projection.
    pub qkv: Linear,
    /// Norm of each query and key head, if the model has it.
    pub qk_norm: Option<QkNorm>,
    /// Output projection.
    pub out: Linear,
    /// Norm of the FFN, if it has its own.
    pub ffn_norm: Option<NormWeights>,
    /// Bias of the down projection.
    pub down_bias: Option<Vec<f32>>,
}

impl LayerWeights {
    /// Takes the tensors of block `layer` from `source`.
    pub fn load(spec: &ModelSpec, layer: usize, source: &mut dyn TensorSource) -> Result<Self> {
        let (hidden, attention, p) = (spec.hidden_size, &spec.attention, format!("layers.{layer}"));
        let attention_norm = NormWeights::load(source, spec, &format!("{p}.attention_norm"))?;
        let qkv = Linear {
            weight: Weight::load(source, &format!("{p}.attention.qkv.weight"), attention.qkv_size(), hidden)?,
            bias: optional_vector(
                source,
                attention.qkv_bias,
                &format!("{p}.attention.qkv.bias"),
                attention.qkv_size(),
            )?,
        };
        let qk_norm = if attention.qk_norm {
            let mut pair = |which: &str| -> Result<(Vec<f32>, Vec<f32>)> {
                let name = format!("{p}.attention.{which}");
                Ok((
                    vector(source, &format!("{name}.weight"), attention.head_dim)?,
                    vector(source, &format!("{name}.bias"), attention.head_dim)?,
                ))
            };
            Some(QkNorm { query: pair("q_norm")?, key: pair("k_norm")? })
        } else {
            None
        };
        let out = Linear {
            weight: Weight::load(
                source,
                &format!("{p}.attention.out.weight"),
                hidden,
                attention.heads * attention.head_dim,
            )?,
            bias: optional_vector(source, attention.out_bias, &format!("{p}.attention.out.bias"), hidden)?,
        };
        let ffn_norm = if spec.block.has_ffn_norm() {
            Some(NormWeights::load(source, spec, &format!("{p}.ffn_norm"))?)
        } else {
            None
        };
        Ok(Self {
            attention_norm,
            qkv,
            qk_norm,
            out,
            ffn_norm,
            down_bias: optional_vector(source, spec.ffn.down_bias, &format!("{p}.ffn.down_bias"), hidden)?,
        })
    }
}

/// What stands before the first and behind the last block.
pub struct OuterWeights {
    /// Token embedding `[vocab, embed]`; the head too, when tied. Like the head, it may have its first rows alone: a
    /// [`TableSource`](super::tables::TableSource) has the others.
    pub tokens: Weight,
    /// Learned positions `[max_positions + offset, hidden]`.
    pub positions: Option<Weight>,
    /// `[hidden, embed]`.
    pub project_in: Option<Weight>,
    /// `[embed, hidden]`.
    pub project_out: Option<Weight>,
    /// Norm before the head.
    pub final_norm: Option<NormWeights>,
    /// Head, when not tied.
    pub head: Option<Weight>,
    /// Bias of the head.
    pub head_bias: Option<Vec<f32>>,
}

impl OuterWeights {
    /// Takes the tensors outside the blocks from `source`.
    pub fn load(spec: &ModelSpec, source: &mut dyn TensorSource) -> Result<Self> {
        let (hidden, embed, vocab) = (spec.hidden_size, spec.embed_size, spec.vocab_size);
        let mut weight = |present: bool, name: &str, rows: usize, cols: usize| {
            present.then(|| Weight::load(source, name, rows, cols)).transpose()
        };
        let tokens = weight(true, "embed.tokens", vocab, embed)?.expect("asked for");
        let positions = match spec.positions {
            Positions::Learned { offset } => weight(true, "embed.positions", spec.max_positions + offset, hidden)?,
            _ => None,
        };
        let project_in = weight(embed != hidden, "embed.project_in", hidden, embed)?;
        let project_out = weight(embed != hidden, "embed.project_out", embed, hidden)?;
        let head = weight(!spec.tied_head, "head.weight", vocab, embed)?;
        let final_norm = if spec.final_norm { Some(NormWeights::load(source, spec, "final_norm")?) } else { None };
        let head_bias = optional_vector(source, spec.head_bias, "head.bias", vocab)?;
        Ok(Self { tokens, positions, project_in, project_out, final_norm, head, head_bias })
    }

    /// The matrix that turns the last state into logits.
    pub fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.tokens)
    }
}

/// All resident weights of a model.
pub struct ModelWeights {
    /// Outside the blocks.
    pub outer: OuterWeights,
    /// The blocks.
    pub layers: Vec<LayerWeights>,
}

impl ModelWeights {
    /// Takes every tensor of `spec` from `source`.
    pub fn load(spec: &ModelSpec, source: &mut dyn TensorSource) -> Result<Self> {
        Ok(Self {
            outer: OuterWeights::load(spec, source)?,
            layers: (0..spec.layers).map(|layer| LayerWeights::load(spec, layer, source)).collect::<Result<_>>()?,
        })
    }
}

/// Bytes that the f32 copies of a model's vectors take, for the memory plan.
pub fn vector_bytes(spec: &ModelSpec) -> u64 {
    spec.resident_tensors().iter().filter(|t| t.shape.len() == 1).map(|t| t.shape[0] as u64 * 4).sum()
}
