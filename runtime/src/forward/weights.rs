//! What stays in memory of attention, norms and the vocabulary: matrices as they are stored, vectors widened to f32.

use flashlm_formats::model::{LayerSpec, ModelSpec, Norm, NormKind};
use flashlm_kernels::{Element, Matrix, ScaleGroup, layer_norm, rms_norm};

use crate::error::Result;
use crate::tensors::{BytesRange, TensorBytes, TensorSource, checked, element, optional_vector, scale_group};

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

/// A norm with its weight and bias, where it has them.
pub struct NormWeights {
    kind: NormKind,
    eps: f32,
    width: usize,
    /// `[width]`.
    weight: Option<Vec<f32>>,
    /// `[width]`.
    bias: Option<Vec<f32>>,
}

impl NormWeights {
    fn load(source: &mut dyn TensorSource, norm: &Norm, name: &str, width: usize) -> Result<Self> {
        Ok(Self {
            kind: norm.kind,
            eps: norm.eps,
            width,
            weight: optional_vector(source, norm.weight, &format!("{name}.weight"), width)?,
            bias: optional_vector(source, norm.bias, &format!("{name}.bias"), width)?,
        })
    }

    /// Normalises each row of `rows` into `out`.
    pub fn apply(&self, rows: &[f32], out: &mut [f32]) {
        let (weight, bias) = (self.weight.as_deref(), self.bias.as_deref());
        for (row, out) in rows.chunks_exact(self.width).zip(out.chunks_exact_mut(self.width)) {
            match self.kind {
                NormKind::LayerNorm => layer_norm(row, weight, bias, self.eps, out),
                NormKind::RmsNorm => rms_norm(row, weight, self.eps, out),
            }
        }
    }
}

/// Norms of each query and key head.
pub struct QkNorm {
    /// Of each query.
    pub query: NormWeights,
    /// Of each key.
    pub key: NormWeights,
}

/// The resident weights of one block.
pub struct LayerWeights {
    /// What the block is.
    pub spec: LayerSpec,
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
        let (hidden, spec, p) = (spec.hidden_size, spec.layers[layer], format!("layers.{layer}"));
        let (attention, norm) = (&spec.attention, &spec.norm);
        let attention_norm = NormWeights::load(source, norm, &format!("{p}.attention_norm"), hidden)?;
        let qkv = Linear {
            weight: Weight::load(source, &format!("{p}.attention.qkv.weight"), attention.qkv_size(), hidden)?,
            bias: optional_vector(
                source,
                attention.qkv_bias,
                &format!("{p}.attention.qkv.bias"),
                attention.qkv_size(),
            )?,
        };
        let qk_norm = match &attention.qk_norm {
            Some(norm) => {
                let mut load =
                    |which| NormWeights::load(source, norm, &format!("{p}.attention.{which}"), attention.head_dim);
                Some(QkNorm { query: load("q_norm")?, key: load("k_norm")? })
            }
            None => None,
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
            Some(NormWeights::load(source, norm, &format!("{p}.ffn_norm"), hidden)?)
        } else {
            None
        };
        Ok(Self {
            spec,
            attention_norm,
            qkv,
            qk_norm,
            out,
            ffn_norm,
            down_bias: optional_vector(source, spec.ffn().down_bias, &format!("{p}.ffn.down_bias"), hidden)?,
        })
    }
}

/// What comes before the first and after the last block.
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
        let positions = match spec.learned_positions {
            Some(learned) => weight(true, "embed.positions", spec.max_positions + learned.offset, hidden)?,
            None => None,
        };
        let project_in = weight(embed != hidden, "embed.project_in", hidden, embed)?;
        let project_out = weight(embed != hidden, "embed.project_out", embed, hidden)?;
        let head = weight(!spec.tied_head, "head.weight", vocab, embed)?;
        let final_norm =
            spec.final_norm.map(|norm| NormWeights::load(source, &norm, "final_norm", hidden)).transpose()?;
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
            layers: (0..spec.layers.len())
                .map(|layer| LayerWeights::load(spec, layer, source))
                .collect::<Result<_>>()?,
        })
    }
}

/// Bytes that the f32 copies of a model's vectors take, for the memory plan.
pub fn vector_bytes(spec: &ModelSpec) -> u64 {
    spec.resident_tensors().iter().filter(|t| t.shape.len() == 1).map(|t| t.shape[0] as u64 * 4).sum()
}
