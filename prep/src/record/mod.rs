//! Recording: which neurons of a model fire on a text, layer by layer.
//!
//! The runtime's forward pass with an observer. One layer's weights are in memory at a time: all sequences go through it, then
//! the next layer is loaded. The hidden states between layers are kept in a file, so memory does not grow with the text, and an
//! interrupted recording continues after the last finished layer.

pub mod documents;
mod layer_source;
pub mod text;

use std::path::{Path, PathBuf};

use flashlm::error::RuntimeError;
use flashlm::forward::weights::{LayerWeights, OuterWeights};
use flashlm::neurons::hook::{Activations, FfnHook};
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError};
use flashlm_formats::recording::{LayerWriter, Recording, RecordingError, RecordingInfo};
use flashlm_kernels::Threads;

use crate::layers::{LayerRunner, PassError};
use crate::states::{self, HiddenStates, StatesError};

pub use layer_source::{CheckpointTensors, layer_ffn};
pub use text::{Calibration, TextError};

/// What can go wrong while recording.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The recording's files.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// The forward pass.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A pass through a layer.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The layer's records cannot be laid out.
    #[error(transparent)]
    Layout(#[from] flashlm_formats::bundle::LayoutError),
    /// The file of hidden states.
    #[error(transparent)]
    States(#[from] StatesError),
    /// The calibration text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The recording in the directory is of something else.
    #[error("{} holds a recording of other inputs (id {found}, expected {expected}); give another directory or delete it", dir.display())]
    OtherRecording {
        /// The directory.
        dir: PathBuf,
        /// The id that these inputs give.
        expected: String,
        /// The id found.
        found: String,
    },
}

/// Records a checkpoint layer by layer.
pub struct Recorder<'a> {
    checkpoint: &'a Checkpoint,
    threads: Threads,
    recording: Recording,
    longest: usize,
}

impl<'a> Recorder<'a> {
    /// Begins a recording of `calibration` in `dir`, or continues with the one of the same inputs that is there.
    pub fn open(
        checkpoint: &'a Checkpoint,
        calibration: &Calibration,
        dir: &Path,
        threads: Threads,
    ) -> Result<Self, RecordError> {
        let spec = checkpoint.spec();
        let id = calibration.id(checkpoint);
        let recording = match Recording::open(dir) {
            Ok(found) if found.info().id == id => found,
            Ok(found) => {
                let found = found.info().id.clone();
                return Err(RecordError::OtherRecording { dir: dir.to_path_buf(), expected: id, found });
            }
            Err(_) if !dir.join("recording.json").exists() => {
                let mut info = RecordingInfo::new(spec.clone(), id);
                info.sequence_tokens = calibration.sequence_tokens as u64;
                info.seed = Some(calibration.seed);
                info.checkpoint = checkpoint.fingerprint();
                info.text = format!("{:016x}", calibration.text_fingerprint);
                info.recorder = format!("flashlm-prep {}, f32", env!("CARGO_PKG_VERSION"));
                Recording::create(
                    dir,
                    info,
                    calibration.tokens.clone(),
                    calibration.sequences.clone(),
                    calibration.documents.clone(),
                    calibration.held_out.clone(),
                )?
            }
            Err(error) => return Err(error.into()),
        };
        let longest = recording.sequences().map(|s| s.len()).max().unwrap_or(0);
        Ok(Self { checkpoint, threads, recording, longest })
    }

    /// The recording so far.
    pub fn recording(&self) -> &Recording {
        &self.recording
    }

    /// Peak bytes of memory that recording a layer takes, apart from the program itself.
    pub fn layer_bytes(&self) -> u64 {
        let spec = self.checkpoint.spec();
        let dtype = self.checkpoint.ffn_dtype().bytes();
        let ffn = spec.ffn().vectors() * spec.ffn().size * spec.hidden_size * dtype;
        let attention = (spec.attention().qkv_size() + spec.attention().heads * spec.attention().head_dim)
            * spec.hidden_size
            * dtype;
        // The source's rows are in memory once more while records are made of them.
        (2 * ffn + attention + self.longest * spec.ffn().size * 4) as u64 + LayerRunner::bytes(spec, self.longest)
    }

    /// Records `layer` and moves the hidden states through it. Earlier layers must have been recorded.
    ///
    /// `keep` says whether the layer's file is wanted; without, only the states move on. `progress` is told the tokens done.
    /// Gives the share of neurons that are active.
    pub fn record(&mut self, layer: usize, keep: bool, progress: &mut dyn FnMut(usize)) -> Result<f64, RecordError> {
        let spec = self.checkpoint.spec();
        let states_dir = self.recording.dir().join("states");
        let tokens = self.recording.tokens().len();
        let input = if layer == 0 {
            self.embeddings(&states_dir)?
        } else {
            HiddenStates::open(&states_dir, layer, tokens, spec.hidden_size)?
        };
        let mut tensors = CheckpointTensors::new(self.checkpoint);
        let weights = LayerWeights::load(spec, layer, &mut tensors)?;
        let (mut ffn, down_norms) = layer_ffn(self.checkpoint, layer)?;
        let mut runner = LayerRunner::new(spec, &self.threads, self.longest)?;
        let mut output = HiddenStates::create(&states_dir, layer + 1, tokens, spec.hidden_size)?;
        let mut observer = LayerObserver {
            writer: if keep { Some(self.recording.layer_writer(layer)?) } else { None },
            activations: vec![0.0; self.longest * spec.ffn().size],
            input: Vec::with_capacity(self.longest * spec.hidden_size),
            ffn: spec.ffn().size,
            threshold: spec.threshold(layer),
            tokens: 0,
        };
        for sequence in self.recording.sequences() {
            let end = sequence.end;
            runner.run(&weights, &mut ffn, sequence, (&input, &mut output), Some(&mut observer))?;
            observer.flush()?;
            progress(end);
        }
        let mut active = 0.0;
        if let Some(writer) = observer.writer {
            active = writer.active_fraction();
            writer.finish(&down_norms)?;
        }
        // Last: states that are there say that everything before them is.
        output.publish()?;
        input.remove()?;
        Ok(active)
    }

