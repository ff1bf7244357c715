use std::path::Path;

use half::f16;

use super::*;
use crate::model::*;

const FFN: usize = 13; // not a multiple of 8
const HIDDEN: usize = 4;
const TOKENS: usize = 6;

fn spec() -> ModelSpec {
    let norm = Norm { kind: NormKind::LayerNorm, eps: 1e-5, weight: true, bias: true };
    let layer = LayerSpec {
        norm,
        block: Block::PreNorm,
        attention: Attention { heads: 2, kv_heads: 2, head_dim: 2, qkv_bias: true, out_bias: true, qk_norm: None },
        positions: Positions::None,
        feed_forward: FeedForward::Dense(Ffn {
            size: FFN,
            activation: Activation::Relu,
            gated: false,
            up_activated: false,
            gate_bias: false,
            up_bias: true,
            down_bias: true,
        }),
    };
    ModelSpec {
        family: "opt".into(),
        vocab_size: 50,
        hidden_size: HIDDEN,
        embed_size: HIDDEN,
        max_positions: 8,
        learned_positions: Some(LearnedPositions { offset: 2 }),
        layers: vec![layer; 2],
        final_norm: Some(norm),
        tied_head: true,
        head_bias: false,
        bos: Some(2),
        eos: vec![2],
        thresholds: vec![],
    }
}

fn inputs() -> Vec<f32> {
    (0..TOKENS * HIDDEN).map(|i| i as f32 * 0.5 - 3.0).collect()
}

/// Active: every neuron `n` at token `t` with `(n + t) % 4 == 0`, strength `n + t / 8`.
fn activations() -> Vec<f32> {
    let one = |t: usize, n: usize| if (n + t).is_multiple_of(4) { 1.0 + n as f32 + t as f32 / 8.0 } else { 0.0 };
    (0..TOKENS).flat_map(|t| (0..FFN).map(move |n| one(t, n))).collect()
}

fn create(dir: &Path) -> Recording {
    let info = RecordingInfo { seed: Some(7), ..RecordingInfo::new(spec(), "abc".into()) };
    Recording::create(dir, info, vec![2, 5, 6, 2, 7, 8], vec![0, 4, 6], vec![0, 0, 0, 3, 3, 4], vec![4]).unwrap()
}

fn write_layer(recording: &Recording, layer: usize, blocks: &[usize]) {
    let (inputs, activations) = (inputs(), activations());
    let mut writer = recording.layer_writer(layer).unwrap();
    let mut at = 0;
    for rows in blocks {
        let end = at + rows;
        writer.write(&inputs[at * HIDDEN..end * HIDDEN], &activations[at * FFN..end * FFN], None).unwrap();
        at = end;
    }
    writer.finish(&[0.5; FFN]).unwrap();
}

fn written() -> (tempfile::TempDir, Recording) {
    let dir = tempfile::tempdir().unwrap();
    let recording = create(dir.path());
    write_layer(&recording, 0, &[1, 3, 2]);
    (dir, recording)
}

#[test]
fn what_is_written_is_read() {
    let (dir, _) = written();
    let recording = Recording::open(dir.path()).unwrap();
    assert_eq!(recording.info().documents, 3);
    assert_eq!(recording.info().seed, Some(7));
    assert_eq!(recording.sequences().collect::<Vec<_>>(), [0..4, 4..6]);
    assert_eq!(recording.tokens(), [2, 5, 6, 2, 7, 8]);
    assert!(recording.says_what_is_held_out());
    let one = |range| std::iter::once(range).collect::<Vec<_>>();
    assert_eq!((&recording.split().training, &recording.split().held_out), (&one(0..5), &one(5..6)));
    assert!(recording.has_layer(0) && !recording.has_layer(1));
    let mut layer = recording.layer(0).unwrap();
    let (expected_inputs, activations) = (inputs(), activations());
    let mut block = vec![f16::ZERO; 3 * HIDDEN];
    layer.read_inputs(2..5, &mut block).unwrap();
    assert_eq!(block.iter().map(|v| v.to_f32()).collect::<Vec<_>>(), expected_inputs[2 * HIDDEN..5 * HIDDEN]);
    for t in 0..TOKENS {
        let row = &activations[t * FFN..(t + 1) * FFN];
        let active: Vec<_> = (0..FFN).filter(|&n| row[n] != 0.0).collect();
        assert_eq!(layer.active(t).collect::<Vec<_>>(), active, "token {t}");
        let strong: Vec<_> = layer.magnitudes(t).iter().map(|v| v.to_f32()).collect();
        assert_eq!(strong, active.iter().map(|&n| row[n]).collect::<Vec<_>>(), "token {t}");
    }
    // Neuron 4 is active at tokens 0 and 4.
    let summary = layer.summary();
    assert_eq!((summary.active_count[4], summary.magnitude_mean[4], summary.magnitude_max[4]), (2, 5.25, 5.5));
    assert_eq!(summary.down_norms, [0.5; FFN]);
}

