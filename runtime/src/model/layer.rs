//! One transformer block, for a piece of one sequence.

use flashlm_formats::model::{Block, ModelSpec, NormKind};
use flashlm_kernels::{Threads, layer_norm, matvec_beside, rms_norm};

use super::attention::{AttentionCall, AttentionScratch, attend};
use super::ffn::{FfnBiases, FfnCall, FfnObserver, FfnScratch, FfnSource, product};
use super::kv_cache::KvCache;
use super::positions::PositionTables;
use super::weights::{LayerWeights, Linear, NormWeights};
use crate::error::Result;

/// Intermediate values of a block, for up to a fixed number of tokens.
pub struct LayerScratch {
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

impl LayerScratch {
    /// Scratch for pieces of up to `tokens` tokens in a context of `context`.
    pub fn new(spec: &ModelSpec, tokens: usize, context: usize) -> Self {
        let zeros = |width: usize| vec![0.0; tokens * width];
        Self {
            attention_input: zeros(spec.hidden_size),
            ffn_input: zeros(spec.hidden_size),
            qkv: zeros(spec.attention.qkv_size()),
            attended: zeros(spec.attention.heads * spec.attention.head_dim),
            delta: zeros(spec.hidden_size),
            ffn_output: zeros(spec.hidden_size),
            attention: AttentionScratch::new(spec, tokens, context),
            ffn: FfnScratch::new(spec, tokens),
        }
    }

    /// Bytes of that scratch, with so many threads.
    pub fn bytes(spec: &ModelSpec, tokens: usize, context: usize, threads: usize) -> u64 {
        let shape = &spec.attention;
        let width = 4 * spec.hidden_size + shape.qkv_size() + shape.heads * shape.head_dim;
        (tokens * width * 4) as u64
            + AttentionScratch::bytes(spec, tokens, context)
            + FfnScratch::bytes(spec, tokens, threads)
    }
}

/// What a block needs besides its weights and states.
pub struct Pass<'a> {
    /// The architecture.
    pub spec: &'a ModelSpec,
    /// The threads to use.
    pub threads: &'a Threads,
    /// Rotary or ALiBi tables.
    pub positions: &'a PositionTables,
    /// Keys and values so far; `cache.len()` is the position of the first token.
    pub cache: &'a mut KvCache,
    /// Where neurons come from.
    pub ffn: &'a mut dyn FfnSource,
    /// Intermediate values.
    pub scratch: &'a mut LayerScratch,
    /// Who watches the FFN.
    pub observer: Option<&'a mut dyn FfnObserver>,
}

