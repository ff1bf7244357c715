//! A smaller model with the same vocabulary as the draft.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{CLASSES, Draft, Guess};
use crate::engine::{Executor, Row, SequenceId, Work};
use crate::error::{Result, RuntimeError};
use crate::sampler::{Sampler, Sampling, confidence};

/// Rows that a guess takes: the last token, and one more where all guesses of the step before came true.
const USUAL_ROWS: usize = 2;

/// Guesses by a model that all texts share, with a sequence of its own. It draws with the random numbers that will be drawn with.
pub struct ModelDraft {
    executor: Arc<Mutex<Executor>>,
    sequence: SequenceId,
    /// Tokens of its sequence.
    fed: Vec<u32>,
    rows: Vec<Row>,
    sampler: Sampler,
    /// Ids that the model that is guessed for has.
    vocab: usize,
}

impl ModelDraft {
    /// A sequence of `executor`, for a text that is chosen by `sampling` from `vocab` ids.
    ///
    /// # Errors
    /// `NoRoomForSequence`.
    pub fn open(executor: &Arc<Mutex<Executor>>, sampling: Sampling, vocab: usize) -> Result<Self> {
        let mut opened = lock(executor);
        let context = opened.context();
        Ok(Self {
            sequence: opened.open(context)?,
            executor: Arc::clone(executor),
            fed: Vec::with_capacity(context),
            rows: Vec::with_capacity(context),
            sampler: Sampler::new(sampling, opened.spec().vocab_size),
            vocab,
        })
    }
}

impl Draft for ModelDraft {
    fn guess(&mut self, text: &[u32], drafted: &[u32], sampler: &Sampler) -> Result<Option<Guess>> {
        let (mut executor, sequence) = (lock(&self.executor), self.sequence);
        let (all, vocab) = (text.len() + drafted.len(), executor.spec().vocab_size);
        let ids = || text.iter().chain(drafted).copied();
        if all == 0 || all > executor.context() {
            return Ok(None);
        }
        if drafted.is_empty() {
            self.sampler.follow(sampler);
        }
        // The last one is computed in any case: it says what comes next.
        let known = self.fed.iter().zip(ids()).take(all - 1).take_while(|(fed, id)| **fed == *id).count();
        self.fed.truncate(known);
        executor.truncate(sequence, known);
        if ids().skip(known).any(|id| id as usize >= vocab) {
            return Ok(None);
        }
        self.rows.clear();
        let row = |(at, token)| Row { sequence, token, work: Work::Prompt, wants_logits: at + 1 == all };
        self.rows.extend(ids().enumerate().skip(known).map(row));
        let said = executor.step(&self.rows, &mut |_, _| Ok(()));
        said.map_err(|error| RuntimeError::Draft(Box::new(error)))?;
        self.fed.extend(ids().skip(known));
        let logits = executor.last_logits();
        let sure = (self.sampler.sampling().temperature <= 0.0).then(|| confidence(logits));
        let choice = self.sampler.choose_for_now(logits);
        let class = (sure.unwrap_or(choice.likelihood) * CLASSES as f32) as usize;
        let guess = Guess { id: choice.id, class: class.min(CLASSES - 1), is_usual: self.rows.len() <= USUAL_ROWS };
        Ok(Some(guess).filter(|guess| (guess.id as usize) < self.vocab))
    }

    fn expected(&self, class: usize) -> f64 {
        (class as f64 + 0.5) / CLASSES as f64
    }
}

impl Drop for ModelDraft {
    fn drop(&mut self) {
        lock(&self.executor).close(self.sequence);
    }
}

/// A step that panicked leaves the executor as an error does.
fn lock(executor: &Mutex<Executor>) -> MutexGuard<'_, Executor> {
    executor.lock().unwrap_or_else(PoisonError::into_inner)
}
