//! What fuzzing hands bytes to, and the replay of its corpora: every reader of files that others wrote.
//!
//! Each takes any bytes; none may panic, hang, or take memory that the bytes do not bound. Readers take paths, so the bytes go
//! through a file in memory. Checksums are repaired where they would hide what lies behind them.

pub mod mend;
mod run;
pub mod tiny;

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use flashlm::neurons::predictor::LayerPredictors;
use flashlm::tensors::SharedBytes;
use flashlm::text::Tokenizer;
use flashlm_formats::bundle::{Bundle, LayerPredictor, PredictorDType, PredictorInfo, PredictorKind, Section, verify};
use flashlm_formats::checkpoint::{Checkpoint, FfnMatrix, PublishedTensor, published_tensors};
use flashlm_formats::ids::NeuronId;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::orders::OrderFile;
use flashlm_formats::recording::{Recording, RecordingInfo};
use flashlm_formats::sessions::SessionReader;
use flashlm_kernels::Threads;
use flashlm_prep::foreign_predictors;
use flashlm_prep::predictors::assemble;
use flashlm_prep::tokenizer::tokenizer_json;
use half::f16;
use tempfile::TempDir;

/// All of them, by the name of their corpus.
pub const ALL: [(&str, fn(&[u8])); 9] = [
    ("bundle", bundle),
    ("safetensors", safetensors),
    ("torch", torch),
    ("config", config),
    ("tokenizer", tokenizer),
    ("recording", recording),
    ("recording_layer", recording_layer),
    ("predictors", predictors),
    ("sessions", sessions),
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

/// A bundle, its checksums repaired; or JSON, which takes the place of the manifest or of the table of resident tensors in a good one
/// (after a space, in a quantised one).
pub fn bundle(bytes: &[u8]) {
    const GOOD: &[u8] = include_bytes!("../../fixtures/bundle-v2.flashlm");
    const QUANTISED: &[u8] = include_bytes!("../../fixtures/bundle-v2-quantised.flashlm");
    let bytes = match bytes {
        [b'{' | b' ', ..] => {
            let good = if bytes[0] == b'{' { GOOD } else { QUANTISED };
            if bytes.windows(12).any(|word| word == b"data_offsets") {
                mend::bundle_with(good, Section::Resident, &mend::resident_section(good, bytes))
            } else {
                mend::bundle_with(good, Section::Manifest, bytes)
            }
        }
        _ => {
            let mut bytes = bytes.to_vec();
            mend::bundle(&mut bytes);
            bytes
        }
    };
    in_directory(&[("fuzz.flashlm", &bytes)], |dir| {
        let path = dir.join("fuzz.flashlm");
        if let Ok(bundle) = Bundle::open(&path) {
            _ = verify(&path, &mut |_, _| ());
            bundle.resident_tensors().iter().for_each(|tensor| _ = bundle.read_part(tensor.extent));
            run::whole(&bundle);
        }
    });
}

fn read_checkpoint(dir: &Path) {
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    let spec = checkpoint.spec();
    let mut bytes = Vec::new();
    for tensor in spec.resident_tensors() {
        _ = checkpoint.read_resident(&tensor.name, &mut bytes);
    }
    for layer in 0..spec.layers.len() {
        _ = checkpoint.read_ffn_rows(layer, FfnMatrix::Gate, 0..spec.ffn().size, &mut bytes);
        _ = checkpoint.read_ffn_rows(layer, FfnMatrix::Up, 0..spec.ffn().size, &mut bytes);
        _ = checkpoint.read_ffn_rows(layer, FfnMatrix::Down, 0..spec.hidden_size, &mut bytes);
    }
}

/// The weights of a checkpoint, as safetensors. JSON alone is taken for a header, with zeros after it; or for an index of two shards.
/// The same file as predictors of others.
pub fn safetensors(bytes: &[u8]) {
    let header = bytes.starts_with(b"{").then(|| mend::safetensors_file(bytes));
    if bytes.starts_with(b"{") && bytes.windows(10).any(|word| word == b"weight_map") {
        let tensors = tiny::tensors();
        let (first, second) = tensors.split_at(tensors.len() / 2);
        let shards = [tiny::safetensors(first), tiny::safetensors(second)];
        let index = ("model.safetensors.index.json", bytes);
        let files =
            [("config.json", tiny::CONFIG), index, ("a.safetensors", &shards[0]), ("b.safetensors", &shards[1])];
        return in_directory(&files, read_checkpoint);
    }
    let file = header.as_deref().unwrap_or(bytes);
    in_directory(&[("config.json", tiny::CONFIG), ("model.safetensors", file)], |dir| {
        read_checkpoint(dir);
        _ = foreign_predictors::read(&dir.join("model.safetensors"), None);
    });
}

/// The weights of a checkpoint, as torch saves them: a zip archive with a pickle. An archive is written around the bytes of a
/// pickle unless they are an archive themselves. The same file as predictors of others.
pub fn torch(bytes: &[u8]) {
    let archive = if bytes.starts_with(b"PK") { bytes.to_vec() } else { tiny::archive(bytes) };
    in_directory(&[("config.json", tiny::CONFIG), ("pytorch_model.bin", &archive)], |dir| {
        read_checkpoint(dir);
        _ = foreign_predictors::read(&dir.join("pytorch_model.bin"), None);
    });
}

/// A `config.json`, after zero bytes `generation_config.json` and `tokenizer_config.json`; with just the tensors that it asks for, if these
/// are small.
pub fn config(bytes: &[u8]) {
    const BYTES_MAX: usize = 1 << 18;
    let mut parts = bytes.split(|byte| *byte == 0);
    let [config, generation, tokenizer] = std::array::from_fn(|_| parts.next().unwrap_or(b"{}"));
    let mut weights = b"\x02\0\0\0\0\0\0\0{}".to_vec();
    if let Ok((_, tensors)) = published_tensors(config) {
        let elements = |tensor: &PublishedTensor| tensor.shape.iter().try_fold(2_usize, |n, size| n.checked_mul(*size));
        let bytes = tensors.iter().map(elements).try_fold(0_usize, |sum, n| sum.checked_add(n?));
        if bytes.is_some_and(|bytes| bytes <= BYTES_MAX) {
            weights = tiny::safetensors(&tensors);
        }
    }
    let files = [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer),
        ("model.safetensors", &weights),
    ];
    in_directory(&files, read_checkpoint);
}

