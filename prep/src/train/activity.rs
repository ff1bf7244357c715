//! A layer's recording as a linfa dataset.

use flashlm_formats::recording::{LayerRecording, Recording, RecordingError};
use half::f16;
use half::slice::HalfFloatSliceExt;
use linfa::dataset::{DatasetBase, Records};

/// What a layer saw: `[tokens, hidden]`, kept in half precision as recorded.
#[derive(Clone, Debug)]
pub struct Inputs {
    values: Vec<f16>,
    hidden: usize,
}

impl Inputs {
    /// From a row-major `[tokens, hidden]` matrix.
    ///
    /// # Panics
    /// If the length is no multiple of `hidden`.
    pub fn new(values: Vec<f16>, hidden: usize) -> Self {
        assert!(hidden > 0 && values.len().is_multiple_of(hidden), "{} values, hidden {hidden}", values.len());
        Inputs { values, hidden }
    }

    /// Copies rows into `out`, `[tokens.len(), hidden]`.
    pub(crate) fn gather(&self, tokens: &[u32], out: &mut Vec<f32>) {
        out.resize(tokens.len() * self.hidden, 0.0);
        for (row, &token) in out.chunks_exact_mut(self.hidden).zip(tokens) {
            self.values[token as usize * self.hidden..][..self.hidden].convert_to_f32_slice(row);
        }
    }
}

impl Records for Inputs {
    type Elem = f16;

    fn nsamples(&self) -> usize {
        self.values.len() / self.hidden
    }

    fn nfeatures(&self) -> usize {
        self.hidden
    }
}

/// Which neurons fired at each token and with what energy, and which tokens are held out.
#[derive(Clone, Debug)]
pub struct Activity {
    ffn: usize,
    starts: Vec<usize>,
    neurons: Vec<u32>,
    energies: Vec<f32>,
    held_out: Vec<bool>,
}

impl Activity {
    /// From a recorded layer; `held_out` says it of each token.
    pub fn from_layer(layer: &LayerRecording, held_out: &[bool]) -> Self {
        let norms = &layer.summary().down_norms;
        let mut activity = Activity::empty(layer.ffn());
        for token in 0..layer.tokens() {
            let strong = layer.active(token).zip(layer.magnitudes(token));
            activity.push(strong.map(|(n, m)| (n as u32, m.to_f32() * norms[n])), held_out[token]);
        }
        activity
    }

    /// Nothing yet, of a layer with `ffn` neurons.
    pub fn empty(ffn: usize) -> Self {
        Activity { ffn, starts: vec![0], neurons: Vec::new(), energies: Vec::new(), held_out: Vec::new() }
    }

    /// Adds a token: its active neurons, ascending, each with its energy; one that is held out is never trained on.
    pub fn push(&mut self, active: impl Iterator<Item = (u32, f32)>, held_out: bool) {
        for (neuron, energy) in active {
            self.neurons.push(neuron);
            self.energies.push(energy);
        }
        self.starts.push(self.neurons.len());
        self.held_out.push(held_out);
    }

    /// Recorded tokens.
    pub fn tokens(&self) -> usize {
        self.held_out.len()
    }

    /// Neurons of the layer.
    pub fn ffn(&self) -> usize {
        self.ffn
    }

    /// The tokens that are held out, or the others; ascending.
    pub fn part(&self, held_out: bool) -> Vec<u32> {
        (0..self.tokens() as u32).filter(|&token| self.held_out[token as usize] == held_out).collect()
    }

    /// The neurons that fire at a token that is not held out, ascending; the first one where none does, as matrices without rows are
    /// no matrices to any reader of the files.
    pub(crate) fn fire(&self) -> Vec<u32> {
        let mut fires = vec![false; self.ffn];
        for token in self.part(false) {
            self.of(token as usize).0.iter().for_each(|&n| fires[n as usize] = true);
        }
        let firing: Vec<u32> = (0..self.ffn as u32).filter(|&n| fires[n as usize]).collect();
        if firing.is_empty() { vec![0] } else { firing }
    }

    /// Active neurons of a token, ascending, and their energies.
    pub fn of(&self, token: usize) -> (&[u32], &[f32]) {
        let range = self.starts[token]..self.starts[token + 1];
        (&self.neurons[range.clone()], &self.energies[range])
    }

    /// The part of a token's active neurons with numbers in `first..end`.
    pub(crate) fn neurons_of(&self, token: usize, first: usize, end: usize) -> (&[u32], &[f32]) {
        let (neurons, energies) = self.of(token);
        let from = neurons.partition_point(|&n| (n as usize) < first);
        let to = from + neurons[from..].partition_point(|&n| (n as usize) < end);
        (&neurons[from..to], &energies[from..to])
    }

    /// Active (token, neuron) pairs among `tokens`, and their whole energy.
    pub(crate) fn totals(&self, tokens: &[u32]) -> (u64, f64) {
        let (mut count, mut energy) = (0, 0.0);
        for &token in tokens {
            let (neurons, energies) = self.of(token as usize);
            count += neurons.len() as u64;
            energy += energies.iter().map(|&e| e as f64).sum::<f64>();
        }
        (count, energy)
    }
}

/// A layer's inputs with some layer's activity: what a predictor is fitted on.
pub type TrainingSet = DatasetBase<Inputs, Activity>;

/// Inputs of layer `from` with the activity of layer `to`: the same layer for a predictor, the next for a look-ahead.
pub fn training_set(recording: &Recording, from: usize, to: usize) -> Result<TrainingSet, RecordingError> {
    let mut source = recording.layer(from)?;
    let mut values = vec![f16::ZERO; source.tokens() * source.hidden()];
    source.read_inputs(0..source.tokens(), &mut values)?;
    let inputs = Inputs::new(values, source.hidden());
    let target = if from == to { source } else { recording.layer(to)? };
    Ok(DatasetBase::new(inputs, Activity::from_layer(&target, &recording.split().flags(recording.tokens().len()))))
}

/// Leaves at most `most` of the tokens, evenly chosen.
pub(crate) fn thin(tokens: &mut Vec<u32>, most: usize) {
    let count = tokens.len();
    if count > most {
        *tokens = (0..most).map(|i| tokens[(i as u64 * count as u64 / most as u64) as usize]).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_is_even() {
        let mut tokens: Vec<u32> = (0..10).collect();
        thin(&mut tokens, 4);
        assert_eq!(tokens, [0, 2, 5, 7]);
        thin(&mut tokens, 9);
        assert_eq!(tokens.len(), 4);
    }

    #[test]
    fn parts_of_a_token() {
        let mut activity = Activity::empty(10);
        activity.push([(1, 0.5), (4, 1.0), (9, 2.0)].into_iter(), false);
        activity.push(std::iter::empty(), true);
        assert_eq!(activity.neurons_of(0, 1, 9), (&[1, 4][..], &[0.5, 1.0][..]));
        assert_eq!(activity.neurons_of(0, 5, 10).0, [9]);
        assert_eq!(activity.totals(&[0]), (3, 3.5));
        activity.push([(0, 1.0)].into_iter(), true);
        assert_eq!(activity.fire(), [1, 4, 9]);
        assert_eq!((activity.part(false), activity.part(true)), (vec![0], vec![1, 2]));
    }
}
