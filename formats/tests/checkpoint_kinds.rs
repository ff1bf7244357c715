//! One model in every kind of file gives the same bytes; and what happens when configuration and files disagree.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::{Checkpoint, CheckpointError, ConfigError, FfnMatrix, Format, Note, TensorProblem};
use flashlm_formats::model::{Activation, Block, Positions};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures")
}

/// A directory with the files of `fixture` (under tests/fixtures) and the configuration of the quirk `config`.
fn directory(config: &str, fixture: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixtures().join(fixture)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    fs::copy(fixtures().join("quirks").join(config).join("config.json"), dir.path().join("config.json")).unwrap();
    dir
}

fn quirk(name: &str) -> TempDir {
    directory(name, &format!("quirks/{name}"))
}

/// Every canonical tensor with its bytes.
fn canonical(checkpoint: &Checkpoint) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    let mut bytes = Vec::new();
    for tensor in checkpoint.spec().resident_tensors() {
        checkpoint.read_resident(&tensor.name, &mut bytes).unwrap();
        all.push((tensor.name, bytes.clone()));
    }
    for layer in 0..checkpoint.spec().layers.len() {
        for (matrix, rows) in
            [(FfnMatrix::Up, checkpoint.spec().ffn().size), (FfnMatrix::Down, checkpoint.spec().hidden_size)]
        {
            checkpoint.read_ffn_rows(layer, matrix, 0..rows, &mut bytes).unwrap();
            all.push((format!("{matrix:?} {layer}"), bytes.clone()));
        }
    }
    all
}

#[test]
fn every_kind_of_file_gives_the_same_bytes() {
    for (config, kind, format) in [
        ("opt-125m", "plain", Format::Torch),
        ("opt-125m", "old-names", Format::Torch),
        ("opt-125m", "one-storage", Format::Torch),
        ("opt-125m", "strided", Format::Torch),
        ("opt-125m", "parameters", Format::Torch),
        ("opt-125m", "protocol-4", Format::Torch),
        ("opt-125m", "sharded", Format::ShardedTorch),
        ("falcon-40b-relu", "bfloat16", Format::Torch),
    ] {
        let expected = Checkpoint::open(fixtures().join("quirks").join(config)).unwrap();
        let dir = directory(config, &format!("torch/{kind}"));
        let found = Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(found.format(), format, "{kind}");
        assert_eq!(found.spec(), expected.spec(), "{kind}");
        assert_eq!(found.model_bytes(), expected.model_bytes(), "{kind}");
        assert_eq!(canonical(&found), canonical(&expected), "{kind}");
        // Some rows only, so that strides are followed from the middle of a matrix.
        let (mut some, mut all) = (Vec::new(), Vec::new());
        found.read_ffn_rows(1, FfnMatrix::Down, 5..45, &mut some).unwrap();
        expected.read_ffn_rows(1, FfnMatrix::Down, 0..48, &mut all).unwrap();
        let row = all.len() / 48;
        assert_eq!(some, all[5 * row..45 * row], "{kind}");
        found.drop_page_cache();
        found.check_unchanged().unwrap();
    }
}

/// Float32, and strided; of one layer, to keep the fixture small.
#[test]
fn strided_single_precision_gives_the_same_bytes() {
    let stored = changed("opt-no-bias", |tensors| tensors.retain(|(name, ..)| !name.contains(".layers.1.")));
    let torch = directory("opt-no-bias", "torch/float32-one-layer");
    let [expected, found] = [stored, torch].map(|dir| {
        set_config(&dir, |config| _ = config.insert("num_hidden_layers".into(), 1.into()));
        canonical(&Checkpoint::open(dir.path()).unwrap())
    });
    assert_eq!(found, expected);
}

/// Stored tensors, to be changed and written again.
type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn load(path: &Path) -> Tensors {
    let file = fs::read(path).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&file).unwrap();
    let copy = |(name, t): (String, TensorView)| (name, t.dtype(), t.shape().to_vec(), t.data().to_vec());
    stored.tensors().into_iter().map(copy).collect()
}

fn save(path: &Path, tensors: &Tensors) {
    let view = |(name, dtype, shape, data): &'_ (String, Dtype, Vec<usize>, Vec<u8>)| {
        (name.clone(), *dtype, shape.clone(), data.clone())
    };
    let owned: Vec<_> = tensors.iter().map(view).collect();
    let views: Vec<_> =
        owned.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap())).collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The quirk `name` with its tensors changed.
