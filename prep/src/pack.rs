//! From a checkpoint to a bundle, in one streaming pass.
//!
//! Two layers of records are in memory at a time: one being put together from the source's rows, one being written. `convert`
//! and `pack` differ in the storage order and the predictors they hand over, nothing else.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use flashlm_formats::bundle::{
    BundleError, BundlePlan, BundleWriter, Extras, FlashLayout, LayerSparsity, LayoutOptions, Manifest, PredictorInfo,
    Provenance, SourceFile,
};
use flashlm_formats::checkpoint::{Checkpoint, CheckpointError};
use xxhash_rust::xxh3::Xxh3;

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
    #[error("{} has {available} bytes free and the bundle needs {needed}; free some space or give another output path", dir.display())]
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
    /// The caller wanted to stop.
    #[error("interrupted; no bundle was left behind")]
    Interrupted,
}

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
        ffn_dtype: checkpoint.ffn_dtype(),
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
    let mut bytes = Vec::new();
    for tensor in &tensors {
        checkpoint.read_resident(&tensor.name, &mut bytes)?;
        hash.update(&bytes);
        if let Some(layer) = neuron_bias_layer(&tensor.name) {
            permute(&mut bytes, &order_of(layer));
        }
        writer.resident(&bytes)?;
        done += bytes.len() as u64;
        step(done)?;
    }
    drop(bytes);

    let layout = *writer.layout();
    let hash = std::thread::scope(|scope| {
        let (filled, to_write) = mpsc::sync_channel::<Result<Vec<u8>, CheckpointError>>(0);
        let (emptied, to_fill) = mpsc::channel::<Vec<u8>>();
        for _ in 0..2 {
            _ = emptied.send(Vec::new());
        }
        let order_of = &order_of;
        let reader = scope.spawn(move || {
            let mut hash = hash;
            for layer in 0..spec.layers {
                let Ok(mut records) = to_fill.recv() else { break };
                records.resize(layout.layer_bytes(), 0);
                let order = order_of(layer);
                let result =
                    fill_layer(checkpoint, layer, &layout, &order, &mut records, &mut |rows| hash.update(rows));
                if filled.send(result.map(|()| records)).is_err() {
                    break;
                }
            }
            hash.digest()
        });
        let mut write = || -> Result<(), PackError> {
            for layer in 0..spec.layers {
                let Ok(records) = to_write.recv() else { break };
                let records = records?;
                writer.begin_layer(order_of(layer))?;
                for groups in records.chunks(groups_at_once(&layout)) {
                    writer.groups(groups)?;
                    done += groups.len() as u64;
                    step(done)?;
                }
                _ = emptied.send(records);
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
    let extras = Extras { predictors: options.predictors, sparsity: options.sparsity, provenance };
    Ok(writer.finish(extras)?)
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
