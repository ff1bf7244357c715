//! A lone file of tensors, safetensors or `torch.save`'s, as single-precision numbers: for small files that are not checkpoints.

use std::path::Path;

use half::{bf16, f16};

use super::error::CheckpointError;
use super::file::SourceFile;
use super::tensor::StoredDtype;
use super::{safetensors, torch};
use crate::model::DType;

/// A tensor, whole.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Name in the file.
    pub name: String,
    /// Shape; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// Row by row.
    pub values: Vec<f32>,
}

/// The vectors and matrices of floating-point numbers in a file, by name; what else is there is ignored.
///
/// # Errors
/// What is wrong with the file.
pub fn read_tensors(path: &Path) -> Result<Vec<NamedTensor>, CheckpointError> {
    let dir = path.parent().unwrap_or(Path::new(""));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let file = SourceFile::open(dir, &name)?;
    let is_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
    let stored = if is_safetensors { safetensors::read_header(&file, 0)? } else { torch::read_archive(&file, 0)? };
    let files = [file];
    let mut tensors = Vec::new();
    for tensor in stored {
        let StoredDtype::Weight(dtype) = tensor.dtype else { continue };
        let mut bytes = Vec::new();
        match *tensor.shape.as_slice() {
            [] => continue,
            [rows, ..] if tensor.shape.len() <= 2 => tensor.append_rows(&files, dtype, 0..rows, &mut bytes)?,
            _ => continue,
        }
        let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        let values = match dtype {
            DType::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            DType::Bf16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        };
        tensors.push(NamedTensor { name: tensor.name, shape: tensor.shape, values });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}
