//! Eight lanes in plain Rust: what runs where no other instruction set is known, and what the others are checked against.

use super::{Op, Simd};
use crate::element::Q4_BLOCK;

/// Proves nothing, as it needs nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain;

const LANES: usize = 8;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Widens an f16 without tables or branches on the exponent: the bits, moved, are the value scaled by 2^-112.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 | magnitude } else { scaled.to_bits() };
    f32::from_bits(special | u32::from(bits & 0x8000) << 16)
}

#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

impl Simd for Plain {
    type V = [f32; LANES];
    type Sums = [i32; LANES];
    type Pairs = [[i16; 2]; LANES];
    const LANES: usize = LANES;
    const MANY_REGISTERS: bool = false;

    #[inline(never)]
    fn vectorize<O: Op>(self, op: O) -> O::Out {
        op.run(self)
    }

    #[inline(always)]
    fn splat(self, a: f32) -> Self::V {
        [a; LANES]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    /// Two roundings: without the instruction, a fused product is a slow library call.
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn exp2_whole(self, n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    fn greater(self, a: Self::V, b: Self::V) -> u32 {
        (0..LANES).fold(0, |bits, i| bits | u32::from(a[i] > b[i]) << i)
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the caller vouches for LANES f32 at `p`.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::V {
        // SAFETY: the caller vouches for LANES f16 at `p`.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f16_to_f32(u16::from_le(b)))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::V {
        // SAFETY: the caller vouches for LANES bf16 at `p`.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| bf16_to_f32(u16::from_le(b)))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::V {
        // SAFETY: the caller vouches for LANES bytes at `p`.
        let bytes = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        bytes.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_low_nibbles(self, p: *const u8) -> Self::V {
        // SAFETY: the caller vouches for LANES bytes at `p`.
        let bytes = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        bytes.map(|b| f32::from((b << 4) >> 4))
    }
    #[inline(always)]
    unsafe fn load_high_nibbles(self, p: *const u8) -> Self::V {
        // SAFETY: the caller vouches for LANES bytes at `p`.
        let bytes = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        bytes.map(|b| f32::from(b >> 4))
    }
    #[inline(always)]
    fn no_sums(self) -> Self::Sums {
        [0; LANES]
    }
    #[inline(always)]
    fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn floats(self, sums: Self::Sums) -> Self::V {
        sums.map(|sum| sum as f32)
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const i16) -> Self::Pairs {
        // SAFETY: the caller vouches for LANES pairs at `p`.
        unsafe { p.cast::<Self::Pairs>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_pair(self, p: *const i16) -> Self::Pairs {
        // SAFETY: the caller vouches for a pair at `p`.
        [unsafe { p.cast::<[i16; 2]>().read_unaligned() }; LANES]
    }
    #[inline(always)]
    fn add_pairs(self, sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums {
        let product = |i: usize, j: usize| i32::from(a[i][j]) * i32::from(b[i][j]);
        std::array::from_fn(|i| sums[i] + product(i, 0) + product(i, 1))
    }
    #[inline(always)]
    unsafe fn add_bytes(self, mut sums: Self::Sums, bytes: *const u8, numbers: *const i16) -> Self::Sums {
        // SAFETY: the caller vouches for both.
        let (bytes, numbers) = unsafe { (*bytes.cast::<[i8; Q4_BLOCK]>(), *numbers.cast::<[i16; Q4_BLOCK]>()) };
        for i in 0..Q4_BLOCK {
            sums[i % LANES] += i32::from(bytes[i]) * i32::from(numbers[i]);
        }
        sums
    }
    #[inline(always)]
    unsafe fn nibbles_start<const BLOCKS: usize>(self, _numbers: *const i16) -> Self::Sums {
        self.no_sums()
    }
    #[inline(always)]
    unsafe fn add_nibbles<const BLOCKS: usize>(
        self,
        mut sums: Self::Sums,
        blocks: *const u8,
        numbers: *const i16,
    ) -> Self::Sums {
        const HALF: usize = Q4_BLOCK / 2;
        for block in 0..BLOCKS {
            // SAFETY: the caller vouches for both; bytes and numbers of a block are aligned as they come.
            let (bytes, numbers) = unsafe {
                let bytes = *blocks.add(block * HALF).cast::<[i8; HALF]>();
                (bytes, numbers.add(block * Q4_BLOCK).cast::<[i16; Q4_BLOCK]>().read())
            };
            for i in 0..HALF {
                let (low, high) = ((bytes[i] << 4) >> 4, bytes[i] >> 4);
                sums[i % LANES] +=
                    i32::from(low) * i32::from(numbers[i]) + i32::from(high) * i32::from(numbers[i + HALF]);
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for LANES places at `p`.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}

#[cfg(test)]
mod tests {
    use half::f16;

    #[test]
    fn every_f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (super::f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
                "{bits:#06x}: {ours} against {theirs}"
            );
        }
    }
}
