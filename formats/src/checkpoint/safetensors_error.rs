//! What can be wrong with a safetensors file.

/// How a safetensors file can lie.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// Shorter than the length field.
    #[error("the file has {found} bytes; at least {expected} are needed")]
    TooShort {
        /// Bytes needed.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The header would reach beyond the file, or is absurdly long.
    #[error("the header claims {claimed} bytes; the file leaves room for {room}, and at most {limit} are allowed")]
    HeaderLength {
        /// Length claimed.
        claimed: u64,
        /// Bytes after the length field.
        room: u64,
        /// Longest header that is read.
        limit: u64,
    },
    /// The header is not the expected JSON.
    #[error("the header is malformed: {reason}")]
    Header {
        /// What is wrong.
        reason: String,
    },
    /// One name twice.
    #[error("the tensor {tensor:?} is listed twice")]
    Duplicate {
        /// The name.
        tensor: String,
    },
    /// Shape times element size does not fit in 64 bits.
    #[error("the shape {shape:?} of {tensor:?} overflows")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The byte range is not as long as shape and dtype require.
    #[error("{tensor:?} spans {found} bytes; its shape and dtype need {expected}")]
    Size {
        /// The tensor.
        tensor: String,
        /// Bytes by shape and dtype.
        expected: u64,
        /// Bytes by offsets.
        found: u64,
    },
    /// Tensors overlap, leave a gap, or end before they begin.
    #[error("{tensor:?} is at bytes {start}..{end} of the data; it should begin at {expected}")]
    Offsets {
        /// The tensor.
        tensor: String,
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// End of the tensor before it.
        expected: u64,
    },
    /// The tensors do not end where the file ends.
    #[error("the tensors end at byte {expected} of the data; the file has {found}")]
    Length {
        /// Data bytes by the header.
        expected: u64,
        /// Data bytes there are.
        found: u64,
    },
}

impl SafetensorsError {
    /// Only a file that is too short can be one that was not fetched whole.
    pub(super) const fn hint(&self) -> &'static str {
        match self {
            Self::TooShort { .. } | Self::HeaderLength { .. } | Self::Length { .. } => "Download it again",
            _ => "Download it again if it came from elsewhere; if it was made here, save it again",
        }
    }
}
