//! The neurons that were chosen for a few tokens: the arithmetic, wherever their rows lie.
//!
//! Every token has its own choice; a neuron that several chose is looked up, read and kept in the processor's cache once. Products
//! are those of a matrix's rows, and each token's sums run over its own neurons in storage order: what one list gives, its parts one
//! after the other give as well, and so does a matrix product over all neurons with the others taken for zero. So a token's bits do
//! not depend on the tokens beside it.

use std::ops::Range;

use flashlm_formats::ids::Position;
use flashlm_formats::model::Ffn;
use flashlm_kernels::{
    Element, Row, TASK_BYTES, Threads, gathered_add, gathered_add_each, gathered_dots, gathered_dots_each,
};

use super::activation::activate;
use super::params::NeuronBiases;
use super::selection::Selection;
use crate::buffers::Buffers;

/// A neuron for a token: its place among the neurons of a [`Choice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    place: u32,
    token: u32,
}

/// What a few tokens chose: the neurons of all, and which is for which token.
pub struct Choice {
    /// Ascending, each once.
    pub neurons: Vec<Position>,
    /// By neuron, then by token.
    entries: Vec<Entry>,
    /// Where the entries of each neuron begin, and where those of the last end.
    first_entry: Vec<u32>,
    tokens: usize,
}

impl Choice {
    /// Takes what `selection` has of `tokens` within `neurons`; these become tokens 0, 1 and so on.
    pub fn take(&mut self, selection: &Selection, tokens: Range<usize>, neurons: Range<usize>) {
        let Self { neurons: union, entries, first_entry, tokens: count } = self;
        union.clear();
        entries.clear();
        first_entry.clear();
        *count = tokens.len();
        let first = tokens.start;
        selection.each(tokens, neurons, |neuron, token| {
            if union.last() != Some(&neuron) {
                union.push(neuron);
                first_entry.push(entries.len() as u32);
            }
            entries.push(Entry { place: union.len() as u32 - 1, token: (token - first) as u32 });
        });
        first_entry.push(entries.len() as u32);
    }

    /// The entries of the neurons at `places`.
    pub fn entries_of(&self, places: Range<usize>) -> Range<u32> {
        self.first_entry[places.start]..self.first_entry[places.end]
    }

    /// Pairs of a neuron and a token.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing was chosen.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The place among `neurons` of an entry.
    fn place(&self, entry: u32) -> usize {
        self.entries[entry as usize].place as usize
    }
}

/// Room for a choice, and for what is computed from it.
pub struct ChosenScratch {
    /// What was chosen.
    pub choice: Choice,
    /// What an entry adds to its token's sum.
    activations: Vec<f32>,
    /// Entries to compute now, and their results.
    pub ready: Vec<u32>,
    results: Vec<f32>,
}

impl ChosenScratch {
    /// Room for `entries` pairs of a neuron and a token, of at most `neurons` neurons.
    pub fn new(buffers: &mut Buffers, neurons: usize, entries: usize) -> Self {
        Self {
            choice: Choice {
                neurons: buffers.room(neurons),
                entries: buffers.room(entries),
                first_entry: buffers.room(neurons + 1),
                tokens: 0,
            },
            activations: buffers.zeros(entries),
            ready: buffers.room(entries),
            results: buffers.zeros(entries),
        }
    }
}

/// What computing the chosen neurons of a layer needs besides [`ChosenScratch`].
pub struct Chosen<'a> {
    /// What a neuron computes.
    pub ffn: &'a Ffn,
    /// How rows are stored.
    pub element: Element,
    /// The threads to use.
    pub threads: &'a Threads,
    /// Biases of all neurons of the layer.
    pub biases: NeuronBiases<'a>,
    /// `[tokens, hidden]`.
    pub input: &'a [f32],
    /// Elements of a row.
    pub hidden: usize,
    /// A row of a chosen neuron: its place in the choice, which neuron it is, and which of its vectors.
    pub row: &'a (dyn Fn(usize, Position, usize) -> Row<'a> + Sync),
}