/// A `tokenizer.json`, and text with it; or, apart by zero bytes, the older files of a tokenizer: `vocab.json`, `merges.txt`,
/// `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`.
pub fn tokenizer(bytes: &[u8]) {
    let parts: Vec<&[u8]> = bytes.split(|byte| *byte == 0).collect();
    if let [vocab, merges, sides @ ..] = parts.as_slice() {
        let side = |number: usize| sides.get(number).copied().unwrap_or(b"{}");
        let weights = tiny::safetensors(&tiny::tensors());
        let files = [
            ("config.json", tiny::CONFIG),
            ("model.safetensors", &weights),
            ("vocab.json", vocab),
            ("merges.txt", merges),
            ("tokenizer_config.json", side(0)),
            ("special_tokens_map.json", side(1)),
            ("added_tokens.json", side(2)),
        ];
        return in_directory(&files, |dir| {
            let json = Checkpoint::open(dir).ok().and_then(|checkpoint| tokenizer_json(&checkpoint).ok());
            json.iter().for_each(|json| write_and_read(json));
        });
    }
    write_and_read(bytes);
}

fn write_and_read(json: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_json(json) else { return };
    _ = tokenizer.encode("Once upon a time <|endoftext|> e\u{301}\u{0}\u{10ffff} 1234");
    let mut stream = tokenizer.stream(&[]);
    (0..40).chain([1 << 20, u32::MAX]).for_each(|id| _ = stream.push(id));
    _ = stream.finish();
}

