//! Turn by turn on a terminal; the KV cache is kept. An error in one turn is reported, and does not end the conversation.

use std::io::{BufRead, ErrorKind, stdin};

use anyhow::{Context, Result};
use flashlm::budget::counted;
use flashlm::error::sentence;
use flashlm::{Finish, Session, signals};

use super::prompt::{as_typed, read, say_notices};
use super::session::{advice, turn};
use super::{RunArgs, report};

/// Bytes of a line that are read; nobody types as many.
const LINE_BYTES_MAX: usize = 16 << 20;

/// Asks and answers until the user has had enough.
pub(super) fn converse(session: &mut Session<'_>, args: &RunArgs) -> Result<()> {
    eprintln!("Type text for the model to continue. Ctrl-C ends a turn, Ctrl-D the conversation.");
    loop {
        eprint!("> ");
        signals::end_at_once(true);
        let line = read_line().context("cannot read from the terminal")?;
        signals::end_at_once(false);
        let Some(line) = line else {
            eprintln!();
            return Ok(());
        };
        match ids(session, &line) {
            Ok(ids) if ids.is_empty() => continue,
            Ok(ids) if ids.len() >= session.room() => eprintln!(
                "{} do not fit the {} left of the context; {}",
                counted(ids.len(), "token"),
                session.room(),
                advice(session)
            ),
            Ok(ids) => {
                let (figures, rest) = turn(session, &ids, args)?;
                report(args, &figures, &rest, 0)?;
                if figures.tokens < args.tokens && figures.finish == Finish::Length {
                    let context = counted(session.context(), "token");
                    eprintln!("cut short: the context of {context} is full; {}", advice(session));
                }
            }
            Err(error) => eprintln!("{}", sentence(error.as_ref())),
        }
        signals::forget_interrupt();
        if signals::asked().is_some() {
            return Ok(());
        }
    }
}

/// Token ids of a line.
fn ids(session: &Session<'_>, line: &[u8]) -> Result<Vec<u32>> {
    let tokenizer = session.model().tokenizer();
    let advice = || format!("type a shorter one, or {}", advice(session));
    let text = as_typed(read(tokenizer, &mut &*line, session.room(), "what was typed", &advice)?);
    if !session.is_empty() {
        return Ok(tokenizer.encode_bare(&text)?);
    }
    if tokenizer.encode_bare(&text)?.is_empty() {
        return Ok(Vec::new());
    }
    // The beginning of a text; later turns go on with it.
    let ids = tokenizer.encode(&text)?;
    say_notices(tokenizer, &ids);
    Ok(ids)
}

/// The bytes of a line without its end; `None` where there is no further one.
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
