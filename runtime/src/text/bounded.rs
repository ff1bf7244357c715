//! Reading a text that has to fit: no further than it takes to know that it does not.
//!
//! To make tokens takes a hundred times the memory of the text, so a text of any length must not be tokenized to learn that it is too
//! long. It is read in pieces, whose tokens are counted as they come: cut so, a text has nearly as many as whole.

use std::io::Read;

use super::Tokenizer;
use crate::error::RuntimeError;

/// Bytes that are tokenized at once.
const PIECE_BYTES: usize = 16 << 10;
/// A cut may cost the tokens around it: so many are not counted for each, and one of sixteen of all.
const TOKENS_BY_CUT: usize = 64;
const SIXTEENTHS: usize = 15;
/// Text that may be read whatever the vocabulary: rules may leave next to nothing of it.
const FREE_BYTES: usize = 1 << 20;

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadTextError {
    /// Its source failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// It is no text.
    #[error("it is not UTF-8 text: byte {at} begins no character")]
    NotUtf8 {
        /// Bytes before the first that is none.
        at: usize,
    },
    /// It has too many tokens.
    #[error("it has at least {at_least} tokens, and {most} fit")]
    TooLong {
        /// So many were counted before reading was given up.
        at_least: usize,
        /// So many were allowed.
        most: usize,
    },
    /// It has so many bytes that nothing else matters.
    #[error("it has more than {bytes} bytes, and {most} tokens, which fit, never have that many")]
    TooManyBytes {
        /// So many were read.
        bytes: usize,
        /// So many tokens were allowed.
        most: usize,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] RuntimeError),
}

impl Tokenizer {
    /// Reads a text that is to have `most` tokens at most. One that comes back may still have a few more.
    ///
    /// # Errors
    /// As soon as it is known to have more, or to be no text.
    pub fn read(&self, from: &mut impl Read, most: usize) -> Result<String, ReadTextError> {
        match self.read_until_above(from, most)? {
            (_, Some(at_least)) => Err(ReadTextError::TooLong { at_least, most }),
            (text, None) => Ok(text),
        }
    }

    /// Reads a text, or as much from its beginning as surely has more than `wanted` tokens.
    ///
    /// # Errors
    /// As soon as it is known to be no text, or to have no end and hardly a token.
    pub fn read_beginning(&self, from: &mut impl Read, wanted: usize) -> Result<String, ReadTextError> {
        Ok(self.read_until_above(from, wanted)?.0)
    }

    /// A text, or its beginning as soon as that has more than `most` tokens: then with how many it has at least.
    fn read_until_above(&self, from: &mut impl Read, most: usize) -> Result<(String, Option<usize>), ReadTextError> {
        let mut text = String::new();
        let (mut bytes, mut counted, mut cuts, mut tokens) = (Vec::new(), 0, 0, 0_usize);
        let mut bytes_most = FREE_BYTES;
        loop {
            // Some of the piece may be there: the beginning of a character.
            let missing = PIECE_BYTES - bytes.len();
            let ended = from.by_ref().take(missing as u64).read_to_end(&mut bytes)? < missing;
            let whole = match std::str::from_utf8(&bytes) {
                Ok(whole) => whole.len(),
                Err(open) if open.error_len().is_none() && !ended => open.valid_up_to(),
                Err(wrong) => return Err(ReadTextError::NotUtf8 { at: text.len() + wrong.valid_up_to() }),
            };
            let open = bytes.split_off(whole);
            text += &String::from_utf8_lossy(&bytes);
            bytes = open;
            if ended {
                return Ok((text, None));
            }
            tokens += self.encode_bare(&text[counted..])?.len();
            (counted, cuts) = (text.len(), cuts + 1);
            let at_least = (tokens / 16 * SIXTEENTHS).saturating_sub(cuts * TOKENS_BY_CUT);
            if at_least > most {
                return Ok((text, Some(at_least)));
            }
            if text.len() > bytes_most {
                bytes_most = bytes_most.max(most.saturating_mul(self.longest_token_bytes()));
                if text.len() > bytes_most {
                    return Err(ReadTextError::TooManyBytes { bytes: text.len(), most });
                }
            }
        }
    }

    /// Bytes of the longest token as the vocabulary writes it, where a byte may take two.
    fn longest_token_bytes(&self) -> usize {
        self.inner.get_vocab(true).keys().map(String::len).max().unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> Tokenizer {
        let json = r#"{"normalizer":{"type":"Replace","pattern":{"String":"\u0000"},"content":""},
            "pre_tokenizer":{"type":"WhitespaceSplit"},"model":{"type":"WordLevel","vocab":{"a":0,"bé":1},"unk_token":"a"}}"#;
        Tokenizer::from_json(json.as_bytes()).unwrap()
    }

    #[test]
    fn what_fits_is_read_whole() {
        for text in [String::new(), "bé a".into(), "é".repeat(PIECE_BYTES), "a é日𝄞 ".repeat(PIECE_BYTES / 4)] {
            assert_eq!(words().read(&mut text.as_bytes(), usize::MAX).unwrap(), text);
        }
        let nothing = "\0".repeat(FREE_BYTES);
        assert_eq!(words().read(&mut nothing.as_bytes(), 1).unwrap(), nothing, "rules may leave nothing of it");
    }

    #[test]
    fn what_cannot_fit_is_not_read_to_its_end() {
        let mut endless = std::io::repeat(b'a').chain(std::io::empty());
        assert!(matches!(words().read(&mut endless, 5), Err(ReadTextError::TooManyBytes { most: 5, .. })), "one word");
        let text = "a ".repeat(1 << 20);
        let mut rest = text.as_bytes();
        let Err(ReadTextError::TooLong { at_least, most: 1000 }) = words().read(&mut rest, 1000) else { panic!() };
        assert!(at_least > 1000 && rest.len() > text.len() - 4 * PIECE_BYTES, "{at_least}, {} left", rest.len());
        let tokens = words().encode(&text[..text.len() - rest.len()]).unwrap().len();
        assert!(at_least <= tokens, "never more than there are: {at_least} of {tokens}");
    }

    #[test]
    fn a_beginning_is_read_no_further_than_it_takes() {
        let text = "a ".repeat(1 << 20);
        let mut rest = text.as_bytes();
        let beginning = words().read_beginning(&mut rest, 1000).unwrap();
        assert!(text.starts_with(&beginning) && rest.len() > text.len() - 4 * PIECE_BYTES, "{} left", rest.len());
        assert!(words().encode(&beginning).unwrap().len() > 1000);
        assert_eq!(words().read_beginning(&mut "a bé".as_bytes(), 1000).unwrap(), "a bé", "all of what is shorter");
        let mut endless = std::io::repeat(b'a').chain(std::io::empty());
        assert!(matches!(words().read_beginning(&mut endless, 5), Err(ReadTextError::TooManyBytes { .. })), "one word");
    }

    #[test]
    fn bytes_that_are_no_text_are_told() {
        let long = [b"a".repeat(PIECE_BYTES - 1), "é".into(), vec![0xff], b"a".repeat(PIECE_BYTES)].concat();
        for (bytes, wrong) in [(&b"caf\xe9"[..], 3), (b"caf\xc3", 3), (b"\xff\xfe", 0), (&long, PIECE_BYTES + 1)] {
            let Err(ReadTextError::NotUtf8 { at }) = words().read(&mut &*bytes, usize::MAX) else { panic!() };
            assert_eq!(at, wrong);
        }
    }
}
