//! Writes a bundle in one pass.
//!
//! Everything but predictors and manifest has its place before the first byte is written, because it follows from the model.
//! So resident tensors and groups go straight to the file, in order, and the writer keeps no more than the index. The header
//! comes last, after everything else is durable: a file without it is no bundle.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::checksum;
use super::error::{BundleError, Fault};
use super::header::Header;
use super::index::{self, LayerTable};
use super::layout::{FlashLayout, LayoutOptions};
use super::limits;
use super::manifest::{FfnStorage, LayerSparsity, Manifest, PredictorInfo, Provenance, SpecialTokens};
use super::resident;
use super::section::{Extent, SECTION_ALIGNMENT, Section, SectionInfo};
use super::storage::{FileStorage, Storage};
use crate::chat::{Chat, SamplingDefaults};
use crate::ids::NeuronId;
use crate::model::{DType, ModelSpec};
use crate::weight_format::{ResidentFormats, WeightFormat};

/// What a bundle will hold: all that has to be known before the first byte is written.
#[derive(Clone, Debug)]
pub struct BundlePlan {
    /// The architecture.
    pub model: ModelSpec,
    /// Stored bytes of the source's tensors, tied ones once.
    pub model_bytes: u64,
    /// The source's element type of each of [`ModelSpec::resident_tensors`], in that order.
    pub resident_dtypes: Vec<DType>,
    /// How resident matrices are stored.
    pub resident: ResidentFormats,
    /// How the neuron records are stored.
    pub ffn_dtype: WeightFormat,
    /// How records are grouped.
    pub layout: LayoutOptions,
    /// Name of the strategy that chose the storage orders; `checkpoint` for the source's own.
    pub order: String,
    /// The tokenizer's JSON.
    pub tokenizer: Vec<u8>,
}

/// What may be added to a bundle when all else is written.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// The predictors' description, and the safetensors blob itself.
    pub predictors: Option<(PredictorInfo, Vec<u8>)>,
    /// Measured sparsity of each layer.
    pub sparsity: Option<Vec<LayerSparsity>>,
    /// See [`Manifest::wide_kv`].
    pub wide_kv: bool,
    /// See [`Manifest::chat`].
    pub chat: Option<Chat>,
    /// See [`Manifest::sampling`].
    pub sampling: SamplingDefaults,
    /// Where the bundle comes from.
    pub provenance: Provenance,
}

/// Writes one bundle; see the [module](self).
///
/// The order of calls: [`resident`](Self::resident) until all resident tensors are there, then for every layer
/// [`begin_layer`](Self::begin_layer) and [`groups`](Self::groups) (and the scales of its records, where it has them), then [`finish`](Self::finish). Dropped before that, it
/// leaves nothing behind.
pub struct BundleWriter<S: Storage = FileStorage> {
    storage: S,
    path: PathBuf,
    model: ModelSpec,
    model_bytes: u64,
    ffn: FfnStorage,
    resident_formats: ResidentFormats,
    layout: FlashLayout,
    tokenizer: SectionInfo,
    resident: Extent,
    index: Extent,
    flash: Extent,
    resident_hash: Xxh3,
    resident_written: u64,
    layers: Vec<LayerTable>,
}

impl BundleWriter<FileStorage> {
    /// Begins a bundle that will be called `path`.
    ///
    /// # Errors
    /// `Exists` if there is such a file and `overwrite` is false, `Busy`, `Io`, `Layout`, and `WrongInput` for a plan that
    /// contradicts itself.
    pub fn create(path: &Path, plan: BundlePlan, overwrite: bool) -> Result<Self, BundleError> {
        let places = Places::new(&plan)?;
        Self::start(FileStorage::create(path, overwrite)?, path.to_owned(), plan, places)
    }
}

/// Where everything goes.
struct Places {
    layout: FlashLayout,
    resident_head: Vec<u8>,
    tokenizer: Extent,
    resident: Extent,
    index: Extent,
    flash: Extent,
}

