//! Checkpoints that lie: each lie is a typed error that says what was expected and found, and none is a panic.

use std::fs;
use std::io::{Cursor, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::{
    Checkpoint, CheckpointError, ConfigError, FfnMatrix, Foreign, IndexError, SafetensorsError, TensorProblem,
    TorchError,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures")
}

fn fixture(path: &str) -> Vec<u8> {
    fs::read(fixtures().join(path)).unwrap()
}

/// A directory with these files beside the configuration of opt-125m.
fn directory<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), fixture("quirks/opt-125m/config.json")).unwrap();
    for (name, content) in files {
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn open(dir: &TempDir) -> CheckpointError {
    Checkpoint::open(dir.path()).expect_err("a lie was believed")
}

fn open_with(name: &str, content: &[u8]) -> CheckpointError {
    open(&directory([(name, content)]))
}

/// Every message names a file or directory, and says more than that.
fn check_message(error: &CheckpointError) {
    let message = error.to_string();
    assert!(message.len() > 30 && message.contains('/'), "{message}");
}

// ---------------------------------------------------------------------------------------------------- what is in the directory

#[test]
fn other_formats_are_named_with_a_way_out() {
    for (name, expected) in [
        ("model-q4.gguf", Foreign::Gguf),
        ("flax_model.msgpack", Foreign::Flax),
        ("tf_model.h5", Foreign::TensorFlow),
        ("consolidated.00.pth", Foreign::OriginalTorch),
        ("adapter_model.safetensors", Foreign::Adapter),
        ("model.onnx", Foreign::Onnx),
        ("model-00001-of-00002.safetensors", Foreign::ShardsWithoutIndex),
    ] {
        let error = open_with(name, b"x");
        check_message(&error);
        assert!(matches!(error, CheckpointError::OtherFormat { found, .. } if found == expected), "{name}: {error}");
        // The same where even the configuration is absent, as beside GGUF files.
        let dir = directory([(name, &b"x"[..])]);
        fs::remove_file(dir.path().join("config.json")).unwrap();
        assert!(matches!(open(&dir), CheckpointError::OtherFormat { found, .. } if found == expected), "{name}");
    }
    let error = open_with("README.md", b"x");
    assert!(
        matches!(&error, CheckpointError::NoWeights { found, .. } if found == &["README.md", "config.json"]),
        "{error}"
    );
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(open(&empty), CheckpointError::NoConfig { .. }));
    let missing = Checkpoint::open(empty.path().join("nowhere")).unwrap_err();
    assert!(matches!(missing, CheckpointError::NotADirectory { .. }), "{missing}");
}

#[test]
fn files_are_not_what_their_names_say() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 13316063421\n";
    let legacy = fixture("torch/legacy/pytorch_model.bin");
    // The format before that one.
    let tar = [&b"sys_info"[..], &[0; 249], b"ustar\x0000", &[0; 248]].concat();
    for (content, expected) in [
        (&b""[..], Foreign::Empty),
        (pointer, Foreign::GitLfsPointer),
        (b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>", Foreign::Html),
        (b"\n <HTML>Sign in</HTML>", Foreign::Html),
        (b"GGUF\x03\x00\x00\x00aaaaaaaaaaaaaaaaaaaaaaaaaaaa", Foreign::Gguf),
        (&legacy, Foreign::LegacyTorch),
        (&tar, Foreign::LegacyTorch),
        (b"Access to model is restricted. Log in to your account to go on.", Foreign::Unknown),
    ] {
        for name in ["model.safetensors", "pytorch_model.bin"] {
            let error = open_with(name, content);
            check_message(&error);
            assert!(matches!(error, CheckpointError::Foreign { found, .. } if found == expected), "{name}: {error}");
        }
    }
    let zip = fixture("torch/plain/pytorch_model.bin");
    assert!(matches!(open_with("model.safetensors", &zip), CheckpointError::Foreign { found: Foreign::Zip, .. }));
    let good = fixture("quirks/opt-125m/model.safetensors");
    let renamed = open_with("pytorch_model.bin", &good);
    assert!(matches!(renamed, CheckpointError::Foreign { found: Foreign::Safetensors, .. }), "{renamed}");
    assert!(matches!(
        open_with("config.json", pointer),
        CheckpointError::Foreign { found: Foreign::GitLfsPointer, .. }
    ));
}

