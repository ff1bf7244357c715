//! The memory that a preparation takes, computed before it begins.

use flashlm::memory;
use flashlm_formats::checkpoint::Checkpoint;

use super::error::PrepareError;
use crate::layers::LayerRunner;
use crate::rounding::RoundedFormats;

/// The program, its libraries and its buffers, with a small model.
const PROGRAM_BYTES: u64 = 12 << 20;
/// A tokenizer in memory, in bytes of its JSON.
const TOKENIZER: u64 = 4;
/// Held-out tokens that predictors are measured on at most, and bytes for a score and its place.
const MEASURED_TOKENS: u64 = 16_384;
const SCORE_BYTES: u64 = 8;
/// Matrices `[hidden, hidden]` that predictors' starts are found with.
const STARTS: u64 = 14;

/// Bytes that preparing takes at least: less than this and it would be ended in the middle of its work. It grows with a layer, and with
/// the tokens; not with the number of layers.
pub(super) fn least(
    checkpoint: &Checkpoint,
    tokens: u64,
    sequence_tokens: usize,
    tokenizer_bytes: u64,
    rounded: RoundedFormats,
) -> u64 {
    let spec = checkpoint.spec();
    let (hidden, ffn) = (spec.hidden_size as u64, spec.ffn().size as u64);
    let dtype = checkpoint.ffn_dtype().bytes() as u64;
    let layer = spec.ffn().vectors() as u64 * ffn * hidden * dtype;
    let longest = sequence_tokens.min(spec.max_positions);
    // A layer's records are made of its rows; embeddings and head come and go as a whole.
    let record = 2 * layer + LayerRunner::bytes(spec, longest) + longest as u64 * ffn * 4 + rounded.bytes(spec);
    let embedding = (spec.vocab_size * spec.embed_size) as u64 * dtype;
    // Inputs, activity (packed, and the active neurons of a sparse model), scores of the held-out tokens.
    let train = tokens * (2 * hidden + ffn / 8 + ffn / 4) + (tokens / 10).min(MEASURED_TOKENS) * ffn * SCORE_BYTES;
    // Before that, one projection, and matrices of the inputs' width.
    let start = tokens * (2 * hidden + ffn / 8 + ffn / 4) + ffn * hidden * dtype + STARTS * hidden * hidden * 4;
    PROGRAM_BYTES + TOKENIZER * tokenizer_bytes + record.max(embedding).max(train).max(start)
}

/// An error if there is less memory to take.
pub(super) fn check(needed: u64) -> Result<(), PrepareError> {
    match memory::available() {
        Some(available) if available < needed => Err(PrepareError::Memory { needed, available }),
        _ => Ok(()),
    }
}
