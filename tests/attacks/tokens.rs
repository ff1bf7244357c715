//! Which ids a text has: what the tokenizer says, in every command and in the library, and what a tokenizer may cost.

use std::fs;
use std::path::Path;
use std::time::Duration;

use flashlm::text::{PromptNotice, Tokenizer};
use flashlm_formats::bundle::{Bundle, BundleError, SpecialTokens};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::recording::HELD_OUT;
use flashlm_prep::record::documents::Documents;
use flashlm_prep::record::text::{Calibration, Sampling};
use flashlm_tests::{Said, copied, fixtures, pack_checkpoint, run, scratch};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A Llama of 192 tokens, whose configuration begins texts with 1, with a tokenizer of words; `changes` are made in it.
fn llama(changes: &[(&str, Value)], beside: &[(&str, Value)]) -> TempDir {
    let dir = copied(&fixtures().join("quirks/llama-silu"));
    let vocab: serde_json::Map<_, _> = (0..180).map(|id| (format!("w{id}"), id.into())).collect();
    let mut tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "w3" },
    });
    for (key, value) in changes {
        tokenizer[*key] = value.clone();
    }
    for (name, value) in [("tokenizer.json", &tokenizer)].into_iter().chain(beside.iter().map(|(n, v)| (*n, v))) {
        fs::write(dir.path().join(name), value.to_string()).unwrap();
    }
    dir
}

