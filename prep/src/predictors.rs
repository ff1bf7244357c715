//! Trained predictors, put into storage order and into one blob, as a bundle holds them.
//!
//! `train` writes one safetensors file for each layer, neurons in the checkpoint's order. In a bundle the rows of a decoder, its
//! scales and its bias stand in storage order, under `layers.N.`; a layer's look-ahead predictor, which sees the layer's input and
//! speaks of the next layer's neurons, stands under `layers.N.lookahead.`, in the next layer's order.

use std::path::Path;

use flashlm_formats::bundle::{LayerPredictor, PredictorDType, PredictorInfo, PredictorKind};
use flashlm_formats::model::ModelSpec;
use flashlm_formats::predictors::{LOOK_AHEAD, PredictorFileError, RELU, predictor_path, read_predictor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

struct Owned {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Reads `predictor-NNN.safetensors` of every layer in `dir`; `orders` are the storage orders of the layers.
pub fn assemble(
    dir: &Path,
    spec: &ModelSpec,
    orders: &[Vec<u32>],
) -> Result<(PredictorInfo, Vec<u8>), PredictorFileError> {
    let mut tensors = Vec::new();
    let mut layers = Vec::new();
    for layer in 0..spec.layers.len() {
        let path = predictor_path(dir, layer);
        let bytes = read_predictor(dir, layer)?;
        let invalid = |what: String| PredictorFileError::Invalid { path: path.clone(), what };
        let parsed = SafeTensors::deserialize(&bytes).map_err(|e| invalid(e.to_string()))?;
        for (name, view) in parsed.iter() {
            let (base, neurons_of) = match name.strip_prefix(LOOK_AHEAD) {
                Some(base) => (base, layer + 1),
                None => (name, layer),
            };
            let data = if base.starts_with("encoder") {
                view.data().to_vec()
            } else {
                let order = orders.get(neurons_of).ok_or_else(|| invalid(format!("{name}: there is no next layer")))?;
                if view.shape().first() != Some(&order.len()) {
                    return Err(invalid(format!("{name} has shape {:?} for {} neurons", view.shape(), order.len())));
                }
                permuted(view.data(), order)
            };
            let name = format!("layers.{layer}.{name}");
            tensors.push(Owned { name, dtype: view.dtype(), shape: view.shape().to_vec(), bytes: data });
        }
        let own = describe(&parsed, "", spec).map_err(&invalid)?;
        let own = own.ok_or_else(|| invalid("it has no tensor `encoder`".into()))?;
        let ahead = describe(&parsed, LOOK_AHEAD, spec).map_err(&invalid)?;
        layers.push(LayerPredictor { rank: own.0, dtype: own.1, look_ahead_rank: ahead.map(|a| a.0) });
    }
    let views = tensors.iter().map(|t| {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("taken from a valid file");
        (t.name.clone(), view)
    });
    let has_relu = tensors.iter().any(|tensor| tensor.name.ends_with(RELU));
    let kind = if has_relu { PredictorKind::LowRankRelu } else { PredictorKind::LowRank };
    let blob = safetensors::serialize(views, None).expect("plain tensors serialise");
    Ok((PredictorInfo { kind, layers }, blob))
}

/// Rank and element type of the predictor under `prefix`, if it is there.
fn describe(
    parsed: &SafeTensors<'_>,
    prefix: &str,
    spec: &ModelSpec,
) -> Result<Option<(usize, PredictorDType)>, String> {
    let Ok(encoder) = parsed.tensor(&format!("{prefix}encoder")) else {
        // Without an encoder: the projection itself.
        let decoder = parsed.tensor(&format!("{prefix}decoder")).ok().filter(|view| view.dtype() == Dtype::U8);
        return Ok(decoder.map(|_| (spec.hidden_size, PredictorDType::Int4)));
    };
    let dtype = PredictorDType::try_from(encoder.dtype()).map_err(|other| format!("{prefix}encoder is {other}"))?;
    match *encoder.shape() {
        [rank, hidden] if hidden == spec.hidden_size => Ok(Some((rank, dtype))),
        _ => Err(format!("{prefix}encoder has shape {:?}, expected [rank, {}]", encoder.shape(), spec.hidden_size)),
    }
}

fn permuted(data: &[u8], order: &[u32]) -> Vec<u8> {
    let row = data.len() / order.len();
    order.iter().flat_map(|&neuron| &data[neuron as usize * row..][..row]).copied().collect()
}
