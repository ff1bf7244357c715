//! One transformer block, for the tokens that go through it together.

use flashlm_formats::model::{Block, ModelSpec};
use flashlm_kernels::{MatmulScratch, Threads, matmul, matvec_beside, matvec_each};

use super::attention::{AttentionCall, AttentionScratch, Batch, attend};
use super::kv::KvMemory;
use super::positions::PositionTables;
use super::weights::{LayerWeights, Linear, NormWeights};
use crate::buffers::Buffers;
use crate::error::Result;
use crate::neurons::hook::FfnHook;
use crate::neurons::scratch::FfnScratch;
use crate::neurons::source::{Arithmetic, FfnCall, FfnSource, Inputs};

/// Intermediate values of a block, for up to a fixed number of tokens.
pub struct BlockScratch {
    attention_input: Vec<f32>,
    ffn_input: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    delta: Vec<f32>,
    ffn_output: Vec<f32>,
    attention: AttentionScratch,
    /// Activations and matrix products.
    pub ffn: FfnScratch,
}

impl BlockScratch {
    /// Scratch for up to `tokens` tokens in contexts of `context`; neurons are chosen for `batch` tokens at a time.
    pub fn new(buffers: &mut Buffers, spec: &ModelSpec, tokens: usize, context: usize, batch: usize) -> Self {
        let mut zeros = |width: usize| buffers.zeros(tokens * width);
        Self {
            attention_input: zeros(spec.hidden_size),
            ffn_input: zeros(spec.hidden_size),
            qkv: zeros(spec.attention().qkv_size()),
            attended: zeros(spec.attention().heads * spec.attention().head_dim),
            delta: zeros(spec.hidden_size),
            ffn_output: zeros(spec.hidden_size),
            attention: AttentionScratch::new(buffers, spec.attention(), tokens, context),
            ffn: FfnScratch::new(buffers, spec, tokens, batch),
        }
    }

    /// Bytes of that scratch, once products on this many threads have made it as large as it gets.
    pub fn bytes(spec: &ModelSpec, tokens: usize, context: usize, batch: usize, threads: usize) -> u64 {
        Buffers::bytes_of(|buffers| Self::new(buffers, spec, tokens, context, batch))
            + FfnScratch::products_bytes(spec, tokens, batch, threads)
    }
}

/// What a block needs besides its weights and states.
pub struct Pass<'a, 'h> {
    /// The architecture.
    pub spec: &'a ModelSpec,
    /// The threads to use.
    pub threads: &'a Threads,
    /// Rotary and ALiBi tables.
    pub positions: &'a PositionTables,
    /// Which tokens.
    pub batch: &'a Batch<'a>,
    /// Keys and values so far.
    pub kv: &'a mut KvMemory,
    /// Where neurons come from.
    pub ffn: &'a mut dyn FfnSource,
    /// Intermediate values.
    pub scratch: &'a mut BlockScratch,
    /// Who watches the FFN.
    pub hook: Option<&'a mut (dyn FfnHook + 'h)>,
}

impl Pass<'_, '_> {
    /// Runs block `layer` on `states` (`[tokens, hidden]`, changed in place).
    pub fn run(&mut self, weights: &LayerWeights, layer: usize, states: &mut [f32]) -> Result<()> {
        match weights.spec.block {
            Block::PreNorm => {
                self.predict_ahead(ffn_norm(weights), layer, states)?;
                weights.attention_norm.apply(states, &mut self.scratch.attention_input);
                self.attention(weights, layer)?;
                add(states, &self.scratch.delta);
                ffn_norm(weights).apply(states, &mut self.scratch.ffn_input);
                self.feed_forward(weights, layer)?;
                add(states, &self.scratch.ffn_output);
            }
            Block::PostNorm => {
                self.predict_ahead(&weights.attention_norm, layer, states)?;
                self.scratch.attention_input[..states.len()].copy_from_slice(states);
                self.attention(weights, layer)?;
                add(states, &self.scratch.delta);
                weights.attention_norm.apply(states, &mut self.scratch.ffn_input);
                states.copy_from_slice(&self.scratch.ffn_input[..states.len()]);
                self.feed_forward(weights, layer)?;
                add(states, &self.scratch.ffn_output);
                ffn_norm(weights).apply(states, &mut self.scratch.delta);
                states.copy_from_slice(&self.scratch.delta[..states.len()]);
            }
            Block::ParallelOneNorm | Block::ParallelTwoNorms => {
                weights.attention_norm.apply(states, &mut self.scratch.attention_input);
                match &weights.ffn_norm {
                    Some(own) => own.apply(states, &mut self.scratch.ffn_input),
                    None => self.scratch.ffn_input[..states.len()]
                        .copy_from_slice(&self.scratch.attention_input[..states.len()]),
                }
                if self.decodes() {
                    let inputs = inputs(self.batch, &self.scratch.ffn_input[..states.len()]);
                    self.ffn.prepare(layer, inputs, self.threads)?;
                }
                self.attention(weights, layer)?;
                self.feed_forward(weights, layer)?;
                add(states, &self.scratch.delta);
                add(states, &self.scratch.ffn_output);
            }
        }
        Ok(())
    }