impl Places {
    fn new(plan: &BundlePlan) -> Result<Self, BundleError> {
        let model = &plan.model;
        limits::check_model(model).map_err(refused)?;
        let tensors = model.resident_tensors().len();
        if plan.resident_dtypes.len() != tensors {
            return Err(BundleError::input("number of resident dtypes", tensors, plan.resident_dtypes.len()));
        }
        if !(1..=limits::TOKENIZER_BYTES_MAX).contains(&(plan.tokenizer.len() as u64)) {
            let range = format!("1 to {} bytes", limits::TOKENIZER_BYTES_MAX);
            return Err(BundleError::input("tokenizer", range, plan.tokenizer.len()));
        }
        let layout = FlashLayout::new(model, plan.ffn_dtype, plan.layout)?;
        if let Some(format) = plan.resident.formats().find(|format| !format.is_quantised()) {
            return Err(BundleError::input("format of resident matrices", "int8 or int4", format));
        }
        let (resident_head, data_bytes) =
            resident::encode_head(model, &plan.resident_dtypes, plan.resident, plan.ffn_dtype);
        let flash_alignment = SECTION_ALIGNMENT.max(layout.alignment() as u64);
        let mut end = SECTION_ALIGNMENT;
        let mut place = |bytes: u64, alignment: u64| {
            let extent = Extent { offset: end.next_multiple_of(alignment), bytes };
            end = extent.end();
            extent
        };
        Ok(Self {
            tokenizer: place(plan.tokenizer.len() as u64, SECTION_ALIGNMENT),
            resident: place(resident_head.len() as u64 + data_bytes, SECTION_ALIGNMENT),
            index: place(index::index_bytes(&layout, model.layers.len()), SECTION_ALIGNMENT),
            flash: place(layout.layer_stride() as u64 * model.layers.len() as u64, flash_alignment),
            layout,
            resident_head,
        })
    }
}

fn refused(fault: Fault) -> BundleError {
    BundleError::WrongInput { what: fault.what, expected: fault.expected, found: fault.found }
}

impl<S: Storage> BundleWriter<S> {
    /// Begins a bundle on any storage.
    ///
    /// # Errors
    /// As [`BundleWriter::create`].
    pub fn on(storage: S, plan: BundlePlan) -> Result<Self, BundleError> {
        let places = Places::new(&plan)?;
        Self::start(storage, PathBuf::new(), plan, places)
    }

    fn start(storage: S, path: PathBuf, plan: BundlePlan, places: Places) -> Result<Self, BundleError> {
        let Places { layout, resident_head, tokenizer, resident, index, flash } = places;
        let mut writer = Self {
            storage,
            path,
            ffn: FfnStorage::new(&layout, plan.model.layers.len(), plan.ffn_dtype, plan.order),
            resident_formats: plan.resident,
            layers: Vec::with_capacity(plan.model.layers.len()),
            model: plan.model,
            model_bytes: plan.model_bytes,
            layout,
            tokenizer: SectionInfo { extent: tokenizer, checksum: checksum(&plan.tokenizer) },
            resident,
            index,
            flash,
            resident_hash: Xxh3::new(),
            resident_written: 0,
        };
        writer.write(tokenizer.offset, &plan.tokenizer)?;
        writer.resident(&resident_head)?;
        Ok(writer)
    }

    /// How the records of a layer lie in its groups.
    pub fn layout(&self) -> &FlashLayout {
        &self.layout
    }

    /// Bytes that the file will have without predictors and manifest.
    pub fn planned_bytes(&self) -> u64 {
        self.flash.end()
    }

    /// Takes the next bytes of the resident tensors: [`ModelSpec::resident_tensors`] in that order, one after another, in
    /// pieces of any length. After a quantised matrix come its scales; after all tensors, where records are quantised, the
    /// scales of theirs, layer after layer. Those may come whenever they are known, before [`finish`](Self::finish). What has one
    /// entry for each neuron has to be in storage order.
    ///
    /// # Errors
    /// `WrongInput` for more bytes than the tensors have, `Io`.
    pub fn resident(&mut self, bytes: &[u8]) -> Result<(), BundleError> {
        let left = self.resident.bytes - self.resident_written;
        if bytes.len() as u64 > left {
            return Err(BundleError::input("resident tensors", format_args!("{left} more bytes at most"), bytes.len()));
        }
        self.resident_hash.update(bytes);
        self.write(self.resident.offset + self.resident_written, bytes)?;
        self.resident_written += bytes.len() as u64;
        Ok(())
    }

