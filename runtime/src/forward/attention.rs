//! Causal self-attention over the KV cache: every token with what came before it in its sequence.

use flashlm_formats::model::{Attention, ModelSpec};
use flashlm_kernels::{Threads, add_weighted_rows_serial, matvec_serial, rope_rotate_half, softmax};

use super::kv::{KvMemory, SequencePlaces};
use super::positions::PositionTable;
use super::weights::QkNorm;
use crate::buffers::Buffers;
use crate::error::Result;
use crate::neurons::source::Arithmetic;

/// Memory of one attention call: per head the attended values and one row of scores.
#[derive(Default)]
pub struct AttentionScratch {
    heads: Vec<f32>,
}

impl AttentionScratch {
    /// Scratch for `tokens` at a time in a context of `context`.
    pub fn new(buffers: &mut Buffers, spec: &ModelSpec, tokens: usize, context: usize) -> Self {
        Self { heads: buffers.zeros(spec.attention().heads * (tokens * spec.attention().head_dim + context)) }
    }
}

/// One attention call.
pub struct AttentionCall<'a> {
    /// The shape of the block's attention.
    pub shape: &'a Attention,
    /// Which block.
    pub layer: usize,
    /// Norms of query and key heads, if the block has them.
    pub qk_norm: Option<&'a QkNorm>,
    /// The block's rotary or ALiBi table.
    pub positions: &'a PositionTable,
    /// Which tokens.
    pub batch: &'a Batch<'a>,
}

/// A token's place in its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenPlace {
    /// Which sequence of the batch.
    pub sequence: usize,
    /// Position in it: as many tokens come before.
    pub position: usize,
}

/// The tokens that go through a block together. Those of one sequence stand in the order of their positions.
pub struct Batch<'a> {
    /// Where each token is.
    pub tokens: &'a [TokenPlace],
    /// Where the keys and values of each sequence are.
    pub sequences: &'a [SequencePlaces],
    /// How products are computed.
    pub arithmetic: Arithmetic,
}

/// Attends `qkv` (`[tokens, heads + 2 * kv_heads, head_dim]`, changed in place) to the cache and itself; stores its keys and values.
///
/// `out` becomes `[tokens, heads * head_dim]`.
///
/// # Errors
/// If a key or value cannot be stored.
pub fn attend(
    call: &AttentionCall<'_>,
    threads: &Threads,
    qkv: &mut [f32],
    kv: &mut KvMemory,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) -> Result<()> {
    let AttentionCall { shape, layer, batch, .. } = *call;
    let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    for (token, row) in batch.tokens.iter().zip(qkv.chunks_exact_mut(shape.qkv_size())) {
        let (queries_keys, values) = row.split_at_mut((heads + kv_heads) * dim);
        normalise_and_rotate(call, token.position, queries_keys, &mut scratch.heads[..dim]);
        let place = batch.sequences[token.sequence].place(token.position);
        kv.put(layer, (place, token.position), &queries_keys[heads * dim..], values)?;
    }

    let (kv, qkv, tokens) = (&*kv, &*qkv, batch.tokens.len());
    let longest = batch.tokens.iter().map(|token| token.position + 1).max().unwrap_or(0);
    let scale = 1.0 / (dim as f32).sqrt();
    let per_head = tokens * dim + longest;
    let buffer = &mut scratch.heads[..heads * per_head];
    threads.chunks_mut(buffer, per_head, &|head, buffer| {
        let (attended, scores) = buffer.split_at_mut(tokens * dim);
        let kv_head = head / (heads / kv_heads);
        for (t, token) in batch.tokens.iter().enumerate() {
            let (sequence, visible) = (&batch.sequences[token.sequence], token.position + 1);
            let query = &qkv[t * shape.qkv_size() + head * dim..][..dim];
            let scores = &mut scores[..visible];
            for (first, places) in sequence.first(visible) {
                let scores = &mut scores[first..first + places.len()];
                matvec_serial(kv.keys(layer, kv_head, places), query, scores);
            }
            if let PositionTable::Alibi { bias, context } = call.positions {
                for (score, bias) in scores.iter_mut().zip(&bias[head * context..]) {
                    *score = (*score + bias) * scale;
                }
            } else {
                scores.iter_mut().for_each(|s| *s *= scale);
            }
            softmax(scores);
            let attended = &mut attended[t * dim..(t + 1) * dim];
            attended.fill(0.0);
            for (first, places) in sequence.first(visible) {
                let scores = &scores[first..first + places.len()];
                add_weighted_rows_serial(kv.values(layer, kv_head, places), scores, attended);
            }
        }
    });
    for head in 0..heads {
        for t in 0..tokens {
            let from = head * per_head + t * dim;
            out[(t * heads + head) * dim..][..dim].copy_from_slice(&buffer[from..from + dim]);
        }
    }
    Ok(())
}

/// `normed` is room for one head.
fn normalise_and_rotate(call: &AttentionCall<'_>, position: usize, queries_keys: &mut [f32], normed: &mut [f32]) {
    let dim = call.shape.head_dim;
    if let Some(norms) = call.qk_norm {
        for (head, values) in queries_keys.chunks_exact_mut(dim).enumerate() {
            let norm = if head < call.shape.heads { &norms.query } else { &norms.key };
            norm.apply(values, normed);
            values.copy_from_slice(normed);
        }
    }
    if let PositionTable::Rotary { dims, cos, sin } = call.positions {
        let row = position * dims / 2..(position + 1) * dims / 2;
        for values in queries_keys.chunks_exact_mut(dim) {
            rope_rotate_half(values, *dims, &cos[row.clone()], &sin[row.clone()]);
        }
    }
}
