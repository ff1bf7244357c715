//! From a checkpoint to a bundle, in one streaming pass.
//!
//! Two layers of records are in memory at a time: one being put together from the source's rows, one being written. `convert`
//! and `pack` differ in the storage order and the predictors they hand over, nothing else.

mod layer;
mod parts;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use flashlm_formats::bundle::{
    BundleError, BundlePlan, BundleWriter, CompleteBundle, Extras, LayerSparsity, LayoutOptions, Manifest,
    PredictorInfo, Provenance, SourceFile,
};
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError};
use flashlm_formats::ids::NeuronId;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::weight_format::{ResidentFormats, WeightFormat};
use xxhash_rust::xxh3::Xxh3;

pub use parts::StoredPart;

use crate::kv_range::KvRange;
use crate::quantise::Squares;
use crate::rounding::{Rounded, RoundedRows};
use layer::{Layer, LayerMaker, groups_at_once, neuron_bias_layer, permute, quantise_matrix};
use parts::Parts;

/// Why a bundle could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// The source.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The disk is too small.
    #[error("{} has {available} bytes free and what is to be written needs {needed}; free some space or give another output path", dir.display())]
    DiskFull {
        /// Where the bundle should go.
        dir: PathBuf,
        /// Bytes it needs.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// The file system cannot be asked.
    #[error("cannot look at {}: {source}", dir.display())]
    FileSystem {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A storage order is missing.
    #[error("{found} storage orders for a model of {expected} layers")]
    Orders {
        /// Layers.
        expected: usize,
        /// Orders given.
        found: usize,
    },
    /// Writing would destroy the source.
    #[error("{} is one of the checkpoint's own files; give the bundle another name", path.display())]
    OutputIsSource {
        /// The file.
        path: PathBuf,
    },
    /// Weights that have no scale.
    #[error(
        "{what} holds weights that are not finite numbers: they cannot be quantised; pack without --dtype, --resident-dtype and --embedding-dtype"
    )]
    NotFinite {
        /// Which tensor.
        what: String,
    },
    /// What was rounded before cannot be read.
    #[error("cannot read the rounded weights again: {0}")]
    Rounded(std::io::Error),
    /// No thread can be started.
    #[error("cannot start a thread that reads while writing: {0}; allow more (`ulimit -u`, a container's pids limit)")]
    Thread(std::io::Error),
    /// The caller wanted to stop.
    #[error("interrupted; no bundle was left behind")]
    Interrupted,
}

/// For users of a bundle whose manifest says `wide_kv`.
pub const WIDE_KV_NOTE: &str = "keys or values of this model may exceed the range of f16; the bundle asks for a KV cache in f32, which \
                                takes twice the memory";

/// What a bundle is to hold besides the model.
#[derive(Clone, Debug, Default)]
pub struct PackOptions {
    /// How records are grouped.
    pub layout: LayoutOptions,
    /// The tokenizer.json.
    pub tokenizer: Vec<u8>,
    /// Storage order of every layer, with the strategy's name; the checkpoint's own without it.
    pub orders: Option<(String, Vec<Vec<NeuronId>>)>,
    /// Predictors, in storage order.
    pub predictors: Option<(PredictorInfo, Vec<u8>)>,
    /// Measured sparsity of every layer.
    pub sparsity: Option<Vec<LayerSparsity>>,
    /// How neuron records are stored, where they are to be quantised.
    pub ffn: Option<WeightFormat>,
    /// How resident matrices are stored.
    pub resident: ResidentFormats,
    /// Weights that were rounded for their inputs, in these formats; the others are rounded each for itself.
    pub rounded: Option<Arc<Rounded>>,
    /// Replace a file that is there.
    pub overwrite: bool,
    /// Set by another thread, it makes [`pack`] end with `Interrupted`.
    pub stop: Option<Arc<AtomicBool>>,
}

/// What was packed.
#[derive(Clone, Debug)]
pub struct Packed {
    /// What the bundle says of itself.
    pub manifest: Manifest,
    /// How the parts of its weights are stored, and what that cost.
    pub parts: Vec<StoredPart>,
}

