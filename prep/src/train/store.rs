//! Predictor files: one safetensors file per layer; `docs/predictors.md` describes them.

use std::collections::HashMap;
use std::path::Path;

use flashlm_formats::publish::publish_bytes;
use flashlm_formats::seal::{self, SEAL};
use half::f16;
use ndarray::Array2;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::params::TrainError;
use super::predictor::{LowRankPredictor, PredictorDType, quantise_rows};

/// A predictor to be stored, under the prefix of its tensors: empty, or `lookahead.`.
#[derive(Clone, Copy, Debug)]
pub struct StoredPredictor<'a> {
    /// Put before each tensor's name.
    pub prefix: &'a str,
    /// The predictor, with its threshold folded into the bias.
    pub predictor: &'a LowRankPredictor,
    /// How its matrices are stored.
    pub dtype: PredictorDType,
}

/// A tensor that is there where a ReLU stands behind the encoder.
const RELU: &str = "encoder_relu";

/// Writes predictors into one file, whole or not at all.
pub fn write_predictor(path: &Path, parts: &[StoredPredictor<'_>]) -> Result<(), TrainError> {
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for part in parts {
        let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut matrix = |name: &str, matrix: &Array2<f32>| {
            let name = format!("{}{name}", part.prefix);
            let shape = matrix.shape().to_vec();
            match part.dtype {
                PredictorDType::F16 => {
                    let bytes = matrix.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
                    tensors.push((name, Dtype::F16, shape, bytes));
                }
                PredictorDType::Int8 => {
                    let (bytes, scales) = quantise_rows(matrix);
                    tensors.push((format!("{name}_scale"), Dtype::F32, vec![shape[0]], floats(&scales)));
                    tensors.push((name, Dtype::I8, shape, bytes.iter().map(|&b| b as u8).collect()));
                }
            }
        };
        matrix("encoder", &part.predictor.encoder);
        matrix("decoder", &part.predictor.decoder);
        if part.predictor.relu {
            tensors.push((format!("{}{RELU}", part.prefix), Dtype::U8, vec![1], vec![1]));
        }
        let bias = part.predictor.bias.to_vec();
        tensors.push((format!("{}bias", part.prefix), Dtype::F32, vec![bias.len()], floats(&bias)));
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("shape and bytes are made together"))
    });
    let metadata = HashMap::from([(SEAL.0.to_owned(), SEAL.1.to_owned())]);
    let mut bytes = safetensors::serialize(views, Some(metadata)).expect("plain tensors serialise");
    seal::seal(&mut bytes);
    publish(path, &bytes)
}

/// Writes a file whole, or not at all.
pub(crate) fn publish(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    publish_bytes(path, bytes).map_err(|source| TrainError::Io { path: path.to_path_buf(), source })
}
