//! Checkpoints as people have them: names behind a wrapper's, buffers beside the weights, an index of yesterday, JSON as Python
//! writes it. What transformers reads is read, and gives the same bytes; what is wrong is described from both sides.

use std::fs;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, FfnMatrix, IndexError, Note, TensorProblem};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn quirk(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures/quirks").join(name)
}

fn load(name: &str) -> Tensors {
    let file = fs::read(quirk(name).join("model.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&file).unwrap();
    stored.tensors().into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect()
}

fn serialized(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()
}

/// The quirk with its tensors changed.
fn changed(name: &str, change: impl FnOnce(&mut Tensors)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(quirk(name).join("config.json"), dir.path().join("config.json")).unwrap();
    let mut tensors = load(name);
    change(&mut tensors);
    fs::write(dir.path().join("model.safetensors"), serialized(&tensors)).unwrap();
    dir
}

fn set_config(dir: &TempDir, change: impl FnOnce(&mut Map<String, Value>)) {
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    fs::write(path, config.to_string()).unwrap();
}

/// Every canonical tensor's bytes.
fn canonical(checkpoint: &Checkpoint) -> Vec<(String, Vec<u8>)> {
    let (mut all, mut bytes) = (Vec::new(), Vec::new());
    let spec = checkpoint.spec();
    for tensor in spec.resident_tensors() {
        checkpoint.read_resident(&tensor.name, &mut bytes).unwrap();
        all.push((tensor.name, bytes.clone()));
    }
    for layer in 0..spec.layers.len() {
        for (matrix, rows) in [(FfnMatrix::Up, spec.ffn().size), (FfnMatrix::Down, spec.hidden_size)] {
            checkpoint.read_ffn_rows(layer, matrix, 0..rows, &mut bytes).unwrap();
            all.push((format!("{matrix:?} {layer}"), bytes.clone()));
        }
    }
    all
}

fn open(dir: &TempDir) -> Checkpoint {
    Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{e}"))
}

/// It opens as if nothing had been changed, with this to say.
fn is_like(name: &str, dir: &TempDir, notes: &[Note], what: &str) {
    let (plain, found) = (Checkpoint::open(quirk(name)).unwrap(), open(dir));
    assert_eq!(found.spec(), plain.spec(), "{name}: {what}");
    assert_eq!(canonical(&found), canonical(&plain), "{name}: {what}");
    assert_eq!(found.notes(), notes, "{name}: {what}");
}

const FAMILIES: [&str; 8] = [
    "opt-350m",
    "opt-untied",
    "falcon-40b-relu",
    "llama-relu-gqa",
    "llama-relu2-tied-mha",
    "persimmon-relu2",
    "phi-2-relu",
    "gpt_neox-parallel",
];

#[test]
fn names_behind_a_wrapper_lose_it() {
    for name in FAMILIES {
        for prefix in ["module.", "_orig_mod.", "base_model.model.", "model.", "_forward_module._orig_mod.module."] {
            let dir = changed(name, |tensors| tensors.iter_mut().for_each(|t| t.0.insert_str(0, prefix)));
            is_like(name, &dir, &[Note::Prefix { prefix: prefix.into() }], prefix);
        }
    }
    // Bare names behind a wrapper, and a foreign tensor in front of it.
    let dir = changed("opt-350m", |tensors| {
        for tensor in tensors.iter_mut() {
            tensor.0 = tensor.0.replace("model.decoder.", "module.");
        }
        tensors.push(("step.weight".into(), Dtype::F32, vec![1], vec![0; 4]));
    });
    let notes = [Note::Prefix { prefix: "module.".into() }, Note::Ignored(vec!["step.weight".into()])];
    is_like("opt-350m", &dir, &notes, "a stranger");
}

#[test]
fn two_models_in_one_file_are_not_chosen_between() {
    let dir = changed("llama-relu-gqa", |tensors| {
        let mut both = Tensors::new();
        for (name, dtype, shape, data) in tensors.drain(..) {
            both.push((format!("student.{name}"), dtype, shape.clone(), data.clone()));
            both.push((format!("teacher.{name}"), dtype, shape, data));
        }
        *tensors = both;
    });
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(&error, CheckpointError::TwoModels { .. }), "{error}");
    assert!(error.to_string().contains("student.") && error.to_string().contains("teacher."), "{error}");
    // A copy beside a model under its own names is foreign.
    let dir = changed("llama-relu-gqa", |tensors| {
        let copies: Tensors = tensors.iter().map(|t| (format!("ema.{}", t.0), t.1, t.2.clone(), t.3.clone())).collect();
        tensors.extend(copies);
    });
    assert!(matches!(open(&dir).notes(), [Note::Ignored(_)]));
}

#[test]
fn missing_tensors_are_described_from_both_sides() {
    let dir = changed("llama-relu-gqa", |tensors| {
        for tensor in tensors.iter_mut() {
            tensor.0 = tensor.0.replace("self_attn.q_proj", "self_attn.wq");
        }
    });
    let error = Checkpoint::open(dir.path()).unwrap_err();
    let CheckpointError::Tensors { problems, unplaced, .. } = &error else { panic!("{error}") };
    assert!(problems.iter().all(|p| matches!(p, TensorProblem::Missing { .. })) && problems.len() == 2, "{error}");
    assert_eq!(unplaced, &["model.layers.0.self_attn.wq.weight", "model.layers.1.self_attn.wq.weight"]);
    assert!(error.to_string().contains("self_attn.wq.weight"), "{error}");
    assert!(!error.to_string().contains("tie_word_embeddings"), "{error}");
    // An adapter that was never merged.
    let dir = changed("llama-relu-gqa", |tensors| {
        for tensor in tensors.iter_mut() {
            tensor.0 = format!("base_model.model.{}", tensor.0.replace("q_proj.", "q_proj.base_layer."));
        }
        let lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight";
        tensors.push((lora.into(), Dtype::F32, vec![1, 1], vec![0; 4]));
    });
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("merge_and_unload") && error.contains("lora_A"), "{error}");
}

