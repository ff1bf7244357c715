//! From trained predictors to their files, which `flashlm_formats::predictors` knows.

use std::path::Path;

use flashlm_formats::bundle::PredictorDType;
use flashlm_formats::predictors::{self, PredictorPart, StoredElements, StoredMatrix};
use half::f16;
use ndarray::Array2;

use super::params::TrainError;
use super::predictor::{LowRankPredictor, quantise_rows};

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

impl<'a> StoredPredictor<'a> {
    fn part(&self) -> PredictorPart<'a> {
        let Self { prefix, predictor, dtype } = *self;
        PredictorPart {
            prefix,
            encoder: stored(&predictor.encoder, dtype),
            decoder: stored(&predictor.decoder, dtype),
            relu: predictor.relu,
            bias: predictor.bias.as_slice().expect("standard layout"),
        }
    }
}

fn stored(matrix: &Array2<f32>, dtype: PredictorDType) -> StoredMatrix {
    let elements = match dtype {
        PredictorDType::F16 => StoredElements::F16(matrix.iter().map(|&v| f16::from_f32(v)).collect()),
        PredictorDType::Int8 => {
            let (bytes, scales) = quantise_rows(matrix);
            StoredElements::Int8 { bytes, scales }
        }
    };
    StoredMatrix { rows: matrix.nrows(), columns: matrix.ncols(), elements }
}

/// Writes predictors into one file, whole or not at all.
pub fn write_predictor(path: &Path, parts: &[StoredPredictor<'_>]) -> Result<(), TrainError> {
    let parts: Vec<PredictorPart<'_>> = parts.iter().map(StoredPredictor::part).collect();
    predictors::write_predictor(path, &parts).map_err(|source| TrainError::Io { path: path.to_path_buf(), source })
}
