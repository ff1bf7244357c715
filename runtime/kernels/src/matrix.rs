//! A view of a matrix of weights in borrowed bytes, its rows at regular intervals.
//!
//! It knows nothing of who owns the bytes, nor of what they mean beyond their number format.

use std::ops::Range;

use crate::element::Element;
use crate::row::{Places, Row, ScaleGroup};

/// Where the rows of a [`Matrix`] lie, in bytes from the start of its data.
///
/// Rows come in groups: row `i` begins at
/// `offset + (i / rows_per_group) * group_stride + (i % rows_per_group) * row_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowLayout {
    /// Where row 0 begins.
    pub offset: usize,
    /// From one row to the next within a group.
    pub row_stride: usize,
    /// Rows of a group; at least 1.
    pub rows_per_group: usize,
    /// From one group to the next.
    pub group_stride: usize,
}

/// Why bytes are no matrix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// Contiguous data has another length than rows and columns ask for.
    #[error("a matrix of {rows} x {cols} {element:?} has {expected} bytes, not {found}")]
    Length {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Number format.
        element: Element,
        /// Bytes that these make.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A row reaches beyond the data.
    #[error("row {row} of {cols} {element:?} would end at byte {end} of {found}")]
    OutOfBounds {
        /// The row that ends last.
        row: usize,
        /// Columns asked for.
        cols: usize,
        /// Number format.
        element: Element,
        /// Where it would end.
        end: usize,
        /// Bytes given.
        found: usize,
    },
    /// A size or a place does not fit `usize`.
    #[error("{rows} rows x {cols} columns of {element:?} overflow the address space")]
    Overflow {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Number format.
        element: Element,
    },
    /// Too few scales.
    #[error("the scales of {rows} x {cols} elements have {expected} bytes at least, not {found}")]
    Scales {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Bytes that their scales reach over.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A group of no rows.
    #[error("a group of rows must have at least one row")]
    EmptyGroup,
}

/// Where the scales of rows are.
#[derive(Clone, Copy, Debug)]
struct Scales<'a> {
    data: &'a [u8],
    stride: usize,
    group: ScaleGroup,
}

