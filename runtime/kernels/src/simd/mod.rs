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

use crate::element::Q4_BLOCK;
use crate::row::{Places, SCALE_BYTES};

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
    /// Sums of products of integers, 32 bits each, as many as `V` has lanes.
    type Sums: Copy;
    /// Pairs of 16-bit integers, as many as `V` has lanes.
    type Pairs: Copy;
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
    /// Two to the power of integers in -127..=128, where -127 gives zero and 128 gives infinity.
    fn exp2_whole(self, n: Self::V) -> Self::V;
    /// The sum of all lanes, in an order fixed per instruction set.
    fn sum(self, v: Self::V) -> f32;
    /// The sums of four vectors, each in that order.
    #[inline(always)]
    fn sum_four(self, v: [Self::V; 4]) -> [f32; 4] {
        v.map(|v| self.sum(v))
    }
    /// A bit for each lane of `a` that is greater than that of `b`, the first lowest; none where either is NaN.
    fn greater(self, a: Self::V, b: Self::V) -> u32;

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
    /// The low halves of bytes, as integers from -8 to 7.
    ///
    /// # Safety
    /// `LANES` bytes must be readable at `p`.
    unsafe fn load_low_nibbles(self, p: *const u8) -> Self::V;
    /// The high halves likewise.
    ///
    /// # Safety
    /// `LANES` bytes must be readable at `p`.
    unsafe fn load_high_nibbles(self, p: *const u8) -> Self::V;
    /// Sums of nothing.
    fn no_sums(self) -> Self::Sums;
    fn add_sums(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// The sums as f32, rounded.
    fn floats(self, sums: Self::Sums) -> Self::V;
    /// Adds the products of `Q4_BLOCK` signed bytes with as many numbers.
    ///
    /// # Safety
    /// Both must be readable.
    unsafe fn add_bytes(self, sums: Self::Sums, bytes: *const u8, numbers: *const i16) -> Self::Sums;
    /// What sums for [`Self::add_nibbles`] over these numbers start from. (Where nibbles are taken for 0 to 15 instead of -8
    /// to 7, that is -8 times the numbers, once for many rows.)
    ///
    /// # Safety
    /// `BLOCKS * Q4_BLOCK` numbers must be readable.
    unsafe fn nibbles_start<const BLOCKS: usize>(self, numbers: *const i16) -> Self::Sums;
    /// Adds the products of one or two blocks of four-bit numbers with as many numbers.
    ///
    /// # Safety
    /// `BLOCKS` blocks and `BLOCKS * Q4_BLOCK` numbers must be readable.
    unsafe fn add_nibbles<const BLOCKS: usize>(
        self,
        sums: Self::Sums,
        blocks: *const u8,
        numbers: *const i16,
    ) -> Self::Sums;

    /// What [`Self::add_nibble_groups`] over these numbers starts from.
    ///
    /// # Safety
    /// `2 * Q4_BLOCK` numbers must be readable.
    #[inline(always)]
    unsafe fn nibble_groups_start(self, numbers: *const i16) -> [Self::Sums; 2] {
        // SAFETY: as the caller vouches.
        unsafe { [self.nibbles_start::<1>(numbers), self.nibbles_start::<1>(numbers.add(Q4_BLOCK))] }
    }
    /// Adds the products of two blocks of four-bit numbers with as many numbers, each block's times its scale, a bf16 at `scales`.
    ///
    /// # Safety
    /// Blocks, numbers and scales must be readable.
    #[inline(always)]
    unsafe fn add_nibble_groups(
        self,
        sums: Self::V,
        start: [Self::Sums; 2],
        blocks: *const u8,
        numbers: *const i16,
        scales: *const u8,
    ) -> Self::V {
        // SAFETY: as the caller vouches.
        unsafe {
            let [first, second] = self.two_scales(scales);
            let sums = self.fma(self.floats(self.add_nibbles::<1>(start[0], blocks, numbers)), first, sums);
            let of_second = self.add_nibbles::<1>(start[1], blocks.add(Q4_BLOCK / 2), numbers.add(Q4_BLOCK));
            self.fma(self.floats(of_second), second, sums)
        }
    }
    /// Two neighbouring scales, bf16, each in every lane.
    ///
    /// # Safety
    /// They must be readable at `p`.
    #[inline(always)]
    unsafe fn two_scales(self, p: *const u8) -> [Self::V; 2] {
        // SAFETY: as the caller vouches.
        let both = u32::from_le(unsafe { p.cast::<u32>().read_unaligned() });
        [self.splat(f32::from_bits(both << 16)), self.splat(f32::from_bits(both & 0xffff_0000))]
    }

    /// # Safety
    /// `LANES` pairs must be readable at `p`.
    unsafe fn load_pairs(self, p: *const i16) -> Self::Pairs;
    /// One pair in every lane.
    ///
    /// # Safety
    /// A pair must be readable at `p`.
    unsafe fn splat_pair(self, p: *const i16) -> Self::Pairs;
    /// Adds the two products of each lane.
    fn add_pairs(self, sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums;

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
///
/// Elements are addressed by their number in the row, always a multiple of `LANES`; so no vector reaches over two groups of a
/// quantised row.
pub(crate) trait Weight: Copy + Send + Sync {
    /// Whether rows are integers, whose dot products are taken in integers (`whole.rs`).
    const WHOLE: bool = false;

    /// Bytes that `count` elements take, a multiple of two.
    fn bytes(count: usize) -> usize;

    /// # Safety
    /// Elements `at..at + LANES` must be in the row.
    unsafe fn load<S: Simd>(s: S, row: Places, at: usize) -> S::V;

    /// Two vectors; `at` is a multiple of `2 * LANES`.
    ///
    /// # Safety
    /// Elements `at..at + 2 * LANES` must be in the row.
    #[inline(always)]
    unsafe fn load_two<S: Simd>(s: S, row: Places, at: usize) -> [S::V; 2] {
        // SAFETY: as the caller vouches.
        unsafe { [Self::load(s, row, at), Self::load(s, row, at + S::LANES)] }
    }

    /// Loads `n < LANES` values and zeros.
    ///
    /// # Safety
    /// Elements `at..at + n` must be in the row.
    unsafe fn load_part<S: Simd>(s: S, row: Places, at: usize, n: usize) -> S::V;

    /// Asks for the scales of a row of `cols` elements.
    #[inline(always)]
    fn ask_scales<S: Simd>(_s: S, _row: Places, _cols: usize) {}

    /// What [`Self::add_whole`] starts from with these numbers, for every row.
    ///
    /// # Safety
    /// `PIECE` numbers must be readable.
    #[inline(always)]
    unsafe fn whole_start<S: Simd, const PIECE: usize>(s: S, _numbers: *const i16) -> S::Sums {
        s.no_sums()
    }

    /// Adds the products of elements `at..at + PIECE`, without their scale, with as many numbers. `PIECE` is 32, 64 or 128, and `at`
    /// a multiple of it.
    ///
    /// # Safety
    /// These elements must be in the row and the numbers readable; rows must be `WHOLE`.
    #[inline(always)]
    unsafe fn add_whole<S: Simd, const PIECE: usize>(
        _s: S,
        sums: S::Sums,
        _row: Places,
        _at: usize,
        _numbers: *const i16,
    ) -> S::Sums {
        debug_assert!(Self::WHOLE);
        sums
    }

    /// What [`Self::add_groups`] starts from with these numbers, for every row.
    ///
    /// # Safety
    /// `2 * Q4_BLOCK` numbers must be readable.
    #[inline(always)]
    unsafe fn groups_start<S: Simd>(s: S, numbers: *const i16) -> [S::Sums; 2] {
        // SAFETY: as the caller vouches.
        unsafe {
            [Self::whole_start::<S, Q4_BLOCK>(s, numbers), Self::whole_start::<S, Q4_BLOCK>(s, numbers.add(Q4_BLOCK))]
        }
    }

    /// Adds the products of two groups of 32 elements from `at` on with as many numbers, each group's times its scale.
    ///
    /// # Safety
    /// These elements must be in the row, whose groups must have 32, and the numbers readable; rows must be `WHOLE`.
    #[inline(always)]
    unsafe fn add_groups<S: Simd>(
        s: S,
        sums: S::V,
        start: [S::Sums; 2],
        row: Places,
        at: usize,
        numbers: *const i16,
    ) -> S::V {
        // SAFETY: as the caller vouches.
        unsafe {
            let [first, second] = s.two_scales(row.scales.add((at >> row.shift) * SCALE_BYTES));
            let of_first = Self::add_whole::<S, Q4_BLOCK>(s, start[0], row, at, numbers);
            let of_second = Self::add_whole::<S, Q4_BLOCK>(s, start[1], row, at + Q4_BLOCK, numbers.add(Q4_BLOCK));
            s.fma(s.floats(of_second), second, s.fma(s.floats(of_first), first, sums))
        }
    }

    /// The scale of the group of element `at`; one where rows have none.
    ///
    /// # Safety
    /// Element `at` must be in the row.
    #[inline(always)]
    unsafe fn scale_of(_row: Places, _at: usize) -> f32 {
        1.0
    }

    /// The same in every lane.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn scale<S: Simd>(s: S, row: Places, at: usize) -> S::V {
        // SAFETY: as the caller vouches.
        s.splat(unsafe { Self::scale_of(row, at) })
    }

    /// The integers of as many elements as `to` has, from `at` on: both are multiples of 32.
    ///
    /// # Safety
    /// These elements must be in the row; rows must be `WHOLE`.
    #[inline(always)]
    unsafe fn unpack(_row: Places, _at: usize, _to: &mut [i16]) {
        debug_assert!(Self::WHOLE);
    }
}

/// Loads `n < LANES` values of `BYTES` each through a buffer, and zeros.
///
/// # Safety
/// `n * BYTES` bytes must be readable at `p`; `load` reads `LANES` values.
#[inline(always)]
unsafe fn load_part<S: Simd, const BYTES: usize>(p: *const u8, n: usize, load: impl Fn(*const u8) -> S::V) -> S::V {
    let mut buffer = [0u8; LANES_MAX * 4];
    debug_assert!(n < S::LANES);
    // SAFETY: the caller vouches for `n` values; the buffer holds LANES_MAX values of the widest format.
    unsafe { std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n.min(LANES_MAX) * BYTES) };
    load(buffer.as_ptr())
}

