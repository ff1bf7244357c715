//! One layer of a checkpoint as the runtime's forward pass wants it: resident tensors by name, FFN as neuron records.

use flashlm::error::{Result, RuntimeError};
use flashlm::neurons::params::NeuronParams;
use flashlm::neurons::records::Records;
use flashlm::neurons::resident::ResidentFfn;
use flashlm::tensors::{BytesRange, TensorBytes, TensorSource, element};
use flashlm_formats::bundle::{FlashLayout, LayoutOptions};
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError};
use flashlm_formats::ids::NeuronId;
use flashlm_formats::model::DType;
use flashlm_io::AlignedMemory;
use flashlm_kernels::to_f32;

use super::RecordError;
use crate::records::fill_layer;

/// Resident tensors of a checkpoint, read when asked for.
pub struct CheckpointTensors<'a> {
    checkpoint: &'a Checkpoint,
}

impl<'a> CheckpointTensors<'a> {
    /// Tensors of `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint }
    }

    fn read(&self, name: &str) -> Result<TensorBytes, CheckpointError> {
        let info = self.checkpoint.resident(name)?;
        let (format, shape) = (info.dtype.into(), info.shape.to_vec());
        let mut bytes = Vec::new();
        self.checkpoint.read_resident(name, &mut bytes)?;
        Ok(TensorBytes { format, shape, data: BytesRange::whole(bytes), scales: None })
    }
}

impl TensorSource for CheckpointTensors<'_> {
    fn tensor(&mut self, name: &str) -> Result<TensorBytes> {
        self.read(name).map_err(|error| RuntimeError::Tensors(error.into()))
    }
}

/// The FFN of `layer` in checkpoint order, as a source whose only layer it is, and the lengths of its neurons' down columns.
pub fn layer_ffn(checkpoint: &Checkpoint, layer: usize) -> Result<(ResidentFfn, Vec<f32>), RecordError> {
    let (spec, dtype) = (checkpoint.spec(), checkpoint.ffn_dtype());
    let layout = FlashLayout::new(spec, dtype, LayoutOptions::default())?;
    let mut records = AlignedMemory::new(layout.layer_bytes()).map_err(RuntimeError::from)?;
    let order: Vec<NeuronId> = (0..spec.ffn().size as u32).map(NeuronId).collect();
    fill_layer(checkpoint, layer, &layout, &order, records.as_mut_slice(), &mut |_| ())?;
    let norms = down_norms(&layout, dtype, records.as_slice());
    let how = Records { layout, format: dtype.into(), cols: spec.hidden_size };
    let params = NeuronParams::load(spec, layer, &mut CheckpointTensors::new(checkpoint))?;
    Ok((ResidentFfn::new(*spec.ffn(), how, records, vec![params]), norms))
}

fn down_norms(layout: &FlashLayout, dtype: DType, records: &[u8]) -> Vec<f32> {
    let mut row = vec![0.0; layout.row_bytes() / dtype.bytes()];
    (0..layout.neurons())
        .map(|neuron| {
            let start = layout.vector_offset(neuron, layout.vectors() - 1);
            to_f32(element(dtype), &records[start..start + layout.row_bytes()], &mut row);
            row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_a_checkpoint_says_keeps_its_type() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-opt");
        let checkpoint = Checkpoint::open(root).unwrap();
        let Err(error) = CheckpointTensors::new(&checkpoint).tensor("nothing") else {
            panic!("there is no such tensor")
        };
        assert_eq!(error.to_string(), checkpoint.resident("nothing").unwrap_err().to_string());
        let RuntimeError::Tensors(error) = error else { panic!("{error:?}") };
        let error = error.downcast_ref::<CheckpointError>();
        assert!(matches!(error, Some(CheckpointError::UnknownTensor { name }) if name == "nothing"), "{error:?}");
    }
}
