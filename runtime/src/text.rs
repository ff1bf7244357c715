//! Text to token ids and back.
//!
//! Ids are made without special tokens of the tokenizer's own; the token that begins a sequence comes from the model's
//! architecture. Decoding is a stream that never splits a character.

use tokenizers::Tokenizer as HfTokenizer;

use crate::error::{Result, RuntimeError};

/// The bundle's tokenizer.
pub struct Tokenizer {
    inner: HfTokenizer,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let inner = HfTokenizer::from_bytes(json).map_err(|e| RuntimeError::Tokenizer(e.to_string()))?;
        Ok(Self { inner })
    }

    /// Token ids of `text`; special tokens written out in it are recognised, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| RuntimeError::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A decoder of one stream of ids.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: &self.inner, ids: Vec::new(), prefix: String::new(), prefix_index: 0 }
    }
}

/// Gives text as soon as whole characters are known.
pub struct TextStream<'a> {
    tokenizer: &'a HfTokenizer,
    ids: Vec<u32>,
    prefix: String,
    prefix_index: usize,
}

impl TextStream<'_> {
    /// The text that `id` completes; empty while a character is still open.
    pub fn push(&mut self, id: u32) -> String {
        // A stream that cannot continue (an id unknown to the tokenizer, as in padded vocabularies) yields no text for it.
        let step = tokenizers::tokenizer::step_decode_stream(
            self.tokenizer,
            vec![id],
            true,
            &mut self.ids,
            &mut self.prefix,
            &mut self.prefix_index,
        );
        step.ok().flatten().unwrap_or_default()
    }

    /// What is left when the stream ends: the text of an unfinished character, as the replacement character.
    pub fn finish(self) -> String {
        let text = self.tokenizer.decode(&self.ids, true).unwrap_or_default();
        text.strip_prefix(&self.prefix).unwrap_or_default().to_owned()
    }
}

/// Holds back text that may be the beginning of a stop string.
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Watches for any of `stops`; empty ones are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Adds text. Returns what can be shown now, and whether a stop string was reached (it is not shown).
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(at);
            return (shown, true);
        }
        let open = (0..self.held.len())
            .filter(|i| self.held.is_char_boundary(*i))
            .find(|i| self.stops.iter().any(|s| s.starts_with(&self.held[*i..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(open);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back when the text ends without a stop string.
    pub fn finish(mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_before_a_stop_string_is_shown_and_the_stop_is_not() {
        let mut stop = StopStrings::new(vec!["END".into(), "\n\n".into()]);
        assert_eq!(stop.push("one E"), ("one ".into(), false));
        assert_eq!(stop.push("N"), (String::new(), false));
        assert_eq!(stop.push("E"), ("EN".into(), false));
        assert_eq!(stop.push("ND two"), (String::new(), true));
    }

    #[test]
    fn held_text_comes_at_the_end() {
        let mut stop = StopStrings::new(vec!["éé".into()]);
        assert_eq!(stop.push("aé"), ("a".into(), false));
        assert_eq!(stop.finish(), "é");
    }
}
