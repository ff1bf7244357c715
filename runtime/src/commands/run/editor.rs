//! Lines from a terminal: edited, remembered, and pasted whole.
//!
//! A terminal that cannot be drawn on (`TERM=dumb`) gives plain lines, of which the system cuts long ones off.

use std::io::{BufRead, ErrorKind, IsTerminal, Write, stdin, stdout};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use flashlm::signals;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use rustyline::config::{Behavior, BellStyle};
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};

/// Bytes of a plain line that are read; nobody types as many.
const LINE_BYTES_MAX: usize = 16 << 20;
/// Lines that are remembered.
const HISTORY_LINES: usize = 1000;
/// How often a signal is looked for while somebody types.
const LOOK: Duration = Duration::from_millis(50);

/// Whether somebody is being asked for a line, with the terminal set up for that.
static ASKING: AtomicBool = AtomicBool::new(false);

/// What was typed.
pub(super) enum Typed {
    Line(Vec<u8>),
    /// Ctrl-C, which gives up a line.
    Interrupted,
    /// Ctrl-D, or the end of the input.
    End,
}

/// Where lines come from.
pub(super) enum Lines {
    Edited { editor: Box<Editor<(), FileHistory>>, history: Option<PathBuf> },
    Plain,
}

impl Lines {
    /// Lines of the terminal that is standard input. With `history`, they are kept in the user's file.
    pub(super) fn open(history: bool) -> Result<Self> {
        let term = std::env::var_os("TERM").unwrap_or_default();
        if ["dumb", "cons25", "emacs"].iter().any(|dumb| term == *dumb) {
            return Ok(Self::Plain);
        }
        let mut config = Config::builder().max_history_size(HISTORY_LINES)?.history_ignore_space(true);
        config = config.auto_add_history(true).bell_style(BellStyle::None);
        if !stdout().is_terminal() {
            // What the model says goes elsewhere, and what is typed does not.
            config = config.behavior(Behavior::PreferTerm);
        }
        let config = config.build();
        let mut editor = Editor::with_history(config.clone(), FileHistory::with_config(&config))
            .context("cannot use the terminal")?;
        let history = if history { history_path() } else { None };
        if let Some(path) = &history {
            // The first time there is none.
            _ = editor.load_history(path);
        }
        restore_at_a_signal();
        Ok(Self::Edited { editor: Box::new(editor), history })
    }

    /// Asks for a line.
    pub(super) fn read(&mut self, prompt: &str) -> Result<Typed> {
        let Self::Edited { editor, history } = self else { return plain(prompt) };
        signals::end_at_once(false);
        let line = loop {
            ASKING.store(true, Ordering::SeqCst);
            let line = editor.readline(prompt);
            ASKING.store(false, Ordering::SeqCst);
            // Another size of the window at a moment when it cannot be drawn again.
            if !matches!(line, Err(ReadlineError::Signal(_))) {
                break line;
            }
        };
        match line {
            Ok(line) => {
                if let Some(path) = history.take_if(|path| keep(editor, path).is_err()) {
                    eprintln!("note: what is typed cannot be kept in {}", path.display());
                }
                Ok(Typed::Line(line.into_bytes()))
            }
            Err(ReadlineError::Interrupted) => Ok(Typed::Interrupted),
            Err(ReadlineError::Eof) => Ok(Typed::End),
            Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::UnexpectedEof => Ok(Typed::End),
            Err(error) => Err(error).context("cannot read from the terminal"),
        }
    }
}

/// The file that lines are kept in, in the folder that XDG names for such things.
fn history_path() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").filter(|path| path.is_absolute());
    let state = state.or_else(|| set("HOME").map(|home| home.join(".local").join("state")))?;
    Some(state.join("flashlm").join("history"))
}

fn keep(editor: &mut Editor<(), FileHistory>, path: &PathBuf) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    Ok(editor.append_history(path)?)
}

/// From now on a signal that ends the process does so with the terminal as it was found: while lines are edited, it is set up
/// for that, and nothing but a key would end the waiting.
fn restore_at_a_signal() {
    let Ok(found) = tcgetattr(stdin()) else { return };
    let watch = move || loop {
        std::thread::sleep(LOOK);
        if let (true, Some(code)) = (ASKING.load(Ordering::SeqCst), signals::asked()) {
            _ = stdout().write_all(b"\x1b[?2004l\n").and_then(|()| stdout().flush());
            _ = tcsetattr(stdin(), OptionalActions::Now, &found);
            std::process::exit(i32::from(code));
        }
    };
    // Without it a signal waits for the next key.
    _ = std::thread::Builder::new().name("signals".into()).spawn(watch);
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
