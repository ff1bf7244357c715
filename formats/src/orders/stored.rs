//! The storage orders of a whole model.

use std::path::Path;

use super::file::{GroupShape, OrderFile, OrderFileError};
use crate::ids::NeuronId;
use crate::model::ModelSpec;

/// The storage orders of all layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredOrders {
    /// The strategies that made them, joined with `+`.
    pub name: String,
    /// `layers[layer][position] = neuron`.
    pub layers: Vec<Vec<NeuronId>>,
    /// The groups that they were made for, where all say the same.
    pub groups: Option<GroupShape>,
}

impl StoredOrders {
    /// Reads and checks the orders of a model's layers in `dir`.
    ///
    /// # Errors
    /// If one of them is missing or damaged.
    pub fn read(dir: &Path, spec: &ModelSpec) -> Result<Self, OrderFileError> {
        let files = (0..spec.layers.len()).map(|layer| OrderFile::read(dir, layer, spec.ffn().size));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let mut names: Vec<&str> = files.iter().map(|file| file.strategy.as_str()).collect();
        names.dedup();
        let name = names.join("+");
        let first = files.first().and_then(|first| first.groups);
        let groups = first.filter(|groups| files.iter().all(|file| file.groups == Some(*groups)));
        Ok(Self { name, layers: files.into_iter().map(|file| file.order).collect(), groups })
    }
}
