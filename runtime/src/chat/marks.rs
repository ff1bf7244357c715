//! Marks in what people typed: where it spells a token that only the template may say.
//!
//! Such a token is one that is special, or that the template itself writes, as transformers has it. A mark is a character that no
//! text may hold (Unicode has 32 in a row for such purposes); it goes behind the first character of what was spelled, so that nothing
//! is found there, and is taken out again once special tokens were found.

use std::collections::HashSet;

use minijinja::value::{Value, ValueKind};

use crate::error::{Result, RuntimeError};
use crate::text::Tokenizer;

/// Characters that a mark may be.
const MARKS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';
/// Deepest nesting of what a template is given.
const DEPTH_MAX: usize = 64;

/// Finds what must be marked.
pub(super) struct Marks {
    /// Tokens that nobody but the template may say.
    tokens: HashSet<u32>,
    /// Marks that the template itself writes.
    taken: HashSet<char>,
}

/// What a template is given, with marks.
pub(super) struct Marked {
    pub(super) value: Value,
    /// The mark; none where none was needed.
    pub(super) mark: Option<char>,
    /// Bytes of all texts.
    pub(super) bytes: usize,
}

impl Marks {
    pub(super) fn new(template: &str, tokenizer: &Tokenizer) -> Self {
        Self {
            tokens: tokenizer.control_tokens(template),
            taken: template.chars().filter(|character| MARKS.contains(character)).collect(),
        }
    }

    pub(super) fn marked(&self, value: &Value, tokenizer: &Tokenizer) -> Result<Marked> {
        let mut taken = self.taken.clone();
        let mut bytes = 0;
        walk(value, 0, &mut |text| {
            bytes += text.len();
            taken.extend(text.chars().filter(|character| MARKS.contains(character)));
            Ok(None)
        })?;
        let mark = MARKS.into_iter().find(|mark| !taken.contains(mark));
        let mark = mark.ok_or_else(|| {
            RuntimeError::Chat("it holds every character that no text may hold (U+FDD0 to U+FDEF)".into())
        })?;
        let mut is_used = false;
        let value = walk(value, 0, &mut |text| {
            let marked = tokenizer.marked(text, mark, &self.tokens)?;
            is_used |= marked.is_some();
            Ok(marked)
        })?;
        Ok(Marked { value, mark: is_used.then_some(mark), bytes })
    }
}

/// `value` with texts replaced as `each` says; it is also told the keys of dictionaries, which stay.
fn walk(value: &Value, depth: usize, each: &mut dyn FnMut(&str) -> Result<Option<String>>) -> Result<Value> {
    let wrong = |error: minijinja::Error| RuntimeError::Chat(error.to_string());
    if depth > DEPTH_MAX {
        return Err(RuntimeError::Chat("a message is nested too deeply".into()));
    }
    Ok(match value.kind() {
        ValueKind::String => each(value.as_str().unwrap_or_default())?.map_or_else(|| value.clone(), Value::from),
        ValueKind::Seq => {
            let items = value.try_iter().map_err(wrong)?.map(|item| walk(&item, depth + 1, each));
            Value::from(items.collect::<Result<Vec<_>>>()?)
        }
        ValueKind::Map => {
            let mut pairs = Vec::new();
            for key in value.try_iter().map_err(wrong)? {
                let item = walk(&value.get_item(&key).map_err(wrong)?, depth + 1, each)?;
                pairs.push((key, item));
            }
            Value::from_pairs(pairs)
        }
        _ => value.clone(),
    })
}
