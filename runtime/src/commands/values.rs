//! Values of options: a wrong one is answered with what is allowed.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use flashlm_io::{DirectIo, EngineChoice};

/// A number from 0 on.
pub(crate) fn non_negative(text: &str) -> Result<f32, String> {
    number(text, |v| v >= 0.0, "give a number of at least 0, such as 0.7")
}

/// A number above 0.
pub(crate) fn positive(text: &str) -> Result<f32, String> {
    number(text, |v| v > 0.0, "give a number above 0, such as 1.1")
}

/// A number above 0 and at most 1.
pub(crate) fn share(text: &str) -> Result<f32, String> {
    number(text, |v| v > 0.0 && v <= 1.0, "give a number above 0 and at most 1, such as 0.9")
}

fn number(text: &str, good: impl Fn(f32) -> bool, give: &str) -> Result<f32, String> {
    text.parse().ok().filter(|v: &f32| v.is_finite() && good(*v)).ok_or_else(|| give.to_owned())
}

/// A way to read past the page cache, by name.
pub(crate) fn direct_io() -> impl TypedValueParser<Value = DirectIo> {
    PossibleValuesParser::new(["required", "optional", "disabled"]).try_map(|word| word.parse::<DirectIo>())
}

/// An engine, by name.
pub(crate) fn engine() -> impl TypedValueParser<Value = EngineChoice> {
    PossibleValuesParser::new(["auto", "io_uring", "threads"]).try_map(|word| word.parse::<EngineChoice>())
}
