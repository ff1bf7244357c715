//! Any source that has all neurons, with a predictor that chooses what is computed.
//!
//! Neurons that the predictor does not choose are taken for zero: to the bit what a run from flash computes, whether all neurons are
//! in memory, are read for every token, or come from a checkpoint whose bundle is measured.

use super::counters::ReadCounters;
use super::predictor::{Predictor, SCORED_TOGETHER};
use super::selection::Selection;
use super::source::{Arithmetic, FfnCall, FfnSource};
use crate::buffers::Buffers;
use crate::disk_cost::ReadCost;
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

    fn select(&mut self, layer: usize, call: &mut FfnCall<'_, '_>) {
        let Self { predictors, selection, neurons, scores, .. } = self;
        let tokens = call.inputs.tokens;
        match predictors {
            Some(predictors) => {
                selection.reset(tokens, *neurons);
                let room = (&mut scores[..], call.scratch.matmul());
                let predictor = &mut predictors[layer];
                predictor.score_each(call.threads, call.inputs, room, &mut |token, scores| {
                    selection.select_positive(token, scores);
                });
            }
            None => selection.select_all(tokens, *neurons),
        }
    }
}

/// Bytes that selecting takes for pieces of this many tokens.
pub fn selection_bytes(neurons: usize, tokens: usize) -> u64 {
    Buffers::bytes_of(|buffers| Selection::new(buffers, tokens, neurons))
}

/// Bytes that a [`PredictedFfn`] keeps beside its source and the predictors, for pieces of this many tokens.
pub fn bytes(neurons: usize, tokens: usize, batch: usize) -> u64 {
    selection_bytes(neurons, tokens) + Buffers::bytes_of(|buffers| scores(buffers, neurons, batch))
}

/// Room for the scores of `batch` tokens, and of some of a prompt.
fn scores(buffers: &mut Buffers, neurons: usize, batch: usize) -> Vec<f32> {
    buffers.zeros(batch.max(SCORED_TOGETHER) * neurons)
}

impl<S: FfnSource> FfnSource for PredictedFfn<S> {
    fn run(&mut self, mut call: FfnCall<'_, '_>) -> Result<()> {
        self.select(call.layer, &mut call);
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

    fn read_cost(&self) -> Option<ReadCost> {
        self.source.read_cost()
    }

    fn read_sizes(&self) -> Vec<(u64, u64)> {
        self.source.read_sizes()
    }

    fn read_counters(&self) -> ReadCounters {
        let (row_neurons, step_neurons) = (self.row_neurons, self.step_neurons);
        ReadCounters { row_neurons, step_neurons, ..self.source.read_counters() }
    }
}
