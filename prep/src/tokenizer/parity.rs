//! The same ids and texts as transformers, over every kind of tokenizer that is read: see `tests/fixtures/make_tokenizers.py`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::TokenizerFiles;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::Tokenizer as HfTokenizer;

#[derive(Deserialize)]
struct Head {
    strings: Vec<String>,
    parts: Map<String, Value>,
}

/// A checkpoint's tokenizer files, and what transformers makes of the strings.
#[derive(Deserialize)]
struct SetUp {
    name: String,
    model_type: String,
    /// Which of the parts is the tokenizer.json, and keys changed in it.
    part: Option<String>,
    tokenizer: Option<Map<String, Value>>,
    /// Of which part the vocabulary and merges are, as two files.
    vocab_of: Option<String>,
    /// A tokenizer.model.
    model: Option<String>,
    config: Option<Value>,
    special_tokens_map: Option<Value>,
    added_tokens: Option<Value>,
    first: Vec<u32>,
    last: Vec<u32>,
    /// Between first and last; nothing: as with the first set-up of the same vocabulary.
    ids: Vec<Option<Vec<u32>>>,
    /// Nothing: the string itself.
    texts: Vec<Option<String>>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures/tokenizers")
}

impl SetUp {
    fn write(&self, parts: &Map<String, Value>, to: &Path) {
        let put = |name: &str, value: &Value| fs::write(to.join(name), value.to_string()).unwrap();
        put("config.json", &serde_json::json!({"model_type": self.model_type}));
        if let Some(part) = &self.part {
            let mut json = parts[part].clone();
            for (key, value) in self.tokenizer.iter().flatten() {
                json[key] = value.clone();
            }
            put("tokenizer.json", &json);
        }
        if let Some(part) = &self.vocab_of {
            let model = &parts[part]["model"];
            put("vocab.json", &model["vocab"]);
            let lines = model["merges"].as_array().unwrap().iter();
            let lines = lines.map(|pair| format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
            fs::write(to.join("merges.txt"), "#version: 0.2\n".to_owned() + &lines.collect::<String>()).unwrap();
        }
        if let Some(model) = &self.model {
            fs::copy(fixtures().join(model), to.join("tokenizer.model")).unwrap();
        }
        let beside = [
            ("tokenizer_config.json", &self.config),
            ("special_tokens_map.json", &self.special_tokens_map),
            ("added_tokens.json", &self.added_tokens),
        ];
        for (name, value) in beside {
            value.iter().for_each(|value| put(name, value));
        }
    }

    fn vocabulary(&self) -> &str {
        self.part.as_ref().or(self.vocab_of.as_ref()).or(self.model.as_ref()).unwrap()
    }
}

#[test]
fn ids_and_texts_are_those_of_transformers() {
    let lines = fs::read_to_string(fixtures().join("expected.jsonl")).unwrap();
    let mut lines = lines.lines();
    let head: Head = serde_json::from_str(lines.next().unwrap()).unwrap();
    let mut references: HashMap<String, Vec<Vec<u32>>> = HashMap::new();
    let (mut wrong, mut set_ups) = (Vec::new(), 0);
    for line in lines {
        let set_up: SetUp = serde_json::from_str(line).unwrap();
        let dir = tempfile::tempdir().unwrap();
        set_up.write(&head.parts, dir.path());
        let files = TokenizerFiles::read(dir.path()).unwrap();
        let built = super::from_files(&files, usize::MAX);
        let (packed, tokenizer) = built.unwrap_or_else(|e| panic!("{}: {e}", set_up.name));
        let library = HfTokenizer::from_bytes(&packed.json).unwrap();
        let reference = references
            .entry(set_up.vocabulary().to_owned())
            .or_insert_with(|| set_up.ids.iter().map(|ids| ids.clone().unwrap()).collect());
        assert_eq!(tokenizer.first_ids(), set_up.first, "{}", set_up.name);
        let mut differing = 0;
        for (at, string) in head.strings.iter().enumerate() {
            let inner = set_up.ids[at].as_ref().unwrap_or(&reference[at]);
            let expected = [&set_up.first[..], inner, &set_up.last].concat();
            let text = set_up.texts[at].as_ref().unwrap_or(string);
            let ids = tokenizer.encode(string).unwrap();
            let decoded = library.decode(&expected, true).unwrap();
            // The runtime's own, one token at a time.
            let shown = tokenizer.decode(&expected);
            if ids != expected || decoded != *text || shown != *text {
                differing += 1;
                if differing <= 3 {
                    wrong.push(format!(
                        "{}: {string:?}\n  {ids:?}\n  {expected:?} is right\n  {decoded:?}\n  {shown:?}\n  {text:?} is right",
                        set_up.name
                    ));
                }
            }
        }
        if differing > 0 {
            wrong.push(format!("{}: {differing} of {} differ", set_up.name, head.strings.len()));
        }
        set_ups += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(set_ups >= 30 && head.strings.len() >= 200);
}
