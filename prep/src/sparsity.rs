//! What a recording says of a layer with its predictor and its storage order: what a bundle notes for the runtime.

use std::path::Path;

use flashlm_formats::bundle::{FlashLayout, LayerSparsity};
use flashlm_formats::ids::{NeuronId, Position};
use flashlm_formats::recording::Recording;

use crate::demand::{WantedError, measure_reuse};
use crate::ordering::positions;

/// Measures `layer`, whose predictor is in `predictors` and whose neurons stand in `order`, or the checkpoint's.
///
/// # Errors
/// If the recording or the predictor cannot be read.
pub fn layer_sparsity(
    recording: &Recording,
    layer: usize,
    predictors: &Path,
    order: Option<&[NeuronId]>,
    layout: &FlashLayout,
) -> Result<LayerSparsity, WantedError> {
    let position = order.map_or_else(|| (0..layout.neurons() as u32).map(Position).collect(), positions);
    let records = layout.records_per_group() as u32;
    measure_reuse(&mut recording.layer(layer)?, recording.split(), (predictors, layer), &position, records)
}
