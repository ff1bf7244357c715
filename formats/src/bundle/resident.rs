//! The resident section: a plain safetensors blob with exactly the tensors of [`ModelSpec::resident_tensors`], in that order.
//!
//! The data begins at a multiple of 64 bytes of the section, tensor follows tensor without a gap, dtypes are the checkpoint's.
//! Quantised, a matrix is `I8` (or `U8` of two half bytes each) and followed by its scales; after all tensors come the scales of
//! quantised neuron records.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorInfo};

use super::error::Fault;
use super::manifest::Manifest;
use super::section::{Extent, Section};
use crate::model::{DType, ModelSpec, NotAWeight, ResidentTensor};
use crate::weight_format::{ResidentFormats, WeightFormat};

/// The data begins at a multiple of it, counted from the section's start.
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
    /// How its rows are stored; those of a vector are its elements.
    pub format: WeightFormat,
    /// Shape; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// Its bytes, row-major and little-endian; the offset counts from the start of the file.
    pub extent: Extent,
    /// The scales of its rows, `[outputs, groups of a row]`, if it has any.
    pub scales: Option<Extent>,
}

/// Where everything in the resident section is.
#[derive(Debug)]
pub(super) struct ResidentTable {
    /// In the order of [`ModelSpec::resident_tensors`].
    pub(super) tensors: Vec<TensorEntry>,
    /// The scales of each layer's records; empty if these have none.
    pub(super) ffn_scales: Vec<Extent>,
}

/// A tensor as safetensors has it.
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Stored {
    fn bytes(&self) -> Option<u64> {
        let element = self.dtype.bitsize() as u64 / 8;
        self.shape.iter().try_fold(element, |bytes, dim| bytes.checked_mul(*dim as u64))
    }
}

/// How a tensor is stored: itself, and its scales if it has any.
fn stored(tensor: &ResidentTensor, format: WeightFormat) -> (Stored, Option<Stored>) {
    let (name, mut shape) = (tensor.name.clone(), tensor.shape.clone());
    let dtype = Dtype::from(format);
    if !format.is_quantised() {
        return (Stored { name, dtype, shape }, None);
    }
    let scales =
        Stored { name: format!("{name}.scales"), dtype: Dtype::BF16, shape: vec![shape[0], format.scales(shape[1])] };
    shape[1] = format.row_bytes(shape[1]);
    (Stored { name, dtype, shape }, Some(scales))
}

/// The scales of all layers' records, if they have any.
fn stored_ffn_scales(model: &ModelSpec, ffn: WeightFormat) -> Vec<Stored> {
    let layers = if ffn.is_quantised() { model.layers.len() } else { 0 };
    let scales = model.ffn().vectors() * ffn.scales(model.hidden_size);
    let of_layer = |layer| Stored {
        name: format!("layers.{layer}.ffn.scales"),
        dtype: Dtype::BF16,
        shape: vec![model.ffn().size, scales],
    };
    (0..layers).map(of_layer).collect()
}