#[test]
fn only_regular_files_are_read() {
    for name in ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"] {
        for what in ["/dev/zero", "/dev/full", "/tmp"] {
            let dir = directory([]);
            _ = fs::remove_file(dir.path().join(name));
            symlink(what, dir.path().join(name)).unwrap();
            let error = open(&dir);
            assert!(matches!(error, CheckpointError::NotRegular { .. }), "{name} -> {what}: {error}");
        }
        let dir = directory([]);
        _ = fs::remove_file(dir.path().join(name));
        let made = std::process::Command::new("mkfifo").arg(dir.path().join(name)).status().unwrap();
        assert!(made.success());
        assert!(matches!(open(&dir), CheckpointError::NotRegular { kind: "a pipe", .. }), "{name}");
        let dir = directory([]);
        _ = fs::remove_file(dir.path().join(name));
        symlink("nowhere", dir.path().join(name)).unwrap();
        assert!(Checkpoint::open(dir.path()).is_err(), "{name}: a dangling link");
    }
}

#[test]
fn small_files_are_bounded() {
    let dir = directory([]);
    fs::File::create(dir.path().join("config.json")).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(open(&dir), CheckpointError::TooLarge { bytes: 0x100_0000_0000, .. }));
}

// ---------------------------------------------------------------------------------------------------- safetensors