macro_rules! plain_weight {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, $load:ident $(, $($more:tt)*)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name;
        impl Weight for $name {
            #[inline(always)]
            fn bytes(count: usize) -> usize {
                count * $bytes
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, row: Places, at: usize) -> S::V {
                // SAFETY: as the caller vouches; loads need no alignment.
                unsafe { s.$load(row.values.add(at * $bytes).cast()) }
            }
            #[inline(always)]
            unsafe fn load_part<S: Simd>(s: S, row: Places, at: usize, n: usize) -> S::V {
                // SAFETY: as the caller vouches; the buffer takes LANES values.
                unsafe { load_part::<S, $bytes>(row.values.add(at * $bytes), n, |p| s.$load(p.cast())) }
            }
            $($($more)*)?
        }
    };
}
plain_weight!(
    /// Single precision.
    F32, 4, load
);
plain_weight!(
    /// Half precision.
    F16, 2, load_f16
);
plain_weight!(
    /// The upper half of single precision.
    Bf16, 2, load_bf16
);
plain_weight!(
    /// Signed bytes.
    I8, 1, load_i8,
    const WHOLE: bool = true;
    #[inline(always)]
    unsafe fn add_whole<S: Simd, const PIECE: usize>(
        s: S,
        mut sums: S::Sums,
        row: Places,
        at: usize,
        numbers: *const i16,
    ) -> S::Sums {
        for i in (0..PIECE).step_by(Q4_BLOCK) {
            // SAFETY: as the caller vouches.
            sums = unsafe { s.add_bytes(sums, row.values.add(at + i), numbers.add(i)) };
        }
        sums
    }
    #[inline(always)]
    unsafe fn unpack(row: Places, at: usize, to: &mut [i16]) {
        // SAFETY: as the caller vouches.
        unsafe { unpack_bytes(row.values.add(at), to) }
    }
);

