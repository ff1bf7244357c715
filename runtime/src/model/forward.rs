//! From token ids to logits: embedding, all blocks, head.

use std::ops::Range;

use flashlm_formats::model::{ModelSpec, Positions};
use flashlm_kernels::{MATMUL_TOKENS_MIN, MatmulScratch, Threads, matmul, matvec};

use super::ffn::{FfnObserver, FfnSource, ReadCounters};
use super::kv_cache::{KvCache, KvDtype};
use super::layer::{LayerScratch, Pass, norm};
use super::positions::PositionTables;
use super::tables::TableSource;
use super::weights::{ModelWeights, OuterWeights};
use crate::error::{Result, RuntimeError};

/// Tokens of a prompt that are one piece: what is left behind the last whole piece is computed as a piece, or token by token where
/// it is short. Fixed, so that a result never depends on how much memory there was.
pub const PIECE_TOKENS: usize = 256;

/// Fewest tokens that scratch is made for. A piece is cut into equal parts that fit the scratch, and each part is then long enough
/// for the products of many tokens ([`MATMUL_TOKENS_MIN`]), whose results do not depend on how many those are.
pub const SCRATCH_TOKENS_MIN: usize = 2 * MATMUL_TOKENS_MIN;

/// What a sequence may take.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Tokens the KV cache holds.
    pub context: usize,
    /// How keys and values are stored.
    pub kv: KvDtype,
    /// Tokens that go through a block together, from [`SCRATCH_TOKENS_MIN`] to [`PIECE_TOKENS`]: the same bits with any number.
    pub scratch_tokens: usize,
}

impl Room {
    /// Tokens that scratch is made for.
    fn scratch(&self) -> usize {
        self.scratch_tokens.clamp(SCRATCH_TOKENS_MIN, PIECE_TOKENS).min(self.context.max(1))
    }
}

/// The parts in which `ids` tokens go through the blocks, with scratch for so many.
fn parts(ids: usize, scratch_tokens: usize) -> impl Iterator<Item = Range<usize>> {
    (0..ids).step_by(PIECE_TOKENS).flat_map(move |piece| {
        let tokens = PIECE_TOKENS.min(ids - piece);
        let count = tokens.div_ceil(scratch_tokens);
        (0..count).map(move |part| piece + part * tokens / count..piece + (part + 1) * tokens / count)
    })
}

/// A model with its KV cache: feeds tokens, gives logits.
pub struct Forward {
    spec: ModelSpec,
    weights: ModelWeights,
    ffn: Box<dyn FfnSource>,
    threads: Threads,
    positions: PositionTables,
    cache: KvCache,
    /// Tokens that the scratch is for.
    scratch_tokens: usize,
    states: Vec<f32>,
    scratch: LayerScratch,
    embed: EmbedScratch,
    head: HeadScratch,
    /// Rows of the vocabulary's matrices that are not among the weights.
    tables: Option<Box<dyn TableSource>>,
}

/// Room for one position's way through the head, and its logits.
pub struct HeadScratch {
    normed: Vec<f32>,
    projected: Vec<f32>,
    logits: Vec<f32>,
}

impl HeadScratch {
    /// Scratch for a model.
    pub fn new(spec: &ModelSpec) -> Self {
        let projected = if spec.embed_size == spec.hidden_size { 0 } else { spec.embed_size };
        Self {
            normed: vec![0.0; spec.hidden_size],
            projected: vec![0.0; projected],
            logits: vec![0.0; spec.vocab_size],
        }
    }

    /// The logits of the last call, `[vocab]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

impl Forward {
    /// A model with room for a sequence.
    pub fn new(
        spec: ModelSpec,
        weights: ModelWeights,
        ffn: Box<dyn FfnSource>,
        threads: Threads,
        room: Room,
    ) -> Result<Self> {
        let (context, tokens) = (room.context, room.scratch());
        Ok(Self {
            positions: PositionTables::new(&spec, context),
            cache: KvCache::new(&spec, spec.layers, context, room.kv)?,
            scratch_tokens: tokens,
            states: vec![0.0; tokens * spec.hidden_size],
            scratch: LayerScratch::new(&spec, tokens, context),
            embed: EmbedScratch::new(&spec),
            head: HeadScratch::new(&spec),
            tables: None,
            spec,
            weights,
            ffn,
            threads,
        })
    }

