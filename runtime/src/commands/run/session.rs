//! One turn after another with a loaded model: tokens in, text out as it comes.

use std::io::Write;
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use flashlm_runtime::error::larger_context;
use flashlm_runtime::generate::{Finish, Generation, NewToken, Request, generate};
use flashlm_runtime::model::forward::Forward;
use flashlm_runtime::sampler::Sampler;
use flashlm_runtime::text::{StopStrings, TextStream, Tokenizer};
use flashlm_runtime::{signals, terminal};
use serde_json::json;

use super::RunArgs;
use crate::commands::with_figures;

/// A model with what it has been fed and has written.
pub(super) struct Session<'a> {
    pub(super) forward: Forward,
    pub(super) sampler: Sampler,
    pub(super) tokenizer: &'a Tokenizer,
    /// Knows all ids so far: what a token's text is depends on them.
    pub(super) stream: TextStream<'a>,
    /// Ids that end a turn.
    pub(super) ends: Vec<u32>,
    /// Those of them that are there because the user named them, and not because the model ends its text with them.
    pub(super) stop_ids: Vec<u32>,
    pub(super) args: &'a RunArgs,
    /// The last token that was shown and not fed: the next turn begins with it.
    pub(super) unfed: Option<u32>,
}

impl Session<'_> {
    /// Tokens that the context still has room for.
    pub(super) fn room(&self) -> usize {
        self.forward.context() - self.forward.len() - usize::from(self.unfed.is_some())
    }

    /// What to do where the context has no more room, as the end of a sentence.
    pub(super) fn advice(&self) -> String {
        match larger_context(self.forward.context(), self.forward.spec().max_positions) {
            Some(larger) => format!("start again, or with {larger}"),
            None => "start again".into(),
        }
    }

    /// Feeds `ids` and shows what follows, as it comes; returns what it cost and the text that only its end let out.
    pub(super) fn turn(&mut self, ids: &[u32], tokens: usize) -> Result<(Generation, String)> {
        let prompt: Vec<u32> = self.unfed.take().into_iter().chain(ids.iter().copied()).collect();
        self.stream.prompt(ids);
        let stream = &mut self.stream;
        let mut stops = StopStrings::new(self.args.stop.clone());
        let mut out = std::io::stdout().lock();
        let json = self.args.json;
        let mut show = |token: &NewToken, text: &str| -> std::io::Result<()> {
            if json {
                let ms = token.time.as_secs_f64() * 1e3;
                let more = json!({ "id": token.id, "text": text, "ms": ms });
                writeln!(terminal::Printable(&mut out), "{}", with_figures(token.reads.per_token(1), more))?;
            } else {
                out.write_all(terminal::text_for(&out, text).as_bytes())?;
            }
            out.flush()
        };
        let request = Request { prompt: &prompt, tokens, eos: &self.ends };
        let (mut last, mut failure) = (None, None);
        let mut generation = generate(&mut self.forward, &mut self.sampler, &request, &mut |token| {
            last = Some(token.id);
            // From now on a signal lets the figures be shown.
            signals::end_at_once(false);
            let (text, stopped) = stops.push(&stream.push(token.id));
            if let Err(error) = show(&token, &text) {
                failure = Some(error);
                return ControlFlow::Break(());
            }
            if stopped || signals::asked().is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(error) = failure {
            return Err(error).context("cannot write the text to standard output");
        }
        // What ended at the model's own will was fed whole.
        self.unfed = last.filter(|_| generation.finish != Finish::Eos);
        // What was held back: the beginning of a stop string, or of a character.
        let mut rest = String::new();
        if generation.finish != Finish::Stopped || signals::asked().is_some() {
            let (text, stopped) = stops.push(&stream.rest());
            rest = if stopped { text } else { text + &stops.finish() };
        }
        // Where no text was asked for there is no line to end.
        if !json && tokens > 0 {
            writeln!(out, "{}", terminal::text_for(&out, &rest))?;
            out.flush()?;
        }
        if generation.ended_by.is_some_and(|id| self.stop_ids.contains(&id)) {
            generation.finish = Finish::Stopped;
        }
        if generation.tokens == 0 && generation.finish == Finish::Eos {
            eprintln!("the model ended its text at once, so there is nothing to show; --ignore-eos goes on");
        }
        Ok((generation, rest))
    }
}
