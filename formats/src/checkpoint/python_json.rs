//! JSON as Python writes and reads it: with `NaN`, `Infinity` and `-Infinity`, and what an editor may put in front of it.
//!
//! JSON knows no such numbers, and transformers 5 writes them as `{"__float__": "Infinity"}`: that is what they become here.

use std::borrow::Cow;

/// The key that stands for a number that JSON cannot hold.
pub(crate) const FLOAT_KEY: &str = "__float__";

/// The mark that some editors put in front of UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// What Python writes for numbers that JSON cannot hold.
const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Parse.
///
/// # Errors
/// What is wrong, with line and column, and what helps: only a file that ends too early can be one that was not fetched whole.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    let json = json.strip_prefix(BYTE_ORDER_MARK).unwrap_or(json);
    serde_json::from_slice(json).or_else(|_| serde_json::from_slice(&standard(json))).map_err(|error| explain(&error))
}

/// The same text, of which a reader that knows JSON alone can make something.
///
/// # Errors
/// As of [`parse`].
pub(crate) fn standardised(json: Vec<u8>) -> Result<Vec<u8>, String> {
    let is_well_formed = |json: &[u8]| serde_json::from_slice::<serde::de::IgnoredAny>(json).map(|_| ());
    if is_well_formed(&json).is_ok() {
        return Ok(json);
    }
    let bare = json.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&json);
    let standard = standard(bare).into_owned();
    is_well_formed(&standard).map(|()| standard).map_err(|error| explain(&error))
}

/// An error of a JSON reader with the way out.
fn explain(error: &serde_json::Error) -> String {
    match error.classify() {
        serde_json::error::Category::Eof => format!("{error}: it is incomplete. Download it again"),
        _ => format!("{error}. Fix it there, or get the original again if it was never edited"),
    }
}

/// The same text with Python's numbers written as JSON can hold them.
fn standard(json: &[u8]) -> Cow<'_, [u8]> {
    let mut out = Vec::new();
    let (mut copied, mut at) = (0, 0);
    while at < json.len() {
        if json[at] == b'"' {
            at = end_of_string(json, at + 1);
            continue;
        }
        match WORDS.iter().find(|word| json[at..].starts_with(word.as_bytes())) {
            Some(word) => {
                out.extend_from_slice(&json[copied..at]);
                out.extend_from_slice(format!("{{\"{FLOAT_KEY}\":\"{word}\"}}").as_bytes());
                at += word.len();
                copied = at;
            }
            None => at += 1,
        }
    }
    if copied == 0 {
        return Cow::Borrowed(json);
    }
    out.extend_from_slice(&json[copied..]);
    Cow::Owned(out)
}

/// The position after the quote that ends the string whose text begins at `at`.
fn end_of_string(json: &[u8], mut at: usize) -> usize {
    while at < json.len() {
        match json[at] {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    json.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn numbers_of_python_become_what_transformers_writes_for_them() {
        let text = "\u{feff}{\"a\": Infinity, \"b\": [-Infinity, NaN, -1], \"Infinity\": \"NaN \\\" Infinity\"}";
        let float = |word: &str| json!({ FLOAT_KEY: word });
        let expected = json!({"a": float("Infinity"), "b": [float("-Infinity"), float("NaN"), -1],
            "Infinity": "NaN \" Infinity"});
        assert_eq!(parse::<Value>(text.as_bytes()).unwrap(), expected);
        assert_eq!(parse::<Value>(b"NaN").unwrap(), float("NaN"));
    }

    #[test]
    fn what_python_does_not_read_is_refused_with_the_place() {
        for (text, place, again) in [
            ("{\"a\": Infinity", "line 1", true),
            ("{\"a\": NaN,\n \"b\": \"x", "line 2 column 8", true),
            ("{\"a\": Inf}", "line 1 column 7", false),
            ("{\"a\": +Infinity}", "line 1 column 7", false),
            ("{\"a\": nan}", "line 1 column", false),
            ("{\"a\": NaNs}", "line 1 column", false),
            ("{\"a\": \"\\", "line 1 column", true),
        ] {
            let error = parse::<Value>(text.as_bytes()).unwrap_err();
            assert!(error.contains(place), "{text}: {error}");
            assert_eq!(error.contains("Download it again"), again, "{text}: {error}");
        }
    }
}
