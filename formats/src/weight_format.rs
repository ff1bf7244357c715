//! How the rows of a weight matrix are stored: as numbers, or as integers with a scale for every group of them.
//!
//! A quantised row is cut into groups of equally many neighbouring elements (the last one may be shorter). An element is its whole
//! number times its group's scale, a bf16. The scales of a row stand apart from it. It knows neither how scales are chosen nor how
//! products are computed.

mod resident;

use std::fmt;
use std::str::FromStr;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

pub use resident::ResidentFormats;

use crate::model::DType;

/// Elements of a block of four-bit numbers, which a row of them has whole: byte `i` of its 16 bytes holds element `i` in the low
/// half and element `i + 16` in the high half.
const INT4_BLOCK: usize = 32;
/// Bytes of a scale.
pub const SCALE_BYTES: usize = 2;
/// Shortest and longest group.
const GROUP_MIN: usize = INT4_BLOCK;
const GROUP_MAX: usize = 1 << 20;

/// How many elements share a scale: a power of two from 32 to 2^20.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupSize(usize);

impl GroupSize {
    /// Groups of `elements`, if that is allowed.
    pub fn new(elements: usize) -> Option<Self> {
        (elements.is_power_of_two() && (GROUP_MIN..=GROUP_MAX).contains(&elements)).then_some(Self(elements))
    }

    /// Elements of a group.
    pub const fn elements(self) -> usize {
        self.0
    }
}

/// How the rows of a matrix are stored. As text: `f32`, `f16`, `bf16`, `int8/128`, `int4/32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum WeightFormat {
    /// Numbers.
    Plain(DType),
    /// Bytes from -127 to 127.
    Int8(GroupSize),
    /// Half bytes from -8 to 7, in blocks of 32.
    Int4(GroupSize),
}

impl WeightFormat {
    /// Bytes in groups of this many where nothing else is asked for.
    pub const INT8: Self = Self::Int8(GroupSize(32));
    /// Half bytes in groups of this many where nothing else is asked for.
    pub const INT4: Self = Self::Int4(GroupSize(32));

    /// Bytes of a row of `cols` elements, without its scales.
    pub const fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::Plain(dtype) => cols.saturating_mul(dtype.bytes()),
            Self::Int8(_) => cols,
            Self::Int4(_) => cols.div_ceil(INT4_BLOCK) * (INT4_BLOCK / 2),
        }
    }

    /// The groups that share a scale, if there are scales.
    pub const fn group(self) -> Option<GroupSize> {
        match self {
            Self::Plain(_) => None,
            Self::Int8(group) | Self::Int4(group) => Some(group),
        }
    }

    /// Scales of a row of `cols` elements.
    pub const fn scales(self, cols: usize) -> usize {
        match self.group() {
            Some(group) => cols.div_ceil(group.elements()),
            None => 0,
        }
    }

    /// Whether there are scales.
    pub const fn is_quantised(self) -> bool {
        self.group().is_some()
    }

    /// The largest integer that an element may be.
    pub const fn largest(self) -> i8 {
        match self {
            Self::Int4(_) => 7,
            _ => 127,
        }
    }
}

impl From<DType> for WeightFormat {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}

/// As the elements of a row stand in a safetensors file: two half bytes are a `U8`.
impl From<WeightFormat> for Dtype {
    fn from(format: WeightFormat) -> Self {
        match format {
            WeightFormat::Plain(dtype) => dtype.into(),
            WeightFormat::Int8(_) => Self::I8,
            WeightFormat::Int4(_) => Self::U8,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Int8(group) => write!(f, "int8/{}", group.elements()),
            Self::Int4(group) => write!(f, "int4/{}", group.elements()),
        }
    }
}

impl From<WeightFormat> for String {
    fn from(format: WeightFormat) -> Self {
        format.to_string()
    }
}

/// Why a text names no weight format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown weight format {found:?}: expected f32, f16, bf16, int8 or int4; the latter two with /N for groups of N weights, a power \
     of two from {GROUP_MIN} to {GROUP_MAX}"
)]
pub struct UnknownWeightFormat {
    /// The text.
    pub found: String,
}

impl FromStr for WeightFormat {
    type Err = UnknownWeightFormat;

    fn from_str(text: &str) -> Result<Self, UnknownWeightFormat> {
        let unknown = || UnknownWeightFormat { found: text.to_owned() };
        let group = |elements: &str| elements.parse().ok().and_then(GroupSize::new).ok_or_else(unknown);
        match text.split_once('/') {
            None => match text {
                "f32" => Ok(Self::Plain(DType::F32)),
                "f16" => Ok(Self::Plain(DType::F16)),
                "bf16" => Ok(Self::Plain(DType::Bf16)),
                "int8" => Ok(Self::INT8),
                "int4" => Ok(Self::INT4),
                _ => Err(unknown()),
            },
            Some(("int8", elements)) => group(elements).map(Self::Int8),
            Some(("int4", elements)) => group(elements).map(Self::Int4),
            Some(_) => Err(unknown()),
        }
    }
}

impl TryFrom<String> for WeightFormat {
    type Error = UnknownWeightFormat;

    fn try_from(text: String) -> Result<Self, UnknownWeightFormat> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let formats = ["f32", "f16", "bf16", "int8/32", "int8/128", "int4/64", "int4/1048576"];
        for name in formats {
            assert_eq!(name.parse::<WeightFormat>().unwrap().to_string(), name);
        }
        assert_eq!("int8".parse(), Ok(WeightFormat::INT8));
        assert_eq!("int4".parse(), Ok(WeightFormat::INT4));
        for wrong in ["", "int", "int8/", "int8/31", "int8/48", "int8/-64", "int4/16", "int4/2097152", "f16/32", "INT8"]
        {
            assert!(wrong.parse::<WeightFormat>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn rows_and_scales_are_counted() {
        let bytes = |name: &str, cols| {
            let format: WeightFormat = name.parse().unwrap();
            (format.row_bytes(cols), format.scales(cols))
        };
        assert_eq!(bytes("f32", 100), (400, 0));
        assert_eq!(bytes("int8/32", 100), (100, 4));
        assert_eq!(bytes("int4/64", 100), (64, 2));
        assert_eq!(bytes("int4/32", 4544), (2272, 142));
    }
}
