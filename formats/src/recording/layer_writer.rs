use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::f16;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::tensor_file::{DATA_OFFSET, Region, header_bytes};
use super::{FORMAT_LAYER, RecordingError, RecordingInfo, VERSION};
use crate::publish::NewFile;
use crate::seal;

/// Writes one layer of a recording, block of tokens by block of tokens.
///
/// Only the block and a few numbers per neuron are in memory. The file appears under its name in
/// [`LayerWriter::finish`]; a writer dropped before leaves nothing.
pub struct LayerWriter {
    path: PathBuf,
    new: NewFile,
    layer: usize,
    id: String,
    tokens: u64,
    hidden: usize,
    ffn: usize,
    written: u64,
    magnitudes: u64,
    active_count: Vec<u32>,
    magnitude_sum: Vec<f64>,
    magnitude_max: Vec<f32>,
    buffer: Vec<u8>,
    strong: Vec<u8>,
    /// Of the tensors that are written token by token.
    hashes: [Xxh3; 3],
}

impl LayerWriter {
    pub(super) fn create(path: &Path, info: &RecordingInfo, layer: usize) -> Result<Self, RecordingError> {
        let new = NewFile::create(path).map_err(|e| RecordingError::io(path, e))?;
        let (hidden, ffn) = (info.model.hidden_size, info.model.ffn().size);
        Ok(LayerWriter {
            path: path.to_path_buf(),
            new,
            layer,
            id: info.id.clone(),
            tokens: info.tokens,
            hidden,
            ffn,
            written: 0,
            magnitudes: 0,
            active_count: vec![0; ffn],
            magnitude_sum: vec![0.0; ffn],
            magnitude_max: vec![0.0; ffn],
            buffer: Vec::new(),
            strong: Vec::new(),
            hashes: [Xxh3::new(), Xxh3::new(), Xxh3::new()],
        })
    }

    /// Tensors in the order in which they lie in the file. The magnitudes are last: only they have an unknown length.
    fn regions(&self) -> [Region; 7] {
        let (tokens, ffn) = (self.tokens, self.ffn as u64);
        [
            Region::new("active_count", "U32", &[ffn]),
            Region::new("magnitude_mean", "F32", &[ffn]),
            Region::new("magnitude_max", "F32", &[ffn]),
            Region::new("down_norms", "F32", &[ffn]),
            Region::new("inputs", "F16", &[tokens, self.hidden as u64]),
            Region::new("activity", "U8", &[tokens, ffn.div_ceil(8)]),
            Region::new("magnitudes", "F16", &[self.magnitudes]),
        ]
    }

    fn offset_of(&self, region: usize) -> u64 {
        DATA_OFFSET + self.regions()[..region].iter().map(Region::bytes).sum::<u64>()
    }

    /// Adds the next tokens: `inputs` `[n, hidden]` of the FFN and `activations` `[n, ffn]` of its neurons.
    ///
    /// A neuron is active where its activation is not zero. For a gated FFN `activations` are those of the gate, and
    /// `products` (activation times up projection, `[n, ffn]`) give what the down columns are multiplied by; without a
    /// gate both are the same and `products` is `None`.
    pub fn write(
        &mut self,
        inputs: &[f32],
        activations: &[f32],
        products: Option<&[f32]>,
    ) -> Result<(), RecordingError> {
        let rows = inputs.len() / self.hidden;
        let block =
            |what, expected, found| Err(RecordingError::Block { path: self.path.clone(), what, expected, found });
        if rows * self.hidden != inputs.len() {
            return block("inputs", (rows + 1) * self.hidden, inputs.len());
        }
        let products = products.unwrap_or(activations);
        for (what, slice) in [("activations", activations), ("products", products)] {
            if slice.len() != rows * self.ffn {
                return block(what, rows * self.ffn, slice.len());
            }
        }
        let after = self.written + rows as u64;
        if after > self.tokens {
            return Err(self.token_count(after));
        }
        let finite = |what, slice: &[f32]| match slice.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(RecordingError::NotFinite { path: self.path.clone(), what, at, value: slice[at] }),
            None => Ok(()),
        };
        finite("inputs", inputs)?;
        finite("activations", activations)?;
        finite("products", products)?;