#[test]
fn blocks_do_not_change_the_bytes() {
    let (dir, recording) = written();
    let first = std::fs::read(recording.layer_path(0)).unwrap();
    write_layer(&recording, 0, &[6]);
    assert!(first == std::fs::read(recording.layer_path(0)).unwrap());
    // The safetensors crate itself agrees that this is a whole file.
    safetensors::SafeTensors::deserialize(&first).unwrap();
    drop(dir);
}

#[test]
fn gates_decide_activity_and_products_the_magnitude() {
    let dir = tempfile::tempdir().unwrap();
    let recording = create(dir.path());
    let mut writer = recording.layer_writer(1).unwrap();
    let products: Vec<f32> = activations().iter().map(|a| a * -2.0).collect();
    writer.write(&inputs(), &activations(), Some(&products)).unwrap();
    writer.finish(&[1.0; FFN]).unwrap();
    let layer = recording.layer(1).unwrap();
    assert_eq!(layer.magnitudes(0)[1].to_f32(), 10.0);
}

#[test]
fn large_inputs_saturate() {
    let dir = tempfile::tempdir().unwrap();
    let recording = create(dir.path());
    let mut writer = recording.layer_writer(0).unwrap();
    let mut large = inputs();
    large[0] = 1e9;
    writer.write(&large, &activations(), None).unwrap();
    writer.finish(&[1.0; FFN]).unwrap();
    let mut row = [f16::ZERO; HIDDEN];
    recording.layer(0).unwrap().read_inputs(0..1, &mut row).unwrap();
    assert_eq!(row[0], f16::MAX);
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let (dir, recording) = written();
    let before = std::fs::read_dir(dir.path()).unwrap().count();
    let mut writer = recording.layer_writer(1).unwrap();
    writer.write(&inputs()[..HIDDEN], &activations()[..FFN], None).unwrap();
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), before);
    let early = recording.layer_writer(1).unwrap().finish(&[1.0; FFN]);
    assert!(matches!(early, Err(RecordingError::TokenCount { expected: 6, found: 0, .. })), "{early:?}");
}

#[test]
fn wrong_blocks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let recording = create(dir.path());
    let mut writer = recording.layer_writer(0).unwrap();
    let (inputs, activations) = (inputs(), activations());
    let cases: [(&str, Result<(), RecordingError>); 5] = [
        ("half a row", writer.write(&inputs[..HIDDEN + 1], &activations[..FFN], None)),
        ("activations too short", writer.write(&inputs[..2 * HIDDEN], &activations[..FFN], None)),
        ("products too short", writer.write(&inputs[..HIDDEN], &activations[..FFN], Some(&[1.0]))),
        ("too many tokens", writer.write(&inputs.repeat(2), &activations.repeat(2), None)),
        ("not finite", writer.write(&[f32::NAN; HIDDEN], &activations[..FFN], None)),
    ];
    for (what, result) in cases {
        assert!(result.is_err(), "{what}");
    }
    assert!(matches!(recording.layer_writer(2), Err(RecordingError::NoSuchLayer { layer: 2, layers: 2 })));
}

/// Replaces text in the padded header of a tensor file, keeping its length.
fn edit_header(path: &Path, from: &str, to: &str) {
    let mut bytes = std::fs::read(path).unwrap();
    let header = String::from_utf8(bytes[8..4096].to_vec()).unwrap();
    assert!(header.contains(from), "{from} in {header}");
    let mut changed = header.replace(from, to).trim_end().to_string();
    changed.push_str(&" ".repeat(4088 - changed.len()));
    bytes[8..4096].copy_from_slice(changed.as_bytes());
    std::fs::write(path, unsealed(bytes)).unwrap();
}

