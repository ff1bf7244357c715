//! A layer's recording as a linfa dataset.

use flashlm_formats::recording::{LayerRecording, Recording, RecordingError};
use half::f16;
use half::slice::HalfFloatSliceExt;
use linfa::dataset::{DatasetBase, Records};

use super::random::Random;

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

/// Which neurons fired at each token and with what energy, and which document each token is from.
#[derive(Clone, Debug)]
pub struct Activity {
    ffn: usize,
    starts: Vec<usize>,
    neurons: Vec<u32>,
    energies: Vec<f32>,
    documents: Vec<u32>,
}

impl Activity {
    /// From a recorded layer. `documents` has one entry per token.
    pub fn from_layer(layer: &LayerRecording, documents: &[u32]) -> Self {
        let norms = &layer.summary().down_norms;
        let mut activity = Activity::empty(layer.ffn());
        for token in 0..layer.tokens() {
            let strong = layer.active(token).zip(layer.magnitudes(token));
            activity.push(strong.map(|(n, m)| (n as u32, m.to_f32() * norms[n])), documents[token]);
        }
        activity
    }

    /// Nothing yet, of a layer with `ffn` neurons.
    pub fn empty(ffn: usize) -> Self {
        Activity { ffn, starts: vec![0], neurons: Vec::new(), energies: Vec::new(), documents: Vec::new() }
    }

    /// Adds a token: its active neurons, ascending, each with its energy.
    pub fn push(&mut self, active: impl Iterator<Item = (u32, f32)>, document: u32) {
        for (neuron, energy) in active {
            self.neurons.push(neuron);
            self.energies.push(energy);
        }
        self.starts.push(self.neurons.len());
        self.documents.push(document);
    }

    /// Recorded tokens.
    pub fn tokens(&self) -> usize {
        self.documents.len()
    }

    /// Neurons of the layer.
    pub fn ffn(&self) -> usize {
        self.ffn
    }

    /// Document of each token.
    pub fn documents(&self) -> &[u32] {
        &self.documents
    }

    /// Active neurons of a token, ascending, and their energies.
    pub fn of(&self, token: usize) -> (&[u32], &[f32]) {
        let range = self.starts[token]..self.starts[token + 1];
        (&self.neurons[range.clone()], &self.energies[range])
    }

    /// The part of a token's active neurons with numbers in `first..end`.
    pub(crate) fn part(&self, token: usize, first: usize, end: usize) -> (&[u32], &[f32]) {
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
    Ok(DatasetBase::new(inputs, Activity::from_layer(&target, recording.documents())))
}

/// Tokens to train on and tokens held out: whole documents, chosen by a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Tokens for fitting, ascending.
    pub train: Vec<u32>,
    /// Tokens for early stopping and calibration, ascending.
    pub held_out: Vec<u32>,
}

impl Split {
    /// Holds out documents in a seeded random order until they make up `share` of the tokens.
    ///
    /// With a single document nothing can be held apart: then its last part is held out.
    pub fn by_document(documents: &[u32], share: f64, seed: u64) -> Self {
        let total = documents.len();
        let wanted = ((total as f64 * share).round() as usize).clamp(1.min(total), total);
        let mut spans: Vec<std::ops::Range<usize>> = Vec::new();
        for (at, &document) in documents.iter().enumerate() {
            match spans.last_mut() {
                Some(span) if documents[span.start] == document => span.end = at + 1,
                _ => spans.push(at..at + 1),
            }
        }
        let mut held = vec![false; total];
        if spans.len() < 2 {
            held[total - wanted..].fill(true);
        } else {
            let mut order: Vec<_> = (0..spans.len()).collect();
            Random::new(seed).shuffle(&mut order);
            let mut count = 0;
            // At least one document is left to train on.
            for &i in &order[1..] {
                if count >= wanted {
                    break;
                }
                held[spans[i].clone()].fill(true);
                count += spans[i].len();
            }
        }
        let pick = |wanted: bool| (0..total as u32).filter(|&t| held[t as usize] == wanted).collect();
        Split { train: pick(false), held_out: pick(true) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_held_out_whole() {
        let documents: Vec<u32> = (0..100).map(|t| t / 7).collect();
        let split = Split::by_document(&documents, 0.2, 3);
        assert!((20..27).contains(&split.held_out.len()), "{}", split.held_out.len());
        assert_eq!(split.train.len() + split.held_out.len(), 100);
        for t in &split.train {
            assert!(split.held_out.iter().all(|h| documents[*h as usize] != documents[*t as usize]));
        }
        assert_eq!(split, Split::by_document(&documents, 0.2, 3));
        assert_ne!(split, Split::by_document(&documents, 0.2, 4));
    }

    #[test]
    fn a_single_document_is_cut() {
        let split = Split::by_document(&[5; 10], 0.2, 0);
        assert_eq!(split.held_out, [8, 9]);
    }

    #[test]
    fn parts_of_a_token() {
        let mut activity = Activity::empty(10);
        activity.push([(1, 0.5), (4, 1.0), (9, 2.0)].into_iter(), 0);
        assert_eq!(activity.part(0, 1, 9), (&[1, 4][..], &[0.5, 1.0][..]));
        assert_eq!(activity.part(0, 5, 10).0, [9]);
        assert_eq!(activity.totals(&[0]), (3, 3.5));
    }
}