fn safetensors_with(claimed: u64, header: &str, data: usize) -> Vec<u8> {
    [&claimed.to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn safetensors_headers_that_lie() {
    let lie = |content: &[u8]| match open_with("model.safetensors", content) {
        CheckpointError::Safetensors { source, .. } => *source,
        other => panic!("{other}"),
    };
    assert!(matches!(lie(b"\x01\x02\x03"), SafetensorsError::TooShort { expected: 8, found: 3 }));
    for claimed in [9, 100_000_001, u64::MAX, i64::MAX as u64] {
        assert!(matches!(lie(&safetensors_with(claimed, "{}", 0)), SafetensorsError::HeaderLength { .. }), "{claimed}");
    }
    assert!(matches!(lie(&safetensors_with(2, "{}", 5)), SafetensorsError::Length { expected: 0, found: 5 }));
    let good = fixture("quirks/opt-125m/model.safetensors");
    assert!(matches!(lie(&good[..good.len() - 1]), SafetensorsError::Length { .. }), "truncated data");
    assert!(matches!(lie(&good[..2000]), SafetensorsError::HeaderLength { .. }), "truncated header");
    let deep = "[".repeat(1_000_000);
    assert!(matches!(lie(&safetensors_with(deep.len() as u64, &deep, 0)), SafetensorsError::Header { .. }));
    let twice = r#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#;
    let twice = lie(&safetensors_with(twice.len() as u64, twice, 4));
    assert_eq!(twice, SafetensorsError::Duplicate { tensor: "a".into() });
    // A file that is in order and holds nothing: every tensor is missing.
    let empty = open_with("model.safetensors", &safetensors_with(2, "{}", 0));
    assert!(matches!(&empty, CheckpointError::Tensors { problems, .. } if problems.len() > 30), "{empty}");
    assert!(empty.to_string().lines().count() < 30, "a long list is cut short: {empty}");
}

// ---------------------------------------------------------------------------------------------------- shards

#[test]
fn indexes_that_lie() {
    let good = fixture("quirks/opt-125m/model.safetensors");
    let lie = |index: String| {
        let dir = directory([
            ("model.safetensors.index.json", index.as_bytes()),
            ("a.safetensors", &good),
            ("b.safetensors", &good),
        ]);
        let error = open(&dir);
        check_message(&error);
        match error {
            CheckpointError::Index { source, .. } => *source,
            other => panic!("{other}"),
        }
    };
    for shard in [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub/a.safetensors",
        "./a.safetensors",
        "a.safetensors/",
        "a\0b",
    ] {
        let error = lie(json!({"weight_map": {"x": shard}}).to_string());
        assert!(matches!(error, IndexError::Path { .. }), "{shard:?}: {error}");
    }
    for malformed in
        ["", "[]", "{}", "null", r#"{"weight_map": 3}"#, r#"{"weight_map": {"x": 3}}"#, r#"{"weight_map": {}}"#]
    {
        if malformed.is_empty() {
            continue; // An empty file has an error of its own.
        }
        assert!(matches!(lie(malformed.into()), IndexError::Malformed { .. }), "{malformed}");
    }
    let missing =
        lie(json!({"weight_map": {"x": "a.safetensors", "y": "c.safetensors", "z": "d.safetensors"}}).to_string());
    assert_eq!(missing, IndexError::MissingShards { shards: vec!["c.safetensors".into(), "d.safetensors".into()] });
    // What nobody needs may be listed and gone; what is needed may not.
    let listed = |name: &str| {
        let mut half = safetensors::SafeTensors::deserialize(&good).unwrap().tensors();
        half.retain(|(name, _)| name != "model.decoder.embed_tokens.weight");
        let index = json!({"weight_map": {name: "a.safetensors", "model.decoder.layers.0.fc1.bias": "a.safetensors"}});
        directory([
            ("model.safetensors.index.json", index.to_string().as_bytes()),
            ("a.safetensors", &safetensors::serialize(half, None).unwrap()),
        ])
    };
    let needed = "model.decoder.embed_tokens.weight";
    let CheckpointError::Index { source, .. } = open(&listed(needed)) else { panic!() };
    assert_eq!(*source, IndexError::NotInShard { tensors: vec![format!("{needed} (a.safetensors)")] });
    let CheckpointError::Tensors { problems, .. } = open(&listed("lm_head.weight")) else { panic!() };
    assert_eq!(problems.len(), 1, "the embedding, of which nobody promised anything");
    // The shards overlap, and the index says for one tensor only which of them counts.
    let name = "model.decoder.embed_tokens.weight";
    let twice = lie(json!({"weight_map": {name: "a.safetensors", "x": "b.safetensors"}}).to_string());
    assert!(matches!(twice, IndexError::Duplicate { .. }), "{twice}");
    let many: serde_json::Map<_, _> = (0..5000).map(|i| (i.to_string(), json!(format!("{i}.safetensors")))).collect();
    assert!(matches!(lie(json!({ "weight_map": many }).to_string()), IndexError::TooManyShards { found: 5000, .. }));
}

// ---------------------------------------------------------------------------------------------------- PyTorch

/// A zip archive with these members.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in members {
        writer
            .start_file(*name, SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored))
            .unwrap();
        writer.write_all(content).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn torch_lie(content: &[u8]) -> TorchError {
    let error = open_with("pytorch_model.bin", content);
    check_message(&error);
    match error {
        CheckpointError::Torch { source, .. } => *source,
        other => panic!("{other}"),
    }
}

/// What is wrong with this pickle beside a storage `data/0` of 64 bytes.
fn pickle_lie(pickle: &[u8]) -> TorchError {
    torch_lie(&archive(&[("m/data.pkl", pickle), ("m/data/0", &[0; 64])]))
}

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn integer(value: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &value.to_le_bytes()].concat()
}

fn tuple(values: &[i64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().flat_map(|&value| integer(value)).collect(), b"t".to_vec()].concat()
}

/// A state dict of one float32 tensor `w`.
fn one_tensor(storage_elements: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let storage = [
        b"(".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text("0"),
        text("cpu"),
        integer(storage_elements),
        b"tQ".to_vec(),
    ];
    [
        b"\x80\x02}".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(),
        storage.concat(),
        integer(offset),
        tuple(shape),
        tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
    ]
    .concat()
}

#[test]
fn a_pickle_of_one_tensor_is_understood_at_all() {
    let good = archive(&[
        ("m/data.pkl", &one_tensor(16, 0, &[4, 4], &[4, 1])),
        ("m/data/0", &[0; 64]),
        ("m/byteorder", b"little"),
    ]);
    let error = open_with("pytorch_model.bin", &good);
    let CheckpointError::Tensors { problems, .. } = error else { panic!("{error}") };
    assert!(problems.iter().all(|problem| matches!(problem, TensorProblem::Missing { .. })));
}

#[test]
fn tensors_beyond_their_storage() {
    for (elements, offset, shape, strides) in [
        (17, 0, vec![4, 4], vec![4, 1]),
        (16, 1, vec![4, 4], vec![4, 1]),
        (16, 0, vec![4, 5], vec![4, 1]),
        (16, 0, vec![4, 4], vec![5, 1]),
        (16, i64::MAX, vec![4, 4], vec![4, 1]),
        (16, 0, vec![i64::MAX, i64::MAX], vec![1, 1]),
        (16, 0, vec![2, 2], vec![i64::MAX, i64::MAX]),
        (i64::MAX, 0, vec![4, 4], vec![4, 1]),
        // Expanded: few bytes, endless elements.
        (16, 0, vec![1 << 40, 1 << 20], vec![0, 0]),
        (16, 0, vec![4, 5], vec![0, 1]),
        (16, 17, vec![0], vec![1]),
    ] {
        let error = pickle_lie(&one_tensor(elements, offset, &shape, &strides));
        assert!(matches!(error, TorchError::Storage { .. }), "{shape:?}: {error}");
    }
    for (elements, offset, shape, strides) in [
        (-1, 0, vec![4], vec![1]),
        (16, -1, vec![4], vec![1]),
        (16, 0, vec![-4], vec![1]),
        (16, 0, vec![4], vec![-1]),
        (16, 0, vec![4, 4], vec![4]),
    ] {
        let error = pickle_lie(&one_tensor(elements, offset, &shape, &strides));
        assert!(matches!(error, TorchError::Tensor { .. }), "{shape:?}: {error}");
    }
}

/// What a pickle says once, every tensor may refer to: none of it may be written out again and again.
#[test]
fn tensors_that_share_what_is_large() {
    let many_dimensions = vec![1; 65];
    let error = pickle_lie(&one_tensor(16, 0, &many_dimensions, &many_dimensions));
    assert!(matches!(error, TorchError::Tensor { .. }), "{error}");
    let long = one_tensor(16, 0, &[4, 4], &[4, 1]);
    let (name, long_name) = (text("0"), text(&"0".repeat(256)));
    let at = long.windows(name.len()).position(|window| window == name).unwrap();
    let error = pickle_lie(&[&long[..at], &long_name, &long[at + name.len()..]].concat());
    assert!(matches!(error, TorchError::Tensor { .. }), "{error}");

    let of = |tensors: usize| {
        let one = one_tensor(1 << 14, 0, &[1 << 14], &[1]);
        let (name, value) = (text("w"), &one[3 + text("w").len()..one.len() - 2]);
        assert!(one[3..].starts_with(&name));
        let items = (0..tensors).flat_map(|number| [&text(&format!("w{number}")), value].concat());
        let pickle = [&b"\x80\x02}("[..], &items.collect::<Vec<u8>>(), b"u."].concat();
        open_with("pytorch_model.bin", &archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 1 << 16])]))
    };
    // A few are as tied matrices are.
    assert!(matches!(of(4), CheckpointError::Tensors { .. }), "{}", of(4));
    let CheckpointError::Torch { source, .. } = of(12) else { panic!("{}", of(12)) };
    assert!(matches!(*source, TorchError::Shared { .. }), "{source}");
}