/// Without the checksums that would notice any change: what is after them has to hold as well.
fn unsealed(mut bytes: Vec<u8>) -> Vec<u8> {
    for key in ["\"seal\"", "\"info\""] {
        if let Some(at) = bytes.windows(6).position(|word| word == key.as_bytes()) {
            bytes[at + 1] = b'_';
        }
    }
    bytes
}

fn edit_bytes(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, unsealed(bytes)).unwrap();
}

#[test]
fn whole_recordings_are_sealed() {
    let (dir, recording) = written();
    let flip = |path: &Path, at: usize| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    flip(&recording.layer_path(0), INPUTS + 8);
    assert!(matches!(recording.layer(0), Err(RecordingError::Damaged { .. })));
    let json = dir.path().join(INFO_FILE);
    // Another number of positions, as good as the true one.
    let text = std::fs::read_to_string(&json).unwrap();
    flip(&json, text.find("\"max_positions\": ").unwrap() + "\"max_positions\": ".len());
    let error = Recording::open(dir.path()).unwrap_err();
    assert!(matches!(&error, RecordingError::Damaged { path, .. } if path.ends_with(INFO_FILE)), "{error:?}");
}

const SUMMARY: usize = FFN * 4;
const INPUTS: usize = 4096 + 4 * SUMMARY;
const ACTIVITY: usize = INPUTS + TOKENS * HIDDEN * 2;

