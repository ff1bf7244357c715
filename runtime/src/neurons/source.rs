//! The boundary between the forward pass and the place where neurons are stored.

use flashlm_kernels::{MATMUL_TOKENS_MIN, Threads};

use super::counters::ReadCounters;
use super::hook::FfnHook;
use super::scratch::FfnScratch;
use super::selection::Selection;
use crate::disk_cost::ReadCost;
use crate::error::Result;

/// How the products of several tokens are computed. It decides their roundings, so it follows from what the tokens are, never from
/// what happens to be computed beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Each token as if it were alone.
    Each,
    /// All of them as one piece of a prompt, in matrix products.
    Piece,
}

impl Arithmetic {
    /// That of a piece of a prompt with this many tokens.
    pub fn of_piece(tokens: usize) -> Self {
        if tokens < MATMUL_TOKENS_MIN { Arithmetic::Each } else { Arithmetic::Piece }
    }
}

/// The inputs of some tokens.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `[tokens, hidden]`, normalised.
    pub values: &'a [f32],
    /// How many tokens.
    pub tokens: usize,
    /// How their products are computed.
    pub arithmetic: Arithmetic,
}

impl<'a> Inputs<'a> {
    /// Elements of a token's input.
    pub fn hidden(&self) -> usize {
        self.values.len() / self.tokens.max(1)
    }

    /// The input of one token.
    pub fn token(&self, token: usize) -> &'a [f32] {
        let hidden = self.hidden();
        &self.values[token * hidden..][..hidden]
    }
}

/// One FFN call.
pub struct FfnCall<'a, 'h> {
    /// Which block.
    pub layer: usize,
    /// What goes in.
    pub inputs: Inputs<'a>,
    /// `[tokens, hidden]`, added to.
    pub output: &'a mut [f32],
    /// What is computed; every neuron without it.
    pub selection: Option<&'a Selection>,
    /// The threads to use.
    pub threads: &'a Threads,
    /// Memory for activations.
    pub scratch: &'a mut FfnScratch,
    /// Who watches.
    pub hook: Option<&'a mut (dyn FfnHook + 'h)>,
}

/// Computes the FFN of a block of the model.
pub trait FfnSource: Send {
    /// Adds the FFN's output to `call.output`.
    fn run(&mut self, call: FfnCall<'_, '_>) -> Result<()>;

    /// Told the FFN inputs of a few tokens before their block's attention runs, where those are known: reads can begin.
    fn prepare(&mut self, _layer: usize, _inputs: Inputs<'_>, _threads: &Threads) -> Result<()> {
        Ok(())
    }

    /// Told, before attention runs, what the FFN inputs of a few tokens would be without it: about what they will be. Nothing is
    /// decided by it, but reads can begin.
    fn predict_ahead(&mut self, _layer: usize, _inputs: Inputs<'_>, _threads: &Threads) -> Result<()> {
        Ok(())
    }

    /// Called now and then while something else is computed, so that reads go on.
    fn poll(&mut self) -> Result<()> {
        Ok(())
    }

    /// How often the source asked for reads of each size, in bytes.
    fn read_sizes(&self) -> Vec<(u64, u64)> {
        Vec::new()
    }

    /// What reads are seen to cost, where plans follow that.
    fn read_cost(&self) -> Option<ReadCost> {
        None
    }

    /// Bytes and device requests read so far.
    fn read_counters(&self) -> ReadCounters {
        ReadCounters::default()
    }
}
