//! Normally distributed weights, made faster than a disk takes them.
//!
//! Each piece of a tensor has a stream of its own (xoshiro256++, seeded from the tensor's name), so that pieces can be made in
//! any order. Sixteen bits of the stream choose one of 4096 equally likely quantiles of the normal distribution, already
//! converted: three decimals of a distribution are plenty for weights that mean nothing.

use flashlm_formats::model::DType;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Quantiles in a table.
const QUANTILES: usize = 4096;

/// The bit patterns of a normal distribution's quantiles, for a 16-bit type.
pub(crate) struct Table(Box<[u16; QUANTILES]>);

impl Table {
    /// A distribution with this mean and standard deviation; `dtype` is a 16-bit one.
    pub(crate) fn new(dtype: DType, mean: f64, deviation: f64) -> Self {
        let bits = |value| from_f64(dtype, value);
        let mut table = Box::new([0; QUANTILES]);
        for (step, quantile) in upper_quantiles().enumerate() {
            table[QUANTILES / 2 + step] = bits(mean + deviation * quantile);
            table[QUANTILES / 2 - 1 - step] = bits(mean - deviation * quantile);
        }
        Self(table)
    }

    /// Fills `out` (of even length) with the piece `piece` of the tensor `name`.
    pub(crate) fn fill(&self, seed: u64, name: &str, piece: u64, out: &mut [u8]) {
        let mut stream =
            Xoshiro256PlusPlus::seed_from_u64(xxh3_64_with_seed(name.as_bytes(), seed) ^ piece.wrapping_mul(GOLDEN));
        for chunk in out.chunks_mut(8) {
            let mut bits = stream.next_u64();
            for element in chunk.chunks_exact_mut(2) {
                element.copy_from_slice(&self.0[bits as usize % QUANTILES].to_le_bytes());
                bits >>= 16;
            }
        }
    }
}

/// The bit pattern nearest to `value`, in a 16-bit type.
pub(crate) fn from_f64(dtype: DType, value: f64) -> u16 {
    match dtype {
        DType::Bf16 => half::bf16::from_f64(value).to_bits(),
        DType::F16 | DType::F32 => half::f16::from_f64(value).to_bits(),
    }
}

/// What a bit pattern means.
pub(crate) fn to_f64(dtype: DType, bits: u16) -> f64 {
    match dtype {
        DType::Bf16 => half::bf16::from_bits(bits).to_f64(),
        DType::F16 | DType::F32 => half::f16::from_bits(bits).to_f64(),
    }
}

/// Normal numbers one by one, unrounded.
pub(crate) struct Normals(Box<[f64]>);

impl Normals {
    pub(crate) fn new() -> Self {
        let upper: Vec<f64> = upper_quantiles().collect();
        Self(upper.iter().rev().map(|q| -q).chain(upper.iter().copied()).collect())
    }

    pub(crate) fn next(&self, stream: &mut Xoshiro256PlusPlus) -> f64 {
        self.0[stream.next_u64() as usize % QUANTILES]
    }
}

/// Quantiles at `(0.5 + i) / QUANTILES` above the median: the slope of a quantile is one over the density there (Runge-Kutta).
fn upper_quantiles() -> impl Iterator<Item = f64> {
    let slope = |z: f64| (std::f64::consts::TAU).sqrt() * (z * z / 2.0).exp();
    let step = move |z: f64, width: f64| {
        let first = slope(z);
        let second = slope(z + width / 2.0 * first);
        let third = slope(z + width / 2.0 * second);
        let fourth = slope(z + width * third);
        z + width / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)
    };
    let width = 1.0 / QUANTILES as f64;
    let first = step(0.0, width / 2.0);
    std::iter::successors(Some(first), move |z| Some(step(*z, width))).take(QUANTILES / 2)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        let state: Vec<u8> = [1u64, 2, 3, 4].iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut stream = Xoshiro256PlusPlus::from_seed(state.try_into().unwrap());
        let numbers = [(); 3].map(|()| stream.next_u64());
        assert_eq!(numbers, [41_943_041, 58_720_359, 3_588_806_011_781_223]);
    }

    #[test]
    fn weights_are_normal() {
        for dtype in [DType::F16, DType::Bf16] {
            let mut bytes = vec![0; 1 << 20];
            Table::new(dtype, 0.5, 0.02).fill(7, "a", 0, &mut bytes);
            let value = |pair: &[u8]| to_f64(dtype, u16::from_le_bytes([pair[0], pair[1]]));
            let values: Vec<f64> = bytes.chunks_exact(2).map(value).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
            let within = values.iter().filter(|v| (*v - 0.5).abs() < 0.02).count() as f64 / values.len() as f64;
            assert!((mean - 0.5).abs() < 2e-4, "{dtype}: {mean}");
            assert!((deviation / 0.02 - 1.0).abs() < 0.01, "{dtype}: {deviation}");
            assert!((within - 0.683).abs() < 0.03, "{dtype}: {within}");
        }
    }

    #[test]
    fn pieces_and_names_have_streams_of_their_own() {
        let table = Table::new(DType::F16, 0.0, 1.0);
        let made = |seed, name, piece| {
            let mut bytes = vec![0; 64];
            table.fill(seed, name, piece, &mut bytes);
            bytes
        };
        assert_eq!(made(1, "a", 0), made(1, "a", 0));
        for other in [made(2, "a", 0), made(1, "b", 0), made(1, "a", 1)] {
            assert_ne!(made(1, "a", 0), other);
        }
    }
}