#[test]
fn hostile_layers_are_refused() {
    type Case = (&'static str, fn(&Path), fn(&RecordingError) -> bool);
    let cases: &[Case] = &[
        ("empty", |p| std::fs::write(p, []).unwrap(), |e| matches!(e, RecordingError::Layout { found: 0, .. })),
        (
            "header longer than the file",
            |p| edit_bytes(p, |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes())),
            |e| matches!(e, RecordingError::Layout { what: "header length, at most", .. }),
        ),
        ("cut", |p| edit_bytes(p, |b| b.truncate(b.len() - 1)), |e| matches!(e, RecordingError::Layout { .. })),
        ("longer", |p| edit_bytes(p, |b| b.push(0)), |e| matches!(e, RecordingError::Layout { .. })),
        ("no JSON", |p| edit_bytes(p, |b| b[8] = b'x'), |e| matches!(e, RecordingError::Json { .. })),
        (
            "another format",
            |p| edit_header(p, FORMAT_LAYER, "something-else"),
            |e| matches!(e, RecordingError::Format { .. }),
        ),
        (
            "a later version",
            |p| edit_header(p, r#""version":"2""#, r#""version":"3""#),
            |e| matches!(e, RecordingError::TooNew { found: 3, .. }),
        ),
        (
            "no version",
            |p| edit_header(p, r#""version":"2""#, r#""version":"x""#),
            |e| matches!(e, RecordingError::Version { found: None, .. }),
        ),
        (
            "another recording",
            |p| edit_header(p, r#""recording":"abc""#, r#""recording":"abd""#),
            |e| matches!(e, RecordingError::Mixed { .. }),
        ),
        (
            "another layer",
            |p| edit_header(p, r#""layer":"0""#, r#""layer":"1""#),
            |e| matches!(e, RecordingError::WrongLayer { expected: 0, .. }),
        ),
        (
            "a missing tensor",
            |p| edit_header(p, "down_norms", "down_normz"),
            |e| matches!(e, RecordingError::MissingTensor { name: "down_norms", .. }),
        ),
        (
            "another shape",
            |p| edit_header(p, r#""shape":[6,4]"#, r#""shape":[4,6]"#),
            |e| matches!(e, RecordingError::TensorShape { name: "inputs", .. }),
        ),
        (
            "another type",
            |p| edit_header(p, r#""F16","shape":[6"#, r#""I16","shape":[6"#),
            |e| matches!(e, RecordingError::TensorShape { name: "inputs", .. }),
        ),
        (
            "overlapping tensors",
            |p| edit_header(p, r#""data_offsets":[0,52]"#, r#""data_offsets":[4,52]"#),
            |e| matches!(e, RecordingError::Json { .. }),
        ),
        (
            "a bit beyond the last neuron",
            |p| edit_bytes(p, |b| b[ACTIVITY + 1] |= 0x80),
            |e| matches!(e, RecordingError::Activity { what: "bits beyond the last neuron", at: 0, found: 0x80, .. }),
        ),
        (
            "one active neuron more",
            |p| edit_bytes(p, |b| b[ACTIVITY] |= 2),
            |e| matches!(e, RecordingError::Activity { what: "number of magnitudes", .. }),
        ),
        (
            "another neuron active",
            |p| edit_bytes(p, |b| b[ACTIVITY] ^= 3),
            |e| matches!(e, RecordingError::Activity { what: "active_count", at: 0, .. }),
        ),
        (
            "a magnitude not finite",
            |p| edit_bytes(p, |b| *b.last_mut().unwrap() = 0x7c),
            |e| matches!(e, RecordingError::NotFinite { what: "magnitudes", .. }),
        ),
        (
            "a negative norm",
            |p| edit_bytes(p, |b| b[INPUTS - 1] |= 0x80),
            |e| matches!(e, RecordingError::NotFinite { what: "down_norms", at: 12, .. }),
        ),
    ];
    for (what, damage, expected) in cases {
        let (_dir, recording) = written();
        damage(&recording.layer_path(0));
        match recording.layer(0) {
            Ok(_) => panic!("{what}: opened"),
            Err(e) => assert!(expected(&e), "{what}: {e:?}"),
        }
    }
}

#[test]
fn an_input_that_is_not_finite_is_refused_when_read() {
    let (_dir, recording) = written();
    edit_bytes(&recording.layer_path(0), |b| b[INPUTS + 9] = 0x7e);
    let mut layer = recording.layer(0).unwrap();
    let mut row = [f16::ZERO; HIDDEN];
    layer.read_inputs(0..1, &mut row).unwrap();
    let result = layer.read_inputs(1..2, &mut row);
    assert!(matches!(result, Err(RecordingError::NotFinite { what: "inputs", at: 4, .. })), "{result:?}");
}

#[test]
fn hostile_tokens_are_refused() {
    type Lie = (&'static str, Vec<u32>, Vec<u32>, Vec<u32>, Vec<u32>);
    let lies: [Lie; 13] = [
        ("nothing", vec![], vec![0], vec![], vec![]),
        ("an id beyond the vocabulary", vec![2, 50], vec![0, 2], vec![0, 0], vec![]),
        ("no sequence", vec![2, 3], vec![], vec![0, 0], vec![]),
        ("a first sequence that begins late", vec![2, 3], vec![1, 2], vec![0, 0], vec![]),
        ("an empty sequence", vec![2, 3], vec![0, 0, 2], vec![0, 0], vec![]),
        ("a sequence that ends early", vec![2, 3], vec![0, 1], vec![0, 0], vec![]),
        ("a sequence that ends late", vec![2, 3], vec![0, 3], vec![0, 0], vec![]),
        ("documents going back", vec![2, 3], vec![0, 2], vec![1, 0], vec![]),
        ("documents missing", vec![2, 3], vec![0, 2], vec![0], vec![]),
        ("everything held out", vec![2, 3], vec![0, 2], vec![0, 1], vec![0, 1]),
        ("a document that is not there held out", vec![2, 3], vec![0, 2], vec![0, 2], vec![1]),
        ("a document held out twice", vec![2, 3], vec![0, 2], vec![0, 2], vec![2, 2]),
        ("documents held out in disorder", vec![2, 3, 4], vec![0, 3], vec![0, 1, 2], vec![1, 0]),
    ];
    for (what, tokens, sequences, documents, held_out) in lies {
        let dir = tempfile::tempdir().unwrap();
        let info = RecordingInfo::new(spec(), "abc".into());
        let result = Recording::create(dir.path(), info, tokens, sequences, documents, held_out);
        assert!(result.is_err(), "{what}");
    }
}

#[test]
fn hostile_infos_are_refused() {
    let edit = |from: &str, to: &str| {
        let (dir, _) = written();
        let path = dir.path().join(INFO_FILE);
        let json = std::fs::read_to_string(&path).unwrap();
        assert!(json.contains(from), "{json}");
        std::fs::write(&path, json.replace(from, to)).unwrap();
        edit_bytes(&dir.path().join(TOKENS_FILE), |_| ());
        Recording::open(dir.path()).unwrap_err()
    };
    let error = edit(r#""version": 2"#, r#""version": 9, "more": 1"#);
    assert!(matches!(error, RecordingError::TooNew { found: 9, newest: 2, .. }), "{error:?}");
    let error = edit(r#""format": "flashlm-recording""#, r#""format": "x""#);
    assert!(matches!(error, RecordingError::Format { .. }), "{error:?}");
    let error = edit(r#""tokens": 6"#, r#""tokens": 18446744073709551615"#);
    assert!(matches!(error, RecordingError::TensorShape { name: "tokens", .. }), "{error:?}");
    let error = edit(r#""sequences": 2"#, r#""sequences": 18446744073709551615"#);
    assert!(matches!(error, RecordingError::TensorShape { name: "sequences", .. }), "{error:?}");
    let error = edit(r#""documents": 3"#, r#""documents": 2"#);
    assert!(matches!(error, RecordingError::Tokens { what: "documents", .. }), "{error:?}");
    let error = edit(r#""sequence_tokens": 4"#, r#""sequence_tokens": 3"#);
    assert!(matches!(error, RecordingError::Tokens { what: "sequences", .. }), "{error:?}");
    let error = edit(r#""hidden_size": 4"#, r#""hidden_size": 0"#);
    assert!(matches!(error, RecordingError::Empty { hidden: 0, .. }), "{error:?}");
    for (from, to, what) in [
        (r#""heads": 2"#, r#""heads": 1152921504606846976"#, "layer 0: attention.heads"),
        (r#""vocab_size": 50"#, r#""vocab_size": 9223372036854775808"#, "vocab_size"),
    ] {
        let error = edit(from, to);
        assert!(matches!(&error, RecordingError::Model { fault, .. } if fault.what == what), "{error:?}");
    }
    let error = edit(r#""repeat": 2"#, r#""repeat": 1152921504606846976"#);
    let RecordingError::Json { source, .. } = &error else { panic!("{error:?}") };
    assert!(source.to_string().contains("layers: 1 to 16384 layers expected, found 1152921504606846976"), "{source}");
    let error = edit(r#""id": "abc""#, r#""id": "abd""#);
    assert!(matches!(error, RecordingError::Mixed { .. }), "{error:?}");
    let error = edit("{", "");
    assert!(matches!(error, RecordingError::Json { .. }), "{error:?}");
}

#[test]
fn a_recording_made_with_pytorch_opens() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/recording-tiny-opt");
    let recording = Recording::open(&dir).unwrap();
    assert_eq!((recording.tokens().len(), recording.info().sequences), (129, 3));
    // Of version 1, which does not say what is held out: the rule does.
    assert!(!recording.says_what_is_held_out());
    let split = recording.split();
    assert_eq!(Split::tokens(&split.training) + Split::tokens(&split.held_out), 129);
    assert!((6..=19).contains(&Split::tokens(&split.held_out)), "{split:?}");
    for layer in 0..2 {
        let mut layer = recording.layer(layer).unwrap();
        let mut inputs = vec![f16::ZERO; 129 * layer.hidden()];
        layer.read_inputs(0..129, &mut inputs).unwrap();
        assert!(inputs.iter().any(|v| v.to_f32().abs() > 0.1));
    }
    let shares = [0, 1].map(|l| recording.layer(l).unwrap().active_fraction());
    assert!(shares[0] > 0.1 && shares[1] < 0.03, "{shares:?}");
}

#[test]
fn the_document_tells_the_layout() {
    let document = include_str!("../../../docs/recording-format.md");
    let (_dir, recording) = written();
    let bytes = std::fs::read(recording.layer_path(0)).unwrap();
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()), 4088);
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..4096]).unwrap();
    let mut at = 0;
    for (name, size) in [
        ("active_count", 4 * FFN),
        ("magnitude_mean", 4 * FFN),
        ("magnitude_max", 4 * FFN),
        ("down_norms", 4 * FFN),
        ("inputs", 2 * TOKENS * HIDDEN),
        ("activity", TOKENS * FFN.div_ceil(8)),
    ] {
        assert_eq!(header[name]["data_offsets"], serde_json::json!([at, at + size]), "{name}");
        at += size;
        let line = document.rfind(&format!(" {name}\n")).expect("each region stands in the diagram");
        let next = document.rfind(" magnitudes\n").unwrap();
        assert!(line < next, "{name} before the magnitudes");
    }
}
