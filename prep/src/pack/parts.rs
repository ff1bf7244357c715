//! The parts of a bundle's weights: how each is stored, and what quantising cost it.

use std::fmt;

use flashlm::budget::human_bytes;
use flashlm_formats::model::{ModelSpec, ResidentTensor};
use flashlm_formats::weight_format::{ResidentFormats, SCALE_BYTES, WeightFormat};
use serde::Serialize;

use crate::quantise::Squares;

/// A part of a bundle's matrices, and how it is stored.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StoredPart {
    /// Which one.
    pub part: &'static str,
    /// How its rows are stored; of several formats the first one's.
    pub dtype: WeightFormat,
    /// Its weights.
    pub weights: u64,
    /// Their bytes, with scales and without padding.
    pub bytes: u64,
    /// Squares of the weights' errors as a share of the weights' squares; none without quantising.
    pub relative_squared_error: Option<f64>,
}

impl fmt::Display for StoredPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { part, dtype, weights, bytes, relative_squared_error } = self;
        let bits = 8.0 * *bytes as f64 / (*weights).max(1) as f64;
        write!(f, "{part}: {dtype}, {}, {bits:.2} bits a weight", human_bytes(*bytes))?;
        match relative_squared_error {
            Some(error) => write!(f, ", relative squared error {error:.1e}"),
            None => Ok(()),
        }
    }
}

/// The parts, while they are written.
#[derive(Default)]
pub(super) struct Parts {
    ffn: Option<Part>,
    attention: Option<Part>,
    embedding: Option<Part>,
}

struct Part {
    format: WeightFormat,
    weights: u64,
    bytes: u64,
    lost: Squares,
}

impl Part {
    fn add(part: &mut Option<Self>, format: WeightFormat, rows: usize, cols: usize, lost: Squares) {
        let part = part.get_or_insert_with(|| Self { format, weights: 0, bytes: 0, lost: Squares::default() });
        part.weights += (rows * cols) as u64;
        part.bytes += (rows * (format.row_bytes(cols) + format.scales(cols) * SCALE_BYTES)) as u64;
        part.lost += lost;
    }
}

impl Parts {
    /// Another resident tensor; what is never quantised belongs to no part.
    pub(super) fn add_tensor(&mut self, tensor: &ResidentTensor, format: WeightFormat, lost: Squares) {
        let [rows, cols] = tensor.shape[..] else { return };
        let any = Some(WeightFormat::INT8);
        let is_embedding = ResidentFormats { matrices: None, embedding: any }.of(tensor).is_some();
        let is_matrix = ResidentFormats { matrices: any, embedding: None }.of(tensor).is_some();
        match (is_embedding, is_matrix) {
            (true, _) => Part::add(&mut self.embedding, format, rows, cols, lost),
            (_, true) => Part::add(&mut self.attention, format, rows, cols, lost),
            _ => {}
        }
    }

    /// The records of another layer.
    pub(super) fn add_ffn(&mut self, spec: &ModelSpec, format: WeightFormat, lost: Squares) {
        Part::add(&mut self.ffn, format, spec.ffn().size * spec.ffn().vectors(), spec.hidden_size, lost);
    }

    pub(super) fn stored(self) -> Vec<StoredPart> {
        let parts = [("FFN", self.ffn), ("attention", self.attention), ("embedding and head", self.embedding)];
        let stored = |(name, part): (&'static str, Option<Part>)| {
            let Part { format, weights, bytes, lost } = part?;
            let relative_squared_error = format.is_quantised().then(|| lost.share());
            Some(StoredPart { part: name, dtype: format, weights, bytes, relative_squared_error })
        };
        parts.into_iter().filter_map(stored).collect()
    }
}
