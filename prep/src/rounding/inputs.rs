//! Second moments of what goes into the matrices of one layer.

use flashlm::error::RuntimeError;
use flashlm::neurons::hook::{Activations, FfnHook};
use flashlm_formats::model::ModelSpec;

use super::RoundedFormats;
use crate::linear::{add_gram, mirror};

/// Neurons whose activations are looked at together, at most: only among these do errors of down rows make up for each other.
const NEURONS: usize = 2048;

/// Sums of products of inputs, `[d, d]`.
pub(super) struct Moments {
    sum: Vec<f32>,
    pub(super) d: usize,
}

impl Moments {
    fn new(d: usize) -> Self {
        Self { sum: vec![0.0; d * d], d }
    }

    fn add(&mut self, rows: &[f32]) {
        add_gram(&mut self.sum, self.d, rows);
    }

    /// All of them, of which sums have only what is needed.
    pub(super) fn whole(mut self) -> Vec<f32> {
        mirror(&mut self.sum, self.d);
        self.sum
    }
}

/// What goes into a layer's matrices, summed over sequences.
pub(super) struct LayerInputs {
    pub(super) qkv: Option<Moments>,
    pub(super) out: Option<Moments>,
    /// Of the gate and up projections.
    pub(super) ffn: Option<Moments>,
    /// Of the down projection, for blocks of consecutive neurons.
    pub(super) down: Vec<Moments>,
    /// `[tokens, neurons]` of one sequence.
    activations: Vec<f32>,
    neurons: usize,
    /// Magnitudes up to this are no activity.
    threshold: f32,
    tokens: usize,
    /// Those of a block.
    block: Vec<f32>,
}

impl LayerInputs {
    pub(super) fn new(spec: &ModelSpec, layer: usize, formats: RoundedFormats, longest: usize) -> Self {
        let (attention, neurons) = (&spec.layers[layer].attention, spec.ffn().size);
        let of_attention = |d| formats.attention.map(|_| Moments::new(d));
        let blocks = (0..neurons).step_by(NEURONS).map(|first| NEURONS.min(neurons - first));
        Self {
            qkv: of_attention(spec.hidden_size),
            out: of_attention(attention.heads * attention.head_dim),
            ffn: formats.ffn.map(|_| Moments::new(spec.hidden_size)),
            down: formats.ffn.map(|_| blocks.map(Moments::new).collect()).unwrap_or_default(),
            activations: vec![0.0; longest * neurons],
            neurons,
            threshold: spec.threshold(layer),
            tokens: 0,
            block: Vec::new(),
        }
    }

    /// Bytes of all moments of a layer, and of what is made of the largest.
    pub(super) fn bytes(spec: &ModelSpec) -> u64 {
        let (hidden, neurons) = (spec.hidden_size, spec.ffn().size);
        let attended = spec.attention().heads * spec.attention().head_dim;
        let block = NEURONS.min(neurons);
        let largest = hidden.max(attended).max(block);
        4 * (2 * hidden * hidden + attended * attended + neurons * block + 4 * largest * largest) as u64
    }

    /// Adds the activations of the sequence that went through last.
    pub(super) fn add_activations(&mut self) {
        let mut first = 0;
        for moments in &mut self.down {
            self.block.clear();
            for row in self.activations.chunks_exact(self.neurons).take(self.tokens) {
                self.block.extend_from_slice(&row[first..first + moments.d]);
            }
            moments.add(&self.block);
            first += moments.d;
        }
    }
}

impl FfnHook for LayerInputs {
    fn attention(&mut self, _layer: usize, input: &[f32], attended: &[f32]) -> Result<(), RuntimeError> {
        for (moments, rows) in [(&mut self.qkv, input), (&mut self.out, attended)] {
            moments.iter_mut().for_each(|moments| moments.add(rows));
        }
        Ok(())
    }

    fn input(&mut self, _layer: usize, tokens: usize, input: &[f32]) -> Result<(), RuntimeError> {
        self.tokens = tokens;
        self.ffn.iter_mut().for_each(|moments| moments.add(input));
        Ok(())
    }

    fn activations(&mut self, piece: &mut Activations<'_>) -> Result<(), RuntimeError> {
        let Activations { first, count, ref values, .. } = *piece;
        for (token, row) in values.chunks_exact(count).enumerate() {
            let kept = &mut self.activations[token * self.neurons + first..][..count];
            for (kept, value) in kept.iter_mut().zip(row) {
                *kept = if value.abs() <= self.threshold { 0.0 } else { *value };
            }
        }
        Ok(())
    }
}
