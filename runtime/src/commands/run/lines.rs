//! Lines from a terminal: with an editor, or, where there is none or the terminal cannot be drawn on (`TERM=dumb`), plain ones, of
//! which the system cuts long ones off.

use std::io::{BufRead, ErrorKind, stdin};

use anyhow::{Context, Result};
use flashlm::signals;

#[cfg(feature = "editor")]
use super::editor::EditedLines;
use super::typed::Typed;

/// Bytes of a plain line that are read; nobody types as many.
const LINE_BYTES_MAX: usize = 16 << 20;

/// Where lines come from.
pub(super) enum Lines {
    #[cfg(feature = "editor")]
    Edited(Box<EditedLines>),
    Plain,
}

impl Lines {
    /// Lines of the terminal that is standard input. With `history`, they are kept in the user's file.
    #[cfg(feature = "editor")]
    pub(super) fn open(history: bool) -> Result<Self> {
        let term = std::env::var_os("TERM").unwrap_or_default();
        if ["dumb", "cons25", "emacs"].iter().any(|dumb| term == *dumb) {
            return Ok(Self::Plain);
        }
        Ok(Self::Edited(Box::new(EditedLines::open(history)?)))
    }

    #[cfg(not(feature = "editor"))]
    pub(super) fn open(_history: bool) -> Result<Self> {
        Ok(Self::Plain)
    }

    /// Asks for a line.
    pub(super) fn read(&mut self, prompt: &str) -> Result<Typed> {
        match self {
            #[cfg(feature = "editor")]
            Self::Edited(lines) => lines.read(prompt),
            Self::Plain => plain(prompt),
        }
    }
}

/// The bytes of a line without its end.
fn plain(prompt: &str) -> Result<Typed> {
    eprint!("{prompt}");
    signals::end_at_once(true);
    let line = read_line().context("cannot read from the terminal");
    signals::end_at_once(false);
    Ok(line?.map_or_else(
        || {
            eprintln!();
            Typed::End
        },
        Typed::Line,
    ))
}

fn read_line() -> std::io::Result<Option<Vec<u8>>> {
    let (mut line, mut any) = (Vec::new(), false);
    let mut input = stdin().lock();
    loop {
        let there = match input.fill_buf() {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            there => there?,
        };
        if there.is_empty() {
            return Ok(any.then_some(line));
        }
        any = true;
        let end = there.iter().position(|byte| *byte == b'\n');
        let part = &there[..end.unwrap_or(there.len())];
        line.extend_from_slice(&part[..part.len().min(LINE_BYTES_MAX - line.len())]);
        let used = part.len() + usize::from(end.is_some());
        input.consume(used);
        if end.is_some() {
            line.pop_if(|byte| *byte == b'\r');
            return Ok(Some(line));
        }
    }
}
