//! A text on a loaded model.

use super::model::Model;
use crate::engine::{Executor, Row};
use crate::error::Result;
use crate::generate::Transcript;
use crate::sampler::{Sampler, Sampling};
use crate::speculate::{Speculate, Speculation};
use crate::text::TextStream;

/// A text that grows turn by turn: what was said before stays in memory. Dropping it frees its memory for others.
pub struct Session<'m> {
    pub(super) model: &'m Model,
    pub(super) transcript: Transcript,
    pub(super) sampler: Sampler,
    speculate: Speculate,
    /// Knows all ids so far: a token's text depends on them.
    pub(super) stream: TextStream<'m>,
    /// Ids with which the model ends a turn, and those that the caller named.
    pub(super) eos: Vec<u32>,
    pub(super) ignores_eos: bool,
    /// What a saved session keeps beside the text: the conversation that it is of.
    pub(super) conversation: Option<String>,
    /// The text of all that was said, where it is known: of turns that a chat template wrote, and of the answers to them.
    pub(super) written: Option<String>,
    pub(super) stop_ids: Vec<u32>,
    pub(super) stops: Vec<String>,
    pub(super) tokens: Option<usize>,
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
        let sequence = executor.open(context)?;
        let transcript = Transcript::new(&executor, sequence, None);
        drop(executor);
        Ok(Self {
            transcript,
            model,
            sampler: Sampler::new(Sampling::default(), model.spec().vocab_size),
            stream: model.tokenizer().stream(&[]),
            speculate: Speculate::default(),
            eos: model.spec().eos.clone(),
            ignores_eos: false,
            conversation: None,
            written: None,
            stop_ids: Vec::new(),
            stops: Vec::new(),
            tokens: None,
        })
    }

    /// How tokens are chosen; by default always the likeliest.
    pub fn sampling(mut self, sampling: Sampling) -> Self {
        self.set_sampling(sampling);
        self
    }

    /// Chooses tokens otherwise from now on, with random numbers from their start.
    pub fn set_sampling(&mut self, sampling: Sampling) {
        self.transcript.settle(&mut self.model.executor(), &mut self.sampler);
        self.sampler = Sampler::new(sampling, self.model.spec().vocab_size);
        self.sampler.see_only(self.transcript.ids());
        self.transcript.speculate(None);
    }

    /// At most this many tokens in a turn from now on; as many as the context has room for without a number.
    pub fn set_max_tokens(&mut self, tokens: Option<usize>) {
        self.tokens = tokens;
    }

    /// At most this many tokens in a turn, if there is a limit.
    pub fn limit(&self) -> Option<usize> {
        self.tokens
    }

    /// How many tokens are guessed in a step, as far as [`ModelOptions::speculate`](super::ModelOptions::speculate) has left room for;
    /// by default as many as pay. The text is the same.
    pub fn speculate(mut self, how: Speculate) -> Self {
        self.speculate = how;
        self.transcript.speculate(None);
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
        self.ignores_eos = true;
        self
    }

    /// Whether anything but special tokens stops a turn.
    pub(super) fn has_stop_strings(&self) -> bool {
        !self.stops.is_empty()
    }

    /// What a saved session keeps beside the text.
    pub fn conversation(&self) -> Option<&str> {
        self.conversation.as_deref()
    }

    /// Keeps this beside the text when the session is saved.
    pub(super) fn set_conversation(&mut self, conversation: Option<String>) {
        self.conversation = conversation;
    }

    /// Tokens of the text so far.
    pub fn len(&self) -> usize {
        self.transcript.ids().len()
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

    /// Forgets all but the first `count` tokens of the text.
    pub fn truncate(&mut self, count: usize) {
        if count < self.len() {
            self.transcript.truncate(&mut self.model.executor(), &mut self.sampler, count);
            self.stream = self.model.tokenizer().stream(self.transcript.ids());
            self.written = None;
        }
    }

    /// Forgets what is not the beginning of `ids`; gives how many of them have been said then, at most all but the last.
    pub fn keep(&mut self, ids: &[u32]) -> usize {
        let said = self.transcript.ids().iter().zip(ids).take_while(|(said, id)| said == id).count();
        let count = said.min(ids.len().saturating_sub(1));
        self.truncate(count);
        count
    }

    /// The ids said so far.
    pub fn ids(&self) -> &[u32] {
        self.transcript.ids()
    }

    /// Forgets everything that was said.
    pub fn clear(&mut self) {
        self.transcript.clear(&mut self.model.executor());
        self.stream = self.model.tokenizer().stream(&[]);
        self.written = None;
    }

    /// Says `ids` and gives what the model expects after each of them: its logits, `[vocab]`, with the id's place. The model is in use
    /// meanwhile: `each` must not ask it or its sessions for anything.
    ///
    /// # Errors
    /// `EmptyPrompt`, `ContextFull`, or what `each` said; then nothing has been said.
    pub fn logits(&mut self, ids: &[u32], each: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        let mut executor = self.model.executor();
        self.transcript.settle(&mut executor, &mut self.sampler);
        let rows = self.transcript.rows_of(ids, true);
        let (begun, skipped) = (self.transcript.rows_of_begun(rows.len()), rows.len() - ids.len());
        let mut part =
            |rows: &[Row], first: usize| executor.step(rows, &mut |at, logits| each(first + at - skipped, logits));
        let done = if begun == 0 { Ok(()) } else { part(&rows[..begun], 0) };
        let done =
            done.and_then(|()| if begun > 0 && begun == rows.len() { Ok(()) } else { part(&rows[begun..], begun) });
        if done.is_err() {
            self.transcript.settle(&mut executor, &mut self.sampler);
            return done;
        }
        self.transcript.said(ids, &mut self.sampler);
        self.stream.prompt(ids);
        Ok(())
    }

    /// What guesses for it, made when it is needed.
    pub(super) fn prepare_guesses(&mut self, executor: &Executor) -> Result<()> {
        if self.transcript.guesses() || self.speculate == Speculate::Off || executor.batch() == 1 {
            return Ok(());
        }
        let draft = self.model.draft(self.sampler.sampling())?;
        self.transcript.speculate(Some(Speculation::new(self.speculate, draft)));
        Ok(())
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.model.executor().close(self.transcript.sequence());
    }
}
