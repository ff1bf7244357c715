//! From a checkpoint to a bundle, in one streaming pass.
//!
//! Two layers of records are in memory at a time: one being put together from the source's rows, one being written. `convert`
//! and `pack` differ in the storage order and the predictors they hand over, nothing else.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use flashlm_formats::bundle::{
    BundleError, BundlePlan, BundleWriter, CompleteBundle, Extras, FlashLayout, LayerSparsity, LayoutOptions, Manifest,
    PredictorInfo, Provenance, SourceFile,
};
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError};
use flashlm_formats::model::DType;
use flashlm_formats::weight_format::{SCALE_BYTES, WeightFormat};
use flashlm_kernels::to_f32;
use flashlm_runtime::tensors::element;
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use crate::kv_range::KvRange;
use crate::quantise::{NotFinite, quantise_rows};
use crate::records::fill_layer;

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
        "{what} holds weights that are no finite numbers: they cannot be quantised; pack without --dtype and --resident-dtype"
    )]
    NotFinite {
        /// Which tensor.
        what: String,
    },
    /// No thread is to be had.
    #[error("cannot start a thread that reads beside writing: {0}; allow more (`ulimit -u`, a container's pids limit)")]
    Thread(std::io::Error),
    /// The caller wanted to stop.
    #[error("interrupted; no bundle was left behind")]
    Interrupted,
}

/// For users of a bundle whose manifest says `wide_kv`.
pub const WIDE_KV_NOTE: &str = "keys or values of this model may be larger than f16 holds; the bundle asks for a KV cache in f32, which \
                                takes twice the memory";

/// What a bundle is to hold besides the model.
#[derive(Clone, Debug, Default)]
pub struct PackOptions {
    /// How records are grouped.
    pub layout: LayoutOptions,
    /// The tokenizer.json.
    pub tokenizer: Vec<u8>,
    /// Storage order of every layer, with the strategy's name; the checkpoint's own without it.
    pub orders: Option<(String, Vec<Vec<u32>>)>,
    /// Predictors, in storage order.
    pub predictors: Option<(PredictorInfo, Vec<u8>)>,
    /// Measured sparsity of every layer.
    pub sparsity: Option<Vec<LayerSparsity>>,
    /// How neuron records are stored, where they are to be quantised.
    pub ffn: Option<WeightFormat>,
    /// How resident matrices are stored, where they are to be quantised.
    pub resident: Option<WeightFormat>,
    /// Replace a file that is there.
    pub overwrite: bool,
    /// Set by another thread, it makes [`pack`] end with `Interrupted`.
    pub stop: Option<Arc<AtomicBool>>,
}

