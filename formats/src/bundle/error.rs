//! What can be wrong with a bundle, and with what a writer is given.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::layout::LayoutError;
use super::section::Section;

/// A place in a bundle that is not what it has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The section; `None` for the header and the space between sections.
    pub section: Option<Section>,
    /// Which number or range, in words.
    pub what: String,
    /// What it has to be.
    pub expected: String,
    /// What it is.
    pub found: String,
}

impl Fault {
    pub(super) fn new(
        section: impl Into<Option<Section>>,
        what: impl Into<String>,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        Self { section: section.into(), what: what.into(), expected: expected.to_string(), found: found.to_string() }
    }

    /// A checksum that does not match.
    pub(super) fn checksum(
        section: impl Into<Option<Section>>,
        what: impl Into<String>,
        expected: u64,
        found: u64,
    ) -> Self {
        Self::new(section, what, format_args!("checksum {expected:016x}"), format_args!("{found:016x}"))
    }

    /// The same, said of a part of something larger.
    pub(super) fn within(self, whole: impl fmt::Display) -> Self {
        Self { what: format!("{whole}: {}", self.what), ..self }
    }

    pub(super) fn at(self, path: &Path) -> BundleError {
        BundleError::Corrupt { path: path.to_owned(), fault: self }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let section = self.section.map_or("header", Section::name);
        write!(f, "{section}: {}: expected {}, found {}", self.what, self.expected, self.found)
    }
}

/// An error of reading or writing a bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The file does not begin like a bundle.
    #[error("{path} is not a flashlm bundle ({}){}", begins_with(found), hint(found))]
    NotABundle {
        /// The file.
        path: PathBuf,
        /// Its first bytes, eight at most.
        found: Vec<u8>,
    },
    /// The bundle was written by a later version of flashlm.
    #[error("{path} has bundle format {found}, this program reads formats up to {supported}: use a newer flashlm")]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format version.
        found: u32,
        /// The newest one that can be read.
        supported: u32,
    },
    /// The file is shorter than it says.
    #[error("{path} is cut short: it should have {expected} bytes and has {found}; copy it again or rebuild it")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes needed.
        expected: u64,
        /// Bytes there.
        found: u64,
    },
    /// Something in the file is not what it has to be.
    #[error("{path} is damaged: {fault}; copy it again or rebuild it")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What and where.
        fault: Fault,
    },
    /// Reading or writing failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is a directory where a bundle should be.
    #[error(
        "{path} is a directory, not a bundle; if it holds a checkpoint, `flashlm-prep convert {path} -o model.flashlm` makes a \
         bundle of it"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
    },
    /// The output exists and may not be overwritten.
    #[error("{path} exists already; remove it, or allow it to be overwritten (--force)")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Another process is writing the same file.
    #[error("{path} is being written by another process")]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// Neuron records cannot be laid out as asked.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A writer was given something that does not belong where it was given.
    #[error("cannot write the bundle: {what}: expected {expected}, got {found}")]
    WrongInput {
        /// Which input.
        what: String,
        /// What it has to be.
        expected: String,
        /// What it was.
        found: String,
    },
}

/// How a file begins, as text where it is some.
fn begins_with(found: &[u8]) -> String {
    match found {
        [] => "it is empty".into(),
        _ if found.iter().all(|byte| byte.is_ascii_graphic() || b" \r\n\t".contains(byte)) => {
            format!("it begins with \"{}\"", found.escape_ascii())
        }
        _ => {
            let bytes: Vec<String> = found.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("it begins with the bytes {}", bytes.join(" "))
        }
    }
}

/// What a file is by its first bytes, where that tells what to do.
fn hint(found: &[u8]) -> &'static str {
    match found {
        [b'G', b'G', b'U', b'F', ..] => {
            ": it is a GGUF file, for other programs; `flashlm-prep prepare` makes a bundle from the Hugging Face checkpoint that it was made from"
        }
        // A length, far below 4 GB, and a zip archive: weights.
        [b'P', b'K', 3, 4, ..] | [_, _, _, _, 0, 0, 0, 0] => {
            ": it looks like a checkpoint's weights; `flashlm-prep prepare` or `convert` makes a bundle of the checkpoint's directory"
        }
        [] => ": copy it again or rebuild it",
        _ => "",
    }
}

impl BundleError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    pub(super) fn input(what: impl Into<String>, expected: impl fmt::Display, found: impl fmt::Display) -> Self {
        Self::WrongInput { what: what.into(), expected: expected.to_string(), found: found.to_string() }
    }
}
