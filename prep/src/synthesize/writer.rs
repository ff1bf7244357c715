//! Writes the files of a checkpoint, the weights by several threads at once, and publishes them whole.
//!
//! Everything is written under temporary names first. `config.json` gets its name last: without it nothing opens.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use flashlm_formats::checkpoint::{PublishedTensor, published_tensors};
use flashlm_formats::model::DType;
use flashlm_formats::page_cache::{Advice, advise};
use flashlm_formats::publish::{NewFile, create_directory};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::recipe::{Ready, Recipe, Recipes};
use super::{SynthesizeError, SynthesizeOptions};
use crate::pack::check_space;

/// Bytes of weights that a thread makes and writes at a time. Part of what the bytes follow from: changing it changes them.
const PIECE_BYTES: u64 = 4 << 20;
/// Weights in one file, as in the published models.
const SHARD_BYTES_MAX: u64 = 10_000_000_000;
/// The data begins at a multiple of this, so that it lies in the file as it does in pages.
const DATA_ALIGNMENT: usize = 4096;
/// Room for what is not weights.
const SMALL_FILES_BYTES: u64 = 1 << 20;

pub(super) fn write(
    dir: &Path,
    config: &Value,
    tokenizer: &Value,
    options: SynthesizeOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, SynthesizeError> {
    let config_json = pretty(config);
    let (spec, mut tensors) = published_tensors(&config_json)?;
    // In the order in which they are read: what belongs to no layer, then layer by layer.
    tensors.sort_by_key(|tensor| layer_number(&tensor.name));
    let dtype = if config["torch_dtype"] == "bfloat16" { DType::Bf16 } else { DType::F16 };

    if let Some(path) = occupied(dir) {
        return Err(SynthesizeError::Exists { path });
    }
    let mut files = Unpublished::default();
    let made = !dir.exists();
    create_directory(dir).map_err(SynthesizeError::io("make the directory", dir))?;
    files.made = made.then(|| dir.to_owned());
    let shards = shards(tensors, dtype);
    let total: u64 = shards.iter().map(|shard| shard.bytes).sum();
    check_space(&dir.join("config.json"), total + SMALL_FILES_BYTES)?;

    for shard in &shards {
        let (file, path) = files.create(dir, &shard.name)?;
        file.write_all_at(&shard.header, 0).map_err(SynthesizeError::io("write", path))?;
    }
    let biases = spec.ffn().up_bias;
    let recipes = Recipes::new(spec, biases, dtype, options);
    fill(&files.new, &shards, dtype, recipes, options, total, progress)?;
    files.small(dir, "tokenizer.json", &pretty(tokenizer))?;
    if shards.len() > 1 {
        files.small(dir, "model.safetensors.index.json", &pretty(&index(&shards)))?;
    }
    files.small(dir, "config.json", &config_json)?;
    files.publish()?;
    Ok(total)
}

fn pretty(json: &Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

/// A file that a new checkpoint would be mixed up with.
fn occupied(dir: &Path) -> Option<PathBuf> {
    let names = std::fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_model = |name: &String| {
        name == "config.json"
            || name.starts_with("tokenizer")
            || name.ends_with(".bin")
            || name.ends_with(".index.json")
            || name.ends_with(".safetensors")
    };
    names.filter(is_model).min().map(|name| dir.join(name))
}

/// The first number between dots, if there is one.
fn layer_number(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}

/// A weight file.
struct Shard {
    name: String,
    tensors: Vec<PublishedTensor>,
    /// Length and description of the tensors, padded.
    header: Vec<u8>,
    /// Of the whole file.
    bytes: u64,
}

fn tensor_bytes(tensor: &PublishedTensor, dtype: DType) -> u64 {
    tensor.shape.iter().map(|size| *size as u64).product::<u64>() * dtype.bytes() as u64
}

/// Deals the tensors out to files, whole and in order.
fn shards(tensors: Vec<PublishedTensor>, dtype: DType) -> Vec<Shard> {
    let mut lists: Vec<(u64, Vec<PublishedTensor>)> = vec![(0, Vec::new())];
    for tensor in tensors {
        let bytes = tensor_bytes(&tensor, dtype);
        match lists.last_mut() {
            Some((filled, list)) if *filled + bytes <= SHARD_BYTES_MAX || list.is_empty() => {
                *filled += bytes;
                list.push(tensor);
            }
            _ => lists.push((bytes, vec![tensor])),
        }
    }
    let count = lists.len();
    let named = |(index, (bytes, tensors)): (usize, (u64, Vec<PublishedTensor>))| {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let header = header(&tensors, dtype);
        Shard { name, tensors, bytes: header.len() as u64 + bytes, header }
    };
    lists.into_iter().enumerate().map(named).collect()
}

/// The header of a safetensors file, padded with spaces as the format allows.
fn header(tensors: &[PublishedTensor], dtype: DType) -> Vec<u8> {
    let mut entries = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor_bytes(tensor, dtype);
        let entry = json!({"dtype": Dtype::from(dtype), "shape": tensor.shape, "data_offsets": [start, end]});
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    let padded = (8 + json.len()).next_multiple_of(DATA_ALIGNMENT);
    json.resize(padded - 8, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

fn index(shards: &[Shard]) -> Value {
    let bytes: u64 = shards.iter().map(|shard| shard.bytes - shard.header.len() as u64).sum();
    let named =
        shards.iter().flat_map(|shard| shard.tensors.iter().map(|t| (t.name.clone(), shard.name.clone().into())));
    json!({"metadata": {"total_size": bytes}, "weight_map": named.collect::<Map<String, Value>>()})
}

/// A piece of a tensor, and where it goes.
struct Piece<'a> {
    file: usize,
    offset: u64,
    tensor: &'a PublishedTensor,
    recipe: &'a Recipe,
    layer: usize,
    /// Its first element and its number in the tensor.
    place: (u64, u64),
    bytes: usize,
}

/// Makes and writes all weights; the calling thread works too, and reports.
fn fill(
    files: &[(NewFile, PathBuf)],
    shards: &[Shard],
    dtype: DType,
    mut recipes: Recipes,
    options: SynthesizeOptions,
    total: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SynthesizeError> {
    let tensors = shards.iter().enumerate().flat_map(|(file, shard)| shard.tensors.iter().map(move |t| (file, t)));
    let made: Vec<(usize, &PublishedTensor, Option<usize>, Recipe)> = tensors
        .map(|(file, tensor)| {
            let layer = layer_number(&tensor.name);
            (file, tensor, layer, recipes.recipe(tensor, layer))
        })
        .collect();
    let recipes = recipes.ready();
    let mut offsets: Vec<u64> = shards.iter().map(|shard| shard.header.len() as u64).collect();
    let mut pieces = Vec::new();
    for (file, tensor, layer, recipe) in &made {
        let bytes = tensor_bytes(tensor, dtype);
        let row_bytes = (Ready::row(recipe, tensor) * dtype.bytes()) as u64;
        let piece_bytes = (PIECE_BYTES / row_bytes).max(1) * row_bytes;
        for number in 0..bytes.div_ceil(piece_bytes) {
            let length = piece_bytes.min(bytes - number * piece_bytes);
            let place = (number * piece_bytes / dtype.bytes() as u64, number);
            let (file, layer) = (*file, layer.unwrap_or(0));
            pieces.push(Piece { file, offset: offsets[file], tensor, recipe, layer, place, bytes: length as usize });
            offsets[file] += length;
        }
    }
    let (next, done, stop) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let work = |report: &mut dyn FnMut(u64)| -> Result<(), SynthesizeError> {
        let mut buffer = vec![0; PIECE_BYTES as usize];
        while !stop.load(Ordering::Relaxed) {
            let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let bytes = &mut buffer[..piece.bytes];
            recipes.fill(piece.recipe, piece.tensor, piece.layer, piece.place, bytes);
            let (new, path) = &files[piece.file];
            let file = new.file();
            if let Err(error) = file.write_all_at(bytes, piece.offset) {
                stop.store(true, Ordering::Relaxed);
                return Err(SynthesizeError::io("write", path)(error));
            }
            hand_to_disk(file, piece.offset, piece.bytes as u64);
            report(done.fetch_add(piece.bytes as u64, Ordering::Relaxed) + piece.bytes as u64);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let mut helpers = Vec::new();
        for _ in 1..options.threads.get() {
            match std::thread::Builder::new().spawn_scoped(scope, || work(&mut |_| ())) {
                Ok(helper) => helpers.push(helper),
                Err(source) => {
                    stop.store(true, Ordering::Relaxed);
                    return Err(SynthesizeError::Threads { threads: options.threads.get(), source });
                }
            }
        }
        let result = work(&mut |done| progress(done, total));
        let join = |helper: std::thread::ScopedJoinHandle<'_, _>| {
            helper.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
        };
        helpers.into_iter().map(join).fold(result, Result::and)
    })
}

/// Begins writing a piece out, and lets go of what lies well behind it and has been written, so that a large model neither
/// fills the page cache nor ends in one long flush. Failing costs memory only.
fn hand_to_disk(file: &File, offset: u64, bytes: u64) {
    let behind = offset.saturating_sub(32 * PIECE_BYTES);
    advise(file, behind, offset + bytes - behind, Advice::DontNeed);
}

/// New files in the order in which they are to appear, removed unless they are published.
#[derive(Default)]
struct Unpublished {
    new: Vec<(NewFile, PathBuf)>,
    /// The directory, if it was made for them: gone again if nothing gets into it.
    made: Option<PathBuf>,
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        self.new.clear();
        // What is not empty stays.
        _ = self.made.as_ref().map(std::fs::remove_dir);
    }
}

impl Unpublished {
    fn create(&mut self, dir: &Path, name: &str) -> Result<(&File, &Path), SynthesizeError> {
        let path = dir.join(name);
        let new = NewFile::create(&path).map_err(SynthesizeError::io("create", &path))?;
        self.new.push((new, path));
        let (new, path) = self.new.last().expect("just put there");
        Ok((new.file(), path))
    }

    fn small(&mut self, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), SynthesizeError> {
        let (mut file, path) = self.create(dir, name)?;
        file.write_all(bytes).map_err(SynthesizeError::io("write", path))
    }

    /// Gives every file its name, each when those before it have theirs for good.
    fn publish(mut self) -> Result<(), SynthesizeError> {
        for (new, path) in &mut self.new {
            new.publish().map_err(SynthesizeError::io("publish", path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_models_are_dealt_out_to_files() {
        let tensor = |layer: usize| PublishedTensor { name: format!("h.{layer}.w"), shape: vec![1_000_000, 2_000] };
        let shards = shards((0..5).map(tensor).collect(), DType::F16);
        let counts: Vec<_> = shards.iter().map(|shard| (shard.name.as_str(), shard.tensors.len())).collect();
        let of = [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
        ];
        assert_eq!(counts, [(of[0], 2), (of[1], 2), (of[2], 1)]);
        assert!(shards.iter().all(|shard| shard.header.len() % DATA_ALIGNMENT == 0));
        let index = index(&shards);
        assert_eq!(index["weight_map"]["h.3.w"], of[1]);
        assert_eq!(index["metadata"]["total_size"], 20_000_000_000u64);
    }

    #[test]
    fn layers_are_sorted_as_numbers() {
        let mut names = ["m.layers.10.w", "m.embed.w", "m.layers.9.w"];
        names.sort_by_key(|name| layer_number(name));
        assert_eq!(names, ["m.embed.w", "m.layers.9.w", "m.layers.10.w"]);
    }

    #[test]
    fn what_is_not_published_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Unpublished::default();
        files.small(dir.path(), "config.json", b"{}").unwrap();
        assert!(dir.path().join("config.json.partial").exists() && occupied(dir.path()).is_none());
        drop(files);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        // A directory that was made for them goes with them.
        let made = dir.path().join("new");
        std::fs::create_dir(&made).unwrap();
        let mut files = Unpublished { new: Vec::new(), made: Some(made.clone()) };
        files.small(&made, "config.json", b"{}").unwrap();
        drop(files);
        assert!(!made.exists());
    }
}
