//! What a bundle that opens has to stand: being planned for, loaded, and fed two tokens, with whatever numbers are in it.

use std::sync::Arc;

use flashlm::engine::{Executor, Forward, PIECE_TOKENS, Room};
use flashlm::error::{Result, RuntimeError};
use flashlm::forward::kv::KvDtype;
use flashlm::forward::weights::ModelWeights;
use flashlm::neurons::params::NeuronParams;
use flashlm::neurons::predictor::LayerPredictors;
use flashlm::neurons::records::Records;
use flashlm::neurons::resident::ResidentFfn;
use flashlm::options::LoadOptions;
use flashlm::plan::plan;
use flashlm::tensors::{BytesRange, SharedBytes, TensorBytes, TensorSource};
use flashlm_formats::bundle::{Bundle, Extent};
use flashlm_io::AlignedMemory;
use flashlm_kernels::Threads;

struct Tensors<'a>(&'a Bundle);

impl Tensors<'_> {
    fn part(&self, extent: Extent) -> Result<BytesRange> {
        self.0.read_part(extent).map(BytesRange::whole).map_err(|e| RuntimeError::Unsupported(e.to_string()))
    }
}

impl TensorSource for Tensors<'_> {
    fn tensor(&mut self, name: &str) -> Result<TensorBytes> {
        let entry = self.0.resident_tensor(name).ok_or_else(|| RuntimeError::MissingTensor(name.into()))?;
        let scales = entry.scales.map(|scales| self.part(scales)).transpose()?;
        Ok(TensorBytes { format: entry.format, shape: entry.shape.clone(), data: self.part(entry.extent)?, scales })
    }

    fn ffn_scales(&mut self, layer: usize) -> Result<Option<BytesRange>> {
        self.0.ffn_scales(layer).map(|scales| self.part(scales)).transpose()
    }
}

/// Plans within several budgets, then loads and feeds; errors are fine.
pub fn whole(bundle: &Bundle) {
    for budget in [None, Some(1 << 20), Some(100 << 20)] {
        _ = plan(bundle, &LoadOptions { budget, ..LoadOptions::new(4) });
    }
    let spec = bundle.spec();
    if let (Ok(Some(blob)), Some(info)) = (bundle.read_predictors(), &bundle.manifest().predictors) {
        let blob: SharedBytes = Arc::new(blob);
        let threads = Threads::new(std::num::NonZeroUsize::MIN).expect("no thread beside this one");
        for mut layer in LayerPredictors::load_all(&blob, info, spec).unwrap_or_default() {
            let (input, mut scores) = (vec![1.0; spec.hidden_size], vec![0.0; spec.ffn().size]);
            layer.own.scores(&threads, &input, &mut scores);
        }
    }
    _ = feed(bundle);
}

fn feed(bundle: &Bundle) -> Result<()> {
    let spec = bundle.spec();
    let weights = ModelWeights::load(spec, &mut Tensors(bundle))?;
    let layer_bytes = bundle.layout().layer_bytes();
    let mut data = AlignedMemory::new(layer_bytes * spec.layers.len())?;
    for (layer, data) in data.as_mut_slice().chunks_exact_mut(layer_bytes).enumerate() {
        let read = bundle.read_at(bundle.layer(layer).offset, data);
        read.map_err(|e| RuntimeError::Unsupported(e.to_string()))?;
    }
    let params = NeuronParams::load_all(spec, &mut Tensors(bundle))?;
    let ffn = ResidentFfn::new(*spec.ffn(), Records::of(bundle), data, params);
    let threads = Threads::new(std::num::NonZeroUsize::MIN).expect("no thread beside this one");
    let context = spec.max_positions.min(4);
    let room = Room { context, sequences: 1, kv: KvDtype::F16, scratch_tokens: PIECE_TOKENS, batch: 1 };
    let mut forward = Forward::new(Executor::new(spec.clone(), weights, Box::new(ffn), threads, room)?)?;
    forward.feed(&[0])?;
    forward.feed(&[spec.vocab_size as u32 - 1, 0])?;
    Ok(())
}
