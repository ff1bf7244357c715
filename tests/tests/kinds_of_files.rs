//! One model in every kind of checkpoint file gives one bundle: the same bytes but for the manifest's provenance.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use flashlm_formats::bundle::{Bundle, Section};
use flashlm_tests::{copied, fixtures, pack_checkpoint, scratch, tiny_opt};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Contents of all sections, the manifest as JSON.
struct Contents {
    manifest: Value,
    others: Vec<(&'static str, Vec<u8>)>,
}

fn contents(bundle: &Bundle) -> Contents {
    let mut manifest = None;
    let mut others = Vec::new();
    for section in Section::ALL {
        let Some(info) = bundle.section(section) else { continue };
        let mut bytes = vec![0; info.extent.bytes as usize];
        bundle.read_at(info.extent.offset, &mut bytes).unwrap();
        match section {
            Section::Manifest => manifest = Some(serde_json::from_slice(&bytes).unwrap()),
            _ => others.push((section.name(), bytes)),
        }
    }
    Contents { manifest: manifest.unwrap(), others }
}

/// Packs a checkpoint; twice, to see that nothing but the input decides about a single byte.
fn packed(dir: &Path) -> Contents {
    let out = scratch();
    let [a, b] = ["a", "b"].map(|name| out.path().join(name));
    let bundle = pack_checkpoint(dir, &a);
    pack_checkpoint(dir, &b);
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap(), "{} packed twice", dir.display());
    contents(&bundle)
}

#[track_caller]
fn assert_same(kind: &str, mut found: Contents, mut expected: Contents) {
    assert!(expected.others.len() >= 4, "tokenizer, resident, index and flash");
    for ((name, found), (expected_name, expected)) in found.others.iter().zip(&expected.others) {
        assert_eq!(name, expected_name, "{kind}");
        assert!(found == expected, "{kind}: the section {name} differs");
    }
    assert_eq!(found.others.len(), expected.others.len(), "{kind}");
    // The hash is of the content, hence the same; the rest of the provenance tells the files apart.
    let [a, b] = [&mut found, &mut expected].map(|c| c.manifest.as_object_mut().unwrap().remove("provenance").unwrap());
    assert_eq!(a["content_hash"], b["content_hash"], "{kind}");
    assert_ne!(a, b, "{kind}: other files, and the same provenance");
    assert_eq!(found.manifest, expected.manifest, "{kind}");
}

#[test]
fn torch_files() {
    for (quirk, kind) in [
        ("opt-125m", "plain"),
        ("opt-125m", "old-names"),
        ("opt-125m", "one-storage"),
        ("opt-125m", "strided"),
        ("opt-125m", "parameters"),
        ("opt-125m", "protocol-4"),
        ("opt-125m", "sharded"),
        ("falcon-40b-relu", "bfloat16"),
    ] {
        let quirk = fixtures().join("quirks").join(quirk);
        let dir = copied(&fixtures().join("torch").join(kind));
        fs::copy(quirk.join("config.json"), dir.path().join("config.json")).unwrap();
        assert_same(kind, packed(dir.path()), packed(&quirk));
    }
}

/// Cuts a checkpoint's model.safetensors into shards with an index.
fn shard(dir: &Path, shards: usize) {
    let single = dir.join("model.safetensors");
    let bytes = fs::read(&single).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort();
    let mut weight_map = BTreeMap::new();
    for (s, names) in names.chunks(names.len().div_ceil(shards)).enumerate() {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", s + 1);
        let views = names.iter().map(|name| (*name, tensors.tensor(name).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join(&file)).unwrap();
        weight_map.extend(names.iter().map(|name| (name.to_string(), file.clone())));
    }
    let index = json!({ "metadata": { "total_size": bytes.len() }, "weight_map": weight_map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::remove_file(single).unwrap();
}

#[test]
fn sharded_safetensors() {
    for checkpoint in [tiny_opt(), fixtures().join("quirks/falcon-7b-gelu")] {
        let dir = copied(&checkpoint);
        shard(dir.path(), 3);
        assert_same("shards", packed(dir.path()), packed(&checkpoint));
    }
}

/// OPT as published has no tokenizer.json; the bundle then holds one that was built.
#[test]
fn the_older_tokenizer_files_change_the_tokenizer_alone() {
    let dir = copied(&tiny_opt());
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let out = scratch();
    let bundle = out.path().join("model.flashlm").to_str().unwrap().to_owned();
    flashlm_tests::run("flashlm-prep", &["convert", dir.path().to_str().unwrap(), "-o", &bundle], "").succeeded();
    let text = |bundle: &str| {
        flashlm_tests::run("flashlm", &["run", bundle, "--prompt", "Once upon a time", "-n", "12"], "").succeeded()
    };
    let shipped = out.path().join("shipped.flashlm");
    pack_checkpoint(&tiny_opt(), &shipped);
    assert_eq!(text(&bundle), text(shipped.to_str().unwrap()));
}
