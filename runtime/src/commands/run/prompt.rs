//! Where the prompt comes from, and how much of it can be used.

use std::fs::File;
use std::io::{IsTerminal, Read, stdin};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use flashlm::chat::ChatTemplate;
use flashlm::error::hints;
use flashlm::text::{ReadTextError, Tokenizer};

use super::RunArgs;

/// What a run starts from.
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    /// Their text, where they are those of a conversation.
    pub(super) text: Option<String>,
    /// What the user says, likewise.
    pub(super) said: Option<String>,
}

/// Whether there is no prompt, and somebody to talk to.
pub(super) fn is_conversation(args: &RunArgs) -> bool {
    let has_prompt = args.ids.is_some() || args.prompt.is_some() || args.prompt_file.is_some();
    !has_prompt && stdin().is_terminal() && !args.json
}

/// The ids to start from, in a context that holds `room` tokens of a prompt and `max` in all at most; `None` on a terminal without
/// a prompt. With a template, the prompt is the first message of a conversation.
pub(super) fn prompt(
    args: &RunArgs,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    room: usize,
    max: usize,
) -> Result<Option<Prompt>> {
    if let Some(ids) = &args.ids {
        return Ok(Some(Prompt { ids: ids.clone(), text: None, said: None }));
    }
    if is_conversation(args) {
        return Ok(None);
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
        (None, None) => {
            bail!("no prompt: give --prompt TEXT, --prompt-file FILE (- for standard input) or --ids 2,713,16")
        }
    };
    if let Some(template) = template {
        let messages = template.opening(args.system.as_deref(), &text);
        let rendered = template.render(tokenizer, &messages, None, true)?;
        let (ids, written) = (rendered.ids(tokenizer)?, rendered.text().into_owned());
        return Ok(Some(Prompt { ids, text: Some(written), said: Some(text) }));
    }
    let ids = tokenizer.encode(&text)?;
    say_notices(tokenizer, &ids);
    Ok(Some(Prompt { ids, text: None, said: None }))
}

/// Reads `what`, which is to have no more tokens than there is room for; `advice` says what to do if it has.
fn read(
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