fn changed(name: &str, change: impl FnOnce(&mut Tensors)) -> TempDir {
    let dir = quirk(name);
    let path = dir.path().join("model.safetensors");
    let mut tensors = load(&path);
    change(&mut tensors);
    save(&path, &tensors);
    dir
}

fn set_config(dir: &TempDir, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_header_of_a_length_that_looks_like_a_pickle_is_safetensors() {
    // 0x0280: the first bytes of a pickle of protocol 2.
    let dir = quirk("falcon-rw-gelu");
    let path = dir.path().join("model.safetensors");
    let expected = canonical(&Checkpoint::open(dir.path()).unwrap());
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let padded = (length.div_ceil(1 << 16) << 16) + 0x0280;
    let mut longer = padded.to_le_bytes().to_vec();
    longer.extend(&bytes[8..8 + length as usize]);
    longer.resize(8 + padded as usize, b' ');
    longer.extend(&bytes[8 + length as usize..]);
    assert_eq!(longer[..2], [0x80, 2]);
    fs::write(&path, longer).unwrap();
    assert_eq!(canonical(&Checkpoint::open(dir.path()).unwrap()), expected);
}

#[test]
fn shards_give_the_same_bytes_and_the_single_file_is_preferred() {
    let dir = quirk("falcon-rw-gelu");
    let expected = canonical(&Checkpoint::open(dir.path()).unwrap());
    let tensors = load(&dir.path().join("model.safetensors"));
    let mut map = serde_json::Map::new();
    for (number, part) in tensors.chunks(tensors.len().div_ceil(3)).enumerate() {
        let shard = format!("model-{number}.safetensors");
        save(&dir.path().join(&shard), &part.to_vec());
        map.extend(part.iter().map(|(name, ..)| (name.clone(), json!(shard))));
    }
    fs::write(dir.path().join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), "never looked at").unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().format(), Format::Safetensors);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let sharded = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(sharded.format(), Format::ShardedSafetensors);
    assert_eq!(canonical(&sharded), expected);
    assert!(sharded.files().iter().any(|file| file.name == "model.safetensors.index.json"));
}

/// The Hugging Face cache consists of links to files elsewhere.
#[test]
fn links_to_files_are_followed() {
    let blobs = quirk("opt-125m");
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        symlink(blobs.path().join(name), dir.path().join(name)).unwrap();
    }
    Checkpoint::open(dir.path()).unwrap();
}

fn head(tensors: &Tensors, name: &str) -> (String, Dtype, Vec<usize>, Vec<u8>) {
    let (_, dtype, shape, data) = tensors.iter().find(|(n, ..)| n == name).unwrap().clone();
    ("lm_head.weight".into(), dtype, shape, data)
}

const OPT_EMBEDDING: &str = "model.decoder.embed_tokens.weight";

#[test]
fn the_head_is_tied_as_transformers_ties_it() {
    let plain = Checkpoint::open(fixtures().join("quirks/opt-125m")).unwrap();

    let copy = changed("opt-125m", |tensors| tensors.push(head(tensors, OPT_EMBEDDING)));
    let copy = Checkpoint::open(copy.path()).unwrap();
    assert!(copy.spec().tied_head && copy.notes().is_empty());
    assert_eq!(copy.model_bytes(), plain.model_bytes(), "an equal copy is not counted");

    let other = changed("opt-125m", |tensors| {
        let mut head = head(tensors, OPT_EMBEDDING);
        *head.3.last_mut().unwrap() ^= 1;
        tensors.push(head);
    });
    let other = Checkpoint::open(other.path()).unwrap();
    assert_eq!((other.spec().tied_head, other.notes()), (false, &[Note::HeadNotTied][..]));
    let (mut embedding, mut last) = (Vec::new(), Vec::new());
    other.read_resident("embed.tokens", &mut embedding).unwrap();
    other.read_resident("head.weight", &mut last).unwrap();
    assert_ne!(embedding, last);

    let only_head = changed("opt-125m", |tensors| {
        tensors.push(head(tensors, OPT_EMBEDDING));
        tensors.retain(|(name, ..)| name != OPT_EMBEDDING);
    });
    let only_head = Checkpoint::open(only_head.path()).unwrap();
    assert_eq!((only_head.spec().tied_head, only_head.notes()), (true, &[Note::HeadIsEmbedding][..]));
    assert_eq!(canonical(&only_head), canonical(&plain));

    let untied = quirk("opt-125m");
    set_config(&untied, |config| _ = config.insert("tie_word_embeddings".into(), false.into()));
    let error = Checkpoint::open(untied.path()).unwrap_err();
    assert!(error.to_string().contains("tie_word_embeddings"), "{error}");
}