/// Writes the bundle of `checkpoint` to `path`; `progress` is told bytes done and bytes in all.
pub fn pack(
    checkpoint: &Checkpoint,
    path: &Path,
    options: PackOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Packed, PackError> {
    let (bundle, parts) = pack_unpublished(checkpoint, path, options, progress)?;
    Ok(Packed { manifest: bundle.publish()?, parts })
}

/// As [`pack`], all but the last step: the bundle has not got its name yet.
pub fn pack_unpublished(
    checkpoint: &Checkpoint,
    path: &Path,
    mut options: PackOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(CompleteBundle, Vec<StoredPart>), PackError> {
    refuse_source(checkpoint, path)?;
    let (chat, sampling) = (checkpoint.chat()?, checkpoint.sampling()?);
    let (order_name, orders) = Orders::new(checkpoint.spec(), options.orders.take())?;
    let plan = plan(checkpoint, &mut options, order_name)?;
    let writer = BundleWriter::create(path, plan, options.overwrite)?;
    let predictors = options.predictors.as_ref().map_or(0, |(_, blob)| blob.len() as u64);
    check_space(path, writer.planned_bytes() + predictors)?;

    let parts = Parts::default();
    let mut packing = Packing { checkpoint, orders: &orders, options: &options, writer, parts, progress, done: 0 };
    let (hash, wide_kv) = packing.write_resident_tensors()?;
    let content_hash = packing.write_layers(hash)?;
    let Packing { writer, parts, .. } = packing;
    checkpoint.check_unchanged()?;
    let provenance = Provenance {
        tool: "flashlm-prep".into(),
        tool_version: env!("CARGO_PKG_VERSION").into(),
        source_format: checkpoint.format().to_string(),
        files: checkpoint.files().into_iter().map(|f| SourceFile { name: f.name, bytes: f.bytes }).collect(),
        content_hash: format!("{content_hash:016x}"),
    };
    let PackOptions { predictors, sparsity, .. } = options;
    let extras = Extras { predictors, sparsity, wide_kv, chat, sampling, provenance };
    Ok((writer.complete(extras)?, parts.stored()))
}

/// What the bundle will hold, and where.
fn plan(checkpoint: &Checkpoint, options: &mut PackOptions, order: String) -> Result<BundlePlan, PackError> {
    let spec = checkpoint.spec();
    let tensors = spec.resident_tensors();
    let dtypes = tensors.iter().map(|t| checkpoint.resident(&t.name).map(|info| info.dtype));
    Ok(BundlePlan {
        model: spec.clone(),
        model_bytes: checkpoint.model_bytes(),
        resident_dtypes: dtypes.collect::<Result<_, _>>()?,
        resident: options.resident,
        ffn_dtype: options.ffn.unwrap_or(checkpoint.ffn_dtype().into()),
        layout: options.layout,
        order,
        tokenizer: std::mem::take(&mut options.tokenizer),
    })
}

/// The storage order of every layer.
struct Orders {
    neurons: usize,
    layers: Option<Vec<Vec<NeuronId>>>,
}

impl Orders {
    /// With the name that the manifest has.
    fn new(spec: &ModelSpec, given: Option<(String, Vec<Vec<NeuronId>>)>) -> Result<(String, Self), PackError> {
        let neurons = spec.ffn().size;
        match given {
            Some((_, orders)) if orders.len() != spec.layers.len() => {
                Err(PackError::Orders { expected: spec.layers.len(), found: orders.len() })
            }
            Some((name, orders)) => Ok((name, Self { neurons, layers: Some(orders) })),
            None => Ok(("checkpoint".to_owned(), Self { neurons, layers: None })),
        }
    }

    fn of(&self, layer: usize) -> Vec<NeuronId> {
        let in_place = || (0..self.neurons as u32).map(NeuronId).collect();
        self.layers.as_ref().map_or_else(in_place, |orders| orders[layer].clone())
    }
}

/// A bundle that is being written.
struct Packing<'a> {
    checkpoint: &'a Checkpoint,
    orders: &'a Orders,
    options: &'a PackOptions,
    writer: BundleWriter,
    parts: Parts,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
}

impl Packing<'_> {
    /// So many more bytes are written. An error if somebody wants to stop.
    fn wrote(&mut self, bytes: usize) -> Result<(), PackError> {
        self.done += bytes as u64;
        (self.progress)(self.done, self.writer.planned_bytes());
        let stop = self.options.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
        if stop { Err(PackError::Interrupted) } else { Ok(()) }
    }

    fn resident(&mut self, bytes: &[u8]) -> Result<(), PackError> {
        self.writer.resident(bytes)?;
        self.wrote(bytes.len())
    }

    /// Gives the hash of what was read, and whether keys or values may be too large for f16.
    fn write_resident_tensors(&mut self) -> Result<(Xxh3, bool), PackError> {
        let (checkpoint, spec) = (self.checkpoint, self.checkpoint.spec());
        let (mut hash, mut kv_range, mut bytes) = (Xxh3::new(), KvRange::new(spec), Vec::new());
        for tensor in &spec.resident_tensors() {
            let dtype = checkpoint.resident(&tensor.name)?.dtype;
            checkpoint.read_resident(&tensor.name, &mut bytes)?;
            hash.update(&bytes);
            kv_range.see(&tensor.name, dtype, &bytes);
            if let Some(layer) = neuron_bias_layer(&tensor.name) {
                permute(&mut bytes, &self.orders.of(layer));
            }
            let format = tensor.format(dtype, self.options.resident);
            if !format.is_quantised() {
                self.parts.add_tensor(tensor, format, Squares::default());
                self.resident(&bytes)?;
                continue;
            }
            let rounded = self.options.rounded.as_ref().map_or(Ok(None), |rounded| rounded.rows(&tensor.name, format));
            let RoundedRows { values, scales, lost } = match rounded.map_err(PackError::Rounded)? {
                Some(rows) => rows,
                None => quantise_matrix(format, dtype, &bytes, tensor.shape[1])
                    .map_err(|_| PackError::NotFinite { what: tensor.name.clone() })?,
            };
            self.parts.add_tensor(tensor, format, lost);
            // It may be as large as the embedding, and is not needed while that is written.
            drop(std::mem::take(&mut bytes));
            for part in values.chunks(4 << 20).chain([scales.as_slice()]) {
                self.resident(part)?;
            }
        }
        Ok((hash, kv_range.is_wide()))
    }

    /// Writes the layers, each while the next is made by another thread. Gives the hash of all that was read, `hash` being that of the
    /// resident tensors.
    fn write_layers(&mut self, mut hash: Xxh3) -> Result<u64, PackError> {
        let (checkpoint, orders, layout) = (self.checkpoint, self.orders, *self.writer.layout());
        let (layers, format) = (checkpoint.spec().layers.len(), self.options.ffn);
        let rounded = self.options.rounded.as_deref();
        std::thread::scope(|scope| {
            let (filled, to_write) = mpsc::sync_channel::<Result<Layer, PackError>>(0);
            let (emptied, to_fill) = mpsc::channel::<Layer>();
            for _ in 0..2 {
                _ = emptied.send(Layer::default());
            }
            let make = move || {
                let mut maker = LayerMaker::new(checkpoint, layout, format, rounded);
                for layer in 0..layers {
                    let Ok(mut made) = to_fill.recv() else { break };
                    let result = maker.make(layer, &orders.of(layer), &mut made, &mut |rows| hash.update(rows));
                    if filled.send(result.map(|()| made)).is_err() {
                        break;
                    }
                }
                hash.digest()
            };
            let maker = std::thread::Builder::new().spawn_scoped(scope, make).map_err(PackError::Thread)?;
            let written = (0..layers).zip(&to_write).try_for_each(|(layer, made)| {
                let made = made?;
                self.write_layer(layer, &made)?;
                _ = emptied.send(made);
                Ok(())
            });
            drop((to_write, emptied));
            let hash = maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            written.map(|()| hash)
        })
    }

    fn write_layer(&mut self, layer: usize, made: &Layer) -> Result<(), PackError> {
        let groups_at_once = groups_at_once(self.writer.layout());
        self.writer.begin_layer(self.orders.of(layer))?;
        for groups in made.records.chunks(groups_at_once) {
            self.writer.groups(groups)?;
            self.wrote(groups.len())?;
        }
        let (spec, format) = (self.checkpoint.spec(), self.options.ffn);
        self.parts.add_ffn(spec, format.unwrap_or(self.checkpoint.ffn_dtype().into()), made.lost);
        self.writer.resident(&made.scales)?;
        self.done += made.scales.len() as u64;
        Ok(())
    }
}

