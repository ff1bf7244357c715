//! A turn in progress: an iterator of tokens with their text.

use std::time::Duration;

use super::session::Session;
use crate::error::{Result, RuntimeError};
use crate::generate::{Generation as Report, Generator, NewToken, Request};
use crate::neurons::counters::ReadCounters;
use crate::text::StopStrings;

/// A token, and the text that it completes.
#[derive(Clone, Debug)]
pub struct Token {
    /// Its id; `None` for text that only the end of the turn lets out, such as the beginning of a stop string that did not come.
    pub id: Option<u32>,
    /// Empty while a character is open, or what may be the beginning of a stop string.
    pub text: String,
    /// From the id before it in, or the prompt, to this one out.
    pub time: Duration,
    /// What was read from flash meanwhile.
    pub reads: ReadCounters,
}

/// What a [`Session`] says in a turn. If it is dropped early, the turn ends there.
///
/// Until its first token nothing has been said: if that fails, or never comes, the session is unchanged.
pub struct Generation<'s, 'm> {
    pub(super) session: &'s mut Session<'m>,
    generator: Generator,
    stops: Option<StopStrings>,
    /// What is to be said, until it is.
    prompt: Option<Vec<u32>>,
    failed: bool,
}

impl<'m> Session<'m> {
    /// Says `text` and lets the model continue, token by token. The first turn begins as the tokenizer says that texts begin; later ones
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
        self.generate_until(ids, &[])
    }

    /// The same; `ends` are further ids with which the model ends what it says.
    pub(super) fn generate_until(&mut self, ids: &[u32], ends: &[u32]) -> Result<Generation<'_, 'm>> {
        let room = self.room();
        if ids.is_empty() && self.transcript.unfed().is_none() {
            return Err(RuntimeError::EmptyPrompt);
        }
        let mut executor = self.model.executor();
        let (context, model_max) = (executor.context(), self.model.spec().max_positions);
        if ids.len() > room {
            return Err(RuntimeError::ContextFull { wanted: context - room + ids.len(), context, model_max });
        }
        self.prepare_guesses(&executor)?;
        self.written = None;
        // The last new token is given out, not fed.
        let tokens = self.tokens.unwrap_or(usize::MAX).min(room - ids.len() + 1);
        let eos = if self.ignores_eos { Vec::new() } else { [&self.eos, ends].concat() };
        let request = Request { prompt: ids, tokens, eos: &eos, stop_ids: &self.stop_ids };
        let generator = Generator::new(&mut executor, &mut self.transcript, &mut self.sampler, &request);
        drop(executor);
        let stops = StopStrings::new(self.stops.clone());
        Ok(Generation { session: self, generator, stops: Some(stops), prompt: Some(ids.to_vec()), failed: false })
    }
}

impl Generation<'_, '_> {
    /// Ends the turn: only text that was held back is still to come.
    pub fn stop(&mut self) {
        self.generator.stop();
    }

    /// What the turn has cost so far, and, once it has ended, why.
    pub fn report(&self) -> &Report {
        self.generator.report()
    }

    fn token(&mut self) -> Result<Option<Token>> {
        if self.failed {
            return Ok(None);
        }
        let token = match self.new_token()? {
            None => self.rest(),
            Some(NewToken { id, time, reads }) => {
                let Some(stops) = &mut self.stops else { return Ok(None) };
                let (text, is_stopped) = stops.push(&self.session.stream.push(id));
                if is_stopped {
                    self.generator.stop();
                    self.stops = None;
                    // The tokens have more text than is given out.
                    self.session.written = None;
                }
                Some(Token { id: Some(id), text, time, reads })
            }
        };
        if let (Some(written), Some(token)) = (&mut self.session.written, &token) {
            written.push_str(&token.text);
        }
        Ok(token)
    }

    fn new_token(&mut self) -> Result<Option<NewToken>> {
        let Session { model, transcript, sampler, stream, .. } = &mut *self.session;
        let next = self.generator.next(&mut model.executor(), transcript, sampler);
        self.failed = next.is_err();
        if let (false, Some(ids)) = (self.failed, self.prompt.take()) {
            stream.prompt(&ids);
        }
        next
    }

    /// What was held back, once.
    fn rest(&mut self) -> Option<Token> {
        let mut stops = self.stops.take()?;
        let (text, is_stopped) = stops.push(&self.session.stream.rest());
        let text = if is_stopped { text } else { text + &stops.finish() };
        let (time, reads) = (Duration::ZERO, ReadCounters::default());
        (!text.is_empty()).then_some(Token { id: None, text, time, reads })
    }
}

impl Iterator for Generation<'_, '_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        self.token().transpose()
    }
}
