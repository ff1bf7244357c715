//! How canonical tensors are made from stored ones: concatenated ranges of rows; and matching such a plan with what a
//! checkpoint holds, reporting every difference at once. Reads no bytes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::tensor::{StoredDtype, StoredTensor};
use super::tensor_problem::TensorProblem;
use crate::model::DType;

/// Rows (elements, for a vector) of a stored tensor that must have a certain shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Name in the checkpoint.
    pub(crate) source: Arc<str>,
    /// Shape of the whole stored tensor.
    pub(crate) shape: Vec<usize>,
    pub(crate) rows: Blocks,
}

/// Blocks of `len` rows, the first from `first` on, each begins `step` after the one before.
///
/// They are never written out: a configuration is short, and may ask for thousands of heads in thousands of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) first: usize,
    pub(crate) len: usize,
    pub(crate) step: usize,
    pub(crate) count: usize,
}

impl Blocks {
    fn rows(self) -> usize {
        self.len * self.count
    }

    pub(crate) fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.count).map(move |block| {
            let start = self.first + block * self.step;
            start..start + self.len
        })
    }
}

impl Part {
    pub(crate) fn whole(source: impl Into<Arc<str>>, shape: &[usize]) -> Self {
        let rows = Blocks { first: 0, len: shape[0], step: 0, count: 1 };
        Self { source: source.into(), shape: shape.to_vec(), rows }
    }

    /// Some rows of the same tensor.
    pub(crate) fn rows(&self, rows: Blocks) -> Self {
        Self { rows, ..self.clone() }
    }
}

/// Parts of each canonical tensor, by name. Besides [`crate::model::ModelSpec::resident_tensors`] these are
/// `layers.N.ffn.{gate,up,down}.weight`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    tensors: BTreeMap<String, Vec<Part>>,
}

impl Plan {
    pub(crate) fn add(&mut self, canonical: impl Into<String>, parts: Vec<Part>) {
        self.tensors.insert(canonical.into(), parts);
    }

    /// Names of the stored tensors that are used.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &str> {
        self.parts().map(|part| &*part.source)
    }

    /// Every part of every canonical tensor.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &Part> {
        self.tensors.values().flatten()
    }

    /// Take `to` wherever `from` was planned.
    pub(crate) fn rename_source(&mut self, from: &str, to: &str) {
        let to: Arc<str> = to.into();
        for part in self.tensors.values_mut().flatten().filter(|part| &*part.source == from) {
            part.source = to.clone();
        }
    }

    /// Match with the stored tensors, of which `by_name` gives the index.
    pub(crate) fn resolve(
        &self,
        stored: &[StoredTensor],
        by_name: &HashMap<String, usize>,
    ) -> Result<BTreeMap<String, CanonicalTensor>, Vec<TensorProblem>> {
        let (mut resolved, mut problems, mut reported) = (BTreeMap::new(), Vec::new(), HashSet::new());
        for (canonical, parts) in &self.tensors {
            let mut found: Vec<(usize, Blocks, DType)> = Vec::with_capacity(parts.len());
            for part in parts {
                let tensor = part.source.to_string();
                let problem = match by_name.get(&*part.source).map(|&index| (index, &stored[index])) {
                    None => TensorProblem::Missing { tensor, expected: part.shape.clone() },
                    Some((_, there)) if there.shape != part.shape => {
                        TensorProblem::Shape { tensor, expected: part.shape.clone(), found: there.shape.clone() }
                    }
                    Some((index, there)) => match there.dtype {
                        StoredDtype::Weight(dtype) => {
                            found.push((index, part.rows, dtype));
                            continue;
                        }
                        other => TensorProblem::Dtype { tensor, found: other.name().into() },
                    },
                };
                // One stored tensor may be many parts.
                if reported.insert(part.source.clone()) {
                    problems.push(problem);
                }
            }
            let Some(&(first, _, dtype)) = found.first() else { continue };
            if let Some(&(other, _, other_dtype)) = found.iter().find(|(_, _, other)| *other != dtype) {
                let name = |index: usize| stored[index].name.clone();
                let (first, second) = ((name(first), dtype), (name(other), other_dtype));
                problems.push(TensorProblem::Mixed { tensor: canonical.clone(), first, second });
            }
            let mut shape = parts[0].shape.clone();
            shape[0] = parts.iter().map(|part| part.rows.rows()).sum();
            let parts = found.into_iter().map(|(index, rows, _)| (index, rows)).collect();
            resolved.insert(canonical.clone(), CanonicalTensor { dtype, shape, parts });
        }
        if problems.is_empty() { Ok(resolved) } else { Err(problems) }
    }
}

/// A canonical tensor whose parts have been found.
#[derive(Debug)]
pub(crate) struct CanonicalTensor {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Index of the stored tensor, and its rows.
    pub(crate) parts: Vec<(usize, Blocks)>,
}