    /// The same with a source of those rows of the vocabulary's matrices that are not among the weights.
    pub fn with_tables(mut self, tables: Option<Box<dyn TableSource>>) -> Self {
        self.tables = tables;
        self
    }

    /// Bytes of states, scratch and tables, with so many threads: everything but weights and KV cache.
    pub fn working_bytes(spec: &ModelSpec, room: Room, threads: usize) -> u64 {
        let (context, tokens) = (room.context, room.scratch());
        let floats = (tokens + 2) * spec.hidden_size + 2 * spec.embed_size + spec.vocab_size;
        floats as u64 * 4 + LayerScratch::bytes(spec, tokens, context, threads) + PositionTables::bytes(spec, context)
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Tokens in the KV cache.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Whether no token has been fed.
    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// Tokens the KV cache holds.
    pub fn context(&self) -> usize {
        self.cache.context()
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.cache.truncate(len);
    }

    /// What has been read from flash so far.
    pub fn read_counters(&self) -> ReadCounters {
        let tables = self.tables.as_ref().map_or_else(ReadCounters::default, |tables| tables.read_counters());
        self.ffn.read_counters().and(tables)
    }

    /// How often reads of each size, in bytes, were asked for so far.
    pub fn read_sizes(&self) -> Vec<(u64, u64)> {
        self.ffn.read_sizes()
    }

    /// Feeds tokens and gives the logits of the last one, `[vocab]`.
    pub fn feed(&mut self, ids: &[u32]) -> Result<&mut [f32]> {
        self.check(ids)?;
        let mut last = 0;
        for part in parts(ids.len(), self.scratch_tokens) {
            last = part.len() - 1;
            self.run_part(&ids[part], None)?;
        }
        self.logits(last, self.len())?;
        Ok(&mut self.head.logits)
    }

    /// As [`Forward::feed`], without the logits, and shows `observer` what goes through the FFN of every block.
    pub fn feed_observed(&mut self, ids: &[u32], observer: &mut dyn FfnObserver) -> Result<()> {
        self.check(ids)?;
        parts(ids.len(), self.scratch_tokens).try_for_each(|part| self.run_part(&ids[part], Some(&mut *observer)))
    }

    /// Feeds tokens and hands the logits of each one to `each`, with its place in `ids`.
    pub fn feed_all(&mut self, ids: &[u32], each: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        self.check(ids)?;
        let before = self.len() + 1;
        for part in parts(ids.len(), self.scratch_tokens) {
            self.run_part(&ids[part.clone()], None)?;
            for (t, at) in part.enumerate() {
                self.logits(t, before + at)?;
                each(at, &self.head.logits)?;
            }
        }
        Ok(())
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        check_ids(&self.spec, ids)?;
        let (wanted, context) = (self.len() + ids.len(), self.context());
        if wanted > context {
            return Err(RuntimeError::ContextFull { wanted, context, model_max: self.spec.max_positions });
        }
        Ok(())
    }

    fn run_part(&mut self, ids: &[u32], mut observer: Option<&mut dyn FfnObserver>) -> Result<()> {
        let states = &mut self.states[..ids.len() * self.spec.hidden_size];
        let start = self.cache.len();
        let (outer, mut tables) = (&self.weights.outer, self.tables.as_deref_mut());
        embed_rows(&self.spec, outer, &self.threads, ids, start, states, &mut self.embed, &mut tables)?;
        for (layer, weights) in self.weights.layers.iter().enumerate() {
            let mut pass = Pass {
                spec: &self.spec,
                threads: &self.threads,
                positions: &self.positions,
                cache: &mut self.cache,
                ffn: &mut *self.ffn,
                scratch: &mut self.scratch,
                observer: observer.as_mut().map(|o| &mut **o as &mut dyn FfnObserver),
            };
            pass.run(weights, layer, layer, states)?;
        }
        self.cache.advance(ids.len());
        Ok(())
    }

    /// The logits of a token of the part that was just run, for the token behind `position` others.
    fn logits(&mut self, token: usize, position: usize) -> Result<()> {
        let state = &self.states[token * self.spec.hidden_size..(token + 1) * self.spec.hidden_size];
        let head = Head { spec: &self.spec, weights: &self.weights.outer, threads: &self.threads };
        head.logits_with(state, position, &mut self.head, self.tables.as_deref_mut())
    }
}

/// An error unless `ids` are ids of the model, and at least one.
pub fn check_ids(spec: &ModelSpec, ids: &[u32]) -> Result<()> {
    let vocab_size = spec.vocab_size;
    if let Some(&id) = ids.iter().find(|id| **id as usize >= vocab_size) {
        return Err(RuntimeError::TokenOutOfRange { id, vocab_size });
    }
    if ids.is_empty() { Err(RuntimeError::EmptyPrompt) } else { Ok(()) }
}

/// An error unless all `logits` are finite.
fn check_finite(logits: &[f32], position: usize) -> Result<()> {
    // Without a way out of the loop it is a few instructions for a whole register of them. Infinity and what is no number have
    // larger bits than any number.
    let largest = logits.iter().fold(0, |largest, logit| logit.abs().to_bits().max(largest));
    if largest < f32::INFINITY.to_bits() {
        return Ok(());
    }
    match logits.iter().enumerate().find(|(_, logit)| !logit.is_finite()) {
        Some((id, &value)) => Err(RuntimeError::NoNumber { position, id: id as u32, value }),
        None => Ok(()),
    }
}

/// Room for one token's embedding and position.
pub struct EmbedScratch {
    token: Vec<f32>,
    position: Vec<f32>,
}

impl EmbedScratch {
    /// Scratch for a model.
    pub fn new(spec: &ModelSpec) -> Self {
        Self { token: vec![0.0; spec.embed_size], position: vec![0.0; spec.hidden_size] }
    }
}

/// Token and position embeddings of `ids` from position `start` on, `[tokens, hidden]`. All rows are among the weights.
pub fn embed(
    spec: &ModelSpec,
    weights: &OuterWeights,
    threads: &Threads,
    ids: &[u32],
    start: usize,
    states: &mut [f32],
    scratch: &mut EmbedScratch,
) {
    let embedded = embed_rows(spec, weights, threads, ids, start, states, scratch, &mut None);
    embedded.expect("nothing is read");
}

#[expect(clippy::too_many_arguments, reason = "inputs and room")]
fn embed_rows(
    spec: &ModelSpec,
    weights: &OuterWeights,
    threads: &Threads,
    ids: &[u32],
    start: usize,
    states: &mut [f32],
    scratch: &mut EmbedScratch,
    tables: &mut Option<&mut (dyn TableSource + '_)>,
) -> Result<()> {
    let hidden = spec.hidden_size;
    let tokens = weights.tokens.matrix();
    let EmbedScratch { token, position } = scratch;
    for (t, (&id, state)) in ids.iter().zip(states.chunks_exact_mut(hidden)).enumerate() {
        let mut look_up = |to: &mut [f32]| match tables {
            Some(tables) if id as usize >= tokens.rows() => tables.embedding(id, to),
            _ => {
                flashlm_kernels::to_f32(tokens.element(), tokens.row(id as usize), to);
                Ok(())
            }
        };
        match &weights.project_in {
            Some(project) => {
                look_up(token)?;
                matvec(threads, project.matrix(), token, state);
            }
            None => look_up(state)?,
        }
        if let (Some(table), Positions::Learned { offset }) = (&weights.positions, spec.positions) {
            let table = table.matrix();
            flashlm_kernels::to_f32(table.element(), table.row(start + t + offset), position);
            state.iter_mut().zip(position.iter()).for_each(|(s, p)| *s += p);
        }
    }
    Ok(())
}

/// What turns a state into logits: final norm, projection, head.
pub struct Head<'a> {
    /// The architecture.
    pub spec: &'a ModelSpec,
    /// Its weights outside the blocks.
    pub weights: &'a OuterWeights,
    /// The threads to use.
    pub threads: &'a Threads,
}

impl Head<'_> {
    /// Logits of one state, into the scratch: what is said of the token behind `position` others. All rows are among the weights.
    ///
    /// # Errors
    /// `NoNumber` if any of them is infinite or no number: nothing can be chosen among such, and any text would be a lie.
    pub fn logits(&self, state: &[f32], position: usize, scratch: &mut HeadScratch) -> Result<()> {
        self.logits_with(state, position, scratch, None)
    }

