//! Which of many values are above a bound, as bits.
#![expect(unsafe_code, reason = "vector loads through pointers")]

use crate::dispatch::Kernels;
use crate::simd::{Op, Simd};

/// Bit `i % 64` of `bits[i / 64]` becomes whether `values[i] > bound`; never for what is no number. Bits behind the last value become
/// zero.
///
/// # Panics
/// If `bits` has not just as many words as the values need.
pub fn above(values: &[f32], bound: f32, bits: &mut [u64]) {
    Kernels::get().above(values, bound, bits);
}

impl Kernels {
    /// [`above`] on this instruction set.
    pub fn above(self, values: &[f32], bound: f32, bits: &mut [u64]) {
        assert_eq!(bits.len(), values.len().div_ceil(64), "above: words for the values");
        self.run(Above { values, bound, bits });
    }
}

struct Above<'a> {
    values: &'a [f32],
    bound: f32,
    bits: &'a mut [u64],
}

impl Op for Above<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { values, bound, bits } = self;
        let (whole, rest) = values.as_chunks::<64>();
        let (of_whole, of_rest) = bits.split_at_mut(whole.len());
        let bounds = s.splat(bound);
        for (word, values) in of_whole.iter_mut().zip(whole) {
            *word = (0..64).step_by(S::LANES).fold(0, |word, at| {
                // SAFETY: LANES divides 64, so `at + LANES` values are there.
                let values = unsafe { s.load(values.as_ptr().add(at)) };
                word | u64::from(s.greater(values, bounds)) << at
            });
        }
        for word in of_rest {
            *word = rest.iter().enumerate().fold(0, |word, (at, value)| word | u64::from(*value > bound) << at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_say_which_values_are_above() {
        for len in [0usize, 1, 63, 64, 65, 200, 256] {
            let values: Vec<f32> = (0..len)
                .map(|i| match i % 5 {
                    0 => f32::NAN,
                    1 => 0.5,
                    2 => -1.0,
                    3 => f32::INFINITY,
                    _ => 0.5 + i as f32 * 1e-3,
                })
                .collect();
            for kernels in Kernels::all_present() {
                let mut bits = vec![!0; len.div_ceil(64)];
                kernels.above(&values, 0.5, &mut bits);
                for (i, value) in values.iter().enumerate() {
                    assert_eq!(bits[i / 64] >> (i % 64) & 1 == 1, *value > 0.5, "{i} of {len}");
                }
                assert!(len % 64 == 0 || bits[len / 64] >> (len % 64) == 0);
            }
        }
    }
}
