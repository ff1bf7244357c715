//! The kinds of files that commands write, known by how they begin.

use std::io::{self, Read};
use std::path::Path;

use crate::bundle::MAGIC;
use crate::regular::open_regular;

/// Stands in the metadata of a file of logits.
pub const LOGITS_FORMAT: &str = "flashlm-logits";
/// Stands in the metadata of a saved session.
pub const SESSION_FORMAT: &str = "flashlm-session";
/// Stands at the beginning of a file of thresholds.
pub const THRESHOLDS_FORMAT: &str = "flashlm-thresholds";
/// Stands at the beginning of `predictors.json`.
pub const PREDICTORS_FORMAT: &str = "flashlm-predictors";
/// Stands at the beginning of `orders.json`.
pub const ORDERS_FORMAT: &str = "flashlm-orders";
/// Stands at the beginning of `report.json`.
pub const REPORT_DATA_FORMAT: &str = "flashlm-report";
/// Stands in the head of a report's page.
pub const REPORT_MARK: &str = "<meta name=\"generator\" content=\"flashlm-prep report\"/>";

/// Stands at the beginning of a manual page.
pub const MANUAL_MARK: &str = ".\\\" A manual page of flashlm.";

/// As many bytes tell what a file is.
const HEAD_BYTES: u64 = 4096;

/// What a command writes as one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// `model.flashlm`.
    Bundle,
    /// What `flashlm logits` writes.
    Logits,
    /// What `flashlm run --session` writes.
    Session,
    /// What `flashlm-prep thresholds` writes.
    Thresholds,
    /// What `flashlm-prep report` writes.
    Report,
    /// A page that `man` writes.
    Manual,
}

impl FileKind {
    /// In words, with an article.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Bundle => "a bundle",
            Self::Logits => "a file of logits (as this version writes them)",
            Self::Session => "a saved session",
            Self::Thresholds => "a file of thresholds",
            Self::Report => "a report (as this version writes them)",
            Self::Manual => "a manual page that flashlm wrote",
        }
    }

    /// Whether the file at `path` is one.
    pub(super) fn is(self, path: &Path) -> io::Result<bool> {
        let head = head(path)?;
        Ok(match self {
            Self::Bundle => head.starts_with(&MAGIC),
            Self::Logits => safetensors_header(&head).is_some_and(|header| says(header, "format", LOGITS_FORMAT)),
            Self::Session => safetensors_header(&head).is_some_and(|header| says(header, "format", SESSION_FORMAT)),
            Self::Thresholds => is_json_of(&head, THRESHOLDS_FORMAT),
            Self::Report => head.starts_with(b"<!DOCTYPE html>") && contains(&head, REPORT_MARK.as_bytes()),
            Self::Manual => head.starts_with(MANUAL_MARK.as_bytes()),
        })
    }
}

/// The first bytes of a file.
pub(super) fn head(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    open_regular(path)?.take(HEAD_BYTES).read_to_end(&mut head)?;
    Ok(head)
}

/// The beginning of a safetensors header.
pub(super) fn safetensors_header(head: &[u8]) -> Option<&[u8]> {
    head.get(8..).filter(|header| header.starts_with(b"{"))
}

/// Whether it is a JSON object that says so near its beginning.
pub(super) fn is_json_of(head: &[u8], format: &str) -> bool {
    head.starts_with(b"{") && says(head, "format", format)
}

/// Whether JSON has this key with this text, with or without a space between.
pub(super) fn says(json: &[u8], key: &str, value: &str) -> bool {
    [":", ": "].iter().any(|colon| contains(json, format!("\"{key}\"{colon}\"{value}").as_bytes()))
}

pub(super) fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
