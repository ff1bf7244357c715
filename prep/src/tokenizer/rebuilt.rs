//! The tokenizer that a class makes of a vocabulary and merges, out of the library's own parts.
//!
//! Vocabulary and merges stay JSON: added tokens are laid over them before the library reads them,
//! within its limits.

use serde_json::{Map, Value, json};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NFC, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::class::Class;
use super::side_files::SideFiles;

/// How Qwen2Tokenizer cuts a text.
const QWEN2_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The `tokenizer.json` of `class`, without added tokens and what is put around a text.
pub(super) fn rebuilt(
    class: Class,
    side: &SideFiles,
    vocab: Map<String, Value>,
    merges: Option<Value>,
) -> Map<String, Value> {
    let prefix = side.flag("add_prefix_space");
    let mut model = json!(model(class));
    model["vocab"] = Value::Object(vocab);
    model["merges"] = merges.unwrap_or_else(|| json!([]));
    let parts = [
        ("version", json!("1.0")),
        ("truncation", Value::Null),
        ("padding", Value::Null),
        ("added_tokens", json!([])),
        ("normalizer", json!(normalizer(class))),
        ("pre_tokenizer", json!(pre_tokenizer(class, prefix, side.flag("legacy")))),
        ("post_processor", Value::Null),
        ("decoder", json!(decoder(class, prefix))),
        ("model", model),
    ];
    parts.into_iter().map(|(name, part)| (name.to_owned(), part)).collect()
}

fn normalizer(class: Class) -> Option<NormalizerWrapper> {
    matches!(class, Class::NeoX | Class::Qwen2).then(|| NFC.into())
}

fn pre_tokenizer(class: Class, prefix: Option<bool>, legacy: Option<bool>) -> PreTokenizerWrapper {
    match class {
        Class::Llama => {
            let scheme = match (prefix.unwrap_or(true), legacy.unwrap_or(false)) {
                (true, true) => PrependScheme::Always,
                (true, false) => PrependScheme::First,
                (false, _) => PrependScheme::Never,
            };
            Metaspace::new('▁', scheme, false).into()
        }
        Class::Qwen2 => {
            let pattern = SplitPattern::Regex(QWEN2_PATTERN.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).expect("a pattern of our own");
            let bytes = ByteLevel::new(prefix.unwrap_or(false), true, false);
            PreTokenizers::new(vec![split.into(), bytes.into()]).into()
        }
        _ => ByteLevel::new(prefix.unwrap_or(false), true, true).into(),
    }
}

fn decoder(class: Class, prefix: Option<bool>) -> DecoderWrapper {
    if class != Class::Llama {
        return ByteLevel::new(true, true, true).into();
    }
    from_metaspace(true, prefix.unwrap_or(true))
}

/// From pieces with `▁` to a text, without the space that a `prefix` put before it.
pub(super) fn from_metaspace(byte_fallback: bool, prefix: bool) -> DecoderWrapper {
    let mut steps = vec![replace("▁", " ")];
    if byte_fallback {
        steps.push(ByteFallback::new().into());
    }
    if prefix || byte_fallback {
        steps.push(Fuse::new().into());
    }
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    Decoders::new(steps).into()
}

/// Of no vocabulary.
fn model(class: Class) -> BPE {
    let is_llama = class == Class::Llama;
    let builder = BPE::builder().fuse_unk(is_llama).byte_fallback(is_llama);
    let builder = match is_llama {
        true => builder,
        false => builder.continuing_subword_prefix(String::new()).end_of_word_suffix(String::new()),
    };
    builder.build().expect("no merge that is not in the vocabulary")
}

/// transformers' `clean_up_tokenization`, after what gives the text.
pub(super) fn clean_up() -> impl Iterator<Item = DecoderWrapper> {
    let replaced = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    std::iter::once(Fuse::new().into()).chain(replaced.into_iter().map(|(from, to)| replace(from, to)))
}

fn replace(from: &str, to: &str) -> DecoderWrapper {
    DecoderWrapper::Replace(Replace::new(from, to).expect("a text of our own"))
}