impl Pass<'_> {
    /// Runs block `layer` on `states` (`[tokens, hidden]`, changed in place); `cache_layer` is its place in the cache.
    pub fn run(&mut self, weights: &LayerWeights, layer: usize, cache_layer: usize, states: &mut [f32]) -> Result<()> {
        let spec = self.spec;
        let tokens = states.len() / spec.hidden_size;
        let decodes = tokens == 1 && self.observer.is_none();
        match spec.block {
            Block::PreNorm => {
                if decodes {
                    norm(spec, ffn_norm(weights), states, &mut self.scratch.ffn_input);
                    self.ffn.foresee(layer, &self.scratch.ffn_input[..states.len()], self.threads)?;
                }
                norm(spec, &weights.attention_norm, states, &mut self.scratch.attention_input);
                self.attention(weights, cache_layer, tokens)?;
                add(states, &self.scratch.delta);
                norm(spec, ffn_norm(weights), states, &mut self.scratch.ffn_input);
                self.feed_forward(weights, layer, tokens)?;
                add(states, &self.scratch.ffn_output);
            }
            Block::PostNorm => {
                if decodes {
                    norm(spec, &weights.attention_norm, states, &mut self.scratch.ffn_input);
                    self.ffn.foresee(layer, &self.scratch.ffn_input[..states.len()], self.threads)?;
                }
                self.scratch.attention_input[..states.len()].copy_from_slice(states);
                self.attention(weights, cache_layer, tokens)?;
                add(states, &self.scratch.delta);
                norm(spec, &weights.attention_norm, states, &mut self.scratch.ffn_input);
                states.copy_from_slice(&self.scratch.ffn_input[..states.len()]);
                self.feed_forward(weights, layer, tokens)?;
                add(states, &self.scratch.ffn_output);
                norm(spec, ffn_norm(weights), states, &mut self.scratch.delta);
                states.copy_from_slice(&self.scratch.delta[..states.len()]);
            }
            Block::ParallelOneNorm | Block::ParallelTwoNorms => {
                norm(spec, &weights.attention_norm, states, &mut self.scratch.attention_input);
                match &weights.ffn_norm {
                    Some(own) => norm(spec, own, states, &mut self.scratch.ffn_input),
                    None => self.scratch.ffn_input[..states.len()]
                        .copy_from_slice(&self.scratch.attention_input[..states.len()]),
                }
                if decodes {
                    self.ffn.prepare(layer, &self.scratch.ffn_input[..states.len()], self.threads)?;
                }
                self.attention(weights, cache_layer, tokens)?;
                self.feed_forward(weights, layer, tokens)?;
                add(states, &self.scratch.delta);
                add(states, &self.scratch.ffn_output);
            }
        }
        Ok(())
    }

    /// `attention_input` -> `delta`.
    fn attention(&mut self, weights: &LayerWeights, cache_layer: usize, tokens: usize) -> Result<()> {
        let (spec, source) = (self.spec, &mut *self.ffn);
        let LayerScratch { attention_input, qkv, attended, delta, attention, ffn, .. } = &mut *self.scratch;
        let qkv = &mut qkv[..tokens * spec.attention.qkv_size()];
        let input = &attention_input[..tokens * spec.hidden_size];
        linear(self.threads, &weights.qkv, input, tokens, qkv, ffn, source)?;
        let call = AttentionCall {
            spec,
            layer: cache_layer,
            qk_norm: weights.qk_norm.as_ref(),
            positions: self.positions,
            start: self.cache.len(),
            tokens,
        };
        let attended = &mut attended[..tokens * spec.attention.heads * spec.attention.head_dim];
        attend(&call, self.threads, qkv, self.cache, attention, attended);
        let delta = &mut delta[..tokens * spec.hidden_size];
        linear(self.threads, &weights.out, attended, tokens, delta, ffn, source)
    }

    /// `ffn_input` -> `ffn_output`.
    fn feed_forward(&mut self, weights: &LayerWeights, layer: usize, tokens: usize) -> Result<()> {
        let LayerScratch { ffn_input, ffn_output, ffn, .. } = &mut *self.scratch;
        let len = tokens * self.spec.hidden_size;
        let (input, output) = (&ffn_input[..len], &mut ffn_output[..len]);
        match &weights.down_bias {
            Some(bias) => output.chunks_exact_mut(bias.len()).for_each(|row| row.copy_from_slice(bias)),
            None => output.fill(0.0),
        }
        if let Some(observer) = &mut self.observer {
            observer.input(layer, tokens, input)?;
        }
        let observer = self.observer.as_mut().map(|o| &mut **o as &mut dyn FfnObserver);
        let biases = FfnBiases { gate: weights.gate_bias.as_deref(), up: weights.up_bias.as_deref() };
        let threads = self.threads;
        let (selection, cutoff) = (None, 0.0);
        let scales = weights.ffn_scales.as_ref().map_or(&[][..], |scales| scales.get());
        self.ffn.run(FfnCall {
            layer,
            tokens,
            input,
            output,
            biases,
            scales,
            threads,
            scratch: ffn,
            observer,
            selection,
            cutoff,
        })
    }
}

fn ffn_norm(weights: &LayerWeights) -> &NormWeights {
    weights.ffn_norm.as_ref().expect("the block kind has an FFN norm, so it was loaded")
}

/// `y = W x + bias`, while reads go on.
fn linear(
    threads: &Threads,
    w: &Linear,
    x: &[f32],
    tokens: usize,
    y: &mut [f32],
    scratch: &mut FfnScratch,
    source: &mut dyn FfnSource,
) -> Result<()> {
    let mut polled = Ok(());
    if tokens == 1 {
        let mut poll = || {
            if polled.is_ok() {
                polled = source.poll();
            }
        };
        matvec_beside(threads, w.weight.matrix(), x, y, &mut poll);
    } else {
        product(threads, w.weight.matrix(), x, tokens, y, scratch.matmul());
        polled = source.poll();
    }
    if let Some(bias) = &w.bias {
        y.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
    }
    polled
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
}

/// Normalises each row of `states` into `out`.
pub fn norm(spec: &ModelSpec, weights: &NormWeights, states: &[f32], out: &mut [f32]) {
    let (weight, bias) = (weights.weight.as_deref(), weights.bias.as_deref());
    for (row, out) in states.chunks_exact(spec.hidden_size).zip(out.chunks_exact_mut(spec.hidden_size)) {
        match spec.norm.kind {
            NormKind::LayerNorm => layer_norm(row, weight, bias, spec.norm.eps, out),
            NormKind::RmsNorm => rms_norm(row, weight, spec.norm.eps, out),
        }
    }
}