#[test]
fn all_differences_are_reported_at_once() {
    let dir = changed("opt-125m", |tensors| {
        tensors.retain(|(name, ..)| !name.ends_with("layers.1.fc1.bias"));
        for (name, dtype, shape, data) in tensors.iter_mut() {
            if name.ends_with("layers.0.fc2.weight") {
                shape.reverse();
            }
            if name.ends_with("layers.0.fc1.bias") {
                *dtype = Dtype::I16;
            }
            if name.ends_with("layers.0.self_attn.q_proj.bias") {
                *dtype = Dtype::BF16;
            }
            if name.ends_with("layers.1.fc2.weight") {
                *data = data.iter().flat_map(|&byte| [byte, byte]).collect();
                *dtype = Dtype::F32;
            }
        }
        let stray = tensors[0].clone();
        tensors.push(("model.decoder.layers.7.fc1.weight".into(), stray.1, stray.2.clone(), stray.3.clone()));
        tensors.push(("score.weight".into(), stray.1, stray.2, stray.3));
    });
    let CheckpointError::Tensors { problems, .. } = Checkpoint::open(dir.path()).unwrap_err() else { panic!() };
    let is = |test: &dyn Fn(&TensorProblem) -> bool| problems.iter().filter(|problem| test(problem)).count();
    assert_eq!(problems.len(), 4, "{problems:#?}");
    assert_eq!(is(&|p| matches!(p, TensorProblem::Missing { tensor, .. } if tensor.ends_with("layers.1.fc1.bias"))), 1);
    assert_eq!(
        is(
            &|p| matches!(p, TensorProblem::Shape { expected, found, .. } if expected[..] == [48, 192] && found[..] == [192, 48])
        ),
        1
    );
    assert_eq!(is(&|p| matches!(p, TensorProblem::Dtype { found, .. } if found == "i16")), 1);
    assert_eq!(is(&|p| matches!(p, TensorProblem::Mixed { tensor, .. } if tensor == "layers.0.attention.qkv.bias")), 1);
}

#[test]
fn tensors_without_a_place_are_an_error_inside_the_body_and_a_note_outside() {
    let add = |name: &str| {
        changed("falcon-7b-relu", |tensors| {
            let (_, dtype, shape, data) = tensors[0].clone();
            tensors.push((name.into(), dtype, shape, data));
        })
    };
    for harmless in ["transformer.h.0.self_attention.rotary_emb.inv_freq", "transformer.h.1.self_attention.masked_bias"]
    {
        let dir = add(harmless);
        assert!(Checkpoint::open(dir.path()).unwrap().notes().is_empty(), "{harmless}");
    }
    let outside = Checkpoint::open(add("score.weight").path()).unwrap();
    assert_eq!(outside.unused(), ["score.weight"]);
    assert_eq!(outside.notes(), [Note::Ignored(vec!["score.weight".into()])]);
    // The configuration says that there are no biases, and only two layers.
    for inside in ["transformer.h.0.mlp.dense_h_to_4h.bias", "transformer.h.2.ln_attn.weight", "lm_head.bias"] {
        let CheckpointError::Tensors { problems, .. } = Checkpoint::open(add(inside).path()).unwrap_err() else {
            panic!()
        };
        assert_eq!(problems, [TensorProblem::Unexpected { tensor: inside.into() }]);
    }
}

#[test]
fn ffn_projections_share_a_dtype() {
    let dir = changed("opt-125m", |tensors| {
        let (_, dtype, ..) = tensors.iter_mut().find(|(name, ..)| name.ends_with("layers.1.fc2.weight")).unwrap();
        *dtype = Dtype::BF16;
    });
    let CheckpointError::Tensors { problems, .. } = Checkpoint::open(dir.path()).unwrap_err() else { panic!() };
    assert!(matches!(&problems[..], [TensorProblem::Mixed { .. }]), "{problems:?}");
}

