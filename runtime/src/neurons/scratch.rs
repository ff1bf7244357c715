//! Memory for the activations of one FFN call at a time.

use flashlm_formats::model::ModelSpec;
use flashlm_kernels::{MatmulScratch, ROW_BLOCK};

use super::chosen::ChosenScratch;
use crate::buffers::Buffers;

/// Activations of one piece of a block at a time.
pub struct FfnScratch {
    pub(super) activations: Vec<f32>,
    pub(super) gates: Vec<f32>,
    /// Activations that are not zero with their neurons, token after token, and where each token's begin.
    pub(super) active: Vec<(u32, f32)>,
    pub(super) row_starts: Vec<usize>,
    /// The tokens of a prompt that selected each neuron, and where each neuron's begin.
    pub(super) selected: Vec<u16>,
    pub(super) selected_starts: Vec<u32>,
    /// Pairs of a selected neuron and a token that are computed at once, at most.
    pub(super) pairs: usize,
    /// Neurons that were chosen for a few tokens, and how many tokens at a time.
    pub(super) chosen: ChosenScratch,
    pub(super) batch: usize,
    pub(super) matmul: MatmulScratch,
}

/// Activations held at a time, as a count of f32.
const ACTIVATIONS: usize = 1 << 18;

/// With at most one activation in this many not zero, rows are added one by one instead of in a matrix product. Measured:
/// docs/performance.md.
pub(super) const SPARSE: usize = 8;

impl FfnScratch {
    /// Scratch for pieces of up to `tokens` tokens; neurons are chosen for `batch` tokens at a time.
    pub fn new(buffers: &mut Buffers, spec: &ModelSpec, tokens: usize, batch: usize) -> Self {
        let (len, neurons) = (room(spec.ffn().size, tokens), spec.ffn().size.min(ACTIVATIONS));
        // Of 64 neurons every pair fits.
        let pairs = (len / SPARSE).max(u64::BITS as usize * tokens).min(len);
        Self {
            activations: buffers.zeros(len),
            gates: buffers.zeros(if spec.ffn().gated { len } else { 0 }),
            active: buffers.room(neurons.max(pairs)),
            row_starts: buffers.room(tokens + 1),
            selected: buffers.room(pairs),
            selected_starts: buffers.room(neurons + 1),
            pairs,
            chosen: ChosenScratch::new(buffers, neurons, room(spec.ffn().size, batch)),
            batch,
            matmul: MatmulScratch::default(),
        }
    }

    /// Bytes that products on this many threads make it grow by.
    pub fn products_bytes(spec: &ModelSpec, tokens: usize, batch: usize, threads: usize) -> u64 {
        // The longest input of a matrix product.
        let cols = spec.hidden_size.max(spec.attention().heads * spec.attention().head_dim);
        // Vectors rounded for rows of integers: two bytes an element, and scales.
        let rounded = tokens.max(batch) * (2 * cols + cols / 16);
        (MatmulScratch::bytes_needed(threads, tokens, cols) + rounded) as u64
    }

    /// The scratch of matrix products.
    pub fn matmul(&mut self) -> &mut MatmulScratch {
        &mut self.matmul
    }
}

/// Activations of pieces of up to `tokens` tokens that are held at a time.
fn room(neurons: usize, tokens: usize) -> usize {
    ACTIVATIONS.max(ROW_BLOCK * tokens).min(neurons * tokens)
}

/// Neurons computed at once for pieces of `tokens`: a multiple of [`ROW_BLOCK`], so that sums do not depend on it.
pub(super) fn neurons_at_once(tokens: usize) -> usize {
    (ACTIVATIONS / tokens.max(1) / ROW_BLOCK * ROW_BLOCK).max(ROW_BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_for_many_tokens_serves_fewer() {
        for size in [64, 1000, 1024, 16384] {
            for most in (1..600).step_by(7) {
                let room = room(size, most);
                for tokens in 1..=most {
                    let used = neurons_at_once(tokens).min(size) * tokens;
                    assert!(used <= room, "{tokens} of {most} tokens, {size} neurons: {used} of {room}");
                }
            }
        }
    }
}
