//! One turn after another with a loaded model: tokens in, text out as it comes.

use std::io::Write;

use anyhow::{Context, Result};
use flashlm::error::larger_context;
use flashlm::{Finish, Report, Session, signals, terminal};
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

/// Feeds `ids` and shows what follows, as it comes; returns what it cost and the text that only its end let out.
pub(super) fn turn(session: &mut Session<'_>, ids: &[u32], args: &RunArgs) -> Result<(Report, String)> {
    let mut out = std::io::stdout().lock();
    let mut rest = String::new();
    let mut generation = session.generate_from(ids)?;
    while let Some(token) = generation.next() {
        let token = token?;
        // From now on a signal lets the figures be shown.
        signals::end_at_once(false);
        let shown = match token.id {
            None => {
                rest = token.text;
                continue;
            }
            Some(id) if args.json => {
                let ms = token.time.as_secs_f64() * 1e3;
                let more = json!({ "id": id, "text": token.text, "ms": ms });
                writeln!(terminal::Printable(&mut out), "{}", with_figures(token.reads.per_token(1), more))
            }
            Some(_) => out.write_all(terminal::text_for(&out, &token.text).as_bytes()),
        };
        shown.and_then(|()| out.flush()).context("cannot write the text to standard output")?;
        if signals::asked().is_some() {
            generation.stop();
        }
    }
    let report = generation.report().clone();
    // Where no text was asked for there is no line to end.
    if !args.json && args.tokens > 0 {
        let written = writeln!(out, "{}", terminal::text_for(&out, &rest)).and_then(|()| out.flush());
        written.context("cannot write the text to standard output")?;
    }
    if report.tokens == 0 && report.finish == Finish::Eos {
        eprintln!("the model ended its text at once, so there is nothing to show; --ignore-eos continues");
    }
    Ok((report, rest))
}
