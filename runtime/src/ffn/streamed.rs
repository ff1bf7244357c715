//! Every neuron read from flash for every piece of tokens: the honest dense baseline.
//!
//! Layers are read in order into a small ring of chunks, ahead of the computation; after the last layer the first one is read
//! again, so the disk works while the head, the sampler and attention do.

use std::sync::Arc;

use flashlm_formats::bundle::{Bundle, FlashLayout};
use flashlm_formats::model::{DType, Ffn};
use flashlm_io::{DirectFile, EngineChoice, Extent, SequentialReader, StreamOptions};
use flashlm_kernels::ROW_BLOCK;

use super::checks::GroupChecks;
use crate::error::Result;
use crate::model::ffn::{FfnCall, FfnSource, NeuronBlock, ReadCounters, dense};

/// Chunks read ahead, the one being computed included.
const CHUNKS: usize = 8;
/// A chunk is about this long: long enough for the disk's full bandwidth.
const CHUNK_BYTES: usize = 2 << 20;
/// The largest step in which disks are read.
const DISK_STEP_MAX: usize = 4096;

/// Reads the flash section of a bundle again and again.
pub struct StreamedFfn {
    ffn: Ffn,
    dtype: DType,
    layout: FlashLayout,
    /// The pieces of every layer, in order; each layer has the same number.
    pieces: Vec<Extent>,
    reader: SequentialReader,
    checks: Option<GroupChecks>,
    next_layer: usize,
}

impl StreamedFfn {
    /// A source over the groups of every layer of `bundle`, which `file` is; `verify`: hold every group against its checksum.
    pub fn new(bundle: &Bundle, file: Arc<DirectFile>, engine: EngineChoice, verify: bool) -> Result<Self> {
        let layout = *bundle.layout();
        let options = StreamOptions { chunk_bytes: buffer_bytes(&layout), chunks: CHUNKS, engine };
        let mut reader = SequentialReader::new(file, options)?;
        let (piece, end) = (piece_bytes(&layout), layout.layer_bytes());
        let pieces: Vec<Extent> = (0..bundle.spec().layers)
            .flat_map(|layer| {
                let offset = bundle.layer(layer).offset;
                (0..end)
                    .step_by(piece)
                    .map(move |at| Extent { offset: offset + at as u64, length: piece.min(end - at) as u64 })
            })
            .collect();
        reader.restart(&pieces)?;
        let checks = verify.then(|| GroupChecks::new(bundle));
        let (ffn, dtype) = (bundle.spec().ffn, bundle.manifest().ffn.dtype);
        Ok(Self { ffn, dtype, layout, pieces, reader, checks, next_layer: 0 })
    }

    /// Bytes of its buffers.
    pub fn bytes(layout: &FlashLayout) -> u64 {
        (CHUNKS * buffer_bytes(layout)) as u64
    }

    /// How reads are issued, for announcements.
    pub fn engine(&self) -> String {
        self.reader.engine().name().to_owned()
    }
}

/// Bytes of a piece: whole groups whose neurons are a multiple of [`ROW_BLOCK`], so that sums do not depend on the cut.
fn piece_bytes(layout: &FlashLayout) -> usize {
    let neurons = lcm(layout.records_per_group(), ROW_BLOCK);
    let unit = neurons / layout.records_per_group() * layout.group_bytes();
    // A small model's layers are cut as well, so that the ring never rivals the model.
    CHUNK_BYTES.min(layout.layer_bytes() / 4).div_ceil(unit).max(1) * unit
}

/// Room for a piece, rounded outwards on a disk that is read in larger steps than groups are aligned to.
fn buffer_bytes(layout: &FlashLayout) -> usize {
    piece_bytes(layout) + if layout.alignment().is_multiple_of(DISK_STEP_MAX) { 0 } else { 2 * DISK_STEP_MAX }
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

impl FfnSource for StreamedFfn {
    fn run(&mut self, mut call: FfnCall<'_>) -> Result<()> {
        let per_layer = self.layout.layer_bytes().div_ceil(piece_bytes(&self.layout));
        if call.layer != self.next_layer {
            // A piece was abandoned half-way: begin at this layer.
            self.reader.restart(&self.pieces[call.layer * per_layer..])?;
        }
        self.next_layer = call.layer;
        let mut first = 0;
        for _ in 0..per_layer {
            let chunk = self.reader.next()?.expect("the list has every piece of every layer");
            let groups = chunk.bytes.len() / self.layout.group_bytes();
            let count = (groups * self.layout.records_per_group()).min(self.ffn.size - first);
            if let Some(checks) = &self.checks {
                checks.neighbours(call.threads, call.layer, first / self.layout.records_per_group(), chunk.bytes)?;
            }
            let block = NeuronBlock::new(&self.ffn, self.dtype, &self.layout, chunk.bytes, first, count);
            dense(&self.ffn, &mut call, block)?;
            first += count;
        }
        self.next_layer += 1;
        if self.next_layer * per_layer == self.pieces.len() {
            self.next_layer = 0;
            self.reader.restart(&self.pieces)?;
        } else {
            self.reader.release()?;
        }
        Ok(())
    }

    fn read_counters(&self) -> ReadCounters {
        let counters = self.reader.engine().counters();
        ReadCounters { bytes: counters.bytes, reads: counters.reads, wait_ns: counters.wait_ns, ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_common_multiples() {
        assert_eq!(lcm(4, 6), 12);
        assert_eq!(lcm(1, 64), 64);
        assert_eq!(lcm(3072, 4096), 12288);
    }
}
