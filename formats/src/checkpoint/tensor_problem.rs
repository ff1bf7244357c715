//! How the stored tensors can differ from those that a configuration describes, and what helps.

use std::fmt;

use super::head_names::HEADS;
use super::listing::{NAMES_MAX, list};
use crate::model::DType;

/// One tensor that is not as the configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Not stored.
    Missing {
        /// Its name in the checkpoint.
        tensor: String,
        /// Shape it should have.
        expected: Vec<usize>,
    },
    /// Stored with another shape.
    Shape {
        /// Its name in the checkpoint.
        tensor: String,
        /// Shape it should have.
        expected: Vec<usize>,
        /// Shape it has.
        found: Vec<usize>,
    },
    /// Stored with elements that are not weights.
    Dtype {
        /// Its name in the checkpoint.
        tensor: String,
        /// Element type it has.
        found: String,
    },
    /// Parts of one matrix differ in dtype.
    Mixed {
        /// Canonical name.
        tensor: String,
        /// A part and its dtype.
        first: (String, DType),
        /// Another part and its dtype.
        second: (String, DType),
    },
    /// Stored inside the model's body but no part of the architecture that the configuration describes.
    Unexpected {
        /// Its name in the checkpoint.
        tensor: String,
    },
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { tensor, expected } => write!(f, "{tensor} is missing, expected {expected:?}"),
            Self::Shape { tensor, expected, found } => write!(f, "{tensor} is {found:?}, expected {expected:?}"),
            Self::Dtype { tensor, found } => write!(f, "{tensor} is {found}, expected f16, bf16 or f32"),
            Self::Mixed { tensor, first, second } => write!(
                f,
                "{tensor} mixes dtypes: {} is {}, {} is {}; save the model in one dtype",
                first.0, first.1, second.0, second.1
            ),
            Self::Unexpected { tensor } => {
                write!(f, "{tensor} is stored, but the architecture in config.json has no place for it")
            }
        }
    }
}

/// The other side of missing tensors.
pub(super) fn left_over(unplaced: &[String]) -> String {
    if unplaced.is_empty() {
        return String::new();
    }
    format!("\n  The files hold {} tensor(s) that the model has no place for: {}", unplaced.len(), list(unplaced))
}

/// What to do about weights that are stored as something else.
pub(super) fn hint(problems: &[TensorProblem], unplaced: &[String]) -> &'static str {
    if problems.iter().any(|problem| matches!(problem, TensorProblem::Dtype { .. })) {
        "\n  For a quantised model use the original 16-bit checkpoint (`prepare --dtype int8` makes smaller bundles from it); \
         any other load with transformers and save as float16: model.half().save_pretrained(..)"
    } else if matches!(problems, [TensorProblem::Missing { tensor, .. }] if HEADS.contains(&tensor.as_str())) {
        "\n  config.json says that the head is not tied to the embedding; if it is, set \"tie_word_embeddings\": true"
    } else if unplaced.iter().any(|name| name.contains(".lora_") || name.contains(".base_layer.")) {
        "\n  There is an adapter beside the weights: merge it into them (peft: merge_and_unload) and save_pretrained"
    } else {
        ""
    }
}

/// The differences, one a line.
pub(super) fn lines(problems: &[TensorProblem]) -> String {
    let mut text: String = problems.iter().take(NAMES_MAX).map(|problem| format!("\n  {problem}")).collect();
    if problems.len() > NAMES_MAX {
        text += &format!("\n  and {} more", problems.len() - NAMES_MAX);
    }
    text
}
