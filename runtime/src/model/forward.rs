//! From token ids to logits: embedding, all blocks, head.

use flashlm_formats::model::{ModelSpec, Positions};
use flashlm_kernels::{Threads, matvec};

use super::ffn::{FfnObserver, FfnSource, ReadCounters};
use super::kv_cache::{KvCache, KvDtype};
use super::layer::{LayerScratch, Pass, norm};
use super::positions::PositionTables;
use super::weights::{ModelWeights, OuterWeights};
use crate::error::{Result, RuntimeError};

/// Tokens that go through a block together. Fixed, so that a result never depends on how much memory there was.
pub const PIECE_TOKENS: usize = 256;

/// A model with its KV cache: feeds tokens, gives logits.
pub struct Forward {
    spec: ModelSpec,
    weights: ModelWeights,
    ffn: Box<dyn FfnSource>,
    threads: Threads,
    positions: PositionTables,
    cache: KvCache,
    states: Vec<f32>,
    scratch: LayerScratch,
    embed: EmbedScratch,
    head: HeadScratch,
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
    /// A model with room for `context` tokens, fed at most `piece_tokens` (up to [`PIECE_TOKENS`]) at a time.
    pub fn new(
        spec: ModelSpec,
        weights: ModelWeights,
        ffn: Box<dyn FfnSource>,
        threads: Threads,
        context: usize,
        kv: KvDtype,
    ) -> Result<Self> {
        let piece = PIECE_TOKENS.min(context);
        Ok(Self {
            positions: PositionTables::new(&spec, context),
            cache: KvCache::new(&spec, spec.layers, context, kv)?,
            states: vec![0.0; piece * spec.hidden_size],
            scratch: LayerScratch::new(&spec, piece, context),
            embed: EmbedScratch::new(&spec),
            head: HeadScratch::new(&spec),
            spec,
            weights,
            ffn,
            threads,
        })
    }

    /// Bytes of states, scratch, tables and KV cache for a context.
    pub fn working_bytes(spec: &ModelSpec, context: usize) -> u64 {
        let piece = PIECE_TOKENS.min(context);
        let floats = (piece + 2) * spec.hidden_size + 2 * spec.embed_size + spec.vocab_size;
        floats as u64 * 4 + LayerScratch::bytes(spec, piece, context) + PositionTables::bytes(spec, context)
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
        self.ffn.read_counters()
    }

    /// How often reads of each size, in bytes, were asked for so far.
    pub fn read_sizes(&self) -> Vec<(u64, u64)> {
        self.ffn.read_sizes()
    }

    /// Feeds tokens and gives the logits of the last one, `[vocab]`.
    pub fn feed(&mut self, ids: &[u32]) -> Result<&mut [f32]> {
        self.check(ids)?;
        let mut last = 0;
        for piece in ids.chunks(PIECE_TOKENS) {
            self.run_piece(piece, None)?;
            last = piece.len() - 1;
        }
        self.logits(last, self.len())?;
        Ok(&mut self.head.logits)
    }

    /// As [`Forward::feed`], without the logits, and shows `observer` what goes through the FFN of every block.
    pub fn feed_observed(&mut self, ids: &[u32], observer: &mut dyn FfnObserver) -> Result<()> {
        self.check(ids)?;
        ids.chunks(PIECE_TOKENS).try_for_each(|piece| self.run_piece(piece, Some(&mut *observer)))
    }

    /// Feeds tokens and hands the logits of each one to `each`, with its place in `ids`.
    pub fn feed_all(&mut self, ids: &[u32], each: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        self.check(ids)?;
        let before = self.len() + 1;
        for (p, piece) in ids.chunks(PIECE_TOKENS).enumerate() {
            self.run_piece(piece, None)?;
            for t in 0..piece.len() {
                self.logits(t, before + p * PIECE_TOKENS + t)?;
                each(p * PIECE_TOKENS + t, &self.head.logits)?;
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

    fn run_piece(&mut self, ids: &[u32], mut observer: Option<&mut dyn FfnObserver>) -> Result<()> {
        let states = &mut self.states[..ids.len() * self.spec.hidden_size];
        let start = self.cache.len();
        embed(&self.spec, &self.weights.outer, &self.threads, ids, start, states, &mut self.embed);
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

    /// The logits of a token of the piece that was just run, for the token behind `position` others.
    fn logits(&mut self, token: usize, position: usize) -> Result<()> {
        let state = &self.states[token * self.spec.hidden_size..(token + 1) * self.spec.hidden_size];
        let head = Head { spec: &self.spec, weights: &self.weights.outer, threads: &self.threads };
        head.logits(state, position, &mut self.head)
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

/// Token and position embeddings of `ids` from position `start` on, `[tokens, hidden]`.
pub fn embed(
    spec: &ModelSpec,
    weights: &OuterWeights,
    threads: &Threads,
    ids: &[u32],
    start: usize,
    states: &mut [f32],
    scratch: &mut EmbedScratch,
) {
    let hidden = spec.hidden_size;
    let tokens = weights.tokens.matrix();
    let EmbedScratch { token, position } = scratch;
    for (t, (&id, state)) in ids.iter().zip(states.chunks_exact_mut(hidden)).enumerate() {
        match &weights.project_in {
            Some(project) => {
                flashlm_kernels::to_f32(tokens.element(), tokens.row(id as usize), token);
                matvec(threads, project.matrix(), token, state);
            }
            None => flashlm_kernels::to_f32(tokens.element(), tokens.row(id as usize), state),
        }
        if let (Some(table), Positions::Learned { offset }) = (&weights.positions, spec.positions) {
            let table = table.matrix();
            flashlm_kernels::to_f32(table.element(), table.row(start + t + offset), position);
            state.iter_mut().zip(position.iter()).for_each(|(s, p)| *s += p);
        }
    }
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
    /// Logits of one state, into the scratch: what is said of the token behind `position` others.
    ///
    /// # Errors
    /// `NoNumber` if any of them is infinite or no number: nothing can be chosen among such, and any text would be a lie.
    pub fn logits(&self, state: &[f32], position: usize, scratch: &mut HeadScratch) -> Result<()> {
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
        matvec(self.threads, self.weights.head().matrix(), input, logits);
        if let Some(bias) = &self.weights.head_bias {
            logits.iter_mut().zip(bias).for_each(|(l, b)| *l += b);
        }
        check_finite(logits, position)
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
}
