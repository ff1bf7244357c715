//! Four lanes: NEON, which every 64-bit ARM processor has, with its baseline widening of f16.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Op, Simd};

/// Proves NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

#[target_feature(enable = "neon")]
fn enter<O: Op>(token: Neon, op: O) -> O::Out {
    op.run(token)
}

/// Adds the products of 16 signed bytes with 16 numbers.
///
/// # Safety
/// NEON must be present, and the numbers readable.
#[inline(always)]
unsafe fn add_sixteen(sums: int32x4_t, bytes: int8x16_t, numbers: *const i16) -> int32x4_t {
    // SAFETY: as the caller vouches.
    unsafe {
        let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
        let (x0, x1) = (vld1q_s16(numbers), vld1q_s16(numbers.add(8)));
        let sums = vmlal_high_s16(vmlal_s16(sums, vget_low_s16(low), vget_low_s16(x0)), low, x0);
        vmlal_high_s16(vmlal_s16(sums, vget_low_s16(high), vget_low_s16(x1)), high, x1)
    }
}

// In this block "the token" is `self`: `detect` alone makes it, after asking the processor.
impl Simd for Neon {
    type V = float32x4_t;
    type Sums = int32x4_t;
    type Pairs = int16x8_t;
    const LANES: usize = 4;
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn vectorize<O: Op>(self, op: O) -> O::Out {
        // SAFETY: the token proves the instructions.
        unsafe { enter(self, op) }
    }

    #[inline(always)]
    fn splat(self, a: f32) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { vdupq_n_f32(a) }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { vdivq_f32(a, b) }
    }
    /// By comparison: `vmaxq` alone would return NaN where either is NaN.
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions. NEON's order of arguments is accumulator first.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn exp2_whole(self, n: Self::V) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe {
            let exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        // SAFETY: the token proves the instructions.
        unsafe { vaddvq_f32(v) }
    }

    /// `vaddvq` adds neighbours twice, and so does this.
    #[inline(always)]
    fn sum_four(self, v: [Self::V; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        // SAFETY: the token proves the instructions; the array takes four numbers.
        unsafe { vst1q_f32(sums.as_mut_ptr(), vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]))) };
        sums
    }

    #[inline(always)]
    fn greater(self, a: Self::V, b: Self::V) -> u32 {
        const BITS: [u32; 4] = [1, 2, 4, 8];
        // SAFETY: the token proves the instructions.
        unsafe { vaddvq_u32(vandq_u32(vcgtq_f32(a, b), vld1q_u32(BITS.as_ptr()))) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES f32 at `p`.
        unsafe { vld1q_f32(p) }
    }
    /// `fcvtl` is baseline ARMv8, but its intrinsic wants a newer compiler than this crate asks for.
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES f16 at `p`.
        // The instruction reads and writes only the two registers named.
        unsafe {
            let bits = vreinterpret_u16_u8(vld1_u8(p));
            let wide: float32x4_t;
            asm!("fcvtl {wide:v}.4s, {bits:v}.4h", wide = lateout(vreg) wide, bits = in(vreg) bits,
                options(pure, nomem, nostack, preserves_flags));
            wide
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for LANES bf16 at `p`.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p)))) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for the four bytes at `p`.
        unsafe {
            let bytes = vreinterpret_s8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
        }
    }
    #[inline(always)]
    unsafe fn load_low_nibbles(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the instructions, the caller vouches for the four bytes at `p`.
        unsafe {
            let bytes = vreinterpret_s8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()));
            let low = vshr_n_s8::<4>(vshl_n_s8::<4>(bytes));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(low))))
        }
    }
    #[inline(always)]
    unsafe fn load_high_nibbles(self, p: *const u8) -> Self::V {
        // SAFETY: as above.
        unsafe {
            let bytes = vreinterpret_s8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned()));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vshr_n_s8::<4>(bytes)))))
        }
    }
    #[inline(always)]
    fn no_sums(self) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe { vaddq_s32(a, b) }
    }
    #[inline(always)]
    fn floats(self, sums: Self::Sums) -> Self::V {
        // SAFETY: the token proves the instructions.
        unsafe { vcvtq_f32_s32(sums) }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const i16) -> Self::Pairs {
        // SAFETY: the token proves the instructions, the caller vouches for LANES pairs at `p`.
        unsafe { vld1q_s16(p) }
    }
    #[inline(always)]
    unsafe fn splat_pair(self, p: *const i16) -> Self::Pairs {
        // SAFETY: the token proves the instructions, the caller vouches for a pair at `p`.
        unsafe { vreinterpretq_s16_s32(vdupq_n_s32(p.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    fn add_pairs(self, sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums {
        // SAFETY: the token proves the instructions.
        unsafe {
            let (low, high) = (vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
            vaddq_s32(sums, vpaddq_s32(low, high))
        }
    }
    #[inline(always)]
    unsafe fn add_bytes(self, sums: Self::Sums, bytes: *const u8, numbers: *const i16) -> Self::Sums {
        // SAFETY: the token proves the instructions, the caller vouches for 32 bytes and 32 numbers.
        unsafe {
            let sums = add_sixteen(sums, vld1q_s8(bytes.cast()), numbers);
            add_sixteen(sums, vld1q_s8(bytes.add(16).cast()), numbers.add(16))
        }
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
        // SAFETY: the token proves the instructions, the caller vouches for the blocks and the numbers.
        unsafe {
            for block in 0..BLOCKS {
                let bytes = vld1q_s8(blocks.add(16 * block).cast());
                let numbers = numbers.add(32 * block);
                sums = add_sixteen(sums, vshrq_n_s8::<4>(vshlq_n_s8::<4>(bytes)), numbers);
                sums = add_sixteen(sums, vshrq_n_s8::<4>(bytes), numbers.add(16));
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: the token proves the instructions, the caller vouches for LANES places at `p`.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch touches no memory that the program can see, and never faults.
        unsafe { asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly)) }
    }
}
