//! Matching what a model needs with what its files hold, whose names may stand behind a prefix, and may be more than are needed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use super::Note;
use super::config_error::ConfigError;
use super::directory::Weights;
use super::error::CheckpointError;
use super::families::{Config, Family};
use super::file::SourceFile;
use super::head_names::HEADS;
use super::index_error::IndexError;
use super::plan::{CanonicalTensor, Plan};
use super::tensor::{StoredDtype, StoredTensor};
use super::tensor_problem::TensorProblem;
use super::{DType, FfnMatrix};
use crate::model::ModelSpec;

/// A model's tensors, found in the files.
#[derive(Debug)]
pub(crate) struct Chosen {
    /// What comes before the names of the body's tensors.
    prefix: &'static str,
    /// Name of the head, as stored.
    head: &'static str,
    pub(crate) plan: Plan,
}

/// An error of any kind, until the paths are known.
pub(crate) enum ChoiceError {
    Config(ConfigError),
    Read(CheckpointError),
    TwoModels(String, String),
}

impl ChoiceError {
    pub(crate) fn or(self, dir: &Path, config: impl Fn(ConfigError) -> CheckpointError) -> CheckpointError {
        match self {
            Self::Config(error) => config(error),
            Self::Read(error) => error,
            Self::TwoModels(first, second) => CheckpointError::TwoModels { dir: dir.to_owned(), first, second },
        }
    }
}

/// The plan under the names that find most tensors, and with the head decided (see the parent module's table).
///
/// Names that all stand behind a wrapper's (`module.`, `_orig_mod.`, `base_model.model.`) lose it in `weights`.
pub(crate) fn choose(
    family: &Family,
    config: &Config,
    spec: &mut ModelSpec,
    weights: &mut Weights,
    notes: &mut Vec<Note>,
) -> Result<Chosen, ChoiceError> {
    let planned = |spec: &ModelSpec, prefix| {
        let mut plan = Plan::default();
        (family.plan)(spec, config, prefix, &mut plan).map(|()| plan).map_err(ChoiceError::Config)
    };
    let body = |(wrapper, prefix): &(String, &str)| [wrapper, *prefix].concat();
    let (mut best, mut found, mut rival) = ((String::new(), family.prefixes[0]), 0, None);
    for &prefix in family.prefixes {
        let plan = planned(spec, prefix)?;
        for wrapper in wrappers(family, weights) {
            let is_there = |name: &&str| match wrapper.is_empty() {
                true => weights.by_name.contains_key(*name),
                false => weights.by_name.contains_key(&format!("{wrapper}{name}")),
            };
            let count = plan.sources().filter(is_there).count();
            if count > found {
                (best, found, rival) = ((wrapper, prefix), count, None);
            } else if count == found && count > 0 && !best.0.is_empty() && [&*wrapper, prefix].concat() != body(&best) {
                rival = Some(wrapper);
            }
        }
    }
    let (wrapper, prefix) = best;
    if let Some(rival) = rival {
        return Err(ChoiceError::TwoModels(wrapper, rival));
    }
    if !wrapper.is_empty() {
        weights.remove_prefix(&wrapper);
        notes.push(Note::Prefix { prefix: wrapper });
    }
    let embedding_name = format!("{prefix}{}", family.embedding);
    let stored = |name: &str| weights.by_name.get(name).map(|&index| &weights.tensors[index]);
    let known = HEADS.contains(&family.head);
    let other = HEADS.into_iter().find(|&name| known && name != family.head && stored(name).is_some());
    let head = other.filter(|_| stored(family.head).is_none()).unwrap_or(family.head);
    let mut head_is_embedding = false;
    if spec.tied_head {
        match (stored(&embedding_name), stored(head)) {
            (Some(embedding), Some(head))
                if !have_equal_bytes(embedding, head, &weights.files).map_err(ChoiceError::Read)? =>
            {
                spec.tied_head = false;
                notes.push(Note::HeadNotTied);
            }
            (None, Some(_)) => {
                head_is_embedding = true;
                notes.push(Note::HeadIsEmbedding);
            }
            _ => {}
        }
    }
    let mut plan = planned(spec, prefix)?;
    plan.rename_source(family.head, head);
    if head_is_embedding {
        plan.rename_source(&embedding_name, head);
    }
    Ok(Chosen { prefix, head, plan })
}

/// What may come before all names of the model: nothing, and what comes before an embedding or a head.
fn wrappers(family: &Family, weights: &Weights) -> Vec<String> {
    /// Whoever has more than that has no model but a collection.
    const MAX: usize = 6;
    let mut found = BTreeSet::new();
    for name in weights.by_name.keys() {
        let before = [family.embedding, HEADS[0], HEADS[1]].into_iter().find_map(|end| name.strip_suffix(end));
        let Some(before) = before else { continue };
        let outside = family.prefixes.iter().filter_map(|prefix| before.strip_suffix(prefix));
        found.extend(outside.filter(|wrapper| wrapper.ends_with('.')).map(str::to_owned));
    }
    std::iter::once(String::new()).chain(found.into_iter().take(MAX)).collect()
}

