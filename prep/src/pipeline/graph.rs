//! The stages of a preparation as data: what each is made from, and what it leaves.
//!
//! A stage's directory in the work directory has a stamp, which is a short name for all that the stage is made from. A stage with the
//! stamp of today's inputs is kept, or resumed where it is not whole; any other is removed and made again, and what of
//! [`Stage::inputs`] changed is the reason that is given.

/// A stage of a preparation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageKind {
    /// Text that the model writes, where none is given.
    OwnText,
    /// Below which magnitude a neuron may be left out, where no neuron is ever exactly zero.
    Thresholds,
    /// A recording of the text's start, which ranks are chosen on.
    Pilot,
    /// Which neurons fire on the text.
    Recording,
    /// Predictors of the neurons that fire.
    Predictors,
    /// The storage order of each layer's neurons.
    Orders,
    /// How many neurons are active and predicted, and how often they come again.
    Sparsity,
    /// The bundle.
    Bundle,
}

/// Something outside that stages are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The checkpoint's weights and configuration.
    Checkpoint,
    /// The tokenizer, as the bundle will hold it.
    Tokenizer,
    /// The calibration text.
    Text,
    /// Tokens to calibrate on.
    Tokens,
    /// The longest sequence.
    SequenceTokens,
    /// What decides the sampling of documents, the training order and self-generated text.
    Seed,
    /// Minutes that the model may write for.
    Minutes,
    /// Perplexity that thresholds may cost.
    QualityLoss,
    /// Largest size of all predictors.
    SizeBudget,
    /// Memory that the bundle is to run in.
    Memory,
    /// What reads cost where it is to run.
    Disk,
    /// Share of the active neurons that predictors must find.
    Recall,
    /// Rank of the predictors of the next layer's neurons.
    LookAhead,
    /// How neurons are stored.
    Dtype,
    /// How resident matrices are stored.
    ResidentDtype,
    /// How embedding and head are stored.
    EmbeddingDtype,
}

impl Input {
    /// Its name in stamps: of an option that of the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Checkpoint => "the checkpoint",
            Self::Tokenizer => "the tokenizer",
            Self::Text => "the text",
            Self::Tokens => "--tokens",
            Self::SequenceTokens => "--sequence-tokens",
            Self::Seed => "--seed",
            Self::Minutes => "--minutes",
            Self::QualityLoss => "--quality-loss",
            Self::SizeBudget => "--size-budget",
            Self::Memory => "--for",
            Self::Disk => "--disk",
            Self::Recall => "--recall",
            Self::LookAhead => "--look-ahead",
            Self::Dtype => "--dtype",
            Self::ResidentDtype => "--resident-dtype",
            Self::EmbeddingDtype => "--embedding-dtype",
        }
    }
}

/// What is to be known of a stage.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    /// Which one.
    pub kind: StageKind,
    /// Its directory in the work directory; the bundle is the output itself.
    pub directory: Option<&'static str>,
    /// Stages whose results it reads, where they are needed at all.
    pub reads: &'static [StageKind],
    /// All inputs that it depends on, near and far, in the order in which its stamp has them.
    pub inputs: &'static [Input],
    /// The files that it leaves; `NNN` is the number of a layer.
    pub outputs: &'static [&'static str],
    /// Whether its files stay when the bundle is there. Recordings stay if they are asked for.
    pub is_kept: bool,
}

use Input::*;

const RECORDED: &[Input] = &[Checkpoint, Tokenizer, Text, Tokens, SequenceTokens, Seed, QualityLoss];

