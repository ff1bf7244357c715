//! Every neuron read from flash for every piece of tokens: the honest dense baseline.
//!
//! Layers are read in order into a small ring of chunks, ahead of the computation; after the last layer the first one is read
//! again, so the disk works while the head, the sampler and attention do.

use std::sync::Arc;

use flashlm_formats::bundle::FlashLayout;
use flashlm_formats::model::{DType, Ffn};
use flashlm_io::{DirectFile, EngineChoice, Extent, SequentialReader, StreamOptions};
use flashlm_kernels::ROW_BLOCK;

use crate::error::Result;
use crate::model::ffn::{FfnCall, FfnSource, NeuronBlock, ReadCounters, dense};

/// Chunks read ahead, the one being computed included.
const CHUNKS: usize = 8;
/// A chunk is about this long: long enough for the disk's full bandwidth.
const CHUNK_BYTES: usize = 2 << 20;

/// Reads the flash section of a bundle again and again.
pub struct StreamedFfn {
    ffn: Ffn,
    dtype: DType,
    layout: FlashLayout,
    layers: Vec<Extent>,
    reader: SequentialReader,
    next_layer: usize,
}

impl StreamedFfn {
    /// A source over the groups of every layer, which lie in `layers` of `file`.
    pub fn new(
        ffn: Ffn,
        dtype: DType,
        layout: FlashLayout,
        layers: Vec<Extent>,
        file: Arc<DirectFile>,
        engine: EngineChoice,
    ) -> Result<Self> {
        let options = StreamOptions { chunk_bytes: chunk_bytes(&layout), chunks: CHUNKS, engine };
        let mut reader = SequentialReader::new(file, options)?;
        reader.restart(&layers)?;
        Ok(Self { ffn, dtype, layout, layers, reader, next_layer: 0 })
    }

    /// Bytes of its buffers.
    pub fn bytes(layout: &FlashLayout) -> u64 {
        (CHUNKS * chunk_bytes(layout)) as u64
    }

    /// How reads are issued, for announcements.
    pub fn engine(&self) -> String {
        self.reader.engine().name().to_owned()
    }
}

/// Bytes of whole groups whose neurons are a multiple of [`ROW_BLOCK`], so that sums do not depend on the cut, and which are
/// a multiple of every alignment a disk may have.
fn chunk_bytes(layout: &FlashLayout) -> usize {
    let (groups, bytes) = (lcm(layout.records_per_group(), ROW_BLOCK) / layout.records_per_group(), layout.group_bytes());
    let unit = groups * bytes;
    let unit = lcm(unit, 4096);
    CHUNK_BYTES.div_ceil(unit) * unit
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
        if call.layer != self.next_layer {
            // A piece was abandoned half-way: begin the list at this layer.
            self.reader.restart(&self.layers[call.layer..])?;
        }
        self.next_layer = call.layer;
        let mut first = 0;
        while first < self.ffn.size {
            let chunk = self.reader.next()?.expect("the list has an extent for every layer");
            let groups = chunk.bytes.len() / self.layout.group_bytes();
            let count = (groups * self.layout.records_per_group()).min(self.ffn.size - first);
            let block = NeuronBlock::new(&self.ffn, self.dtype, &self.layout, chunk.bytes, first, count);
            dense(&self.ffn, &mut call, block)?;
            first += count;
        }
        self.next_layer += 1;
        if self.next_layer == self.layers.len() {
            self.next_layer = 0;
            self.reader.restart(&self.layers)?;
        } else {
            self.reader.release()?;
        }
        Ok(())
    }

    fn read_counters(&self) -> ReadCounters {
        let counters = self.reader.engine().counters();
        ReadCounters { bytes: counters.bytes, reads: counters.reads, wait_ns: counters.wait_ns }
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
