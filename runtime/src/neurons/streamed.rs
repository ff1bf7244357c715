//! Every neuron read from flash for every piece of tokens: the honest dense baseline.
//!
//! Layers are read in order into a small ring of chunks, ahead of the computation; after the last layer the first one is read
//! again, so the disk works while the head, the sampler and attention do. With layers pinned it is the `hybrid` of the published
//! comparison, with the resident section read as well its `naive`.

use std::sync::Arc;

use flashlm_formats::bundle::{Bundle, FlashLayout};
use flashlm_formats::ids::Position;
use flashlm_formats::model::Ffn;
use flashlm_io::{AlignedMemory, DirectFile, Extent, SequentialReader, StreamOptions};
use flashlm_kernels::ROW_BLOCK;

use super::checks::GroupChecks;
use super::counters::ReadCounters;
use super::dense::dense;
use super::params::NeuronParams;
use super::place::LayerPlaces;
use super::records::{NeuronBlock, Records};
use super::source::{FfnCall, FfnSource};
use crate::error::Result;

/// Chunks read ahead, the one being computed included: as many as this where there is room, and the fewest that work.
pub const CHUNKS: usize = 8;
/// See [`CHUNKS`].
pub const CHUNKS_MIN: usize = 2;
/// A chunk is about this long: long enough for the disk's full bandwidth.
const CHUNK_BYTES: usize = 2 << 20;
/// What an engine keeps beside its buffers.
const ENGINE_BYTES: u64 = 256 << 10;
/// The largest step in which disks are read.
const DISK_STEP_MAX: usize = 4096;

/// What is read besides, or not read, and how far ahead.
pub struct StreamedParts {
    /// The first layers' neurons, in memory: the others are streamed.
    pub pinned: Option<Pinned>,
    /// Read the resident section for every token as well, and throw it away: what a model costs that is not split. Attention is
    /// computed from memory all the same, so this measures time, not memory.
    pub resident_too: bool,
    /// Chunks read ahead.
    pub chunks: usize,
}

/// Layers whose neurons stay in memory.
pub struct Pinned {
    /// How many, from the first.
    pub layers: usize,
    /// Their groups.
    pub data: AlignedMemory,
}

/// Reads the flash section of a bundle again and again.
pub struct StreamedFfn {
    ffn: Ffn,
    records: Records,
    layout: FlashLayout,
    /// What is read, in order, and for each layer where its part begins and how many pieces of that are discarded.
    pieces: Vec<Extent>,
    layers: Vec<LayerPieces>,
    pinned: Option<Pinned>,
    reader: SequentialReader,
    checks: Option<GroupChecks>,
    places: LayerPlaces,
    next_layer: usize,
    /// One for each layer.
    params: Vec<NeuronParams>,
}

#[derive(Clone, Copy)]
struct LayerPieces {
    first: usize,
    thrown_away: usize,
}

impl StreamedFfn {
    /// A source over the groups of every layer of `bundle`, which `file` is; `verify`: hold every group against its checksum.
    pub fn new(
        bundle: &Bundle,
        file: Arc<DirectFile>,
        reads: StreamOptions,
        verify: bool,
        parts: StreamedParts,
    ) -> Result<Self> {
        let layout = *bundle.layout();
        let options = StreamOptions { chunk_bytes: buffer_bytes(&layout), chunks: parts.chunks, ..reads };
        let mut reader = SequentialReader::new(file, options)?;
        let cut = |pieces: &mut Vec<Extent>, offset: u64, bytes: usize| {
            let piece = piece_bytes(&layout);
            let length = |at: usize| piece.min(bytes - at) as u64;
            pieces
                .extend((0..bytes).step_by(piece).map(|at| Extent { offset: offset + at as u64, length: length(at) }));
        };
        let (mut pieces, mut layers) = (Vec::new(), Vec::new());
        let (count, resident) = (bundle.spec().layers.len(), bundle.resident().extent);
        let pinned = parts.pinned.as_ref().map_or(0, |pinned| pinned.layers);
        for layer in 0..count {
            let first = pieces.len();
            if parts.resident_too {
                let (from, to) = [layer, layer + 1].map(|l| resident.bytes * l as u64 / count as u64).into();
                cut(&mut pieces, resident.offset + from, (to - from) as usize);
            }
            layers.push(LayerPieces { first, thrown_away: pieces.len() - first });
            if layer >= pinned {
                cut(&mut pieces, bundle.layer(layer).offset, layout.layer_bytes());
            }
        }
        reader.restart(&pieces)?;
        let checks = verify.then(|| GroupChecks::new(bundle));
        let (ffn, records) = (*bundle.spec().ffn(), Records::of(bundle));
        let (pinned, places) = (parts.pinned, LayerPlaces::new(bundle));
        let (next_layer, params) = (0, Vec::new());
        Ok(Self { ffn, records, layout, pieces, layers, pinned, reader, checks, places, next_layer, params })
    }

