//! Which neurons are computed for which token.

use std::ops::Range;

use crate::buffers::Buffers;

/// For every token the neurons that are computed; the others are taken for zero.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    words: Vec<u64>,
    words_per_token: usize,
}

impl Selection {
    /// Nothing selected, with room for this many tokens and neurons.
    pub fn new(buffers: &mut Buffers, tokens: usize, neurons: usize) -> Self {
        let words_per_token = words(neurons);
        Self { words: buffers.room(tokens * words_per_token), words_per_token }
    }

    /// Makes it empty, for `tokens` tokens and `neurons` neurons.
    pub fn reset(&mut self, tokens: usize, neurons: usize) {
        self.words_per_token = words(neurons);
        self.words.clear();
        self.words.resize(tokens * self.words_per_token, 0);
    }

    /// Selects the neurons of `token` whose score is above zero.
    pub fn select_positive(&mut self, token: usize, scores: &[f32]) {
        let words = &mut self.words[token * self.words_per_token..][..self.words_per_token];
        for (word, scores) in words.iter_mut().zip(scores.chunks(64)) {
            *word = scores.iter().enumerate().fold(0, |word, (bit, score)| word | u64::from(*score > 0.0) << bit);
        }
    }

    /// Calls `each` with every selected neuron within `neurons` and each of `tokens` that it is selected for: by neuron, then by token.
    pub fn each(&self, tokens: Range<usize>, neurons: Range<usize>, mut each: impl FnMut(u32, usize)) {
        let row = |token: usize| &self.words[token * self.words_per_token..][..self.words_per_token];
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
                        each(at as u32 * 64 + bit, token);
                    }
                }
            }
        }
    }

    /// Neurons selected: by token, and each once.
    pub fn counts(&self) -> (u64, u64) {
        let of_tokens = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        let tokens = || self.words.chunks_exact(self.words_per_token.max(1));
        let any = |at: usize| tokens().fold(0, |any, words| any | words[at]);
        (of_tokens, (0..self.words_per_token).map(|at| u64::from(any(at).count_ones())).sum())
    }

    /// Whether `neuron` is computed for `token`.
    pub fn contains(&self, token: usize, neuron: usize) -> bool {
        self.words[token * self.words_per_token + neuron / 64] >> (neuron % 64) & 1 == 1
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
                selection.each(of.clone(), range.clone(), |neuron, token| found.push((neuron as usize, token)));
                let all = range.clone().flat_map(|n| of.clone().map(move |t| (n, t)));
                let expected: Vec<_> = all.filter(|(n, t)| chosen(*t, *n)).collect();
                assert_eq!(found, expected, "{range:?} {of:?}");
            }
        }
    }
}
