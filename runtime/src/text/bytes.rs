//! Bytes that come one after another, as text.

use std::iter::repeat_n;

/// How many replacement characters stand for bytes that are no character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// One for the longest beginning of a character, as `String::from_utf8_lossy` and byte-level tokenizers have it.
    LongestParts,
    /// One for each byte, as sentencepiece has it.
    EachByte,
}

/// Gives characters as soon as they are whole, and replacement characters for what can become none.
#[derive(Clone, Debug)]
pub(super) struct Bytes {
    wrong: Wrong,
    /// The beginning of a character: three bytes at most.
    open: Vec<u8>,
}

impl Bytes {
    pub(super) fn new(wrong: Wrong) -> Self {
        Self { wrong, open: Vec::new() }
    }

    /// Adds bytes; the text that they complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.open);
        all.extend_from_slice(bytes);
        let mut text = String::with_capacity(all.len());
        let mut left = all.len();
        for chunk in all.utf8_chunks() {
            text += chunk.valid();
            let invalid = chunk.invalid();
            left -= chunk.valid().len() + invalid.len();
            let open = left == 0 && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if open { self.open = invalid.to_vec() } else { self.replace(invalid.len(), &mut text) }
        }
        text
    }

    /// There is no further byte: what an open character comes to.
    pub(super) fn end(&mut self) -> String {
        let mut text = String::new();
        let open = std::mem::take(&mut self.open).len();
        self.replace(open, &mut text);
        text
    }

    fn replace(&self, bytes: usize, text: &mut String) {
        let marks = if self.wrong == Wrong::EachByte { bytes } else { bytes.min(1) };
        text.extend(repeat_n(char::REPLACEMENT_CHARACTER, marks));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All strings of up to five bytes of kinds that differ.
    #[test]
    fn however_bytes_are_cut_the_text_is_the_same() {
        let kinds = [b'a', 0x80, 0x9f, 0xa0, 0xbf, 0xc2, 0xe0, 0xed, 0xf0, 0xf4, 0xff];
        let mut number = 0;
        while number < kinds.len().pow(5) {
            let mut rest = number;
            let bytes: Vec<u8> = (0..5).map(|_| (kinds[rest % kinds.len()], rest /= kinds.len()).0).collect();
            for (wrong, whole) in [
                (Wrong::LongestParts, String::from_utf8_lossy(&bytes).into_owned()),
                (Wrong::EachByte, each_byte(&bytes)),
            ] {
                let mut one_by_one = Bytes::new(wrong);
                let mut shown = String::new();
                for byte in &bytes {
                    shown += &one_by_one.push(&[*byte]);
                    assert!(whole.starts_with(&shown) && one_by_one.open.len() <= 3);
                }
                assert_eq!(shown + &one_by_one.end(), whole, "{bytes:x?}");
                let mut at_once = Bytes::new(wrong);
                assert_eq!(at_once.push(&bytes) + &at_once.end(), whole, "{bytes:x?}");
            }
            number += 7; // a part of them, of all kinds
        }
    }

    /// What sentencepiece does: a character where there is one, else a mark for a byte.
    fn each_byte(bytes: &[u8]) -> String {
        let (mut text, mut at) = (String::new(), 0);
        while at < bytes.len() {
            let character = (1..=4).find_map(|n| std::str::from_utf8(bytes.get(at..at + n)?).ok());
            text += character.unwrap_or("\u{fffd}");
            at += character.map_or(1, str::len);
        }
        text
    }
}
