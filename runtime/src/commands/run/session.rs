//! One turn after another with a loaded model: tokens in, text out as it comes.

use std::io::{StdoutLock, Write};
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use flashlm::chat::ChatTemplate;
use flashlm::error::larger_context;
use flashlm::{Finish, Report, Session, Token, signals, terminal};
use serde_json::json;

use super::RunArgs;
use crate::commands::with_figures;

/// What to do where the context has no more room, as the end of a sentence.
pub(super) fn advice(session: &Session<'_>) -> String {
    match larger_context(session.context(), session.model().spec().max_positions) {
        Some(larger) => format!("start again, or with {larger}"),
        None => "start again".into(),
    }
}

/// Shows a turn as it comes.
pub(super) struct Printer {
    out: StdoutLock<'static>,
    json: bool,
    /// The text of all tokens, for whoever keeps it.
    pub(super) text: String,
    /// Text that only the end let out.
    pub(super) rest: String,
    failed: Option<std::io::Error>,
}

impl Printer {
    pub(super) fn new(json: bool) -> Self {
        Self { out: std::io::stdout().lock(), json, text: String::new(), rest: String::new(), failed: None }
    }

    /// Shows a token; tells whether to go on.
    pub(super) fn token(&mut self, token: &Token) -> ControlFlow<()> {
        // From now on a signal lets the figures be shown.
        signals::end_at_once(false);
        self.text += &token.text;
        let Some(id) = token.id else {
            self.rest += &token.text;
            return ControlFlow::Continue(());
        };
        let out = &mut self.out;
        let shown = if self.json {
            let ms = token.time.as_secs_f64() * 1e3;
            let more = json!({ "id": id, "text": token.text, "ms": ms });
            writeln!(terminal::Printable(&mut *out), "{}", with_figures(token.reads.per_token(1), more))
        } else {
            out.write_all(terminal::text_for(out, &token.text).as_bytes())
        };
        self.failed = shown.and_then(|()| out.flush()).err();
        match self.failed.is_some() || signals::asked().is_some() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Ends the line of a turn; `is_text` where it asked for any.
    pub(super) fn end(&mut self, is_text: bool) -> Result<()> {
        let mut written = self.failed.take().map_or(Ok(()), Err);
        // Where no text was asked for there is no line to end.
        if !self.json && is_text && written.is_ok() {
            let rest = terminal::text_for(&self.out, &self.rest);
            written = writeln!(self.out, "{rest}").and_then(|()| self.out.flush());
        }
        written.context("cannot write the text to standard output")
    }
}

/// Feeds `ids`, with their text where they are of a conversation, of which the session may have the beginning, and shows what follows, as it comes; returns what it cost.
pub(super) fn turn(
    session: &mut Session<'_>,
    template: Option<&ChatTemplate>,
    ids: &[u32],
    text: Option<String>,
    args: &RunArgs,
) -> Result<(Report, Printer)> {
    let mut printer = Printer::new(args.json);
    let mut generation = session.answer(template, ids, text)?;
    while let Some(token) = generation.next() {
        if printer.token(&token?).is_break() {
            generation.stop();
        }
    }
    let report = generation.report().clone();
    printer.end(args.tokens() > 0)?;
    if report.tokens == 0 && report.finish == Finish::Eos {
        eprintln!("the model ended its text at once, so there is nothing to show; --ignore-eos continues");
    }
    Ok((report, printer))
}
