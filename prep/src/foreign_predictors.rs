//! Two-matrix predictors in the formats of Deja Vu and PowerInfer: one file of tensors for each layer.
//!
//! | | files | tensors | between the matrices |
//! |---|---|---|---|
//! | Deja Vu | `c4_.._layer12_-0.98-640.pt` | `0.weight`, `1.weight` | nothing |
//! | PowerInfer | `model_12.pt` | `fc1.weight`, `fc2.weight` | ReLU |
//!
//! `0.weight` with `2.weight`, as `Sequential(Linear, ReLU, Linear)` is saved, is taken for the second form. Either may have biases; the first
//! matrix's bias only where nothing is between. The first matrix is `[rank, hidden]`, the second `[neurons, rank]`; the files are those of
//! `torch.save` (a state dict), or safetensors. Knows nothing of thresholds.

use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::{CheckpointError, NamedTensor, read_tensors};
use ndarray::{Array1, Array2};

use crate::layer_files::{self, LayerFilesError};
use crate::train::LowRankPredictor;

/// Predictors of others cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignError {
    /// Not one file for each layer.
    #[error(transparent)]
    Files(#[from] LayerFilesError),
    /// A file cannot be read.
    #[error("{source}")]
    File {
        /// What is wrong.
        source: Box<CheckpointError>,
    },
    /// The tensors are no such predictor.
    #[error("{}: {what}; expected 0.weight and 1.weight (Deja Vu) or fc1.weight and fc2.weight (PowerInfer)", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// It can be read and not be represented.
    #[error(
        "{}: the first matrix has a bias and is followed by a ReLU, which flashlm's predictors cannot have; \
         train one with `flashlm-prep train`",
        path.display()
    )]
    BiasBeforeRelu {
        /// The file.
        path: PathBuf,
    },
}

/// The file of each of `layers` layers, in order.
pub fn find_files(dir: &Path, layers: usize) -> Result<Vec<PathBuf>, ForeignError> {
    let like = "model_0.pt or ..layer0...pt";
    Ok(layer_files::find(dir, layers, &["pt", "pth", "bin", "safetensors"], like)?)
}

