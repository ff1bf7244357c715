//! Every neuron in memory: the fastest source, for models that fit.

use flashlm_formats::model::Ffn;
use flashlm_io::AlignedMemory;

use crate::error::Result;
use crate::model::ffn::{FfnCall, FfnSource, NeuronBlock, Records, dense};

/// The flash section of a bundle, held in memory as it is.
pub struct ResidentFfn {
    ffn: Ffn,
    records: Records,
    data: AlignedMemory,
}

impl ResidentFfn {
    /// Takes the groups of all layers, one layer after the other.
    pub fn new(ffn: Ffn, records: Records, data: AlignedMemory) -> Self {
        Self { ffn, records, data }
    }
}

impl FfnSource for ResidentFfn {
    fn run(&mut self, mut call: FfnCall<'_>) -> Result<()> {
        let bytes = self.records.layout.layer_bytes();
        let data = &self.data.as_slice()[call.layer * bytes..(call.layer + 1) * bytes];
        let block = NeuronBlock::new(&self.records, data, call.scales, 0..self.ffn.size);
        dense(&self.ffn, &mut call, block)
    }
}
