//! Text to token ids and back.
//!
//! Ids are made without special tokens of the tokenizer's own; the token that begins a sequence comes from the model's
//! architecture. Decoding is a stream that never splits a character.

use tokenizers::Tokenizer as HfTokenizer;

use crate::error::{Result, RuntimeError};
use crate::guard::guarded;
use crate::tokenizer_limits;

/// The bundle's tokenizer.
pub struct Tokenizer {
    inner: HfTokenizer,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let wrong = |reason: String| RuntimeError::Tokenizer(reason);
        tokenizer_limits::check(json).map_err(wrong)?;
        let read = guarded(|| HfTokenizer::from_bytes(json)).map_err(wrong)?;
        let mut inner = read.map_err(|e| wrong(e.to_string()))?;
        // How batches were cut and filled up for training is nothing to a prompt; transformers ignores it there, too.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
        Ok(Self { inner })
    }

    /// The id of a token by its text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The highest id of all tokens.
    pub fn highest_id(&self) -> Option<u32> {
        self.inner.get_vocab(true).into_values().max()
    }

    /// Token ids of `text`; special tokens written out in it are recognised, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let wrong = |reason: String| RuntimeError::Tokenizer(reason);
        let encoding = guarded(|| self.inner.encode_fast(text, false)).map_err(wrong)?;
        let encoding = encoding.map_err(|e| wrong(e.to_string()))?;
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
        let step = guarded(|| {
            tokenizers::tokenizer::step_decode_stream(
                self.tokenizer,
                vec![id],
                true,
                &mut self.ids,
                &mut self.prefix,
                &mut self.prefix_index,
            )
        });
        step.ok().and_then(|step| step.ok().flatten()).unwrap_or_default()
    }

    /// What is left when the stream ends: the text of an unfinished character, as the replacement character.
    pub fn finish(self) -> String {
        let text = guarded(|| self.tokenizer.decode(&self.ids, true).unwrap_or_default()).unwrap_or_default();
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

    fn words(more: &str) -> String {
        format!(
            r#"{{"version":"1.0","pre_tokenizer":{{"type":"WhitespaceSplit"}},{more}"model":{{"type":"WordLevel",
            "vocab":{{"a":0,"b":1,"c":2}},"unk_token":"a"}}}}"#
        )
    }

    #[test]
    fn prompts_are_neither_cut_nor_filled_up() {
        let plain = Tokenizer::from_json(words("").as_bytes()).unwrap().encode("a b c b").unwrap();
        assert_eq!(plain, [0, 1, 2, 1]);
        for more in [
            r#""truncation":{"max_length":1,"stride":0,"strategy":"LongestFirst","direction":"Right"},"#,
            r#""truncation":{"max_length":1,"stride":5,"strategy":"LongestFirst","direction":"Right"},"#,
            r#""padding":{"strategy":{"Fixed":1000000000000},"direction":"Left","pad_to_multiple_of":null,"pad_id":0,"pad_type_id":0,"pad_token":"a"},"#,
        ] {
            let tokenizer = Tokenizer::from_json(words(more).as_bytes()).unwrap();
            assert_eq!(tokenizer.encode("a b c b").unwrap(), plain, "{more}");
        }
    }

    #[test]
    fn what_the_library_panics_at_is_an_error() {
        // While it reads:
        for broken in [
            "{\"decoder\":{\"type\":\"By\u{1}teLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}",
            r###"{"model":{"type":"BPE","continuing_subword_prefix":"##é","vocab":{"w":0,"5":1,"w5":2},"merges":["w 5"]}}"###,
            r#"{"normalizer":{"type":"Precompiled","precompiled_charsmap":""},"model":{"type":"BPE","vocab":{},"merges":[]}}"#,
        ] {
            assert!(matches!(Tokenizer::from_json(broken.as_bytes()), Err(RuntimeError::Tokenizer(_))), "{broken}");
        }
        // And while it works:
        let none = words("").replace(r#"{"type":"WhitespaceSplit"}"#, r#"{"type":"FixedLength","length":0}"#);
        let tokenizer = Tokenizer::from_json(none.as_bytes()).unwrap();
        assert!(matches!(tokenizer.encode("a b"), Err(RuntimeError::Tokenizer(_))));
    }

    #[test]
    fn held_text_comes_at_the_end() {
        let mut stop = StopStrings::new(vec!["éé".into()]);
        assert_eq!(stop.push("aé"), ("a".into(), false));
        assert_eq!(stop.finish(), "é");
    }
}
