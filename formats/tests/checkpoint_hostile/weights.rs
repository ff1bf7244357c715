//! Safetensors files, and the indexes of shards.

use flashlm_formats::checkpoint::{CheckpointError, IndexError, SafetensorsError};
use serde_json::json;

use super::{check_message, directory, fixture, open, open_with};

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
