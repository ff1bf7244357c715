//! Random-weight checkpoints of published geometries, for measuring: everything of the model but what it has learned.
//!
//! The same seed gives the same bytes on any number of threads. Weights are shaped so that real forward passes show the
//! published activation statistics (`shape`): how many neurons fire, how unevenly, how well that can be foretold. Knows nothing
//! of bundles.

mod geometry;
mod normal;
mod random;
mod recipe;
mod shape;
mod tokenizer;
mod writer;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use flashlm_formats::checkpoint::CheckpointError;

pub use geometry::{GEOMETRIES, Geometry};

use crate::pack::PackError;

/// Why a checkpoint could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthesizeError {
    /// No such geometry.
    #[error("there is no geometry {name:?}; known are {}", names())]
    UnknownGeometry {
        /// What was asked for.
        name: String,
    },
    /// More layers than the model has, or none.
    #[error("{asked} layers of {name}, which has {published}: a number from 1 to {published} shortens it")]
    Layers {
        /// The geometry.
        name: &'static str,
        /// What was asked for.
        asked: usize,
        /// What the published model has.
        published: usize,
    },
    /// The directory holds a model already.
    #[error("{} already exists; give another directory, or remove it", path.display())]
    Exists {
        /// The file that is in the way.
        path: PathBuf,
    },
    /// The configuration does not describe what it should.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Not enough room.
    #[error(transparent)]
    Space(#[from] PackError),
    /// Threads could not be started.
    #[error(
        "cannot start {threads} threads: {source}; give fewer with --threads, or allow more (`ulimit -u`, a container's pids limit)"
    )]
    Threads {
        /// Number asked for.
        threads: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl SynthesizeError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

fn names() -> String {
    GEOMETRIES.iter().map(|geometry| geometry.name).collect::<Vec<_>>().join(", ")
}

/// What to make.
#[derive(Clone, Copy, Debug)]
pub struct SynthesizeOptions {
    /// Layers, if fewer than published.
    pub layers: Option<usize>,
    /// What the weights follow from.
    pub seed: u64,
    /// Threads that make and write weights.
    pub threads: NonZeroUsize,
}

/// Writes a checkpoint of `geometry` into `dir`, which is made if it is not there; `progress` is told bytes done and bytes in all.
/// Gives the bytes of its weight files. A run that is killed leaves no `config.json`, without which nothing opens.
///
/// # Errors
/// A directory with a model in it, too little room, and what the system says.
pub fn synthesize(
    geometry: &Geometry,
    dir: &Path,
    options: SynthesizeOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, SynthesizeError> {
    let layers = options.layers.unwrap_or(geometry.layers);
    if layers == 0 || layers > geometry.layers {
        return Err(SynthesizeError::Layers { name: geometry.name, asked: layers, published: geometry.layers });
    }
    writer::write(dir, &geometry.config(layers), &tokenizer::tokenizer(geometry.family), options, progress)
}

#[cfg(test)]
mod tests {
    use flashlm_formats::checkpoint::Checkpoint;

    use super::*;
    use crate::tokenizer::tokenizer_json;

    fn options(seed: u64, threads: usize) -> SynthesizeOptions {
        SynthesizeOptions { layers: Some(1), seed, threads: NonZeroUsize::new(threads).unwrap() }
    }

    fn weights(dir: &Path, seed: u64, threads: usize) -> Vec<u8> {
        let geometry = Geometry::find("opt-125m").unwrap();
        synthesize(geometry, dir, options(seed, threads), &mut |_, _| ()).unwrap();
        std::fs::read(dir.join("model.safetensors")).unwrap()
    }

    #[test]
    fn the_bytes_follow_from_the_seed_alone() {
        let dir = tempfile::tempdir().unwrap();
        let first = weights(&dir.path().join("a"), 1, 1);
        assert!(first == weights(&dir.path().join("b"), 1, 3), "the number of threads changes the weights");
        assert!(first != weights(&dir.path().join("c"), 2, 1), "the seed changes nothing");
    }

    #[test]
    fn a_shortened_model_opens_and_runs() {
        use flashlm::load::load;
        use flashlm::options::{FfnChoice, LoadOptions};
        use flashlm_formats::bundle::Bundle;

        let dir = tempfile::tempdir().unwrap();
        weights(dir.path(), 1, 2);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.notes().is_empty() && checkpoint.unused().is_empty());
        let tokenizer = tokenizer_json(&checkpoint).unwrap();
        let bundle_path = dir.path().join("m.flashlm");
        let pack = crate::pack::PackOptions { tokenizer, ..Default::default() };
        crate::pack::pack(&checkpoint, &bundle_path, pack, &mut |_, _| ()).unwrap();
        let bundle = Bundle::open(&bundle_path).unwrap();
        let load_options = LoadOptions {
            ffn: Some(FfnChoice::Resident),
            threads: NonZeroUsize::MIN,
            direct: flashlm_io::DirectIo::Disabled,
            ..LoadOptions::new(8)
        };
        let mut forward = load(&bundle, &load_options, &mut |_, _| ()).unwrap().forward;
        let logits = forward.feed(&[2, 65, 66]).unwrap();
        let deviation = (logits.iter().map(|l| l * l).sum::<f32>() / logits.len() as f32).sqrt();
        assert!((0.1..10.0).contains(&deviation), "standard deviation of the logits: {deviation}");
    }

    /// Recorded with random ids: what `docs/measurements/synthesized.md` has of large models, in small.
    #[test]
    fn real_forward_passes_fire_as_published() {
        use crate::record::text::Sampling;
        use crate::record::{Calibration, Recorder};
        use flashlm_kernels::Threads;

        let dir = tempfile::tempdir().unwrap();
        let options = SynthesizeOptions { layers: Some(2), ..options(5, 2) };
        let model = dir.path().join("model");
        synthesize(Geometry::find("opt-125m").unwrap(), &model, options, &mut |_, _| ()).unwrap();
        let checkpoint = Checkpoint::open(&model).unwrap();
        let sampling = Sampling { tokens: 1536, sequence_tokens: 256, seed: 1, held_out: 0.1 };
        let calibration = Calibration::random(checkpoint.spec(), sampling);
        let threads = Threads::new(NonZeroUsize::new(2).unwrap()).unwrap();
        let mut recorder = Recorder::open(&checkpoint, &calibration, &dir.path().join("rec"), threads).unwrap();
        for (layer, published) in [0.0156, 0.0536].into_iter().enumerate() {
            let active = recorder.record(layer, true, &mut |_| ()).unwrap();
            assert!((active / published - 1.0).abs() < 0.05, "layer {layer}: {active} active");
            let recorded = recorder.recording().layer(layer).unwrap();
            // Skewed rates: the hottest tenth does most of the firing, and many neurons hardly ever fire.
            let mut counts: Vec<u32> = recorded.summary().active_count.to_vec();
            counts.sort_unstable_by(|a, b| b.cmp(a));
            let hot = counts[..307].iter().sum::<u32>() as f64 / counts.iter().sum::<u32>() as f64;
            assert!((0.55..0.95).contains(&hot), "layer {layer}: {hot} by the hottest tenth");
            // The next token's neurons are those of chance.
            let mut both = 0u32;
            for token in 1..recorded.tokens() {
                let pair = recorded.activity(token - 1).iter().zip(recorded.activity(token));
                both += pair.map(|(a, b)| (a & b).count_ones()).sum::<u32>();
            }
            let tokens = recorded.tokens() as f64;
            let chance = counts.iter().map(|&c| (f64::from(c) / tokens).powi(2)).sum::<f64>() * (tokens - 1.0);
            assert!((f64::from(both) / chance - 1.0).abs() < 0.1, "layer {layer}: {both} repeated, {chance} by chance");
        }
    }

    #[test]
    fn a_directory_with_a_model_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let geometry = Geometry::find("opt-125m").unwrap();
        let refused = synthesize(geometry, dir.path(), options(1, 1), &mut |_, _| ()).unwrap_err();
        assert!(matches!(refused, SynthesizeError::Exists { .. }), "{refused}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn layers_only_shorten() {
        let geometry = Geometry::find("opt-125m").unwrap();
        for layers in [0, 13] {
            let asked = SynthesizeOptions { layers: Some(layers), ..options(1, 1) };
            let refused = synthesize(geometry, Path::new("never-made"), asked, &mut |_, _| ()).unwrap_err();
            assert!(matches!(refused, SynthesizeError::Layers { published: 12, .. }), "{refused}");
        }
    }
}
