//! Keys and values of the tokens so far.
//!
//! Each layer holds, for every key/value head, a `[places, head_dim]` matrix of keys and one of values. A sequence has a place for each
//! of its positions; where these lie side by side, attention is the same matrix products as everywhere else, else the products of
//! parts, which have the same bits. Elements are f16, f32, or bytes. What f16 cannot hold is an error: stored as infinity it would be
//! left out of the text without a word.
//!
//! A row of bytes is followed by its scale. It has one of its own, and not one together with its neighbours: so a row depends on its
//! token alone, and guesses that are taken back, or what is said later, leave no trace in what came before.

use std::ops::Range;
use std::str::FromStr;

use flashlm_formats::model::Attention;
use flashlm_io::AlignedMemory;
use flashlm_kernels::{Element, Matrix, RowLayout};
use half::bf16;

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
    /// Bytes, with a scale for each head of each token: half the memory and a little more.
    Int8,
}

/// Not the name of a way to store keys and values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown precision {0:?}: expected f16, f32 or int8")]
pub struct ParseKvError(String);

impl FromStr for KvDtype {
    type Err = ParseKvError;

    fn from_str(name: &str) -> std::result::Result<Self, ParseKvError> {
        let found = [Self::F16, Self::F32, Self::Int8].into_iter().find(|dtype| dtype.name() == name);
        found.ok_or_else(|| ParseKvError(name.to_owned()))
    }
}

/// Bytes of the scale behind a row of bytes: a bf16.
const SCALE_BYTES: usize = 2;

impl KvDtype {
    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F16 => "f16",
            KvDtype::F32 => "f32",
            KvDtype::Int8 => "int8",
        }
    }

    /// Bytes of a token's row in a plane.
    fn row_bytes(self, head_dim: usize) -> usize {
        let scale = if self == KvDtype::Int8 { SCALE_BYTES } else { 0 };
        self.element().row_bytes(head_dim) + scale
    }

    fn element(self) -> Element {
        match self {
            KvDtype::F16 => Element::F16,
            KvDtype::F32 => Element::F32,
            KvDtype::Int8 => Element::I8,
        }
    }
}

/// Memory for the keys and values of this many tokens, of whatever sequences.
pub struct KvMemory {
    memory: AlignedMemory,
    dtype: KvDtype,
    kv_heads: usize,
    head_dim: usize,
    /// Places for tokens.
    places: usize,
}

impl KvMemory {
    /// Room for `places` tokens in `layers` layers with attention of this shape.
    pub fn new(shape: &Attention, layers: usize, places: usize, dtype: KvDtype) -> Result<Self> {
        let Attention { kv_heads, head_dim, .. } = *shape;
        let memory = AlignedMemory::new(layers * Self::layer_bytes(shape, places, dtype))?;
        Ok(Self { memory, dtype, kv_heads, head_dim, places })
    }

    /// Bytes of one layer.
    pub fn layer_bytes(shape: &Attention, places: usize, dtype: KvDtype) -> usize {
        2 * shape.kv_heads * places * dtype.row_bytes(shape.head_dim)
    }

    /// Places for tokens.
    pub fn places(&self) -> usize {
        self.places
    }

