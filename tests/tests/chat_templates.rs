//! Chat templates of published models, against what transformers makes of them: `tests/fixtures/chat/make_chat_texts.py`.
//!
//! `FLASHLM_CHAT_TEXTS=DIRECTORY` compares a directory of further templates that the script was run on.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flashlm::Error;
use flashlm::chat::{ChatTemplate, Message, Tools};
use flashlm::text::Tokenizer;
use flashlm_tests::root;
use serde_json::{Value, json};

/// 2026-12-01T09:30:05.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_796_117_405)
}

fn fixtures() -> PathBuf {
    root().join("tests/fixtures/chat")
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The example's tokenizer, in which what the conversations spell are special tokens.
fn tokenizer() -> Tokenizer {
    let mut json = read(&root().join("examples/tiny-opt/tokenizer.json"));
    let specials =
        ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<start_of_turn>", "[INST]", "[/INST]", "<s>"];
    for (id, content) in (4096..).zip(specials) {
        json["added_tokens"].as_array_mut().unwrap().push(json!({"id": id, "content": content, "special": true,
            "lstrip": false, "rstrip": false, "single_word": false, "normalized": false}));
    }
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

/// Differences between our texts and those that the script found with the templates of `directory`; with how many are equal.
fn differences(directory: &Path) -> (usize, Vec<String>) {
    let made = read(&directory.join("texts.json"));
    let source = fs::read_to_string(fixtures().join("conversations.json")).unwrap();
    let (tokenizer, tools) = (tokenizer(), Tools::from_json(as_written(&source, "tools")).unwrap());
    let (mut equal, mut differences) = (0, Vec::new());
    for (name, case) in made["templates"].as_object().unwrap() {
        let template = fs::read_to_string(directory.join(format!("templates/{name}.jinja"))).unwrap();
        let specials = case["specials"].as_object().unwrap();
        let specials =
            specials.iter().map(|(name, token)| (name.clone(), token.as_str().unwrap().to_owned())).collect();
        let template = match ChatTemplate::new(&template, specials, &tokenizer) {
            Ok(template) => template,
            Err(error) => {
                differences.push(format!("{name}: {error}"));
                continue;
            }
        };
        for (key, expected) in case["texts"].as_object().unwrap() {
            let words: Vec<&str> = key.split(' ').collect();
            let messages = Message::list_from_json(as_written(&source, words[0])).unwrap();
            let tools = words.contains(&"tools").then_some(&tools);
            let rendered = template.render_at(&tokenizer, &messages, tools, words.contains(&"answers"), now());
            let found = match &rendered {
                Ok(rendered) => json!(rendered.text()),
                Err(Error::Chat(reason)) => json!({ "refused": reason }),
                Err(other) => panic!("{name}, {key}: {other}"),
            };
            // Errors of Python's own have other words here.
            let is_equal = found == *expected || expected.get("failed").is_some() && found.get("refused").is_some();
            equal += usize::from(is_equal);
            if !is_equal {
                differences.push(format!("{name}, {key}:\n  {expected}\n  {found}"));
            }
        }
    }
    (equal, differences)
}

/// The JSON after `key`, as written: a map of serde_json sorts its keys.
fn as_written<'a>(source: &'a str, key: &str) -> &'a str {
    let key = format!("\"{key}\": [");
    let begin = source.find(&key).unwrap() + key.len() - 1;
    let mut stream = serde_json::Deserializer::from_str(&source[begin..]).into_iter::<Value>();
    stream.next().unwrap().unwrap();
    &source[begin..begin + stream.byte_offset()]
}

#[test]
fn texts_are_those_of_transformers() {
    let directory = std::env::var_os("FLASHLM_CHAT_TEXTS").map_or_else(fixtures, PathBuf::from);
    let (equal, differences) = differences(&directory);
    assert!(
        differences.is_empty(),
        "{} of {} differ:\n{}",
        differences.len(),
        equal + differences.len(),
        differences.join("\n")
    );
    assert!(equal >= 24 * 15, "{equal} texts were compared");
}
