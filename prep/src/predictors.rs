//! Trained predictors, put into storage order and into one blob, as a bundle holds them.
//!
//! `train` writes one safetensors file for each layer, neurons in the checkpoint's order. In a bundle the rows of a decoder, its
//! scales and its bias stand in storage order, under `layers.N.`; a layer's look-ahead predictor, which sees the layer's input and
//! speaks of the next layer's neurons, stands under `layers.N.lookahead.`, in the next layer's order.

use std::io::Read;
use std::path::{Path, PathBuf};

use flashlm_formats::bundle::{LayerPredictor, PredictorDType, PredictorInfo, PredictorKind};
use flashlm_formats::model::ModelSpec;
use flashlm_formats::regular::open_regular;
use flashlm_formats::seal;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// The predictors of a directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PredictorsError {
    /// A file cannot be read.
    #[error("cannot read the predictor {}: {source}; run `flashlm-prep train` for this layer", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not a predictor of this model.
    #[error("{}: {what}; train it again for this model", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// Look-ahead tensors have this before their names.
const LOOK_AHEAD: &str = "lookahead.";

/// Where the predictor of `layer` lies in `dir`.
pub fn predictor_path(dir: &Path, layer: usize) -> PathBuf {
    dir.join(format!("predictor-{layer:03}.safetensors"))
}

/// The predictor file of `layer` in `dir`, held against its seal.
///
/// # Errors
/// `Read`, and `Invalid` for a file that is not as it was written.
pub fn read_predictor(dir: &Path, layer: usize) -> Result<Vec<u8>, PredictorsError> {
    let path = predictor_path(dir, layer);
    let mut bytes = Vec::new();
    let read = open_regular(&path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map_err(|source| PredictorsError::Read { path: path.clone(), source })?;
    seal::check(&bytes).map_err(|broken| PredictorsError::Invalid { path, what: broken.to_string() })?;
    Ok(bytes)
}

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
) -> Result<(PredictorInfo, Vec<u8>), PredictorsError> {
    let mut tensors = Vec::new();
    let mut layers = Vec::new();
    for layer in 0..spec.layers.len() {
        let path = predictor_path(dir, layer);
        let bytes = read_predictor(dir, layer)?;
        let invalid = |what: String| PredictorsError::Invalid { path: path.clone(), what };
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
    let has_relu = tensors.iter().any(|tensor| tensor.name.ends_with("encoder_relu"));
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
    let Ok(encoder) = parsed.tensor(&format!("{prefix}encoder")) else { return Ok(None) };
    let dtype = match encoder.dtype() {
        Dtype::F16 => PredictorDType::F16,
        Dtype::I8 => PredictorDType::Int8,
        other => return Err(format!("{prefix}encoder is {other:?}, expected F16 or I8")),
    };
    match *encoder.shape() {
        [rank, hidden] if hidden == spec.hidden_size => Ok(Some((rank, dtype))),
        _ => Err(format!("{prefix}encoder has shape {:?}, expected [rank, {}]", encoder.shape(), spec.hidden_size)),
    }
}

fn permuted(data: &[u8], order: &[u32]) -> Vec<u8> {
    let row = data.len() / order.len();
    order.iter().flat_map(|&neuron| &data[neuron as usize * row..][..row]).copied().collect()
}