/// All stages; each comes after those that it reads.
pub const STAGES: [Stage; 8] = [
    Stage {
        kind: StageKind::OwnText,
        directory: Some("own-text"),
        reads: &[],
        inputs: &[Checkpoint, Tokenizer, Tokens, SequenceTokens, Seed, Minutes],
        outputs: &["text.txt"],
        is_kept: true,
    },
    Stage {
        kind: StageKind::Thresholds,
        directory: Some("thresholds"),
        reads: &[StageKind::OwnText],
        inputs: RECORDED,
        outputs: &["thresholds.json"],
        is_kept: true,
    },
    Stage {
        kind: StageKind::Pilot,
        directory: Some("pilot"),
        reads: &[StageKind::OwnText, StageKind::Thresholds],
        inputs: RECORDED,
        outputs: &["recording.json", "tokens.safetensors", "layer-NNN.safetensors"],
        is_kept: false,
    },
    Stage {
        kind: StageKind::Recording,
        directory: Some("recording"),
        reads: &[StageKind::OwnText, StageKind::Thresholds],
        inputs: RECORDED,
        outputs: &["recording.json", "tokens.safetensors", "layer-NNN.safetensors"],
        is_kept: false,
    },
    Stage {
        kind: StageKind::Predictors,
        directory: Some("predictors"),
        reads: &[StageKind::Pilot, StageKind::Recording],
        // A predictor takes memory from the neurons that are cached.
        inputs: &[
            Checkpoint,
            Tokenizer,
            Text,
            Tokens,
            SequenceTokens,
            Seed,
            QualityLoss,
            SizeBudget,
            Memory,
            Disk,
            Recall,
            LookAhead,
            Dtype,
            ResidentDtype,
            EmbeddingDtype,
        ],
        outputs: &["ranks.json", "predictor-NNN.safetensors", "report-NNN.json", "predictors.json", "timings.json"],
        is_kept: true,
    },
    Stage {
        kind: StageKind::Orders,
        directory: Some("orders"),
        reads: &[StageKind::Recording],
        // An order is judged with what formats and predictors leave of the memory.
        inputs: &[
            Checkpoint,
            Tokenizer,
            Text,
            Tokens,
            SequenceTokens,
            Seed,
            QualityLoss,
            SizeBudget,
            Memory,
            Disk,
            Dtype,
            ResidentDtype,
            EmbeddingDtype,
        ],
        outputs: &["layer-NNN.order.safetensors", "scores-NNN.json", "orders.json"],
        is_kept: true,
    },
    Stage {
        kind: StageKind::Sparsity,
        directory: Some("sparsity"),
        reads: &[StageKind::Recording, StageKind::Predictors, StageKind::Orders],
        inputs: MEASURED,
        outputs: &["sparsity-NNN.json"],
        is_kept: true,
    },
    Stage {
        kind: StageKind::Bundle,
        directory: None,
        reads: &[StageKind::Predictors, StageKind::Orders, StageKind::Sparsity],
        inputs: MEASURED,
        outputs: &[],
        is_kept: true,
    },
];

const MEASURED: &[Input] = &[
    Checkpoint,
    Tokenizer,
    Text,
    Tokens,
    SequenceTokens,
    Seed,
    QualityLoss,
    SizeBudget,
    Memory,
    Disk,
    Recall,
    LookAhead,
    Dtype,
    ResidentDtype,
    EmbeddingDtype,
];

impl StageKind {
    /// What is to be known of it.
    pub fn stage(self) -> &'static Stage {
        &STAGES[self as usize]
    }

    /// Its directory in the work directory.
    ///
    /// # Panics
    /// For the bundle, which has none.
    pub(super) fn directory(self) -> &'static str {
        self.stage().directory.expect("only stages before the bundle have files in the work directory")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_stand_behind_what_they_read_and_depend_on_all_that_it_depends_on() {
        for (at, stage) in STAGES.iter().enumerate() {
            assert_eq!(stage.kind as usize, at);
            assert_eq!(stage.kind.stage().kind, stage.kind);
            for read in stage.reads.iter().map(|kind| kind.stage()) {
                assert!((read.kind as usize) < at, "{:?} reads {:?}", stage.kind, read.kind);
                // The text is known by its contents, whoever wrote it.
                for input in read.inputs.iter().filter(|_| read.kind != StageKind::OwnText) {
                    assert!(stage.inputs.contains(input), "{:?} reads {:?}: {input:?}", stage.kind, read.kind);
                }
            }
        }
    }
}
