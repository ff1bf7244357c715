//! What a family file says about its family, for `flashlm-prep families` and docs/families.md.

use serde::Serialize;

/// A family, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FamilyInfo {
    /// Its name.
    pub name: &'static str,
    /// Values of `model_type` in config.json that are understood.
    pub model_types: &'static [&'static str],
    /// Published checkpoints of the kind.
    pub checkpoints: &'static str,
    /// What of the architecture is covered.
    pub covers: &'static str,
    /// What was tried, and against what.
    pub verified: &'static str,
    /// Miniature checkpoints in `tests/fixtures/quirks` whose logits and greedy ids are compared with a reference, in every
    /// way of running them.
    pub references: usize,
}
