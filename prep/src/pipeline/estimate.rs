//! What a preparation will take, estimated before it begins.

use std::time::Instant;

use flashlm_formats::checkpoint::Checkpoint;
use flashlm_kernels::{MatmulScratch, Threads, matmul};

use super::announced::Estimate;
use super::error::PrepareError;
use super::graph::StageKind;
use super::memory;
use super::options::{PrepareOptions, pilot_tokens};
use super::work::{THRESHOLDS_SCRATCH, Work};
use crate::pack::check_space;
use crate::rounding::ROUNDING_TOKENS;
use crate::thresholds::{CUTS, VERIFIED, default_tokens};

/// Passes over the tokens that training and trials make at most, and the sum of the ranks that trials try, of the mean rank.
const EPOCHS: f64 = 6.0;
const TRIAL_EPOCHS: f64 = 3.0;
const TRIAL_RANKS: f64 = 5.0;
/// What everything but matrix products adds to them.
const OVERHEAD: f64 = 1.5;
/// Bytes of a bundle that are made and written in a second.
const WRITTEN_BYTES_PER_S: f64 = 4e8;

/// What earlier runs left to do.
#[derive(Clone, Copy, Default)]
pub(super) struct Left {
    /// Tokens to calibrate on.
    pub(super) tokens: usize,
    /// The model has to write its text.
    pub(super) text: bool,
    /// Thresholds have to be found.
    pub(super) thresholds: bool,
    /// Ranks have to be chosen, on a pilot.
    pub(super) ranks: bool,
    /// Layers that are to be recorded, trained and ordered.
    pub(super) layers: usize,
    /// The bundle is there but for its predictors.
    pub(super) replaced: bool,
}

impl Left {
    /// Everything from the thresholds on, or from the text on.
    pub(super) fn all(checkpoint: &Checkpoint, text: bool, tokens: usize) -> Self {
        Self { tokens, text, thresholds: true, ranks: true, layers: checkpoint.spec().layers.len(), replaced: false }
    }
}

/// What is about to be done takes this, and at least this many bytes of `memory`. An error when the disk is too small for what is not there
/// yet.
pub(super) fn estimate(
    options: &PrepareOptions,
    checkpoint: &Checkpoint,
    work: &Work<'_>,
    left: Left,
    memory: u64,
) -> Result<Estimate, PrepareError> {
    let needs = Needs::new(options, checkpoint, left);
    // What is left to do writes these again or continues with them.
    let here = [StageKind::Recording.directory(), StageKind::Pilot.directory(), THRESHOLDS_SCRATCH];
    let here: u64 = here.iter().map(|name| work.bytes(name)).sum();
    check_space(&work.path("x"), needs.scratch.saturating_sub(here))?;
    check_space(&options.output, needs.bundle)?;
    needs.estimate(options, checkpoint, left, here, memory)
}

/// What preparing the whole model takes where nothing of it is done yet: nothing is looked at but the checkpoint's shapes.
///
/// # Errors
/// If threads cannot be started.
pub fn estimate_whole(
    options: &PrepareOptions,
    checkpoint: &Checkpoint,
    tokenizer_bytes: u64,
) -> Result<Estimate, PrepareError> {
    let spec = checkpoint.spec();
    let tokens = options.tokens(spec);
    let thresholds = options.quality_loss(spec).is_some();
    let left = Left { thresholds, ..Left::all(checkpoint, options.text.is_empty(), tokens) };
    let (longest, rounded) = (options.sequence_tokens, options.rounded_formats());
    let memory = memory::least(checkpoint, tokens as u64, longest, tokenizer_bytes, rounded);
    Needs::new(options, checkpoint, left).estimate(options, checkpoint, left, 0, memory)
}

/// What of disk and arithmetic is needed.
struct Needs {
    bundle: u64,
    scratch: u64,
    /// Floating-point operations.
    operations: f64,
}

