//! Dot products in integers: rows of bytes or half bytes with a vector rounded to 16 bits.
//!
//! Widening every weight to f32 costs more than reading it from memory. So where rows are integers, the vector is
//! rounded to integers as well, once for all rows: blocks of [`INPUT_BLOCK`] elements, each with a scale, so that the
//! largest of a block becomes 32767. An element is off by at most 2^-16 of its block's largest, less than f16 would take from
//! most. Products and sums within a group of weights are exact. The last block may be shorter, a multiple of [`PIECE_MIN`];
//! elements after it stay f32.
#![expect(unsafe_code, reason = "vector loads through pointers")]

use std::cell::RefCell;

use crate::dispatch::Kernels;
use crate::element::Element;
use crate::row::Places;
use crate::simd::{Op, Simd, Weight};

/// Elements of a vector that are rounded with one scale; their sums fit 32 bits many times over.
pub(crate) const INPUT_BLOCK: usize = 128;
/// Elements of a block are a multiple of this.
pub(crate) const PIECE_MIN: usize = 32;
/// The largest rounded element.
const LARGEST: f32 = 32767.0;

/// How many elements of a vector are rounded: those in blocks.
pub(crate) fn whole_cols(cols: usize) -> usize {
    cols / PIECE_MIN * PIECE_MIN
}

/// Vectors of equal length, rounded.
#[derive(Default)]
struct Rounded {
    numbers: Vec<i16>,
    scales: Vec<f32>,
}

/// A vector as dot products see it.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) floats: &'a [f32],
    /// Of all blocks; empty for rows that are not integers.
    pub(crate) numbers: &'a [i16],
    /// One for each block.
    pub(crate) scales: &'a [f32],
}

/// Elements of vectors that are rounded on the stack, so that work which any thread may take, such as attention's, allocates on none.
const ON_STACK: usize = 1024;

thread_local! {
    /// Larger rounded vectors that are not in use: room for them is allocated once.
    static ROOM: RefCell<Vec<Rounded>> = const { RefCell::new(Vec::new()) };
}

/// Several vectors: token `t` is the `t`-th of them.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    floats: &'a [f32],
    cols: usize,
    stride: usize,
    /// Integers and scales.
    rounded: Option<(&'a [i16], &'a [f32])>,
}

impl<'a> Inputs<'a> {
    pub(crate) fn token(&self, t: usize) -> Input<'a> {
        let floats = &self.floats[t * self.stride..][..self.cols];
        let Some((numbers, scales)) = self.rounded else { return Input { floats, numbers: &[], scales: &[] } };
        let whole = whole_cols(self.cols);
        let blocks = whole.div_ceil(INPUT_BLOCK);
        Input { floats, numbers: &numbers[t * whole..][..whole], scales: &scales[t * blocks..][..blocks] }
    }
}

impl Kernels {
    /// Calls `work` with `tokens` vectors of `cols` elements, which begin every `stride`, prepared for rows of `element`.
    pub(crate) fn with_inputs<T>(
        self,
        element: Element,
        (floats, tokens, cols, stride): (&[f32], usize, usize, usize),
        work: impl FnOnce(Inputs<'_>) -> T,
    ) -> T {
        if !element.is_whole() {
            return work(Inputs { floats, cols, stride, rounded: None });
        }
        let whole = whole_cols(cols);
        let blocks = whole.div_ceil(INPUT_BLOCK);
        let round = |numbers: &mut [i16], scales: &mut [f32]| {
            for t in 0..tokens {
                self.run(Round {
                    floats: &floats[t * stride..][..whole],
                    numbers: &mut numbers[t * whole..][..whole],
                    scales: &mut scales[t * blocks..][..blocks],
                });
            }
        };
        // A short last block has a scale too.
        if tokens * whole <= ON_STACK && tokens * blocks <= ON_STACK / PIECE_MIN {
            let (mut numbers, mut scales) = ([0; ON_STACK], [0.0; ON_STACK / PIECE_MIN]);
            round(&mut numbers, &mut scales);
            return work(Inputs { floats, cols, stride, rounded: Some((&numbers, &scales)) });
        }
        let mut rounded = ROOM.with_borrow_mut(Vec::pop).unwrap_or_default();
        exactly(&mut rounded.numbers, tokens * whole);
        exactly(&mut rounded.scales, tokens * blocks);
        round(&mut rounded.numbers, &mut rounded.scales);
        let result = work(Inputs { floats, cols, stride, rounded: Some((&rounded.numbers, &rounded.scales)) });
        ROOM.with_borrow_mut(|room| room.push(rounded));
        result
    }
}

/// Makes room for `len` elements and no more, unless there is more.
fn exactly<T: Default + Clone>(list: &mut Vec<T>, len: usize) {
    if list.capacity() < len {
        list.clear();
        list.reserve_exact(len);
    }
    list.resize(len, T::default());
}

/// Rounds blocks, of which the last may be shorter.
struct Round<'a> {
    floats: &'a [f32],
    numbers: &'a mut [i16],
    scales: &'a mut [f32],
}

