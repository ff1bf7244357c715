//! Which tokens of a recording are trained on, and which are held out: one split for everything that is made from it.

use std::ops::Range;

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

/// Share of the tokens that is held out where nothing else is asked for.
pub const HELD_OUT: f64 = 0.1;

/// The tokens of a recording in two parts: predictors are trained and orders made on one, both are judged on the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Stretches of tokens to train on, ascending.
    pub training: Vec<Range<usize>>,
    /// The others.
    pub held_out: Vec<Range<usize>>,
}

impl Split {
    /// From the document of each token and the numbers of those held out, ascending.
    pub fn of_documents(documents: &[u32], held_out: &[u32]) -> Self {
        let mut split = Self::default();
        let mut start = 0;
        for document in documents.chunk_by(|a, b| a == b) {
            let end = start + document.len();
            let part = match held_out.binary_search(&document[0]) {
                Ok(_) => &mut split.held_out,
                Err(_) => &mut split.training,
            };
            match part.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => part.push(start..end),
            }
            start = end;
        }
        split
    }

    /// For a recording that does not say: [`hold_out`] chooses among its documents; where they are too few or too long for
    /// that, the last tenth of the tokens is held out.
    pub(super) fn by_rule(documents: &[u32]) -> Self {
        let spans: Vec<&[u32]> = documents.chunk_by(|a, b| a == b).collect();
        let lengths: Vec<usize> = spans.iter().map(|span| span.len()).collect();
        if let Some(chosen) = hold_out(&lengths, HELD_OUT) {
            let numbers: Vec<u32> =
                spans.iter().zip(chosen).filter(|(_, held)| *held).map(|(span, _)| span[0]).collect();
            return Self::of_documents(documents, &numbers);
        }
        let cut = documents.len() - (documents.len() as f64 * HELD_OUT).ceil() as usize;
        let part = |range: Range<usize>| if range.is_empty() { Vec::new() } else { vec![range] };
        Self { training: part(0..cut), held_out: part(cut..documents.len()) }
    }

    /// Tokens of either part.
    pub fn tokens(parts: &[Range<usize>]) -> usize {
        parts.iter().map(ExactSizeIterator::len).sum()
    }

    /// For each of this many tokens whether it is held out.
    pub fn flags(&self, tokens: usize) -> Vec<bool> {
        let mut flags = vec![false; tokens];
        self.held_out.iter().for_each(|part| flags[part.clone()].fill(true));
        flags
    }
}

/// Which documents of these lengths to hold out: about `share` of the tokens, and never less than half or more than one and a
/// half times of that. `None` where whole documents do not give that; with none longer than `share` of the tokens they do.
///
/// Documents are looked at in an order that their numbers alone decide, and length plays no part but to keep the bound, so
/// that the one part is of the same kind of text as the other.
pub fn hold_out(lengths: &[usize], share: f64) -> Option<Vec<bool>> {
    let wanted = lengths.iter().sum::<usize>() as f64 * share;
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    // The same order on every machine, and in every version.
    order.sort_by_key(|&document| SplitMix64::seed_from_u64(document as u64).next_u64());
    let (mut chosen, mut count) = (vec![false; lengths.len()], 0.0);
    for document in order {
        if count >= wanted {
            break;
        }
        let with = count + lengths[document] as f64;
        if with <= 1.5 * wanted {
            (chosen[document], count) = (true, with);
        }
    }
    (count > 0.0 && count >= 0.5 * wanted).then_some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(range: Range<usize>) -> Vec<Range<usize>> {
        std::iter::once(range).collect()
    }

    #[test]
    fn what_is_held_out_is_bounded_both_ways_and_spread() {
        let many: Vec<usize> = (0..400).map(|d| 20 + d * 37 % 190).collect();
        let ten = vec![100; 10];
        let a_note_beside_pieces_of_a_book: Vec<usize> = std::iter::once(3).chain([95; 11]).collect();
        for lengths in [many.clone(), ten, a_note_beside_pieces_of_a_book] {
            let total: usize = lengths.iter().sum();
            let chosen = hold_out(&lengths, HELD_OUT).unwrap();
            let held: usize = lengths.iter().zip(&chosen).filter(|(_, held)| **held).map(|(l, _)| l).sum();
            let share = held as f64 / total as f64;
            assert!((0.05..=0.15).contains(&share), "{share} of {lengths:?}");
        }
        // Neither the short nor the long ones are preferred, nor the first or the last.
        let chosen = hold_out(&many, HELD_OUT).unwrap();
        let held: Vec<usize> = (0..400).filter(|&d| chosen[d]).collect();
        let mean = |of: &dyn Fn(usize) -> f64| held.iter().map(|&d| of(d)).sum::<f64>() / held.len() as f64;
        assert!((90.0..140.0).contains(&mean(&|d| many[d] as f64)), "{held:?}");
        assert!((140.0..260.0).contains(&mean(&|d| d as f64)), "{held:?}");
    }

    #[test]
    fn documents_that_cannot_be_split_are_left_to_the_caller() {
        for lengths in [&[][..], &[500], &[500, 400], &[4, 100_000]] {
            assert_eq!(hold_out(lengths, HELD_OUT), None, "{lengths:?}");
        }
        let split = Split::by_rule(&[7; 95]);
        assert_eq!((split.training, split.held_out), (one(0..85), one(85..95)));
        assert_eq!(Split::by_rule(&[1]), Split { training: vec![], held_out: one(0..1) });
    }

    #[test]
    fn documents_stay_whole() {
        let documents: Vec<u32> = (0..1000).map(|t| 3 + t / 7).collect();
        let split = Split::by_rule(&documents);
        let flags = split.flags(documents.len());
        assert_eq!(Split::tokens(&split.training) + Split::tokens(&split.held_out), 1000);
        for t in 1..documents.len() {
            assert!(documents[t] != documents[t - 1] || flags[t] == flags[t - 1], "token {t}");
        }
        assert!((50..=150).contains(&flags.iter().filter(|f| **f).count()));
        let stated = Split::of_documents(&[0, 0, 2, 2, 2, 5], &[0, 5]);
        assert_eq!((stated.training, stated.held_out), (one(2..5), vec![0..2, 5..6]));
    }
}
