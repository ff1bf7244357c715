//! Opens a bundle and checks it.
//!
//! Opening reads the header, the manifest, the tokenizer, the index and the resident section's table, and checks their
//! checksums and every number in them. The large sections are not read: whoever reads them holds them against the checksums
//! given here, or asks [`verify`](super::verify()) to.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::checksum;
use super::error::{BundleError, Fault};
use super::header::{FORMAT_VERSION, HEADER_BYTES, Header, HeaderProblem, MAGIC};
use super::index::{self, LayerTable};
use super::layout::FlashLayout;
use super::limits;
use super::manifest::{FfnStorage, Manifest};
use super::resident::{self, LENGTH_BYTES, ResidentTable, TensorEntry};
use super::section::{Extent, Section, SectionInfo};
use crate::ids::NeuronId;
use crate::model::ModelSpec;
use crate::regular::open_regular;

/// An open bundle whose structure has been checked.
#[derive(Debug)]
pub struct Bundle {
    path: PathBuf,
    file: File,
    file_bytes: u64,
    /// Device and inode.
    place: (u64, u64),
    header: Header,
    manifest: Manifest,
    tokenizer: Vec<u8>,
    layout: FlashLayout,
    /// Storage orders; their checksums were taken out.
    layers: Vec<LayerTable>,
    /// The checksums of `layers`, shared with those who read groups.
    checksums: Vec<Arc<[u64]>>,
    resident: Vec<TensorEntry>,
    /// The scales of each layer's records; empty if these have none.
    ffn_scales: Vec<Extent>,
    resident_by_name: HashMap<String, usize>,
}

