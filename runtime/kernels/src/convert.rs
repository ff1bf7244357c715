//! Conversions between f32 and the number formats that weights come in. A row may begin at any address.
#![expect(unsafe_code, reason = "vector loads and stores through pointers")]

use std::marker::PhantomData;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

use crate::dispatch::Kernels;
use crate::element::Element;
use crate::row::{Places, Row};
use crate::simd::{Op, Simd, Weight, with_weight};

/// Rounds `from` to f16 (to nearest, ties to even; too large becomes infinite).
///
/// # Panics
/// If the lengths differ.
pub fn store_f16(from: &[f32], to: &mut [u16]) {
    to.reinterpret_cast_mut::<f16>().convert_from_f32_slice(from);
}

/// Rounds `from` to bf16 (to nearest, ties to even).
///
/// # Panics
/// If the lengths differ.
pub fn store_bf16(from: &[f32], to: &mut [u16]) {
    to.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(from);
}

/// Rounds `from` to bytes from -127 to 127 (to nearest, ties to even) and gives their scale, a bf16: an element is its byte times the
/// scale, within half a scale of what it was. The scale is the least for which the largest element is no more than 127; where that
/// would be subnormal, all become zero. Where an element is no finite number, nor is the scale.
///
/// # Panics
/// If the lengths differ.
pub fn store_i8(from: &[f32], to: &mut [i8]) -> f32 {
    Kernels::get().store_i8(from, to)
}

/// Widens a row to f32, exactly.
///
/// # Panics
/// If `row` does not hold exactly `to.len()` elements.
pub fn to_f32<'a>(element: Element, row: impl Into<Row<'a>>, to: &mut [f32]) {
    Kernels::get().to_f32(element, row, to);
}

impl Kernels {
    /// [`store_i8`] on this instruction set.
    pub fn store_i8(self, from: &[f32], to: &mut [i8]) -> f32 {
        assert_eq!(from.len(), to.len(), "elements against bytes");
        self.run(StoreBytes { from, to })
    }

    /// [`to_f32`] on this instruction set.
    pub fn to_f32<'a>(self, element: Element, row: impl Into<Row<'a>>, to: &mut [f32]) {
        let row = row.into();
        row.check(element, to.len());
        with_weight!(element, W => self.run(Widen { row, to, weight: PhantomData::<W> }));
    }
}

struct StoreBytes<'a> {
    from: &'a [f32],
    to: &'a mut [i8],
}

impl Op for StoreBytes<'_> {
    type Out = f32;

    /// Plain Rust, compiled for each instruction set; the same bytes on every one.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        /// Added to a number of less than 2^22, leaves it rounded to the nearest whole one in the lowest bits.
        const ROUNDING: f32 = 12_582_912.0;
        // Bits of magnitudes are ordered as the magnitudes.
        let largest = self.from.iter().fold(0, |most, v| u32::max(most, v.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        // The next bf16 that is not below.
        let scale = f32::from_bits((largest / 127.0).to_bits().div_ceil(1 << 16) << 16);
        if !(largest.is_finite() && scale >= f32::MIN_POSITIVE) {
            self.to.fill(0);
            return if largest.is_finite() { 0.0 } else { f32::NAN };
        }
        for (to, from) in self.to.iter_mut().zip(self.from) {
            *to = (from / scale + ROUNDING).to_bits() as i8;
        }
        scale
    }
}

struct Widen<'a, W> {
    row: Row<'a>,
    to: &'a mut [f32],
    weight: PhantomData<W>,
}

impl<W: Weight> Op for Widen<'_, W> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, to, weight: _ } = self;
        // SAFETY: `Kernels::to_f32` checked that `row` holds `to.len()` elements.
        unsafe { widen::<S, W>(s, row.places(), 0, to.as_mut_ptr(), to.len()) }
    }
}

/// Widens `count` elements from element `first` on, which is a multiple of `LANES`.
///
/// # Safety
/// `from` must hold `first + count` and `to` must take `count` elements.
#[inline(always)]
pub(crate) unsafe fn widen<S: Simd, W: Weight>(s: S, from: Places, first: usize, to: *mut f32, count: usize) {
    let whole = count / S::LANES * S::LANES;
    // SAFETY: all indices are below `count`.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            s.store(to.add(i), W::load(s, from, first + i));
        }
        if whole < count {
            s.store_part(to.add(whole), W::load_part(s, from, first + whole, count - whole), count - whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_value_widens_exactly_on_every_instruction_set() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        for kernels in Kernels::all_present() {
            for (element, widen) in [
                (Element::F16, (|b| f16::from_bits(b).to_f32()) as fn(u16) -> f32),
                (Element::Bf16, |b| bf16::from_bits(b).to_f32()),
            ] {
                let mut out = vec![0f32; bits.len()];
                kernels.to_f32(element, &bytes[..], &mut out);
                for (&b, &got) in bits.iter().zip(&out) {
                    let want = widen(b);
                    assert!(
                        want.to_bits() == got.to_bits() || (want.is_nan() && got.is_nan()),
                        "{kernels:?} {element:?} {b:#06x}: {got} for {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn bytes_are_those_of_the_twin_on_every_instruction_set() {
        for kernels in Kernels::all_present() {
            for n in (0..70).chain([128, 257]) {
                for size in [1.0, 3e-5, 8e4, 1e-38, 1e-42, 3e38] {
                    let row: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1013) as f32 / 506.5 - 1.0) * size).collect();
                    let mut bytes = vec![5; n];
                    let scale = kernels.store_i8(&row, &mut bytes);
                    let (expected, expected_scale) = crate::reference::store_i8(&row);
                    assert_eq!((scale, &bytes), (expected_scale.to_f32(), &expected), "{kernels:?} {n} of {size:e}");
                    if scale > 0.0 {
                        let near = |(v, byte): (&f32, &i8)| (v - f32::from(*byte) * scale).abs() <= 0.5001 * scale;
                        assert!(row.iter().zip(&bytes).all(near), "{kernels:?} {n} of {size:e}");
                        assert!(bytes.iter().any(|byte| byte.unsigned_abs() >= 126), "{kernels:?}: {bytes:?}");
                    }
                }
            }
            for wrong in [f32::NAN, f32::INFINITY, f32::from_bits(0x7fff_ffff)] {
                assert!(kernels.store_i8(&[1.0, wrong], &mut [0; 2]).is_nan());
            }
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even_and_comes_back() {
        let values =
            [0.0, -0.0, 1.0, -2.5, 65504.0, 65520.0, 1e-7, 6e-8, f32::INFINITY, f32::NEG_INFINITY, 1.0 + 1.0 / 2048.0];
        for n in 0..=values.len() {
            let mut half = vec![0u16; n];
            store_f16(&values[..n], &mut half);
            let mut brain = vec![0u16; n];
            store_bf16(&values[..n], &mut brain);
            for i in 0..n {
                assert_eq!(half[i], f16::from_f32(values[i]).to_bits());
                assert_eq!(brain[i], bf16::from_f32(values[i]).to_bits());
            }
        }
        let mut nan = [0u16; 1];
        store_f16(&[f32::NAN], &mut nan);
        assert!(f16::from_bits(nan[0]).is_nan());
        store_bf16(&[f32::NAN], &mut nan);
        assert!(bf16::from_bits(nan[0]).is_nan());
    }
}
