//! Text to token ids and back.
//!
//! Which special tokens surround a text is the tokenizer's to say, by its post-processor, as in transformers; `flashlm-prep` has put
//! into the bundle's `tokenizer.json` whatever else the checkpoint says about them. Bundles from before that have the model's
//! `bos` in front of a text. [`Tokenizer::of`] knows which it is; nobody else asks. Decoding is a stream that never splits a
//! character.

mod bounded;
mod bytes;
mod marked;
mod matcher;
mod stages;
mod stop;
mod stream;

use flashlm_formats::bundle::{Bundle, SpecialTokens};
use tokenizers::Tokenizer as HfTokenizer;

use crate::error::{Result, RuntimeError};
use crate::guard::guarded;
use crate::tokenizer_limits;
pub use crate::tokenizer_limits::ADDED_BYTES_MAX;

pub use bounded::ReadTextError;
pub use stop::StopStrings;
pub use stream::TextStream;

/// A tokenizer, and what it puts around a text.
pub struct Tokenizer {
    inner: HfTokenizer,
    /// Ids in front of a text.
    first: Vec<u32>,
    /// Ids after it.
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
        "the text begins with {token}, which the tokenizer also puts in front of every text: it occurs twice, as in transformers"
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

    /// Holds a `tokenizer.json` against the limits of what is followed, without making a tokenizer of it.
    ///
    /// # Errors
    /// `Tokenizer`, with what goes beyond them.
    pub fn check_limits(json: &[u8]) -> Result<()> {
        tokenizer_limits::check(json).map_err(RuntimeError::Tokenizer)
    }

    /// Reads a `tokenizer.json` that says itself what surrounds a text.
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

    /// The first id that stands for another token here than in `other`, with both tokens; `None` if all ids mean the same.
    pub fn first_difference(&self, other: &Self) -> Option<(u32, Option<String>, Option<String>)> {
        let ids = self.inner.get_vocab_size(true).max(other.inner.get_vocab_size(true)) as u32;
        let tokens = |id| (id, self.inner.id_to_token(id), other.inner.id_to_token(id));
        (0..ids).map(tokens).find(|(_, ours, theirs)| ours != theirs)
    }

    /// The id of a token by its text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, as the vocabulary writes it.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a special token, which has no text of its own, by how it is written.
    pub fn special_id(&self, token: &str) -> Option<u32> {
        self.inner.get_added_vocabulary().is_special_token(token).then(|| self.id_of(token)).flatten()
    }

    /// The special tokens that are written somewhere in `text`.
    pub fn specials_in(&self, text: &str) -> Vec<String> {
        let specials = self.inner.get_added_tokens_decoder().into_values().filter(|token| token.special);
        let mut found: Vec<_> = specials.map(|token| token.content).filter(|token| text.contains(&**token)).collect();
        found.sort();
        found
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

    /// The ids that precede every text; none in many tokenizers.
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

    /// What `ids` decode to, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream(&[]);
        let text: String = ids.iter().map(|id| stream.push(*id)).collect();
        text + &stream.finish()
    }

    /// A decoder of the ids that follow those of `prompt`.
    pub fn stream(&self, prompt: &[u32]) -> TextStream<'_> {
        let mut stream = TextStream::new(&self.inner);
        stream.prompt(prompt);
        stream
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
