//! What belongs to a layer's neurons and always stays in memory: their biases and the scales of their records, in storage order.

use flashlm_formats::model::ModelSpec;

use crate::error::Result;
use crate::tensors::{BytesRange, TensorSource, optional_vector};

/// Biases and scales of the neurons of one layer.
#[derive(Clone, Default)]
pub struct NeuronParams {
    gate_bias: Option<Vec<f32>>,
    up_bias: Option<Vec<f32>>,
    /// `[neurons, vectors, groups of a row]`, where records are quantised.
    scales: Option<BytesRange>,
}

impl NeuronParams {
    /// Takes those of `layer` from `source`.
    pub fn load(spec: &ModelSpec, layer: usize, source: &mut dyn TensorSource) -> Result<Self> {
        let (ffn, prefix) = (spec.layers[layer].ffn(), format!("layers.{layer}.ffn"));
        Ok(Self {
            gate_bias: optional_vector(source, ffn.gate_bias, &format!("{prefix}.gate_bias"), ffn.size)?,
            up_bias: optional_vector(source, ffn.up_bias, &format!("{prefix}.up_bias"), ffn.size)?,
            scales: source.ffn_scales(layer)?,
        })
    }

    /// Takes those of all layers.
    pub fn load_all(spec: &ModelSpec, source: &mut dyn TensorSource) -> Result<Vec<Self>> {
        (0..spec.layers.len()).map(|layer| Self::load(spec, layer, source)).collect()
    }

    /// The biases.
    pub fn biases(&self) -> NeuronBiases<'_> {
        NeuronBiases { gate: self.gate_bias.as_deref(), up: self.up_bias.as_deref() }
    }

    /// The scales of the records; empty where these have none.
    pub fn scales(&self) -> &[u8] {
        self.scales.as_ref().map_or(&[], BytesRange::get)
    }
}

/// What is added to a neuron's products before anything else, where the model has it; in storage order.
#[derive(Clone, Copy, Debug, Default)]
pub struct NeuronBiases<'a> {
    /// Of the gate projection.
    pub gate: Option<&'a [f32]>,
    /// Of the up projection.
    pub up: Option<&'a [f32]>,
}
