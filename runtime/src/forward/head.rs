//! From the states after the last block to logits: final norm, projection, head.

use flashlm_formats::model::ModelSpec;
use flashlm_kernels::{MatmulScratch, Threads, matmul, matvec, matvec_each};

use super::tables::TableSource;
use super::weights::OuterWeights;
use crate::buffers::Buffers;
use crate::error::{Result, RuntimeError};

/// Room for the way of a few states through the head, and their logits.
pub struct HeadScratch {
    normed: Vec<f32>,
    projected: Vec<f32>,
    logits: Vec<f32>,
    vocab: usize,
}

impl HeadScratch {
    /// Scratch for up to `states` states at a time.
    pub fn new(buffers: &mut Buffers, spec: &ModelSpec, states: usize) -> Self {
        let projected = if spec.embed_size == spec.hidden_size { 0 } else { spec.embed_size };
        Self {
            normed: buffers.zeros(states * spec.hidden_size),
            projected: buffers.zeros(states * projected),
            logits: buffers.zeros(states * spec.vocab_size),
            vocab: spec.vocab_size,
        }
    }

    /// The logits of the i-th state of the last call, `[vocab]`.
    pub fn logits(&self, state: usize) -> &[f32] {
        &self.logits[state * self.vocab..][..self.vocab]
    }

    /// As [`HeadScratch::logits`], to be changed.
    pub fn logits_mut(&mut self, state: usize) -> &mut [f32] {
        &mut self.logits[state * self.vocab..][..self.vocab]
    }
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
    /// Logits of one state, into the scratch: what is said of the token after `position` others. All rows are among the weights.
    ///
    /// # Errors
    /// `NoNumber` if any of them is infinite or no number: nothing can be chosen among such, and any text would be a lie.
    pub fn logits(&self, state: &[f32], position: usize, scratch: &mut HeadScratch) -> Result<()> {
        self.logits_of_each(state, &|_| position, scratch, None)
    }

    /// Logits of a few states, `[states, hidden]`, into the scratch, of each what it has alone; `position` as for one, of each.
    pub(crate) fn logits_of_each(
        &self,
        states: &[f32],
        position: &dyn Fn(usize) -> usize,
        scratch: &mut HeadScratch,
        tables: Option<&mut (dyn TableSource + '_)>,
    ) -> Result<()> {
        let (hidden, embed, vocab) = (self.spec.hidden_size, self.spec.embed_size, self.spec.vocab_size);
        let count = states.len() / hidden;
        let HeadScratch { normed, projected, logits, .. } = scratch;
        let normed = &mut normed[..states.len()];
        match &self.weights.final_norm {
            Some(final_norm) => final_norm.apply(states, normed),
            None => normed.copy_from_slice(states),
        }
        let input: &[f32] = match &self.weights.project_out {
            Some(project) => {
                let projected = &mut projected[..count * embed];
                matvec_each(self.threads, project.matrix(), normed, count, projected, &mut || {});
                projected
            }
            None => normed,
        };
        let head = self.weights.head().matrix();
        let logits = &mut logits[..count * vocab];
        if head.rows() == vocab && count > 1 {
            matvec_each(self.threads, head, input, count, logits, &mut || {});
        } else {
            for (input, logits) in input.chunks_exact(embed).zip(logits.chunks_exact_mut(vocab)) {
                matvec(self.threads, head, input, &mut logits[..head.rows()]);
            }
        }
        if let Some(tables) = tables {
            for (input, logits) in input.chunks_exact(embed).zip(logits.chunks_exact_mut(vocab)) {
                tables.logits(self.threads, input, logits)?;
            }
        }
        for (state, logits) in logits.chunks_exact_mut(vocab).enumerate() {
            if let Some(bias) = &self.weights.head_bias {
                logits.iter_mut().zip(bias).for_each(|(l, b)| *l += b);
            }
            check_finite(logits, position(state))?;
        }
        Ok(())
    }

    /// Logits of many states, `[states, vocab]`: those of [`Head::logits`] but for rounding, with the weights read once for all.
    /// The first is after `position` others.
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
            final_norm.apply(states, &mut input);
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
}