/// An error if `path` is a file that is read.
fn refuse_source(checkpoint: &Checkpoint, path: &Path) -> Result<(), PackError> {
    let Ok(output) = path.canonicalize() else { return Ok(()) };
    let is_output = |name: &str| checkpoint.dir().join(name).canonicalize().is_ok_and(|file| file == output);
    if checkpoint.files().iter().any(|file| is_output(&file.name)) {
        return Err(PackError::OutputIsSource { path: path.to_path_buf() });
    }
    Ok(())
}

/// An error unless the file system that `path` will be on has `needed` bytes free.
pub fn check_space(path: &Path, needed: u64) -> Result<(), PackError> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf();
    let stat =
        rustix::fs::statvfs(&dir).map_err(|errno| PackError::FileSystem { dir: dir.clone(), source: errno.into() })?;
    let available = stat.f_bavail.saturating_mul(stat.f_frsize);
    if available < needed { Err(PackError::DiskFull { dir, needed, available }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny_opt() -> Checkpoint {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples/tiny-opt");
        Checkpoint::open(dir).unwrap()
    }

    fn options() -> PackOptions {
        PackOptions { tokenizer: b"{}".to_vec(), ..PackOptions::default() }
    }

    #[test]
    fn stopped_at_any_step_it_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.flashlm");
        std::fs::write(&path, "old").unwrap();
        let mut steps = 0;
        pack(&tiny_opt(), &dir.path().join("whole.flashlm"), options(), &mut |_, _| steps += 1).unwrap();
        assert!(steps > 10);
        for last in [1, 2, steps / 2, steps - 1, steps] {
            let stop = Arc::new(AtomicBool::new(false));
            let stopping = PackOptions { stop: Some(stop.clone()), overwrite: true, ..options() };
            let mut step = 0;
            let result = pack(&tiny_opt(), &path, stopping, &mut |_, _| {
                step += 1;
                stop.store(step == last, Ordering::Relaxed);
            });
            assert!(matches!(result, Err(PackError::Interrupted)), "stopped at step {last} of {steps}");
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
            assert_eq!(dir.path().read_dir().unwrap().count(), 2);
        }
    }

    #[test]
    fn the_source_is_never_overwritten() {
        let checkpoint = tiny_opt();
        let path = checkpoint.dir().join("model.safetensors");
        let before = path.metadata().unwrap().len();
        let result = pack(&checkpoint, &path, PackOptions { overwrite: true, ..options() }, &mut |_, _| ());
        assert!(matches!(result, Err(PackError::OutputIsSource { .. })));
        assert_eq!(path.metadata().unwrap().len(), before);
    }
}
