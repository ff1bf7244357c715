//! A bundle against its checkpoint: what the predictors cost in quality.
//!
//! Both models go through the same text side by side, layer by layer, so that one layer of each is in memory at a time. In the
//! bundle's pass the predictor decides at every position, exactly as in decode. At the end both give logits for every position:
//! perplexity of each, divergence, and how often they agree on the likeliest token.

mod measures;

use std::path::Path;
use std::sync::Arc;

use flashlm::buffers::Buffers;
use flashlm::error::{Result as RuntimeResult, RuntimeError};
use flashlm::forward::head::{Head, HeadScratch};
use flashlm::forward::kv::KvDtype;
use flashlm::forward::weights::{LayerWeights, OuterWeights};
use flashlm::neurons::hook::Cutoff;
use flashlm::neurons::params::NeuronParams;
use flashlm::neurons::predicted::PredictedFfn;
use flashlm::neurons::predictor::{Predictor, PredictorTensors};
use flashlm::neurons::records::Records;
use flashlm::neurons::resident::ResidentFfn;
use flashlm::neurons::source::FfnSource;
use flashlm::tensors::{BytesRange, SharedBytes, TensorBytes, TensorSource};
use flashlm_formats::bundle::{Bundle, BundleError, checksum};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_io::AlignedMemory;
use flashlm_kernels::Threads;

use crate::layers::{LayerRunner, PassError};
use crate::record::{CheckpointTensors, RecordError, layer_ffn};
use crate::states::{HiddenStates, StatesError};

pub(crate) use measures::log_sum_exp;
pub use measures::{Comparison, Evaluation, LayerErrors};
use measures::{LayerObserver, compare};

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The checkpoint.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The forward pass.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The hidden states.
    #[error(transparent)]
    States(#[from] StatesError),
    /// The forward pass.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// Bundle and checkpoint are different models.
    #[error(
        "the bundle is of another model than the checkpoint: {0}; give the checkpoint that the bundle was made from"
    )]
    OtherModel(String),
    /// The bundle has no predictors.
    #[error(
        "the bundle has no predictors (it was made by `convert`); evaluate it with --predictor all, or `pack` one with predictors"
    )]
    NoPredictors,
    /// Too little text.
    #[error("the text has {found} tokens to score; at least {needed} are needed")]
    TooShort {
        /// Scored tokens.
        found: usize,
        /// The least.
        needed: usize,
    },
    /// A group of the bundle is damaged.
    #[error("group {group} of layer {layer} is damaged; run `flashlm-prep verify`")]
    Damaged {
        /// Which layer.
        layer: usize,
        /// Which group.
        group: usize,
    },
}

/// Which neurons the bundle computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PredictorChoice {
    /// Those that its predictors choose.
    Bundle,
    /// All of them.
    All,
    /// Those above their layer's threshold, as if predictors never erred.
    Active,
}

/// How the bundle is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Computed {
    /// Which neurons.
    pub neurons: PredictorChoice,
    /// How its keys and values are stored; those of the checkpoint are exact.
    pub kv: KvDtype,
}

impl From<PredictorChoice> for Computed {
    /// With keys and values as exact as the checkpoint's.
    fn from(neurons: PredictorChoice) -> Self {
        Self { neurons, kv: KvDtype::F32 }
    }
}

/// The text, cut into windows.
///
/// No window has ids of two documents: as a prompt is one text, so is what is recorded and trained on, and what comes before a
/// token in use is never the end of another text.
pub struct Windows {
    /// Ids of all windows, one after another.
    pub ids: Vec<u32>,
    /// Where windows begin, and the number of ids.
    pub offsets: Vec<usize>,
}

impl Windows {
    /// Cuts documents into windows of at most `window` ids. A document's first window begins with `begin`, the others with `first`;
    /// every id but the first of a window is scored.
    pub fn new<'a>(documents: impl IntoIterator<Item = &'a [u32]>, window: usize, [begin, first]: [&[u32]; 2]) -> Self {
        let (mut ids, mut offsets) = (Vec::new(), vec![0]);
        for mut document in documents {
            let mut before = begin;
            while !document.is_empty() {
                let (now, later) = document.split_at(window.saturating_sub(before.len()).clamp(1, document.len()));
                ids.extend(before);
                ids.extend_from_slice(now);
                offsets.push(ids.len());
                (document, before) = (later, first);
            }
        }
        Self { ids, offsets }
    }

    fn ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.offsets.windows(2).map(|w| w[0]..w[1])
    }

    fn longest(&self) -> usize {
        self.ranges().map(|r| r.len()).max().unwrap_or(0)
    }
}