impl Op for Round<'_> {
    type Out = ();

    /// Plain Rust, compiled for each instruction set; the same numbers on every one.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (floats, last_floats) = self.floats.as_chunks::<INPUT_BLOCK>();
        let (numbers, last_numbers) = self.numbers.as_chunks_mut::<INPUT_BLOCK>();
        let mut scales = self.scales.iter_mut();
        for ((floats, numbers), scale) in floats.iter().zip(numbers).zip(scales.by_ref()) {
            *scale = round_block(floats, numbers);
        }
        if let Some(scale) = scales.next() {
            let (mut floats, mut numbers) = ([0.0; INPUT_BLOCK], [0; INPUT_BLOCK]);
            floats[..last_floats.len()].copy_from_slice(last_floats);
            *scale = round_block(&floats, &mut numbers);
            last_numbers.copy_from_slice(&numbers[..last_floats.len()]);
        }
    }
}

/// Rounds one block and returns its scale: not a number if an element is infinite or none, as the sums are to be then.
#[inline(always)]
pub(crate) fn round_block(floats: &[f32; INPUT_BLOCK], numbers: &mut [i16; INPUT_BLOCK]) -> f32 {
    /// Added to a number of less than 2^22, leaves it rounded to the nearest whole one in the lowest bits.
    const ROUNDING: f32 = 12_582_912.0;
    // Bits of magnitudes are ordered as the magnitudes, and those that are no numbers come last.
    let largest = floats.iter().fold(0, |most, v| u32::max(most, v.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    let factor = LARGEST / largest;
    if !(largest.is_finite() && factor.is_finite()) {
        numbers.fill(0);
        return if largest.is_finite() { 0.0 } else { f32::NAN };
    }
    for (number, float) in numbers.iter_mut().zip(floats) {
        *number = (float * factor + ROUNDING).to_bits() as i16;
    }
    largest / LARGEST
}

/// Adds the dot products of `R` rows with the blocks of `T` vectors to `sums`, lane by lane. `ask` is called for each block of each
/// row, to ask for what is wanted later.
///
/// # Safety
/// Each of `rows` must hold as many elements as each of `inputs`, and all must have groups of the same size.
#[inline(always)]
pub(crate) unsafe fn add_dots<S: Simd, W: Weight, const R: usize, const T: usize>(
    s: S,
    rows: [Places; R],
    inputs: [Input<'_>; T],
    sums: &mut [[S::V; T]; R],
    ask: impl Fn(usize, usize),
) {
    // SAFETY: as the caller vouches.
    unsafe {
        match rows[0].shift {
            5 => add_pieces::<S, W, R, T, PIECE_MIN>(s, rows, inputs, sums, ask),
            6 => add_pieces::<S, W, R, T, 64>(s, rows, inputs, sums, ask),
            _ => add_pieces::<S, W, R, T, INPUT_BLOCK>(s, rows, inputs, sums, ask),
        }
    }
}

/// [`add_dots`] for groups of `PIECE` elements, or of a multiple of [`INPUT_BLOCK`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn add_pieces<S: Simd, W: Weight, const R: usize, const T: usize, const PIECE: usize>(
    s: S,
    rows: [Places; R],
    inputs: [Input<'_>; T],
    sums: &mut [[S::V; T]; R],
    ask: impl Fn(usize, usize),
) {
    let (whole, blocks) = (inputs[0].numbers.len(), inputs[0].scales.len());
    let full = whole / INPUT_BLOCK;
    // SAFETY: as the caller vouches.
    unsafe {
        for block in 0..full {
            add_block::<S, W, R, T, PIECE>(s, rows, inputs, (block, INPUT_BLOCK), sums, &ask);
        }
        if full < blocks {
            let len = whole - full * INPUT_BLOCK;
            add_block::<S, W, R, T, PIECE_MIN>(s, rows, inputs, (full, len), sums, &ask);
        }
    }
}

/// One block of [`add_pieces`]: which one, and its elements.
///
/// # Safety
/// As there; `PIECE` divides the block's elements and those of a group.
#[inline(always)]
unsafe fn add_block<S: Simd, W: Weight, const R: usize, const T: usize, const PIECE: usize>(
    s: S,
    rows: [Places; R],
    inputs: [Input<'_>; T],
    (block, len): (usize, usize),
    sums: &mut [[S::V; T]; R],
    ask: impl Fn(usize, usize),
) {
    let mut parts = [[s.splat(0.0); T]; R];
    // Two groups of 32 at a time; of another size, groups are taken one by one, or in parts.
    let pairs = if PIECE == PIECE_MIN && rows[0].shift == PIECE_MIN.trailing_zeros() {
        len / (2 * PIECE) * 2 * PIECE
    } else {
        0
    };
    for start in (0..pairs).step_by(2 * PIECE) {
        let at = block * INPUT_BLOCK + start;
        // SAFETY: `at + 2 * PIECE` elements are in every row and in the numbers.
        unsafe {
            let numbers = inputs.map(|input| input.numbers.as_ptr().add(at));
            // Loops, as a closure that is not inlined would be compiled for another instruction set.
            let mut begin = [[s.no_sums(); 2]; T];
            for t in 0..T {
                begin[t] = W::groups_start(s, numbers[t]);
            }
            for r in 0..R {
                for t in 0..T {
                    parts[r][t] = W::add_groups(s, parts[r][t], begin[t], rows[r], at, numbers[t]);
                }
            }
        }
    }
    for start in (pairs..len).step_by(PIECE) {
        let at = block * INPUT_BLOCK + start;
        // SAFETY: `at + PIECE` elements are in every row and in the numbers.
        unsafe {
            let numbers = inputs.map(|input| input.numbers.as_ptr().add(at));
            let mut begin = [s.no_sums(); T];
            for t in 0..T {
                begin[t] = W::whole_start::<S, PIECE>(s, numbers[t]);
            }
            for r in 0..R {
                let scale = W::scale(s, rows[r], at);
                // What is loaded and unpacked of the row is so once for all.
                for t in 0..T {
                    let whole = W::add_whole::<S, PIECE>(s, begin[t], rows[r], at, numbers[t]);
                    parts[r][t] = s.fma(s.floats(whole), scale, parts[r][t]);
                }
            }
        }
    }
    let mut scales = [s.splat(0.0); T];
    for t in 0..T {
        // SAFETY: each input has a scale for each block.
        scales[t] = s.splat(unsafe { *inputs[t].scales.get_unchecked(block) });
    }
    for r in 0..R {
        ask(r, block * INPUT_BLOCK);
        for t in 0..T {
            sums[r][t] = s.fma(parts[r][t], scales[t], sums[r][t]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(floats: &[f32; INPUT_BLOCK]) -> (f32, [i16; INPUT_BLOCK]) {
        let mut numbers = [7; INPUT_BLOCK];
        (round_block(floats, &mut numbers), numbers)
    }

    #[test]
    fn blocks_are_rounded_to_the_nearest() {
        let floats = std::array::from_fn(|i| (i as f32 - 64.0) * 0.37);
        let (scale, numbers) = rounded(&floats);
        assert_eq!(numbers[0], -32767);
        for (float, number) in floats.iter().zip(numbers) {
            assert!((f32::from(number) * scale - float).abs() <= 0.501 * scale, "{float}: {number} x {scale}");
        }
    }

    #[test]
    fn zeros_tiny_and_infinite_numbers() {
        let with = |v| std::array::from_fn(|i| if i == 3 { v } else { 0.0 });
        for nothing in [0.0, -0.0, 1e-45, 1e-37] {
            assert_eq!(rounded(&with(nothing)), (0.0, [0; INPUT_BLOCK]), "{nothing}");
        }
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(rounded(&with(wrong)).0.is_nan(), "{wrong}");
        }
        let (scale, numbers) = rounded(&with(1e38));
        assert_eq!(numbers[3], 32767);
        assert!((scale * 32767.0 - 1e38).abs() < 1e32);
    }
}
