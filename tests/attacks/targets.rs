//! What fuzzing hands bytes to, and the replay of its corpora: every reader of files that others wrote.
//!
//! Each takes any bytes; none may panic, hang, or take memory that the bytes do not bound. Readers take paths, so the bytes go
//! through a file in memory. Checksums are mended where they would hide what lies behind them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use flashlm_formats::bundle::{
    Bundle, LayerPredictor, PredictorDType, PredictorInfo, PredictorKind, Section, checksum, verify,
};
use flashlm_formats::checkpoint::{Checkpoint, published_tensors};
use flashlm_formats::recording::{Recording, RecordingInfo};
use flashlm_runtime::model::weights::SharedBytes;
use flashlm_runtime::predictor::LayerPredictors;
use flashlm_runtime::text::Tokenizer;
use half::f16;
use tempfile::TempDir;

const CONFIG: &[u8] = include_bytes!("../fixtures/quirks/opt-125m/config.json");

/// All of them, by the name of their corpus.
pub const ALL: [(&str, fn(&[u8])); 8] = [
    ("bundle", bundle),
    ("safetensors", safetensors),
    ("torch", torch),
    ("config", config),
    ("tokenizer", tokenizer),
    ("recording", recording),
    ("recording_layer", recording_layer),
    ("predictors", predictors),
];

thread_local!(static DIR: TempDir = {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() }.expect("a temporary directory")
});

/// Does something with an emptied directory.
fn in_directory(files: &[(&str, &[u8])], act: impl FnOnce(&Path)) {
    DIR.with(|dir| {
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).expect("memory");
        }
        act(dir.path());
        for (name, _) in files {
            _ = fs::remove_file(dir.path().join(name));
        }
    });
}

/// A bundle, its checksums mended.
pub fn bundle(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    mend_bundle(&mut bytes);
    in_directory(&[("fuzz.flashlm", &bytes)], |dir| {
        let path = dir.join("fuzz.flashlm");
        if let Ok(bundle) = Bundle::open(&path) {
            _ = verify(&path, &mut |_, _| ());
            _ = bundle.read_predictors();
            bundle.resident_tensors().iter().for_each(|tensor| _ = bundle.read_part(tensor.extent));
        }
    });
}

/// Makes the checksums right that stand between random bytes and the checks behind them.
fn mend_bundle(bytes: &mut [u8]) {
    if bytes.len() < 512 {
        return;
    }
    let number = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"));
    let entry = |section: Section| 24 + 24 * section as usize;
    let range = |bytes: &[u8], section: Section| {
        let (from, length) = (number(bytes, entry(section)) as usize, number(bytes, entry(section) + 8) as usize);
        from.checked_add(length).filter(|end| *end <= bytes.len()).map(|end| from..end)
    };
    for section in [Section::Manifest, Section::Tokenizer, Section::Index, Section::Resident, Section::Predictors] {
        if let Some(range) = range(bytes, section).filter(|range| !range.is_empty()) {
            let sum = checksum(&bytes[range]);
            bytes[entry(section) + 16..][..8].copy_from_slice(&sum.to_le_bytes());
        }
    }
    if let Some(index) = range(bytes, Section::Index).map(|range| bytes[range].to_vec()).filter(|i| i.len() >= 16) {
        let word = |at: usize| u32::from_le_bytes(index[at..at + 4].try_into().expect("four")) as usize;
        let (neurons, groups) = (word(4), word(8));
        let head = 8 + (4 * neurons).next_multiple_of(8);
        let tables = index[16..].chunks_exact((head + 8 * groups).max(1));
        let sums: Vec<u8> = tables.flat_map(|table| table[head..].to_vec()).collect();
        let sum = checksum(&sums);
        bytes[entry(Section::Flash) + 16..][..8].copy_from_slice(&sum.to_le_bytes());
    }
    let sum = checksum(&bytes[..504]);
    bytes[504..512].copy_from_slice(&sum.to_le_bytes());
}

fn read_checkpoint(dir: &Path) {
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    let mut bytes = Vec::new();
    for tensor in checkpoint.spec().resident_tensors() {
        _ = checkpoint.read_resident(&tensor.name, &mut bytes);
    }
}