    /// Whether neurons are chosen token by token, so that it is worthwhile to say early what they will be chosen for.
    fn decodes(&self) -> bool {
        self.batch.arithmetic == Arithmetic::Each && self.hook.is_none()
    }

    /// Tells the source what the FFN's input would be without attention.
    fn predict_ahead(&mut self, of: &NormWeights, layer: usize, states: &[f32]) -> Result<()> {
        if !self.decodes() {
            return Ok(());
        }
        of.apply(states, &mut self.scratch.ffn_input);
        let inputs = inputs(self.batch, &self.scratch.ffn_input[..states.len()]);
        self.ffn.predict_ahead(layer, inputs, self.threads)
    }

    /// `attention_input` -> `delta`.
    fn attention(&mut self, weights: &LayerWeights, layer: usize) -> Result<()> {
        let (hidden, shape, source) = (self.spec.hidden_size, &weights.spec.attention, &mut *self.ffn);
        let (tokens, arithmetic) = (self.batch.tokens.len(), self.batch.arithmetic);
        let BlockScratch { attention_input, qkv, attended, delta, attention, ffn, .. } = &mut *self.scratch;
        let mut polled = Ok(());
        let mut linear = Linears {
            threads: self.threads,
            of: (tokens, arithmetic),
            scratch: ffn.matmul(),
            beside: &mut || {
                if polled.is_ok() {
                    polled = source.poll();
                }
            },
        };
        let qkv = &mut qkv[..tokens * shape.qkv_size()];
        linear.apply(&weights.qkv, &attention_input[..tokens * hidden], qkv);
        let call = AttentionCall {
            shape,
            layer,
            qk_norm: weights.qk_norm.as_ref(),
            positions: self.positions.of(&weights.spec),
            batch: self.batch,
        };
        let attended = &mut attended[..tokens * shape.heads * shape.head_dim];
        attend(&call, self.threads, qkv, self.kv, attention, attended)?;
        if let Some(hook) = self.hook.as_deref_mut() {
            hook.attention(layer, &attention_input[..tokens * hidden], attended)?;
        }
        linear.apply(&weights.out, attended, &mut delta[..tokens * hidden]);
        polled
    }

    /// `ffn_input` -> `ffn_output`.
    fn feed_forward(&mut self, weights: &LayerWeights, layer: usize) -> Result<()> {
        let BlockScratch { ffn_input, ffn_output, ffn: scratch, .. } = &mut *self.scratch;
        let len = self.batch.tokens.len() * self.spec.hidden_size;
        let (input, output) = (&ffn_input[..len], &mut ffn_output[..len]);
        match &weights.down_bias {
            Some(bias) => output.chunks_exact_mut(bias.len()).for_each(|row| row.copy_from_slice(bias)),
            None => output.fill(0.0),
        }
        let mut hook = self.hook.as_deref_mut();
        if let Some(hook) = &mut hook {
            hook.input(layer, self.batch.tokens.len(), input)?;
        }
        let (inputs, threads) = (inputs(self.batch, input), self.threads);
        self.ffn.run(FfnCall { layer, inputs, output, selection: None, threads, scratch, hook })
    }
}

/// The FFN inputs of a batch.
fn inputs<'a>(batch: &Batch<'_>, values: &'a [f32]) -> Inputs<'a> {
    Inputs { values, tokens: batch.tokens.len(), arithmetic: batch.arithmetic }
}

fn ffn_norm(weights: &LayerWeights) -> &NormWeights {
    weights.ffn_norm.as_ref().expect("the block kind has an FFN norm, so it was loaded")
}

/// Projections of the tokens of a batch, while something else goes on.
struct Linears<'a> {
    threads: &'a Threads,
    of: (usize, Arithmetic),
    scratch: &'a mut MatmulScratch,
    /// Called now and then.
    beside: &'a mut dyn FnMut(),
}

impl Linears<'_> {
    /// `y = W x + bias`.
    fn apply(&mut self, w: &Linear, x: &[f32], y: &mut [f32]) {
        let (threads, matrix) = (self.threads, w.weight.matrix());
        match self.of {
            (1, _) => matvec_beside(threads, matrix, x, y, self.beside),
            (tokens, Arithmetic::Each) => matvec_each(threads, matrix, x, tokens, y, self.beside),
            (tokens, Arithmetic::Piece) => {
                matmul(threads, matrix, x, tokens, y, matrix.rows(), self.scratch);
                (self.beside)();
            }
        }
        if let Some(bias) = &w.bias {
            y.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
        }
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
}