/// A matrix `[rows, cols]` of weights: a copyable view.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    element: Element,
    data: &'a [u8],
    rows: usize,
    cols: usize,
    layout: RowLayout,
    scales: Option<Scales<'a>>,
    /// Number of row 0 in the layout.
    first: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix whose rows follow each other without gaps and fill `data`.
    ///
    /// # Errors
    /// If `data` has another length.
    pub fn new(element: Element, data: &'a [u8], rows: usize, cols: usize) -> Result<Self, MatrixError> {
        let overflow = MatrixError::Overflow { rows, cols, element };
        let row_stride = element.checked_row_bytes(cols).ok_or(overflow.clone())?;
        let expected = row_stride.checked_mul(rows).ok_or(overflow)?;
        if data.len() != expected {
            return Err(MatrixError::Length { rows, cols, element, expected, found: data.len() });
        }
        let layout = RowLayout { offset: 0, row_stride, rows_per_group: rows.max(1), group_stride: 0 };
        Ok(Self { element, data, rows, cols, layout, scales: None, first: 0 })
    }

    /// A matrix whose rows lie in `data` as `layout` says. Rows may overlap; `data` may be longer.
    ///
    /// # Errors
    /// If a row would reach beyond `data`, or the layout makes no sense.
    pub fn strided(
        element: Element,
        data: &'a [u8],
        rows: usize,
        cols: usize,
        layout: RowLayout,
    ) -> Result<Self, MatrixError> {
        if layout.rows_per_group == 0 {
            return Err(MatrixError::EmptyGroup);
        }
        // Groups that follow each other as their rows do are one, and their rows are found without divisions.
        let is_even = layout.rows_per_group.checked_mul(layout.row_stride) == Some(layout.group_stride);
        let layout = if is_even { RowLayout { rows_per_group: rows.max(1), ..layout } } else { layout };
        let matrix = Self { element, data, rows, cols, layout, scales: None, first: 0 };
        if rows > 0 {
            let overflow = MatrixError::Overflow { rows, cols, element };
            // The row that ends last: the last one, or the last of the last full group.
            let last = rows - 1;
            let last_of_full = (rows / layout.rows_per_group * layout.rows_per_group).checked_sub(1).unwrap_or(last);
            for row in [last, last_of_full] {
                let end = matrix.end_of(row).ok_or(overflow.clone())?;
                if end > data.len() {
                    return Err(MatrixError::OutOfBounds { row, cols, element, end, found: data.len() });
                }
            }
        }
        Ok(matrix)
    }

    /// The same matrix with the scales of its rows: those of row `i` begin at `i * stride` of `data`, bf16, one for each group of a
    /// row's elements.
    ///
    /// # Errors
    /// If the scales of a row would reach beyond `data`.
    pub fn with_scales(self, data: &'a [u8], stride: usize, group: ScaleGroup) -> Result<Self, MatrixError> {
        let bytes = group.scale_bytes(self.cols);
        let last = (self.first + self.rows).saturating_sub(1);
        let overflow = MatrixError::Overflow { rows: self.rows, cols: self.cols, element: self.element };
        let expected = last.checked_mul(stride).and_then(|at| at.checked_add(bytes)).ok_or(overflow)?;
        if self.rows > 0 && expected > data.len() {
            return Err(MatrixError::Scales { rows: self.rows, cols: self.cols, expected, found: data.len() });
        }
        Ok(Self { scales: Some(Scales { data, stride, group }), ..self })
    }

    fn end_of(&self, row: usize) -> Option<usize> {
        let RowLayout { offset, row_stride, rows_per_group, group_stride } = self.layout;
        let group = (row / rows_per_group).checked_mul(group_stride)?;
        let within = (row % rows_per_group).checked_mul(row_stride)?;
        let width = self.element.checked_row_bytes(self.cols)?;
        offset.checked_add(group)?.checked_add(within)?.checked_add(width)
    }

    /// The number format.
    pub fn element(&self) -> Element {
        self.element
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.element.row_bytes(self.cols)
    }

    /// The rows of `range` as a matrix of their own.
    ///
    /// # Panics
    /// If the range reaches beyond the rows.
    pub fn rows_range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        Self { rows: range.len(), first: self.first + range.start, ..self }
    }

    /// Where row `first + i` begins in the data.
    #[inline(always)]
    fn place(&self, i: usize) -> usize {
        let RowLayout { offset, row_stride, rows_per_group, group_stride } = self.layout;
        let i = self.first + i;
        // The common case is one group: no division.
        if i < rows_per_group {
            offset + i * row_stride
        } else {
            offset + i / rows_per_group * group_stride + i % rows_per_group * row_stride
        }
    }

    /// Row `i` as kernels see it. That it lies in the data was checked when the matrix was made.
    ///
    /// # Panics
    /// If there is no such row, or it is quantised and has no scales.
    #[inline(always)]
    pub(crate) fn places(&self, i: usize) -> Places {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        let values = self.data.as_ptr().wrapping_add(self.place(i));
        match self.scales {
            None => {
                assert!(!self.element.is_quantised(), "quantised rows without scales");
                Places { values, scales: std::ptr::null(), shift: 0 }
            }
            Some(Scales { data, stride, group }) => Places {
                values,
                scales: data.as_ptr().wrapping_add((self.first + i) * stride),
                shift: group.elements().trailing_zeros(),
            },
        }
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline]
    pub fn row(&self, i: usize) -> Row<'a> {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        let place = self.place(i);
        let values = &self.data[place..place + self.row_bytes()];
        match self.scales {
            None => values.into(),
            Some(Scales { data, stride, group }) => {
                let scales = &data[(self.first + i) * stride..][..group.scale_bytes(self.cols)];
                Row::quantised(values, scales, group)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_rows_fill_the_data() {
        let data: Vec<u8> = (0..24).collect();
        let m = Matrix::new(Element::F16, &data, 3, 4).unwrap();
        assert_eq!((m.rows(), m.cols(), m.row_bytes(), m.element()), (3, 4, 8, Element::F16));
        assert_eq!(m.row(2).values(), &data[16..24]);
        assert_eq!(m.rows_range(1..3).row(0).values(), &data[8..16]);
        assert_eq!(m.rows_range(1..3).rows_range(1..2).row(0).values(), &data[16..24]);
        assert_eq!(m.rows_range(3..3).rows(), 0);
        assert!(Matrix::new(Element::F32, &[], 0, 7).is_ok());
        assert!(Matrix::new(Element::F32, &[], 7, 0).is_ok());
        for wrong in [0, 23, 25] {
            let data = vec![0; wrong];
            assert_eq!(
                Matrix::new(Element::F16, &data, 3, 4).unwrap_err(),
                MatrixError::Length { rows: 3, cols: 4, element: Element::F16, expected: 24, found: wrong }
            );
        }
        assert!(matches!(Matrix::new(Element::F16, &data, usize::MAX, 4), Err(MatrixError::Overflow { .. })));
        assert!(matches!(Matrix::new(Element::F16, &data, 1, usize::MAX), Err(MatrixError::Overflow { .. })));
    }

    #[test]
    fn grouped_rows_are_where_the_layout_says() {
        let data: Vec<u8> = (0..=255).collect();
        let layout = RowLayout { offset: 3, row_stride: 10, rows_per_group: 3, group_stride: 50 };
        let m = Matrix::strided(Element::F16, &data, 8, 2, layout).unwrap();
        for i in 0..8 {
            let place = 3 + i / 3 * 50 + i % 3 * 10;
            assert_eq!(m.row(i).values(), &data[place..place + 4], "row {i}");
        }
        let part = m.rows_range(2..7);
        for i in 0..5 {
            assert_eq!(part.row(i).values(), m.row(i + 2).values());
        }
    }

    #[test]
    fn a_layout_that_reaches_beyond_the_data_is_refused() {
        let layout = RowLayout { offset: 3, row_stride: 10, rows_per_group: 3, group_stride: 50 };
        // Row 7 is second in group 2: bytes 113..117.
        let data = [0u8; 117];
        assert!(Matrix::strided(Element::F16, &data, 8, 2, layout).is_ok());
        assert_eq!(
            Matrix::strided(Element::F16, &data[..116], 8, 2, layout).unwrap_err(),
            MatrixError::OutOfBounds { row: 7, cols: 2, element: Element::F16, end: 117, found: 116 }
        );
        // Groups that overlap: the last row of the last full group ends later than the last row.
        let overlapping = RowLayout { offset: 0, row_stride: 10, rows_per_group: 3, group_stride: 1 };
        assert!(Matrix::strided(Element::F16, &data[..25], 4, 2, overlapping).is_ok());
        assert!(matches!(
            Matrix::strided(Element::F16, &data[..23], 4, 2, overlapping),
            Err(MatrixError::OutOfBounds { row: 2, .. })
        ));
        let empty = RowLayout { rows_per_group: 0, ..layout };
        assert_eq!(Matrix::strided(Element::F16, &data, 8, 2, empty).unwrap_err(), MatrixError::EmptyGroup);
        for huge in [
            RowLayout { offset: usize::MAX, ..layout },
            RowLayout { row_stride: usize::MAX, ..layout },
            RowLayout { group_stride: usize::MAX, ..layout },
        ] {
            assert!(matches!(Matrix::strided(Element::F16, &data, 8, 2, huge), Err(MatrixError::Overflow { .. })));
        }
    }

    #[test]
    #[should_panic(expected = "row 3 of 3")]
    fn a_row_beyond_a_part_is_not_reached() {
        let data = [0u8; 40];
        let _ = Matrix::new(Element::F16, &data, 5, 4).unwrap().rows_range(1..4).row(3);
    }
}
