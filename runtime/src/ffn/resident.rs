//! Every neuron in memory: the fastest source, for models that fit.

use flashlm_formats::bundle::FlashLayout;
use flashlm_formats::model::{DType, Ffn};
use flashlm_io::AlignedMemory;

use crate::error::Result;
use crate::model::ffn::{FfnCall, FfnSource, NeuronBlock, dense};

/// The flash section of a bundle, held in memory as it is.
pub struct ResidentFfn {
    ffn: Ffn,
    dtype: DType,
    layout: FlashLayout,
    records: AlignedMemory,
}

impl ResidentFfn {
    /// Takes the groups of all layers, one layer after the other.
    pub fn new(ffn: Ffn, dtype: DType, layout: FlashLayout, records: AlignedMemory) -> Self {
        Self { ffn, dtype, layout, records }
    }
}

impl FfnSource for ResidentFfn {
    fn run(&mut self, mut call: FfnCall<'_>) -> Result<()> {
        let bytes = self.layout.layer_bytes();
        let data = &self.records.as_slice()[call.layer * bytes..(call.layer + 1) * bytes];
        let block = NeuronBlock::new(&self.ffn, self.dtype, &self.layout, data, 0, self.ffn.size);
        dense(&self.ffn, &mut call, block)
    }
}
