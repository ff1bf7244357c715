//! Any source that has all neurons, with a predictor that chooses what is computed.
//!
//! Neurons that the predictor does not choose are taken for zero: to the bit what a run from flash computes, whether all neurons are
//! in memory, are read for every token, or come from a checkpoint whose bundle is measured.

use flashlm_kernels::Threads;

use super::counters::ReadCounters;
use super::predictor::Predictor;
use super::selection::Selection;
use super::source::{Arithmetic, FfnCall, FfnSource, Inputs};
use crate::buffers::Buffers;
use crate::error::Result;

/// A source whose neurons a predictor chooses, token by token.
pub struct PredictedFfn<S> {
    source: S,
    /// One for each layer of `source`; `None` admits everything.
    predictors: Option<Vec<Predictor>>,
    selection: Selection,
    neurons: usize,
    /// `[batch, neurons]`.
    scores: Vec<f32>,
    /// As in [`ReadCounters`].
    row_neurons: u64,
    step_neurons: u64,
}

impl<S: FfnSource> PredictedFfn<S> {
    /// `predictors` has one entry for each layer of `source`, whose layers have `neurons` neurons; `None` admits everything. Predictors are
    /// asked for `batch` tokens at a time.
    pub fn new(source: S, predictors: Option<Vec<Predictor>>, neurons: usize, batch: usize) -> Self {
        let scores = scores(&mut Buffers::default(), neurons, batch);
        Self { source, predictors, selection: Selection::default(), neurons, scores, row_neurons: 0, step_neurons: 0 }
    }

    fn select(&mut self, threads: &Threads, layer: usize, inputs: Inputs<'_>) {
        let (hidden, neurons) = (inputs.hidden(), self.neurons);
        self.selection.reset(inputs.tokens, neurons);
        let batch = self.scores.len() / neurons;
        for first in (0..inputs.tokens).step_by(batch) {
            let count = batch.min(inputs.tokens - first);
            match &mut self.predictors {
                Some(predictors) => {
                    let values = &inputs.values[first * hidden..(first + count) * hidden];
                    predictors[layer].scores_of_each(threads, values, count, &mut self.scores);
                }
                None => self.scores.fill(1.0),
            }
            for (at, scores) in self.scores.chunks_exact(neurons).take(count).enumerate() {
                self.selection.select_positive(first + at, scores);
            }
        }
    }
}

/// Bytes that a [`PredictedFfn`] keeps beside its source and the predictors, for pieces of this many tokens.
pub fn bytes(neurons: usize, tokens: usize, batch: usize) -> u64 {
    Buffers::bytes_of(|buffers| (Selection::new(buffers, tokens, neurons), scores(buffers, neurons, batch)))
}

/// Room for the scores of `batch` tokens.
fn scores(buffers: &mut Buffers, neurons: usize, batch: usize) -> Vec<f32> {
    buffers.zeros(batch.max(1) * neurons)
}

impl<S: FfnSource> FfnSource for PredictedFfn<S> {
    fn run(&mut self, call: FfnCall<'_, '_>) -> Result<()> {
        self.select(call.threads, call.layer, call.inputs);
        if call.inputs.arithmetic == Arithmetic::Each {
            let (of_rows, of_step) = self.selection.counts();
            self.row_neurons += of_rows;
            self.step_neurons += of_step;
        }
        self.source.run(FfnCall { selection: Some(&self.selection), ..call })
    }

    fn poll(&mut self) -> Result<()> {
        self.source.poll()
    }

    fn read_sizes(&self) -> Vec<(u64, u64)> {
        self.source.read_sizes()
    }

    fn read_counters(&self) -> ReadCounters {
        let (row_neurons, step_neurons) = (self.row_neurons, self.step_neurons);
        ReadCounters { row_neurons, step_neurons, ..self.source.read_counters() }
    }
}