/// The scale of the group of element `at`.
///
/// # Safety
/// Element `at` must be in the row, and the row quantised.
#[inline(always)]
unsafe fn scale_of(row: Places, at: usize) -> f32 {
    // SAFETY: as the caller vouches.
    let bits = unsafe { row.scales.add((at >> row.shift) * SCALE_BYTES).cast::<u16>().read_unaligned() };
    f32::from_bits(u32::from(u16::from_le(bits)) << 16)
}

/// The same in every lane.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn scale<S: Simd>(s: S, row: Places, at: usize) -> S::V {
    // SAFETY: as the caller vouches.
    s.splat(unsafe { scale_of(row, at) })
}

/// Signed bytes as wider integers.
///
/// # Safety
/// As many must be readable at `p`.
#[inline(always)]
unsafe fn unpack_bytes(p: *const u8, to: &mut [i16]) {
    // SAFETY: as the caller vouches.
    let bytes = unsafe { std::slice::from_raw_parts(p.cast::<i8>(), to.len()) };
    to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = i16::from(*byte));
}

/// Asks for all scales of a row.
#[inline(always)]
fn ask_scales<S: Simd>(s: S, row: Places, cols: usize) {
    let bytes = cols.div_ceil(1 << row.shift) * SCALE_BYTES;
    let mut line = 0;
    while line < bytes {
        s.prefetch(row.scales.wrapping_add(line));
        line += 64;
    }
}

