//! Any source that has all neurons, with a predictor that chooses what is computed.
//!
//! Neurons that the predictor does not choose are taken for zero: to the bit what a run from flash computes, whether all neurons are
//! in memory, are read for every token, or come from a checkpoint whose bundle is measured.

use flashlm_kernels::Threads;

use crate::error::Result;
use crate::model::ffn::{FfnCall, FfnObserver, FfnSource, ReadCounters, Selection};
use crate::predictor::Predictor;

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

    fn select(&mut self, threads: &Threads, layer: usize, tokens: usize, input: &[f32]) {
        self.selection.reset(tokens, self.scores.len());
        match &mut self.predictors {
            Some(predictors) => {
                for (token, input) in input.chunks_exact(input.len() / tokens).enumerate() {
                    predictors[layer].scores(threads, input, &mut self.scores);
                    self.selection.select_positive(token, &self.scores);
                }
            }
            None => {
                self.scores.fill(1.0);
                (0..tokens).for_each(|token| self.selection.select_positive(token, &self.scores));
            }
        }
    }
}

impl<S: FfnSource> FfnSource for PredictedFfn<S> {
    fn run(&mut self, call: FfnCall<'_>) -> Result<()> {
        self.select(call.threads, call.layer, call.tokens, call.input);
        let FfnCall { layer, tokens, input, output, biases, scales, threads, scratch, observer, cutoff, .. } = call;
        // Taken apart, so that the observer is lent for this call only.
        let observer = observer.map(|o| o as &mut dyn FfnObserver);
        let selection = Some(&self.selection);
        self.source.run(FfnCall {
            layer,
            tokens,
            input,
            output,
            biases,
            scales,
            threads,
            scratch,
            observer,
            selection,
            cutoff,
        })
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
