//! Weights rounded for the inputs that they get.
//!
//! Calibration text goes through the model, one layer's weights in memory at a time, as when recording. The second moments of what each
//! matrix of a layer is multiplied with say which errors of its weights make up for each other; the layer is rounded by them, and the
//! next one's turn comes. The integers stand in a scratch file without a name until they are packed: inputs' moments would take more room
//! than the bundle.

mod inputs;
mod layer;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flashlm::error::RuntimeError;
use flashlm::forward::weights::{LayerWeights, OuterWeights};
use flashlm_formats::bundle::BundleError;
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError};
use flashlm_formats::model::ModelSpec;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_kernels::Threads;

use crate::layers::{LayerRunner, PassError};
use crate::quantise::Squares;
use crate::record::{Calibration, CheckpointTensors, RecordError, layer_ffn};
use crate::states::{HiddenStates, StatesError};
use inputs::LayerInputs;
use layer::LayerRounding;

/// Tokens of text that inputs are known from, at most.
pub const ROUNDING_TOKENS: usize = 8192;

/// Why weights could not be rounded for their inputs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoundingError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Records cannot be laid out.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A layer's weights.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The forward pass.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A pass through a layer.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The hidden states.
    #[error(transparent)]
    States(#[from] StatesError),
    /// The scratch file.
    #[error("cannot keep rounded weights in {}: {source}", dir.display())]
    Scratch {
        /// Where it is.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Weights that have no scale.
    #[error("{what} holds weights that are not finite numbers: they cannot be quantised")]
    NotFinite {
        /// Which weights.
        what: String,
    },
    /// Inputs that are no numbers.
    #[error(
        "{what}: expected finite inputs, found others on this text; pack without calibration text to round each weight for itself"
    )]
    Inputs {
        /// Of which weights.
        what: String,
    },
}

/// Which matrices are to be rounded, and to what.
#[derive(Clone, Copy, Debug)]
pub struct RoundedFormats {
    /// Neuron records.
    pub ffn: Option<WeightFormat>,
    /// The projections of attention.
    pub attention: Option<WeightFormat>,
}

impl RoundedFormats {
    /// Whether nothing is to be rounded.
    pub fn is_plain(self) -> bool {
        self.ffn.is_none() && self.attention.is_none()
    }

    /// Bytes of memory that rounding takes beside a layer and what goes through it.
    pub(crate) fn bytes(self, spec: &ModelSpec) -> u64 {
        if self.is_plain() { 0 } else { LayerInputs::bytes(spec) }
    }
}

/// Rounded weights.
#[derive(Debug)]
pub struct Rounded {
    file: File,
    end: u64,
    parts: BTreeMap<String, Part>,
}

/// Where something lies in the file.
#[derive(Clone, Copy, Debug)]
struct Part {
    format: WeightFormat,
    begin: u64,
    values: usize,
    scales: usize,
    lost: Squares,
}

/// Integers and scales, row after row, and what rounding changed.
pub(crate) struct RoundedRows {
    pub(crate) values: Vec<u8>,
    pub(crate) scales: Vec<u8>,
    pub(crate) lost: Squares,
}

/// The name under which the neurons of a layer are kept, in the checkpoint's order, each with the rows of its record.
pub(crate) fn neurons_of(layer: usize) -> String {
    format!("layers.{layer}.ffn")
}

impl Rounded {
    /// What was kept under a name in this format, if anything was.
    pub(crate) fn rows(&self, name: &str, format: WeightFormat) -> io::Result<Option<RoundedRows>> {
        let part = self.parts.get(name).filter(|part| part.format == format);
        let Some(&Part { begin, values, scales, lost, .. }) = part else { return Ok(None) };
        let (mut values, mut scales) = (vec![0; values], vec![0; scales]);
        self.file.read_exact_at(&mut values, begin)?;
        self.file.read_exact_at(&mut scales, begin + values.len() as u64)?;
        Ok(Some(RoundedRows { values, scales, lost }))
    }

    fn keep(&mut self, name: String, format: WeightFormat, rows: &RoundedRows) -> io::Result<()> {
        let RoundedRows { values, scales, lost } = rows;
        let begin = self.end;
        self.file.write_all_at(values, begin)?;
        self.file.write_all_at(scales, begin + values.len() as u64)?;
        self.end += (values.len() + scales.len()) as u64;
        self.parts.insert(name, Part { format, begin, values: values.len(), scales: scales.len(), lost: *lost });
        Ok(())
    }
}

/// Rounds the weights of `checkpoint` for the inputs that `calibration` gives them. Scratch files, which have no names, go to the directory
/// `dir`; `progress` is told tokens done, of all layers, and in all.
///
/// # Errors
/// Whatever the pass meets, and numbers that are not finite.
pub fn round_for(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    formats: RoundedFormats,
    threads: &Threads,
    dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Rounded, RoundingError> {
    let (spec, tokens) = (checkpoint.spec(), calibration.tokens.len());
    let scratch = |source| RoundingError::Scratch { dir: dir.to_path_buf(), source };
    let mut rounded = Rounded { file: tempfile::tempfile_in(dir).map_err(scratch)?, end: 0, parts: BTreeMap::new() };
    let longest = calibration.ranges().map(|range| range.len()).max().unwrap_or(0);
    let mut runner = LayerRunner::new(spec, threads, longest)?;
    let mut states = HiddenStates::temporary(dir, tokens, spec.hidden_size)?;
    let outer = OuterWeights::load(spec, &mut CheckpointTensors::new(checkpoint))?;
    runner.embed(&outer, &calibration.tokens, calibration.ranges(), &mut states)?;
    drop(outer);
    let layers = spec.layers.len();
    let total = (tokens * layers) as u64;
    for layer in 0..layers {
        let weights = LayerWeights::load(spec, layer, &mut CheckpointTensors::new(checkpoint))?;
        let (mut ffn, _) = layer_ffn(checkpoint, layer)?;
        let mut output = HiddenStates::temporary(dir, tokens, spec.hidden_size)?;
        let mut inputs = LayerInputs::new(spec, layer, formats, longest);
        for range in calibration.ranges() {
            let done = (layer * tokens + range.end) as u64;
            runner.run(&weights, &mut ffn, range, (&states, &mut output), Some(&mut inputs))?;
            inputs.add_activations();
            progress(done, total);
        }
        states = output;
        // Room for the weights as numbers.
        drop((weights, ffn));
        let rounding = LayerRounding { checkpoint, layer };
        if let Some(format) = formats.attention {
            for (which, moments) in [("qkv", inputs.qkv.take()), ("out", inputs.out.take())] {
                let name = format!("layers.{layer}.attention.{which}.weight");
                let rows = rounding.matrix(&name, format, moments.expect("asked for"))?;
                rounded.keep(name, format, &rows).map_err(scratch)?;
            }
        }
        if let Some(format) = formats.ffn {
            let rows = rounding.neurons(format, inputs)?;
            rounded.keep(neurons_of(layer), format, &rows).map_err(scratch)?;
        }
    }
    Ok(rounded)
}
