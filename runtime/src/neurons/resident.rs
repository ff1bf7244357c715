//! Every neuron in memory: the fastest source, for models that fit.

use flashlm_formats::model::Ffn;
use flashlm_io::AlignedMemory;

use super::dense::dense;
use super::params::NeuronParams;
use super::records::{NeuronBlock, Records};
use super::source::{FfnCall, FfnSource};
use crate::error::Result;

/// The flash section of a bundle, held in memory as it is.
pub struct ResidentFfn {
    ffn: Ffn,
    records: Records,
    data: AlignedMemory,
    params: Vec<NeuronParams>,
}

impl ResidentFfn {
    /// Takes the groups of all layers, one layer after the other, and what belongs to the neurons of each layer.
    pub fn new(ffn: Ffn, records: Records, data: AlignedMemory, params: Vec<NeuronParams>) -> Self {
        Self { ffn, records, data, params }
    }
}

impl FfnSource for ResidentFfn {
    fn run(&mut self, mut call: FfnCall<'_, '_>) -> Result<()> {
        let bytes = self.records.layout.layer_bytes();
        let (layer, params) = (call.layer, &self.params[call.layer]);
        let data = &self.data.as_slice()[layer * bytes..(layer + 1) * bytes];
        let block = NeuronBlock::new(&self.records, data, params.scales(), 0..self.ffn.size);
        dense(&self.ffn, &mut call, params, block)
    }
}
