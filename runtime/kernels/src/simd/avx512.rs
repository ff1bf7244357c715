//! Sixteen lanes: AVX-512 F, BW, VL, DQ and VNNI (Intel since Cascade Lake and Ice Lake, AMD since Zen 4).

use std::arch::x86_64::*;

use super::{Op, Simd};

/// Proves AVX-512 F, BW, VL, DQ, VNNI, and AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        let present = super::Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni");
        present.then_some(Self(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn enter<O: Op>(token: Avx512, op: O) -> O::Out {
    op.run(token)
}

/// What each half of a byte means.
///
/// # Safety
/// AVX-512 F must be present.
#[inline(always)]
unsafe fn nibble_values() -> __m512 {
    // SAFETY: as the caller vouches.
    unsafe { _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., -8., -7., -6., -5., -4., -3., -2., -1.) }
}

/// The first and second halves of two blocks of numbers, in the order in which two blocks of four-bit numbers have them.
///
/// # Safety
/// AVX-512 F must be present, and 64 numbers readable.
#[inline(always)]
unsafe fn halves_of_two_blocks(numbers: *const i16) -> [__m512i; 2] {
    // SAFETY: as the caller vouches.
    unsafe {
        let sixteen = |i: usize| _mm256_loadu_si256(numbers.add(16 * i).cast());
        let pair = |a, b| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
        [pair(sixteen(0), sixteen(2)), pair(sixteen(1), sixteen(3))]
    }
}

// In this block "the token" is `self`: `detect` alone makes it, after asking the processor.
impl Simd for Avx512 {
    type V = __m512;
    type Sums = __m512i;
    type Pairs = __m512i;
    const LANES: usize = 16;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn vectorize<O: Op>(self, op: O) -> O::Out {
        // SAFETY: the token proves the instructions.
        unsafe { enter(self, op) }
    }

    #[inline(always)]
    fn splat(self, a: f32) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_set1_ps(a) }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn exp2_whole(self, n: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        // SAFETY: the token proves the instructions.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn sum_four(self, v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: the token proves the instructions.
        unsafe {
            let v = v.map(|v| _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
            super::avx2::sum_four(v)
        }
    }

    #[inline(always)]
    fn greater(self, a: Self::V, b: Self::V) -> u32 {
        // SAFETY: the token proves the instructions.
        unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b)) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES f32 at `p`.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES f16 at `p`.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES bf16 at `p`.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES bytes at `p`.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_low_nibbles(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES bytes at `p`. A permutation looks at the low
        // four bits of each index alone.
        unsafe { _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())), nibble_values()) }
    }
    #[inline(always)]
    unsafe fn load_high_nibbles(self, p: *const u8) -> Self::V {
        // SAFETY: as above.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), nibble_values())
        }
    }
    #[inline(always)]
    fn no_sums(self) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn floats(self, sums: Self::Sums) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const i16) -> Self::Pairs {
        // SAFETY: the token proves the instructions, the caller vouches for LANES pairs at `p`.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_pair(self, p: *const i16) -> Self::Pairs {
        // SAFETY: the token proves the instructions, the caller vouches for a pair at `p`.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    fn add_pairs(self, sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe { _mm512_dpwssd_epi32(sums, a, b) }
    }
    #[inline(always)]
    unsafe fn add_bytes(self, sums: Self::Sums, bytes: *const u8, numbers: *const i16) -> Self::Sums {
        // SAFETY: the token proves the instructions, the caller vouches for 32 bytes and 32 numbers.
        unsafe {
            let words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(bytes.cast()));
            _mm512_dpwssd_epi32(sums, words, _mm512_loadu_si512(numbers.cast()))
        }
    }
    #[inline(always)]
    unsafe fn nibbles_start<const BLOCKS: usize>(self, numbers: *const i16) -> Self::Sums {
        // SAFETY: the token proves the instructions, the caller vouches for the numbers.
        unsafe {
            let mut sums = _mm512_setzero_si512();
            for i in 0..BLOCKS {
                let numbers = _mm512_loadu_si512(numbers.add(32 * i).cast());
                sums = _mm512_dpwssd_epi32(sums, numbers, _mm512_set1_epi16(-8));
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn add_nibbles<const BLOCKS: usize>(
        self,
        sums: Self::Sums,
        blocks: *const u8,
        numbers: *const i16,
    ) -> Self::Sums {
        // SAFETY: the token proves the instructions, the caller vouches for the blocks and the numbers. Flipping its highest
        // bit adds 8 to a four-bit number, which is from 0 to 15 then.
        unsafe {
            if BLOCKS == 1 {
                let bytes = _mm_xor_si128(_mm_loadu_si128(blocks.cast()), _mm_set1_epi8(0x88_u8 as i8));
                let words = _mm256_cvtepu8_epi16(bytes);
                let (low, high) = (_mm256_and_si256(words, _mm256_set1_epi16(15)), _mm256_srli_epi16::<4>(words));
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
                return _mm512_dpwssd_epi32(sums, both, _mm512_loadu_si512(numbers.cast()));
            }
            let bytes = _mm256_xor_si256(_mm256_loadu_si256(blocks.cast()), _mm256_set1_epi8(0x88_u8 as i8));
            let words = _mm512_cvtepu8_epi16(bytes);
            let low = _mm512_and_si512(words, _mm512_set1_epi16(15));
            let high = _mm512_srli_epi16::<4>(words);
            let [first, second] = halves_of_two_blocks(numbers);
            _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sums, low, first), high, second)
        }
    }
    /// What the first eight lanes have is of the first block, the others' of the second.
    #[inline(always)]
    unsafe fn nibble_groups_start(self, numbers: *const i16) -> [Self::Sums; 2] {
        // SAFETY: the token proves the instructions, the caller vouches for the numbers.
        unsafe {
            let ([first, second], minus_eight) = (halves_of_two_blocks(numbers), _mm512_set1_epi16(-8));
            let first = _mm512_dpwssd_epi32(_mm512_setzero_si512(), first, minus_eight);
            [_mm512_dpwssd_epi32(first, second, minus_eight), _mm512_setzero_si512()]
        }
    }
    #[inline(always)]
    unsafe fn add_nibble_groups(
        self,
        sums: Self::V,
        start: [Self::Sums; 2],
        blocks: *const u8,
        numbers: *const i16,
        scales: *const u8,
    ) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for what is read.
        unsafe {
            let both = _mm512_set1_epi32(scales.cast::<i32>().read_unaligned());
            let upper = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            let scales = _mm512_mask_slli_epi32::<16>(upper, 0xff, both);
            let whole = self.add_nibbles::<2>(start[0], blocks, numbers);
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_castsi512_ps(scales), sums)
        }
    }
    #[inline(always)]
    unsafe fn two_scales(self, p: *const u8) -> [Self::V; 2] {
        // SAFETY: the token proves the instructions, the caller vouches for both.
        unsafe {
            let both = _mm512_set1_epi32(p.cast::<i32>().read_unaligned());
            let second = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(second)]
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the token proves the instructions, the caller vouches for LANES places at `p`.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    /// To the second cache: the first one's few buffers for lines under way would bound the rate to half of what memory gives.
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch touches no memory that the program can see, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