/// Reads one predictor. `relu` overrides what the tensors' names say of what is between the matrices.
pub fn read(path: &Path, relu: Option<bool>) -> Result<LowRankPredictor, ForeignError> {
    let tensors = read_tensors(path).map_err(|source| ForeignError::File { source: Box::new(source) })?;
    let wrong = |what: String| ForeignError::Form { path: path.to_owned(), what };
    // Saved from inside a module, names have something before them.
    let find = |name: &str| {
        let is_it =
            |t: &&NamedTensor| t.name.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        tensors.iter().find(is_it)
    };
    let forms = [("fc1", "fc2", true), ("0", "2", true), ("0", "1", false)];
    let form = forms.into_iter().find_map(|(first, second, between)| {
        Some((find(&format!("{first}.weight"))?, find(&format!("{second}.weight"))?, first, second, between))
    });
    let Some((first, second, first_name, second_name, between)) = form else {
        let names: Vec<&str> = tensors.iter().take(12).map(|t| t.name.as_str()).collect();
        return Err(wrong(format!("it holds {}", if names.is_empty() { "nothing".into() } else { names.join(", ") })));
    };
    let relu = relu.unwrap_or(between);
    let matrix = |tensor: &NamedTensor| match *tensor.shape {
        // Nothing by very much is a shape that no matrix can have.
        [rows, columns] if rows > 0 && columns > 0 => {
            Ok(Array2::from_shape_vec((rows, columns), tensor.values.clone()).expect("as many as its shape says"))
        }
        _ => Err(wrong(format!("{} has shape {:?}", tensor.name, tensor.shape))),
    };
    let (encoder, decoder) = (matrix(first)?, matrix(second)?);
    if encoder.nrows() != decoder.ncols() {
        return Err(wrong(format!("{:?} and {:?} do not fit together", first.shape, second.shape)));
    }
    let vector = |name: String, length: usize| match find(&name) {
        None => Ok(Array1::zeros(length)),
        Some(tensor) if *tensor.shape == [length] => Ok(Array1::from_vec(tensor.values.clone())),
        Some(tensor) => Err(wrong(format!("{} has shape {:?}, expected [{length}]", tensor.name, tensor.shape))),
    };
    let inner = vector(format!("{first_name}.bias"), encoder.nrows())?;
    let mut bias = vector(format!("{second_name}.bias"), decoder.nrows())?;
    if inner.iter().any(|&b| b != 0.0) {
        if relu {
            return Err(ForeignError::BiasBeforeRelu { path: path.to_owned() });
        }
        // B (A x + a) + b = B A x + (B a + b)
        bias += &decoder.dot(&inner);
    }
    Ok(LowRankPredictor { encoder, decoder, bias, relu })
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    fn save(path: &Path, tensors: &[(&str, &[usize], &[f32])]) {
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        let views =
            tensors.iter().zip(&bytes).map(|(t, b)| (t.0, TensorView::new(Dtype::F32, t.1.to_vec(), b).unwrap()));
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    #[test]
    fn each_form_is_understood_and_what_cannot_be_represented_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model_0.safetensors");
        let (a, b): (&[f32], &[f32]) = (&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0, -1.0, 2.0, 0.5, 0.0, 1.0, 1.0, 1.0]);
        for (first, second, relu) in
            [("0.weight", "1.weight", false), ("fc1.weight", "fc2.weight", true), ("x.0.weight", "x.2.weight", true)]
        {
            save(&path, &[(first, &[2, 3], a), (second, &[4, 2], b)]);
            let read = read(&path, None).unwrap();
            assert_eq!((read.relu, read.rank(), read.bias.len()), (relu, 2, 4), "{first}");
            assert_eq!(read.decoder[[1, 0]], 2.0);
        }
        let biased: [(&str, &[usize], &[f32]); 3] =
            [("0.weight", &[2, 3], a), ("1.weight", &[4, 2], b), ("0.bias", &[2], &[10.0, 1.0])];
        save(&path, &biased);
        assert_eq!(read(&path, None).unwrap().bias.to_vec(), [9.0, 20.5, 1.0, 11.0]);
        assert!(matches!(read(&path, Some(true)), Err(ForeignError::BiasBeforeRelu { .. })));
        save(&path, &[("0.weight", &[2, 3], a), ("1.weight", &[2, 4], b)]);
        assert!(matches!(read(&path, None), Err(ForeignError::Form { .. })));
        for none in [[0, usize::MAX], [0, 1 << 63], [1 << 63, 0]] {
            save(&path, &[("0.weight", &none, &[]), ("1.weight", &[4, 0], &[])]);
            assert!(read(&path, None).is_err(), "{none:?}");
        }
        save(&path, &[("linear.weight", &[2, 3], a)]);
        assert!(read(&path, None).unwrap_err().to_string().contains("linear.weight"));
    }

    #[test]
    fn files_of_torch_are_read_as_they_are_published() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures/predictors");
        for (name, relu) in [("model_0.pt", true), ("model_1.pt", true), ("c4_0_layer2_-0.9812-640.pt", false)] {
            let read = read(&dir.join(name), None).unwrap();
            assert_eq!(read.encoder, Array2::from_shape_fn((2, 3), |(i, j)| (i * 3 + j) as f32 / 2.0 - 1.0), "{name}");
            assert_eq!(read.decoder, Array2::from_shape_fn((4, 2), |(i, j)| (i * 2 + j) as f32 / 2.0 - 1.0), "{name}");
            assert_eq!((read.relu, read.bias), (relu, Array1::zeros(4)), "{name}");
        }
        let error = |name| read(&dir.join(name), None).unwrap_err().to_string();
        assert!(error("legacy_3.pt").contains("before version 1.6"), "{}", error("legacy_3.pt"));
        // A whole module would have to be executed.
        assert!(error("module_4.pt").contains("nothing is executed"), "{}", error("module_4.pt"));
        assert!(find_files(&dir, 5).is_ok());
    }
}