    /// Begins the next layer. `order` names the neuron at each storage position.
    ///
    /// # Errors
    /// `WrongInput` if the layer before is not complete, all layers are there, or `order` does not name each neuron once.
    pub fn begin_layer(&mut self, order: Vec<NeuronId>) -> Result<(), BundleError> {
        self.check_layer_complete()?;
        let layer = self.layers.len();
        if layer == self.model.layers.len() {
            return Err(BundleError::input("number of layers", self.model.layers.len(), "one more"));
        }
        if order.len() != self.layout.neurons() {
            return Err(BundleError::input("length of a storage order", self.layout.neurons(), order.len()));
        }
        index::check_order(&order, layer, &mut vec![usize::MAX; self.layout.neurons()]).map_err(refused)?;
        self.layers.push(LayerTable { order, checksums: Vec::with_capacity(self.layout.groups()) });
        Ok(())
    }

    /// Takes the next groups of the layer, as they are to stand in the file: any number of them, each
    /// [`FlashLayout::group_bytes`] long, records in storage order and zeros after them.
    ///
    /// # Errors
    /// `WrongInput` for half a group, too many groups, or padding that is not zero; `Io`.
    pub fn groups(&mut self, bytes: &[u8]) -> Result<(), BundleError> {
        let layout = self.layout;
        let layer = self.layers.len().checked_sub(1);
        let layer = layer.ok_or_else(|| BundleError::input("groups", "a layer to be begun before", "none"))?;
        let sums = &mut self.layers[layer].checksums;
        let first = sums.len();
        if !bytes.len().is_multiple_of(layout.group_bytes()) {
            let expected = format!("a multiple of {} bytes", layout.group_bytes());
            return Err(BundleError::input("groups", expected, bytes.len()));
        }
        let count = bytes.len() / layout.group_bytes();
        if count > layout.groups() - first {
            return Err(BundleError::input("groups of a layer", layout.groups(), first + count));
        }
        for (number, group) in bytes.chunks_exact(layout.group_bytes()).enumerate() {
            if group[layout.group_padding(first + number)].iter().any(|byte| *byte != 0) {
                return Err(BundleError::input(format!("padding of group {}", first + number), "zeros", "other bytes"));
            }
            sums.push(checksum(group));
        }
        let offset = layout.layer_stride() as u64 * layer as u64 + layout.group_offset(first) as u64;
        self.write(self.flash.offset + offset, bytes)
    }

    /// Writes what is left, makes it durable and gives the file its name.
    ///
    /// # Errors
    /// `WrongInput` if something is missing, `Io`.
    pub fn finish(self, extras: Extras) -> Result<Manifest, BundleError> {
        self.complete(extras)?.publish()
    }

    /// Writes what is left and makes it durable, under its temporary name still.
    ///
    /// # Errors
    /// `WrongInput` if something is missing, `Io`.
    pub fn complete(mut self, extras: Extras) -> Result<CompleteBundle<S>, BundleError> {
        if self.resident_written != self.resident.bytes {
            return Err(BundleError::input(
                "bytes of the resident section",
                self.resident.bytes,
                self.resident_written,
            ));
        }
        self.check_layer_complete()?;
        if self.layers.len() != self.model.layers.len() {
            return Err(BundleError::input("number of layers", self.model.layers.len(), self.layers.len()));
        }
        let index = index::encode(&self.layout, self.flash.offset, &self.layers);
        self.write(self.index.offset, &index)?;
        let (predictor_info, predictors) = extras.predictors.unzip();
        let manifest = Manifest {
            model: self.model.clone(),
            model_bytes: self.model_bytes,
            ffn: self.ffn.clone(),
            resident: self.resident_formats,
            wide_kv: extras.wide_kv,
            predictors: predictor_info,
            sparsity: extras.sparsity,
            special_tokens: SpecialTokens::Tokenizer,
            chat: extras.chat,
            sampling: extras.sampling,
            provenance: extras.provenance,
        };
        let tail = Tail::new(&manifest, predictors.as_deref(), self.flash.end())?;
        let mut sections = [SectionInfo::default(); Section::ALL.len()];
        sections[Section::Tokenizer as usize] = self.tokenizer;
        sections[Section::Resident as usize] =
            SectionInfo { extent: self.resident, checksum: self.resident_hash.digest() };
        sections[Section::Index as usize] = SectionInfo { extent: self.index, checksum: checksum(&index) };
        sections[Section::Flash as usize] =
            SectionInfo { extent: self.flash, checksum: index::flash_checksum(&self.layers) };
        tail.write(&mut self.storage, sections).map_err(BundleError::io("write", &self.path))?;
        let identity = tail.header(sections).identity();
        Ok(CompleteBundle { storage: self.storage, path: self.path, manifest, identity })
    }