/// The weights of a checkpoint, as safetensors.
pub fn safetensors(bytes: &[u8]) {
    in_directory(&[("config.json", CONFIG), ("model.safetensors", bytes)], read_checkpoint);
}

/// The weights of a checkpoint, as torch saves them: a zip archive with a pickle. The archive is written around the bytes of a
/// pickle unless they are an archive themselves.
pub fn torch(bytes: &[u8]) {
    in_directory(&[("config.json", CONFIG), ("pytorch_model.bin", bytes)], read_checkpoint);
}

/// A `config.json`.
pub fn config(bytes: &[u8]) {
    _ = published_tensors(bytes);
    let empty = b"\x02\0\0\0\0\0\0\0{}";
    in_directory(&[("config.json", bytes), ("model.safetensors", empty)], read_checkpoint);
}

/// A `tokenizer.json`, and text with it.
pub fn tokenizer(bytes: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_json(bytes) else { return };
    _ = tokenizer.encode("Once upon a time <|endoftext|> e\u{301}\u{0}\u{10ffff} 1234");
    let mut stream = tokenizer.stream();
    (0..40).chain([1 << 20, u32::MAX]).for_each(|id| _ = stream.push(id));
    _ = stream.finish();
}

/// A recording's `recording.json` (first byte even) or token file.
pub fn recording(bytes: &[u8]) {
    const INFO: &[u8] = include_bytes!("../fixtures/recording-tiny-opt/recording.json");
    const TOKENS: &[u8] = include_bytes!("../fixtures/recording-tiny-opt/tokens.safetensors");
    let Some((first, bytes)) = bytes.split_first() else { return };
    let files = if first % 2 == 0 { [bytes, TOKENS] } else { [INFO, bytes] };
    let open = |dir: &Path| _ = Recording::open(dir);
    in_directory(&[("recording.json", files[0]), ("tokens.safetensors", files[1])], open);
}

/// A layer of a recording of two tokens. Its seal is broken on purpose: it would hide the rest.
pub fn recording_layer(bytes: &[u8]) {
    thread_local!(static RECORDING: (TempDir, Recording) = small_recording());
    let mut bytes = bytes.to_vec();
    if let Some(at) = bytes.windows(6).position(|word| word == b"\"seal\"") {
        bytes[at + 1] = b'm';
    }
    RECORDING.with(|(_, recording)| {
        fs::write(recording.layer_path(0), &bytes).expect("memory");
        if let Ok(mut layer) = recording.layer(0) {
            let mut inputs = vec![f16::ZERO; layer.tokens() * layer.hidden()];
            _ = layer.read_inputs(0..layer.tokens(), &mut inputs);
            (0..layer.tokens())
                .for_each(|token| assert_eq!(layer.active(token).count(), layer.magnitudes(token).len()));
        }
    });
}

/// A recording of two tokens and one layer of nine neurons.
pub fn small_recording() -> (TempDir, Recording) {
    let dir = TempDir::new().expect("a temporary directory");
    let (mut model, _) = published_tensors(CONFIG).expect("the fixture is good");
    (model.layers, model.hidden_size, model.ffn.size) = (1, 4, 9);
    let info = RecordingInfo::new(model, "small".into());
    let recording = Recording::create(dir.path(), info, vec![5, 6], vec![0, 2], vec![0, 0]).expect("a good one");
    let mut writer = recording.layer_writer(0).expect("writable");
    let activations: Vec<f32> = (0..18).map(|n| (n % 3) as f32).collect();
    writer.write(&[0.5; 8], &activations, None).expect("writable");
    writer.finish(&[1.0; 9]).expect("writable");
    (dir, recording)
}

/// A bundle's predictors.
pub fn predictors(bytes: &[u8]) {
    let (mut spec, _) = published_tensors(CONFIG).expect("the fixture is good");
    (spec.hidden_size, spec.ffn.size) = (4, 9);
    for dtype in [PredictorDType::F16, PredictorDType::Int8] {
        let layers = (0..2).map(|layer| LayerPredictor { rank: 2, dtype, look_ahead_rank: (layer == 0).then_some(2) });
        let info = PredictorInfo { kind: PredictorKind::LowRank, layers: layers.collect() };
        let blob: SharedBytes = Arc::new(bytes.to_vec());
        _ = LayerPredictors::load_all(&blob, &info, &spec);
    }
}
