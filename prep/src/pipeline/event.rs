//! What a preparation tells whoever started it, as it happens. The library prints nothing itself.

use std::fmt::{self, Display, Formatter};
use std::path::Path;

use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::predictors::LayerReport;
use flashlm_formats::thresholds::Measured;

use super::announced::Estimate;

/// Sees the events. Some come from other threads than the one that prepares, two never at once but for [`Event::Layer`].
pub type Observer<'a> = dyn Fn(Event<'_>) + Sync + 'a;

/// Work that takes long, whose progress is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Hashing the checkpoint, counted in bytes.
    ReadingCheckpoint,
    /// The model writes its text, counted in tokens.
    WritingText,
    /// Measuring thresholds; its steps mean nothing to anybody.
    MeasuringThresholds,
    /// Recording the pilot and trying ranks on it, counted in tokens times layers, twice.
    ChoosingRanks,
    /// Recording, training and ordering layer by layer, counted likewise: half of a layer is recording.
    PreparingLayers {
        /// Layers in all.
        layers: u64,
        /// Tokens that go through each.
        tokens: u64,
    },
    /// Reading a bundle that is there, counted in bytes.
    Verifying,
    /// Rounding weights for the text's inputs, counted in tokens times layers.
    Rounding,
    /// Writing the bundle, counted in bytes.
    Packing,
}

impl Display for Task {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadingCheckpoint => "reading the checkpoint",
            Self::WritingText => "the model writes calibration text",
            Self::MeasuringThresholds => "measuring thresholds",
            Self::ChoosingRanks => "choosing ranks",
            Self::PreparingLayers { .. } => "preparing",
            Self::Verifying => "verifying",
            Self::Rounding => "rounding for the text's inputs",
            Self::Packing => "packing",
        })
    }
}

/// Something happened. As text it is a sentence for users.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A task begins.
    Began(Task),
    /// So much of the task is done, of so much.
    Progress {
        /// Done.
        done: u64,
        /// Of all.
        total: u64,
    },
    /// The task that began last has ended, well or not.
    Ended,
    /// Something that users should know.
    Note(&'a str),
    /// A stage was there, but made from something else.
    MadeAgain {
        /// The stage's directory.
        stage: &'a str,
        /// What changed.
        why: &'a str,
    },
    /// What the preparation will take, before the first long work.
    Announced(&'a Estimate),
    /// The model has written its text.
    TextWritten {
        /// Tokens that it wrote.
        tokens: usize,
        /// Time that it took.
        seconds: f64,
        /// The minutes that it might write for, if those ended it.
        stopped_after: Option<u64>,
        /// The text.
        path: &'a Path,
    },
    /// Thresholds are known, found now or earlier.
    Thresholds {
        /// What was measured and chosen.
        measured: &'a Measured,
        /// The checkpoint, which has them.
        checkpoint: &'a Checkpoint,
    },
    /// Ranks are chosen.
    Ranks {
        /// Share of the neurons that the predictors tried admit, mean over layers.
        admitted: f64,
    },
    /// A layer's predictor is trained.
    Layer {
        /// Share of its neurons that are active.
        active: f64,
        /// What the predictor does.
        report: &'a LayerReport,
    },
    /// All layers have predictors and orders.
    Layers {
        /// Share of active neurons that predictors miss, mean over layers.
        missed: f64,
        /// Share of inactive ones that they admit.
        false_alarms: f64,
        /// Their size, as a share of the FFN's bytes.
        size: f64,
        /// Neurons that never fired in training and have no row in them.
        without_row: usize,
        /// Share of a layer that was taken as cached, to judge orders.
        cached: f64,
    },
}

impl Display for Event<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Began(task) => task.fmt(f),
            Self::Progress { done, total } => write!(f, "{done} of {total}"),
            Self::Ended => f.write_str("done"),
            Self::Note(note) => f.write_str(note),
            Self::MadeAgain { stage, why } => write!(f, "{stage}: made again, because {why}"),
            Self::Announced(estimate) => estimate.fmt(f),
            Self::TextWritten { tokens, seconds, stopped_after, path } => {
                write!(f, "the model wrote {tokens} tokens in {seconds:.0} s")?;
                if let Some(minutes) = stopped_after {
                    write!(f, " (stopped after {minutes} minutes; --minutes allows more, --text is better)")?;
                }
                write!(f, ": {}", path.display())
            }
            Self::Thresholds { measured, .. } => write!(
                f,
                "at a loss of {:.1} % of perplexity a token needs {:.1} % of the neurons",
                100.0 * measured.loss_allowed,
                100.0 * measured.mean_active()
            ),
            Self::Ranks { admitted } => {
                write!(f, "ranks are chosen; the predictors tried admit {:.1} % of the neurons", 100.0 * admitted)
            }
            Self::Layer { active, report } => write!(
                f,
                "layer {:>3}: {:5.2} % active; {}, {:.2} % missed, {:.2} % false alarms",
                report.layer,
                100.0 * active,
                report.form().in_words(),
                100.0 * report.held_out.false_negative_rate,
                100.0 * report.held_out.false_positive_rate,
            ),
            Self::Layers { missed, false_alarms, size, without_row, cached } => write!(
                f,
                "predictors: {:.2} % missed, {:.2} % false alarms (means over layers, held-out text)\n\
                 \x20 {:.2} % of the FFN's bytes{}\n\
                 orders: judged by what each layer's cache misses with {:.0} % of it cached (held-out text)",
                100.0 * missed,
                100.0 * false_alarms,
                100.0 * size,
                match without_row {
                    0 => String::new(),
                    n => format!("; {n} neurons never fired, and have no row in them"),
                },
                100.0 * cached
            ),
        }
    }
}

/// A task that goes on: its end is told when this is dropped.
pub(super) struct Running<'a>(&'a Observer<'a>);

impl<'a> Running<'a> {
    pub(super) fn begin(observer: &'a Observer<'a>, task: Task) -> Self {
        observer(Event::Began(task));
        Self(observer)
    }

    pub(super) fn at(&self, done: u64, total: u64) {
        (self.0)(Event::Progress { done, total });
    }

    pub(super) fn tell(&self, event: Event<'_>) {
        (self.0)(event);
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        (self.0)(Event::Ended);
    }
}
