//! Keys and values of the tokens so far.
//!
//! Each layer holds, for every key/value head, a `[places, head_dim]` matrix of keys and one of values. A sequence has a place for each
//! of its positions; where these lie side by side, attention is the same matrix products as everywhere else, else the products of
//! parts, which have the same bits. Elements are f16 or f32. What f16 cannot hold is an error: stored as infinity it would be left out
//! of the text without a word.

use std::ops::Range;

use flashlm_formats::model::ModelSpec;
use flashlm_io::AlignedMemory;
use flashlm_kernels::{Element, Matrix};

use crate::error::{Result, RuntimeError};

/// From here on a number becomes infinite when it is rounded to f16, whose largest is 65504.
const F16_INFINITE: f32 = 65520.0;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// Half precision: the default, unless the bundle says that it is too narrow.
    F16,
    /// Single precision: twice the memory, exact.
    F32,
}

impl KvDtype {
    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F16 => "f16",
            KvDtype::F32 => "f32",
        }
    }

    fn element(self) -> Element {
        match self {
            KvDtype::F16 => Element::F16,
            KvDtype::F32 => Element::F32,
        }
    }
}

/// Memory for the keys and values of this many tokens, of whatever sequences.
pub struct KvMemory {
    memory: AlignedMemory,
    element: Element,
    kv_heads: usize,
    head_dim: usize,
    /// Places for tokens.
    places: usize,
}

impl KvMemory {
    /// Room for `places` tokens in `layers` layers of `spec`.
    pub fn new(spec: &ModelSpec, layers: usize, places: usize, dtype: KvDtype) -> Result<Self> {
        let (kv_heads, head_dim) = (spec.attention().kv_heads, spec.attention().head_dim);
        let memory = AlignedMemory::new(layers * Self::layer_bytes(spec, places, dtype))?;
        Ok(Self { memory, element: dtype.element(), kv_heads, head_dim, places })
    }

    /// Bytes of one layer.
    pub fn layer_bytes(spec: &ModelSpec, places: usize, dtype: KvDtype) -> usize {
        2 * spec.attention().kv_heads * places * spec.attention().head_dim * dtype.element().bytes()
    }

    /// Places for tokens.
    pub fn places(&self) -> usize {
        self.places
    }

    /// Bytes of a token's row in a plane.
    pub(crate) fn row_bytes(&self) -> usize {
        self.head_dim * self.element.bytes()
    }

    /// Planes: the keys and the values of every head of every layer, each with a row for every place.
    pub(crate) fn planes(&self) -> usize {
        self.memory.as_slice().len() / (self.places * self.row_bytes()).max(1)
    }

    fn bytes_of(&self, plane: usize, places: Range<usize>) -> Range<usize> {
        let first = plane * self.places;
        (first + places.start) * self.row_bytes()..(first + places.end) * self.row_bytes()
    }

    /// Rows of a plane.
    pub(crate) fn rows(&self, plane: usize, places: Range<usize>) -> &[u8] {
        &self.memory.as_slice()[self.bytes_of(plane, places)]
    }

    /// As [`KvMemory::rows`], to be changed.
    pub(crate) fn rows_mut(&mut self, plane: usize, places: Range<usize>) -> &mut [u8] {
        let bytes = self.bytes_of(plane, places);
        &mut self.memory.as_mut_slice()[bytes]
    }

    fn row(&self, layer: usize, is_value: bool, head: usize, place: usize) -> usize {
        let plane = (layer * 2 + usize::from(is_value)) * self.kv_heads + head;
        (plane * self.places + place) * self.row_bytes()
    }

    fn store(&mut self, start: usize, row: &[f32]) {
        let bytes = &mut self.memory.as_mut_slice()[start..start + row.len() * self.element.bytes()];
        match self.element {
            Element::F32 => {
                for (to, value) in bytes.chunks_exact_mut(4).zip(row) {
                    to.copy_from_slice(&value.to_le_bytes());
                }
            }
            _ => flashlm_kernels::store_f16(row, bytemuck::cast_slice_mut(bytes)),
        }
    }