#[test]
fn buffers_beside_the_weights_are_passed_over() {
    for (name, body, attention) in [
        ("opt-125m", "model.decoder.", "self_attn"),
        ("falcon-40b-relu", "transformer.", "self_attention"),
        ("llama-relu-gqa", "model.", "self_attn"),
        ("persimmon-relu2", "model.", "self_attn"),
        ("phi-2-relu", "model.", "self_attn"),
        ("gpt_neox-parallel", "gpt_neox.", "attention"),
    ] {
        let layer = if name.starts_with("falcon") { "h" } else { "layers" };
        let here = format!("{body}{layer}.1.{attention}");
        let buffers = [
            format!("{body}rotary_emb.inv_freq"),
            format!("{body}rotary_emb.original_inv_freq"),
            format!("{here}.rotary_emb.cos_cached"),
            format!("{here}.rotary_emb.sin_cached"),
            format!("{here}.bias"),
            format!("{here}.masked_bias"),
            format!("{body}embed_tokens.position_ids"),
            format!("{body}causal_mask"),
            format!("{here}.attn_mask"),
        ];
        let dir = changed(name, |tensors| {
            tensors.extend(buffers.iter().map(|b| (b.clone(), Dtype::F32, vec![1, 1, 2, 2], vec![0; 16])));
            tensors.push((format!("{body}seen"), Dtype::I64, vec![], vec![0; 8]));
            tensors.push((format!("{here}.mask"), Dtype::BOOL, vec![4], vec![1; 4]));
        });
        is_like(name, &dir, &[], "buffers");
        // What is added to a projection, or comes after the last layer, is no buffer.
        for weight in [format!("{here}.o_proj.more.bias"), format!("{body}{layer}.7.{attention}.o_proj.weight")] {
            let dir = changed(name, |tensors| tensors.push((weight.clone(), Dtype::F32, vec![4], vec![0; 16])));
            let error = Checkpoint::open(dir.path()).unwrap_err();
            let CheckpointError::Tensors { problems, .. } = &error else { panic!("{error}") };
            assert_eq!(problems[..], [TensorProblem::Unexpected { tensor: weight }], "{name}");
        }
    }
}

#[test]
fn a_head_under_its_other_name_is_the_head() {
    for (name, from, to) in [
        ("gpt_neox-parallel", "embed_out.weight", "lm_head.weight"),
        ("llama-relu-gqa", "lm_head.weight", "embed_out.weight"),
    ] {
        let rename = |tensors: &mut Tensors| {
            tensors.iter_mut().filter(|t| t.0 == from).for_each(|t| t.0 = to.into());
        };
        is_like(name, &changed(name, rename), &[], to);
        let wrapped = changed(name, |tensors| {
            rename(tensors);
            tensors.iter_mut().for_each(|t| t.0.insert_str(0, "module."));
        });
        is_like(name, &wrapped, &[Note::Prefix { prefix: "module.".into() }], to);
    }
}

