//! The predictor of one layer, with a look-ahead to the next one where there is one: a safetensors
//! file, neurons in the checkpoint's order.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::bundle::PREDICTOR_ROWS;
use crate::publish::publish_bytes;
use crate::regular::open_regular;
use crate::seal::{self, SEAL};

/// Tensors of a look-ahead have this before their names.
pub const LOOK_AHEAD: &str = "lookahead.";
/// A tensor that is there where a ReLU follows the encoder.
pub const RELU: &str = "encoder_relu";

/// Predictor files cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PredictorFileError {
    /// A file cannot be read.
    #[error("cannot read the predictor {}: {source}; run `flashlm-prep train` for this layer", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not a predictor of this model.
    #[error("{}: {what}; train it again for this model", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// A matrix, row by row.
#[derive(Clone, Debug)]
pub struct StoredMatrix {
    /// Its rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
    /// All of them.
    pub elements: StoredElements,
}

/// The elements of a matrix; which of these is the predictor's [`PredictorDType`](crate::bundle::PredictorDType).
#[derive(Clone, Debug)]
pub enum StoredElements {
    /// Half precision.
    F16(Vec<f16>),
    /// Bytes, with one scale for each row.
    Int8 {
        /// The bytes.
        bytes: Vec<i8>,
        /// The scales.
        scales: Vec<f32>,
    },
    /// Half bytes as in neuron records, with bf16 scales for groups of
    /// [`INT4_GROUP`](crate::bundle::PredictorDType::INT4_GROUP).
    Int4 {
        /// The half bytes of all rows.
        values: Vec<u8>,
        /// The scales of all rows.
        scales: Vec<u8>,
    },
}

/// A predictor in a file.
#[derive(Clone, Debug)]
pub struct PredictorPart<'a> {
    /// Stands before the names of its tensors: nothing, or [`LOOK_AHEAD`].
    pub prefix: &'a str,
    /// `[rank, hidden]`; none of a quantised projection.
    pub encoder: Option<StoredMatrix>,
    /// `[rows, rank]`, or `[rows, hidden]` without an encoder.
    pub decoder: StoredMatrix,
    /// Whether a ReLU is between.
    pub relu: bool,
    /// One number for each row of the decoder.
    pub bias: &'a [f32],
    /// The neurons that have rows, ascending, where not all have.
    pub rows: Option<&'a [u32]>,
}

/// Where the predictor of `layer` lies in `dir`.
pub fn predictor_path(dir: &Path, layer: usize) -> PathBuf {
    dir.join(format!("predictor-{layer:03}.safetensors"))
}

/// The predictor file of `layer` in `dir`, verified against its seal.
///
/// # Errors
/// `Read`, and `Invalid` for a file that is not as it was written.
pub fn read_predictor(dir: &Path, layer: usize) -> Result<Vec<u8>, PredictorFileError> {
    let path = predictor_path(dir, layer);
    let mut bytes = Vec::new();
    let read = open_regular(&path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map_err(|source| PredictorFileError::Read { path: path.clone(), source })?;
    seal::check(&bytes).map_err(|broken| PredictorFileError::Invalid { path, what: broken.to_string() })?;
    Ok(bytes)
}

/// Writes predictors into one file, whole or not at all.
///
/// # Errors
/// What the system says.
///
/// # Panics
/// If a matrix has not as many elements as its shape says.
pub fn write_predictor(path: &Path, parts: &[PredictorPart<'_>]) -> io::Result<()> {
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    for part in parts {
        let name = |name: &str| format!("{}{name}", part.prefix);
        let encoder = part.encoder.as_ref().map(|encoder| (encoder, "encoder"));
        for (matrix, called) in encoder.into_iter().chain([(&part.decoder, "decoder")]) {
            let shape = vec![matrix.rows, matrix.columns];
            match &matrix.elements {
                StoredElements::F16(values) => {
                    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                    tensors.push((name(called), Dtype::F16, shape, bytes));
                }
                StoredElements::Int8 { bytes, scales } => {
                    let scale = name(&format!("{called}_scale"));
                    tensors.push((scale, Dtype::F32, vec![matrix.rows], floats(scales)));
                    tensors.push((name(called), Dtype::I8, shape, bytemuck::cast_slice(bytes).to_vec()));
                }
                StoredElements::Int4 { values, scales } => {
                    let columns = |bytes: usize| vec![matrix.rows, bytes / matrix.rows];
                    let scale = name(&format!("{called}_scale"));
                    tensors.push((scale, Dtype::BF16, columns(scales.len() / 2), scales.clone()));
                    tensors.push((name(called), Dtype::U8, columns(values.len()), values.clone()));
                }
            }
        }
        if part.relu {
            tensors.push((name(RELU), Dtype::U8, vec![1], vec![1]));
        }
        if let Some(rows) = part.rows {
            let bytes = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
            tensors.push((name(PREDICTOR_ROWS), Dtype::U32, vec![rows.len()], bytes));
        }
        tensors.push((name("bias"), Dtype::F32, vec![part.bias.len()], floats(part.bias)));
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("shape and bytes are made together"))
    });
    let metadata = HashMap::from([(SEAL.0.to_owned(), SEAL.1.to_owned())]);
    let mut bytes = safetensors::serialize(views, Some(metadata)).expect("plain tensors serialise");
    seal::seal(&mut bytes);
    publish_bytes(path, &bytes)
}