/// A template around the text.
fn template(first: &[u32], last: &[u32]) -> (&'static str, Value) {
    let piece = |id: &u32| json!({"SpecialToken": {"id": format!("w{id}"), "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let single: Vec<Value> = first.iter().map(piece).chain([text("A")]).chain(last.iter().map(piece)).collect();
    let special =
        |id: &u32| (format!("w{id}"), json!({"id": format!("w{id}"), "ids": [id], "tokens": [format!("w{id}")]}));
    let special: serde_json::Map<_, _> = first.iter().chain(last).map(special).collect();
    let pair = [text("A"), text("B")];
    ("post_processor", json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}))
}

fn bundle(dir: &Path) -> Bundle {
    pack_checkpoint(dir, &dir.join("m.flashlm"))
}

fn prompted(dir: &Path, prompt: &str) -> Said {
    let bundle = dir.join("m.flashlm");
    run("flashlm", &["run", bundle.to_str().unwrap(), "--prompt", prompt, "-n", "0", "--json"], "")
}

fn prompt_tokens(said: &Said) -> u64 {
    let last = said.stdout.lines().last().unwrap_or_else(|| panic!("{said:?}"));
    serde_json::from_str::<Value>(last).unwrap()["prompt_tokens"].as_u64().unwrap()
}

#[test]
fn the_tokenizer_says_what_begins_a_text_and_the_configuration_does_not() {
    // Nothing in front, whatever config.json begins texts with.
    let dir = llama(&[], &[]);
    let tokenizer = Tokenizer::of(&bundle(dir.path())).unwrap();
    assert_eq!(tokenizer.encode("w5 w6").unwrap(), [5, 6]);
    assert_eq!(prompt_tokens(&prompted(dir.path(), "w5 w6")), 2);

    // A template, whatever config.json has.
    let dir = llama(&[template(&[7], &[])], &[]);
    let config = fs::read_to_string(dir.path().join("config.json")).unwrap();
    fs::write(dir.path().join("config.json"), config.replace("\"bos_token_id\": 1", "\"bos_token_id\": null")).unwrap();
    let bundle = bundle(dir.path());
    assert_eq!((bundle.spec().bos, bundle.manifest().special_tokens), (None, SpecialTokens::Tokenizer));
    let tokenizer = Tokenizer::of(&bundle).unwrap();
    assert_eq!((tokenizer.encode("w5").unwrap(), tokenizer.encode_bare("w5").unwrap()), (vec![7, 5], vec![5]));
    let said = prompted(dir.path(), "w5 w6");
    assert_eq!((prompt_tokens(&said), said.stderr.contains("note:")), (3, false), "{said:?}");
    // A prompt that begins with it: as transformers, but not without a word.
    let said = prompted(dir.path(), "w7 w5");
    assert_eq!(prompt_tokens(&said), 3);
    assert!(said.stderr.contains("note: the text begins with w7"), "{said:?}");
    let notices = tokenizer.notices(&tokenizer.encode("w7 w5").unwrap());
    assert_eq!(notices, [PromptNotice::BeginsTwice { token: "w7".into() }]);
    // Every sequence that is recorded begins as a prompt does, the pieces of long documents too.
    let texts = vec!["w9 ".repeat(300), "w8 ".repeat(20)];
    let documents = Documents { texts, ..Documents::default() };
    let sampling = Sampling { tokens: 400, sequence_tokens: 50, seed: 0, held_out: HELD_OUT };
    let calibration = Calibration::new(&documents, &tokenizer, bundle.spec(), sampling).unwrap();
    for sequence in calibration.sequences.windows(2) {
        let ids = &calibration.tokens[sequence[0] as usize..sequence[1] as usize];
        assert!(ids[0] == 7 && ids[1..].iter().all(|id| [8, 9].contains(id)), "{ids:?}");
    }
}

#[test]
fn a_text_that_the_tokenizer_ends_is_said_to_be() {
    let dir = llama(&[template(&[7], &[2])], &[]);
    let tokenizer = Tokenizer::of(&bundle(dir.path())).unwrap();
    assert_eq!(tokenizer.encode("w5").unwrap(), [7, 5, 2]);
    assert_eq!(tokenizer.first_ids(), [7]);
    let said = prompted(dir.path(), "w5");
    assert_eq!(prompt_tokens(&said), 3);
    assert!(said.stderr.contains("ends every text with w2"), "{said:?}");
}

#[test]
fn older_bundles_keep_the_id_of_their_architecture_in_front() {
    for name in ["bundle-v1.flashlm", "bundle-v2.flashlm", "bundle-v2-quantised.flashlm"] {
        let bundle = Bundle::open(fixtures().join(name)).unwrap();
        assert_eq!(bundle.manifest().special_tokens, SpecialTokens::Architecture, "{name}");
        // Those of the fixtures hold no tokenizer that can be used.
        let Ok(tokenizer) = Tokenizer::of(&bundle) else { continue };
        assert_eq!(tokenizer.first_ids(), bundle.spec().bos.as_slice(), "{name}");
    }
    // The same bundle as before the marker: its manifest without it.
    let dir = llama(&[template(&[7], &[2])], &[]);
    let bundle = bundle(dir.path());
    let mut manifest = bundle.manifest().clone();
    manifest.special_tokens = SpecialTokens::Architecture;
    drop(bundle);
    let path = dir.path().join("m.flashlm");
    // A program that another test starts at this moment holds the bundle's lock until it has begun.
    let replaced = (0..100).any(|_| match flashlm_formats::bundle::replace_predictors(&path, None, &manifest) {
        Err(BundleError::Busy { .. }) => {
            std::thread::sleep(Duration::from_millis(50));
            false
        }
        replaced => {
            replaced.unwrap();
            true
        }
    });
    assert!(replaced, "the bundle is busy");
    let tokenizer = Tokenizer::of(&Bundle::open(&path).unwrap()).unwrap();
    assert_eq!(tokenizer.encode("w5").unwrap(), [1, 5]);
    assert_eq!(prompt_tokens(&prompted(dir.path(), "w5")), 2);
}

#[test]
fn tokens_beside_the_tokenizer_are_found() {
    let marks = json!({"<|im_start|>": 180, "<|im_end|>": 181});
    let mark = |content: &str| json!({"content": content, "special": true, "normalized": false});
    let decoder = json!({"added_tokens_decoder": {"180": mark("<|im_start|>"), "181": mark("<|im_end|>")}});
    for beside in [("added_tokens.json", marks), ("tokenizer_config.json", decoder)] {
        let name = beside.0;
        let dir = llama(&[], &[beside]);
        let tokenizer = Tokenizer::of(&bundle(dir.path())).unwrap();
        assert_eq!(tokenizer.encode("<|im_start|>w5 w6<|im_end|>").unwrap(), [180, 5, 6, 181], "{name}");
        assert_eq!(prompt_tokens(&prompted(dir.path(), "<|im_start|>w5 w6<|im_end|>")), 4, "{name}");
    }
}

/// Processor time that this thread takes for `work`, which a busy machine does not change. Nothing where the kernel does not tell.
fn cpu(work: impl FnOnce()) -> Duration {
    let now = || {
        let line = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        let nanoseconds = line.split_whitespace().next().and_then(|field| field.parse().ok());
        Duration::from_nanos(nanoseconds.unwrap_or(0))
    };
    let begin = now();
    work();
    now() - begin
}

#[test]
fn the_dearest_tokenizers_that_are_followed_cost_by_the_length_of_a_text() {
    let word_piece = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 256,
        "vocab": {"[UNK]": 0, "a": 1, "##a": 2}});
    let runs: serde_json::Map<_, _> = (1..=400).map(|n| ("a".repeat(n), n.into())).collect();
    let words = json!({"type": "WordLevel", "unk_token": "a", "vocab": runs.clone()});
    let unigram: Vec<Value> = runs.keys().map(|token| json!([token, -1.0])).collect();
    let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": unigram});
    let added: Vec<Value> = (1..=500)
        .map(|n| {
            json!({"id": n + 1000, "content": "a".repeat(1024 - n), "single_word": true, "lstrip": true, "rstrip": true,
            "normalized": false, "special": false})
        })
        .collect();
    let of = |model: &Value, added: &[Value]| {
        json!({"version": "1.0", "added_tokens": added, "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null, "decoder": null, "model": model})
    };
    for (name, json, text) in [
        ("words that are cut up", of(&word_piece, &[]), "a".repeat(255) + "b "),
        ("tokens within tokens", of(&unigram, &[]), "a".repeat(50)),
        ("added tokens", of(&words, &added), "a".repeat(1025) + " "),
    ] {
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        let text = |bytes: usize| text.repeat(bytes / text.len());
        let (short, long) = (text(3_000), text(12_000));
        let (ids, more) = (tokenizer.encode(&short).unwrap().len(), tokenizer.encode(&long).unwrap().len());
        assert!(more <= 5 * ids + 8, "{name}: {ids} ids, and {more} of four times the text");
        // The better of two, as caches fill.
        let best = |text: &str| (0..2).map(|_| cpu(|| _ = tokenizer.encode(text).unwrap())).min().unwrap();
        let (short, long) = (best(&short), best(&long));
        // Sixteen times would be quadratic.
        assert!(
            long < 9 * short + Duration::from_millis(20),
            "{name}: {short:?}, and {long:?} for four times the text"
        );
    }
}

#[test]
fn tokenizers_that_cost_more_are_refused_when_packed_and_when_opened() {
    let a = json!({"Sequence": {"id": "A", "type_id": 0}});
    let copies = json!({"type": "TemplateProcessing", "single": vec![a; 5000], "pair": [], "special_tokens": {}});
    let split =
        json!({"type": "Split", "pattern": {"Regex": "ab|".repeat(700_000)}, "behavior": "Isolated", "invert": false});
    let long = json!([{"id": 180, "content": "x".repeat(100_000), "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": true, "special": false}]);
    let word = json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 10_000_000,
        "vocab": {"a": 0}});
    for (key, value, said) in [
        ("post_processor", copies, "5000 copies of a text"),
        ("pre_tokenizer", split, "its patterns weigh"),
        ("added_tokens", long, "100000 bytes in an added token"),
        ("model", word, "words of 10000000 characters"),
    ] {
        let dir = llama(&[(key, value)], &[]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let refused = flashlm_prep::tokenizer::tokenizer_json(&checkpoint).unwrap_err().to_string();
        assert!(refused.contains(said), "{refused}");
        let json = fs::read(dir.path().join("tokenizer.json")).unwrap();
        let refused = Tokenizer::from_json(&json).map(drop).unwrap_err().to_string();
        assert!(refused.contains(said), "{refused}");
    }
}

#[test]
fn a_sentencepiece_model_that_is_none_is_refused() {
    let dir = scratch();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures().join("quirks/llama-silu").join(name), dir.path().join(name)).unwrap();
    }
    let good = fs::read(fixtures().join("tokenizers/no-prefix.model")).unwrap();
    let long = [&[0x0a, 0x85, 0x08, 0x0a, 0x82, 0x08][..], &[b'x'; 1026]].concat();
    for (what, bytes) in [
        ("nothing", &[][..]),
        ("not protobuf", &[0xff; 40]),
        ("a piece cut short", &good[..good.len() / 2 + 1]),
        ("a piece too long", &long),
        ("another model's pieces", &good),
    ] {
        fs::write(dir.path().join("tokenizer.model"), bytes).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let result = flashlm_prep::tokenizer::tokenizer_json(&checkpoint);
        // The last one is whole, and may be used where its ids have an embedding.
        match what {
            "another model's pieces" => _ = result.unwrap(),
            _ => assert!(result.unwrap_err().to_string().contains("tokenizer.model"), "{what}"),
        }
    }
}