/// Compares `bundle` with `checkpoint` on `windows`; scratch files, which have no names, go to the directory `scratch`. `progress` is
/// told layers done and layers in all; `logits` sees those of checkpoint and bundle at every scored id of the windows.
#[expect(clippy::too_many_arguments, reason = "inputs, and two ways to watch")]
pub fn evaluate(
    bundle: &Bundle,
    checkpoint: &Checkpoint,
    windows: &Windows,
    computed: impl Into<Computed>,
    threads: &Threads,
    scratch: &Path,
    progress: &mut dyn FnMut(usize, usize),
    logits: &mut dyn FnMut(usize, [&[f32]; 2]),
) -> Result<Evaluation, EvaluateError> {
    let (spec, Computed { neurons: choice, kv }) = (bundle.spec(), computed.into());
    let thresholds = checkpoint.spec().thresholds.clone();
    if (ModelSpec { thresholds, ..spec.clone() }) != *checkpoint.spec() {
        return Err(EvaluateError::OtherModel(format!(
            "{} of {} layers and hidden size {} against {} of {} and {}",
            spec.family,
            spec.layers.len(),
            spec.hidden_size,
            checkpoint.spec().family,
            checkpoint.spec().layers.len(),
            checkpoint.spec().hidden_size
        )));
    }
    let scored = windows.ranges().map(|r| r.len().saturating_sub(1)).sum();
    if scored == 0 {
        return Err(EvaluateError::TooShort { found: scored, needed: 1 });
    }
    let predictors = match choice {
        PredictorChoice::All | PredictorChoice::Active => None,
        PredictorChoice::Bundle => Some(bundle.read_predictors()?.ok_or(EvaluateError::NoPredictors)?),
    };
    let predictors: Option<SharedBytes> = predictors.map(|bytes| Arc::new(bytes) as SharedBytes);
    let mut run = Run {
        bundle,
        checkpoint,
        windows,
        threads,
        of_checkpoint: LayerRunner::new(spec, threads, windows.longest())?,
        of_bundle: LayerRunner::new(spec, threads, windows.longest())?.with_kv(kv)?,
        dir: scratch,
        predictors,
        predictor_bytes: 0,
        only_active: choice == PredictorChoice::Active,
    };
    let (layers, states) = run.layers(progress)?;
    let comparison = run.heads(&states, logits)?;
    let ffn_bytes =
        (spec.ffn().vectors() * spec.ffn().size * bundle.manifest().ffn.dtype.row_bytes(spec.hidden_size)) as u64;
    Ok(Evaluation::new(comparison, layers, run.predictor_bytes, ffn_bytes * spec.layers.len() as u64))
}

/// The states of checkpoint and bundle.
type Both = [HiddenStates; 2];

struct Run<'a> {
    bundle: &'a Bundle,
    checkpoint: &'a Checkpoint,
    windows: &'a Windows,
    threads: &'a Threads,
    of_checkpoint: LayerRunner<'a>,
    of_bundle: LayerRunner<'a>,
    dir: &'a Path,
    predictors: Option<SharedBytes>,
    predictor_bytes: u64,
    only_active: bool,
}