#[test]
fn pickles_that_attack() {
    // What `os.system("..")` looks like, in both ways of naming it; and friends.
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "exec"),
        ("torch", "load"),
        ("torch.serialization", "load"),
    ] {
        let classic =
            [format!("\x02c{module}\n{name}\n(").into_bytes(), text("touch /tmp/owned"), b"tR.".to_vec()].concat();
        let stacked =
            [&b"\x04"[..], &text(module), &text(name), b"\x93", &text("touch /tmp/owned"), b"\x85R."].concat();
        for pickle in [classic, stacked] {
            let error = pickle_lie(&[&b"\x80"[..], &pickle].concat());
            assert!(
                matches!(&error, TorchError::Global { module: m, name: n, .. } if m == module && n == name),
                "{error}"
            );
        }
    }
    // INST, OBJ, NEWOBJ, EXT1, PERSID, DUP, POP, GET, textual INT: not needed, so not there.
    for opcode in *b"io\x81\x82P20gI" {
        assert_eq!(pickle_lie(&[0x80, 2, opcode]), TorchError::Opcode { opcode, position: 2 });
    }
    // A list in itself, a dictionary in itself.
    assert!(matches!(pickle_lie(b"\x80\x02]q\x00h\x00a."), TorchError::NotAStateDict { found: "a list" }));
    let own_value = [&b"\x80\x02}q\x00"[..], &text("w"), b"h\x00s."].concat();
    assert!(matches!(pickle_lie(&own_value), TorchError::NotAStateDict { found: "a dictionary without tensors" }));
    // Each tuple holds the one before twice: 2^60 leaves, were they ever walked.
    let doubling = [&b"\x80\x02}"[..], &text("w"), b"N", &b"q\x00h\x00\x86".repeat(60), b"s."].concat();
    assert!(matches!(pickle_lie(&doubling), TorchError::NotAStateDict { .. }));
    // A parameter of a parameter of .. a tensor; nesting to any depth.
    let nested = [
        b"\x80\x02}".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_parameter\n(".repeat(100_000),
        b"N".to_vec(),
        b"\x89NtR".repeat(100_000),
        b"s.".to_vec(),
    ];
    assert!(matches!(pickle_lie(&nested.concat()), TorchError::Tensor { .. }));
    let deep = [&b"\x80\x02N"[..], &b"\x85".repeat(1_000_000), b"."].concat();
    assert!(matches!(pickle_lie(&deep), TorchError::NotAStateDict { found: "a tuple" }));
    let objects = [&b"\x80\x02"[..], &b"N".repeat(5_000_000)].concat();
    assert!(matches!(pickle_lie(&objects), TorchError::Limit { what: "objects", .. }));
    let twice = one_tensor(16, 0, &[4], &[1]);
    let item = &twice[3..twice.len() - 1];
    let twice = [&b"\x80\x02}"[..], item, item, b"."].concat();
    assert_eq!(pickle_lie(&twice), TorchError::Duplicate { tensor: "w".into() });
}

