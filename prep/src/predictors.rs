//! Trained predictors, put into storage order and into one blob, as a bundle holds them.
//!
//! `train` writes one safetensors file for each layer, neurons in the checkpoint's order. In a bundle the rows of a decoder, its
//! scales and its bias are in storage order, under `layers.N.`; a layer's look-ahead predictor, which sees the layer's input and
//! speaks of the next layer's neurons, stands under `layers.N.lookahead.`, in the next layer's order.

use std::path::Path;
use std::sync::Arc;

use flashlm::neurons::predictor::LayerPredictors;
use flashlm::tensors::SharedBytes;
use flashlm_formats::bundle::{LayerPredictor, PREDICTOR_ROWS, PredictorDType, PredictorInfo, PredictorKind};
use flashlm_formats::ids::{NeuronId, Position};
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
    orders: &[Vec<NeuronId>],
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
                let rows = RowOrder::new(&parsed, &name[..name.len() - base.len()], order).map_err(&invalid)?;
                if base == PREDICTOR_ROWS {
                    rows.positions.iter().flat_map(|position| position.0.to_le_bytes()).collect()
                } else if view.shape().first() == Some(&rows.order.len()) {
                    permuted(view.data(), &rows.order)
                } else {
                    let (shape, rows) = (view.shape(), rows.order.len());
                    return Err(invalid(format!("{name} has shape {shape:?} for {rows} rows")));
                }
            };
            let name = format!("layers.{layer}.{name}");
            tensors.push(Owned { name, dtype: view.dtype(), shape: view.shape().to_vec(), bytes: data });
        }
        let own = describe(&parsed, "", spec).map_err(&invalid)?;
        let own = own.ok_or_else(|| invalid("it has no tensor `encoder`".into()))?;
        let ahead = describe(&parsed, LOOK_AHEAD, spec).map_err(&invalid)?;
        let rows = parsed.tensor(PREDICTOR_ROWS).ok().map(|view| view.data().len() / 4);
        layers.push(LayerPredictor { rank: own.0, dtype: own.1, rows, look_ahead_rank: ahead.map(|a| a.0) });
    }
    let views = tensors.iter().map(|t| {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("taken from a valid file");
        (t.name.clone(), view)
    });
    let has_relu = tensors.iter().any(|tensor| tensor.name.ends_with(RELU));
    let kind = if has_relu { PredictorKind::LowRankRelu } else { PredictorKind::LowRank };
    let blob = Arc::new(safetensors::serialize(views, None).expect("plain tensors serialise"));
    let info = PredictorInfo { kind, layers };
    // What a run would refuse is refused here, by the same code.
    let loaded = LayerPredictors::load_all(&(blob.clone() as SharedBytes), &info, spec);
    loaded.map_err(|error| PredictorFileError::Invalid { path: dir.to_path_buf(), what: error.to_string() })?;
    Ok((info, Arc::into_inner(blob).expect("nothing that was loaded is left")))
}

/// How the rows of a predictor, which a file has in the checkpoint's order, lie in a bundle.
struct RowOrder {
    /// Which row of the file comes next.
    order: Vec<u32>,
    /// And where its neuron is stored.
    positions: Vec<Position>,
}

impl RowOrder {
    fn new(parsed: &SafeTensors<'_>, prefix: &str, order: &[NeuronId]) -> Result<Self, String> {
        let stored = || (0..).map(Position).zip(order);
        let Ok(rows) = parsed.tensor(&format!("{prefix}{PREDICTOR_ROWS}")) else {
            let (positions, order) = stored().map(|(position, neuron)| (position, neuron.0)).unzip();
            return Ok(Self { order, positions });
        };
        if rows.dtype() != Dtype::U32 {
            return Err(format!("{prefix}{PREDICTOR_ROWS} is {:?}, expected U32", rows.dtype()));
        }
        let mut row_of = vec![None; order.len()];
        for (row, bytes) in (0u32..).zip(rows.data().as_chunks::<4>().0) {
            let neuron = u32::from_le_bytes(*bytes) as usize;
            let free = row_of.get_mut(neuron).filter(|row| row.is_none());
            *free.ok_or_else(|| {
                format!("{prefix}{PREDICTOR_ROWS}: expected different numbers below {}, found {neuron}", order.len())
            })? = Some(row);
        }
        let with_rows = stored().filter_map(|(position, neuron)| Some((position, row_of[neuron.index()]?)));
        let (positions, order): (Vec<Position>, Vec<u32>) = with_rows.unzip();
        if order.is_empty() {
            return Err(format!(
                "{prefix}{PREDICTOR_ROWS}: expected at least one neuron of {}, found none",
                row_of.len()
            ));
        }
        Ok(Self { order, positions })
    }
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
    order.iter().flat_map(|&from| &data[from as usize * row..][..row]).copied().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use flashlm_formats::checkpoint::Checkpoint;
    use flashlm_formats::predictors::{PredictorPart, StoredElements, StoredMatrix, write_predictor};
    use flashlm_formats::seal::{self, SEAL};
    use half::f16;

