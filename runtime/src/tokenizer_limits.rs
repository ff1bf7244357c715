//! What a `tokenizer.json` may not ask for: time, memory and text that grow without bound, and chance.
//!
//! A few hundred bytes of rules, each doubling what the one before left, make more text than any memory holds; a template that repeats the
//! text five thousand times makes fifteen million tokens of a page; a word limit of a million characters makes a word cubic. The
//! library follows all of them. So each part is checked against a limit here before it is used, when a bundle is made and when it is
//! opened; what a text then costs is bounded per byte. Published tokenizers stay far below every limit: the
//! numbers beside them are the largest known.

use std::fmt;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// Most bytes that one byte of text may become.
const GROWTH_MAX: f64 = 1024.0;
/// Longest token: a text's length in tokens, and a generated token's in text, rest on it. Published: 256 bytes.
pub(crate) const TOKEN_BYTES_MAX: usize = 1024;
/// Bytes of all added tokens: automata that find them take some hundred times as much. Published: 100 kB.
pub const ADDED_BYTES_MAX: usize = 512 << 10;
/// Longest prefix or suffix of the parts of a word. Published: 4.
const AFFIX_BYTES_MAX: usize = 64;
/// Longest word that WordPiece cuts up; it looks at every part of it. Published: 100.
const WORD_CHARS_MAX: u64 = 256;
/// Most tokens that a post-processor may put around a text. Published: 5.
const AROUND_MAX: usize = 64;
/// Most rules in one of the parts. Published: 12.
const RULES_MAX: usize = 64;
/// Most that all patterns together may weigh: see [`weight`]. Published: 15 000.
const PATTERNS_MAX: f64 = 65536.0;

/// The parts of a `tokenizer.json` that are looked at.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    #[serde(default)]
    content: Longest,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    dropout: Option<f64>,
    #[serde(default)]
    vocab: Longest,
    #[serde(default)]
    unk_token: Longest,
    #[serde(default)]
    continuing_subword_prefix: Longest,
    #[serde(default)]
    end_of_word_suffix: Longest,
    #[serde(default)]
    max_input_chars_per_word: Option<u64>,
}

/// Length of the longest text among the names of an object, or in a list, or of the one text there is. Nothing is kept of them.
#[derive(Default)]
struct Longest(usize);

