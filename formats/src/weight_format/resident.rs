//! How the matrices that stay in memory are stored.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{UnknownWeightFormat, WeightFormat};
use crate::model::{DType, ResidentTensor};

/// How resident matrices are stored, where they are quantised; else they have the source's element types.
///
/// Embedding and head stand apart: they hold one row for each token of the vocabulary, and errors in them cost more than elsewhere.
/// As JSON: the format, or an object of both where they differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Stored", try_from = "Stored")]
pub struct ResidentFormats {
    /// All but those of `embedding`: attention, and projections of the embedding.
    pub matrices: Option<WeightFormat>,
    /// The token embedding and the head.
    pub embedding: Option<WeightFormat>,
}

impl ResidentFormats {
    /// Matrices as `matrices`, and the embedding as `embedding`; where nothing is said of it, in 8 bits where they are quantised.
    pub fn new(matrices: Option<WeightFormat>, embedding: Option<WeightFormat>) -> Self {
        let in_8_bits = |format| match format {
            WeightFormat::Int4(group) => WeightFormat::Int8(group),
            other => other,
        };
        Self { matrices, embedding: embedding.or(matrices.map(in_8_bits)) }
    }

    /// All of them alike.
    pub const fn all(format: Option<WeightFormat>) -> Self {
        Self { matrices: format, embedding: format }
    }

    /// Whether nothing is quantised.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// The formats that there are.
    pub fn formats(&self) -> impl Iterator<Item = WeightFormat> {
        [self.matrices, self.embedding].into_iter().flatten()
    }

    /// How a tensor is quantised, if it is: of learned positions, which are few and are added to, not multiplied with, and of vectors
    /// none is.
    pub fn of(&self, tensor: &ResidentTensor) -> Option<WeightFormat> {
        match tensor.name.as_str() {
            "embed.positions" => None,
            "embed.tokens" | "head.weight" => self.embedding,
            _ => self.matrices.filter(|_| tensor.shape.len() == 2),
        }
    }
}

impl ResidentTensor {
    /// How it is stored, if it is of `dtype` and resident matrices are quantised like this.
    pub fn format(&self, dtype: DType, quantised: ResidentFormats) -> WeightFormat {
        quantised.of(self).unwrap_or(dtype.into())
    }
}

impl fmt::Display for ResidentFormats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |format: Option<WeightFormat>| format.map_or("as it is".into(), |format| format.to_string());
        f.write_str(&name(self.matrices))?;
        if self.embedding == self.matrices { Ok(()) } else { write!(f, ", embedding {}", name(self.embedding)) }
    }
}

/// As it is in JSON.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Stored {
    All(String),
    Apart(Apart),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Apart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    matrices: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    embedding: Option<String>,
}

impl From<ResidentFormats> for Stored {
    fn from(formats: ResidentFormats) -> Self {
        let ResidentFormats { matrices, embedding } = formats;
        match matrices.filter(|_| matrices == embedding) {
            Some(format) => Self::All(format.into()),
            None => Self::Apart(Apart { matrices: matrices.map(String::from), embedding: embedding.map(String::from) }),
        }
    }
}

impl TryFrom<Stored> for ResidentFormats {
    type Error = UnknownWeightFormat;

    fn try_from(stored: Stored) -> Result<Self, UnknownWeightFormat> {
        let parsed = |format: Option<String>| format.map(|format| format.parse()).transpose();
        Ok(match stored {
            Stored::All(format) => Self::all(Some(format.parse()?)),
            Stored::Apart(Apart { matrices, embedding }) => {
                Self { matrices: parsed(matrices)?, embedding: parsed(embedding)? }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(name: &str) -> Option<WeightFormat> {
        Some(name.parse().unwrap())
    }

    #[test]
    fn an_embedding_of_which_nothing_is_said_has_8_bits() {
        let of = |matrices, embedding| ResidentFormats::new(matrices, embedding).embedding;
        assert_eq!(of(format("int4/64"), None), format("int8/64"));
        assert_eq!(of(format("int8/128"), None), format("int8/128"));
        assert_eq!(of(format("int8"), format("int4/32")), format("int4/32"));
        assert_eq!(of(None, format("int8")), format("int8"));
        assert!(ResidentFormats::new(None, None).is_plain());
    }

    #[test]
    fn tensors_are_told_apart() {
        let formats = ResidentFormats { matrices: format("int4/32"), embedding: format("int8/64") };
        let of = |name: &str, shape: &[usize]| formats.of(&ResidentTensor { name: name.into(), shape: shape.into() });
        assert_eq!(of("embed.tokens", &[9, 4]), format("int8/64"));
        assert_eq!(of("head.weight", &[9, 4]), format("int8/64"));
        assert_eq!(of("embed.project_in", &[8, 4]), format("int4/32"));
        assert_eq!(of("layers.0.attention.out.weight", &[4, 4]), format("int4/32"));
        for (name, shape) in [("embed.positions", &[9, 4][..]), ("head.bias", &[9]), ("final_norm.weight", &[4])] {
            assert_eq!(of(name, shape), None, "{name}");
        }
    }

    #[test]
    fn json_is_read_back() {
        let [four, eight] = ["int4/32", "int8/32"].map(format);
        for (formats, json) in [
            (ResidentFormats::all(eight), r#""int8/32""#),
            (ResidentFormats::new(four, None), r#"{"matrices":"int4/32","embedding":"int8/32"}"#),
            (ResidentFormats { matrices: four, embedding: None }, r#"{"matrices":"int4/32"}"#),
            (ResidentFormats::new(None, eight), r#"{"embedding":"int8/32"}"#),
        ] {
            assert_eq!(serde_json::to_string(&formats).unwrap(), json);
            assert_eq!(serde_json::from_str::<ResidentFormats>(json).unwrap(), formats);
        }
        for wrong in [r#""int8/33""#, r#"{"matrices":"int8/33"}"#, r#"{"head":"int8/32"}"#, "1", "null"] {
            assert!(serde_json::from_str::<ResidentFormats>(wrong).is_err(), "{wrong}");
        }
    }
}
