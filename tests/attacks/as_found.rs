//! Checkpoints as people have them, through the program: more files than a process usually has open, and what is said of keys.

use std::fs;
use std::path::Path;
use std::process::Command;

use flashlm_tests::{Said, fixtures, program, scratch};
use safetensors::SafeTensors;
use serde_json::{Map, json};

/// The miniature cut into 300 shards, most of them of nothing but a foreign tensor.
fn many_shards(dir: &Path) {
    let quirk = fixtures().join("quirks/llama-relu2-tied-mha");
    fs::copy(quirk.join("config.json"), dir.join("config.json")).unwrap();
    let model = fs::read(quirk.join("model.safetensors")).unwrap();
    let model = SafeTensors::deserialize(&model).unwrap();
    let (tensors, stranger) = (model.tensors(), vec![0; 4]);
    let mut map = Map::new();
    for number in 0..300 {
        let shard = format!("model-{number:05}-of-00300.safetensors");
        let (name, view) = match tensors.get(number) {
            Some((name, view)) => (name.clone(), view.clone()),
            None => {
                let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &stranger).unwrap();
                (format!("stranger.{number}"), view)
            }
        };
        fs::write(dir.join(&shard), safetensors::serialize([(name.clone(), view)], None).unwrap()).unwrap();
        map.insert(name, json!(shard));
    }
    fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
}

fn inspect(dir: &Path, limit: &str) -> Said {
    let line = format!("ulimit {limit}; exec \"$0\" inspect \"$1\"");
    Command::new("sh").args(["-c", &line]).arg(program("flashlm-prep")).arg(dir).output().unwrap().into()
}

#[test]
fn three_hundred_shards_need_no_more_than_the_system_allows() {
    let dir = scratch();
    many_shards(dir.path());
    inspect(dir.path(), "-Sn 256").succeeded();
    inspect(dir.path(), "-n 256").failed(1, &["256 files", "ulimit -n"]);
}

#[test]
fn keys_that_nobody_follows_are_named() {
    let dir = scratch();
    let quirk = fixtures().join("quirks/llama-relu-gqa");
    fs::copy(quirk.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let config = fs::read_to_string(quirk.join("config.json")).unwrap();
    let config = config.replacen('{', "{\"twist\": 3, \"sliding_window\": 16, \"some_limit\": Infinity,", 1);
    fs::write(dir.path().join("config.json"), config).unwrap();
    let said = inspect(dir.path(), "-n 256").succeeded();
    for words in ["some_limit, twist", "which flashlm does not know", "sliding_window, which means nothing to a llama"]
    {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
}
