//! What both programs print: lines without terminal control characters, and JSON likewise. The libraries print nothing;
//! this is for the programs' `println!` and `eprintln!`.

use std::fmt::Arguments;
use std::io::{self, BufWriter, Write};

use serde::Serialize;

use crate::terminal::{Printable, printable};

/// A line on standard output. A reader that went away ends the program, and that is no failure: `flashlm-prep inspect X | head -n 1`.
pub fn print_line(line: Arguments<'_>) {
    written(writeln!(Printable(io::stdout().lock()), "{line}"));
}

/// A line on standard error. Where nobody can be told, nobody is.
pub fn note_line(line: Arguments<'_>) {
    note(format_args!("{line}\n"));
}

/// Text on standard error, likewise.
pub fn note(text: Arguments<'_>) {
    _ = io::stderr().write_all(printable(&text.to_string()).as_bytes());
}

/// A value as JSON on standard output, piece by piece: as one text, or a tree of JSON values, it may take many times its length.
///
/// # Errors
/// What cannot be JSON.
pub fn print_json(value: &impl Serialize) -> serde_json::Result<()> {
    let mut out = Printable(BufWriter::new(io::stdout().lock()));
    match serde_json::to_writer_pretty(&mut out, value) {
        Err(error) if error.io_error_kind().is_none() => return Err(error),
        result => written(result.map_err(Into::into).and_then(|()| writeln!(out)).and_then(|()| out.flush())),
    }
    Ok(())
}

fn written(result: io::Result<()>) {
    match result {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            note_line(format_args!("cannot write to standard output: {error}"));
            std::process::exit(1)
        }
    }
}
