use std::ops::Range;
use std::path::Path;

use half::f16;
use safetensors::Dtype;

use super::tensor_file::TensorFile;
use super::{FORMAT_LAYER, RecordingError, RecordingInfo, check_format, check_id, check_version};

/// What is known of each neuron over the whole recording; every list has one entry per neuron.
#[derive(Clone, Debug, PartialEq)]
pub struct NeuronSummary {
    /// Tokens at which the neuron was active.
    pub active_count: Vec<u32>,
    /// Mean magnitude over these tokens, 0 for a neuron never active.
    pub magnitude_mean: Vec<f32>,
    /// Greatest magnitude.
    pub magnitude_max: Vec<f32>,
    /// Length of the neuron's down column: magnitude times this is the energy it adds to the output.
    pub down_norms: Vec<f32>,
}

/// One layer of a recording, checked. Activity and magnitudes are in memory, inputs are read when asked for.
#[derive(Debug)]
pub struct LayerRecording {
    file: TensorFile,
    tokens: usize,
    hidden: usize,
    ffn: usize,
    inputs_offset: u64,
    activity: Vec<u8>,
    magnitudes: Vec<f16>,
    /// Where each token's magnitudes begin, with their number after.
    starts: Vec<u64>,
    summary: NeuronSummary,
}

impl LayerRecording {
    pub(super) fn open(path: &Path, info: &RecordingInfo, layer: usize) -> Result<Self, RecordingError> {
        let mut file = TensorFile::open(path)?;
        check_format(path, file.metadata("format"), FORMAT_LAYER)?;
        check_version(path, file.metadata("version").and_then(|v| v.parse().ok()))?;
        check_id(path, file.metadata("recording"), &info.id)?;
        let found = file.metadata("layer").map(str::to_string);
        if found.as_deref() != Some(&layer.to_string()) {
            return Err(RecordingError::WrongLayer { path: path.to_path_buf(), expected: layer, found });
        }
        let (tokens, hidden, ffn) = (info.tokens as usize, info.model.hidden_size, info.model.ffn().size);
        let per_neuron = [ffn as u64];
        let summary = NeuronSummary {
            active_count: file.read_u32("active_count", &per_neuron)?,
            magnitude_mean: file.read_f32("magnitude_mean", &per_neuron)?,
            magnitude_max: file.read_f32("magnitude_max", &per_neuron)?,
            down_norms: file.read_f32("down_norms", &per_neuron)?,
        };
        let inputs_offset = file.find("inputs", Dtype::F16, &[info.tokens, hidden as u64])?;
        let activity = file.read_bytes("activity", Dtype::U8, &[info.tokens, ffn.div_ceil(8) as u64])?;
        let count = file.length_of("magnitudes")?;
        let bytes = file.read_bytes("magnitudes", Dtype::F16, &[count])?;
        let magnitudes: Vec<_> = bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect();
        let mut recording = LayerRecording {
            file,
            tokens,
            hidden,
            ffn,
            inputs_offset,
            activity,
            magnitudes,
            starts: Vec::with_capacity(tokens + 1),
            summary,
        };
        recording.validate()?;
        Ok(recording)
    }

    /// Holds activity, magnitudes and counts together, and finds where each token's magnitudes begin.
    fn validate(&mut self) -> Result<(), RecordingError> {
        let lie = |what, at, expected, found| {
            Err(RecordingError::Activity { path: self.file.path().to_path_buf(), what, at, expected, found })
        };
        let width = self.ffn.div_ceil(8);
        let beyond = if self.ffn.is_multiple_of(8) { 0 } else { !0u8 << (self.ffn % 8) };
        let mut counts = vec![0u32; self.ffn];
        let mut total = 0u64;
        for (token, row) in self.activity.chunks_exact(width).enumerate() {
            self.starts.push(total);
            if row[width - 1] & beyond != 0 {
                return lie("bits beyond the last neuron", token, 0, (row[width - 1] & beyond) as u64);
            }
            for neuron in set_bits(row) {
                counts[neuron] += 1;
                total += 1;
            }
        }
        self.starts.push(total);
        if total != self.magnitudes.len() as u64 {
            return lie("number of magnitudes", 0, total, self.magnitudes.len() as u64);
        }
        if let Some(at) = (0..self.ffn).find(|&n| counts[n] != self.summary.active_count[n]) {
            return lie("active_count", at, counts[at] as u64, self.summary.active_count[at] as u64);
        }
        if let Some(at) = self.magnitudes.iter().position(|m| !m.is_finite() || m.to_f32() < 0.0) {
            let value = self.magnitudes[at].to_f32();
            let path = self.file.path().to_path_buf();
            return Err(RecordingError::NotFinite { path, what: "magnitudes", at, value });
        }
        Ok(())
    }

    /// Recorded tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Width of an input.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Neurons of the layer.
    pub fn ffn(&self) -> usize {
        self.ffn
    }

    /// What is known of each neuron over the whole recording.
    pub fn summary(&self) -> &NeuronSummary {
        &self.summary
    }

    /// Share of active neurons over all tokens.
    pub fn active_fraction(&self) -> f64 {
        self.magnitudes.len() as f64 / (self.tokens as f64 * self.ffn as f64)
    }

    /// Reads the FFN inputs of `tokens` into `inputs`, `[tokens.len(), hidden]`.
    ///
    /// # Panics
    /// When the range lies outside the recording or `inputs` has another length.
    pub fn read_inputs(&mut self, tokens: Range<usize>, inputs: &mut [f16]) -> Result<(), RecordingError> {
        assert!(tokens.start <= tokens.end && tokens.end <= self.tokens, "tokens {tokens:?} of {}", self.tokens);
        assert_eq!(inputs.len(), tokens.len() * self.hidden, "length of the buffer for inputs");
        let offset = self.inputs_offset + (tokens.start * self.hidden * 2) as u64;
        self.file.read_at(offset, bytemuck::cast_slice_mut(inputs))?;
        if cfg!(target_endian = "big") {
            inputs.iter_mut().for_each(|v| *v = f16::from_bits(u16::from_le(v.to_bits())));
        }
        if let Some(at) = inputs.iter().position(|v| !v.is_finite()) {
            let (path, value) = (self.file.path().to_path_buf(), inputs[at].to_f32());
            return Err(RecordingError::NotFinite { path, what: "inputs", at: tokens.start * self.hidden + at, value });
        }
        Ok(())
    }

    /// Packed activity of a token: bit `j` of byte `b` is neuron `8 b + j`; bits beyond the last neuron are zero.
    pub fn activity(&self, token: usize) -> &[u8] {
        let width = self.ffn.div_ceil(8);
        &self.activity[token * width..(token + 1) * width]
    }

    /// The active neurons of a token, ascending.
    pub fn active(&self, token: usize) -> impl Iterator<Item = usize> + '_ {
        set_bits(self.activity(token))
    }

    /// The magnitudes of a token's active neurons, in the order of [`LayerRecording::active`].
    pub fn magnitudes(&self, token: usize) -> &[f16] {
        &self.magnitudes[self.starts[token] as usize..self.starts[token + 1] as usize]
    }
}

/// Positions of the set bits, lowest bit of the first byte first.
fn set_bits(bytes: &[u8]) -> impl Iterator<Item = usize> + '_ {
    bytes.iter().enumerate().filter(|(_, b)| **b != 0).flat_map(|(at, &byte)| {
        let mut rest = byte;
        std::iter::from_fn(move || {
            (rest != 0).then(|| {
                let bit = rest.trailing_zeros() as usize;
                rest &= rest - 1;
                8 * at + bit
            })
        })
    })
}
