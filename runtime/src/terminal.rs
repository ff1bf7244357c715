//! What is shown on a terminal: the one place that decides it.
//!
//! Names in files, vocabularies and what a model writes may hold anything; a terminal obeys some of it. To a terminal such characters
//! go written out, to files and pipes as they are. Messages have them written out wherever they go, for a log is shown, too.
//!
//! They are written as `\u001b`, which in the strings of a JSON text means the same character again.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

/// Text of several lines with what a terminal would obey written out; lines and tabs stay. It looks at one character at a time,
/// so text that comes in parts may be handed over part by part.
pub fn printable(text: &str) -> String {
    written_out(text, is_obeyed)
}

fn is_obeyed(character: char) -> bool {
    character.is_control() && !matches!(character, '\n' | '\t')
}

/// A writer to which text goes as [`printable`].
pub struct Printable<W>(pub W);

impl<W: Write> Write for Printable<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Whoever formats text hands over whole characters; what is none is not shown as it is.
        let text = String::from_utf8_lossy(bytes);
        match text.contains(is_obeyed) {
            true => self.0.write_all(printable(&text).as_bytes())?,
            false => self.0.write_all(text.as_bytes())?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A single value, such as a name, as a part of one line: line ends, tabs and what turns the direction of writing are written
/// out, too.
pub fn printable_line(text: &str) -> String {
    let turns = |c| matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    written_out(text, |character| character.is_control() || turns(character))
}

/// `text` for `output`: [`printable`] on a terminal, unchanged elsewhere.
pub fn text_for<'a>(output: &impl IsTerminal, text: &'a str) -> Cow<'a, str> {
    if output.is_terminal() { Cow::Owned(printable(text)) } else { Cow::Borrowed(text) }
}

fn written_out(text: &str, obeyed: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' if obeyed('\n') => out.push_str("\\n"),
            '\t' if obeyed('\t') => out.push_str("\\t"),
            '\r' if obeyed('\r') => out.push_str("\\r"),
            _ if obeyed(character) => _ = write!(out, "\\u{:04x}", u32::from(character)),
            _ => out.push(character),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_gets_through() {
        let all: String = (0..=0x10_ffff).filter_map(char::from_u32).collect();
        let shown = printable(&all);
        assert!(shown.chars().all(|c| c == '\n' || c == '\t' || !c.is_control()));
        assert!(!printable_line(&all).chars().any(|c| c.is_control() || "\u{202e}\u{2066}\u{2028}".contains(c)));
        assert_eq!(printable("a\u{1b}]0;x\u{7}\u{9b}2J\u{7f}\r\té\n"), "a\\u001b]0;x\\u0007\\u009b2J\\u007f\\r\té\n");
        assert_eq!(printable_line("two\nlines\t\u{202e}"), "two\\nlines\\t\\u202e");
    }

    #[test]
    fn json_means_the_same_when_it_is_printable() {
        let all: String = (0..0x300).filter_map(char::from_u32).collect();
        let mut shown = Vec::new();
        serde_json::to_writer_pretty(Printable(&mut shown), &[&all]).unwrap();
        assert!(!std::str::from_utf8(&shown).unwrap().contains(is_obeyed));
        assert_eq!(serde_json::from_slice::<Vec<String>>(&shown).unwrap(), [all]);
    }

    #[test]
    fn a_file_gets_the_text_as_it_is() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(text_for(&file, "a\u{1b}[2J"), "a\u{1b}[2J");
    }
}
