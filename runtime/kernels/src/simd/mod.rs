//! Vectors of f32, one type per instruction set, behind one small trait.
//!
//! A value of a [`Simd`] type is a proof that the processor has the instructions: only `detect` makes one. Kernels are
//! written once over the trait and run through [`Simd::vectorize`], the one place where `target_feature` stands, so
//! that everything inlined below it is compiled for that instruction set.
#![expect(unsafe_code, reason = "loads and stores through pointers, and intrinsics that a token proves present")]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plain;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use plain::Plain;

/// The widest vector of any instruction set, in lanes.
pub(crate) const LANES_MAX: usize = 16;

/// Work that can be compiled for any instruction set.
pub(crate) trait Op {
    type Out;
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// One instruction set's vector of f32. Pointers need no alignment.
pub(crate) trait Simd: Copy + Send + Sync {
    type V: Copy;
    const LANES: usize;
    /// Whether there are 32 vector registers, and not 16.
    const MANY_REGISTERS: bool;

    /// Runs `op` compiled for this instruction set.
    fn vectorize<O: Op>(self, op: O) -> O::Out;

    fn splat(self, a: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`: rounded once where the instruction set can, twice in `Plain`; always the same on one set.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Two to the power of whole numbers in -127..=128, where -127 gives zero and 128 gives infinity.
    fn exp2_whole(self, n: Self::V) -> Self::V;
    /// The sum of all lanes, in an order fixed per instruction set.
    fn sum(self, v: Self::V) -> f32;

    /// # Safety
    /// `LANES` f32 must be readable at `p`.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `LANES` f16 must be readable at `p`.
    unsafe fn load_f16(self, p: *const u8) -> Self::V;
    /// # Safety
    /// `LANES` bf16 must be readable at `p`.
    unsafe fn load_bf16(self, p: *const u8) -> Self::V;
    /// # Safety
    /// `LANES` signed bytes must be readable at `p`.
    unsafe fn load_i8(self, p: *const u8) -> Self::V;
    /// # Safety
    /// `LANES` f32 must be writable at `p`.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Asks for the cache line at `p`, which may be any address.
    fn prefetch(self, p: *const u8);

    /// Loads `n < LANES` values and zeros.
    ///
    /// # Safety
    /// `n` f32 must be readable at `p`.
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> Self::V {
        let mut buffer = [0f32; LANES_MAX];
        debug_assert!(n < Self::LANES);
        // SAFETY: the caller vouches for `n` values; the buffer holds LANES_MAX >= LANES.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n.min(LANES_MAX));
            self.load(buffer.as_ptr())
        }
    }

    /// Stores the first `n < LANES` values.
    ///
    /// # Safety
    /// `n` f32 must be writable at `p`.
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, v: Self::V, n: usize) {
        let mut buffer = [0f32; LANES_MAX];
        debug_assert!(n < Self::LANES);
        // SAFETY: the caller vouches for `n` places; the buffer holds LANES_MAX >= LANES.
        unsafe {
            self.store(buffer.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n.min(LANES_MAX));
        }
    }
}

/// A weight format: how to widen it to f32 lanes.
pub(crate) trait Weight: Copy + Send + Sync {
    const BYTES: usize;

    /// # Safety
    /// `S::LANES * BYTES` bytes must be readable at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V;

    /// Loads `n < LANES` values and zeros.
    ///
    /// # Safety
    /// `n * BYTES` bytes must be readable at `p`.
    #[inline(always)]
    unsafe fn load_part<S: Simd>(s: S, p: *const u8, n: usize) -> S::V {
        let mut buffer = [0u8; LANES_MAX * 4];
        debug_assert!(n < S::LANES);
        // SAFETY: the caller vouches for `n` values; the buffer holds LANES_MAX values of the widest format.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n.min(LANES_MAX) * Self::BYTES);
            Self::load(s, buffer.as_ptr())
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct F32;
#[derive(Clone, Copy)]
pub(crate) struct F16;
#[derive(Clone, Copy)]
pub(crate) struct Bf16;
#[derive(Clone, Copy)]
pub(crate) struct I8;

impl Weight for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: as the caller vouches; `Simd::load` needs no alignment.
        unsafe { s.load(p.cast()) }
    }
}

impl Weight for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: as the caller vouches.
        unsafe { s.load_f16(p) }
    }
}

impl Weight for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: as the caller vouches.
        unsafe { s.load_bf16(p) }
    }
}

impl Weight for I8 {
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: as the caller vouches.
        unsafe { s.load_i8(p) }
    }
}

/// Evaluates an expression with `$W` standing for the weight type of an [`crate::Element`].
macro_rules! with_weight {
    ($element:expr, $W:ident => $body:expr) => {
        match $element {
            crate::element::Element::F32 => {
                type $W = crate::simd::F32;
                $body
            }
            crate::element::Element::F16 => {
                type $W = crate::simd::F16;
                $body
            }
            crate::element::Element::Bf16 => {
                type $W = crate::simd::Bf16;
                $body
            }
            crate::element::Element::I8 => {
                type $W = crate::simd::I8;
                $body
            }
        }
    };
}
pub(crate) use with_weight;
