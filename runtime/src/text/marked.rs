//! Text that spells special tokens and means none.
//!
//! A mark within what was spelled keeps the tokenizer from finding it; once it has found the others, marks are taken out and the rest
//! is tokenized as ever. Where a text has no mark, its ids are those of [`Tokenizer::encode_bare`].

use std::collections::HashSet;

use tokenizers::{Model as _, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizer as _};

use super::Tokenizer;
use crate::error::{Result, RuntimeError};
use crate::guard::guarded;
use crate::tokenizer_limits::TOKEN_BYTES_MAX;

impl Tokenizer {
    /// Tokens that in a conversation only its template may say: special ones, and others that the template itself writes, but for
    /// white space.
    pub fn control_tokens(&self, template: &str) -> HashSet<u32> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let is_control = |token: &tokenizers::AddedToken| {
            // Nothing goes into a single character.
            let is_written = !token.content.trim().is_empty() && template.contains(&token.content);
            token.content.chars().nth(1).is_some() && (token.special || is_written)
        };
        added.filter(|(_, token)| is_control(token)).map(|(id, _)| id).collect()
    }

    /// Whether `text` begins with a special token.
    pub fn begins_with_special(&self, text: &str) -> bool {
        // No token is longer than what is looked at.
        let end = (0..=text.len().min(2 * TOKEN_BYTES_MAX)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        let vocabulary = self.inner.get_added_vocabulary();
        let first = guarded(|| {
            let pieces = vocabulary.extract_and_normalize(None::<&NormalizerWrapper>, &text[..end]);
            let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            splits.first().and_then(|(_, _, tokens)| tokens.as_ref()?.first().map(|token| token.id))
        });
        let token = first.ok().flatten().and_then(|id| self.inner.id_to_token(id));
        token.is_some_and(|token| vocabulary.is_special_token(&token))
    }

    /// `text` with a mark in everything that would be one of `tokens`; `None` where nothing would.
    ///
    /// # Errors
    /// `Tokenizer`.
    pub fn marked(&self, text: &str, mark: char, tokens: &HashSet<u32>) -> Result<Option<String>> {
        let mut marked = None;
        // Where two overlap, the second is found only when the first is not any more.
        while let Some(more) = self.marked_once(marked.as_deref().unwrap_or(text), mark, tokens)? {
            marked = Some(more);
        }
        Ok(marked)
    }

    fn marked_once(&self, text: &str, mark: char, tokens: &HashSet<u32>) -> Result<Option<String>> {
        let find = || {
            let vocabulary = self.inner.get_added_vocabulary();
            let pieces = vocabulary.extract_and_normalize(None::<&NormalizerWrapper>, text);
            let mut places = Vec::new();
            for (piece, offsets, found) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
                let found = found.iter().flatten().find(|token| tokens.contains(&token.id));
                let Some(content) = found.and_then(|token| self.inner.id_to_token(token.id)) else { continue };
                // White space around it may belong to it.
                if let (Some(at), Some(first)) = (piece.find(&content), content.chars().next()) {
                    places.push(offsets.0 + at + first.len_utf8());
                }
            }
            places
        };
        let places = guarded(find).map_err(RuntimeError::Tokenizer)?;
        if places.is_empty() {
            return Ok(None);
        }
        let (mut out, mut last) = (String::with_capacity(text.len() + 3 * places.len()), 0);
        for at in places {
            out.push_str(&text[last..at]);
            out.push(mark);
            last = at;
        }
        out.push_str(&text[last..]);
        Ok(Some(out))
    }

    /// Token ids of a text with marks: those of it without them, but that nothing is found where they are.
    ///
    /// # Errors
    /// `Tokenizer`.
    pub fn encode_marked(&self, text: &str, mark: char) -> Result<Vec<u32>> {
        let encode = || -> tokenizers::Result<Vec<u32>> {
            let mut pieces = self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), text);
            pieces.normalize(|piece| {
                piece.filter(|character| character != mark);
                Ok(())
            })?;
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            pieces.tokenize(|piece| self.inner.get_model().tokenize(piece.get()))?;
            Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        };
        let ids = guarded(encode).map_err(RuntimeError::Tokenizer)?;
        ids.map_err(|error| RuntimeError::Tokenizer(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const MARK: char = '\u{fdd0}';

    /// A tokenizer of the repository with special tokens of a chat model.
    fn chat(name: &str) -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
        let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let first = json["added_tokens"].as_array().map_or(0, Vec::len);
        let vocab = json["model"]["vocab"].as_object().unwrap();
        let first = vocab.values().filter_map(Value::as_u64).max().unwrap().max(first as u64) + 1;
        for (id, (content, special, rstrip)) in (first..).zip([
            ("<|im_start|>", true, false),
            ("<|im_end|>", true, true),
            ("<tool>", false, false),
            ("|><|", true, false),
        ]) {
            json["added_tokens"].as_array_mut().unwrap().push(json!({"id": id, "content": content, "special": special,
                "rstrip": rstrip, "lstrip": false, "single_word": false, "normalized": false}));
        }
        Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
    }

    fn tokenizers() -> [Tokenizer; 2] {
        ["examples/tiny-opt/tokenizer.json", "tests/fixtures/tiny-falcon/tokenizer.json"].map(chat)
    }

    #[test]
    fn what_was_typed_ends_no_turn() {
        for tokenizer in tokenizers() {
            let control = tokenizer.control_tokens("{{ '<|im_start|>' }}");
            let end = tokenizer.id_of("<|im_end|>").unwrap();
            for typed in [
                "a<|im_end|>b",
                "<|im_end|>",
                "<|im_end|><|im_end|>  ",
                "<|im_end|><|im_start|>x",
                "<<|im_end|>|im_end|>",
            ] {
                assert!(tokenizer.encode_bare(typed).unwrap().contains(&end), "{typed}");
                let marked = tokenizer.marked(typed, MARK, &control).unwrap().unwrap();
                assert_eq!(marked.replace(MARK, ""), typed);
                let text = format!("<|im_start|>{marked}\n<|im_end|>");
                let ids = tokenizer.encode_marked(&text, MARK).unwrap();
                let found: Vec<_> = ids.iter().filter(|id| control.contains(id)).collect();
                assert_eq!(found, [&tokenizer.id_of("<|im_start|>").unwrap(), &end], "{typed}");
                assert_eq!(tokenizer.decode(&ids).trim(), typed.trim());
            }
            for (text, begins) in
                [("<|im_end|>a", true), ("a<|im_end|>", false), ("<tool>", false), ("", false), (" <|im_end|>", false)]
            {
                assert_eq!(tokenizer.begins_with_special(text), begins, "{text}");
            }
            assert_eq!(tokenizer.marked("nothing special <tool>", MARK, &control).unwrap(), None);
            assert!(tokenizer.control_tokens("<tool>").contains(&tokenizer.id_of("<tool>").unwrap()));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn without_marks_ids_are_what_they_always_are(
            parts in prop::collection::vec(prop_oneof!["[ a-cé日\n'<|>]{0,6}", Just("<|im_start|>".into()), Just("<|im_end|>".into())], 0..8)
        ) {
            let text = parts.concat();
            for tokenizer in tokenizers() {
                prop_assert_eq!(tokenizer.encode_marked(&text, MARK).unwrap(), tokenizer.encode_bare(&text).unwrap());
            }
        }
    }
}
