//! Which neurons are computed for which token.

use std::ops::Range;

use flashlm_kernels::above;

use flashlm_formats::ids::Position;

use crate::buffers::Buffers;

/// For every token the neurons that are computed; the others are taken for zero.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    words: Vec<u64>,
    words_per_token: usize,
    all: bool,
}

impl Selection {
    /// Nothing selected, with room for this many tokens and neurons.
    pub fn new(buffers: &mut Buffers, tokens: usize, neurons: usize) -> Self {
        let words_per_token = words(neurons);
        Self { words: buffers.room(tokens * words_per_token), words_per_token, all: false }
    }

    /// Makes it empty, for `tokens` tokens and `neurons` neurons.
    pub fn reset(&mut self, tokens: usize, neurons: usize) {
        self.words_per_token = words(neurons);
        self.all = false;
        self.words.clear();
        self.words.resize(tokens * self.words_per_token, 0);
    }

    /// Selects the neurons of `token` whose score is above zero.
    pub fn select_positive(&mut self, token: usize, scores: &[f32]) {
        above(scores, 0.0, &mut self.words[token * self.words_per_token..][..self.words_per_token]);
    }

    /// Makes it select all of `neurons` neurons for each of `tokens` tokens.
    pub fn select_all(&mut self, tokens: usize, neurons: usize) {
        self.reset(tokens, neurons);
        let per_token = self.words_per_token;
        for (at, word) in self.words.iter_mut().enumerate() {
            *word = u64::MAX >> (64 * (at % per_token + 1)).saturating_sub(neurons);
        }
        self.all = true;
    }

    /// Whether it was made to select all.
    pub fn is_all(&self) -> bool {
        self.all
    }

    /// Calls `each` with every selected neuron within `neurons` and each of `tokens` that it is selected for: by neuron, then by token.
    pub fn each(&self, tokens: Range<usize>, neurons: Range<usize>, mut each: impl FnMut(Position, usize)) {
        let row = |token: usize| &self.words[token * self.words_per_token..][..self.words_per_token];
        if tokens.len() == 1 && neurons.start == 0 {
            // As every token that is decoded alone does.
            let (token, last) = (tokens.start, neurons.end / 64);
            let mut words = row(token)[..neurons.end.div_ceil(64)].iter().enumerate();
            words.by_ref().take(last).for_each(|(at, word)| ones(*word, at, |neuron| each(neuron, token)));
            return words.for_each(|(at, word)| ones(word & !(u64::MAX << (neurons.end % 64)), at, |n| each(n, token)));
        }
        for at in neurons.start / 64..neurons.end.div_ceil(64) {
            let inside = |bit: usize| u64::from(neurons.contains(&(at * 64 + bit))) << bit;
            let whole = neurons.start <= at * 64 && (at + 1) * 64 <= neurons.end;
            let mask = if whole { u64::MAX } else { (0..64).fold(0, |mask, bit| mask | inside(bit)) };
            let mut left = tokens.clone().fold(0, |left, token| left | row(token)[at]) & mask;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                for token in tokens.clone() {
                    if row(token)[at] >> bit & 1 == 1 {
                        each(Position(at as u32 * 64 + bit), token);
                    }
                }
            }
        }
    }

    /// The end of the longest part of `neurons`, in whole words of their selection, that the first `tokens` select no more than `pairs`
    /// times.
    pub fn end_of(&self, tokens: usize, neurons: Range<usize>, pairs: usize) -> usize {
        let mut left = pairs;
        for at in neurons.start / 64..neurons.end.div_ceil(64) {
            let words = self.words[at..].iter().step_by(self.words_per_token).take(tokens);
            let selected: usize = words.map(|word| word.count_ones() as usize).sum();
            if selected > left {
                return at * 64;
            }
            left -= selected;
        }
        neurons.end
    }

    /// The tokens, of the first `tokens`, that each of `neurons` is selected for: where those of each neuron begin, and those of the
    /// last end, in `starts`.
    pub fn by_neuron(&self, tokens: usize, neurons: Range<usize>, starts: &mut Vec<u32>, list: &mut Vec<u16>) {
        starts.clear();
        starts.resize(neurons.len() + 1, 0);
        let each = |of: &mut dyn FnMut(usize, usize)| {
            for token in 0..tokens {
                let row = &self.words[token * self.words_per_token..][..self.words_per_token];
                for at in neurons.start / 64..neurons.end.div_ceil(64) {
                    let mut left = row[at];
                    while left != 0 {
                        let neuron = at * 64 + left.trailing_zeros() as usize;
                        left &= left - 1;
                        if neurons.contains(&neuron) {
                            of(neuron - neurons.start, token);
                        }
                    }
                }
            }
        };
        each(&mut |neuron, _| starts[neuron + 1] += 1);
        (1..starts.len()).for_each(|neuron| starts[neuron] += starts[neuron - 1]);
        list.clear();
        list.resize(starts[neurons.len()] as usize, 0);
        // Each neuron's begin moves to its end, which is where the next one's was.
        each(&mut |neuron, token| {
            list[starts[neuron] as usize] = token as u16;
            starts[neuron] += 1;
        });
        starts.copy_within(0..neurons.len(), 1);
        starts[0] = 0;
    }

    /// Neurons selected: by token, and each once.
    pub fn counts(&self) -> (u64, u64) {
        let of_tokens = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        let tokens = || self.words.chunks_exact(self.words_per_token.max(1));
        let any = |at: usize| tokens().fold(0, |any, words| any | words[at]);
        (of_tokens, (0..self.words_per_token).map(|at| u64::from(any(at).count_ones())).sum())
    }

    /// Whether `neuron` is computed for `token`.
    pub fn contains(&self, token: usize, neuron: Position) -> bool {
        let neuron = neuron.index();
        self.words[token * self.words_per_token + neuron / 64] >> (neuron % 64) & 1 == 1
    }
}

