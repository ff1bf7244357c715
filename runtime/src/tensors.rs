//! Where tensors come from, by canonical name, and the memory they stay in.
//!
//! A [`TensorSource`] is a bundle's resident section, or a checkpoint that is read layer by layer for recording.

use std::ops::Range;
use std::sync::Arc;

use flashlm_formats::model::DType;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_kernels::{Element, SCALE_BYTES, ScaleGroup};

use crate::error::{Result, RuntimeError};

/// Bytes that weights live in.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Where tensors come from, by canonical name.
pub trait TensorSource {
    /// The tensor's format, shape and bytes (row-major, little-endian).
    fn tensor(&mut self, name: &str) -> Result<TensorBytes>;

    /// How many rows of a table of the vocabulary are given, the first ones, where that is not all.
    fn rows_kept(&self, _name: &str) -> Option<usize> {
        None
    }

    /// The scales of a layer's neuron records, where they are quantised.
    fn ffn_scales(&mut self, _layer: usize) -> Result<Option<BytesRange>> {
        Ok(None)
    }
}

/// One tensor: a range of shared bytes.
#[derive(Clone)]
pub struct TensorBytes {
    /// How its rows are stored.
    pub format: WeightFormat,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub data: BytesRange,
    /// The scales of its rows, if it has any.
    pub scales: Option<BytesRange>,
}

/// A part of shared memory.
#[derive(Clone)]
pub struct BytesRange {
    bytes: SharedBytes,
    range: Range<usize>,
}

impl BytesRange {
    /// The part `range` of `bytes`.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn new(bytes: SharedBytes, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= (*bytes).as_ref().len(), "a range within the bytes");
        Self { bytes, range }
    }

    /// All of `bytes`.
    pub fn whole(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { bytes: Arc::new(bytes), range }
    }

    /// The bytes.
    pub fn get(&self) -> &[u8] {
        &(*self.bytes).as_ref()[self.range.clone()]
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// The kernels' name of a storage format.
pub fn element(format: impl Into<WeightFormat>) -> Element {
    match format.into() {
        WeightFormat::Plain(DType::F32) => Element::F32,
        WeightFormat::Plain(DType::F16) => Element::F16,
        WeightFormat::Plain(DType::Bf16) => Element::Bf16,
        WeightFormat::Int8(_) => Element::Q8,
        WeightFormat::Int4(_) => Element::Q4,
    }
}

/// The kernels' name of the groups that share a scale.
pub fn scale_group(format: WeightFormat) -> Option<ScaleGroup> {
    format.group().map(|group| ScaleGroup::new(group.elements()).expect("both crates allow the same groups"))
}

/// The tensor `name`, of this shape.
///
/// # Errors
/// `Unsupported` where its shape or its bytes are others.
pub(crate) fn checked(source: &mut dyn TensorSource, name: &str, shape: &[usize]) -> Result<TensorBytes> {
    let tensor = source.tensor(name)?;
    let (cols, outer) = shape.split_last().expect("a tensor has a dimension");
    let rows: usize = outer.iter().product();
    let bytes = source.rows_kept(name).unwrap_or(rows) * tensor.format.row_bytes(*cols);
    let scales = rows * tensor.format.scales(*cols) * SCALE_BYTES;
    let found = (tensor.data.len(), tensor.scales.as_ref().map_or(0, BytesRange::len));
    if tensor.shape != shape || found != (bytes, scales) {
        return Err(RuntimeError::Unsupported(format!(
            "tensor {name} has shape {:?} in {} bytes and {} of scales where the architecture needs {shape:?} in {bytes} and {scales}",
            tensor.shape, found.0, found.1
        )));
    }
    Ok(tensor)
}

/// The vector `name` of `len` elements, widened to f32.
pub(crate) fn vector(source: &mut dyn TensorSource, name: &str, len: usize) -> Result<Vec<f32>> {
    let tensor = checked(source, name, &[len])?;
    let mut out = vec![0.0; len];
    if tensor.format.is_quantised() {
        return Err(RuntimeError::Unsupported(format!("vector {name} is quantised")));
    }
    flashlm_kernels::to_f32(element(tensor.format), tensor.data.get(), &mut out);
    Ok(out)
}

/// [`vector`], where it is `present`.
pub(crate) fn optional_vector(
    source: &mut dyn TensorSource,
    present: bool,
    name: &str,
    len: usize,
) -> Result<Option<Vec<f32>>> {
    present.then(|| vector(source, name, len)).transpose()
}