    /// Deletes what is not as it was written, and names it: an interrupted recording would go on from it.
    ///
    /// # Errors
    /// What cannot be deleted.
    pub fn drop_damaged(&self) -> Result<Vec<PathBuf>, RecordError> {
        let (spec, dir) = (self.checkpoint.spec(), self.recording.dir().join("states"));
        let tokens = self.recording.tokens().len();
        let mut dropped = Vec::new();
        for layer in 0..=spec.layers.len() {
            if HiddenStates::exists(&dir, layer) && !HiddenStates::is_whole(&dir, layer, tokens, spec.hidden_size) {
                dropped.push(HiddenStates::delete(&dir, layer)?);
            }
        }
        for layer in (0..spec.layers.len()).filter(|layer| self.recording.has_layer(*layer)) {
            if self.recording.layer(layer).is_err() {
                self.recording.remove_layer(layer)?;
                dropped.push(self.recording.layer_path(layer));
            }
        }
        Ok(dropped)
    }

    /// Whether `layer` is done: its file is there (or was), and the states after it.
    pub fn is_done(&self, layer: usize) -> bool {
        HiddenStates::exists(&self.recording.dir().join("states"), layer + 1) && self.recording.has_layer(layer)
    }

    /// The first layer whose input states are there: where recording goes on.
    pub fn resume_layer(&self) -> usize {
        let dir = self.recording.dir().join("states");
        (1..=self.checkpoint.spec().layers.len()).rev().find(|l| HiddenStates::exists(&dir, *l)).unwrap_or(0)
    }

    /// The layer that recording resumes from so that all layers are there: without the states that enter it a layer cannot be recorded
    /// alone.
    pub fn resume_all(&self) -> usize {
        match self.resume_layer() {
            first if (0..first).all(|layer| self.recording.has_layer(layer)) => first,
            _ => 0,
        }
    }

    /// Records what is missing of all layers, and removes the hidden states. `progress` is told the layer and its tokens done.
    pub fn record_all(mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<Recording, RecordError> {
        let layers = self.checkpoint.spec().layers.len();
        if (0..layers).any(|layer| !self.recording.has_layer(layer)) {
            for layer in self.resume_all()..layers {
                self.record(layer, true, &mut |done| progress(layer, done))?;
            }
        }
        self.finish()
    }

    /// Removes the hidden states, when all layers are done.
    pub fn finish(self) -> Result<Recording, RecordError> {
        self.checkpoint.check_unchanged()?;
        states::remove_dir(&self.recording.dir().join("states"))?;
        Ok(self.recording)
    }

    fn embeddings(&self, dir: &Path) -> Result<HiddenStates, RecordError> {
        let spec = self.checkpoint.spec();
        let outer = OuterWeights::load(spec, &mut CheckpointTensors::new(self.checkpoint))?;
        let tokens = self.recording.tokens();
        let mut states = HiddenStates::create(dir, 0, tokens.len(), spec.hidden_size)?;
        let mut runner = LayerRunner::new(spec, &self.threads, self.longest)?;
        runner.embed(&outer, tokens, self.recording.sequences(), &mut states)?;
        states.publish()?;
        Ok(HiddenStates::open(dir, 0, tokens.len(), spec.hidden_size)?)
    }
}

/// Collects what goes through one layer's FFN for one sequence.
struct LayerObserver {
    writer: Option<LayerWriter>,
    input: Vec<f32>,
    activations: Vec<f32>,
    ffn: usize,
    /// Magnitudes up to this are no activity.
    threshold: f32,
    tokens: usize,
}

impl LayerObserver {
    fn flush(&mut self) -> Result<(), RecordingError> {
        let activations = &self.activations[..self.tokens * self.ffn];
        match &mut self.writer {
            Some(writer) => writer.write(&self.input, activations, None),
            None => Ok(()),
        }
    }
}

impl FfnHook for LayerObserver {
    fn input(&mut self, _layer: usize, tokens: usize, input: &[f32]) -> Result<(), RuntimeError> {
        self.input.clear();
        self.input.extend_from_slice(input);
        self.tokens = tokens;
        Ok(())
    }

    fn activations(&mut self, piece: &mut Activations<'_>) -> Result<(), RuntimeError> {
        let Activations { first, count, ref values, .. } = *piece;
        for (token, row) in values.chunks_exact(count).enumerate() {
            let kept = &mut self.activations[token * self.ffn + first..][..count];
            for (kept, value) in kept.iter_mut().zip(row) {
                *kept = if value.abs() <= self.threshold { 0.0 } else { *value };
            }
        }
        Ok(())
    }
}
