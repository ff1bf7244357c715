//! How much an executor holds, and how prompts are cut to go through it.

use std::ops::Range;

use flashlm_formats::model::ModelSpec;
use flashlm_kernels::MATMUL_TOKENS_MIN;

use super::blocks::{Blocks, KV_BLOCK};
use crate::buffers::Buffers;
use crate::forward::attention::TokenPlace;
use crate::forward::block::BlockScratch;
use crate::forward::embed::EmbedScratch;
use crate::forward::head::HeadScratch;
use crate::forward::kv::{KvDtype, KvMemory};
use crate::forward::positions::PositionTables;
use crate::neurons::scratch::FfnScratch;

/// Tokens of a prompt that are one piece: what is left behind the last whole piece is computed as a piece, or token by token where
/// it is short. Fixed, so that a result never depends on how much memory there was.
pub const PIECE_TOKENS: usize = 256;

/// Fewest tokens that scratch is made for. A piece is cut into equal parts that fit the scratch, and each part is then long enough
/// for the products of many tokens ([`MATMUL_TOKENS_MIN`]), whose results do not depend on how many those are.
pub const SCRATCH_TOKENS_MIN: usize = 2 * MATMUL_TOKENS_MIN;

/// Most rows that are decoded together.
pub const BATCH_MAX: usize = 32;

/// What an executor's sequences may take.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Tokens that a sequence may have.
    pub context: usize,
    /// Sequences of this many tokens that there is memory for.
    pub sequences: usize,
    /// How keys and values are stored.
    pub kv: KvDtype,
    /// Tokens of a prompt that go through a block together, from [`SCRATCH_TOKENS_MIN`] to [`PIECE_TOKENS`]: the same bits with any
    /// number.
    pub scratch_tokens: usize,
    /// Rows that are decoded together, up to [`BATCH_MAX`], and whose logits are computed together: the same bits with any number.
    pub batch: usize,
}

impl Room {
    /// Tokens of a prompt that scratch is made for.
    pub(super) fn scratch(&self) -> usize {
        self.scratch_tokens.clamp(SCRATCH_TOKENS_MIN, PIECE_TOKENS).min(self.context.max(1))
    }

    /// Rows decoded together.
    pub(super) fn batch(&self) -> usize {
        self.batch.clamp(1, BATCH_MAX)
    }

    /// Tokens that go through a block together, of whatever kind.
    pub(super) fn tokens(&self) -> usize {
        self.scratch().max(self.batch())
    }

    /// Blocks of keys and values.
    pub(super) fn blocks(&self) -> usize {
        self.sequences.max(1) * Blocks::needed(self.context)
    }

    /// Bytes of keys and values.
    pub fn kv_bytes(&self, spec: &ModelSpec) -> u64 {
        (spec.layers.len() * KvMemory::layer_bytes(spec.attention(), self.blocks() * KV_BLOCK, self.kv)) as u64
    }

    /// Bytes of states, scratch and tables, with this many threads: everything but weights, neurons, keys and values.
    pub fn working_bytes(&self, spec: &ModelSpec, threads: usize) -> u64 {
        let (tokens, batch) = (self.tokens(), self.batch());
        let grown = FfnScratch::products_bytes(spec, tokens, batch, threads);
        let made = |buffers: &mut Buffers| {
            (Working::new(buffers, spec, self), PositionTables::new(buffers, spec, self.context))
        };
        Buffers::bytes_of(made) + grown
    }
}

/// States and scratch of a step's rows.
pub(super) struct Working {
    /// Of the rows that go through the blocks: where they are, and their states.
    pub(super) tokens: Vec<TokenPlace>,
    pub(super) states: Vec<f32>,
    pub(super) block: BlockScratch,
    pub(super) embed: EmbedScratch,
    pub(super) head: HeadScratch,
    /// Rows whose logits are computed, and their states.
    pub(super) wanting: Vec<usize>,
    pub(super) wanting_states: Vec<f32>,
}