        self.buffer.clear();
        self.buffer.extend(inputs.iter().flat_map(|&v| saturated(v).to_le_bytes()));
        let offset = self.offset_of(4) + self.written * self.hidden as u64 * 2;
        self.hashes[0].update(&self.buffer);
        self.put(offset)?;

        self.buffer.clear();
        self.strong.clear();
        let width = self.ffn.div_ceil(8);
        for row in 0..rows {
            let start = self.buffer.len();
            self.buffer.resize(start + width, 0);
            let bits = &mut self.buffer[start..];
            let range = row * self.ffn..(row + 1) * self.ffn;
            for (neuron, (&activation, &product)) in activations[range.clone()].iter().zip(&products[range]).enumerate()
            {
                if activation != 0.0 {
                    let magnitude = product.abs();
                    bits[neuron / 8] |= 1 << (neuron % 8);
                    self.strong.extend(saturated(magnitude).to_le_bytes());
                    self.active_count[neuron] += 1;
                    self.magnitude_sum[neuron] += magnitude as f64;
                    self.magnitude_max[neuron] = self.magnitude_max[neuron].max(magnitude);
                }
            }
        }
        let offset = self.offset_of(5) + self.written * width as u64;
        self.hashes[1].update(&self.buffer);
        self.put(offset)?;
        let offset = self.offset_of(6) + self.magnitudes * 2;
        std::mem::swap(&mut self.buffer, &mut self.strong);
        self.hashes[2].update(&self.buffer);
        self.put(offset)?;
        self.magnitudes += self.buffer.len() as u64 / 2;
        self.written = after;
        Ok(())
    }

    /// Share of active neurons among those written so far.
    pub fn active_fraction(&self) -> f64 {
        self.magnitudes as f64 / (self.written as f64 * self.ffn as f64).max(1.0)
    }

    /// Completes the file and makes it visible. `down_norms` are the lengths of the neurons' down columns.
    pub fn finish(mut self, down_norms: &[f32]) -> Result<(), RecordingError> {
        if self.written != self.tokens {
            return Err(self.token_count(self.written));
        }
        if down_norms.len() != self.ffn {
            let (expected, found) = (self.ffn, down_norms.len());
            return Err(RecordingError::Block { path: self.path.clone(), what: "down_norms", expected, found });
        }
        if let Some(at) = down_norms.iter().position(|v| !v.is_finite() || *v < 0.0) {
            let (path, value) = (self.path.clone(), down_norms[at]);
            return Err(RecordingError::NotFinite { path, what: "down_norms", at, value });
        }
        let (version, layer) = (VERSION.to_string(), self.layer.to_string());
        let metadata = [("format", FORMAT_LAYER), ("version", &version), ("recording", &self.id), ("layer", &layer)];
        let mut head = header_bytes(&self.regions(), &metadata);
        let means = self.magnitude_sum.iter().zip(&self.active_count).map(|(&sum, &n)| (sum / n.max(1) as f64) as f32);
        let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let summaries = [
            self.active_count.iter().flat_map(|v| v.to_le_bytes()).collect(),
            means.flat_map(f32::to_le_bytes).collect(),
            floats(&self.magnitude_max),
            floats(down_norms),
        ];
        let mut sums: Vec<u64> = summaries.iter().map(|bytes: &Vec<u8>| xxh3_64(bytes)).collect();
        sums.extend(self.hashes.iter().map(Xxh3::digest));
        seal::seal_head(&mut head, &sums);
        summaries.iter().for_each(|bytes| head.extend(bytes));
        self.buffer = head;
        self.put(0)?;
        self.new.publish().map_err(|e| RecordingError::io(&self.path, e))
    }

    fn put(&mut self, offset: u64) -> Result<(), RecordingError> {
        self.new.file().write_all_at(&self.buffer, offset).map_err(|e| RecordingError::io(&self.path, e))
    }

    fn token_count(&self, found: u64) -> RecordingError {
        RecordingError::TokenCount { path: self.path.clone(), expected: self.tokens, found }
    }
}

impl std::fmt::Debug for LayerWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerWriter").field("path", &self.path).field("written", &self.written).finish_non_exhaustive()
    }
}

/// To half precision, with what is too large for it brought to the largest finite number.
fn saturated(value: f32) -> f16 {
    f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}
