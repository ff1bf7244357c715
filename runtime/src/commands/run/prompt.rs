//! Where the prompt comes from, and how much of it can be used.

use std::fs::File;
use std::io::{IsTerminal, Read, stdin};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use flashlm::error::hints;
use flashlm::text::{ReadTextError, Tokenizer};

use super::RunArgs;

/// The ids to start from, in a context that holds `room` tokens of a prompt and `max` in all at most; `None` on a terminal without
/// a prompt.
pub(super) fn prompt_ids(args: &RunArgs, tokenizer: &Tokenizer, room: usize, max: usize) -> Result<Option<Vec<u32>>> {
    if let Some(ids) = &args.ids {
        return Ok(Some(ids.clone()));
    }
    // Without --context it would not fit the model's own.
    let context = args.context.unwrap_or(max);
    let advice = || format!("use {}", hints(["a shorter one", "a smaller -n"], context, max));
    let read = |from: &mut dyn Read, what: &str| read(tokenizer, from, room, what, &advice);
    let text = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => read(&mut text.as_bytes(), "the prompt")?,
        (None, Some(path)) if path == Path::new("-") => {
            as_typed(read(&mut stdin().lock(), "the prompt from standard input")?)
        }
        (None, Some(path)) => {
            let what = format!("the prompt from {}", path.display());
            let mut file = File::open(path).with_context(|| format!("cannot read {what}"))?;
            as_typed(read(&mut file, &what)?)
        }
        (None, None) if stdin().is_terminal() && !args.json => return Ok(None),
        (None, None) => {
            bail!("no prompt: give --prompt TEXT, --prompt-file FILE (- for standard input) or --ids 2,713,16")
        }
    };
    let ids = tokenizer.encode(&text)?;
    say_notices(tokenizer, &ids);
    Ok(Some(ids))
}

/// Reads `what`, which is to have no more tokens than there is room for; `advice` says what to do if it has.
pub(super) fn read(
    tokenizer: &Tokenizer,
    mut from: &mut dyn Read,
    room: usize,
    what: &str,
    advice: &dyn Fn() -> String,
) -> Result<String> {
    tokenizer.read(&mut from, room).map_err(|error| match error {
        ReadTextError::Io(error) => anyhow!(error).context(format!("cannot read {what}")),
        error @ ReadTextError::NotUtf8 { .. } => anyhow!("{what} cannot be used: {error}"),
        error @ (ReadTextError::TooLong { .. } | ReadTextError::TooManyBytes { .. }) => {
            anyhow!("{what} is too long: {error}; {}", advice())
        }
        error => anyhow!(error),
    })
}

/// A text as its writer meant it: without the mark that some editors put before it, and the end of the line that `echo` and most
/// editors put after it.
pub(super) fn as_typed(text: String) -> String {
    let begun = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let ended = begun.strip_suffix('\n').map_or(begun, |line| line.strip_suffix('\r').unwrap_or(line));
    ended.to_owned()
}

/// Says what the writer of a prompt may not have meant.
pub(super) fn say_notices(tokenizer: &Tokenizer, ids: &[u32]) {
    for notice in tokenizer.notices(ids) {
        eprintln!("note: {notice}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_end_and_a_mark_are_nobodys_text() {
        for (file, text) in [
            ("once\n", "once"),
            ("once\r\n", "once"),
            ("once\n\n", "once\n"),
            ("once", "once"),
            ("\u{feff}once \n", "once "),
            ("\n\u{feff}", "\n\u{feff}"),
            ("once\r", "once\r"),
            ("", ""),
        ] {
            assert_eq!(as_typed(file.into()), text, "{file:?}");
        }
    }
}
