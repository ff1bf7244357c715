//! The number formats that weights come in. Bytes are little-endian, as in every checkpoint format.

/// Elements of one block of four-bit numbers.
pub const Q4_BLOCK: usize = 32;

/// A weight's number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// A signed byte; the caller applies scales.
    I8,
    /// A signed byte times the scale of its group; see [`crate::Row`].
    Q8,
    /// An integer from -8 to 7 times the scale of its group, in blocks of 32; see [`crate::Row`].
    Q4,
}

impl Element {
    /// Every format without scales.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::I8];

    /// Bytes of one element, rounded up.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 | Self::Q8 | Self::Q4 => 1,
        }
    }

    /// Bytes of a row of `cols` elements without its scales; a row of four-bit numbers holds whole blocks. `None` if they
    /// cannot be counted.
    pub const fn checked_row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Self::Q4 => Some(cols.div_ceil(Q4_BLOCK) * (Q4_BLOCK / 2)),
            _ => cols.checked_mul(self.bytes()),
        }
    }

    /// The same of a row that exists.
    pub const fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::Q4 => cols.div_ceil(Q4_BLOCK) * (Q4_BLOCK / 2),
            _ => cols * self.bytes(),
        }
    }

    /// Whether rows are integers, with scales or without.
    pub const fn is_whole(self) -> bool {
        matches!(self, Self::I8 | Self::Q8 | Self::Q4)
    }

    /// Whether rows have scales.
    pub const fn is_quantised(self) -> bool {
        matches!(self, Self::Q8 | Self::Q4)
    }
}
