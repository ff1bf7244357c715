//! One row of weights: its values, and the scales that go with them where they are integers.
//!
//! A quantised row is cut into groups of equally many elements. An element is its integer times the scale of its group, which
//! is exact in f32: a scale has 8 significant bits. Four-bit numbers share bytes within blocks of [`Q4_BLOCK`]
//! elements, such that a vector of them is a plain load: byte `i` of a block holds element `i` in its low half and element
//! `i + 16` in its high half, as two's complement.

use crate::element::{Element, Q4_BLOCK};

/// Bytes of a scale: a bf16.
pub const SCALE_BYTES: usize = 2;

/// How many neighbouring elements of a row share a scale: a power of two from 32 to 2^20. The last group of a row may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScaleGroup {
    shift: u8,
}

impl ScaleGroup {
    /// Groups of `elements`, if that is allowed.
    pub const fn new(elements: usize) -> Option<Self> {
        if elements.is_power_of_two() && elements >= Q4_BLOCK && elements <= 1 << 20 {
            Some(Self { shift: elements.trailing_zeros() as u8 })
        } else {
            None
        }
    }

    /// Elements of a group.
    pub const fn elements(self) -> usize {
        1 << self.shift
    }

    /// Groups of a row.
    pub const fn count(self, cols: usize) -> usize {
        cols.div_ceil(self.elements())
    }

    /// Bytes of a row's scales.
    pub const fn scale_bytes(self, cols: usize) -> usize {
        self.count(cols) * SCALE_BYTES
    }
}

/// The bytes of one row, and its scales if its element has them.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    values: &'a [u8],
    scales: &'a [u8],
    shift: u8,
}

impl<'a> From<&'a [u8]> for Row<'a> {
    fn from(values: &'a [u8]) -> Self {
        Self { values, scales: &[], shift: 0 }
    }
}

impl<'a> From<&'a Vec<u8>> for Row<'a> {
    fn from(values: &'a Vec<u8>) -> Self {
        values.as_slice().into()
    }
}

impl<'a> Row<'a> {
    /// A row of integers; `scales` are bf16, one for each group.
    pub fn quantised(values: &'a [u8], scales: &'a [u8], group: ScaleGroup) -> Self {
        Self { values, scales, shift: group.shift }
    }

    /// The values' bytes.
    pub fn values(self) -> &'a [u8] {
        self.values
    }

    /// The scales' bytes; none where the element has no scales.
    pub fn scales(self) -> &'a [u8] {
        self.scales
    }

    /// The scale of element `i`.
    ///
    /// # Panics
    /// If there is none.
    pub fn scale(self, i: usize) -> f32 {
        let at = (i >> self.shift) * SCALE_BYTES;
        half::bf16::from_le_bytes([self.scales[at], self.scales[at + 1]]).to_f32()
    }

    /// # Panics
    /// If this is not a row of `cols` elements.
    #[inline(always)]
    pub(crate) fn check(self, element: Element, cols: usize) {
        assert_eq!(self.values.len(), element.row_bytes(cols), "bytes of a row of {cols} {element:?}");
        if element.is_quantised() {
            assert!(usize::from(self.shift) >= Q4_BLOCK.trailing_zeros() as usize, "a quantised row without scales");
            let groups = cols.div_ceil(1 << self.shift);
            assert_eq!(self.scales.len(), groups * SCALE_BYTES, "bytes of the scales of {cols} {element:?}");
        }
    }

    pub(crate) fn places(self) -> Places {
        Places { values: self.values.as_ptr(), scales: self.scales.as_ptr(), shift: u32::from(self.shift) }
    }
}

/// A row as kernels see it, its lengths checked before.
#[derive(Clone, Copy)]
pub(crate) struct Places {
    pub(crate) values: *const u8,
    pub(crate) scales: *const u8,
    pub(crate) shift: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_powers_of_two() {
        for wrong in [0, 1, 16, 48, 100, (1 << 20) + 1, 1 << 21] {
            assert_eq!(ScaleGroup::new(wrong), None, "{wrong}");
        }
        let group = ScaleGroup::new(64).unwrap();
        assert_eq!((group.elements(), group.count(64), group.count(65), group.scale_bytes(0)), (64, 1, 2, 0));
    }

    #[test]
    fn a_row_knows_its_scales() {
        let scales = [half::bf16::from_f32(0.5).to_le_bytes(), half::bf16::from_f32(-2.0).to_le_bytes()].concat();
        let values = [1u8; 40];
        let row = Row::quantised(&values, &scales, ScaleGroup::new(32).unwrap());
        row.check(Element::Q8, 40);
        assert_eq!((row.scale(31), row.scale(32)), (0.5, -2.0));
    }

    #[test]
    #[should_panic(expected = "bytes of the scales")]
    fn too_few_scales_are_noticed() {
        Row::quantised(&[0; 40], &[0; 2], ScaleGroup::new(32).unwrap()).check(Element::Q8, 40);
    }

    #[test]
    #[should_panic(expected = "without scales")]
    fn no_scales_are_noticed() {
        Row::from(&[0; 40][..]).check(Element::Q8, 40);
    }
}
