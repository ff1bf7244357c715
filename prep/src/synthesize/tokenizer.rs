//! A tokenizer that any text goes through: one token for each byte, after the family's special tokens.
//!
//! The rest of the published vocabulary is not there: a model with random weights has nothing to say.

use serde_json::{Map, Value, json};

use super::geometry::Family;

/// Special tokens in the order of their ids.
const OPT: &[&str] = &["<s>", "<pad>", "</s>", "<unk>"];
const FALCON: &[&str] = &[
    ">>TITLE<<",
    ">>ABSTRACT<<",
    ">>INTRODUCTION<<",
    ">>SUMMARY<<",
    ">>COMMENT<<",
    ">>ANSWER<<",
    ">>QUESTION<<",
    ">>DOMAIN<<",
    ">>PREFIX<<",
    ">>SUFFIX<<",
    ">>MIDDLE<<",
    "<|endoftext|>",
];

/// The contents of `tokenizer.json`.
pub(crate) fn tokenizer(family: Family) -> Value {
    let special = match family {
        Family::Opt { .. } => OPT,
        Family::Falcon { .. } => FALCON,
    };
    let bytes = byte_characters().map(String::from);
    let tokens = special.iter().map(ToString::to_string).chain(bytes);
    let vocab: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let added = special.iter().enumerate().map(|(id, content)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    })
}

/// The character that stands for each byte in GPT-2's scheme: itself where it can be seen, else the next one from 256 on.
fn byte_characters() -> impl Iterator<Item = char> {
    let mut next = 256;
    (0..256).map(move |byte: u32| {
        let visible = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if visible { byte } else { next };
        next += u32::from(!visible);
        char::from_u32(code).expect("far below the surrogates")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_comes_back() {
        let families = [Family::Opt { embed_size: 1, pre_norm: true }, Family::Falcon { kv_heads: None }];
        for (family, first) in families.into_iter().zip([4, 12]) {
            let json = tokenizer(family).to_string();
            let tokenizer = tokenizers::Tokenizer::from_bytes(json.as_bytes()).unwrap();
            let text = "Zwölf Boxkämpfer,\n\t\u{1f980} \0 end";
            let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            assert_eq!(ids.len(), text.len());
            assert_eq!(ids[0], first + u32::from(b'Z'));
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
    }
}
