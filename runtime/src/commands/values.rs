//! Values of options: a wrong one is answered with what is allowed.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use flashlm::disk_cost::{DiskProfileError, ReadCost, kept_profile, profiled_cost, read_profile};
use flashlm::planner::ReadPlan;
use flashlm_io::{DirectIo, DiskProfile, EngineChoice};

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

/// The disk that reads are planned for: that of a profile, or a typical one.
#[derive(Clone, Debug)]
pub(crate) enum Disk {
    Typical,
    Profile(PathBuf),
}

impl FromStr for Disk {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == "none" { Self::Typical } else { Self::Profile(text.into()) })
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Typical => f.write_str("none"),
            Self::Profile(path) => path.display().fmt(f),
        }
    }
}

impl Disk {
    /// How reads are planned, starting from it.
    pub(crate) fn reads(&self) -> Result<ReadPlan, DiskProfileError> {
        Ok(ReadPlan::Observed(match self {
            Self::Typical => ReadCost::USUAL,
            Self::Profile(path) => profiled_cost(path)?,
        }))
    }

    /// The profile of the disk that was asked for, or the one kept for the disk below `bundle`, if there is one.
    pub(crate) fn profile(asked: Option<&Self>, bundle: &Path) -> Result<Option<DiskProfile>, DiskProfileError> {
        match asked {
            None => Ok(kept_profile(bundle).1),
            Some(Self::Typical) => Ok(None),
            Some(Self::Profile(path)) => read_profile(path).map(Some),
        }
    }
}
