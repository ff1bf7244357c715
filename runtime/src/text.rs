//! Text to token ids and back.
//!
//! Which special tokens stand around a text is the tokenizer's to say, by its post-processor, as in transformers; `flashlm-prep` has put
//! into the bundle's `tokenizer.json` whatever else the checkpoint says about them. Bundles from before that have the model's
//! `bos` in front of a text. [`Tokenizer::of`] knows which it is; nobody else asks. Decoding is a stream that never splits a
//! character.

use flashlm_formats::bundle::{Bundle, SpecialTokens};
use tokenizers::Tokenizer as HfTokenizer;

use crate::error::{Result, RuntimeError};
use crate::guard::guarded;
use crate::tokenizer_limits;

/// A tokenizer, and what it puts around a text.
pub struct Tokenizer {
    inner: HfTokenizer,
    /// Ids in front of a text.
    first: Vec<u32>,
    /// Ids behind it.
    last: Vec<u32>,
    /// Whether the post-processor puts them there.
    by_template: bool,
}

/// Something about the ids of a prompt that its writer may not have meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PromptNotice {
    /// The text begins with what the tokenizer puts in front.
    #[error(
        "the text begins with {token}, which the tokenizer puts in front of every text: it stands there twice, as in transformers"
    )]
    BeginsTwice {
        /// The token.
        token: String,
    },
    /// The tokenizer ends every text.
    #[error(
        "the tokenizer ends every text with {token}, as in transformers: what follows is written after the end of a text"
    )]
    Ended {
        /// The token.
        token: String,
    },
}

impl Tokenizer {
    /// The tokenizer of `bundle`.
    ///
    /// # Errors
    /// `Tokenizer`, with what is wrong with it.
    pub fn of(bundle: &Bundle) -> Result<Self> {
        let mut tokenizer = Self::from_json(bundle.tokenizer())?;
        if bundle.manifest().special_tokens == SpecialTokens::Architecture {
            tokenizer.first = bundle.spec().bos.into_iter().collect();
            tokenizer.last.clear();
            tokenizer.by_template = false;
        }
        Ok(tokenizer)
    }

