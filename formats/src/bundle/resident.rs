//! The resident section: a plain safetensors blob with exactly the tensors of [`ModelSpec::resident_tensors`], in that order.
//!
//! The data begins at a multiple of 64 bytes of the section, tensor follows tensor without a gap, dtypes are the checkpoint's.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorInfo};

use super::error::Fault;
use super::header::{Extent, Section};
use crate::model::{DType, ModelSpec};

/// The data begins at a multiple of it, counted from the section's begin.
pub(super) const DATA_ALIGNMENT: usize = 64;
/// Length of the number in front of the JSON.
pub(super) const LENGTH_BYTES: usize = 8;
/// Longest JSON, the limit of the safetensors library.
const JSON_BYTES_MAX: u64 = 100_000_000;

/// A resident tensor and its place in the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Canonical name.
    pub name: String,
    /// How its elements are stored.
    pub dtype: DType,
    /// Shape; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// Its bytes, row-major and little-endian; the offset counts from the begin of the file.
    pub extent: Extent,
}

fn tensor_bytes(shape: &[usize], dtype: DType) -> Option<u64> {
    shape.iter().try_fold(dtype.bytes() as u64, |bytes, dim| bytes.checked_mul(*dim as u64))
}

/// The head of the section (length, JSON, spaces) and the length of the data behind it.
pub(super) fn encode_head(model: &ModelSpec, dtypes: &[DType]) -> (Vec<u8>, u64) {
    let mut json = String::from("{");
    let mut end = 0;
    for (tensor, dtype) in model.resident_tensors().iter().zip(dtypes) {
        let start = end;
        end += tensor_bytes(&tensor.shape, *dtype).expect("the limits of a model keep tensors far below 64 bits");
        let separator = if start == 0 { "" } else { "," };
        let (name, dtype) = (&tensor.name, dtype.name().to_uppercase());
        let shape = tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        json +=
            &format!(r#"{separator}"{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}"#);
    }
    json.push('}');
    let padded = (LENGTH_BYTES + json.len()).next_multiple_of(DATA_ALIGNMENT) - LENGTH_BYTES;
    let mut out = (padded as u64).to_le_bytes().to_vec();
    out.extend(json.as_bytes());
    out.resize(LENGTH_BYTES + padded, b' ');
    (out, end)
}

/// The length of the JSON, from the first bytes of the section, checked against the section's length.
pub(super) fn json_bytes(first: [u8; LENGTH_BYTES], section: Extent) -> Result<u64, Fault> {
    let found = u64::from_le_bytes(first);
    let most = section.bytes.saturating_sub(LENGTH_BYTES as u64).min(JSON_BYTES_MAX);
    if (2..=most).contains(&found) {
        return Ok(found);
    }
    Err(Fault::new(Section::Resident, "length of the safetensors header", format_args!("2 to {most}"), found))
}

/// The table of tensors, from the JSON. Each tensor begins where the one before ended, and the last ends with the section.
pub(super) fn decode_table(json: &[u8], model: &ModelSpec, section: Extent) -> Result<Vec<TensorEntry>, Fault> {
    let fault = |what: String, expected: String, found: String| Fault::new(Section::Resident, what, expected, found);
    let stored: HashMap<String, TensorInfo> = serde_json::from_slice(json)
        .map_err(|e| fault("safetensors header".into(), "JSON with one entry for each tensor".into(), e.to_string()))?;
    let data = section.offset + (LENGTH_BYTES + json.len()) as u64;
    if !(data - section.offset).is_multiple_of(DATA_ALIGNMENT as u64) {
        let expected = format!("a multiple of {DATA_ALIGNMENT}");
        return Err(fault("begin of the data".into(), expected, (data - section.offset).to_string()));
    }
    let expected = model.resident_tensors();
    if stored.len() != expected.len() {
        return Err(fault("number of tensors".into(), expected.len().to_string(), stored.len().to_string()));
    }
    let mut end = 0;
    let mut table = Vec::with_capacity(expected.len());
    for tensor in expected {
        let name = tensor.name;
        let info =
            stored.get(&name).ok_or_else(|| fault(format!("tensor {name}"), "an entry".into(), "none".into()))?;
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => return Err(fault(format!("dtype of {name}"), "F32, F16 or BF16".into(), format!("{other:?}"))),
        };
        if info.shape != tensor.shape {
            let (expected, found) = (format!("{:?}", tensor.shape), format!("{:?}", info.shape));
            return Err(fault(format!("shape of {name}"), expected, found));
        }
        let bytes = tensor_bytes(&tensor.shape, dtype).filter(|bytes| *bytes <= section.end() - data - end);
        let bytes = bytes.ok_or_else(|| {
            let left = section.end() - data - end;
            fault(format!("length of {name}"), format!("{left} bytes at most"), format!("{:?} of {dtype}", info.shape))
        })?;
        if info.data_offsets != (end as usize, (end + bytes) as usize) {
            let found = format!("{:?}", info.data_offsets);
            return Err(fault(format!("place of {name}"), format!("({end}, {})", end + bytes), found));
        }
        table.push(TensorEntry { name, dtype, shape: tensor.shape, extent: Extent { offset: data + end, bytes } });
        end += bytes;
    }
    if data + end != section.end() {
        return Err(fault("end of the last tensor".into(), section.end().to_string(), (data + end).to_string()));
    }
    Ok(table)
}
