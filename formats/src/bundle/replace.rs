//! Replaces predictors and manifest of a bundle without rewriting the rest.
//!
//! New sections are written where no section is, made durable, and then the header, one sector, is overwritten. A process killed
//! at any moment leaves a bundle with the old sections or with the new ones.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::error::BundleError;
use super::header::Header;
use super::manifest::Manifest;
use super::reader::Bundle;
use super::section::Section;
use super::storage::{self, Storage};
use super::writer::Tail;
use crate::regular::open_regular_for_change;

/// A file that is changed in place.
struct InPlace(File);

impl Storage for InPlace {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn publish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives the bundle at `path` other predictors (`None` removes them) and another manifest, which may differ in `predictors`,
/// `sparsity` and `provenance` only.
///
/// Programs that have the bundle open keep what they have read; those that read predictors later find them changed by the
/// checksum.
///
/// # Errors
/// Whatever opening the bundle reports, `WrongInput` for a manifest of another model or layout, `Busy`, `Io`.
pub fn replace_predictors(path: &Path, predictors: Option<&[u8]>, manifest: &Manifest) -> Result<(), BundleError> {
    Replacement::begin(path, predictors, manifest)?.write()
}

/// Other predictors for a bundle, as [`replace_predictors`] puts them there.
pub struct Replacement<'a> {
    storage: InPlace,
    bundle: Bundle,
    tail: Tail<'a>,
}

impl<'a> Replacement<'a> {
    /// Takes the bundle at `path` for this process, and writes nothing yet.
    ///
    /// # Errors
    /// As [`replace_predictors`].
    pub fn begin(path: &Path, predictors: Option<&'a [u8]>, manifest: &Manifest) -> Result<Self, BundleError> {
        let file = open_regular_for_change(path).map_err(BundleError::io("open", path))?;
        storage::lock(&file, path)?;
        let bundle = Bundle::open(path)?;
        let tail = tail_for(&bundle, predictors, manifest)?;
        Ok(Self { storage: InPlace(file), bundle, tail })
    }

    /// What [`bundle_identity`](super::bundle_identity) will say of the bundle.
    pub fn identity(&self) -> u64 {
        self.tail.header(self.bundle.header().sections).identity()
    }

    /// Puts them there.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(mut self) -> Result<(), BundleError> {
        let path = self.bundle.path();
        let written = self.tail.write(&mut self.storage, self.bundle.header().sections);
        written.map_err(BundleError::io("write", path))?;
        // What lies after the new end belongs to nobody any more.
        self.storage.0.set_len(self.tail.end()).map_err(BundleError::io("truncate", path))
    }
}

/// Cuts off what lies after the end of the bundle at `path`, see [`Bundle::trailing_bytes`], and says how many bytes that was.
///
/// # Errors
/// Whatever opening the bundle reports, `Busy`, `Io`.
pub fn remove_trailing_bytes(path: &Path) -> Result<u64, BundleError> {
    let file = open_regular_for_change(path).map_err(BundleError::io("open", path))?;
    storage::lock(&file, path)?;
    let bundle = Bundle::open(path)?;
    let cut = file.set_len(bundle.header().file_bytes).and_then(|()| file.sync_all());
    cut.map_err(BundleError::io("truncate", path))?;
    Ok(bundle.trailing_bytes())
}

/// As [`replace_predictors`], writing to any storage that holds the bytes of `bundle`. The end of the last section is returned.
///
/// # Errors
/// As [`replace_predictors`].
pub fn replace_predictors_on(
    storage: &mut impl Storage,
    bundle: &Bundle,
    predictors: Option<&[u8]>,
    manifest: &Manifest,
) -> Result<u64, BundleError> {
    let tail = tail_for(bundle, predictors, manifest)?;
    tail.write(storage, bundle.header().sections).map_err(BundleError::io("write", bundle.path()))?;
    Ok(tail.end())
}

fn tail_for<'a>(bundle: &Bundle, predictors: Option<&'a [u8]>, manifest: &Manifest) -> Result<Tail<'a>, BundleError> {
    let old = bundle.manifest();
    let fixed = |m: &Manifest| (m.model.clone(), m.model_bytes, m.ffn.clone(), m.resident);
    if fixed(old) != fixed(manifest) {
        return Err(BundleError::input("manifest", "the same model and storage as in the bundle", "others"));
    }
    place(bundle.header(), predictors, manifest)
}

/// Right after the sections that stay, if the new ones end before the old ones begin; else after everything. Replacing again
/// and again so needs the room of two, not of all.
fn place<'a>(header: &Header, predictors: Option<&'a [u8]>, manifest: &Manifest) -> Result<Tail<'a>, BundleError> {
    let replaced = |section: Section| matches!(section, Section::Predictors | Section::Manifest);
    let extents = header.in_file_order();
    let kept_end = extents.iter().filter(|(s, _)| !replaced(*s)).map(|(_, e)| e.end()).max();
    let kept_end = kept_end.expect("an open bundle has a flash section");
    let old_begin = extents.iter().filter(|(s, _)| replaced(*s)).map(|(_, e)| e.offset).min();
    let near = Tail::new(manifest, predictors, kept_end)?;
    if old_begin.is_some_and(|begin| near.end() <= begin && begin >= kept_end) {
        return Ok(near);
    }
    Tail::new(manifest, predictors, header.file_bytes)
}
