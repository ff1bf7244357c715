//! The neurons that were chosen for one token: the arithmetic, wherever their rows lie.
//!
//! Products are those of a matrix's rows, and sums run in the order of the list: what one list gives, its parts one after the
//! other give as well, and so does a matrix product over all neurons with the others taken for zero.

use std::ops::Range;

use flashlm_formats::model::Ffn;
use flashlm_kernels::{Element, Row, Threads, gathered_add, gathered_dots};

use super::ffn::{FfnBiases, activate};

/// Chosen neurons of a layer, and a token's input.
pub struct Chosen<'a> {
    /// What a neuron computes.
    pub ffn: &'a Ffn,
    /// How rows are stored.
    pub element: Element,
    /// The threads to use.
    pub threads: &'a Threads,
    /// Biases of all neurons of the layer.
    pub biases: FfnBiases<'a>,
    /// `[hidden]`.
    pub input: &'a [f32],
    /// Storage positions, ascending.
    pub neurons: &'a [u32],
    /// A row of a chosen neuron: its place in `neurons`, and which of its vectors.
    pub row: &'a (dyn Fn(usize, usize) -> Row<'a> + Sync),
}

impl Chosen<'_> {
    /// Computes what the neurons at the places in `ready` add to the sum, into `activations`, which has a value for each place.
    /// `ready` is shortened where a gate is shut; `results` is room for as many values.
    pub fn activations(&self, ready: &mut Vec<u32>, results: &mut [f32], activations: &mut [f32]) {
        let Self { ffn, biases, .. } = self;
        let put = |ready: &[u32], results: &[f32], activations: &mut [f32]| {
            ready.iter().zip(results).for_each(|(&at, result)| activations[at as usize] = *result);
        };
        if !ffn.gated {
            self.dots(ready, 0, biases.up, results);
            activate(ffn.activation, &mut results[..ready.len()]);
            put(ready, results, activations);
            return;
        }
        self.dots(ready, 0, biases.gate, results);
        activate(ffn.activation, &mut results[..ready.len()]);
        put(ready, results, activations);
        // Where the gate is shut the other factor does not matter.
        ready.retain(|&at| activations[at as usize] != 0.0);
        self.dots(ready, 1, biases.up, results);
        if ffn.up_activated {
            activate(ffn.activation, &mut results[..ready.len()]);
        }
        ready.iter().zip(results.iter()).for_each(|(&at, up)| activations[at as usize] *= up);
    }

    /// Adds the neurons at `places` whose activations are not zero to `output`; returns how many those are. `ready` and
    /// `results` are room.
    pub fn add_down(
        &self,
        places: Range<u32>,
        activations: &[f32],
        ready: &mut Vec<u32>,
        results: &mut [f32],
        output: &mut [f32],
    ) -> usize {
        ready.clear();
        ready.extend(places.filter(|at| activations[*at as usize] != 0.0));
        results.iter_mut().zip(ready.iter()).for_each(|(result, at)| *result = activations[*at as usize]);
        let vector = 1 + usize::from(self.ffn.gated);
        let row = |i: usize| (self.row)(ready[i] as usize, vector);
        gathered_add(self.threads, self.element, &row, &results[..ready.len()], output);
        ready.len()
    }

    fn dots(&self, ready: &[u32], vector: usize, bias: Option<&[f32]>, results: &mut [f32]) {
        let results = &mut results[..ready.len()];
        let row = |i: usize| (self.row)(ready[i] as usize, vector);
        gathered_dots(self.threads, self.element, &row, self.input, results);
        if let Some(bias) = bias {
            let biases = ready.iter().map(|&at| bias[self.neurons[at as usize] as usize]);
            results.iter_mut().zip(biases).for_each(|(result, bias)| *result += bias);
        }
    }
}
