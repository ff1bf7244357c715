//! A tensor as a checkpoint stores it: where, of what type, in which shape and strides; and reading its rows.
//!
//! Knows nothing of names' meanings. What is here has been checked against the length of the file.

use std::ops::Range;

use super::error::CheckpointError;
use super::file::SourceFile;
use crate::mapping::FileMap;
use crate::model::DType;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoredDtype {
    /// A weight.
    Weight(DType),
    /// Something else, such as a mask of booleans; never read, only named.
    Other(&'static str),
}

impl StoredDtype {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Weight(dtype) => dtype.name(),
            Self::Other(name) => name,
        }
    }
}

/// A stored tensor.
#[derive(Clone, Debug)]
pub(crate) struct StoredTensor {
    /// Name in the checkpoint.
    pub(crate) name: String,
    /// Index of its file.
    pub(crate) file: usize,
    /// First byte in the file.
    pub(crate) offset: u64,
    pub(crate) dtype: StoredDtype,
    pub(crate) shape: Vec<usize>,
    /// Distance of neighbours along each dimension, in elements; `None`: contiguous.
    pub(crate) strides: Option<Vec<usize>>,
}

impl StoredTensor {
    /// Bytes from its first to its last, those of strides between them included.
    pub(crate) fn bytes(&self) -> u64 {
        let StoredDtype::Weight(dtype) = self.dtype else { return 0 };
        let elements = match &self.strides {
            None => self.shape.iter().product(),
            Some(strides) => {
                1 + self.shape.iter().zip(strides).map(|(n, stride)| n.saturating_sub(1) * stride).sum::<usize>()
            }
        };
        (elements * dtype.bytes()) as u64
    }

    /// Whether `self` and `other` are the very same bytes.
    pub(crate) fn is_same_place(&self, other: &Self) -> bool {
        (self.file, self.offset, self.dtype, &self.shape, &self.strides)
            == (other.file, other.offset, other.dtype, &other.shape, &other.strides)
    }

    /// Append rows (elements, for a vector) to `out`, contiguous.
    ///
    /// The caller has checked that the dtype is a weight's and the rows exist.
    pub(crate) fn append_rows(
        &self,
        files: &[SourceFile],
        dtype: DType,
        rows: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let file = &files[self.file];
        // Without elements, the other dimensions may be anything.
        if rows.is_empty() || self.shape.contains(&0) {
            return Ok(());
        }
        let columns: usize = self.shape[1..].iter().product();
        let row_bytes = columns * dtype.bytes();
        let begin = out.len();
        let bytes = row_bytes * rows.len();
        out.try_reserve(bytes).map_err(|_| CheckpointError::OutOfMemory { name: self.name.clone(), bytes })?;
        out.resize(begin + bytes, 0);
        let target = &mut out[begin..];
        match self.strides.as_deref() {
            None => file.read_exact_at(target, self.offset + (rows.start * row_bytes) as u64),
            // Rows of a wider matrix: each is contiguous.
            Some(&[stride, 1]) => {
                for (row, target) in rows.zip(target.chunks_exact_mut(row_bytes)) {
                    file.read_exact_at(target, self.offset + (row * stride * dtype.bytes()) as u64)?;
                }
                Ok(())
            }
            Some(strides) => {
                file.check_unchanged()?;
                let map = FileMap::open(&file.file, file.bytes()).map_err(|source| CheckpointError::Io {
                    action: "map",
                    path: file.path.clone(),
                    source,
                })?;
                let (row_stride, column_stride) = (strides[0], strides.get(1).copied().unwrap_or(0));
                let source = &map[self.offset as usize..];
                match dtype.bytes() {
                    2 => gather::<2>(source, row_stride, column_stride, rows, columns, target),
                    _ => gather::<4>(source, row_stride, column_stride, rows, columns, target),
                }
                Ok(())
            }
        }
    }
}

/// Copy `rows` of a strided matrix of `N`-byte elements into `target`, row by row.
fn gather<const N: usize>(
    source: &[u8],
    row_stride: usize,
    column_stride: usize,
    rows: Range<usize>,
    columns: usize,
    target: &mut [u8],
) {
    /// Rows taken together: neighbours in a column of a transposed matrix share cache lines.
    const BLOCK: usize = 32;
    let row_bytes = columns * N;
    for block in (0..rows.len()).step_by(BLOCK) {
        let block_end = (block + BLOCK).min(rows.len());
        for column in 0..columns {
            for row in block..block_end {
                let from = ((rows.start + row) * row_stride + column * column_stride) * N;
                let to = row * row_bytes + column * N;
                target[to..to + N].copy_from_slice(&source[from..from + N]);
            }
        }
    }
}
