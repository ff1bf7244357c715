//! `config.json`, and the tokenizer's files.

use std::fs;

use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, ConfigError};
use serde_json::{Value, json};

use super::{check_message, directory, fixture, open_with};

fn config_lie(
    quirk: &str,
    change: impl FnOnce(&mut serde_json::Map<String, Value>),
) -> Result<Checkpoint, CheckpointError> {
    let dir = directory([("model.safetensors", &fixture(&format!("quirks/{quirk}/model.safetensors"))[..])]);
    let mut config: Value = serde_json::from_slice(&fixture(&format!("quirks/{quirk}/config.json"))).unwrap();
    change(config.as_object_mut().unwrap());
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(dir.path())
}

#[test]
fn configurations_that_are_none() {
    for broken in
        ["{", "[]", "3", "null", "\"opt\"", "{\"a\":nan}", "{\"a\":+Infinity}", &"{\"a\":".repeat(10_000), "{} {}"]
    {
        let error = open_with("config.json", broken.as_bytes());
        check_message(&error);
        assert!(matches!(error, CheckpointError::Json { .. }), "{broken:.20}: {error}");
    }
    let error = open_with("config.json", b"{}");
    assert!(matches!(error, CheckpointError::Config { .. }), "{error}");
}

#[test]
fn configurations_that_lie() {
    let lies: &[(&str, &str, Value)] = &[
        ("opt-125m", "model_type", json!("gpt2")),
        ("opt-125m", "model_type", json!(3)),
        ("opt-125m", "model_type", json!(null)),
        ("opt-125m", "hidden_size", json!(0)),
        ("opt-125m", "hidden_size", json!(-48)),
        ("opt-125m", "hidden_size", json!(48.0)),
        ("opt-125m", "hidden_size", json!("48")),
        ("opt-125m", "hidden_size", json!(1_u64 << 60)),
        ("opt-125m", "hidden_size", json!(1e300)),
        ("opt-125m", "hidden_size", json!([48])),
        ("opt-125m", "num_attention_heads", json!(0)),
        ("opt-125m", "num_attention_heads", json!(5)),
        ("opt-125m", "num_hidden_layers", json!(0)),
        ("opt-125m", "num_hidden_layers", json!(u64::MAX)),
        ("opt-125m", "ffn_dim", json!(1_u64 << 40)),
        ("opt-125m", "vocab_size", json!(u32::MAX)),
        ("opt-125m", "max_position_embeddings", json!(u64::MAX)),
        ("opt-125m", "word_embed_proj_dim", json!(-1)),
        ("opt-125m", "activation_function", json!("mish")),
        ("opt-125m", "activation_function", json!(1)),
        ("opt-125m", "bos_token_id", json!(192)),
        ("opt-125m", "bos_token_id", json!(-1)),
        ("opt-125m", "eos_token_id", json!([2, "x"])),
        ("opt-125m", "enable_bias", json!("yes")),
        ("opt-125m", "tie_word_embeddings", json!(1)),
        ("opt-125m", "quantization_config", json!({"quant_method": "gptq", "bits": 4})),
        ("falcon-7b-relu", "layer_norm_epsilon", json!(-1e-5)),
        ("falcon-7b-relu", "layer_norm_epsilon", json!(1e300)),
        ("falcon-7b-relu", "layer_norm_epsilon", json!(2)),
        ("falcon-7b-relu", "layer_norm_epsilon", json!(null)),
        ("falcon-7b-relu", "layer_norm_epsilon", json!("NaN")),
        ("falcon-7b-relu", "rope_theta", json!(0)),
        ("falcon-7b-relu", "rope_scaling", json!("linear")),
        ("falcon-7b-relu", "num_attention_heads", json!(16)), // heads of width 3
        ("falcon-7b-relu", "head_dim", json!(12)),
        ("falcon-7b-relu", "rotary", json!(true)),
        ("falcon-7b-relu", "is_causal", json!(false)),
        ("falcon-7b-relu", "per_layer_config", json!({"0": {"bias": true}})),
        ("falcon-7b-relu", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("opt-125m", "activation_function", json!("fatrelu")),
        ("falcon-7b-relu", "num_ln_in_parallel_attn", json!(2)),
        ("falcon-40b-relu", "num_kv_heads", json!(3)),
        ("falcon-40b-relu", "num_kv_heads", json!(16)),
        ("falcon-40b-relu", "num_ln_in_parallel_attn", json!(3)),
        ("falcon-mha-parallel", "num_kv_heads", json!(2)),
    ];
    let mut believed = Vec::new();
    for (quirk, key, value) in lies {
        match config_lie(quirk, |config| _ = config.insert((*key).into(), value.clone())) {
            Err(error @ CheckpointError::Config { .. }) => check_message(&error),
            other => believed.push(format!("{quirk} {key} = {value}: {:?}", other.err().map(|e| e.to_string()))),
        }
    }
    assert!(believed.is_empty(), "{believed:#?}");
    // Possible in itself, but not what is stored.
    for (quirk, key, value) in [
        ("opt-125m", "hidden_size", json!(96)),
        ("opt-125m", "num_hidden_layers", json!(3)),
        ("opt-125m", "num_hidden_layers", json!(1)),
        ("opt-125m", "num_hidden_layers", json!(4096)),
        ("opt-125m", "enable_bias", json!(false)),
        ("opt-125m", "vocab_size", json!(1 << 24)),
        ("opt-350m", "do_layer_norm_before", json!(true)),
        ("falcon-40b-relu", "num_kv_heads", json!(4)),
        ("falcon-40b-relu", "new_decoder_architecture", json!(false)),
        ("falcon-40b-relu", "num_ln_in_parallel_attn", json!(1)),
        ("falcon-7b-relu", "multi_query", json!(false)),
        ("falcon-7b-relu", "parallel_attn", json!(false)),
        ("falcon-rw-gelu", "bias", json!(false)),
    ] {
        let opened = config_lie(quirk, |config| _ = config.insert(key.into(), value.clone()));
        assert!(matches!(opened, Err(CheckpointError::Tensors { .. })), "{quirk} {key} = {value}");
    }
    let unknown = config_lie("opt-125m", |config| _ = config.insert("model_type".into(), "mamba".into())).unwrap_err();
    let CheckpointError::Config { source, .. } = unknown else { panic!() };
    let said = source.to_string();
    for word in ["\"mamba\"", "OPTForCausalLM", "opt, falcon", "llama, mistral", "persimmon", "flashlm-prep families"] {
        assert!(said.contains(word), "no {word} in {said}");
    }
    assert!(matches!(&*source, ConfigError::Family { .. }));
}

#[test]
fn tokenizer_files_are_checked() {
    let model = fixture("quirks/opt-125m/model.safetensors");
    let read = |files: &[(&str, &[u8])]| {
        let dir = directory([("model.safetensors", &model[..])].into_iter().chain(files.iter().copied()));
        Checkpoint::open(dir.path()).unwrap().tokenizer_files()
    };
    assert!(matches!(read(&[]), Err(CheckpointError::NoTokenizer { .. })));
    assert_eq!(read(&[("tokenizer.model", b"x")]).unwrap().source.name(), "tokenizer.model");
    assert!(matches!(read(&[("vocab.json", b"{}")]), Err(CheckpointError::NoTokenizer { .. })));
    assert!(matches!(read(&[("tokenizer.json", b"{")]), Err(CheckpointError::Json { .. })));
    assert!(matches!(read(&[("vocab.json", b"{}"), ("merges.txt", b"\xff\xfe")]), Err(CheckpointError::Json { .. })));
    assert!(matches!(
        read(&[("tokenizer.json", b"{}"), ("added_tokens.json", b"[")]),
        Err(CheckpointError::Json { .. })
    ));
    let pointer = b"version https://git-lfs.github.com/spec/v1\n";
    assert!(matches!(read(&[("tokenizer.json", pointer)]), Err(CheckpointError::Foreign { .. })));
    read(&[("vocab.json", b"{}"), ("merges.txt", b"#version: 0.2\n")]).unwrap();
}
