//! A text on a loaded model.

use super::model::Model;
use crate::engine::{Row, SequenceId, Work};
use crate::error::Result;
use crate::sampler::{Sampler, Sampling};
use crate::text::TextStream;

/// A text that grows turn by turn: what was said before stays in memory. Dropping it frees its memory for others.
pub struct Session<'m> {
    pub(super) model: &'m Model,
    pub(super) sequence: SequenceId,
    pub(super) sampler: Sampler,
    /// Knows all ids so far: a token's text depends on them.
    pub(super) stream: TextStream<'m>,
    /// Ids with which the model ends a turn, and those that the caller named.
    pub(super) eos: Vec<u32>,
    pub(super) stop_ids: Vec<u32>,
    pub(super) stops: Vec<String>,
    pub(super) tokens: Option<usize>,
    /// The last token that was yielded and not fed: the next turn begins with it.
    pub(super) unfed: Option<u32>,
}

impl Model {
    /// A new text, with memory for its whole context.
    ///
    /// # Errors
    /// `NoRoomForSequence` where there are as many sessions already as [`ModelOptions::sessions`](super::ModelOptions::sessions) said.
    pub fn session(&self) -> Result<Session<'_>> {
        Session::open(self)
    }
}

impl<'m> Session<'m> {
    fn open(model: &'m Model) -> Result<Self> {
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

    /// How tokens are chosen; by default always the likeliest.
    pub fn sampling(mut self, sampling: Sampling) -> Self {
        self.sampler = Sampler::new(sampling, self.model.spec().vocab_size);
        self
    }

    /// At most this many tokens in a turn; by default as many as the context has room for.
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.tokens = Some(tokens);
        self
    }

    /// Ends a turn before `text` appears, or at the special token with that text.
    pub fn stop(mut self, text: &str) -> Self {
        match self.model.tokenizer().special_id(text) {
            Some(id) => self.stop_ids.push(id),
            None => self.stops.push(text.to_owned()),
        }
        self
    }

    /// Continues after the model ends its text (on EOS).
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

    /// Its context, in tokens.
    pub fn context(&self) -> usize {
        self.model.executor().context()
    }

    /// How many more tokens there is room for.
    pub fn room(&self) -> usize {
        // The last token of a full context is given out, but cannot be fed.
        self.context().saturating_sub(self.len())
    }

    /// Forgets everything that was said.
    pub fn clear(&mut self) {
        self.model.executor().truncate(self.sequence, 0);
        self.stream = self.model.tokenizer().stream(&[]);
        self.unfed = None;
    }

    /// Says `ids` and gives what the model expects after each of them: its logits, `[vocab]`, with the id's place. The model is in use
    /// meanwhile: `each` must not ask it or its sessions for anything.
    ///
    /// # Errors
    /// `EmptyPrompt`, `ContextFull`, or what `each` said; then nothing has been said.
    pub fn logits(&mut self, ids: &[u32], each: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        let sequence = self.sequence;
        let row = |token, wants_logits| Row { sequence, token, work: Work::Prompt, wants_logits };
        let unfed = self.unfed.map(|id| row(id, false));
        let rows: Vec<Row> = unfed.into_iter().chain(ids.iter().map(|id| row(*id, true))).collect();
        let skipped = rows.len() - ids.len();
        let mut executor = self.model.executor();
        let before = executor.len(sequence);
        let done = executor.step(&rows, &mut |at, logits| each(at - skipped, logits));
        if done.is_err() {
            executor.truncate(sequence, before);
            return done;
        }
        self.unfed = None;
        self.stream.prompt(ids);
        ids.iter().for_each(|id| self.sampler.observe(*id));
        Ok(())
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.model.executor().close(self.sequence);
    }
}