    /// Reads a `tokenizer.json` that says itself what stands around a text.
    ///
    /// # Errors
    /// `Tokenizer`, with what is wrong with it.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let wrong = |reason: String| RuntimeError::Tokenizer(reason);
        tokenizer_limits::check(json).map_err(wrong)?;
        let read = guarded(|| HfTokenizer::from_bytes(json)).map_err(wrong)?;
        let mut inner = read.map_err(|e| wrong(e.to_string()))?;
        // How batches were cut and filled up for training is nothing to a prompt; transformers ignores it there, too.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
        let mut tokenizer = Self { inner, first: Vec::new(), last: Vec::new(), by_template: true };
        (tokenizer.first, tokenizer.last) = tokenizer.around()?;
        Ok(tokenizer)
    }

    /// What the post-processor puts around a text, seen on one.
    fn around(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let wrong = |reason: String| RuntimeError::Tokenizer(reason);
        for text in ["a", "0", " a", "."] {
            let encoding = guarded(|| self.inner.encode_fast(text, true)).map_err(wrong)?;
            let encoding = encoding.map_err(|e| wrong(e.to_string()))?;
            let is_added = |at: &usize| encoding.get_special_tokens_mask()[*at] == 1;
            let ids = encoding.get_ids();
            let first = (0..ids.len()).take_while(is_added).count();
            // A text of which the vocabulary knows nothing leaves no trace between the two.
            if first < ids.len() {
                let last = (0..ids.len()).rev().take_while(is_added).count();
                return Ok((ids[..first].to_vec(), ids[ids.len() - last..].to_vec()));
            }
        }
        Ok((Vec::new(), Vec::new()))
    }

    /// The id of a token by its text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The highest id of all tokens.
    pub fn highest_id(&self) -> Option<u32> {
        self.inner.get_vocab(true).into_values().max()
    }

    /// Token ids of `text` with all that the tokenizer puts around a text: what `flashlm run` takes for a prompt, and what
    /// transformers' `tokenizer(text)` gives. Special tokens written out in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if self.by_template {
            return self.ids(text, true);
        }
        Ok([self.first.clone(), self.ids(text, false)?, self.last.clone()].concat())
    }

    /// Token ids of `text` alone: of what goes on a text, or is a piece of one.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let wrong = |reason: String| RuntimeError::Tokenizer(reason);
        let encoding = guarded(|| self.inner.encode_fast(text, special)).map_err(wrong)?;
        let encoding = encoding.map_err(|e| wrong(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids that stand in front of every text; none in many tokenizers.
    pub fn first_ids(&self) -> &[u32] {
        &self.first
    }

    /// What the writer of a prompt should be told about `ids`, which [`encode`](Self::encode) made of it.
    pub fn notices(&self, ids: &[u32]) -> Vec<PromptNotice> {
        let name = |id: u32| self.inner.id_to_token(id).unwrap_or_else(|| id.to_string());
        let mut notices = Vec::new();
        if let (Some(&first), Some(rest)) = (self.first.last(), ids.strip_prefix(self.first.as_slice()))
            && rest.first() == Some(&first)
        {
            notices.push(PromptNotice::BeginsTwice { token: name(first) });
        }
        if let Some(&last) = self.last.last() {
            notices.push(PromptNotice::Ended { token: name(last) });
        }
        notices
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

    fn template(single: &str) -> String {
        let special = r#"{"b":{"id":"b","ids":[1],"tokens":["b"]},"c":{"id":"c","ids":[2],"tokens":["c"]}}"#;
        words(&format!(
            r#""post_processor":{{"type":"TemplateProcessing","single":[{single}],"pair":[{{"Sequence":{{"id":"A","type_id":0}}}},
            {{"Sequence":{{"id":"B","type_id":1}}}}],"special_tokens":{special}}},"#
        ))
    }

    #[test]
    fn the_template_says_what_stands_around_a_text() {
        let special = |id: &str| format!(r#"{{"SpecialToken":{{"id":"{id}","type_id":0}}}}"#);
        let a = r#"{"Sequence":{"id":"A","type_id":0}}"#;
        let of = |pieces: &[&str]| Tokenizer::from_json(template(&pieces.join(",")).as_bytes()).unwrap();
        let (b, c) = (special("b"), special("c"));

        let bare = of(&[a]);
        assert_eq!((bare.first_ids(), bare.encode("a b").unwrap()), (&[][..], vec![0, 1]));
        let begun = of(&[&b, a]);
        assert_eq!((begun.first_ids(), begun.encode("a").unwrap()), (&[1][..], vec![1, 0]));
        assert_eq!((begun.encode("").unwrap(), begun.encode_bare("a").unwrap()), (vec![1], vec![0]));
        assert_eq!(begun.notices(&begun.encode("a b").unwrap()), []);
        let twice = begun.notices(&begun.encode("b a").unwrap());
        assert_eq!(twice, [PromptNotice::BeginsTwice { token: "b".into() }]);
        let both = of(&[&b, &b, a, &c]);
        assert_eq!((both.first_ids(), both.encode("b").unwrap()), (&[1, 1][..], vec![1, 1, 1, 2]));
        assert_eq!(both.notices(&[1, 1, 0, 2]), [PromptNotice::Ended { token: "c".into() }]);
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
        let encoded = Tokenizer::from_json(none.as_bytes()).and_then(|tokenizer| tokenizer.encode("a b"));
        assert!(matches!(encoded, Err(RuntimeError::Tokenizer(_))));
    }

    #[test]
    fn held_text_comes_at_the_end() {
        let mut stop = StopStrings::new(vec!["éé".into()]);
        assert_eq!(stop.push("aé"), ("a".into(), false));
        assert_eq!(stop.finish(), "é");
    }
}