/// The quirk in two shards with this index; names that it lists beside are listed for the first.
fn sharded(name: &str, listed: &[&str], without: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(quirk(name).join("config.json"), dir.path().join("config.json")).unwrap();
    let tensors = load(name);
    let mut map = Map::new();
    for (number, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let shard = format!("model-{number}.safetensors");
        map.extend(part.iter().map(|t| (t.0.clone(), json!(shard))));
        let mut part = part.to_vec();
        part.retain(|t| t.0 != without);
        fs::write(dir.path().join(&shard), serialized(&part)).unwrap();
    }
    map.extend(listed.iter().map(|name| ((*name).to_owned(), json!("model-0.safetensors"))));
    fs::write(dir.path().join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    dir
}

#[test]
fn an_index_may_list_what_nobody_needs() {
    let (tied, untied) = ("llama-relu2-tied-mha", "llama-relu-gqa");
    let dir = sharded(tied, &["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"], "");
    is_like(tied, &dir, &[], "listed and gone");
    let dir = sharded(untied, &["model.layers.9.mlp.up_proj.weight"], "");
    is_like(untied, &dir, &[], "of no layer");
    let needed = "model.layers.1.mlp.up_proj.weight";
    let error = Checkpoint::open(sharded(untied, &[], needed).path()).unwrap_err();
    assert!(error.to_string().contains("Download the index and the shards again"), "{error}");
    let CheckpointError::Index { source, .. } = error else { panic!("{error}") };
    assert!(matches!(&*source, IndexError::NotInShard { tensors } if tensors[0].starts_with(needed)), "{source}");
}

#[test]
fn json_as_python_writes_it_is_read() {
    let name = "llama-relu-gqa";
    let dir = changed(name, |_| {});
    let text = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap();
    let config = text("config.json").replacen('{', "{\"embd_pdrop\": -Infinity, \"max_length\": NaN,", 1);
    fs::write(dir.path().join("config.json"), format!("\u{feff}{config}")).unwrap();
    fs::write(dir.path().join("generation_config.json"), "\u{feff}{\"eos_token_id\": 2, \"max_time\": Infinity}")
        .unwrap();
    fs::write(dir.path().join("tokenizer.json"), "\u{feff}{}").unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), "{\"model_max_length\": Infinity}").unwrap();
    is_like(name, &dir, &[], "numbers that are none");
    let files = open(&dir).tokenizer_files().unwrap();
    let config: Value = serde_json::from_slice(&files.tokenizer_config.unwrap()).unwrap();
    assert_eq!(config, json!({"model_max_length": {"__float__": "Infinity"}}));
    // Where a number is followed, infinity is out of range, and named.
    for (key, value) in [("rms_norm_eps", "NaN"), ("rope_theta", "Infinity"), ("hidden_size", "-Infinity")] {
        let dir = changed(name, |_| {});
        set_config(&dir, |config| _ = config.insert(key.into(), "HERE".into()));
        let path = dir.path().join("config.json");
        let config = fs::read_to_string(&path).unwrap().replace("\"HERE\"", value);
        fs::write(&path, config).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::Config { .. }), "{error}");
        assert!(error.to_string().contains(key) && error.to_string().contains(value), "{error}");
    }
    let dir = sharded(name, &[], "");
    let path = dir.path().join("model.safetensors.index.json");
    let index = fs::read_to_string(&path).unwrap().replacen('{', "{\"metadata\": {\"total_size\": NaN},", 1);
    fs::write(&path, format!("\u{feff}{index}")).unwrap();
    is_like(name, &dir, &[], "an index");
}

#[test]
fn keys_that_are_not_followed_are_said() {
    let name = "llama-mistral-window";
    let dir = changed(name, |_| {});
    set_config(&dir, |config| {
        config.insert("use_sliding_window".into(), false.into());
        config.insert("residual_twist".into(), 0.5.into());
        config.insert("attention_dropout".into(), 0.5.into());
    });
    let plain = Checkpoint::open(quirk(name)).unwrap();
    let found = open(&dir);
    assert_eq!(found.spec(), plain.spec());
    let foreign = Note::ForeignKeys { model_type: "mistral".into(), keys: vec!["use_sliding_window".into()] };
    let unknown = Note::UnknownKeys(vec!["residual_twist".into()]);
    assert_eq!(found.notes(), [&[foreign, unknown][..], plain.notes()].concat());
}
