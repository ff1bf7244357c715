//! Random damage.

use std::io::Cursor;

use flashlm_formats::checkpoint::{Checkpoint, FfnMatrix};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{directory, fixture};

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