#[test]
fn names_without_prefix_are_found() {
    for (name, prefix) in
        [("opt-350m", "model.decoder."), ("opt-untied", "model."), ("falcon-40b-relu", "transformer.")]
    {
        let dir = changed(name, |tensors| {
            for (tensor, ..) in tensors {
                if let Some(bare) = tensor.strip_prefix(prefix) {
                    *tensor = bare.to_owned();
                }
            }
        });
        let bare = Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let full = Checkpoint::open(fixtures().join("quirks").join(name)).unwrap();
        assert_eq!(canonical(&bare), canonical(&full), "{name}");
    }
}

fn rename(config: &mut serde_json::Map<String, Value>, names: &[(&str, &str)]) {
    for (from, to) in names {
        if let Some(value) = config.remove(*from) {
            config.insert((*to).into(), value);
        }
    }
}

/// Falcon as it was called before transformers supported it.
#[test]
fn old_falcon_configurations_are_understood() {
    let old = [("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"), ("num_kv_heads", "n_head_kv")];
    for (name, model_type) in [
        ("falcon-7b-gelu", "RefinedWebModel"),
        ("falcon-rw-gelu", "RefinedWebModel"),
        ("falcon-40b-gelu", "RefinedWeb"),
    ] {
        let dir = quirk(name);
        let new = Checkpoint::open(dir.path()).unwrap();
        set_config(&dir, |config| {
            rename(config, &old);
            // The old 40b code knew no other architecture, so its configuration does not name it.
            config.remove("new_decoder_architecture");
            config.insert("model_type".into(), model_type.into());
            config.insert("architectures".into(), json!(["RWForCausalLM"]));
        });
        let renamed = Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(renamed.spec(), new.spec(), "{name}");
        assert_eq!(canonical(&renamed), canonical(&new), "{name}");
    }
}

fn first_phi_names(tensors: &mut Tensors) {
    let mut joined = Vec::new();
    for layer in 0..2 {
        for kind in ["weight", "bias"] {
            let part = |which: &str| format!("model.layers.{layer}.self_attn.{which}_proj.{kind}");
            let parts = ["q", "k", "v"].map(|which| {
                let at = tensors.iter().position(|tensor| tensor.0 == part(which)).unwrap();
                tensors.remove(at)
            });
            let [mut all, k, v] = parts;
            all.2[0] *= 3;
            all.3.extend(k.3.into_iter().chain(v.3));
            all.0 = format!("transformer.h.{layer}.mixer.Wqkv.{kind}");
            joined.push(all);
        }
    }
    for (name, ..) in tensors.iter_mut() {
        for (from, to) in [
            ("model.embed_tokens", "transformer.embd.wte"),
            ("model.final_layernorm", "lm_head.ln"),
            ("model.layers", "transformer.h"),
            ("self_attn.dense", "mixer.out_proj"),
            ("input_layernorm", "ln"),
            ("lm_head.weight", "lm_head.linear.weight"),
            ("lm_head.bias", "lm_head.linear.bias"),
        ] {
            if name.contains(from) && !(from.starts_with("lm_head") && name.contains("ln")) {
                *name = name.replace(from, to);
            }
        }
    }
    tensors.extend(joined);
}

/// Phi as it was called before transformers supported it: other names, and one projection for queries, keys and values.
#[test]
fn the_first_phi_files_are_understood() {
    let new = Checkpoint::open(fixtures().join("quirks/phi-2-relu")).unwrap();
    let dir = changed("phi-2-relu", first_phi_names);
    set_config(&dir, |config| {
        let names = [
            ("hidden_size", "n_embd"),
            ("num_hidden_layers", "n_layer"),
            ("num_attention_heads", "n_head"),
            ("intermediate_size", "n_inner"),
            ("max_position_embeddings", "n_positions"),
            ("hidden_act", "activation_function"),
            ("layer_norm_eps", "layer_norm_epsilon"),
        ];
        rename(config, &names);
        config.insert("model_type".into(), "phi-msft".into());
        config.insert("rotary_dim".into(), 6.into());
    });
    let old = Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(old.spec(), new.spec());
    assert_eq!(canonical(&old), canonical(&new));
}

