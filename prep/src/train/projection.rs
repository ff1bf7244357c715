//! The weights that a layer's activity comes from.

use std::ops::Range;

use flashlm::tensors::element;
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, FfnMatrix};
use flashlm_formats::model::{Activation, DType};
use flashlm_kernels::to_f32;
use linfa::dataset::Records;

use super::activity::{TrainingSet, thin};

/// Recorded tokens, and active neurons of each, that weights are checked against.
const AGREEMENT_TOKENS: usize = 64;
const AGREEMENT_NEURONS: usize = 64;

/// The projection whose product decides which neurons are active: the gate's, or the up projection of an FFN without one.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    dtype: DType,
    /// `[ffn, hidden]`, as stored.
    rows: Vec<u8>,
    hidden: usize,
    /// `[ffn]`; a neuron is active where its product and this exceed zero.
    bias: Vec<f32>,
    /// Whether a neuron is active exactly where that is so.
    exact: bool,
}

impl Projection {
    /// That of `layer`.
    ///
    /// # Errors
    /// Whatever reading reports.
    pub fn read(checkpoint: &Checkpoint, layer: usize) -> Result<Self, CheckpointError> {
        let spec = checkpoint.spec();
        let unknown = || CheckpointError::UnknownTensor { name: format!("layers.{layer}.ffn") };
        let ffn = spec.layers.get(layer).ok_or_else(unknown)?.ffn();
        let (matrix, name, has_bias) = match ffn.gated {
            true => (FfnMatrix::Gate, "gate_bias", ffn.gate_bias),
            false => (FfnMatrix::Up, "up_bias", ffn.up_bias),
        };
        let mut rows = Vec::new();
        checkpoint.read_ffn_rows(layer, matrix, 0..ffn.size, &mut rows)?;
        let mut bias = vec![0.0; ffn.size];
        if has_bias {
            let name = format!("layers.{layer}.ffn.{name}");
            let mut bytes = Vec::new();
            checkpoint.read_resident(&name, &mut bytes)?;
            to_f32(element(checkpoint.resident(&name)?.dtype), &bytes[..], &mut bias);
        }
        if let Activation::FatRelu(threshold) = ffn.activation {
            bias.iter_mut().for_each(|bias| *bias -= threshold);
        }
        let exact = ffn.activation.is_sparse();
        Ok(Self { dtype: checkpoint.ffn_dtype(), rows, hidden: spec.hidden_size, bias, exact })
    }

    /// The share of (some) recorded active pairs whose product with these weights is above zero, as all are of the recorded
    /// model; none where that is no condition for activity, or nothing is active.
    pub(super) fn agreement(&self, set: &TrainingSet) -> Option<f64> {
        if !self.exact || self.hidden != set.nfeatures() || self.bias.len() != set.targets().ffn() {
            return None;
        }
        let mut tokens = set.targets().part(false);
        thin(&mut tokens, AGREEMENT_TOKENS);
        let (mut input, mut row) = (Vec::new(), Vec::new());
        let (mut above, mut count) = (0, 0);
        for &token in &tokens {
            set.records().gather(&[token], &mut input);
            for &neuron in set.targets().of(token as usize).0.iter().take(AGREEMENT_NEURONS) {
                let neuron = neuron as usize;
                self.rows(neuron..neuron + 1, &mut row);
                let product: f32 = row.iter().zip(&input).map(|(w, x)| w * x).sum();
                above += usize::from(product + self.bias[neuron] > 0.0);
                count += 1;
            }
        }
        (count > 0).then(|| above as f64 / count as f64)
    }

    /// From a matrix `[bias.len(), hidden]`.
    #[cfg(test)]
    pub(super) fn new(rows: &[f32], bias: Vec<f32>) -> Self {
        let hidden = rows.len() / bias.len();
        Self { dtype: DType::F32, rows: rows.iter().flat_map(|v| v.to_le_bytes()).collect(), hidden, bias, exact: true }
    }

    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    pub(super) fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// Rows of some neurons, one after the other, into `out`.
    pub(super) fn rows(&self, neurons: Range<usize>, out: &mut Vec<f32>) {
        out.resize(neurons.len() * self.hidden, 0.0);
        let row_bytes = self.hidden * self.dtype.bytes();
        let bytes = &self.rows[neurons.start * row_bytes..neurons.end * row_bytes];
        for (row, bytes) in out.chunks_exact_mut(self.hidden).zip(bytes.chunks_exact(row_bytes)) {
            to_f32(element(self.dtype), bytes, row);
        }
    }
}