/// Calls `each` with the neuron of every bit that is set in word `at`.
#[inline(always)]
pub fn ones(word: u64, at: usize, mut each: impl FnMut(Position)) {
    let mut left = word;
    while left != 0 {
        each(Position(at as u32 * 64 + left.trailing_zeros()));
        left &= left - 1;
    }
}

/// Words of a token's selection.
fn words(neurons: usize) -> usize {
    neurons.div_ceil(u64::BITS as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neurons_come_by_their_number_each_with_its_tokens() {
        let mut selection = Selection::default();
        let (tokens, neurons) = (3, 200);
        selection.reset(tokens, neurons);
        let chosen = |token: usize, neuron: usize| neuron % (token + 3) == 1;
        for token in 0..tokens {
            let scores: Vec<f32> = (0..neurons).map(|n| if chosen(token, n) { 1.0 } else { -1.0 }).collect();
            selection.select_positive(token, &scores);
        }
        let of_tokens: usize = (0..tokens).map(|t| (0..neurons).filter(|n| chosen(t, *n)).count()).sum();
        let distinct = (0..neurons).filter(|n| (0..tokens).any(|t| chosen(t, *n))).count();
        assert_eq!(selection.counts(), (of_tokens as u64, distinct as u64));
        for range in [0..200, 0..64, 1..63, 63..65, 64..128, 70..70, 199..200, 130..200] {
            for of in [0..3, 1..2, 1..3] {
                let mut found = Vec::new();
                selection.each(of.clone(), range.clone(), |neuron, token| found.push((neuron.index(), token)));
                let all = range.clone().flat_map(|n| of.clone().map(move |t| (n, t)));
                let expected: Vec<_> = all.filter(|(n, t)| chosen(*t, *n)).collect();
                assert_eq!(found, expected, "{range:?} {of:?}");
            }
            let (mut starts, mut list) = (vec![7; 3], vec![7; 3]);
            selection.by_neuron(tokens, range.clone(), &mut starts, &mut list);
            assert_eq!(starts.len(), range.len() + 1);
            for (at, neuron) in range.clone().enumerate() {
                let of: Vec<u16> = (0..tokens).filter(|t| chosen(*t, neuron)).map(|t| t as u16).collect();
                assert_eq!(list[starts[at] as usize..starts[at + 1] as usize], of, "{neuron} of {range:?}");
            }
            assert_eq!(list.len(), starts[range.len()] as usize);
        }
    }

    #[test]
    fn parts_hold_no_more_pairs_than_asked_for() {
        let mut selection = Selection::default();
        selection.select_all(3, 200);
        assert!(selection.is_all() && selection.contains(2, Position(199)));
        for (neurons, pairs, end) in [(0..200, 192, 64), (0..200, 384, 128), (0..200, 1000, 200), (70..200, 192, 128)] {
            assert_eq!(selection.end_of(3, neurons.clone(), pairs), end, "{neurons:?}, {pairs} pairs");
        }
        selection.reset(3, 200);
        assert!(!selection.is_all() && !selection.contains(2, Position(199)));
    }
}