    fn check_layer_complete(&self) -> Result<(), BundleError> {
        match self.layers.last() {
            Some(layer) if layer.checksums.len() != self.layout.groups() => {
                Err(BundleError::input("groups of a layer", self.layout.groups(), layer.checksums.len()))
            }
            _ => Ok(()),
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), BundleError> {
        self.storage.write_at(offset, bytes).map_err(BundleError::io("write", &self.path))
    }
}

/// A bundle that is whole and has not got its name yet. Dropped, it leaves nothing behind.
pub struct CompleteBundle<S: Storage = FileStorage> {
    storage: S,
    path: PathBuf,
    manifest: Manifest,
    identity: u64,
}

impl<S: Storage> CompleteBundle<S> {
    /// What it holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What [`bundle_identity`](super::bundle_identity) will say of the file.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// `Io`.
    pub fn publish(mut self) -> Result<Manifest, BundleError> {
        self.storage.publish().map_err(BundleError::io("give its name to", &self.path))?;
        Ok(self.manifest)
    }
}

/// The sections at the end, which may be replaced later: predictors, if any, and the manifest.
pub(super) struct Tail<'a> {
    /// Where the one section before ends.
    begin: u64,
    predictors: Option<(SectionInfo, &'a [u8])>,
    manifest: (SectionInfo, Vec<u8>),
}

impl<'a> Tail<'a> {
    /// Places them after `begin`.
    pub(super) fn new(manifest: &Manifest, predictors: Option<&'a [u8]>, begin: u64) -> Result<Self, BundleError> {
        limits::check_facts(manifest).map_err(refused)?;
        if manifest.predictors.is_some() != predictors.is_some_and(|bytes| !bytes.is_empty()) {
            return Err(BundleError::input("predictors", "a blob and its description, or neither", "one of them"));
        }
        let mut json = serde_json::to_vec_pretty(manifest)
            .map_err(|error| BundleError::input("manifest", "something that JSON can hold", error))?;
        json.push(b'\n');
        let mut end = begin;
        let mut place = |bytes: &[u8]| {
            let extent = Extent { offset: end.next_multiple_of(SECTION_ALIGNMENT), bytes: bytes.len() as u64 };
            end = extent.end();
            SectionInfo { extent, checksum: checksum(bytes) }
        };
        let predictors = predictors.map(|bytes| (place(bytes), bytes));
        Ok(Self { begin, predictors, manifest: (place(&json), json) })
    }

    /// The end of the file.
    pub(super) fn end(&self) -> u64 {
        self.manifest.0.extent.end()
    }

    /// The header of a file that has these sections, and the tail.
    pub(super) fn header(&self, mut sections: [SectionInfo; Section::ALL.len()]) -> Header {
        sections[Section::Predictors as usize] = self.predictors.map_or_else(SectionInfo::default, |(info, _)| info);
        sections[Section::Manifest as usize] = self.manifest.0;
        let file_bytes = sections.iter().map(|s| s.extent.end()).max().expect("there are sections");
        Header { file_bytes, sections }
    }

    /// Writes the tail, makes it durable, and only then the header that refers to it.
    pub(super) fn write(
        &self,
        storage: &mut impl Storage,
        sections: [SectionInfo; Section::ALL.len()],
    ) -> std::io::Result<()> {
        // Where something was before, the padding has to be cleared; in a new file this writes zeros over zeros.
        let mut end = self.begin;
        let mut append = |storage: &mut dyn Storage, extent: Extent, bytes: &[u8]| {
            storage.write_at(end, &vec![0; (extent.offset - end) as usize])?;
            end = extent.end();
            storage.write_at(extent.offset, bytes)
        };
        if let Some((info, bytes)) = &self.predictors {
            append(storage, info.extent, bytes)?;
        }
        let (info, json) = &self.manifest;
        append(storage, info.extent, json)?;
        storage.sync()?;
        storage.write_at(0, &self.header(sections).encode())?;
        storage.sync()
    }
}
