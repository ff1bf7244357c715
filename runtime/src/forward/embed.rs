//! From token ids to the states that enter the first block.

use flashlm_formats::model::{LearnedPositions, ModelSpec};
use flashlm_kernels::{Threads, matvec};

use super::tables::TableSource;
use super::weights::OuterWeights;
use crate::buffers::Buffers;
use crate::error::Result;

/// Room for one token's embedding and position.
pub struct EmbedScratch {
    token: Vec<f32>,
    position: Vec<f32>,
}

impl EmbedScratch {
    /// Scratch for a model.
    pub fn new(buffers: &mut Buffers, spec: &ModelSpec) -> Self {
        Self { token: buffers.zeros(spec.embed_size), position: buffers.zeros(spec.hidden_size) }
    }
}

/// What gives the embeddings of a model.
pub struct Embedding<'a> {
    /// The architecture.
    pub spec: &'a ModelSpec,
    /// Its weights outside the blocks.
    pub weights: &'a OuterWeights,
    /// The threads to use.
    pub threads: &'a Threads,
}

impl Embedding<'_> {
    /// Token and position embeddings of `ids` from position `start` on, `[tokens, hidden]`. All rows are among the weights.
    pub fn embed(&self, ids: &[u32], start: usize, states: &mut [f32], scratch: &mut EmbedScratch) {
        for (at, (&id, state)) in ids.iter().zip(states.chunks_exact_mut(self.spec.hidden_size)).enumerate() {
            self.token(id, start + at, state, scratch, None).expect("nothing is read");
        }
    }

    /// The embedding of one token at a position, `[hidden]`.
    pub(crate) fn token(
        &self,
        id: u32,
        position: usize,
        state: &mut [f32],
        scratch: &mut EmbedScratch,
        tables: Option<&mut (dyn TableSource + '_)>,
    ) -> Result<()> {
        let (weights, tokens) = (self.weights, self.weights.tokens.matrix());
        let look_up = |to: &mut [f32]| match tables {
            Some(tables) if id as usize >= tokens.rows() => tables.embedding(id, to),
            _ => {
                flashlm_kernels::to_f32(tokens.element(), tokens.row(id as usize), to);
                Ok(())
            }
        };
        match &weights.project_in {
            Some(project) => {
                look_up(&mut scratch.token)?;
                matvec(self.threads, project.matrix(), &scratch.token, state);
            }
            None => look_up(state)?,
        }
        if let (Some(table), Some(LearnedPositions { offset })) = (&weights.positions, self.spec.learned_positions) {
            let table = table.matrix();
            flashlm_kernels::to_f32(table.element(), table.row(position + offset), &mut scratch.position);
            state.iter_mut().zip(&scratch.position).for_each(|(s, p)| *s += p);
        }
        Ok(())
    }
}