    /// Stores the keys and values (`[kv_heads, head_dim]` each) of a token at its place in `layer`; `position` is for the error.
    ///
    /// # Errors
    /// `KvRange` where f16 does not hold one of them, `KvNoNumber` where one is no finite number.
    pub(crate) fn put(
        &mut self,
        layer: usize,
        (place, position): (usize, usize),
        keys: &[f32],
        values: &[f32],
    ) -> Result<()> {
        let (key, value) = (largest(keys), largest(values));
        if !(key.is_finite() && value.is_finite()) {
            let value = if key.is_finite() { value } else { key };
            return Err(RuntimeError::KvNoNumber { layer, position, value });
        }
        let value = key.max(value);
        if self.element == Element::F16 && value >= F16_INFINITE {
            return Err(RuntimeError::KvRange { layer, position, value });
        }
        for head in 0..self.kv_heads {
            let part = head * self.head_dim..(head + 1) * self.head_dim;
            self.store(self.row(layer, false, head, place), &keys[part.clone()]);
            self.store(self.row(layer, true, head, place), &values[part]);
        }
        Ok(())
    }

    fn matrix(&self, layer: usize, is_value: bool, head: usize, places: Range<usize>) -> Matrix<'_> {
        let start = self.row(layer, is_value, head, places.start);
        let data = &self.memory.as_slice()[start..start + places.len() * self.row_bytes()];
        Matrix::new(self.element, data, places.len(), self.head_dim).expect("planes have all places")
    }

    /// Keys `[places, head_dim]` of one head.
    pub(crate) fn keys(&self, layer: usize, head: usize, places: Range<usize>) -> Matrix<'_> {
        self.matrix(layer, false, head, places)
    }

    /// Values `[places, head_dim]` of one head.
    pub(crate) fn values(&self, layer: usize, head: usize, places: Range<usize>) -> Matrix<'_> {
        self.matrix(layer, true, head, places)
    }
}

/// Consecutive places of a sequence's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    /// Position of the first token.
    first: usize,
    places: Range<usize>,
}

/// Where the keys and values of a sequence are: position to place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequencePlaces {
    /// By position, as long as places allow.
    runs: Vec<Run>,
    positions: usize,
}

impl SequencePlaces {
    /// Those of a sequence that has these places one after the other; neighbouring ranges become one.
    pub fn new(ranges: impl IntoIterator<Item = Range<usize>>) -> Self {
        let mut all = Self::default();
        for places in ranges {
            let first = all.positions;
            all.positions += places.len();
            match all.runs.last_mut() {
                Some(run) if run.places.end == places.start => run.places.end = places.end,
                _ => all.runs.push(Run { first, places }),
            }
        }
        all
    }

    /// Tokens there is room for.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The place of a position.
    pub(crate) fn place(&self, position: usize) -> usize {
        let run = &self.runs[self.runs.partition_point(|run| run.first <= position) - 1];
        run.places.start + position - run.first
    }

    /// The places of the first `positions` positions, in order; and which position each range begins with.
    pub(crate) fn first(&self, positions: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let runs = self.runs.iter().take_while(move |run| run.first < positions);
        runs.map(move |run| {
            (run.first, run.places.start..run.places.start + run.places.len().min(positions - run.first))
        })
    }
}

/// The largest magnitude, or what is no number where there is one: as bits, magnitudes are in order and infinity and NaN are above them.
fn largest(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff)))
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn the_largest_is_found_and_no_number_is_none() {
        assert_eq!(largest(&[]), 0.0);
        assert_eq!(largest(&[1.0, -3.0, 2.0]), 3.0);
        assert_eq!(largest(&[1.0, f32::NEG_INFINITY]), f32::INFINITY);
        assert!(largest(&[f32::INFINITY, -f32::NAN, 5.0]).is_nan());
    }

    #[test]
    fn places_of_positions() {
        let sequence = SequencePlaces::new([32..48, 48..64, 0..16]);
        assert_eq!(sequence, SequencePlaces::new([32..64, 0..16]));
        assert_eq!(sequence.positions(), 48);
        assert_eq!([0, 15, 16, 31, 32, 47].map(|position| sequence.place(position)), [32, 47, 48, 63, 0, 15]);
        let first = |positions| sequence.first(positions).collect::<Vec<_>>();
        assert_eq!(first(1), [(0, 32..33)]);
        assert_eq!(first(32), [(0, 32..64)]);
        assert_eq!(first(40), [(0, 32..64), (32, 0..8)]);
    }

    #[test]
    fn the_bound_of_f16_is_where_it_rounds_to_infinity() {
        assert!(f16::from_f32(F16_INFINITE).is_infinite());
        assert!(f16::from_f32(f32::from_bits(F16_INFINITE.to_bits() - 1)).is_finite());
    }
}