/// The head of the section (length, JSON, spaces) and the length of the data after it.
pub(super) fn encode_head(
    model: &ModelSpec,
    dtypes: &[DType],
    quantised: ResidentFormats,
    ffn: WeightFormat,
) -> (Vec<u8>, u64) {
    let mut json = String::from("{");
    let mut end = 0;
    let tensors = model.resident_tensors();
    let with_scales = tensors.iter().zip(dtypes).flat_map(|(tensor, dtype)| {
        let (itself, scales) = stored(tensor, tensor.format(*dtype, quantised));
        [Some(itself), scales].into_iter().flatten()
    });
    for tensor in with_scales.chain(stored_ffn_scales(model, ffn)) {
        let start = end;
        end += tensor.bytes().expect("the limits of a model keep tensors far below 64 bits");
        let separator = if start == 0 { "" } else { "," };
        let (name, dtype) = (&tensor.name, tensor.dtype);
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
pub(super) fn decode_table(json: &[u8], manifest: &Manifest, section: Extent) -> Result<ResidentTable, Fault> {
    let model = &manifest.model;
    let found: HashMap<String, TensorInfo> = serde_json::from_slice(json)
        .map_err(|e| fault("safetensors header", "JSON with one entry for each tensor", e))?;
    let data = section.offset + (LENGTH_BYTES + json.len()) as u64;
    if !(data - section.offset).is_multiple_of(DATA_ALIGNMENT as u64) {
        return Err(fault("start of the data", format_args!("a multiple of {DATA_ALIGNMENT}"), data - section.offset));
    }
    let expected = model.resident_tensors();
    let ffn_scales = stored_ffn_scales(model, manifest.ffn.dtype);
    let quantised = expected.iter().filter(|tensor| manifest.resident.of(tensor).is_some()).count();
    let count = expected.len() + quantised + ffn_scales.len();
    if found.len() != count {
        return Err(fault("number of tensors", count, found.len()));
    }
    let mut table = Table { found, data, end: data, section };
    let tensors = expected.into_iter().map(|tensor| {
        let format = match manifest.resident.of(&tensor) {
            Some(format) => format,
            None => table.plain_dtype(&tensor.name)?.into(),
        };
        let (itself, scales) = stored(&tensor, format);
        let extent = table.take(&itself)?;
        let scales = scales.map(|scales| table.take(&scales)).transpose()?;
        Ok(TensorEntry { name: tensor.name, format, shape: tensor.shape, extent, scales })
    });
    let tensors = tensors.collect::<Result<_, Fault>>()?;
    let ffn_scales = ffn_scales.iter().map(|scales| table.take(scales)).collect::<Result<_, Fault>>()?;
    if table.end != section.end() {
        return Err(fault("end of the last tensor", section.end(), table.end));
    }
    Ok(ResidentTable { tensors, ffn_scales })
}

fn fault(what: impl Into<String>, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> Fault {
    Fault::new(Section::Resident, what, expected, found)
}

/// What the JSON says, and how far it has been followed.
struct Table {
    found: HashMap<String, TensorInfo>,
    /// Start of the data, and end of the last tensor taken.
    data: u64,
    end: u64,
    section: Extent,
}

impl Table {
    fn info(&self, name: &str) -> Result<&TensorInfo, Fault> {
        self.found.get(name).ok_or_else(|| fault(format!("tensor {name}"), "an entry", "none"))
    }

    fn plain_dtype(&self, name: &str) -> Result<DType, Fault> {
        DType::try_from(self.info(name)?.dtype)
            .map_err(|other| fault(format!("dtype of {name}"), NotAWeight::EXPECTED, other.found))
    }

    /// The place of `tensor`, which has to be the next one.
    fn take(&mut self, tensor: &Stored) -> Result<Extent, Fault> {
        let Stored { name, dtype, shape } = tensor;
        let info = self.info(name)?;
        if info.dtype != *dtype {
            return Err(fault(format!("dtype of {name}"), dtype, info.dtype));
        }
        if info.shape != *shape {
            return Err(fault(format!("shape of {name}"), format_args!("{shape:?}"), format_args!("{:?}", info.shape)));
        }
        let left = self.section.end() - self.end;
        let bytes = tensor.bytes().filter(|bytes| *bytes <= left).ok_or_else(|| {
            let found = format!("{shape:?} of {dtype}");
            fault(format!("length of {name}"), format_args!("{left} bytes at most"), found)
        })?;
        let start = self.end - self.data;
        if info.data_offsets != (start as usize, (start + bytes) as usize) {
            let found = format!("{:?}", info.data_offsets);
            return Err(fault(format!("place of {name}"), format_args!("({start}, {})", start + bytes), found));
        }
        let extent = Extent { offset: self.end, bytes };
        self.end += bytes;
        Ok(extent)
    }
}