impl Working {
    /// For a model, as much of it as there is room for.
    pub(super) fn new(buffers: &mut Buffers, spec: &ModelSpec, room: &Room) -> Self {
        let (tokens, batch) = (room.tokens(), room.batch());
        Self {
            tokens: buffers.room(tokens),
            states: buffers.zeros(tokens * spec.hidden_size),
            block: BlockScratch::new(buffers, spec, tokens, room.context, batch),
            embed: EmbedScratch::new(buffers, spec),
            head: HeadScratch::new(buffers, spec, batch),
            wanting: buffers.room(batch),
            wanting_states: buffers.zeros(batch * spec.hidden_size),
        }
    }
}

/// The parts in which `ids` tokens go through the blocks, with scratch for this many.
pub(super) fn parts(ids: usize, scratch_tokens: usize) -> impl Iterator<Item = Range<usize>> {
    (0..ids).step_by(PIECE_TOKENS).flat_map(move |piece| {
        let tokens = PIECE_TOKENS.min(ids - piece);
        let count = tokens.div_ceil(scratch_tokens);
        (0..count).map(move |part| piece + part * tokens / count..piece + (part + 1) * tokens / count)
    })
}

/// For each of `ids` tokens of a prompt whether it is computed in a longer piece, rather than alone.
pub fn in_pieces(ids: usize) -> impl Iterator<Item = bool> {
    (0..ids).map(move |at| piece_around(at, ids).len() >= MATMUL_TOKENS_MIN)
}

/// The piece of a prompt of `ids` tokens that a token belongs to.
fn piece_around(at: usize, ids: usize) -> Range<usize> {
    let start = at / PIECE_TOKENS * PIECE_TOKENS;
    start..(start + PIECE_TOKENS).min(ids)
}

/// How many of the first tokens of a prompt of `ids` tokens may be there already, where `known` are, so that the others are computed as
/// they would be with all: at least one is left, and of a longer piece as many as make its products.
pub fn resumable(known: usize, ids: usize) -> usize {
    let at = known.min(ids.saturating_sub(1));
    let piece = piece_around(at, ids);
    if piece.len() >= MATMUL_TOKENS_MIN { at.min(piece.end - MATMUL_TOKENS_MIN) } else { at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_prompt_is_computed_as_it_would_be_with_all() {
        for ids in (1..40).chain(240..290).chain(500..540) {
            let expected: Vec<bool> = in_pieces(ids).collect();
            for known in 0..=ids {
                let first = resumable(known, ids);
                assert!(first <= known && first < ids && first + 2 * MATMUL_TOKENS_MIN > known, "{first} of {known}");
                // To the end of its piece, and then piece by piece.
                let to = (ids - first).min(PIECE_TOKENS - first % PIECE_TOKENS);
                let left: Vec<bool> = in_pieces(to).chain(in_pieces(ids - first - to)).collect();
                assert_eq!(left, expected[first..], "{known} of {ids}");
            }
        }
    }

    #[test]
    fn parts_cover_pieces_and_are_computed_as_their_piece_is() {
        for ids in 1..700 {
            for scratch_tokens in [SCRATCH_TOKENS_MIN, 33, 50, 64, 100, 128, 255, 256] {
                let parts: Vec<Range<usize>> = parts(ids, scratch_tokens).collect();
                let mut next = 0;
                for part in parts {
                    assert_eq!(part.start, next);
                    let piece = part.start / PIECE_TOKENS * PIECE_TOKENS;
                    let tokens = PIECE_TOKENS.min(ids - piece);
                    assert!(part.end <= piece + tokens && part.len() <= scratch_tokens, "{part:?} of {ids}");
                    let many = |tokens| tokens >= MATMUL_TOKENS_MIN;
                    assert_eq!(many(part.len()), many(tokens), "{part:?} of {ids} with room for {scratch_tokens}");
                    next = part.end;
                }
                assert_eq!(next, ids);
            }
        }
    }
}