/// Signed bytes with scales.
#[derive(Clone, Copy)]
pub(crate) struct Q8;

impl Weight for Q8 {
    const WHOLE: bool = true;

    #[inline(always)]
    fn bytes(count: usize) -> usize {
        count
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, row: Places, at: usize) -> S::V {
        // SAFETY: as the caller vouches.
        unsafe { s.mul(I8::load(s, row, at), scale(s, row, at)) }
    }
    #[inline(always)]
    unsafe fn load_two<S: Simd>(s: S, row: Places, at: usize) -> [S::V; 2] {
        // SAFETY: as the caller vouches; both vectors are in one group, which is a multiple of 32 elements.
        unsafe {
            let scale = scale(s, row, at);
            [s.mul(I8::load(s, row, at), scale), s.mul(I8::load(s, row, at + S::LANES), scale)]
        }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(s: S, row: Places, at: usize, n: usize) -> S::V {
        // SAFETY: as the caller vouches.
        unsafe { s.mul(I8::load_part(s, row, at, n), scale(s, row, at)) }
    }
    #[inline(always)]
    fn ask_scales<S: Simd>(s: S, row: Places, cols: usize) {
        ask_scales(s, row, cols);
    }
    #[inline(always)]
    unsafe fn add_whole<S: Simd, const PIECE: usize>(
        s: S,
        sums: S::Sums,
        row: Places,
        at: usize,
        numbers: *const i16,
    ) -> S::Sums {
        // SAFETY: as the caller vouches; the values are bytes.
        unsafe { I8::add_whole::<S, PIECE>(s, sums, row, at, numbers) }
    }
    #[inline(always)]
    unsafe fn scale_of(row: Places, at: usize) -> f32 {
        // SAFETY: as the caller vouches.
        unsafe { scale_of(row, at) }
    }
    #[inline(always)]
    unsafe fn unpack(row: Places, at: usize, to: &mut [i16]) {
        // SAFETY: as the caller vouches.
        unsafe { unpack_bytes(row.values.add(at), to) }
    }
}

/// Elements that [`Simd::add_nibbles`] takes at once.
const TWO_BLOCKS: usize = 2 * Q4_BLOCK;

/// Four-bit numbers with scales, in blocks of 32.
#[derive(Clone, Copy)]
pub(crate) struct Q4;

impl Q4 {
    /// The integers of elements `at..at + LANES`.
    ///
    /// # Safety
    /// As [`Weight::load`].
    #[inline(always)]
    unsafe fn numbers<S: Simd>(s: S, row: Places, at: usize) -> S::V {
        const HALF: usize = Q4_BLOCK / 2;
        // SAFETY: a row holds whole blocks, and a vector lies within one half of one.
        unsafe {
            let p = row.values.add(at / Q4_BLOCK * HALF + at % HALF);
            if at & HALF == 0 { s.load_low_nibbles(p) } else { s.load_high_nibbles(p) }
        }
    }
}

impl Weight for Q4 {
    const WHOLE: bool = true;

