//! Sums weighted by a softmax, taken over parts of a list and put together in order: what attention over many positions is made of.
//!
//! Where a part is alone, its sum is that of the whole list. Bits depend on where the list is cut, not on who computes which part.

use crate::dispatch::Kernels;
use crate::elementwise::sum;

/// What belongs to a part's sum of vectors, each times the exponential of its score less the largest of the part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftmaxPart {
    /// The largest score.
    pub largest: f32,
    /// The sum of the factors.
    pub sum: f32,
}

impl Kernels {
    /// Turns the scores of a part into the factors of its vectors: `exp(x - max(x))`. What is no number stays so.
    pub fn softmax_part(self, x: &mut [f32]) -> SoftmaxPart {
        let largest = self.largest(x);
        self.exp_less(x, largest);
        SoftmaxPart { largest, sum: sum(x, |v| v) as f32 }
    }
}

/// [`Kernels::softmax_part`] on the instruction set in use.
pub fn softmax_part(x: &mut [f32]) -> SoftmaxPart {
    Kernels::get().softmax_part(x)
}

impl SoftmaxPart {
    /// Adds the part that comes next: `y` is the sum of vectors so far, `next_y` that of the next part.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn join(&mut self, y: &mut [f32], next: Self, next_y: &[f32]) {
        assert_eq!(y.len(), next_y.len(), "sums of two parts");
        let largest = if next.largest > self.largest { next.largest } else { self.largest };
        let mut factors = [self.largest, next.largest];
        Kernels::get().exp_less(&mut factors, largest);
        let [ours, theirs] = factors;
        y.iter_mut().zip(next_y).for_each(|(y, next)| *y = *y * ours + *next * theirs);
        *self = Self { largest, sum: self.sum * ours + next.sum * theirs };
    }

    /// Divides the sum of vectors of the whole list by that of the factors.
    pub fn finish(self, y: &mut [f32]) {
        let scale = 1.0 / self.sum;
        y.iter_mut().for_each(|y| *y *= scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    /// Scores and, for each, a vector of two.
    fn list(n: usize, spread: f32) -> (Vec<f32>, Vec<[f32; 2]>) {
        let scores = (0..n).map(|i| ((i * 7919 % 1013) as f32 / 506.0 - 1.0) * spread).collect();
        (scores, (0..n).map(|i| [(i % 17) as f32 - 8.0, 1.0]).collect())
    }

    fn part(kernels: Kernels, scores: &[f32], vectors: &[[f32; 2]]) -> (SoftmaxPart, [f32; 2]) {
        let mut factors = scores.to_vec();
        let part = kernels.softmax_part(&mut factors);
        let mut y = [0.0; 2];
        factors.iter().zip(vectors).for_each(|(a, v)| (0..2).for_each(|c| y[c] += a * v[c]));
        (part, y)
    }

    #[test]
    fn parts_together_are_the_sum_over_all() {
        for kernels in Kernels::all_present() {
            for (n, cut, spread) in [(1, 1, 1.0), (70, 64, 3.0), (1000, 128, 30.0), (513, 64, 200.0), (300, 7, 0.0)] {
                let (scores, vectors) = list(n, spread);
                let mut parts = scores.chunks(cut).zip(vectors.chunks(cut)).map(|(s, v)| part(kernels, s, v));
                let (mut all, mut y) = parts.next().unwrap();
                parts.for_each(|(next, next_y)| all.join(&mut y, next, &next_y));
                all.finish(&mut y);
                let want = reference::softmax_sum(&scores, &vectors);
                for (got, want) in y.iter().zip(want) {
                    let error = (f64::from(*got) - want).abs();
                    assert!(error <= 1e-5 * want.abs().max(1.0), "{kernels:?} {n} by {cut}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_is_not_lost() {
        for kernels in Kernels::all_present() {
            for at in [0, 70, 129] {
                let (mut scores, vectors) = list(130, 1.0);
                scores[at] = f32::NAN;
                let (mut all, mut y) = part(kernels, &scores[..64], &vectors[..64]);
                for range in [64..128, 128..130] {
                    let (next, next_y) = part(kernels, &scores[range.clone()], &vectors[range]);
                    all.join(&mut y, next, &next_y);
                }
                all.finish(&mut y);
                assert!(y.iter().all(|y| y.is_nan()), "{kernels:?} {at}: {y:?}");
            }
        }
    }
}