/// Why tensors are missing: the index and its shards know more than the files that are there.
pub(crate) fn explain(dir: &Path, problems: Vec<TensorProblem>, chosen: &Chosen, weights: &Weights) -> CheckpointError {
    let failed = |source| CheckpointError::Index { path: weights.index_path(), source: Box::new(source) };
    let mut missing = Vec::new();
    for problem in &problems {
        if let TensorProblem::Missing { tensor, .. } = problem {
            missing.push(tensor);
        }
    }
    let listed = missing.iter().filter_map(|name| Some(format!("{name} ({})", weights.listed.get(*name)?)));
    let tensors: Vec<String> = listed.collect();
    if !tensors.is_empty() && tensors.len() == problems.len() {
        return failed(IndexError::NotInShard { tensors });
    }
    let mut unplaced = Vec::new();
    if !missing.is_empty() {
        let used: HashSet<&str> = chosen.plan.sources().collect();
        unplaced.extend(weights.by_name.keys().filter(|name| !used.contains(name.as_str())).cloned());
        unplaced.sort();
    }
    CheckpointError::Tensors { dir: dir.to_owned(), problems, unplaced }
}

/// Whether two stored tensors hold the same: the same place, or the same bytes in the same shape.
fn have_equal_bytes(a: &StoredTensor, b: &StoredTensor, files: &[SourceFile]) -> Result<bool, CheckpointError> {
    /// Bytes compared at a time.
    const CHUNK: usize = 1 << 20;
    if a.is_same_place(b) {
        return Ok(true);
    }
    let StoredDtype::Weight(dtype) = a.dtype else { return Ok(false) };
    let &[rows, columns] = a.shape.as_slice() else { return Ok(false) };
    if a.shape != b.shape || a.dtype != b.dtype {
        return Ok(false);
    }
    let step = (CHUNK / (columns * dtype.bytes()).max(1)).max(1);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for start in (0..rows).step_by(step) {
        let rows = start..(start + step).min(rows);
        left.clear();
        right.clear();
        a.append_rows(files, dtype, rows.clone(), &mut left)?;
        b.append_rows(files, dtype, rows, &mut right)?;
        if left != right {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a stored tensor that the model has no place for is one that a program keeps beside its weights and makes again from
/// the configuration: tables of rotary positions, masks, counters and position numbers. transformers ignores them all.
fn is_buffer(tensor: &StoredTensor) -> bool {
    /// Modules whose own `bias` is a mask; what is added to projections stands one level deeper.
    const ATTENTION: [&str; 4] = ["attn", "self_attn", "attention", "self_attention"];
    let mut parts = tensor.name.rsplit('.');
    let (last, module) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    let is_known = matches!(
        last,
        "inv_freq" | "cos_cached" | "sin_cached" | "masked_bias" | "attn_mask" | "causal_mask" | "position_ids"
    );
    let is_mask = last == "bias" && ATTENTION.contains(&module);
    let is_counted = matches!(tensor.dtype, StoredDtype::Other("bool" | "i64" | "i32")) && last != "weight";
    is_known || is_mask || is_counted || module.contains("rotary_emb")
}

/// Stored tensors that the plan leaves out: those outside the model's body are listed, buffers are ignored, and
/// anything else in the body means that the configuration describes another model.
pub(crate) fn unused(
    family: &Family,
    spec: &ModelSpec,
    chosen: &Chosen,
    weights: &Weights,
) -> Result<Vec<String>, Vec<TensorProblem>> {
    let Chosen { prefix, head, plan } = chosen;
    let used: HashSet<&str> = plan.sources().collect();
    let (mut unused, mut problems) = (Vec::new(), Vec::new());
    let mut names: Vec<(&String, &usize)> = weights.by_name.iter().collect();
    names.sort();
    for (name, &index) in names {
        if used.contains(name.as_str()) || name == head || is_buffer(&weights.tensors[index]) {
            continue;
        }
        match name.strip_prefix(prefix) {
            Some(inner) if (family.is_ignorable)(spec, inner) => {}
            // Without a prefix every foreign tensor seems to be in the body.
            Some(_) if !prefix.is_empty() => problems.push(TensorProblem::Unexpected { tensor: name.clone() }),
            _ if name.starts_with("lm_head.") => problems.push(TensorProblem::Unexpected { tensor: name.clone() }),
            _ => unused.push(name.clone()),
        }
    }
    if problems.is_empty() { Ok(unused) } else { Err(problems) }
}

/// Neuron records mix rows of all projections, so these share one dtype.
pub(crate) fn ffn_dtype(
    spec: &ModelSpec,
    tensors: &BTreeMap<String, CanonicalTensor>,
    weights: &Weights,
) -> Result<DType, TensorProblem> {
    let all = (0..spec.layers.len()).flat_map(|layer| {
        [FfnMatrix::Up, FfnMatrix::Down, FfnMatrix::Gate].map(|matrix| tensors.get(&matrix.canonical(layer)))
    });
    let mut all = all.flatten().map(|tensor| (weights.tensors[tensor.parts[0].0].name.clone(), tensor.dtype));
    let missing = || TensorProblem::Missing { tensor: FfnMatrix::Up.canonical(0), expected: vec![spec.ffn().size] };
    let first = all.next().ok_or_else(missing)?;
    match all.find(|(_, dtype)| *dtype != first.1) {
        None => Ok(first.1),
        Some(second) => Err(TensorProblem::Mixed { tensor: "the FFN projections".into(), first, second }),
    }
}

/// Stored bytes of the tensors that are used, those stored once and used twice counted once.
pub(crate) fn model_bytes(tensors: &BTreeMap<String, CanonicalTensor>, stored: &[StoredTensor]) -> u64 {
    let mut places = BTreeMap::new();
    for tensor in tensors.values() {
        for (index, _) in &tensor.parts {
            let source = &stored[*index];
            let elements: usize = source.shape.iter().product();
            places.insert((source.file, source.offset, source.shape.clone()), (elements * tensor.dtype.bytes()) as u64);
        }
    }
    places.values().sum()
}
