//! Hooks that observe what goes through an FFN and may change it: recording, measuring, leaving out weak neurons; and observe what goes
//! into attention's projections.

use super::selection::Selection;
use crate::error::Result;

/// Sees every activation of every neuron. With a hook every neuron is computed, whatever is selected.
pub trait FfnHook {
    /// What goes into the projections of attention of the same tokens: into those of queries, keys and values, and into that of the
    /// output. Comes before the FFN's input.
    fn attention(&mut self, _layer: usize, _input: &[f32], _attended: &[f32]) -> Result<()> {
        Ok(())
    }

    /// The FFN's input, `[tokens, hidden]`.
    fn input(&mut self, layer: usize, tokens: usize, input: &[f32]) -> Result<()>;

    /// Activations of some neurons, before unselected ones are taken for zero. What is changed here is what enters the sum.
    fn activations(&mut self, piece: &mut Activations<'_>) -> Result<()>;
}

/// Activations of some neurons.
pub struct Activations<'a> {
    /// Which block.
    pub layer: usize,
    /// The first neuron.
    pub first: usize,
    /// How many neurons.
    pub count: usize,
    /// `[tokens, count]`, as they enter the down projection's sum.
    pub values: &'a mut [f32],
    /// What will be computed, when a predictor chooses.
    pub selection: Option<&'a Selection>,
}

/// Takes activations of a magnitude up to `cutoff` for zero, behind the back of whoever else watches: for measuring what leaving them
/// out costs.
pub struct Cutoff<'a, 'h> {
    /// Of this magnitude and below.
    pub cutoff: f32,
    /// Who sees them as they were.
    pub watcher: Option<&'a mut (dyn FfnHook + 'h)>,
}

impl FfnHook for Cutoff<'_, '_> {
    fn attention(&mut self, layer: usize, input: &[f32], attended: &[f32]) -> Result<()> {
        self.watcher.as_mut().map_or(Ok(()), |watcher| watcher.attention(layer, input, attended))
    }

    fn input(&mut self, layer: usize, tokens: usize, input: &[f32]) -> Result<()> {
        self.watcher.as_mut().map_or(Ok(()), |watcher| watcher.input(layer, tokens, input))
    }

    fn activations(&mut self, piece: &mut Activations<'_>) -> Result<()> {
        if let Some(watcher) = &mut self.watcher {
            watcher.activations(piece)?;
        }
        piece.values.iter_mut().filter(|a| a.abs() <= self.cutoff).for_each(|a| *a = 0.0);
        Ok(())
    }
}