impl Run<'_> {
    fn spec(&self) -> &ModelSpec {
        self.bundle.spec()
    }

    fn new_states(&self) -> Result<HiddenStates, StatesError> {
        HiddenStates::temporary(self.dir, self.windows.ids.len(), self.spec().hidden_size)
    }

    fn layers(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<(Vec<LayerErrors>, Both), EvaluateError> {
        let (spec, layers) = (self.bundle.spec(), self.spec().layers.len());
        let mut states = [self.new_states()?, self.new_states()?];
        let sources: [&mut dyn TensorSource; 2] =
            [&mut CheckpointTensors::new(self.checkpoint), &mut BundleTensors(self.bundle)];
        for (source, states) in sources.into_iter().zip(&mut states) {
            let outer = OuterWeights::load(spec, source)?;
            self.of_checkpoint.embed(&outer, &self.windows.ids, self.windows.ranges(), states)?;
        }
        let mut errors = Vec::with_capacity(layers);
        let blob = self.predictors.clone();
        let tensors = blob.as_ref().map(PredictorTensors::parse).transpose()?;
        for layer in 0..layers {
            let weights =
                LayerWeights::load(self.checkpoint.spec(), layer, &mut CheckpointTensors::new(self.checkpoint))?;
            let (mut ffn, down_norms) = layer_ffn(self.checkpoint, layer)?;
            let mut output = self.new_states()?;
            for range in self.windows.ranges() {
                self.of_checkpoint.run(&weights, &mut ffn, range, (&states[0], &mut output), None)?;
            }
            states[0] = output;
            drop((weights, ffn));

            let weights = LayerWeights::load(self.bundle.spec(), layer, &mut BundleTensors(self.bundle))?;
            let (hidden, neurons) = (self.spec().hidden_size, self.spec().ffn().size);
            let predictor = match &tensors {
                None => None,
                Some(tensors) => Some(vec![tensors.predictor(&format!("layers.{layer}."), hidden, neurons)?]),
            };
            self.predictor_bytes += predictor.iter().flatten().map(Predictor::bytes).sum::<u64>();
            let source = bundle_ffn(self.bundle, layer)?;
            let threshold = self.spec().threshold(layer);
            let mut ffn: Box<dyn FfnSource> = match self.only_active {
                true => Box::new(source),
                false => Box::new(PredictedFfn::new(source, predictor, self.spec().ffn().size, 1)),
            };
            let cutoff = if self.only_active { threshold } else { 0.0 };
            let mut output = self.new_states()?;
            let norms = self.bundle.storage_order(layer).iter().map(|n| down_norms[n.index()]).collect();
            let mut observer = LayerObserver::new(norms, threshold, self.only_active);
            for range in self.windows.ranges() {
                let mut hook = Cutoff { cutoff, watcher: Some(&mut observer) };
                self.of_bundle.run(&weights, &mut *ffn, range, (&states[1], &mut output), Some(&mut hook))?;
            }
            states[1] = output;
            errors.push(observer.errors());
            progress(layer + 1, layers);
        }
        Ok((errors, states))
    }

    fn heads(&mut self, states: &Both, seen: &mut dyn FnMut(usize, [&[f32]; 2])) -> Result<Comparison, EvaluateError> {
        let spec = self.bundle.spec();
        let outer = [
            OuterWeights::load(spec, &mut CheckpointTensors::new(self.checkpoint))?,
            OuterWeights::load(spec, &mut BundleTensors(self.bundle))?,
        ];
        let mut scratch = [(); 2].map(|()| HeadScratch::new(&mut Buffers::default(), spec, 1));
        let mut comparison = Comparison::default();
        let mut state = vec![0.0; spec.hidden_size];
        for range in self.windows.ranges() {
            for position in range.start..range.end.saturating_sub(1) {
                for ((outer, states), scratch) in outer.iter().zip(states).zip(&mut scratch) {
                    states.read(position, &mut state)?;
                    Head { spec, weights: outer, threads: self.threads }.logits(&state, position + 1, scratch)?;
                }
                let [dense, bundle] = &scratch;
                seen(position, [dense.logits(0), bundle.logits(0)]);
                compare(&mut comparison, dense.logits(0), bundle.logits(0), self.windows.ids[position + 1]);
            }
        }
        Ok(comparison)
    }
}

/// Resident tensors of a bundle, read one by one.
struct BundleTensors<'a>(&'a Bundle);

impl TensorSource for BundleTensors<'_> {
    fn tensor(&mut self, name: &str) -> RuntimeResult<TensorBytes> {
        let entry = self.0.resident_tensor(name).ok_or_else(|| RuntimeError::MissingTensor(name.into()))?;
        let read = |extent| Ok::<_, RuntimeError>(BytesRange::whole(self.0.read_part(extent)?));
        Ok(TensorBytes {
            format: entry.format,
            shape: entry.shape.clone(),
            data: read(entry.extent)?,
            scales: entry.scales.map(read).transpose()?,
        })
    }

    fn ffn_scales(&mut self, layer: usize) -> RuntimeResult<Option<BytesRange>> {
        self.0.ffn_scales(layer).map(|scales| Ok(BytesRange::whole(self.0.read_part(scales)?))).transpose()
    }
}

/// One layer's records, checked, as a source whose only layer it is.
fn bundle_ffn(bundle: &Bundle, layer: usize) -> Result<ResidentFfn, EvaluateError> {
    let layout = *bundle.layout();
    let mut records = AlignedMemory::new(layout.layer_bytes()).map_err(RuntimeError::from)?;
    bundle.read_at(bundle.layer(layer).offset, records.as_mut_slice())?;
    let groups = records.as_slice().chunks_exact(layout.group_bytes()).zip(bundle.group_checksums(layer).iter());
    if let Some(group) = groups.into_iter().position(|(bytes, sum)| checksum(bytes) != *sum) {
        return Err(EvaluateError::Damaged { layer, group });
    }
    let params = NeuronParams::load(bundle.spec(), layer, &mut BundleTensors(bundle))?;
    Ok(ResidentFfn::new(*bundle.spec().ffn(), Records::of(bundle), records, vec![params]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_window_has_ids_of_two_documents() {
        let documents: [&[u32]; 3] = [&[10, 11, 12, 13, 14], &[], &[20]];
        let windows = Windows::new(documents, 4, [&[1, 2], &[1]]);
        let cut: Vec<&[u32]> = windows.ranges().map(|range| &windows.ids[range]).collect();
        assert_eq!(cut, [&[1, 2, 10, 11][..], &[1, 12, 13, 14], &[1, 2, 20]]);
        // However short windows are, each has an id of the text.
        let windows = Windows::new([&[10, 11][..]], 1, [&[1, 2], &[1]]);
        assert_eq!(windows.ids, [1, 2, 10, 1, 11]);
    }
}
