//! Pushing sequences through one layer at a time: what recording and evaluation share.

use std::ops::Range;

use flashlm::buffers::Buffers;
use flashlm::engine::check_context;
use flashlm::error::RuntimeError;
use flashlm::forward::attention::{Batch, TokenPlace};
use flashlm::forward::block::{BlockScratch, Pass};
use flashlm::forward::embed::{EmbedScratch, Embedding};
use flashlm::forward::kv::{KvDtype, KvMemory, SequencePlaces};
use flashlm::forward::positions::PositionTables;
use flashlm::forward::weights::{LayerWeights, OuterWeights};
use flashlm::neurons::hook::FfnHook;
use flashlm::neurons::source::{Arithmetic, FfnSource};
use flashlm_formats::model::ModelSpec;
use flashlm_kernels::Threads;

use crate::states::{HiddenStates, StatesError};

/// Everything but weights that a layer needs, for sequences up to a length.
pub(crate) struct LayerRunner<'a> {
    spec: &'a ModelSpec,
    threads: &'a Threads,
    positions: PositionTables,
    kv: KvMemory,
    /// Of the only sequence.
    places: [SequencePlaces; 1],
    tokens: Vec<TokenPlace>,
    scratch: BlockScratch,
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
    pub(crate) fn new(spec: &'a ModelSpec, threads: &'a Threads, longest: usize) -> Result<Self, PassError> {
        check_context(spec, longest)?;
        Ok(Self {
            spec,
            threads,
            positions: PositionTables::new(&mut Buffers::default(), spec, longest),
            kv: KvMemory::new(spec.attention(), 1, longest, KvDtype::F32)?,
            places: [SequencePlaces::new(std::iter::once(0..longest))],
            tokens: (0..longest).map(|position| TokenPlace { sequence: 0, position }).collect(),
            scratch: BlockScratch::new(&mut Buffers::default(), spec, longest, longest, 1),
            states: vec![0.0; longest * spec.hidden_size],
        })
    }

    /// The same with keys and values stored otherwise than exactly.
    pub(crate) fn with_kv(mut self, kv: KvDtype) -> Result<Self, PassError> {
        self.kv = KvMemory::new(self.spec.attention(), 1, self.kv.places(), kv)?;
        Ok(self)
    }

    /// Bytes that a runner for `longest` tokens takes.
    pub(crate) fn bytes(spec: &ModelSpec, longest: usize) -> u64 {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        BlockScratch::bytes(spec, longest, longest, 1, threads)
            + KvMemory::layer_bytes(spec.attention(), longest, KvDtype::F32) as u64
            + (longest * spec.hidden_size * 4) as u64
    }

    /// Embeds the sequences of `tokens` into `output`.
    pub(crate) fn embed(
        &mut self,
        outer: &OuterWeights,
        tokens: &[u32],
        sequences: impl Iterator<Item = Range<usize>>,
        output: &mut HiddenStates,
    ) -> Result<(), PassError> {
        let mut scratch = EmbedScratch::new(&mut Buffers::default(), self.spec);
        for sequence in sequences {
            let states = &mut self.states[..sequence.len() * self.spec.hidden_size];
            let embedding = Embedding { spec: self.spec, weights: outer, threads: self.threads };
            embedding.embed(&tokens[sequence.clone()], 0, states, &mut scratch);
            output.write(sequence.start, states)?;
        }
        Ok(())
    }

    /// Pushes one sequence through a layer; `ffn` has only this layer. The hook, if any, sees it as layer 0.
    pub(crate) fn run(
        &mut self,
        weights: &LayerWeights,
        ffn: &mut dyn FfnSource,
        sequence: Range<usize>,
        (input, output): (&HiddenStates, &mut HiddenStates),
        hook: Option<&mut dyn FfnHook>,
    ) -> Result<(), PassError> {
        let states = &mut self.states[..sequence.len() * self.spec.hidden_size];
        input.read(sequence.start, states)?;
        let batch = Batch {
            tokens: &self.tokens[..sequence.len()],
            sequences: &self.places,
            arithmetic: Arithmetic::of_piece(sequence.len()),
        };
        let mut pass = Pass {
            spec: self.spec,
            threads: self.threads,
            positions: &self.positions,
            batch: &batch,
            kv: &mut self.kv,
            ffn,
            scratch: &mut self.scratch,
            hook,
        };
        pass.run(weights, 0, states)?;
        Ok(output.write(sequence.start, states)?)
    }
}
