//! Element types of weights. What else is stored is said in terms of these: a checkpoint's tensor is of
//! one of them or is no weight, and a [`WeightFormat`](crate::weight_format::WeightFormat) is one of them
//! or integers with scales.

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// How the elements of a weight tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single-precision number.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// The name used in manifests and messages: `f32`, `f16` or `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }
}

/// A safetensors type that no weight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {}, found {found}", NotAWeight::EXPECTED)]
pub struct NotAWeight {
    /// The type.
    pub found: Dtype,
}

impl NotAWeight {
    /// The types that weights have.
    pub const EXPECTED: &str = "F32, F16 or BF16";
}

impl TryFrom<Dtype> for DType {
    type Error = NotAWeight;

    fn try_from(dtype: Dtype) -> Result<Self, NotAWeight> {
        match dtype {
            Dtype::F32 => Ok(Self::F32),
            Dtype::F16 => Ok(Self::F16),
            Dtype::BF16 => Ok(Self::Bf16),
            found => Err(NotAWeight { found }),
        }
    }
}

impl From<DType> for Dtype {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::Bf16 => Self::BF16,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_have_three_types() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            assert_eq!(DType::try_from(Dtype::from(dtype)), Ok(dtype));
        }
        let error = DType::try_from(Dtype::F64).unwrap_err();
        assert_eq!(error.to_string(), "expected F32, F16 or BF16, found F64");
    }
}