    #[inline(always)]
    fn bytes(count: usize) -> usize {
        count / 2
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, row: Places, at: usize) -> S::V {
        // SAFETY: as the caller vouches.
        unsafe { s.mul(Self::numbers(s, row, at), scale(s, row, at)) }
    }
    #[inline(always)]
    unsafe fn load_two<S: Simd>(s: S, row: Places, at: usize) -> [S::V; 2] {
        const HALF: usize = Q4_BLOCK / 2;
        // SAFETY: as the caller vouches; both vectors are in one block, and so in one group.
        unsafe {
            let scale = scale(s, row, at);
            let numbers = if S::LANES == HALF {
                let p = row.values.add(at / 2);
                [s.load_low_nibbles(p), s.load_high_nibbles(p)]
            } else {
                [Self::numbers(s, row, at), Self::numbers(s, row, at + S::LANES)]
            };
            numbers.map(|v| s.mul(v, scale))
        }
    }
    /// After the last element stand zeros, or whatever a damaged file has there: it meets zeros or is not kept.
    #[inline(always)]
    unsafe fn load_part<S: Simd>(s: S, row: Places, at: usize, _n: usize) -> S::V {
        // SAFETY: a row holds whole blocks.
        unsafe { Self::load(s, row, at) }
    }
    #[inline(always)]
    fn ask_scales<S: Simd>(s: S, row: Places, cols: usize) {
        ask_scales(s, row, cols);
    }
    #[inline(always)]
    unsafe fn whole_start<S: Simd, const PIECE: usize>(s: S, numbers: *const i16) -> S::Sums {
        // SAFETY: as the caller vouches.
        unsafe {
            match PIECE {
                Q4_BLOCK => s.nibbles_start::<1>(numbers),
                TWO_BLOCKS => s.nibbles_start::<2>(numbers),
                _ => s.add_sums(s.nibbles_start::<2>(numbers), s.nibbles_start::<2>(numbers.add(TWO_BLOCKS))),
            }
        }
    }
    #[inline(always)]
    unsafe fn groups_start<S: Simd>(s: S, numbers: *const i16) -> [S::Sums; 2] {
        // SAFETY: as the caller vouches.
        unsafe { s.nibble_groups_start(numbers) }
    }
    #[inline(always)]
    unsafe fn add_groups<S: Simd>(
        s: S,
        sums: S::V,
        start: [S::Sums; 2],
        row: Places,
        at: usize,
        numbers: *const i16,
    ) -> S::V {
        // SAFETY: as the caller vouches; a byte holds two elements.
        unsafe {
            let scales = row.scales.add((at >> row.shift) * SCALE_BYTES);
            s.add_nibble_groups(sums, start, row.values.add(at / 2), numbers, scales)
        }
    }
    #[inline(always)]
    unsafe fn add_whole<S: Simd, const PIECE: usize>(
        s: S,
        sums: S::Sums,
        row: Places,
        at: usize,
        numbers: *const i16,
    ) -> S::Sums {
        // SAFETY: as the caller vouches; a byte holds two elements.
        unsafe {
            let p = row.values.add(at / 2);
            match PIECE {
                Q4_BLOCK => s.add_nibbles::<1>(sums, p, numbers),
                TWO_BLOCKS => s.add_nibbles::<2>(sums, p, numbers),
                _ => {
                    let sums = s.add_nibbles::<2>(sums, p, numbers);
                    s.add_nibbles::<2>(sums, p.add(Q4_BLOCK), numbers.add(TWO_BLOCKS))
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn scale_of(row: Places, at: usize) -> f32 {
        // SAFETY: as the caller vouches.
        unsafe { scale_of(row, at) }
    }
    #[inline(always)]
    unsafe fn unpack(row: Places, at: usize, to: &mut [i16]) {
        const HALF: usize = Q4_BLOCK / 2;
        for (i, to) in to.as_chunks_mut::<Q4_BLOCK>().0.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the block.
            let bytes = unsafe { row.values.add(at / 2 + i * HALF).cast::<[i8; HALF]>().read() };
            for (j, byte) in bytes.into_iter().enumerate() {
                to[j] = i16::from((byte << 4) >> 4);
                to[HALF + j] = i16::from(byte >> 4);
            }
        }
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
            crate::element::Element::Q8 => {
                type $W = crate::simd::Q8;
                $body
            }
            crate::element::Element::Q4 => {
                type $W = crate::simd::Q4;
                $body
            }
        }
    };
}
pub(crate) use with_weight;