impl<'de> Deserialize<'de> for Longest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Longest;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("texts")
            }

            fn visit_str<E>(self, text: &str) -> Result<Longest, E> {
                Ok(Longest(text.len()))
            }

            fn visit_unit<E>(self) -> Result<Longest, E> {
                Ok(Longest(0))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Longest, E> {
                Ok(Longest(0))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Longest, E> {
                Ok(Longest(0))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Longest, E> {
                Ok(Longest(0))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Longest, A::Error> {
                let mut longest = 0;
                while let Some((Longest(length), IgnoredAny)) = map.next_entry()? {
                    longest = longest.max(length);
                }
                Ok(Longest(longest))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Longest, A::Error> {
                let mut longest = 0;
                while let Some(Longest(length)) = list.next_element()? {
                    longest = longest.max(length);
                }
                Ok(Longest(longest))
            }
        }
        deserializer.deserialize_any(Texts)
    }
}

/// Holds a `tokenizer.json` against the limits.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn check(json: &[u8]) -> Result<(), String> {
    let outline: Outline = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let Outline { added_tokens, normalizer, pre_tokenizer, post_processor, decoder, model } = outline;
    check_model(&model)?;
    let longest = added_tokens.iter().map(|token| token.content.0).max().unwrap_or(0);
    at_most("bytes in an added token", longest, TOKEN_BYTES_MAX)?;
    at_most("bytes of added tokens", added_tokens.iter().map(|token| token.content.0).sum(), ADDED_BYTES_MAX)?;
    for (what, rules) in [("normalizer", &normalizer), ("pre_tokenizer", &pre_tokenizer), ("decoder", &decoder)] {
        at_most(&format!("rules in its {what}"), count(rules), RULES_MAX)?;
        let growth = growth(rules)?;
        if growth > GROWTH_MAX {
            return Err(format!(
                "its {what} can make {growth:.0} bytes out of one, and {GROWTH_MAX} are the most that is followed"
            ));
        }
    }
    let patterns: f64 = [&normalizer, &pre_tokenizer, &decoder].into_iter().map(patterns).sum();
    if patterns > PATTERNS_MAX {
        return Err(format!("its patterns weigh {patterns:.0}, and {PATTERNS_MAX} is the most that is followed"));
    }
    at_most("rules in its post_processor", count(&post_processor), RULES_MAX)?;
    let (tokens, texts) = around(&post_processor);
    at_most("tokens that its post_processor puts around a text", tokens, AROUND_MAX)?;
    at_most("copies of a text that its post_processor makes", texts, 1)
}

fn check_model(model: &Model) -> Result<(), String> {
    at_most("bytes in a token", model.vocab.0.max(model.unk_token.0), TOKEN_BYTES_MAX)?;
    let affix = model.continuing_subword_prefix.0.max(model.end_of_word_suffix.0);
    at_most("bytes before or after the parts of a word", affix, AFFIX_BYTES_MAX)?;
    if let Some(chars) = model.max_input_chars_per_word.filter(|chars| *chars > WORD_CHARS_MAX) {
        return Err(format!(
            "it cuts up words of {chars} characters (max_input_chars_per_word), and {WORD_CHARS_MAX} are the most"
        ));
    }
    match model.dropout {
        Some(dropout) if dropout != 0.0 => {
            Err(format!("it leaves out merges at random (model.dropout is {dropout}), so no text has certain tokens"))
        }
        _ => Ok(()),
    }
}

fn at_most(what: &str, found: usize, most: usize) -> Result<(), String> {
    if found <= most { Ok(()) } else { Err(format!("{found} {what}, and {most} are the most that is followed")) }
}

/// The rules of a sequence, whatever its part calls its list.
fn steps(rule: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["normalizers", "pretokenizers", "decoders", "processors"].into_iter();
    lists.filter_map(|key| rule[key].as_array()).flatten()
}

/// The rules of a part, those within others too.
fn count(rule: &Value) -> usize {
    1 + steps(rule).map(count).sum::<usize>()
}

/// Ids that a post-processor puts around a text, and how often it sets the text itself.
fn around(rule: &Value) -> (usize, usize) {
    let ids =
        |id: &Value| rule["special_tokens"][id.as_str().unwrap_or_default()]["ids"].as_array().map_or(1, Vec::len);
    match rule["type"].as_str() {
        Some("TemplateProcessing") => {
            let pieces = rule["single"].as_array().map(Vec::as_slice).unwrap_or_default();
            let texts = pieces.iter().filter(|piece| piece.get("Sequence").is_some()).count();
            (pieces.iter().filter_map(|piece| piece.get("SpecialToken")).map(|token| ids(&token["id"])).sum(), texts)
        }
        Some("Sequence") => {
            steps(rule).map(around).fold((0, 1), |(sum, most), (ids, texts)| (sum + ids, most.max(texts)))
        }
        Some("BertProcessing" | "RobertaProcessing") => (2, 1),
        _ => (0, 1),
    }
}

/// What the patterns of a part weigh together.
fn patterns(rule: &Value) -> f64 {
    let own = match &rule["pattern"] {
        Value::Object(pattern) => {
            let text = |key: &str| pattern.get(key).and_then(Value::as_str).unwrap_or_default();
            text("String").len() as f64 + weight(text("Regex"))
        }
        _ => 0.0,
    };
    own + steps(rule).map(patterns).sum::<f64>()
}

/// What a regular expression costs in memory, roughly, as if each byte were a letter: a class of characters is many ranges, and what is
/// repeated so many times stands there so many times.
fn weight(regex: &str) -> f64 {
    const CLASS: f64 = 100.0;
    let bytes = regex.as_bytes();
    let escaped = |at: usize| at > 0 && bytes[at - 1] == b'\\';
    let classes =
        (0..bytes.len()).filter(|at| bytes[*at] == b'.' || (escaped(*at) && b"pPwWdDsSXhHRbB".contains(&bytes[*at])));
    let repeats = regex.split('{').skip(1).filter_map(|rest| {
        let counts = rest.split('}').next()?;
        counts.split(',').filter_map(|number| number.trim().parse::<f64>().ok()).reduce(f64::max)
    });
    (regex.len() as f64 + CLASS * classes.count() as f64) * repeats.map(|count| count.max(1.0)).product::<f64>()
}

/// Most bytes that a rule can make out of one.
fn growth(rule: &Value) -> Result<f64, String> {
    let length = |key: &str| rule[key].as_str().map_or(0, str::len) as f64;
    Ok(match rule["type"].as_str() {
        None => 1.0,
        Some("Sequence") => steps(rule).try_fold(1.0, |product, rule| Ok::<_, String>(product * growth(rule)?))?,
        Some("Replace") => match rule["pattern"]["String"].as_str() {
            Some(pattern) if !pattern.is_empty() => (length("content") / pattern.len() as f64).max(1.0),
            // Once, at the beginning.
            _ if rule["pattern"]["Regex"]
                .as_str()
                .is_some_and(|regex| regex.starts_with(r"\A") && !regex.contains('|')) =>
            {
                1.0
            }
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
    // As the library reads it: with padding or without.
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let table = GeneralPurpose::new(&STANDARD, config).decode(base64);
    let table = table.map_err(|e| format!("its table of replacements (precompiled_charsmap) is no base64: {e}"))?;
    let wrong = || "its table of replacements (precompiled_charsmap) is cut short".to_owned();
    let (length, rest) = table.split_first_chunk::<4>().ok_or_else(wrong)?;
    let texts = rest.get(u32::from_le_bytes(*length) as usize..).ok_or_else(wrong)?;
    Ok(texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0).max(1) as f64)
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
            // sentencepiece, as flashlm-prep writes it
            (
                "normalizer",
                r#"{"type":"Sequence","normalizers":[{"type":"Replace","pattern":{"Regex":"\\A +| +\\z"},"content":""},
                {"type":"Replace","pattern":{"Regex":" {2,}"},"content":" "},{"type":"Replace","pattern":{"String":" "},"content":"▁"},
                {"type":"Replace","pattern":{"Regex":"\\A▁"},"content":"▁▁"},{"type":"Precompiled","precompiled_charsmap":"AAAAAGFiYwA="}]}"#,
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
    fn parts_that_would_cost_more_than_the_text_are_refused() {
        let refused = |json: String| check(json.as_bytes()).expect_err("it was taken");
        let model = |more: &str| format!(r#"{{"model":{{"type":"BPE","vocab":{{}}{more}}}}}"#);
        let long = "x".repeat(1025);
        // One added token of 100 kB took 22 s.
        let added = |content: &str, count: usize| {
            let token = format!(r#"{{"id":5,"content":"{content}"}}"#);
            format!(r#"{{"added_tokens":[{}],"model":{{"vocab":{{}}}}}}"#, vec![token; count].join(","))
        };
        assert!(refused(added(&long, 1)).contains("1025 bytes in an added token"));
        assert!(refused(added(&long[..1000], 600)).contains("600000 bytes of added tokens"));
        assert_eq!(check(added(&long[..1024], 500).as_bytes()), Ok(()));
        for model in [
            format!(r#"{{"model":{{"vocab":{{"a":0,"{long}":1}}}}}}"#),
            format!(r#"{{"model":{{"vocab":[["a",0.0],["{long}",-1.5]]}}}}"#),
            format!(r#"{{"model":{{"vocab":["a","{long}"]}}}}"#),
            format!(r#"{{"model":{{"vocab":{{}},"unk_token":"{long}"}}}}"#),
        ] {
            assert!(refused(model).contains("1025 bytes in a token"));
        }
        // WordPiece looks at every part of a word.
        assert!(refused(model(r#","max_input_chars_per_word":1000000"#)).contains("words of 1000000 characters"));
        assert_eq!(
            check(model(r#","max_input_chars_per_word":100,"continuing_subword_prefix":"\u0023#""#).as_bytes()),
            Ok(())
        );
        let affix = format!(r#","continuing_subword_prefix":"{}""#, &long[..65]);
        assert!(refused(model(&affix)).contains("65 bytes before or after"));
    }

    #[test]
    fn post_processors_neither_copy_a_text_nor_bury_it() {
        let a = r#"{"Sequence":{"id":"A","type_id":0}}"#;
        let token = r#"{"SpecialToken":{"id":"<s>","type_id":0}}"#;
        let template = |pieces: &[&str], ids: usize| {
            let ids = vec!["1"; ids].join(",");
            format!(
                r#"{{"type":"TemplateProcessing","single":[{}],"pair":[],"special_tokens":{{"<s>":{{"id":"<s>","ids":[{ids}],"tokens":[]}}}}}}"#,
                pieces.join(",")
            )
        };
        let check = |rule: &str| with("post_processor", rule);
        assert_eq!(check(&template(&[token, a, token], 1)), Ok(()));
        assert_eq!(check(&template(&[&[token; 64][..], &[a]].concat(), 1)), Ok(()));
        // Five thousand copies made fifteen million tokens of 6 kB.
        assert!(check(&template(&[a; 5000], 1)).unwrap_err().contains("5000 copies of a text"));
        assert!(check(&template(&[&[token; 65][..], &[a]].concat(), 1)).unwrap_err().contains("65 tokens"));
        assert!(check(&template(&[token, a], 70)).unwrap_err().contains("70 tokens"));
        let many = |count: usize| {
            let rules = vec![template(&[token, a], 1); count].join(",");
            format!(r#"{{"type":"Sequence","processors":[{rules}]}}"#)
        };
        assert_eq!(check(&many(63)), Ok(()));
        assert!(check(&many(64)).unwrap_err().contains("65 rules"));
    }

    #[test]
    fn patterns_weigh_what_they_cost() {
        let split = |regex: &str| format!(r#"{{"type":"Split","pattern":{{"Regex":{}}}}}"#, Value::from(regex));
        // GPT-4o's, the largest published one.
        let o200k = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        assert_eq!(with("pre_tokenizer", &split(o200k)), Ok(()));
        let long = "ab|".repeat(30_000);
        for regex in [&*long, "(?:a{1000}){1000}", r"(?:\p{L}{50}){50}", &r"\w".repeat(700), &".".repeat(700)] {
            assert!(with("pre_tokenizer", &split(regex)).unwrap_err().contains("patterns weigh"), "{regex:.40}");
        }
        let text = format!(r#"{{"type":"Replace","pattern":{{"String":"{long}"}},"content":""}}"#);
        assert!(with("normalizer", &text).unwrap_err().contains("patterns weigh"));
        let removing = r#"{"type":"Replace","pattern":{"String":"ab"},"content":"a"}"#;
        let many = format!(r#"{{"type":"Sequence","normalizers":[{}]}}"#, vec![removing; 64].join(","));
        assert!(with("normalizer", &many).unwrap_err().contains("65 rules in its normalizer"));
    }

    #[test]
    fn tables_that_claim_more_than_they_hold_are_refused() {
        for table in ["", "AAAA", "////////", "BAAAAA=="] {
            let rule = format!(r#"{{"type":"Precompiled","precompiled_charsmap":"{table}"}}"#);
            assert!(with("normalizer", &rule).unwrap_err().contains("cut short"), "{table}");
        }
        let (padded, bare) = (r#""BAAAAA==""#, r#""AAAAAGFiYwA""#);
        let rule = |table: &str| format!(r#"{{"type":"Precompiled","precompiled_charsmap":{table}}}"#);
        assert!(with("normalizer", &rule(padded)).is_err() && with("normalizer", &rule(bare)).is_ok());
        assert!(with("normalizer", &rule(r#""AAAA%AAA""#)).unwrap_err().contains("is no base64"));
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
