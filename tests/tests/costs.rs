//! What reading a file costs grows with the file and not faster: sizes N and 8 N, by what is allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use flashlm::neurons::predictor::LayerPredictors;
use flashlm::tensors::SharedBytes;
use flashlm_formats::bundle::{Bundle, LayoutOptions};
use flashlm_formats::checkpoint::{Checkpoint, published_tensors, read_tensors};
use flashlm_tests::{bundle_with_predictors, scratch};

struct Counting;

thread_local!(static BYTES: Cell<u64> = const { Cell::new(0) });

fn count(bytes: usize) {
    // A thread that ends has nowhere to count.
    _ = BYTES.try_with(|counted| counted.set(counted.get() + bytes as u64));
}

#[expect(unsafe_code, reason = "an allocator is an unsafe trait; this one counts and passes on")]
// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: our caller keeps `alloc`'s promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: our caller keeps `dealloc`'s promises.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes);
        // SAFETY: our caller keeps `realloc`'s promises.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that are allocated, and given back or not, while `act` runs on this thread.
fn allocated<T>(act: impl FnOnce() -> T) -> u64 {
    let before = BYTES.get();
    let made = act();
    let bytes = BYTES.get() - before;
    drop(made);
    bytes
}

/// A checkpoint of this many small layers.
fn write_checkpoint(dir: &Path, layers: usize) {
    let config = format!(
        r#"{{"model_type":"opt","hidden_size":4,"num_attention_heads":2,"num_hidden_layers":{layers},"ffn_dim":6,
        "vocab_size":8,"max_position_embeddings":4,"word_embed_proj_dim":4,"tie_word_embeddings":true}}"#
    );
    let mut end = 0;
    let tensors = published_tensors(config.as_bytes()).unwrap().1;
    let entries = tensors.iter().map(|tensor| {
        let begin = end;
        end += 2 * tensor.shape.iter().product::<usize>();
        let info = serde_json::json!({ "dtype": "F16", "shape": tensor.shape, "data_offsets": [begin, end] });
        (tensor.name.clone(), info)
    });
    let header = serde_json::Value::Object(entries.collect()).to_string();
    let mut file = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    file.resize(file.len() + end, 0);
    fs::write(dir.join("model.safetensors"), file).unwrap();
    fs::write(dir.join("config.json"), config).unwrap();
}

/// What is read, by name, with what that allocates in a model of this many layers.
fn costs(layers: usize) -> Vec<(&'static str, u64)> {
    let dir = scratch();
    write_checkpoint(dir.path(), layers);
    let path = dir.path().join("m.flashlm");
    let bundle = bundle_with_predictors(dir.path(), &path, LayoutOptions::default(), true);
    let info = bundle.manifest().predictors.clone().unwrap();
    let blob: SharedBytes = Arc::new(bundle.read_predictors().unwrap().unwrap());
    vec![
        ("a checkpoint", allocated(|| Checkpoint::open(dir.path()).unwrap())),
        ("a file of tensors", allocated(|| read_tensors(&dir.path().join("model.safetensors")).unwrap())),
        ("a bundle", allocated(|| Bundle::open(&path).unwrap())),
        ("predictors", allocated(|| LayerPredictors::load_all(&blob, &info, bundle.spec()).unwrap())),
    ]
}

#[test]
fn reading_costs_no_more_than_in_proportion() {
    let (few, many) = (costs(40), costs(320));
    for ((what, few), (_, many)) in few.into_iter().zip(many) {
        assert!(many <= 12 * few + 65_536, "{what}: {few} bytes for 40 layers, {many} for 320");
    }
}
