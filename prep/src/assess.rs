//! What running a model would be like, before hours of preparing it: how sparse its first layers are on a short text, and from that
//! what a token costs in how much memory.
//!
//! Two things are not known before predictors are trained and neurons are ordered: how many neurons predictors admit beyond those
//! that fire, and how far apart the missing ones lie. The first is taken from a range ([`ADMITTED`]), the second as in the
//! checkpoint's order. Nothing is written but scratch files, which are removed.

mod speed;

use std::path::Path;

use flashlm::replay::WantedSets;
use flashlm_formats::bundle::{FlashLayout, LayerSparsity, LayoutError, LayoutOptions};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::ids::{NeuronId, Position};
use flashlm_formats::weight_format::WeightFormat;
use flashlm_kernels::Threads;

pub use speed::{ADMITTED, CONTEXT, Machine, Speed, speeds};

use crate::demand::{WantedError, reuse_curve};
use crate::record::documents::Documents;
use crate::record::{Calibration, RecordError, Recorder};

/// Tokens that are recorded where nothing else is asked for: the first half fills caches, misses are counted on the second.
pub const TOKENS: usize = 384;

/// Why a model cannot be assessed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AssessError {
    /// Recording.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// What the recording says.
    #[error(transparent)]
    Wanted(#[from] WantedError),
    /// The layout of its neurons.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// Text of several kinds, a few hundred tokens: stories, facts, questions, a program, news, a letter.
pub fn sample_text() -> Documents {
    Documents { texts: include_str!("assess/text.txt").split("\n\n").map(str::to_owned).collect(), notes: Vec::new() }
}

/// Records the first `layers` layers on a text, and measures how many neurons fire and how soon the same ones fire again. What
/// predictors would admit is taken to be just these. `progress` is told the layers done.
///
/// # Errors
/// If the weights or the scratch directory cannot be used.
pub fn measure(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    layers: usize,
    threads: Threads,
    scratch: &Path,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<LayerSparsity>, AssessError> {
    let layout = layout(checkpoint)?;
    let mut recorder = Recorder::open(checkpoint, calibration, scratch, threads)?;
    let mut measured = Vec::with_capacity(layers);
    for number in 0..layers {
        recorder.record(number, true, &mut |_| ())?;
        let layer = recorder.recording().layer(number).map_err(WantedError::from)?;
        let mut wanted = WantedSets::<NeuronId>::new(layer.ffn() as u32);
        for token in 0..layer.tokens() {
            wanted.push(layer.active(token).map(|n| NeuronId(n as u32)));
        }
        let as_they_are: Vec<Position> = (0..layer.ffn() as u32).map(Position).collect();
        let groups = wanted.stored(&as_they_are, layout.records_per_group() as u32);
        let active = layer.active_fraction() as f32;
        let reuse = reuse_curve(&groups, layer.tokens() / 2, None);
        measured.push(LayerSparsity { active, predicted: Some(active), missed: None, half_life: None, reuse });
        recorder.recording().remove_layer(number).map_err(WantedError::from)?;
        progress(number + 1);
    }
    Ok(measured)
}

/// How neurons would be stored.
pub fn layout(checkpoint: &Checkpoint) -> Result<FlashLayout, LayoutError> {
    FlashLayout::new(checkpoint.spec(), WeightFormat::from(checkpoint.ffn_dtype()), LayoutOptions::default())
}
