//! Every kind of every family, as miniature checkpoints: the configuration is understood, and each canonical tensor holds
//! the rows it should, worked out here a second time from the stored file.

use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::{Checkpoint, FAMILY_INFOS, FfnMatrix, Format, Note};
use flashlm_formats::model::{Activation, Block, DType, LearnedPositions, ModelSpec, NormKind, Positions, RopeScaling};
use safetensors::SafeTensors;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn quirk(name: &str) -> PathBuf {
    root().join("tests/fixtures/quirks").join(name)
}

fn quirks() -> Vec<String> {
    let entries = std::fs::read_dir(quirk("")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() >= 15, "{names:?}");
    names
}

fn resident(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    let mut bytes = vec![1, 2, 3];
    checkpoint.read_resident(name, &mut bytes).unwrap();
    bytes
}

#[test]
fn every_quirk_opens_and_every_canonical_tensor_reads() {
    for name in quirks() {
        let checkpoint = Checkpoint::open(quirk(&name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let spec = checkpoint.spec();
        let mut total = 0;
        for tensor in spec.resident_tensors() {
            let info = checkpoint.resident(&tensor.name).unwrap();
            assert_eq!(info.shape, tensor.shape, "{name}: {}", tensor.name);
            let bytes = resident(&checkpoint, &tensor.name);
            assert_eq!(bytes.len(), tensor.shape.iter().product::<usize>() * info.dtype.bytes());
            total += bytes.len();
        }
        for layer in 0..spec.layers.len() {
            let mut matrices = vec![
                (FfnMatrix::Up, spec.ffn().size, spec.hidden_size),
                (FfnMatrix::Down, spec.hidden_size, spec.ffn().size),
            ];
            if spec.ffn().gated {
                matrices.push((FfnMatrix::Gate, spec.ffn().size, spec.hidden_size));
            }
            for (matrix, rows, columns) in matrices {
                let (mut whole, mut part) = (Vec::new(), Vec::new());
                checkpoint.read_ffn_rows(layer, matrix, 0..rows, &mut whole).unwrap();
                assert_eq!(whole.len(), rows * columns * checkpoint.ffn_dtype().bytes());
                checkpoint.read_ffn_rows(layer, matrix, 3..7, &mut part).unwrap();
                let row = columns * checkpoint.ffn_dtype().bytes();
                assert_eq!(part, whole[3 * row..7 * row]);
                total += whole.len();
            }
        }
        assert_eq!(checkpoint.model_bytes(), total as u64, "{name}: every stored tensor is used once");
        match name.as_str() {
            "llama-bamboo" | "llama-mistral-window" => {
                assert_eq!(checkpoint.notes(), [Note::SlidingWindow { stated: 128, taken: 64 }], "{name}");
            }
            _ => assert!(checkpoint.notes().is_empty(), "{name}: {:?}", checkpoint.notes()),
        }
        checkpoint.check_unchanged().unwrap();
    }
}

/// The configuration as published and as transformers 5 writes it say the same.
#[test]
fn both_generations_of_configuration_agree() {
    for name in quirks() {
        let old = Checkpoint::open(quirk(&name)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(quirk(&name).join("config.v5.json"), dir.path().join("config.json")).unwrap();
        std::fs::copy(quirk(&name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let new = Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(old.spec(), new.spec(), "{name}");
    }
}

fn spec(name: &str) -> ModelSpec {
    Checkpoint::open(quirk(name)).unwrap().spec().clone()
}

#[test]
fn each_quirk_is_seen_in_the_spec() {
    let opt = spec("opt-125m");
    assert_eq!(
        (opt.layers[0].block, opt.final_norm.is_some(), opt.tied_head, opt.bos, &opt.eos[..]),
        (Block::PreNorm, true, true, Some(2), &[2][..])
    );
    assert_eq!((opt.max_positions, opt.learned_positions), (128, Some(LearnedPositions { offset: 2 })));
    let opt = spec("opt-350m");
    assert_eq!(
        (opt.layers[0].block, opt.final_norm.is_some(), opt.embed_size, opt.hidden_size),
        (Block::PostNorm, false, 24, 48)
    );
    let opt = spec("opt-no-bias");
    assert_eq!((opt.layers[0].norm.weight, opt.ffn().up_bias, opt.attention().qkv_bias), (false, false, false));
    assert!(spec("opt-no-final-norm").final_norm.is_none());
    assert!(!spec("opt-untied").tied_head);
    assert_eq!(Checkpoint::open(quirk("opt-no-bias")).unwrap().ffn_dtype(), DType::F32);

    let falcon = spec("falcon-7b-relu");
    assert_eq!(
        (falcon.layers[0].block, falcon.attention().kv_heads, falcon.bos, &falcon.eos[..]),
        (Block::ParallelOneNorm, 1, None, &[11][..])
    );
    assert_eq!(spec("falcon-7b-gelu").ffn().activation, Activation::Gelu);
    let falcon = spec("falcon-7b-theta");
    assert!(matches!(falcon.layers[0].positions, Positions::Rotary { dims: 12, theta: 500_042.0, scaling: None }));
    assert_eq!((falcon.ffn().size, falcon.ffn().up_bias), (120, true));
    let falcon = spec("falcon-40b-relu");
    assert_eq!(
        (falcon.layers[0].block, falcon.attention().heads, falcon.attention().kv_heads),
        (Block::ParallelTwoNorms, 8, 2)
    );
    assert_eq!(spec("falcon-11b-one-norm").layers[0].block, Block::ParallelOneNorm);
    let falcon = spec("falcon-rw-relu-6heads");
    assert_eq!(
        (falcon.layers[0].block, falcon.layers[0].positions, falcon.attention().kv_heads),
        (Block::PreNorm, Positions::Alibi, 6)
    );
    assert_eq!(spec("falcon-mha-parallel").attention().kv_heads, 4);

    let llama = spec("llama-relu-gqa");
    assert_eq!(
        (llama.layers[0].block, llama.layers[0].norm.kind, llama.layers[0].norm.bias),
        (Block::PreNorm, NormKind::RmsNorm, false)
    );
    assert_eq!((llama.attention().heads, llama.attention().kv_heads, llama.attention().qkv_bias), (8, 2, false));
    assert!(llama.ffn().gated && !llama.ffn().up_activated && !llama.tied_head);
    assert_eq!((llama.ffn().activation, llama.bos, &llama.eos[..]), (Activation::Relu, Some(1), &[2][..]));
    let llama = spec("llama-relu2-tied-mha");
    assert_eq!((llama.ffn().activation, llama.tied_head, llama.attention().kv_heads), (Activation::Relu2, true, 8));
    let llama = spec("llama3-relu-ropescaled");
    assert!(matches!(
        llama.layers[0].positions,
        Positions::Rotary { dims: 6, scaling: Some(RopeScaling::Llama3 { .. }), .. }
    ));
    let llama = spec("llama-biases-head-dim");
    assert_eq!((llama.attention().head_dim, llama.attention().out_bias), (10, true));
    assert!(llama.ffn().gate_bias && llama.ffn().up_bias && llama.ffn().down_bias);
    assert!(matches!(
        llama.layers[0].positions,
        Positions::Rotary { scaling: Some(RopeScaling::Linear { factor: 4.0 }), .. }
    ));
    assert_eq!(spec("llama-prosparse").ffn().activation, Activation::FatRelu(0.3));
    let bamboo = spec("llama-bamboo");
    assert!(bamboo.ffn().up_activated && bamboo.ffn().activation == Activation::Relu && bamboo.max_positions == 64);
    let qwen = spec("llama-qwen2");
    assert_eq!((qwen.attention().qkv_bias, qwen.attention().out_bias, qwen.bos), (true, false, None));
    assert_eq!(qwen.max_positions, 128, "its window is switched off");

    let persimmon = spec("persimmon-relu2");
    assert!(persimmon.attention().qk_norm.is_some() && spec("persimmon-no-qknorm").attention().qk_norm.is_none());
    assert!(matches!(persimmon.layers[0].positions, Positions::Rotary { dims: 6, theta: 25_000.0, .. }));
    let phi = spec("phi-2-relu");
    assert_eq!(
        (phi.layers[0].block, phi.head_bias, phi.tied_head, phi.bos),
        (Block::ParallelOneNorm, true, false, None)
    );
    assert!(matches!(phi.layers[0].positions, Positions::Rotary { dims: 6, .. }));
    let neox = spec("gpt_neox-parallel");
    assert_eq!((neox.layers[0].block, neox.attention().qkv_bias), (Block::ParallelTwoNorms, true));
    assert!(matches!(neox.layers[0].positions, Positions::Rotary { dims: 4, .. }));
    let neox = spec("gpt_neox-sequential");
    assert_eq!((neox.layers[0].block, neox.attention().qkv_bias, neox.ffn().up_bias), (Block::PreNorm, false, true));
}

#[test]
fn as_many_references_as_the_families_claim() {
    for info in FAMILY_INFOS {
        let count = quirks().iter().filter(|name| spec(name).family == info.name).count();
        assert_eq!(count, info.references, "{}", info.name);
    }
}

/// Code of its own that nobody here knows is named, and not taken for granted.
#[test]
fn unknown_code_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let from = quirk("llama-relu-gqa");
    std::fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    for (class, noted) in [("LlamaForCausalLM", false), ("TwistedLlamaForCausalLM", true)] {
        let own = format!(r#"{{"auto_map": {{"AutoModelForCausalLM": "modeling.{class}"}}, "#);
        let config = config.replacen('{', &own, 1).replace("LlamaForCausalLM\"\n", &format!("{class}\"\n"));
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let notes = Checkpoint::open(dir.path()).unwrap().notes().to_vec();
        let expected = Note::CustomCode { class: class.into(), family: "llama" };
        assert_eq!(notes, if noted { vec![expected] } else { vec![] });
    }
}

/// Falcon's and its kin's fused projection, reordered head by head with plain indexing.
#[test]
fn fused_projections_become_queries_keys_values() {
    for (name, queries_per_group, fused) in [
        ("falcon-40b-relu", 4, "transformer.h.1.self_attention"),
        ("falcon-rw-relu-6heads", 1, "transformer.h.1.self_attention"),
        ("falcon-mha-parallel", 1, "transformer.h.1.self_attention"),
        ("falcon-7b-theta", 4, "transformer.h.1.self_attention"),
        ("persimmon-relu2", 1, "model.layers.1.self_attn"),
        ("gpt_neox-parallel", 1, "gpt_neox.layers.1.attention"),
    ] {
        let checkpoint = Checkpoint::open(quirk(name)).unwrap();
        let file = std::fs::read(quirk(name).join("model.safetensors")).unwrap();
        let stored = SafeTensors::deserialize(&file).unwrap();
        let attention = checkpoint.spec().attention();
        for kind in ["weight", "bias"] {
            let Ok(fused) = stored.tensor(&format!("{fused}.query_key_value.{kind}")) else {
                assert!(!attention.qkv_bias);
                continue;
            };
            let head = fused.data().len() / (attention.heads + 2 * attention.kv_heads);
            let stored_head = |index: usize| &fused.data()[index * head..(index + 1) * head];
            let mut expected: Vec<u8> = Vec::new();
            for query in 0..attention.heads {
                expected.extend(stored_head(
                    query / queries_per_group * (queries_per_group + 2) + query % queries_per_group,
                ));
            }
            for which in 0..2 {
                for group in 0..attention.kv_heads {
                    expected.extend(stored_head(group * (queries_per_group + 2) + queries_per_group + which));
                }
            }
            let canonical = format!("layers.1.attention.qkv.{kind}");
            assert_eq!(resident(&checkpoint, &canonical), expected, "{name} {canonical}");
            // A range that begins and ends inside parts.
            let row = expected.len() / attention.qkv_size();
            let mut some = Vec::new();
            checkpoint.read_resident_rows(&canonical, 5..attention.qkv_size() - 3, &mut some).unwrap();
            assert_eq!(some, expected[5 * row..expected.len() - 3 * row]);
        }
    }
}

#[test]
fn opt_projections_are_joined_in_order() {
    let checkpoint = Checkpoint::open(quirk("opt-125m")).unwrap();
    let file = std::fs::read(quirk("opt-125m").join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&file).unwrap();
    let tensor = |name: &str| stored.tensor(&format!("model.decoder.{name}")).unwrap().data().to_vec();
    let qkv = ["q", "k", "v"].map(|which| tensor(&format!("layers.1.self_attn.{which}_proj.weight"))).concat();
    assert_eq!(resident(&checkpoint, "layers.1.attention.qkv.weight"), qkv);
    assert_eq!(resident(&checkpoint, "layers.1.ffn_norm.bias"), tensor("layers.1.final_layer_norm.bias"));
    assert_eq!(resident(&checkpoint, "final_norm.bias"), tensor("final_layer_norm.bias"));
    assert_eq!(resident(&checkpoint, "embed.positions"), tensor("embed_positions.weight"));
    let mut up = Vec::new();
    checkpoint.read_ffn_rows(1, FfnMatrix::Up, 0..192, &mut up).unwrap();
    assert_eq!(up, tensor("layers.1.fc1.weight"));
    let mut down = Vec::new();
    checkpoint.read_ffn_rows(1, FfnMatrix::Down, 0..48, &mut down).unwrap();
    assert_eq!(down, tensor("layers.1.fc2.weight"));
}

#[test]
fn the_trained_examples_open() {
    let opt = Checkpoint::open(root().join("examples/tiny-opt")).unwrap();
    assert_eq!((opt.format(), opt.spec().layers.len(), opt.ffn_dtype()), (Format::Safetensors, 8, DType::F16));
    assert_eq!(opt.model_bytes(), 2 * 7_498_752, "the parameters that its model card names, in half precision");
    let names: Vec<String> = opt.files().into_iter().map(|file| file.name).collect();
    assert_eq!(names, ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"]);
    let falcon = Checkpoint::open(root().join("tests/fixtures/tiny-falcon")).unwrap();
    assert_eq!((falcon.spec().layers.len(), falcon.spec().bos), (6, None));
}
