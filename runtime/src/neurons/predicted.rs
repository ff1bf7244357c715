//! Any source that has all neurons, with a predictor that chooses what is computed.
//!
//! Neurons that the predictor does not choose are taken for zero: to the bit what a run from flash computes, whether all neurons are
//! in memory, are read for every token, or come from a checkpoint whose bundle is measured.

use flashlm_kernels::Threads;

use super::counters::ReadCounters;
use super::predictor::Predictor;
use super::selection::Selection;
use super::source::{FfnCall, FfnSource, Inputs};
use crate::error::Result;

/// A source whose neurons a predictor chooses, token by token.
pub struct PredictedFfn<S> {
    source: S,
    /// One for each layer of `source`; `None` admits everything.
    predictors: Option<Vec<Predictor>>,
    selection: Selection,
    scores: Vec<f32>,
}

impl<S: FfnSource> PredictedFfn<S> {
    /// `predictors` has one entry for each layer of `source`, whose layers have `neurons` neurons; `None` admits everything.
    pub fn new(source: S, predictors: Option<Vec<Predictor>>, neurons: usize) -> Self {
        Self { source, predictors, selection: Selection::default(), scores: vec![0.0; neurons] }
    }

    fn select(&mut self, threads: &Threads, layer: usize, inputs: Inputs<'_>) {
        self.selection.reset(inputs.tokens, self.scores.len());
        for token in 0..inputs.tokens {
            match &mut self.predictors {
                Some(predictors) => predictors[layer].scores(threads, inputs.token(token), &mut self.scores),
                None => self.scores.fill(1.0),
            }
            self.selection.select_positive(token, &self.scores);
        }
    }
}

impl<S: FfnSource> FfnSource for PredictedFfn<S> {
    fn run(&mut self, call: FfnCall<'_, '_>) -> Result<()> {
        self.select(call.threads, call.layer, call.inputs);
        self.source.run(FfnCall { selection: Some(&self.selection), ..call })
    }

    fn poll(&mut self) -> Result<()> {
        self.source.poll()
    }

    fn read_sizes(&self) -> Vec<(u64, u64)> {
        self.source.read_sizes()
    }

    fn read_counters(&self) -> ReadCounters {
        self.source.read_counters()
    }
}
