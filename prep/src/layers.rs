//! Pushing sequences through one layer at a time: what recording and evaluation share.

use std::ops::Range;

use flashlm_formats::model::ModelSpec;
use flashlm_kernels::Threads;
use flashlm_runtime::error::RuntimeError;
use flashlm_runtime::model::ffn::{FfnObserver, FfnSource};
use flashlm_runtime::model::forward::{EmbedScratch, embed};
use flashlm_runtime::model::kv_cache::{KvCache, KvDtype};
use flashlm_runtime::model::layer::{LayerScratch, Pass};
use flashlm_runtime::model::positions::PositionTables;
use flashlm_runtime::model::weights::{LayerWeights, OuterWeights};

use crate::states::{HiddenStates, StatesError};

/// Everything but weights that a layer needs, for sequences up to a length.
pub struct LayerRunner<'a> {
    spec: &'a ModelSpec,
    threads: &'a Threads,
    positions: PositionTables,
    cache: KvCache,
    scratch: LayerScratch,
    states: Vec<f32>,
}

/// An error of a pass.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The forward pass.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The hidden states.
    #[error(transparent)]
    States(#[from] StatesError),
}

impl<'a> LayerRunner<'a> {
    /// A runner for sequences of at most `longest` tokens.
    pub fn new(spec: &'a ModelSpec, threads: &'a Threads, longest: usize) -> Result<Self, PassError> {
        Ok(Self {
            spec,
            threads,
            positions: PositionTables::new(spec, longest),
            cache: KvCache::new(spec, 1, longest, KvDtype::F32)?,
            scratch: LayerScratch::new(spec, longest, longest),
            states: vec![0.0; longest * spec.hidden_size],
        })
    }

    /// Bytes that a runner for `longest` tokens takes.
    pub fn bytes(spec: &ModelSpec, longest: usize) -> u64 {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        LayerScratch::bytes(spec, longest, longest, threads)
            + KvCache::layer_bytes(spec, longest, KvDtype::F32) as u64
            + (longest * spec.hidden_size * 4) as u64
    }

    /// Embeds the sequences of `tokens` into `output`.
    pub fn embed(
        &mut self,
        outer: &OuterWeights,
        tokens: &[u32],
        sequences: impl Iterator<Item = Range<usize>>,
        output: &mut HiddenStates,
    ) -> Result<(), PassError> {
        let mut scratch = EmbedScratch::new(self.spec);
        for sequence in sequences {
            let states = &mut self.states[..sequence.len() * self.spec.hidden_size];
            embed(self.spec, outer, self.threads, &tokens[sequence.clone()], 0, states, &mut scratch);
            output.write(sequence.start, states)?;
        }
        Ok(())
    }

    /// Pushes one sequence through a layer; `ffn` has only this layer. The observer, if any, sees it as layer 0.
    pub fn run(
        &mut self,
        weights: &LayerWeights,
        ffn: &mut dyn FfnSource,
        sequence: Range<usize>,
        (input, output): (&HiddenStates, &mut HiddenStates),
        observer: Option<&mut dyn FfnObserver>,
    ) -> Result<(), PassError> {
        let states = &mut self.states[..sequence.len() * self.spec.hidden_size];
        input.read(sequence.start, states)?;
        let mut pass = Pass {
            spec: self.spec,
            threads: self.threads,
            positions: &self.positions,
            cache: &mut self.cache,
            ffn,
            scratch: &mut self.scratch,
            observer: observer.map(|o| o as &mut dyn FfnObserver),
        };
        pass.run(weights, 0, 0, states)?;
        Ok(output.write(sequence.start, states)?)
    }
}