/// A recording's `recording.json` (first byte even) or token file, each with what fits it of the other.
pub fn recording(bytes: &[u8]) {
    const INFO: &[u8] = include_bytes!("../../fixtures/recording-tiny-opt/recording.json");
    const TOKENS: &[u8] = include_bytes!("../../fixtures/recording-tiny-opt/tokens.safetensors");
    let Some((first, bytes)) = bytes.split_first() else { return };
    let [info, tokens] = if first.is_multiple_of(2) { [bytes, TOKENS] } else { [INFO, bytes] };
    let tokens = mend::tokens_of(info, tokens);
    let open = |dir: &Path| _ = Recording::open(dir);
    in_directory(&[("recording.json", info), ("tokens.safetensors", &tokens)], open);
}

/// A layer of a recording of two tokens. Its seal is broken on purpose: it would hide the rest.
pub fn recording_layer(bytes: &[u8]) {
    thread_local!(static RECORDING: (TempDir, Recording) = small_recording());
    let mut bytes = bytes.to_vec();
    mend::unseal(&mut bytes);
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
    let (mut model, _) = published_tensors(tiny::CONFIG).expect("the configuration is good");
    model.layers.truncate(1);
    (model.hidden_size, model.layers[0].ffn_mut().size) = (4, 9);
    let info = RecordingInfo::new(model, "small".into());
    let recording =
        Recording::create(dir.path(), info, vec![5, 6], vec![0, 2], vec![0, 0], vec![]).expect("a good one");
    let mut writer = recording.layer_writer(0).expect("writable");
    let activations: Vec<f32> = (0..18).map(|n| (n % 3) as f32).collect();
    writer.write(&[0.5; 8], &activations, None).expect("writable");
    writer.finish(&[1.0; 9]).expect("writable");
    (dir, recording)
}

/// A bundle's predictors; a layer's predictor as `train` writes it, which becomes such; and a layer's storage order.
pub fn predictors(bytes: &[u8]) {
    let (mut spec, _) = published_tensors(tiny::CONFIG).expect("the configuration is good");
    spec.hidden_size = 4;
    spec.layers.iter_mut().for_each(|layer| layer.ffn_mut().size = 9);
    for dtype in [PredictorDType::F16, PredictorDType::Int8, PredictorDType::Int4] {
        let layers = (0..2).map(|layer| LayerPredictor {
            rank: 2,
            dtype,
            rows: None,
            look_ahead_rank: (layer == 0).then_some(2),
        });
        let info = PredictorInfo { kind: PredictorKind::LowRank, layers: layers.collect() };
        score(bytes.to_vec(), &info, &spec);
    }
    let (mut sealed, mut order) = (bytes.to_vec(), bytes.to_vec());
    mend::unseal(&mut sealed);
    mend::order(&mut order);
    let files: [(&str, &[u8]); 2] = [("predictor-000.safetensors", &sealed), ("layer-000.order.safetensors", &order)];
    in_directory(&files, |dir| {
        if let Ok((info, blob)) = assemble(dir, &spec, &[(0..9).rev().map(NeuronId).collect()]) {
            score(blob, &info, &spec);
        }
        _ = OrderFile::read(dir, 0, 9);
    });
}

/// A saved session, or its header alone. Its seal is looked at when all is read, and hides nothing.
pub fn sessions(bytes: &[u8]) {
    let bytes = if bytes.starts_with(b"{") { mend::safetensors_file(bytes) } else { bytes.to_vec() };
    in_directory(&[("session", &bytes)], |dir| {
        if let Ok(mut reader) = SessionReader::open(&dir.join("session")) {
            let mut read = 0;
            _ = reader.read_kv(&mut |_, _, rows| read += rows.len());
            let session = reader.session();
            assert!(read + 4 * session.ids.len() + session.in_piece.len() <= bytes.len());
        }
    });
}

fn score(blob: Vec<u8>, info: &PredictorInfo, spec: &ModelSpec) {
    let blob: SharedBytes = Arc::new(blob);
    let threads = Threads::new(NonZeroUsize::MIN).expect("no thread beside this one");
    for mut layer in LayerPredictors::load_all(&blob, info, spec).unwrap_or_default() {
        layer.own.scores(&threads, &[1.0; 4], &mut [0.0; 9]);
    }
}
