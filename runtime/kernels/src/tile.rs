//! The innermost loop of the products of many tokens: a small tile of outputs in registers, over one block of the sum.
//!
//! It knows neither weights nor tokens: `C[m][lane] += sum over k, in order, of A[m][k] * B[k][lane]`, all f32.
#![expect(unsafe_code, reason = "vector loads and stores through pointers")]

use crate::simd::{Op, Simd};

/// Terms of the sum in one block.
pub(crate) const BLOCK: usize = 256;
/// From one row of A to the next. Not a multiple of 4 KiB, so that rows do not fight for the same cache sets; a constant,
/// so that one register addresses all rows of a tile.
pub(crate) const A_STRIDE: usize = BLOCK + 16;

/// Lanes of a row of B: two vectors.
pub(crate) const fn strip<S: Simd>() -> usize {
    2 * S::LANES
}

/// One strip of C: `rows` rows of `lanes` lanes, which are at most two vectors. Lanes beyond `lanes` are computed up to the
/// end of the last vector used, and stored.
///
/// `APART`: the block is summed from zero and then added to C (shorter chains, smaller errors); else the sum starts at C,
/// so that all blocks make one chain.
///
/// `a` holds `rows` rows of `k <= BLOCK` values every `A_STRIDE`, `b` holds `k` rows of [`strip`] values, and `c` holds
/// `rows` rows every `c_stride`, each of `lanes` values rounded up to whole vectors. Whoever runs it answers for that.
pub(crate) struct StripOfTiles<const APART: bool> {
    pub(crate) rows: usize,
    pub(crate) lanes: usize,
    pub(crate) k: usize,
    pub(crate) a: *const f32,
    pub(crate) b: *const f32,
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
}

impl<const APART: bool> StripOfTiles<APART> {
    /// Computes the strip. Compiled once per instruction set, not into each caller.
    ///
    /// # Safety
    /// The arrays must be as large as [`StripOfTiles`] says, and `c` nobody else's.
    #[inline(always)]
    pub(crate) unsafe fn compute<S: Simd>(self, s: S) {
        s.vectorize(Vouched(self));
    }
}

/// A strip whose arrays its maker vouches for: only `compute` makes one.
struct Vouched<const APART: bool>(StripOfTiles<APART>);

impl<const APART: bool> Op for Vouched<APART> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let StripOfTiles { rows, lanes, k, a, b, c, c_stride } = self.0;
        let mut m = 0;
        macro_rules! tiles_of {
            ($M:literal) => {
                while rows - m >= $M {
                    // SAFETY: rows `m..m + M` exist, as the caller of `compute` vouches.
                    unsafe {
                        let (a, c) = (a.add(m * A_STRIDE), c.add(m * c_stride));
                        if lanes > S::LANES {
                            tile::<S, $M, 2, APART>(s, k, a, b, c, c_stride);
                        } else {
                            tile::<S, $M, 1, APART>(s, k, a, b, c, c_stride);
                        }
                    }
                    m += $M;
                }
            };
        }
        // The tile's accumulators, a row of B and one value of A fill the registers.
        if S::MANY_REGISTERS {
            tiles_of!(12);
        } else {
            tiles_of!(6);
        }
        tiles_of!(4);
        tiles_of!(1);
    }
}

/// # Safety
/// As [`StripOfTiles`], with `M` rows and `V` vectors.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const V: usize, const APART: bool>(
    s: S,
    k: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: rows below `M`, vectors below `V` and terms below `k` exist, as the caller vouches.
    unsafe {
        let mut sums = [[s.splat(0.0); V]; M];
        if !APART {
            for m in 0..M {
                for v in 0..V {
                    sums[m][v] = s.load(c.add(m * c_stride + v * S::LANES));
                }
            }
        }
        for i in 0..k {
            let row: [S::V; V] = std::array::from_fn(|v| s.load(b.add(i * strip::<S>() + v * S::LANES)));
            for m in 0..M {
                let factor = s.splat(*a.add(m * A_STRIDE + i));
                for v in 0..V {
                    sums[m][v] = s.fma(factor, row[v], sums[m][v]);
                }
            }
        }
        for m in 0..M {
            for v in 0..V {
                let place = c.add(m * c_stride + v * S::LANES);
                let sum = if APART { s.add(s.load(place), sums[m][v]) } else { sums[m][v] };
                s.store(place, sum);
            }
        }
    }
}