/// Writes the bundle of `checkpoint` to `path`; `progress` is told bytes done and bytes in all.
pub fn pack(
    checkpoint: &Checkpoint,
    path: &Path,
    options: PackOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Manifest, PackError> {
    Ok(pack_unpublished(checkpoint, path, options, progress)?.publish()?)
}

/// As [`pack`], all but the last step: the bundle has not got its name yet.
pub fn pack_unpublished(
    checkpoint: &Checkpoint,
    path: &Path,
    options: PackOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CompleteBundle, PackError> {
    refuse_source(checkpoint, path)?;
    let spec = checkpoint.spec();
    let tensors = spec.resident_tensors();
    let dtypes = tensors.iter().map(|t| checkpoint.resident(&t.name).map(|info| info.dtype));
    let (order_name, orders) = match options.orders {
        Some((_, orders)) if orders.len() != spec.layers => {
            return Err(PackError::Orders { expected: spec.layers, found: orders.len() });
        }
        Some((name, orders)) => (name, Some(orders)),
        None => ("checkpoint".to_owned(), None),
    };
    let order_of = |layer: usize| match &orders {
        Some(orders) => orders[layer].clone(),
        None => (0..spec.ffn.size as u32).collect(),
    };
    let plan = BundlePlan {
        model: spec.clone(),
        model_bytes: checkpoint.model_bytes(),
        resident_dtypes: dtypes.collect::<Result<_, _>>()?,
        resident: options.resident,
        ffn_dtype: options.ffn.unwrap_or(checkpoint.ffn_dtype().into()),
        layout: options.layout,
        order: order_name,
        tokenizer: options.tokenizer,
    };
    let mut writer = BundleWriter::create(path, plan, options.overwrite)?;
    let extra = options.predictors.as_ref().map_or(0, |(_, blob)| blob.len() as u64);
    check_space(path, writer.planned_bytes() + extra)?;
    let total = writer.planned_bytes();
    let mut step = |done| {
        progress(done, total);
        let stop = options.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
        if stop { Err(PackError::Interrupted) } else { Ok(()) }
    };
    let mut done = 0;
    let mut hash = Xxh3::new();
    let mut kv_range = KvRange::new(spec);
    let mut bytes = Vec::new();
    for tensor in &tensors {
        let dtype = checkpoint.resident(&tensor.name)?.dtype;
        checkpoint.read_resident(&tensor.name, &mut bytes)?;
        hash.update(&bytes);
        kv_range.see(&tensor.name, dtype, &bytes);
        if let Some(layer) = neuron_bias_layer(&tensor.name) {
            permute(&mut bytes, &order_of(layer));
        }
        let format = tensor.format(dtype, options.resident);
        if format.is_quantised() {
            let quantised = quantise_matrix(format, dtype, &bytes, tensor.shape[1]);
            let (values, scales) = quantised.map_err(|_| PackError::NotFinite { what: tensor.name.clone() })?;
            drop(std::mem::take(&mut bytes));
            for part in values.chunks(4 << 20).chain([scales.as_slice()]) {
                writer.resident(part)?;
                done += part.len() as u64;
                step(done)?;
            }
            continue;
        }
        writer.resident(&bytes)?;
        done += bytes.len() as u64;
        step(done)?;
    }
    drop(bytes);

    let layout = *writer.layout();
    let ffn_format = options.ffn;
    let hash = std::thread::scope(|scope| {
        let (filled, to_write) = mpsc::sync_channel::<Result<Layer, PackError>>(0);
        let (emptied, to_fill) = mpsc::channel::<Layer>();
        for _ in 0..2 {
            _ = emptied.send(Layer::default());
        }
        let order_of = &order_of;
        let read = move || {
            let mut hash = hash;
            let mut maker = LayerMaker { checkpoint, layout, format: ffn_format, plain: Vec::new() };
            for layer in 0..spec.layers {
                let Ok(mut made) = to_fill.recv() else { break };
                let order = order_of(layer);
                let result = maker.make(layer, &order, &mut made, &mut |rows| hash.update(rows));
                if filled.send(result.map(|()| made)).is_err() {
                    break;
                }
            }
            hash.digest()
        };
        let reader = std::thread::Builder::new().spawn_scoped(scope, read).map_err(PackError::Thread)?;
        let mut write = || -> Result<(), PackError> {
            for layer in 0..spec.layers {
                let Ok(made) = to_write.recv() else { break };
                let made = made?;
                writer.begin_layer(order_of(layer))?;
                for groups in made.records.chunks(groups_at_once(&layout)) {
                    writer.groups(groups)?;
                    done += groups.len() as u64;
                    step(done)?;
                }
                writer.resident(&made.scales)?;
                done += made.scales.len() as u64;
                _ = emptied.send(made);
            }
            Ok(())
        };
        let result = write();
        drop((to_write, emptied));
        let hash = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        result.map(|()| hash)
    })?;
    checkpoint.check_unchanged()?;
    let provenance = Provenance {
        tool: "flashlm-prep".into(),
        tool_version: env!("CARGO_PKG_VERSION").into(),
        source_format: checkpoint.format().to_string(),
        files: checkpoint.files().into_iter().map(|f| SourceFile { name: f.name, bytes: f.bytes }).collect(),
        content_hash: format!("{hash:016x}"),
    };
    let extras =
        Extras { predictors: options.predictors, sparsity: options.sparsity, wide_kv: kv_range.is_wide(), provenance };
    Ok(writer.complete(extras)?)
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

/// What a layer becomes: its groups, and the scales of its records.
#[derive(Default)]
struct Layer {
    records: Vec<u8>,
    scales: Vec<u8>,
}

/// Puts layers together.
struct LayerMaker<'a> {
    checkpoint: &'a Checkpoint,
    layout: FlashLayout,
    /// How records are quantised, if they are.
    format: Option<WeightFormat>,
    /// The records before that.
    plain: Vec<u8>,
}

impl LayerMaker<'_> {
    fn make(
        &mut self,
        layer: usize,
        order: &[u32],
        made: &mut Layer,
        seen: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PackError> {
        let Self { checkpoint, layout, format, plain } = self;
        made.records.resize(layout.layer_bytes(), 0);
        let Some(format) = *format else {
            return Ok(fill_layer(checkpoint, layer, layout, order, &mut made.records, seen)?);
        };
        let (spec, dtype) = (checkpoint.spec(), checkpoint.ffn_dtype());
        let before = FlashLayout::new(spec, dtype, LayoutOptions::default()).map_err(BundleError::from)?;
        plain.resize(before.layer_bytes(), 0);
        fill_layer(checkpoint, layer, &before, order, plain, seen)?;
        let row_scales = format.scales(spec.hidden_size) * SCALE_BYTES;
        let record_scales = spec.ffn.vectors() * row_scales;
        made.scales.resize(spec.ffn.size * record_scales, 0);
        let groups = made.records.par_chunks_mut(layout.group_bytes());
        let scales = made.scales.par_chunks_mut(layout.records_per_group() * record_scales);
        let result = groups.zip(scales).enumerate().try_for_each_init(
            || vec![0f32; spec.hidden_size],
            |row, (group, (records, scales))| {
                let positions = layout.positions_of(group);
                records[layout.group_padding(group)].fill(0);
                let rows = scales.chunks_exact_mut(row_scales);
                let places = positions.flat_map(|p| (0..spec.ffn.vectors()).map(move |vector| (p, vector)));
                for ((position, vector), scales) in places.zip(rows) {
                    let from = before.vector_offset(position, vector);
                    to_f32(element(dtype), &plain[from..from + before.row_bytes()], row);
                    let to = layout.vector_offset(position, vector) - layout.group_offset(group);
                    let values = &mut records[to..to + layout.row_bytes()];
                    quantise_rows(format, row, row.len(), values, scales)?;
                }
                Ok(())
            },
        );
        result.map_err(|NotFinite| PackError::NotFinite { what: format!("the FFN of layer {layer}") })
    }
}

/// The values and the scales of a matrix whose rows have `cols` elements of `dtype`.
fn quantise_matrix(
    format: WeightFormat,
    dtype: DType,
    bytes: &[u8],
    cols: usize,
) -> Result<(Vec<u8>, Vec<u8>), NotFinite> {
    /// Rows that a task takes.
    const ROWS: usize = 64;
    let (row_bytes, row_scales) = (format.row_bytes(cols), format.scales(cols) * SCALE_BYTES);
    let rows = bytes.len() / (cols * dtype.bytes());
    let (mut values, mut scales) = (vec![0; rows * row_bytes], vec![0; rows * row_scales]);
    let places = values.par_chunks_mut(ROWS * row_bytes).zip(scales.par_chunks_mut(ROWS * row_scales));
    bytes.par_chunks(ROWS * cols * dtype.bytes()).zip(places).try_for_each_init(Vec::new, |plain, (rows, to)| {
        plain.resize(rows.len() / dtype.bytes(), 0f32);
        to_f32(element(dtype), rows, plain);
        quantise_rows(format, plain, cols, to.0, to.1)
    })?;
    Ok((values, scales))
}

/// Bytes of groups that are written at once: about 4 MiB.
fn groups_at_once(layout: &FlashLayout) -> usize {
    ((4 << 20) / layout.group_bytes()).max(1) * layout.group_bytes()
}

/// The layer whose gate or up bias a canonical name is: they stand in storage order, like the records.
fn neuron_bias_layer(name: &str) -> Option<usize> {
    let (layer, which) = name.strip_prefix("layers.")?.split_once(".ffn.")?;
    matches!(which, "gate_bias" | "up_bias").then(|| layer.parse().ok())?
}

/// Puts equally long elements into storage order.
fn permute(bytes: &mut [u8], order: &[u32]) {
    let element = bytes.len() / order.len();
    let old = bytes.to_vec();
    for (to, &from) in bytes.chunks_exact_mut(element).zip(order) {
        to.copy_from_slice(&old[from as usize * element..][..element]);
    }
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

    #[test]
    fn elements_move_to_their_storage_position() {
        let mut bytes = vec![0, 0, 1, 1, 2, 2];
        permute(&mut bytes, &[2, 0, 1]);
        assert_eq!(bytes, [2, 2, 0, 0, 1, 1]);
    }

    #[test]
    fn only_biases_of_neurons_are_permuted() {
        assert_eq!(neuron_bias_layer("layers.12.ffn.up_bias"), Some(12));
        assert_eq!(neuron_bias_layer("layers.3.ffn.gate_bias"), Some(3));
        assert_eq!(neuron_bias_layer("layers.12.ffn.down_bias"), None);
    }
}
