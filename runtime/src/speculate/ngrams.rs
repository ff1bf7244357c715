//! The text as its own draft: what followed the last time that it went on like this.

use super::{CLASSES, Draft, Guess};
use crate::error::Result;
use crate::sampler::Sampler;

/// Tokens that are compared, at most: the more are equal, the surer is the guess.
const LONGEST: usize = CLASSES;
/// Tokens that are searched, at most: a search takes microseconds.
const SEARCHED: usize = 1 << 14;

/// Finds the longest end of the text that occurs earlier in it, the last such place, and copies what follows there.
#[derive(Debug, Default)]
pub(super) struct NGrams {
    /// Position that the next guess is copied from; those behind the text are of guesses.
    from: usize,
    /// Tokens before it that are equal to the end of the text, and of the guesses.
    equal: usize,
}

impl NGrams {
    fn search(&mut self, text: &[u32]) {
        (self.from, self.equal) = (0, 0);
        let Some((last, before)) = text.split_last() else { return };
        let start = before.len().saturating_sub(SEARCHED);
        for at in (start..before.len()).rev().filter(|at| text[*at] == *last) {
            let pairs = text[..=at].iter().rev().zip(text.iter().rev());
            let equal = pairs.take(LONGEST).take_while(|(a, b)| a == b).count();
            if equal > self.equal {
                (self.from, self.equal) = (at + 1, equal);
            }
            if equal == LONGEST {
                return;
            }
        }
    }
}

impl Draft for NGrams {
    fn guess(&mut self, text: &[u32], drafted: &[u32], _: &Sampler) -> Result<Option<Guess>> {
        if drafted.is_empty() {
            self.search(text);
        }
        if self.equal == 0 {
            return Ok(None);
        }
        // A text that repeats itself runs into what was guessed.
        let id = text.get(self.from).or_else(|| drafted.get(self.from - text.len()));
        let guess = id.map(|id| Guess { id: *id, class: self.equal - 1, is_usual: true });
        self.from += 1;
        self.equal = (self.equal + 1).min(LONGEST);
        Ok(guess)
    }

    fn expected(&self, class: usize) -> f64 {
        // One equal token says little, eight that a passage is being copied.
        (class + 1) as f64 / (class + 3) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Sampling;

    fn guesses(text: &[u32], count: usize) -> Vec<(u32, usize)> {
        let sampler = Sampler::new(Sampling::default(), 1);
        let (mut ngrams, mut drafted, mut found) = (NGrams::default(), Vec::new(), Vec::new());
        for _ in 0..count {
            let Some(guess) = ngrams.guess(text, &drafted, &sampler).unwrap() else { break };
            drafted.push(guess.id);
            found.push((guess.id, guess.class));
        }
        found
    }

    #[test]
    fn the_longest_and_latest_place_is_copied() {
        assert_eq!(guesses(&[], 3), []);
        assert_eq!(guesses(&[1, 2, 3], 3), [], "nothing occurs twice");
        // After `2 3` came 4, after the later `9 3` came 5.
        assert_eq!(guesses(&[2, 3, 4, 9, 3, 5, 2, 3], 2), [(4, 1), (9, 2)]);
        assert_eq!(guesses(&[3, 4, 3, 5, 3], 1), [(5, 0)], "of equals the latest");
    }

    #[test]
    fn what_repeats_itself_goes_on() {
        let found = guesses(&[7, 1, 2, 3, 1, 2, 3], 7);
        assert_eq!(found.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(found.last(), Some(&(1, CLASSES - 1)));
        assert_eq!(guesses(&[5, 5], 3), [(5, 0), (5, 1), (5, 2)]);
    }
}