impl Bundle {
    /// Opens the bundle at `path`.
    ///
    /// # Errors
    /// `NotABundle`, `TooNew`, `Truncated`, `Corrupt` with the section, or `Io`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, BundleError> {
        let path = path.as_ref();
        let file = open_regular(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::IsADirectory => BundleError::Directory { path: path.to_owned() },
            _ => BundleError::io("open", path)(error),
        })?;
        let metadata = file.metadata().map_err(BundleError::io("look at", path))?;
        let file_bytes = metadata.len();
        let header = read_header(&file, file_bytes, path)?;
        header.check().map_err(|fault| fault.at(path))?;

        let source = Source { file: &file, path, header: &header };
        let manifest = source.small(Section::Manifest, limits::MANIFEST_BYTES_MAX)?;
        let manifest = parse_manifest(&manifest).map_err(|fault| fault.at(path))?;
        let tokenizer = source.small(Section::Tokenizer, limits::TOKENIZER_BYTES_MAX)?;
        let (layout, mut layers) = check_flash(&source, &manifest)?;
        let checksums = layers.iter_mut().map(|layer| std::mem::take(&mut layer.checksums).into()).collect();
        let ResidentTable { tensors: resident, ffn_scales } = source.resident_table(&manifest)?;
        let present = header.section(Section::Predictors) != SectionInfo::default();
        if present != manifest.predictors.is_some() {
            let (expected, found) = if present { ("none", "one") } else { ("one", "none") };
            return Err(Fault::new(Section::Predictors, "section, from the manifest", expected, found).at(path));
        }
        let resident_by_name = resident.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let path = path.to_owned();
        Ok(Self {
            path,
            file,
            file_bytes,
            place: (metadata.dev(), metadata.ino()),
            header,
            manifest,
            tokenizer,
            layout,
            layers,
            checksums,
            resident,
            ffn_scales,
            resident_by_name,
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Bytes of the file after the end that the header states: an interrupted
    /// [`replace_predictors`](super::replace_predictors()) leaves some, and whatever appends. They belong to nothing.
    pub fn trailing_bytes(&self) -> u64 {
        self.file_bytes - self.header.file_bytes
    }

    /// Device number, inode number and length of the file that was opened: another file may have its name by now.
    pub fn identity(&self) -> (u64, u64, u64) {
        (self.place.0, self.place.1, self.file_bytes)
    }

    /// What the bundle holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        &self.manifest.model
    }

    /// The tokenizer's JSON.
    pub fn tokenizer(&self) -> &[u8] {
        &self.tokenizer
    }

    /// How records and groups lie in a layer.
    pub fn layout(&self) -> &FlashLayout {
        &self.layout
    }

    /// Place and checksum of a section; `None` for predictors that are not there.
    ///
    /// The checksum of [`Section::Flash`] covers the checksums of its groups, not its bytes.
    pub fn section(&self, section: Section) -> Option<SectionInfo> {
        Some(self.header.section(section)).filter(|info| *info != SectionInfo::default())
    }

    /// Place and checksum of the resident section, safetensors header included.
    pub fn resident(&self) -> SectionInfo {
        self.header.section(Section::Resident)
    }

    /// The resident tensors, in the order of [`ModelSpec::resident_tensors`].
    pub fn resident_tensors(&self) -> &[TensorEntry] {
        &self.resident
    }

    /// The resident tensor called `name`.
    pub fn resident_tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.resident_by_name.get(name).map(|i| &self.resident[*i])
    }

    /// Place of the scales of a layer's records, `[neurons, vectors, groups of a row]` in storage order, if they have any.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn ffn_scales(&self, layer: usize) -> Option<Extent> {
        assert!(layer < self.layers.len(), "layer {layer} of {}", self.layers.len());
        self.ffn_scales.get(layer).copied()
    }

    /// Place and checksum of the predictors, a safetensors blob.
    pub fn predictors(&self) -> Option<SectionInfo> {
        self.section(Section::Predictors)
    }

    /// Place of the flash section: the layers, [`FlashLayout::layer_stride`] apart.
    pub fn flash(&self) -> Extent {
        self.header.section(Section::Flash).extent
    }

    /// Place of a layer's groups.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn layer(&self, layer: usize) -> Extent {
        assert!(layer < self.layers.len(), "layer {layer} of {}", self.layers.len());
        let offset = self.flash().offset + layer as u64 * self.layout.layer_stride() as u64;
        Extent { offset, bytes: self.layout.layer_bytes() as u64 }
    }

    /// Place of a group.
    ///
    /// # Panics
    /// If the model has no such layer or group.
    pub fn group(&self, layer: usize, group: usize) -> Extent {
        assert!(group < self.layout.groups(), "group {group} of {}", self.layout.groups());
        let offset = self.layer(layer).offset + self.layout.group_offset(group) as u64;
        Extent { offset, bytes: self.layout.group_bytes() as u64 }
    }

    /// [`checksum`] of each group of a layer, padding included.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn group_checksums(&self, layer: usize) -> &Arc<[u64]> {
        &self.checksums[layer]
    }

    /// The neuron at each storage position of a layer.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn storage_order(&self, layer: usize) -> &[NeuronId] {
        &self.layers[layer].order
    }

    /// Reads `buffer.len()` bytes at `offset`, an ordinary positional read.
    ///
    /// # Errors
    /// `Io`.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BundleError> {
        self.file.read_exact_at(buffer, offset).map_err(BundleError::io("read", &self.path))
    }

    /// Reads a part of the resident section, such as a tensor. Not checked against a checksum: that covers the whole section.
    ///
    /// # Errors
    /// `Io`.
    pub fn read_part(&self, extent: Extent) -> Result<Vec<u8>, BundleError> {
        let mut bytes = vec![0; extent.bytes as usize];
        self.read_at(extent.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads the predictors and checks their checksum; `None` if there are none.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    pub fn read_predictors(&self) -> Result<Option<Vec<u8>>, BundleError> {
        let source = Source { file: &self.file, path: &self.path, header: &self.header };
        self.predictors().map(|_| source.small(Section::Predictors, u64::MAX)).transpose()
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }
}

fn read_header(file: &File, file_bytes: u64, path: &Path) -> Result<Header, BundleError> {
    let mut bytes = [0; HEADER_BYTES];
    let there = file_bytes.min(HEADER_BYTES as u64) as usize;
    file.read_exact_at(&mut bytes[..there], 0).map_err(BundleError::io("read", path))?;
    if there < HEADER_BYTES && there >= MAGIC.len() && bytes[..MAGIC.len()] == MAGIC {
        return Err(BundleError::Truncated { path: path.to_owned(), expected: HEADER_BYTES as u64, found: file_bytes });
    }
    let header = Header::decode(&bytes).map_err(|problem| match problem {
        HeaderProblem::NotABundle => {
            BundleError::NotABundle { path: path.to_owned(), found: bytes[..there.min(MAGIC.len())].to_vec() }
        }
        HeaderProblem::TooNew { found } => {
            BundleError::TooNew { path: path.to_owned(), found, supported: FORMAT_VERSION }
        }
        HeaderProblem::Fault(fault) => fault.at(path),
    })?;
    if header.file_bytes > file_bytes {
        return Err(BundleError::Truncated { path: path.to_owned(), expected: header.file_bytes, found: file_bytes });
    }
    Ok(header)
}

/// A file whose table of sections has been checked against its length.
struct Source<'a> {
    file: &'a File,
    path: &'a Path,
    header: &'a Header,
}