    /// With what belongs to the neurons of each layer; nothing can be computed without.
    pub fn with_params(mut self, params: Vec<NeuronParams>) -> Self {
        self.params = params;
        self
    }

    /// Bytes of its buffers, with this many chunks.
    pub fn bytes(layout: &FlashLayout, chunks: usize) -> u64 {
        (chunks * buffer_bytes(layout)) as u64 + ENGINE_BYTES
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

/// What `next_layer` is after an error: wherever the reader stands, it starts again.
const NOWHERE: usize = usize::MAX;

impl StreamedFfn {
    fn run_layer(&mut self, mut call: FfnCall<'_, '_>) -> Result<()> {
        let (layer, threads) = (call.layer, call.threads);
        let LayerPieces { first, thrown_away } = self.layers[layer];
        let end = self.layers.get(layer + 1).map_or(self.pieces.len(), |next| next.first);
        if layer != self.next_layer {
            // A piece was abandoned half-way: begin at this layer.
            self.reader.restart(&self.pieces[first..])?;
        }
        self.next_layer = layer;
        for _ in 0..thrown_away {
            self.reader.next().map_err(|e| self.places.name(e))?;
        }
        let mut neuron = 0;
        for _ in first + thrown_away..end {
            let chunk =
                self.reader.next().map_err(|e| self.places.name(e))?.expect("the list has every piece of every layer");
            let groups = chunk.bytes.len() / self.layout.group_bytes();
            let count = (groups * self.layout.records_per_group()).min(self.ffn.size - neuron);
            if let Some(checks) = &self.checks {
                let first = Position(neuron as u32).group(self.layout.records_per_group() as u32);
                checks.contiguous(threads, layer, first, chunk.bytes)?;
            }
            let params = &self.params[layer];
            let block = NeuronBlock::new(&self.records, chunk.bytes, params.scales(), neuron..neuron + count);
            dense(&self.ffn, &mut call, params, block)?;
            neuron += count;
        }
        if let Some(pinned) = self.pinned.as_ref().filter(|pinned| layer < pinned.layers) {
            let (bytes, params) = (self.layout.layer_bytes(), &self.params[layer]);
            let data = &pinned.data.as_slice()[layer * bytes..(layer + 1) * bytes];
            let block = NeuronBlock::new(&self.records, data, params.scales(), 0..self.ffn.size);
            dense(&self.ffn, &mut call, params, block)?;
        }
        self.next_layer += 1;
        if self.next_layer == self.layers.len() {
            self.next_layer = 0;
            self.reader.restart(&self.pieces)?;
        } else {
            self.reader.release()?;
        }
        Ok(())
    }
}

impl FfnSource for StreamedFfn {
    fn run(&mut self, call: FfnCall<'_, '_>) -> Result<()> {
        let result = self.run_layer(call);
        if result.is_err() {
            self.next_layer = NOWHERE;
        }
        result
    }

    fn read_counters(&self) -> ReadCounters {
        let counters = self.reader.engine().counters();
        ReadCounters {
            bytes: counters.bytes,
            reads: counters.reads,
            retries: counters.retries,
            wait_ns: counters.wait_ns,
            ..Default::default()
        }
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
