//! Which files of a checkpoint directory hold the weights, and which tensors they list.
//!
//! safetensors before PyTorch, one file before shards, as transformers looks for them; other formats are ignored when one of
//! these is there and explained when none is. Knows nothing of what the tensors mean.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Component, Path};

use super::error::CheckpointError;
use super::file::{SourceFile, read_small};
use super::foreign::Foreign;
use super::index_error::IndexError;
use super::tensor::StoredTensor;
use super::{python_json, safetensors, torch};

/// The kind of files that hold the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `model.safetensors`.
    Safetensors,
    /// Shards listed in `model.safetensors.index.json`.
    ShardedSafetensors,
    /// `pytorch_model.bin`.
    Torch,
    /// Shards listed in `pytorch_model.bin.index.json`.
    ShardedTorch,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::ShardedSafetensors => "sharded safetensors",
            Self::Torch => "torch",
            Self::ShardedTorch => "sharded torch",
        })
    }
}

impl Format {
    /// In the order in which they are looked for.
    pub const ALL: [Self; 4] = [Self::Safetensors, Self::ShardedSafetensors, Self::Torch, Self::ShardedTorch];

    /// The file that holds the weights, or lists the shards that do.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Safetensors => "model.safetensors",
            Self::ShardedSafetensors => "model.safetensors.index.json",
            Self::Torch => "pytorch_model.bin",
            Self::ShardedTorch => "pytorch_model.bin.index.json",
        }
    }

    /// Whether the weights are in several files.
    pub const fn is_sharded(self) -> bool {
        matches!(self, Self::ShardedSafetensors | Self::ShardedTorch)
    }

    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::ShardedSafetensors => "sharded safetensors",
            Self::Torch => "PyTorch zip archive",
            Self::ShardedTorch => "sharded PyTorch zip archives",
        }
    }
}

/// Longest index of shards.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Enough for any model, and fewer than the files a process can usually be allowed to have open.
const SHARDS_MAX: usize = 900;

/// The weight files of a checkpoint and the tensors they list.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) format: Format,
    /// The index of shards, if there is one.
    pub(crate) index: Option<SourceFile>,
    pub(crate) files: Vec<SourceFile>,
    pub(crate) tensors: Vec<StoredTensor>,
    /// Index of each tensor by name.
    pub(crate) by_name: HashMap<String, usize>,
    /// The shard of each tensor, as the index has it. Much of it may be of no use, and gone.
    pub(crate) listed: BTreeMap<String, String>,
}

impl Weights {
    pub(crate) fn open(dir: &Path) -> Result<Self, CheckpointError> {
        // A dangling link counts as there: the error then names it.
        let is_there = |format: &Format| dir.join(format.file_name()).symlink_metadata().is_ok();
        let format = Format::ALL.into_iter().find(is_there).ok_or_else(|| explain_absence(dir))?;
        let (index, shards, map) = if format.is_sharded() {
            let (file, json) = match read_small(dir, format.file_name(), INDEX_BYTES_MAX)? {
                Some(found) => found,
                // There a moment ago: a dangling link.
                None => return Err(no_such(dir, format.file_name())),
            };
            let failed = |source| CheckpointError::Index { path: file.path.clone(), source: Box::new(source) };
            let map = parse_index(&json).map_err(failed)?;
            let shards = shard_names(dir, &map).map_err(failed)?;
            (Some(file), shards, map)
        } else {
            (None, vec![format.file_name().to_owned()], BTreeMap::new())
        };
        let mut weights =
            Self { format, index, files: Vec::new(), tensors: Vec::new(), by_name: HashMap::new(), listed: map };
        for shard in shards {
            let file = SourceFile::open(dir, &shard)?;
            let number = weights.files.len();
            let tensors = match format {
                Format::Safetensors | Format::ShardedSafetensors => safetensors::read_header(&file, number)?,
                Format::Torch | Format::ShardedTorch => torch::read_archive(&file, number)?,
            };
            weights.files.push(file);
            for tensor in tensors {
                weights.add(tensor)?;
            }
        }
        Ok(weights)
    }

    /// Add a tensor. Stored in two shards, the one that the index names counts.
    fn add(&mut self, tensor: StoredTensor) -> Result<(), CheckpointError> {
        if let Some(&earlier) = self.by_name.get(&tensor.name) {
            let first = self.files[self.tensors[earlier].file].name.clone();
            let second = self.files[tensor.file].name.clone();
            match self.listed.get(&tensor.name) {
                Some(named) if *named == first => return Ok(()),
                Some(named) if *named == second => {}
                _ => {
                    let source = Box::new(IndexError::Duplicate { tensor: tensor.name, first, second });
                    return Err(CheckpointError::Index { path: self.index_path(), source });
                }
            }
        }
        self.by_name.insert(tensor.name.clone(), self.tensors.len());
        self.tensors.push(tensor);
        Ok(())
    }