    use super::*;

    #[test]
    fn rows_follow_the_storage_order_and_none_at_all_is_refused() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples");
        let mut spec = Checkpoint::open(examples.join("tiny-opt")).unwrap().spec().clone();
        spec.layers.truncate(1);
        let (hidden, neurons) = (spec.hidden_size, spec.ffn().size);
        let dir = tempfile::tempdir().unwrap();
        let write = |rows: &[u32]| {
            let matrix = |rows: usize, columns: usize| {
                let elements = StoredElements::F16((0..rows * columns).map(|i| f16::from_f32(i as f32)).collect());
                StoredMatrix { rows, columns, elements }
            };
            let bias: Vec<f32> = rows.iter().map(|&row| row as f32).collect();
            let (encoder, decoder) = (Some(matrix(1, hidden)), matrix(rows.len(), 1));
            let part = PredictorPart { prefix: "", encoder, decoder, relu: false, bias: &bias, rows: Some(rows) };
            write_predictor(&predictor_path(dir.path(), 0), &[part]).unwrap();
            assemble(dir.path(), &spec, &[(0..neurons as u32).rev().map(NeuronId).collect()])
        };
        let (info, blob) = write(&[2, 5]).unwrap();
        assert_eq!(info.layers[0].rows, Some(2));
        let parsed = SafeTensors::deserialize(&blob).unwrap();
        let last = neurons as u32 - 1;
        let numbers: Vec<u8> = [last - 5, last - 2].iter().flat_map(|n| n.to_le_bytes()).collect();
        assert_eq!(parsed.tensor("layers.0.rows").unwrap().data(), numbers);
        let biases: Vec<u8> = [5.0f32, 2.0].iter().flat_map(|b| b.to_le_bytes()).collect();
        assert_eq!(parsed.tensor("layers.0.bias").unwrap().data(), biases);
        let refused = |rows: &[u32]| write(rows).unwrap_err().to_string();
        assert!(refused(&[]).contains("expected at least one neuron"), "{}", refused(&[]));
        assert!(refused(&[3, 3]).contains("expected different numbers below"));
        assert!(refused(&[neurons as u32]).contains("expected different numbers below"));
    }

    #[test]
    fn what_a_run_would_refuse_is_refused() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples");
        let mut spec = Checkpoint::open(examples.join("tiny-opt")).unwrap().spec().clone();
        spec.layers.truncate(2);
        let (hidden, neurons) = (spec.hidden_size, spec.ffn().size);
        let dir = tempfile::tempdir().unwrap();
        let orders = vec![(0..neurons as u32).map(NeuronId).collect(); 2];
        let bias = vec![0.5; neurons];
        // Both layers' files, the first with a look-ahead; then one tensor of it is left out.
        let write = |value: f32, without: &str| {
            let matrix = |rows: usize, columns: usize| {
                let elements = StoredElements::F16(vec![f16::from_f32(value); rows * columns]);
                StoredMatrix { rows, columns, elements }
            };
            let part = |prefix| {
                let (encoder, decoder) = (Some(matrix(2, hidden)), matrix(neurons, 2));
                PredictorPart { prefix, encoder, decoder, relu: false, bias: &bias, rows: None }
            };
            let path = predictor_path(dir.path(), 0);
            write_predictor(&predictor_path(dir.path(), 1), &[part("")]).unwrap();
            write_predictor(&path, &[part(""), part(LOOK_AHEAD)]).unwrap();
            let whole = std::fs::read(&path).unwrap();
            let parsed = SafeTensors::deserialize(&whole).unwrap();
            let kept = parsed.iter().filter(|(name, _)| *name != without);
            let metadata = HashMap::from([(SEAL.0.to_owned(), SEAL.1.to_owned())]);
            let mut bytes = safetensors::serialize(kept, Some(metadata)).unwrap();
            seal::seal(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            assemble(dir.path(), &spec, &orders).map_err(|error| error.to_string())
        };
        assert!(write(1.0, "").is_ok());
        let missing = write(1.0, "lookahead.bias").unwrap_err();
        assert!(missing.contains("layers.0.lookahead.bias: expected 1024 values of F32"), "{missing}");
        for value in [f32::NAN, f32::INFINITY] {
            let refused = write(value, "").unwrap_err();
            assert!(refused.contains("layers.0.decoder: expected finite numbers"), "{refused}");
        }
    }
}