    /// Bytes of a token's row in a plane.
    pub(crate) fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.head_dim)
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
        let len = self.row_bytes();
        let bytes = &mut self.memory.as_mut_slice()[start..start + len];
        match self.dtype {
            KvDtype::F32 => {
                for (to, value) in bytes.chunks_exact_mut(4).zip(row) {
                    to.copy_from_slice(&value.to_le_bytes());
                }
            }
            KvDtype::F16 => flashlm_kernels::store_f16(row, bytemuck::cast_slice_mut(bytes)),
            KvDtype::Int8 => {
                let (values, scale) = bytes.split_at_mut(row.len());
                let of_row = flashlm_kernels::store_i8(row, bytemuck::cast_slice_mut(values));
                scale.copy_from_slice(&bf16::from_f32(of_row).to_le_bytes());
            }
        }
    }

    /// Stores the keys and values (`[kv_heads, head_dim]` each) of a token at its place in `layer`; `position` is for the error.
    ///
    /// # Errors
    /// `KvRange` where f16 does not hold one of them, `KvNoNumber` where one is no finite number.
    pub fn put(&mut self, layer: usize, (place, position): (usize, usize), keys: &[f32], values: &[f32]) -> Result<()> {
        let (key, value) = (largest(keys), largest(values));
        if !(key.is_finite() && value.is_finite()) {
            let value = if key.is_finite() { value } else { key };
            return Err(RuntimeError::KvNoNumber { layer, position, value });
        }
        let value = key.max(value);
        if self.dtype == KvDtype::F16 && value >= F16_INFINITE {
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
        let row_stride = self.row_bytes();
        let data = &self.memory.as_slice()[start..start + places.len() * row_stride];
        let layout = RowLayout { offset: 0, row_stride, rows_per_group: places.len().max(1), group_stride: 0 };
        let matrix = Matrix::strided(self.dtype.element(), data, places.len(), self.head_dim, layout);
        matrix.expect("planes have all places")
    }

    /// What the elements of rows are to be multiplied by, where that is not one: into the first of `scales`. Whether it is so.
    fn scales(&self, layer: usize, is_value: bool, head: usize, places: Range<usize>, scales: &mut [f32]) -> bool {
        if self.dtype != KvDtype::Int8 {
            return false;
        }
        let start = self.row(layer, is_value, head, places.start);
        let rows = self.memory.as_slice()[start..].chunks_exact(self.row_bytes());
        for (scale, row) in scales[..places.len()].iter_mut().zip(rows) {
            *scale = bf16::from_le_bytes([row[self.head_dim], row[self.head_dim + 1]]).to_f32();
        }
        true
    }

    /// Keys `[places, head_dim]` of one head.
    pub(crate) fn keys(&self, layer: usize, head: usize, places: Range<usize>) -> Matrix<'_> {
        self.matrix(layer, false, head, places)
    }

    /// Values `[places, head_dim]` of one head.
    pub(crate) fn values(&self, layer: usize, head: usize, places: Range<usize>) -> Matrix<'_> {
        self.matrix(layer, true, head, places)
    }

    /// What the keys of rows are to be multiplied by, as [`KvMemory::value_scales`].
    pub(crate) fn key_scales(&self, layer: usize, head: usize, places: Range<usize>, scales: &mut [f32]) -> bool {
        self.scales(layer, false, head, places, scales)
    }

    /// What the values of rows are to be multiplied by, where that is not one: into the first of `scales`. Whether it is so.
    pub(crate) fn value_scales(&self, layer: usize, head: usize, places: Range<usize>, scales: &mut [f32]) -> bool {
        self.scales(layer, true, head, places, scales)
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

    /// The places of consecutive positions, in order; and which position each range begins with.
    pub(crate) fn of(&self, positions: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let from = self.runs.partition_point(|run| run.first + run.places.len() <= positions.start);
        let runs = self.runs[from..].iter().take_while(move |run| run.first < positions.end);
        runs.map(move |run| {
            let first = run.first.max(positions.start);
            let end = (run.first + run.places.len()).min(positions.end);
            (first, run.places.start + first - run.first..run.places.start + end - run.first)
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
        let of = |positions| sequence.of(positions).collect::<Vec<_>>();
        assert_eq!(of(0..0), []);
        assert_eq!(of(0..1), [(0, 32..33)]);
        assert_eq!(of(0..32), [(0, 32..64)]);
        assert_eq!(of(0..40), [(0, 32..64), (32, 0..8)]);
        assert_eq!(of(5..33), [(5, 37..64), (32, 0..1)]);
        assert_eq!(of(32..48), [(32, 0..16)]);
        assert_eq!(of(40..60), [(40, 8..16)]);
    }

    #[test]
    fn names_are_read_back() {
        for dtype in [KvDtype::F16, KvDtype::F32, KvDtype::Int8] {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        let said = "int4".parse::<KvDtype>().unwrap_err().to_string();
        assert!(said.contains("\"int4\"") && said.contains("f16, f32 or int8"), "{said}");
    }

    #[test]
    fn the_bound_of_f16_is_where_it_rounds_to_infinity() {
        assert!(f16::from_f32(F16_INFINITE).is_infinite());
        assert!(f16::from_f32(f32::from_bits(F16_INFINITE.to_bits() - 1)).is_finite());
    }
}
