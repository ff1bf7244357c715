//! Lines from a terminal: edited, remembered, and pasted whole.

use std::io::{ErrorKind, IsTerminal, Write, stdin, stdout};
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

use super::typed::Typed;

/// Lines that are remembered.
const HISTORY_LINES: usize = 1000;
/// How often a signal is looked for while somebody types.
const LOOK: Duration = Duration::from_millis(50);

/// Whether somebody is being asked for a line, with the terminal set up for that.
static ASKING: AtomicBool = AtomicBool::new(false);

/// Lines that are edited.
pub(super) struct EditedLines {
    editor: Editor<(), FileHistory>,
    history: Option<PathBuf>,
}

impl EditedLines {
    /// Lines of the terminal that is standard input. With `history`, they are kept in the user's file.
    pub(super) fn open(history: bool) -> Result<Self> {
        let mut config = Config::builder().max_history_size(HISTORY_LINES)?.history_ignore_space(true);
        config = config.auto_add_history(true).bell_style(BellStyle::None);
        if !stdout().is_terminal() {
            // What the model says goes elsewhere, and what is typed does not.
            config = config.behavior(Behavior::PreferTerm);
        }
        let config = config.build();
        let editor = Editor::with_history(config.clone(), FileHistory::with_config(&config));
        let mut editor = editor.context("cannot use the terminal")?;
        let history = if history { history_path() } else { None };
        if let Some(path) = &history {
            // The first time there is none.
            _ = editor.load_history(path);
        }
        restore_at_a_signal();
        Ok(Self { editor, history })
    }

    /// Asks for a line.
    pub(super) fn read(&mut self, prompt: &str) -> Result<Typed> {
        let Self { editor, history } = self;
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
