//! Storage orders that other programs made: one file for each layer, of numpy (`order[position] = neuron`) or of ours.

use std::path::{Path, PathBuf};

use flashlm_formats::ids::NeuronId;
use flashlm_formats::orders::{OrderFile, OrderFileError};

use crate::layer_files::{self, LayerFilesError};
use crate::npy::{self, NpyError};

/// Orders of others cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignOrderError {
    /// Not one file for each layer.
    #[error(transparent)]
    Files(#[from] LayerFilesError),
    /// No array of whole numbers.
    #[error("layer {layer}: {source}")]
    Array {
        /// The layer.
        layer: usize,
        /// What is wrong.
        source: NpyError,
    },
    /// An order of ours that is damaged, or of another layer.
    #[error("layer {layer}: {source}")]
    File {
        /// The layer.
        layer: usize,
        /// What is wrong.
        source: OrderFileError,
    },
    /// Another number of neurons.
    #[error("layer {layer}: {} lists {found} neurons, the layer has {expected}", path.display())]
    Length {
        /// The layer.
        layer: usize,
        /// The file.
        path: PathBuf,
        /// Neurons of the layer.
        expected: usize,
        /// Neurons in the file.
        found: usize,
    },
    /// A neuron that the layer does not have, or that is listed twice.
    #[error(
        "layer {layer}: {} has neuron {neuron} at position {at}, {what}; an order lists every neuron once, order[position] = neuron",
        path.display()
    )]
    NoPermutation {
        /// The layer.
        layer: usize,
        /// The file.
        path: PathBuf,
        /// Where.
        at: usize,
        /// What is there.
        neuron: u32,
        /// What is wrong with it.
        what: String,
    },
}

/// The order of each of `layers` layers of `neurons` neurons in `dir`, checked to list every neuron once.
///
/// # Errors
/// If a layer has none, or one that is no such order.
pub fn read(dir: &Path, layers: usize, neurons: usize) -> Result<Vec<Vec<NeuronId>>, ForeignOrderError> {
    let like = "layer-000.npy or layer-000.order.safetensors";
    let files = layer_files::find(dir, layers, &["npy", "safetensors"], like)?;
    files.iter().enumerate().map(|(layer, path)| read_layer(path, layer, neurons)).collect()
}

fn read_layer(path: &Path, layer: usize, neurons: usize) -> Result<Vec<NeuronId>, ForeignOrderError> {
    if path.extension().is_none_or(|extension| extension != "npy") {
        let read = OrderFile::read_from(path, layer, neurons);
        return Ok(read.map_err(|source| ForeignOrderError::File { layer, source })?.order);
    }
    let order = npy::read(path, neurons as u32).map_err(|source| ForeignOrderError::Array { layer, source })?;
    let path = || path.to_owned();
    if order.len() != neurons {
        return Err(ForeignOrderError::Length { layer, path: path(), expected: neurons, found: order.len() });
    }
    let mut position = vec![None; neurons];
    for (at, &neuron) in order.iter().enumerate() {
        let what = match position.get_mut(neuron as usize) {
            None => format!("and the layer has neurons 0 to {}", neurons - 1),
            Some(Some(before)) => format!("as at position {before}"),
            Some(free) => {
                *free = Some(at);
                continue;
            }
        };
        return Err(ForeignOrderError::NoPermutation { layer, path: path(), at, neuron, what });
    }
    Ok(order.into_iter().map(NeuronId).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_with_its_layer_and_neuron() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, order: &[u32]| std::fs::write(dir.path().join(name), npy::encode(order)).unwrap();
        write("order_0.npy", &[2, 0, 1]);
        OrderFile {
            layer: 1,
            strategy: "x".into(),
            recording: "y".into(),
            groups: None,
            order: [1, 2, 0].map(NeuronId).into(),
        }
        .write(dir.path())
        .unwrap();
        assert_eq!(read(dir.path(), 2, 3).unwrap(), [[2, 0, 1], [1, 2, 0]].map(|order| order.map(NeuronId)));
        let says = |order: &[u32], text: &str| {
            write("order_0.npy", order);
            let said = read(dir.path(), 2, 3).unwrap_err().to_string();
            assert!(said.starts_with("layer 0: ") && said.contains(text), "{said}");
        };
        says(&[2, 0, 2], "has neuron 2 at position 2, as at position 0");
        says(&[2, 3, 1], "has neuron 3 at position 1, and the layer has neurons 0 to 2");
        says(&[1, 0], "lists 2 neurons, the layer has 3");
        write("order_0.npy", &[2, 0, 1]);
        let said = read(dir.path(), 3, 3).unwrap_err().to_string();
        assert!(said.contains("such as layer-000.npy") && said.ends_with("missing: 2"), "{said}");
        assert!(matches!(read(dir.path(), 2, 4), Err(ForeignOrderError::Length { layer: 0, .. })));
        std::fs::rename(dir.path().join("layer-001.order.safetensors"), dir.path().join("layer-002.safetensors"))
            .unwrap();
        std::fs::rename(dir.path().join("order_0.npy"), dir.path().join("order_1.npy")).unwrap();
        write("order_0.npy", &[2, 0, 1]);
        assert!(matches!(read(dir.path(), 3, 3), Err(ForeignOrderError::File { layer: 2, .. })), "of layer 1");
    }
}
