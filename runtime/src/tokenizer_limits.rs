//! What a `tokenizer.json` may not ask for: text that grows without bound, and chance.
//!
//! A few hundred bytes of rules, each doubling what the one before left, make more text than any memory holds; the library follows
//! them. So the growth that the rules allow is added up here before they are used. Published tokenizers stay far below the limit.

use serde::Deserialize;
use serde_json::Value;

/// Most bytes that one byte of text may become.
const GROWTH_MAX: f64 = 1024.0;

/// The parts of a `tokenizer.json` that are looked at; the vocabulary is passed over.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    dropout: Option<f64>,
}

/// Holds a `tokenizer.json` against the limits.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn check(json: &[u8]) -> Result<(), String> {
    let outline: Outline = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    for (what, rules) in
        [("normalizer", outline.normalizer), ("pre_tokenizer", outline.pre_tokenizer), ("decoder", outline.decoder)]
    {
        let growth = growth(&rules)?;
        if growth > GROWTH_MAX {
            return Err(format!(
                "its {what} can make {growth:.0} bytes out of one, and {GROWTH_MAX} are the most that is followed"
            ));
        }
    }
    match outline.model.dropout {
        Some(dropout) if dropout != 0.0 => {
            Err(format!("it leaves out merges at random (model.dropout is {dropout}), so no text has certain tokens"))
        }
        _ => Ok(()),
    }
}

/// Most bytes that a rule can make out of one.
fn growth(rule: &Value) -> Result<f64, String> {
    let length = |key: &str| rule[key].as_str().map_or(0, str::len) as f64;
    Ok(match rule["type"].as_str() {
        None => 1.0,
        Some("Sequence") => {
            let lists = ["normalizers", "pretokenizers", "decoders"].into_iter().filter_map(|key| rule[key].as_array());
            lists.flatten().try_fold(1.0, |product, rule| Ok::<_, String>(product * growth(rule)?))?
        }
        Some("Replace") => match rule["pattern"]["String"].as_str() {
            Some(pattern) if !pattern.is_empty() => (length("content") / pattern.len() as f64).max(1.0),
            // What may match nothing matches everywhere.
            _ => 1.0 + length("content"),
        },
        Some("Prepend") => 1.0 + length("prepend"),
        Some("Precompiled") => longest_entry(rule["precompiled_charsmap"].as_str().unwrap_or_default())?,
        // Compatibility forms: one character becomes eighteen.
        Some("NFKC" | "NFKD") => 18.0,
        Some("Metaspace") => 4.0,
        Some(_) => 2.0,
    })
}

/// The longest entry of sentencepiece's table of replacements: the length of a trie, the trie, and texts that end with a zero byte.
fn longest_entry(base64: &str) -> Result<f64, String> {
    let table = decoded(base64);
    let wrong = || "its table of replacements (precompiled_charsmap) is cut short".to_owned();
    let (length, rest) = table.split_first_chunk::<4>().ok_or_else(wrong)?;
    let texts = rest.get(u32::from_le_bytes(*length) as usize..).ok_or_else(wrong)?;
    Ok(texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0).max(1) as f64)
}

/// Base64 in its usual alphabet; what is none of it is passed over, for the library to refuse.
fn decoded(base64: &str) -> Vec<u8> {
    let (mut bytes, mut bits, mut count) = (Vec::with_capacity(base64.len() / 4 * 3), 0_u32, 0);
    for byte in base64.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => continue,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(key: &str, rule: &str) -> Result<(), String> {
        check(format!(r#"{{"{key}":{rule},"model":{{"type":"BPE","vocab":{{}}}}}}"#).as_bytes())
    }

    #[test]
    fn published_rules_are_within_the_limits() {
        for (key, rule) in [
            ("normalizer", "null"),
            ("normalizer", r#"{"type":"NFC"}"#),
            ("normalizer", r#"{"type":"BertNormalizer","lowercase":true}"#),
            // Llama
            (
                "normalizer",
                r#"{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]}"#,
            ),
            // XLNet
            (
                "normalizer",
                r#"{"type":"Sequence","normalizers":[{"type":"Replace","pattern":{"String":"``"},"content":"\""},{"type":"NFKD"},
                {"type":"StripAccents"},{"type":"Lowercase"},{"type":"Replace","pattern":{"Regex":" {2,}"},"content":" "}]}"#,
            ),
            // An empty trie, then "abc"
            ("normalizer", r#"{"type":"Precompiled","precompiled_charsmap":"AAAAAGFiYwA="}"#),
            (
                "decoder",
                r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},
                {"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#,
            ),
            (
                "pre_tokenizer",
                r#"{"type":"Sequence","pretokenizers":[{"type":"Digits"},{"type":"Split","pattern":{"Regex":" "}},{"type":"ByteLevel"}]}"#,
            ),
        ] {
            assert_eq!(with(key, rule), Ok(()), "{rule}");
        }
    }

    #[test]
    fn growth_without_bound_is_refused() {
        let doubling = r#"{"type":"Replace","pattern":{"String":"a"},"content":"aa"}"#;
        let many = |rule: &str, count: usize, list: &str| {
            format!(r#"{{"type":"Sequence","{list}":[{}]}}"#, vec![rule; count].join(","))
        };
        assert_eq!(with("normalizer", &many(doubling, 10, "normalizers")), Ok(()));
        assert!(with("normalizer", &many(doubling, 11, "normalizers")).is_err());
        assert!(with("decoder", &many(doubling, 11, "decoders")).is_err());
        assert!(with("pre_tokenizer", &many(r#"{"type":"ByteLevel"}"#, 11, "pretokenizers")).is_err());
        assert!(with("normalizer", &many(&many(doubling, 6, "normalizers"), 2, "normalizers")).is_err(), "nested");
        let long = "a".repeat(2000);
        for rule in [
            format!(r#"{{"type":"Replace","pattern":{{"String":"a"}},"content":"{long}"}}"#),
            format!(r#"{{"type":"Replace","pattern":{{"Regex":"a*"}},"content":"{long}"}}"#),
            format!(r#"{{"type":"Replace","pattern":{{"String":""}},"content":"{long}"}}"#),
            format!(r#"{{"type":"Prepend","prepend":"{long}"}}"#),
            format!(r#"{{"type":"Precompiled","precompiled_charsmap":"AAAA{long}"}}"#),
        ] {
            assert!(with("normalizer", &rule).is_err());
        }
    }

    #[test]
    fn tables_that_claim_more_than_they_hold_are_refused() {
        for table in ["", "AAAA", "////////", "BAAAAA=="] {
            let rule = format!(r#"{{"type":"Precompiled","precompiled_charsmap":"{table}"}}"#);
            assert!(with("normalizer", &rule).unwrap_err().contains("cut short"), "{table}");
        }
    }

    #[test]
    fn chance_is_refused_and_broken_json_too() {
        let dropout = |value: &str| check(format!(r#"{{"model":{{"dropout":{value}}}}}"#).as_bytes());
        assert_eq!((dropout("null"), dropout("0.0")), (Ok(()), Ok(())));
        assert!(dropout("0.1").unwrap_err().contains("at random"));
        for broken in ["", "{", "[]", "{\"model\":5}", "{\"decoder\":\"\u{1}\",\"model\":{}}", &"[".repeat(100_000)] {
            assert!(check(broken.as_bytes()).is_err(), "{broken}");
        }
    }
}
