//! A text on a loaded model.

use super::generation::Generation;
use super::model::Model;
use crate::engine::{Row, SequenceId, Work};
use crate::error::{Result, RuntimeError};
use crate::generate::{Generator, Request};
use crate::sampler::{Sampler, Sampling};
use crate::text::{StopStrings, TextStream};

/// A text that grows turn by turn: what was said before stays in memory. Its memory is free for others when it is dropped.
pub struct Session<'m> {
    pub(super) model: &'m Model,
    sequence: SequenceId,
    pub(super) sampler: Sampler,
    /// Knows all ids so far: what a token's text is depends on them.
    pub(super) stream: TextStream<'m>,
    /// Ids by which the model ends a turn, and those that the caller named.
    eos: Vec<u32>,
    stop_ids: Vec<u32>,
    stops: Vec<String>,
    tokens: Option<usize>,
    /// The last token that was given out and not fed: the next turn begins with it.
    pub(super) unfed: Option<u32>,
}

impl<'m> Session<'m> {
    pub(super) fn open(model: &'m Model) -> Result<Self> {
        let mut executor = model.executor();
        let context = executor.context();
        Ok(Self {
            sequence: executor.open(context)?,
            model,
            sampler: Sampler::new(Sampling::default(), model.spec().vocab_size),
            stream: model.tokenizer().stream(&[]),
            eos: model.spec().eos.clone(),
            stop_ids: Vec::new(),
            stops: Vec::new(),
            tokens: None,
            unfed: None,
        })
    }

    /// How tokens are chosen: the likeliest one without it.
    pub fn sampling(mut self, sampling: Sampling) -> Self {
        self.sampler = Sampler::new(sampling, self.model.spec().vocab_size);
        self
    }

    /// Tokens of a turn at most; without it as many as the context has room for.
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.tokens = Some(tokens);
        self
    }

    /// Ends a turn before `text` appears, or at the special token that is written so.
    pub fn stop(mut self, text: &str) -> Self {
        match self.model.tokenizer().special_id(text) {
            Some(id) => self.stop_ids.push(id),
            None => self.stops.push(text.to_owned()),
        }
        self
    }

    /// Goes on where the model ends its text.
    pub fn ignore_eos(mut self) -> Self {
        self.eos.clear();
        self
    }

    /// Tokens of the text so far.
    pub fn len(&self) -> usize {
        self.model.executor().len(self.sequence) + usize::from(self.unfed.is_some())
    }

    /// Whether nothing has been said.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Tokens that it may have in all.
    pub fn context(&self) -> usize {
        self.model.executor().context()
    }

    /// Tokens that there is still room for.
    pub fn room(&self) -> usize {
        self.context() - self.len()
    }

    /// Forgets everything that was said.
    pub fn clear(&mut self) {
        self.model.executor().truncate(self.sequence, 0);
        self.stream = self.model.tokenizer().stream(&[]);
        self.unfed = None;
    }

    /// Says `text` and lets the model go on, token by token. The first turn begins as the tokenizer says that texts begin; later ones
    /// go on from what was said.
    ///
    /// # Errors
    /// `Tokenizer` where the text has no ids, `EmptyPrompt`, `ContextFull`.
    pub fn generate(&mut self, text: &str) -> Result<Generation<'_, 'm>> {
        let tokenizer = self.model.tokenizer();
        let ids = if self.is_empty() { tokenizer.encode(text)? } else { tokenizer.encode_bare(text)? };
        self.generate_from(&ids)
    }

    /// As [`Session::generate`], with the ids as they are.
    ///
    /// # Errors
    /// `EmptyPrompt`, `ContextFull`.
    pub fn generate_from(&mut self, ids: &[u32]) -> Result<Generation<'_, 'm>> {
        let room = self.room();
        let prompt: Vec<u32> = self.unfed.into_iter().chain(ids.iter().copied()).collect();
        if prompt.is_empty() {
            return Err(RuntimeError::EmptyPrompt);
        }
        let executor = self.model.executor();
        let (context, model_max) = (executor.context(), self.model.spec().max_positions);
        if ids.len() > room {
            return Err(RuntimeError::ContextFull { wanted: context - room + ids.len(), context, model_max });
        }
        // The last new token is given out, not fed.
        let tokens = self.tokens.unwrap_or(usize::MAX).min(room - ids.len() + 1);
        let request = Request { prompt: &prompt, tokens, eos: &self.eos, stop_ids: &self.stop_ids };
        let generator = Generator::new(&executor, self.sequence, &mut self.sampler, &request);
        drop(executor);
        self.unfed = None;
        self.stream.prompt(ids);
        let stops = StopStrings::new(self.stops.clone());
        Ok(Generation::new(self, generator, stops))
    }

    /// Says `ids` and gives what the model expects behind each of them: its logits, `[vocab]`, with the id's place.
    ///
    /// # Errors
    /// `EmptyPrompt`, `ContextFull`, or what `each` said.
    pub fn logits(&mut self, ids: &[u32], each: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        let sequence = self.sequence;
        let before = self.unfed.take().into_iter();
        let skipped = before.len();
        let row = |token| Row { sequence, token, work: Work::Prompt, wants_logits: true };
        let rows: Vec<Row> = before.chain(ids.iter().copied()).map(row).collect();
        self.stream.prompt(ids);
        ids.iter().for_each(|id| self.sampler.observe(*id));
        self.model.executor().step(&rows, &mut |at, logits| match at.checked_sub(skipped) {
            Some(at) => each(at, logits),
            None => Ok(()),
        })
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.model.executor().close(self.sequence);
    }
}