    /// Name the tensors behind `prefix` without it; others keep theirs, unless one of these has it now.
    pub(crate) fn remove_prefix(&mut self, prefix: &str) {
        let inner = |name: &str| name.strip_prefix(prefix).map(str::to_owned);
        let (inside, outside): (Vec<_>, Vec<_>) = self.by_name.drain().partition(|(name, _)| name.starts_with(prefix));
        self.by_name.extend(outside);
        self.by_name.extend(inside.into_iter().filter_map(|(name, index)| Some((inner(&name)?, index))));
        let listed = std::mem::take(&mut self.listed);
        self.listed = listed.into_iter().map(|(name, shard)| (inner(&name).unwrap_or(name), shard)).collect();
    }

    pub(crate) fn index_path(&self) -> std::path::PathBuf {
        self.index.as_ref().map(|file| file.path.clone()).unwrap_or_default()
    }
}

fn parse_index(json: &[u8]) -> Result<BTreeMap<String, String>, IndexError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = python_json::parse(json).map_err(|reason| IndexError::Malformed { reason })?;
    if index.weight_map.is_empty() {
        return Err(IndexError::Malformed { reason: "the weight map is empty. Download it again".into() });
    }
    Ok(index.weight_map)
}

/// The shards that an index file lists, each a plain name, sorted; whether they exist is not looked at.
///
/// # Errors
/// What is wrong with the index.
pub fn index_shards(json: &[u8]) -> Result<Vec<String>, IndexError> {
    plain_shards(&parse_index(json)?)
}

/// The shards of an index, each a plain name of a file that exists.
fn shard_names(dir: &Path, map: &BTreeMap<String, String>) -> Result<Vec<String>, IndexError> {
    let shards = plain_shards(map)?;
    let is_missing = |shard: &&String| dir.join(shard).metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    let missing: Vec<String> = shards.iter().filter(is_missing).cloned().collect();
    if missing.is_empty() { Ok(shards) } else { Err(IndexError::MissingShards { shards: missing }) }
}

fn plain_shards(map: &BTreeMap<String, String>) -> Result<Vec<String>, IndexError> {
    let mut shards: Vec<String> = map.values().cloned().collect();
    shards.sort();
    shards.dedup();
    if shards.len() > SHARDS_MAX {
        return Err(IndexError::TooManyShards { found: shards.len(), limit: SHARDS_MAX });
    }
    for shard in &shards {
        let mut components = Path::new(shard).components();
        let is_plain = matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == shard.as_str());
        if !is_plain || shard.contains('\0') {
            return Err(IndexError::Path { shard: shard.chars().take(200).collect() });
        }
    }
    Ok(shards)
}

fn no_such(dir: &Path, name: &str) -> CheckpointError {
    CheckpointError::Io { action: "open", path: dir.join(name), source: io::ErrorKind::NotFound.into() }
}

/// No configuration: files of another format, if there are any, tell more.
pub(crate) fn explain_missing_config(dir: &Path) -> CheckpointError {
    match explain_absence(dir) {
        error @ CheckpointError::OtherFormat { .. } => error,
        _ => CheckpointError::NoConfig { dir: dir.to_owned() },
    }
}

/// No weights that can be read: say what is there instead.
fn explain_absence(dir: &Path) -> CheckpointError {
    let names = std::fs::read_dir(dir).map(|entries| {
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.take(10_000).collect();
        names.sort();
        names
    });
    let mut names = match names {
        Ok(names) => names,
        Err(source) => return CheckpointError::Io { action: "list", path: dir.to_owned(), source },
    };
    type Test = fn(&str) -> bool;
    let others: [(Foreign, Test); 7] = [
        (Foreign::ShardsWithoutIndex, |name| {
            name.contains("-of-") && (name.ends_with(".safetensors") || name.ends_with(".bin"))
        }),
        (Foreign::Adapter, |name| name.starts_with("adapter_model.")),
        (Foreign::Gguf, |name| name.ends_with(".gguf")),
        (Foreign::Flax, |name| name.starts_with("flax_model") && name.contains(".msgpack")),
        (Foreign::TensorFlow, |name| name.starts_with("tf_model") || name.ends_with(".ckpt.index")),
        (Foreign::OriginalTorch, |name| name.ends_with(".pth") || name.ends_with(".pt")),
        (Foreign::Onnx, |name| name.ends_with(".onnx")),
    ];
    for (found, is_one) in others {
        if let Some(file) = names.iter().find(|name| is_one(name)) {
            return CheckpointError::OtherFormat { dir: dir.to_owned(), file: file.clone(), found };
        }
    }
    names.truncate(20);
    CheckpointError::NoWeights { dir: dir.to_owned(), found: names }
}
