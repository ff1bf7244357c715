//! The bundle: one file, `*.flashlm`, that holds a model ready to be run from flash.
//!
//! The byte layout is written down in `docs/bundle-format.md`; a test holds that page and this code together. In short: a
//! header of one sector (with a table of sections), then sections that begin at multiples of 4 KiB: the tokenizer, the
//! resident tensors, the index of the flash section, the flash section itself (neuron records in groups), predictors, and the
//! manifest. Everything that has one entry per neuron is in *storage order*, the order of the records.
//!
//! - [`Bundle`] opens a bundle and checks it: no number is used before it has been compared with the file's length.
//! - [`BundleWriter`] writes one in a single pass, whole or not at all; [`replace_predictors`] changes one in place.
//! - [`verify`] reads all of a bundle and reports each damaged place.
//! - [`FlashLayout`] is the arithmetic of records and groups, without any file.
//!
//! Nothing here opens a file for direct I/O or maps it: what lies in the flash section is read by others, who ask this module
//! for offsets only.

mod error;
mod header;
mod index;
mod layout;
mod limits;
mod manifest;
mod reader;
mod replace;
mod resident;
mod section;
mod storage;
mod verify;
mod writer;

#[cfg(test)]
mod description;

pub use error::{BundleError, Fault};
pub use header::FORMAT_VERSION;
pub(crate) use header::MAGIC;
pub use layout::{DEFAULT_ALIGNMENT, DEFAULT_GROUP_BYTES, FlashLayout, LayoutError, LayoutOptions};
#[cfg(feature = "preparation")]
pub(crate) use limits::check_model;
pub use manifest::{
    FfnStorage, LayerPredictor, LayerSparsity, Manifest, NotAPredictor, PREDICTOR_ROWS, PredictorDType, PredictorInfo,
    PredictorKind, Provenance, ReusePoint, SourceFile, SpecialTokens,
};
pub use reader::Bundle;
pub use replace::{Replacement, remove_trailing_bytes, replace_predictors, replace_predictors_on};
pub use resident::TensorEntry;
pub use section::{Extent, Section, SectionInfo};
pub use storage::{FileStorage, Storage};
pub use verify::{VerifyReport, verify};
pub use writer::{BundlePlan, BundleWriter, CompleteBundle, Extras};

/// Names the contents of the bundle at `path` by its header, whose checksum covers those of all sections; `None` where there is no
/// header of a bundle. That the sections still are what the header says, [`verify`] finds out.
///
/// # Errors
/// What the system says.
pub fn bundle_identity(path: &std::path::Path) -> std::io::Result<Option<u64>> {
    use std::io::Read;
    let mut head = [0; header::HEADER_BYTES];
    match crate::regular::open_regular(path)?.read_exact(&mut head) {
        Ok(()) => Ok(header::Header::decode(&head).ok().map(|header| header.identity())),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Checksum used everywhere in a bundle: XXH3, 64 bits, seed 0.
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