#[test]
fn pickles_that_are_broken() {
    let good = one_tensor(16, 0, &[4, 4], &[4, 1]);
    for length in 0..good.len() {
        let error = pickle_lie(&good[..length]);
        assert!(matches!(error, TorchError::Pickle { .. }), "{length}: {error}");
    }
    for broken in [
        &b"\x80\x02."[..],
        b"\x80\x02NN.",
        b"\x80\x02(.",
        b"\x80\x02t.",
        b"\x80\x02\x87.",
        b"\x80\x02h\x07.",
        b"\x80\x02Na.",
        b"\x80\x02N(u.",
        b"\x80\x02}(Nu.",
        b"\x80\x02NNR.",
        b"\x80\x02q\x00.",
        b"\x80\x02N(\x85.",
        b"\x80\x02\x8a\x09123456789.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02NNb.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ccollections",
    ] {
        let error = pickle_lie(broken);
        assert!(matches!(error, TorchError::Pickle { .. }), "{broken:?}: {error}");
    }
    for (root, found) in
        [(&b"N."[..], "None"), (b"].", "a list"), (b"K\x05.", "a number"), (b"}.", "a dictionary without tensors")]
    {
        assert_eq!(pickle_lie(root), TorchError::NotAStateDict { found });
    }
    assert!(matches!(pickle_lie(b"\x80\x02}NNs."), TorchError::NotAStateDict { .. }), "a key that is no name");
}