impl Needs {
    fn new(options: &PrepareOptions, checkpoint: &Checkpoint, left: Left) -> Self {
        let spec = checkpoint.spec();
        let tokens = left.tokens as u64;
        let pilot = (pilot_tokens(left.tokens) as u64).min(tokens);
        let (hidden, ffn, layers) = (spec.hidden_size as u64, spec.ffn().size as u64, spec.layers.len() as u64);
        // A layer's inputs, packed activity, magnitudes of a tenth of the neurons.
        let recorded = |tokens: u64| tokens * (2 * hidden + ffn / 8 + ffn / 5);
        let at_once = if options.keep_recordings { layers } else { 1 + u64::from(options.look_ahead.is_some()) };
        // Hidden states stand on disk before and after a layer.
        let states = |tokens: u64| 2 * tokens * hidden * 4;
        let whole = checkpoint.model_bytes() + checkpoint.model_bytes() / 20;
        let ffn_bytes = layers * ffn * hidden * (spec.ffn().vectors() * checkpoint.ffn_dtype().bytes()) as u64;
        let bundle = match left.replaced {
            true => (options.size_budget * ffn_bytes as f64) as u64 + whole / 20,
            false => whole,
        };
        let tried = if left.thresholds { default_tokens(spec) as u64 } else { 0 };
        let scratch = [
            if left.text { whole } else { 0 },
            (1 + CUTS.len() as u64) * states(tried),
            if left.ranks { layers * recorded(pilot) + states(pilot) } else { 0 },
            if left.layers > 0 { at_once.min(layers) * recorded(tokens) + states(tokens) } else { 0 },
            // Rounded weights are kept until they are packed.
            if left.replaced || options.rounded_formats().is_plain() {
                0
            } else {
                whole + states(ROUNDING_TOKENS as u64)
            },
        ];
        let scratch = scratch.into_iter().max().unwrap_or(0);

        let ffn_weights = spec.ffn().vectors() as u64 * ffn * hidden;
        let weights = layers * ((spec.attention().qkv_size() as u64 + hidden) * hidden + ffn_weights);
        // Half of the tokens go through in several copies, the others in a few; each to the end, where words are scored.
        let tried = tried as f64 * ((1 + CUTS.len()) as f64 * (1.0 - VERIFIED) + 3.0 * VERIFIED);
        let scored = tried * (spec.vocab_size * spec.embed_size) as f64;
        // Layers that are done are gone through as long as one after them is not.
        let share = |yes: bool| if yes { 1.0 } else { 0.0 };
        let gone_through = tokens as f64 * share(left.layers > 0) + pilot as f64 * share(left.ranks);
        let recording = 2.0 * ((gone_through + tried) * weights as f64 + scored);
        // Forward and backward, for a rank of one.
        let step = (6 * ffn + 4 * hidden) as f64;
        let rank =
            options.size_budget * (ffn_weights * checkpoint.ffn_dtype().bytes() as u64) as f64 / (hidden + ffn) as f64;
        let trials = TRIAL_EPOCHS * TRIAL_RANKS * pilot as f64 * layers as f64 * share(left.ranks);
        let training = step * rank.min(hidden as f64 / 2.0) * (EPOCHS * tokens as f64 * left.layers as f64 + trials);
        Self { bundle, scratch, operations: recording + training }
    }

    fn estimate(
        &self,
        options: &PrepareOptions,
        checkpoint: &Checkpoint,
        left: Left,
        here: u64,
        memory: u64,
    ) -> Result<Estimate, PrepareError> {
        let rate = product_rate(&crate::threads::start(options.threads)?);
        let Self { bundle, scratch, operations } = *self;
        Ok(Estimate {
            family: checkpoint.spec().family.clone(),
            model_bytes: checkpoint.model_bytes(),
            bundle_bytes: bundle,
            scratch_bytes: scratch,
            here_bytes: here.min(scratch),
            memory_bytes: memory,
            seconds: OVERHEAD * operations / rate + bundle as f64 / WRITTEN_BYTES_PER_S + 2.0,
            writing_minutes: left.text.then_some(options.minutes),
        })
    }
}

/// Floating-point operations a second that matrix products reach here.
fn product_rate(threads: &Threads) -> f64 {
    const N: usize = 512;
    let weights = vec![0u8; N * N * 4];
    let matrix = flashlm_kernels::Matrix::new(flashlm_kernels::Element::F32, &weights, N, N).expect("the size fits");
    let (x, mut y, mut scratch) = (vec![1.0; N * N], vec![0.0; N * N], MatmulScratch::default());
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let begin = Instant::now();
        matmul(threads, matrix, &x, N, &mut y, N, &mut scratch);
        best = best.min(begin.elapsed().as_secs_f64());
    }
    2.0 * (N * N * N) as f64 / best.max(1e-6)
}
