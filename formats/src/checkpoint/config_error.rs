//! What can be wrong with a configuration.

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A key without a default is missing.
    #[error("the key {key:?} is missing; expected {expected}")]
    Missing {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A value of the wrong JSON type.
    #[error("{key:?} is {found}; expected {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
        /// The value found, shortened.
        found: String,
    },
    /// A number outside what a model can have.
    #[error("{key:?} is {found}; expected {expected}")]
    OutOfRange {
        /// The key.
        key: String,
        /// What it should be.
        expected: String,
        /// The value found.
        found: String,
    },
    /// A value that exists elsewhere and is not supported here.
    #[error("{key} {found} is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// The value found.
        found: String,
        /// What is supported.
        supported: String,
    },
    /// No family that is known.
    #[error(
        "model_type {model_type:?}{} is not supported; supported: {supported}; `flashlm-prep families` says more",
        among(architectures)
    )]
    Family {
        /// What `model_type` says.
        model_type: String,
        /// The classes it names.
        architectures: Vec<String>,
        /// Every `model_type` that is supported.
        supported: String,
    },
    /// Two keys that cannot both be true.
    #[error("{first} does not go with {second}: {rule}")]
    Contradiction {
        /// One key and its value.
        first: String,
        /// The other.
        second: String,
        /// Why not.
        rule: &'static str,
    },
    /// Weights quantised by another tool.
    #[error("the weights are quantised ({method}); start from the original float16, bfloat16 or float32 checkpoint")]
    Quantized {
        /// The method named in `quantization_config`.
        method: String,
    },
}

/// Class names in brackets, the first few.
fn among(classes: &[String]) -> String {
    if classes.is_empty() { String::new() } else { format!(" ({})", classes[..classes.len().min(3)].join(", ")) }
}