impl Chosen<'_> {
    /// Computes what the entries in `scratch.ready` add to their tokens' sums, and keeps it. `ready` is used up.
    pub fn activations(&self, scratch: &mut ChosenScratch) {
        let Self { ffn, biases, .. } = self;
        let ChosenScratch { choice, activations, ready, results } = scratch;
        let put = |ready: &[u32], results: &[f32], activations: &mut [f32]| {
            ready.iter().zip(results).for_each(|(&entry, result)| activations[entry as usize] = *result);
        };
        self.by_token(choice, ready);
        if !ffn.gated {
            self.dots(choice, ready, 0, biases.up, results);
            activate(ffn.activation, &mut results[..ready.len()]);
            put(ready, results, activations);
            return;
        }
        self.dots(choice, ready, 0, biases.gate, results);
        activate(ffn.activation, &mut results[..ready.len()]);
        put(ready, results, activations);
        // Where the gate is zero the other factor does not matter.
        ready.retain(|&entry| activations[entry as usize] != 0.0);
        self.dots(choice, ready, 1, biases.up, results);
        if ffn.up_activated {
            activate(ffn.activation, &mut results[..ready.len()]);
        }
        ready.iter().zip(results.iter()).for_each(|(&entry, up)| activations[entry as usize] *= up);
    }

    /// Adds the entries whose activations are not zero to `output`, `[tokens, hidden]`; returns how many those are.
    pub fn add_down(&self, entries: Range<u32>, scratch: &mut ChosenScratch, output: &mut [f32]) -> usize {
        let ChosenScratch { choice, activations, ready, results } = scratch;
        ready.clear();
        ready.extend(entries.filter(|entry| activations[*entry as usize] != 0.0));
        self.by_token(choice, ready);
        results.iter_mut().zip(ready.iter()).for_each(|(result, entry)| *result = activations[*entry as usize]);
        let (ready, coefficients) = (&*ready, &results[..ready.len()]);
        let row = self.rows(choice, ready, 1 + usize::from(self.ffn.gated));
        if choice.tokens == 1 {
            gathered_add(self.threads, self.element, &row, coefficients, output);
        } else {
            let token = |i: usize| choice.entries[ready[i] as usize].token as usize;
            gathered_add_each(self.threads, self.element, &row, &token, coefficients, (output, self.hidden));
        }
        ready.len()
    }

    /// Orders entries, which are by neuron, so that those of a token stand together as far as rows stay in the processor's cache; of
    /// each token they stay in storage order.
    fn by_token(&self, choice: &Choice, ready: &mut [u32]) {
        const ENTRIES_MAX: usize = 256;
        const TOKENS_MAX: usize = 64;
        if choice.tokens == 1 {
            return;
        }
        let entries = (TASK_BYTES / self.element.row_bytes(self.hidden).max(1)).clamp(32, ENTRIES_MAX);
        let token = |entry: u32| choice.entries[entry as usize].token as usize;
        for part in ready.chunks_mut(entries) {
            let mut place = [0u16; TOKENS_MAX + 1];
            part.iter().for_each(|&entry| place[token(entry) + 1] += 1);
            (1..=choice.tokens).for_each(|token| place[token] += place[token - 1]);
            let mut ordered = [0; ENTRIES_MAX];
            for &entry in part.iter() {
                let place = &mut place[token(entry)];
                ordered[usize::from(*place)] = entry;
                *place += 1;
            }
            part.copy_from_slice(&ordered[..part.len()]);
        }
    }

    fn rows<'s>(
        &'s self,
        choice: &'s Choice,
        ready: &'s [u32],
        vector: usize,
    ) -> impl Fn(usize) -> Row<'s> + Sync + 's {
        move |i| {
            let place = choice.place(ready[i]);
            (self.row)(place, choice.neurons[place], vector)
        }
    }

    fn dots(&self, choice: &Choice, ready: &[u32], vector: usize, bias: Option<&[f32]>, results: &mut [f32]) {
        let results = &mut results[..ready.len()];
        let row = self.rows(choice, ready, vector);
        if choice.tokens == 1 {
            gathered_dots(self.threads, self.element, &row, self.input, results);
        } else {
            let token = |i: usize| choice.entries[ready[i] as usize].token as usize;
            gathered_dots_each(self.threads, self.element, &row, &token, (self.input, self.hidden), results);
        }
        if let Some(bias) = bias {
            let biases = ready.iter().map(|&entry| bias[choice.neurons[choice.place(entry)].index()]);
            results.iter_mut().zip(biases).for_each(|(result, bias)| *result += bias);
        }
    }
}