impl Source<'_> {
    /// Reads a section whole and checks its checksum.
    fn small(&self, section: Section, bytes_max: u64) -> Result<Vec<u8>, BundleError> {
        let SectionInfo { extent, checksum: expected } = self.header.section(section);
        if extent.bytes > bytes_max {
            let fault = Fault::new(section, "length", format_args!("{bytes_max} at most"), extent.bytes);
            return Err(fault.at(self.path));
        }
        let bytes = self.read(extent)?;
        let found = checksum(&bytes);
        if found != expected {
            return Err(Fault::checksum(section, "the section", expected, found).at(self.path));
        }
        Ok(bytes)
    }

    fn read(&self, extent: Extent) -> Result<Vec<u8>, BundleError> {
        let mut bytes = vec![0; extent.bytes as usize];
        self.file.read_exact_at(&mut bytes, extent.offset).map_err(BundleError::io("read", self.path))?;
        Ok(bytes)
    }

    fn resident_table(&self, manifest: &Manifest) -> Result<ResidentTable, BundleError> {
        let section = self.header.section(Section::Resident).extent;
        let mut first = [0; LENGTH_BYTES];
        let there = section.bytes.min(LENGTH_BYTES as u64) as usize;
        self.file.read_exact_at(&mut first[..there], section.offset).map_err(BundleError::io("read", self.path))?;
        let bytes = resident::json_bytes(first, section).map_err(|fault| fault.at(self.path))?;
        let json = self.read(Extent { offset: section.offset + LENGTH_BYTES as u64, bytes })?;
        resident::decode_table(&json, manifest, section).map_err(|fault| fault.at(self.path))
    }
}

fn parse_manifest(json: &[u8]) -> Result<Manifest, Fault> {
    let manifest: Manifest = serde_json::from_slice(json)
        .map_err(|e| Fault::new(Section::Manifest, "JSON", "a manifest of this format version", e))?;
    limits::check_model(&manifest.model)?;
    limits::check_facts(&manifest)?;
    Ok(manifest)
}

/// Holds manifest, index and the extents of index and flash section against each other.
fn check_flash(source: &Source<'_>, manifest: &Manifest) -> Result<(FlashLayout, Vec<LayerTable>), BundleError> {
    let at = |fault: Fault| fault.at(source.path);
    let (model, ffn, header) = (&manifest.model, &manifest.ffn, source.header);
    let row_bytes = ffn.dtype.row_bytes(model.hidden_size);
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let records = size(ffn.records_per_group);
    let layout =
        FlashLayout::with_records(model.ffn().size, model.ffn().vectors(), row_bytes, records, size(ffn.alignment));
    let layout = layout.map_err(|e| at(Fault::new(Section::Manifest, "ffn", "a possible layout", e)))?;
    let expected = FfnStorage::new(&layout, model.layers.len(), ffn.dtype, ffn.order.clone());
    for (what, expected, found) in [
        ("ffn.record_bytes", expected.record_bytes, ffn.record_bytes),
        ("ffn.group_bytes", expected.group_bytes, ffn.group_bytes),
        ("ffn.padding_bytes", expected.padding_bytes, ffn.padding_bytes),
    ] {
        if expected != found {
            return Err(at(Fault::new(Section::Manifest, what, expected, found)));
        }
    }
    let (flash, index) = (header.section(Section::Flash), header.section(Section::Index));
    let flash_bytes = (layout.layer_stride() as u64).checked_mul(model.layers.len() as u64);
    if flash_bytes != Some(flash.extent.bytes) {
        let expected = flash_bytes.map_or("a possible length".into(), |bytes| bytes.to_string());
        return Err(at(Fault::new(Section::Flash, "length", expected, flash.extent.bytes)));
    }
    if !flash.extent.offset.is_multiple_of(layout.alignment() as u64) {
        let expected = format!("a multiple of {}", layout.alignment());
        return Err(at(Fault::new(Section::Flash, "offset", expected, flash.extent.offset)));
    }
    let index_bytes = index::index_bytes(&layout, model.layers.len());
    if index_bytes != index.extent.bytes {
        return Err(at(Fault::new(Section::Index, "length", index_bytes, index.extent.bytes)));
    }
    let bytes = source.small(Section::Index, limits::INDEX_BYTES_MAX)?;
    let layers = index::decode(&bytes, &layout, model.layers.len(), flash.extent).map_err(at)?;
    let sums = index::flash_checksum(&layers);
    if sums != flash.checksum {
        return Err(at(Fault::checksum(Section::Flash, "the groups' checksums", flash.checksum, sums)));
    }
    Ok((layout, layers))
}