#[test]
fn archives_that_lie() {
    let pickle = one_tensor(16, 0, &[4, 4], &[4, 1]);
    assert!(matches!(torch_lie(&archive(&[("m/data/0", &[0; 64])])), TorchError::NoMember { .. }));
    assert!(matches!(torch_lie(&archive(&[("m/data.pkl", &pickle)])), TorchError::NoMember { .. }));
    assert!(matches!(
        torch_lie(&archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 63])])),
        TorchError::Storage { stored: 15, .. }
    ));
    let big = archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 64]), ("m/byteorder", b"big")]);
    assert_eq!(torch_lie(&big), TorchError::ByteOrder { found: "big".into() });
    let whole = archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 64])]);
    for length in [4, 30, whole.len() / 2, whole.len() - 1] {
        assert!(matches!(torch_lie(&whole[..length]), TorchError::Zip { .. }), "cut to {length}");
    }
    // Say "deflated", and say "larger than it is", in the central directory.
    let central = whole.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = whole.clone();
        changed[central + at..central + at + bytes.len()].copy_from_slice(bytes);
        torch_lie(&changed)
    };
    assert!(matches!(with(10, &[8, 0]), TorchError::NotStored { .. }));
    assert!(matches!(with(24, &[0xff, 0xff, 0xff, 0x7f]), TorchError::NotStored { .. }));
    let both = with(20, &[0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0x7f]);
    assert!(matches!(both, TorchError::Bounds { .. } | TorchError::Zip { .. }), "{both}");
}

// ---------------------------------------------------------------------------------------------------- config.json

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

// ---------------------------------------------------------------------------------------------------- tokenizer

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

// ---------------------------------------------------------------------------------------------------- random damage

/// Open, and if that works read everything: whatever happens, no panic.
fn exercise(dir: &TempDir) {
    let Ok(checkpoint) = Checkpoint::open(dir.path()) else { return };
    let mut bytes = Vec::new();
    for tensor in checkpoint.spec().resident_tensors() {
        _ = checkpoint.read_resident(&tensor.name, &mut bytes);
    }
    for layer in 0..checkpoint.spec().layers.len() {
        for matrix in [FfnMatrix::Up, FfnMatrix::Down] {
            _ = checkpoint.read_ffn_rows(layer, matrix, 0..48, &mut bytes);
        }
    }
}

/// Byte changes, most of them where files keep their structure: `(position as a share, value)`.
fn damage(content: &mut [u8], changes: &[(f64, u8)], structure: usize) {
    for (i, &(at, value)) in changes.iter().enumerate() {
        let range = if i % 4 == 3 { content.len() } else { structure.min(content.len()) };
        content[(at * range as f64) as usize] = value;
    }
}

fn changes() -> impl Strategy<Value = Vec<(f64, u8)>> {
    prop::collection::vec(
        (0.0..1.0_f64, prop_oneof![any::<u8>(), Just(b'0'), Just(b'9'), Just(b'"'), Just(0), Just(255)]),
        1..8,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_safetensors_never_panic(changes in changes()) {
        let mut content = fixture("quirks/opt-125m/model.safetensors");
        damage(&mut content, &changes, 5000);
        exercise(&directory([("model.safetensors", &content[..])]));
    }

    #[test]
    fn damaged_pickles_never_panic(changes in changes()) {
        let file = fixture("torch/strided/pytorch_model.bin");
        let mut pickle = {
            let mut zip = zip::ZipArchive::new(Cursor::new(&file)).unwrap();
            let mut entry = zip.by_name("pytorch_model/data.pkl").unwrap();
            let mut pickle = Vec::new();
            std::io::copy(&mut entry, &mut pickle).unwrap();
            pickle
        };
        // In place, so that the storages stay where they are.
        let at = file.windows(pickle.len()).position(|window| window == pickle).unwrap();
        let length = pickle.len();
        damage(&mut pickle, &changes, length);
        let mut content = file.clone();
        content[at..at + length].copy_from_slice(&pickle);
        exercise(&directory([("pytorch_model.bin", &content[..])]));
    }

    #[test]
    fn damaged_archives_never_panic(changes in changes()) {
        let mut content = fixture("torch/strided/pytorch_model.bin");
        // The central directory stands at the end.
        content.reverse();
        damage(&mut content, &changes, 6000);
        content.reverse();
        exercise(&directory([("pytorch_model.bin", &content[..])]));
    }

    #[test]
    fn damaged_configurations_never_panic(changes in changes(), falcon in any::<bool>()) {
        let quirk = if falcon { "quirks/falcon-40b-relu" } else { "quirks/opt-350m" };
        let mut config = fixture(&format!("{quirk}/config.json"));
        let length = config.len();
        damage(&mut config, &changes, length);
        let model = fixture(&format!("{quirk}/model.safetensors"));
        exercise(&directory([("config.json", &config[..]), ("model.safetensors", &model[..])]));
    }
}