    fn logits_with(
        &self,
        state: &[f32],
        position: usize,
        scratch: &mut HeadScratch,
        tables: Option<&mut (dyn TableSource + '_)>,
    ) -> Result<()> {
        let HeadScratch { normed, projected, logits } = scratch;
        match &self.weights.final_norm {
            Some(final_norm) => norm(self.spec, final_norm, state, normed),
            None => normed.copy_from_slice(state),
        }
        let input: &[f32] = match &self.weights.project_out {
            Some(project) => {
                matvec(self.threads, project.matrix(), normed, projected);
                projected
            }
            None => normed,
        };
        let head = self.weights.head();
        matvec(self.threads, head.matrix(), input, &mut logits[..head.rows()]);
        if let Some(tables) = tables {
            tables.logits(self.threads, input, logits)?;
        }
        if let Some(bias) = &self.weights.head_bias {
            logits.iter_mut().zip(bias).for_each(|(l, b)| *l += b);
        }
        check_finite(logits, position)
    }

    /// Logits of many states, `[states, vocab]`: those of [`Head::logits`] but for rounding, with the weights read once for all.
    /// The first is behind `position` others.
    ///
    /// # Errors
    /// As [`Head::logits`].
    pub fn logits_of_many(
        &self,
        states: &[f32],
        position: usize,
        logits: &mut Vec<f32>,
        scratch: &mut MatmulScratch,
    ) -> Result<()> {
        let rows = states.len() / self.spec.hidden_size;
        let mut input = states.to_vec();
        if let Some(final_norm) = &self.weights.final_norm {
            norm(self.spec, final_norm, states, &mut input);
        }
        if let Some(project) = &self.weights.project_out {
            let mut projected = vec![0.0; rows * self.spec.embed_size];
            matmul(self.threads, project.matrix(), &input, rows, &mut projected, self.spec.embed_size, scratch);
            input = projected;
        }
        let vocab = self.spec.vocab_size;
        logits.resize(rows * vocab, 0.0);
        matmul(self.threads, self.weights.head().matrix(), &input, rows, logits, vocab, scratch);
        if let Some(bias) = &self.weights.head_bias {
            logits.chunks_exact_mut(vocab).for_each(|row| row.iter_mut().zip(bias).for_each(|(l, b)| *l += b));
        }
        logits.chunks_exact(vocab).enumerate().try_for_each(|(row, logits)| check_finite(logits, position + row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logit_that_is_no_finite_number_is_found_wherever_it_is() {
        assert!(check_finite(&[0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE / 2.0], 0).is_ok());
        for length in [1, 7, 8, 33, 1000] {
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, length / 2, length - 1] {
                    let mut logits = vec![-1.5; length];
                    logits[at] = wrong;
                    let found = check_finite(&logits, 3);
                    let Err(RuntimeError::NoNumber { position: 3, id, value }) = found else { panic!("{found:?}") };
                    assert_eq!((id as usize, value.to_bits()), (at, wrong.to_bits()));
                }
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