#[test]
fn missing_keys_take_the_defaults_of_transformers() {
    let dir = quirk("falcon-7b-gelu");
    let full = Checkpoint::open(dir.path()).unwrap().spec().clone();
    set_config(&dir, |config| {
        let needed = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
        config.retain(|key, _| needed.contains(&key.as_str()));
    });
    assert_eq!(*Checkpoint::open(dir.path()).unwrap().spec(), full);
    assert_eq!(
        (full.layers[0].block, full.ffn().size, full.ffn().activation),
        (Block::ParallelOneNorm, 192, Activation::Gelu)
    );
    assert!(matches!(full.layers[0].positions, Positions::Rotary { theta: 10_000.0, .. }));

    let dir = quirk("opt-125m");
    let full = Checkpoint::open(dir.path()).unwrap().spec().clone();
    set_config(&dir, |config| {
        let needed = [
            "model_type",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "ffn_dim",
            "max_position_embeddings",
        ];
        config.retain(|key, _| needed.contains(&key.as_str()));
    });
    assert_eq!(*Checkpoint::open(dir.path()).unwrap().spec(), full);
}

#[test]
fn the_files_beside_the_configuration_have_their_say() {
    let dir = quirk("opt-125m");
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [2, 50]}"#).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), r#"{"add_bos_token": false}"#).unwrap();
    let spec = Checkpoint::open(dir.path()).unwrap().spec().clone();
    assert_eq!((&spec.eos[..], spec.bos), (&[2, 50][..], None));
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [2, 5000]}"#).unwrap();
    let CheckpointError::Config { path, source } = Checkpoint::open(dir.path()).unwrap_err() else { panic!() };
    assert!(path.ends_with("generation_config.json") && matches!(*source, ConfigError::OutOfRange { .. }));
}

#[test]
fn rope_scaling_is_read_or_refused() {
    let scaled = |value: Value| {
        let dir = quirk("falcon-7b-relu");
        set_config(&dir, |config| _ = config.insert("rope_scaling".into(), value));
        Checkpoint::open(dir.path()).map(|checkpoint| checkpoint.spec().layers[0].positions)
    };
    let linear = scaled(json!({"type": "linear", "factor": 2.0})).unwrap();
    assert!(matches!(linear, Positions::Rotary { scaling: Some(_), .. }), "{linear:?}");
    assert!(matches!(scaled(json!(null)).unwrap(), Positions::Rotary { scaling: None, .. }));
    for refused in [
        json!({"type": "yarn", "factor": 2.0}),
        json!({"type": "linear"}),
        json!({"type": "linear", "factor": -1}),
        json!(7),
    ] {
        assert!(matches!(scaled(refused.clone()), Err(CheckpointError::Config { .. })), "{refused}");
    }
}

#[test]
fn a_file_that_changes_is_noticed() {
    let dir = quirk("opt-125m");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert!(matches!(checkpoint.check_unchanged(), Err(CheckpointError::Changed { .. })));
    file.set_len(5000).unwrap();
    assert!(matches!(checkpoint.check_unchanged(), Err(CheckpointError::Changed { .. })));
    let mut bytes = Vec::new();
    let read = checkpoint.read_ffn_rows(1, FfnMatrix::Down, 0..48, &mut bytes);
    assert!(matches!(read, Err(CheckpointError::Changed { .. })), "{read:?}");
}

#[test]
fn rows_and_names_that_do_not_exist_are_errors() {
    let checkpoint = Checkpoint::open(fixtures().join("quirks/opt-125m")).unwrap();
    let mut bytes = Vec::new();
    #[expect(clippy::reversed_empty_ranges, reason = "a caller's mistake")]
    for rows in [0..193, 192..194, 7..3, usize::MAX - 1..usize::MAX] {
        let read = checkpoint.read_ffn_rows(0, FfnMatrix::Up, rows, &mut bytes);
        assert!(matches!(read, Err(CheckpointError::RowsOutOfRange { rows: 192, .. })));
    }
    checkpoint.read_ffn_rows(0, FfnMatrix::Up, 192..192, &mut bytes).unwrap();
    for (layer, matrix) in [(2, FfnMatrix::Up), (0, FfnMatrix::Gate)] {
        let read = checkpoint.read_ffn_rows(layer, matrix, 0..1, &mut bytes);
        assert!(matches!(read, Err(CheckpointError::UnknownTensor { .. })));
    }
    for name in ["head.weight", "layers.0.ffn.up.weight", ""] {
        assert!(
            matches!(checkpoint.read_resident(name, &mut bytes), Err(CheckpointError::UnknownTensor { .. })),
            "{name}"
        );
    }
}
