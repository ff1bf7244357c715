//! What a terminal gets to see: the one place that decides it.
//!
//! Names in files, vocabularies and what a model writes may hold anything; a terminal obeys some of it. To a terminal such characters
//! go written out, to files and pipes as they are.

use std::borrow::Cow;
use std::io::IsTerminal;

/// Text of several lines with what a terminal would obey written out; lines and tabs stay. It looks at one character at a time,
/// so text that comes in parts may be handed over part by part.
pub fn printable(text: &str) -> String {
    written_out(text, |character| character.is_control() && !matches!(character, '\n' | '\t'))
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
        if obeyed(character) { out.extend(character.escape_default()) } else { out.push(character) }
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
        assert_eq!(printable("a\u{1b}]0;x\u{7}\u{9b}2J\u{7f}\r\té\n"), "a\\u{1b}]0;x\\u{7}\\u{9b}2J\\u{7f}\\r\té\n");
        assert_eq!(printable_line("two\nlines\t\u{202e}"), "two\\nlines\\t\\u{202e}");
    }

    #[test]
    fn a_file_gets_the_text_as_it_is() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(text_for(&file, "a\u{1b}[2J"), "a\u{1b}[2J");
    }
}
