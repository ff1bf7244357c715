//! Eight lanes: AVX2 with FMA and F16C (Intel since 2013, AMD since 2015).

use std::arch::x86_64::*;

use super::{Op, Simd};

/// Proves AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let present =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        present.then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter<O: Op>(token: Avx2, op: O) -> O::Out {
    op.run(token)
}

/// The sums of four vectors, in the order of [`Simd::sum`]: the last two steps are taken for all four at once.
///
/// # Safety
/// AVX2 must be present.
#[inline(always)]
pub(super) unsafe fn sum_four(v: [__m256; 4]) -> [f32; 4] {
    // SAFETY: as the caller vouches; the array takes four numbers.
    unsafe {
        let [a, b, c, d] = v.map(|v| _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)));
        let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        let mut sums = [0.0; 4];
        _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
        sums
    }
}

// In this block "the token" is `self`: `detect` alone makes it, after asking the processor.
impl Simd for Avx2 {
    type V = __m256;
    type Sums = __m256i;
    type Pairs = __m256i;
    const LANES: usize = 8;
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn vectorize<O: Op>(self, op: O) -> O::Out {
        // SAFETY: the token proves the instructions.
        unsafe { enter(self, op) }
    }

    #[inline(always)]
    fn splat(self, a: f32) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_set1_ps(a) }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn exp2_whole(self, n: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        // SAFETY: the token proves the instructions.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn sum_four(self, v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: the token proves the instructions.
        unsafe { sum_four(v) }
    }

    #[inline(always)]
    fn greater(self, a: Self::V, b: Self::V) -> u32 {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) as u32 }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES f32 at `p`.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES f16 at `p`.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES bf16 at `p`.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES bytes at `p`.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_low_nibbles(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES bytes at `p`.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<28>(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn load_high_nibbles(self, p: *const u8) -> Self::V {
        // SAFETY: as above. Widened with its sign, a byte's high half keeps it.
        unsafe { _mm256_cvtepi32_ps(_mm256_srai_epi32::<4>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())))) }
    }
    #[inline(always)]
    fn no_sums(self) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    fn floats(self, sums: Self::Sums) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const i16) -> Self::Pairs {
        // SAFETY: the token proves the instructions, the caller vouches for LANES pairs at `p`.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_pair(self, p: *const i16) -> Self::Pairs {
        // SAFETY: the token proves the instructions, the caller vouches for a pair at `p`.
        unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    fn add_pairs(self, sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)) }
    }
    #[inline(always)]
    unsafe fn add_bytes(self, sums: Self::Sums, bytes: *const u8, numbers: *const i16) -> Self::Sums {
        // SAFETY: the token proves the instructions, the caller vouches for 32 bytes and 32 numbers.
        unsafe {
            let (first, second) = (_mm_loadu_si128(bytes.cast()), _mm_loadu_si128(bytes.add(16).cast()));
            let first = _mm256_madd_epi16(_mm256_cvtepi8_epi16(first), _mm256_loadu_si256(numbers.cast()));
            let second = _mm256_madd_epi16(_mm256_cvtepi8_epi16(second), _mm256_loadu_si256(numbers.add(16).cast()));
            _mm256_add_epi32(sums, _mm256_add_epi32(first, second))
        }
    }
    #[inline(always)]
    unsafe fn nibbles_start<const BLOCKS: usize>(self, numbers: *const i16) -> Self::Sums {
        // SAFETY: the token proves the instructions, the caller vouches for the numbers.
        unsafe {
            let mut sums = _mm256_setzero_si256();
            for i in 0..2 * BLOCKS {
                let numbers = _mm256_loadu_si256(numbers.add(16 * i).cast());
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(numbers, _mm256_set1_epi16(-8)));
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn add_nibbles<const BLOCKS: usize>(
        self,
        mut sums: Self::Sums,
        blocks: *const u8,
        numbers: *const i16,
    ) -> Self::Sums {
        // SAFETY: the token proves the instructions, the caller vouches for the blocks and the numbers. Flipping its highest
        // bit adds 8 to a four-bit number, which is from 0 to 15 then.
        unsafe {
            for block in 0..BLOCKS {
                let bytes = _mm_loadu_si128(blocks.add(16 * block).cast());
                let words = _mm256_cvtepu8_epi16(_mm_xor_si128(bytes, _mm_set1_epi8(0x88_u8 as i8)));
                let low = _mm256_and_si256(words, _mm256_set1_epi16(15));
                let high = _mm256_srli_epi16::<4>(words);
                let numbers = numbers.add(32 * block);
                let low = _mm256_madd_epi16(low, _mm256_loadu_si256(numbers.cast()));
                let high = _mm256_madd_epi16(high, _mm256_loadu_si256(numbers.add(16).cast()));
                sums = _mm256_add_epi32(sums, _mm256_add_epi32(low, high));
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the token proves the instructions, the caller vouches for LANES places at `p`.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    /// To the second cache: the first one's few buffers for lines under way would bound the rate to half of what memory gives.
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch touches no memory that the program can see, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
