//! What a preparation is asked for.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use flashlm::disk_cost::ReadCost;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::weight_format::{ResidentFormats, WeightFormat};

use super::error::PrepareError;
use crate::expected_run::ExpectedRun;
use crate::report::Made;
use crate::rounding::RoundedFormats;
use crate::thresholds::DEFAULT_LOSS;
use crate::train::TRIAL_TOKENS;

/// From this hidden size on a model counts as large.
const LARGE: usize = 2048;

/// What a preparation is asked for.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// The checkpoint: a directory.
    pub checkpoint: PathBuf,
    /// The bundle to write.
    pub output: PathBuf,
    /// Calibration text: files or directories of .txt or .jsonl. Without any the model writes its own.
    pub text: Vec<PathBuf>,
    /// Tokens to calibrate on; without a number 40 000, for hidden sizes from 2048 on 20 000.
    pub tokens: Option<usize>,
    /// Longest sequence.
    pub sequence_tokens: usize,
    /// Largest size of all predictors, as a share of the FFN's bytes.
    pub size_budget: f64,
    /// Memory that the bundle is to run in, as a share of the model's 16-bit size.
    pub memory: f64,
    /// What reads cost where it is to run.
    pub cost: ReadCost,
    /// Share of the active neurons that predictors must find.
    pub recall: f64,
    /// Perplexity that may be lost by leaving out weak neurons, as a share; without one 1 % where no neuron is ever exactly zero, and
    /// none where most are.
    pub quality_loss: Option<f64>,
    /// Go on where nothing is gained.
    pub anyway: bool,
    /// Also train predictors of the next layer's neurons, of this rank.
    pub look_ahead: Option<usize>,
    /// Minutes that the model may write for, when it generates its own calibration text.
    pub minutes: u64,
    /// How neurons are stored; without a format as the checkpoint has them.
    pub ffn: Option<WeightFormat>,
    /// How attention is stored; likewise.
    pub resident: Option<WeightFormat>,
    /// How embedding and head are stored; without a format in 8 bits where attention is quantised, else likewise.
    pub embedding: Option<WeightFormat>,
    /// Replace a bundle that is there and was not packed from this work directory.
    pub force: bool,
    /// Directory for intermediate files; without one the output's name with `.work`.
    pub work: Option<PathBuf>,
    /// A page that shows what was found, written beside the bundle, and who made it.
    pub report: Option<Made>,
    /// Keep the recorded activations in the work directory.
    pub keep_recordings: bool,
    /// Decides the sampling of documents, the training order, and self-generated text.
    pub seed: u64,
    /// Threads that compute; without a number as many as there are processors.
    pub threads: Option<NonZeroUsize>,
}

impl PrepareOptions {
    /// Longest sequence, where nothing else is asked for.
    pub const SEQUENCE_TOKENS: usize = 512;
    /// Largest size of all predictors, likewise.
    pub const SIZE_BUDGET: f64 = 0.09;
    /// Share of the active neurons that must be found, likewise.
    pub const RECALL: f64 = 0.968;
    /// Minutes that the model may write for, likewise.
    pub const MINUTES: u64 = 20;
    /// Seed, likewise.
    pub const SEED: u64 = 1;

    /// The defaults: a bundle at `output` of the checkpoint in the directory `checkpoint`, which generates its own calibration text.
    pub fn new(checkpoint: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            checkpoint: checkpoint.into(),
            output: output.into(),
            text: Vec::new(),
            tokens: None,
            sequence_tokens: Self::SEQUENCE_TOKENS,
            size_budget: Self::SIZE_BUDGET,
            memory: ExpectedRun::MEMORY,
            cost: ReadCost::USUAL,
            recall: Self::RECALL,
            quality_loss: None,
            anyway: false,
            look_ahead: None,
            minutes: Self::MINUTES,
            ffn: None,
            resident: None,
            embedding: None,
            force: false,
            work: None,
            report: None,
            keep_recordings: false,
            seed: Self::SEED,
            threads: None,
        }
    }

    /// Where intermediate files go.
    pub fn work_directory(&self) -> PathBuf {
        self.work.clone().unwrap_or_else(|| {
            let mut name = self.output.clone().into_os_string();
            name.push(".work");
            name.into()
        })
    }

    /// Where the report goes.
    pub fn report_path(&self) -> PathBuf {
        self.output.with_extension("report.html")
    }

    /// An error for what no preparation can do.
    pub(super) fn check(&self) -> Result<(), PrepareError> {
        let share = |share: f64| share > 0.0 && share <= 1.0;
        let wrong = |name, value: String, expected| Err(PrepareError::Option { name, value, expected });
        if !(self.recall > 0.0 && self.recall < 1.0) {
            return wrong("recall", self.recall.to_string(), "a share above 0 and below 1, such as 0.96");
        }
        let shares = [
            ("size budget", Some(self.size_budget)),
            ("quality loss", self.quality_loss),
            ("memory", Some(self.memory)),
        ];
        for (name, value) in shares {
            if let Some(value) = value.filter(|value| !share(*value)) {
                return wrong(name, value.to_string(), "a share above 0 and at most 1, such as 0.09");
            }
        }
        if self.sequence_tokens < 2 {
            return wrong("longest sequence", self.sequence_tokens.to_string(), "2 tokens at least");
        }
        if self.look_ahead == Some(0) {
            return wrong("look-ahead", "0".into(), "a rank of 1 at least");
        }
        if self.minutes == 0 {
            return wrong("minutes", "0".into(), "1 at least");
        }
        Ok(())
    }

    /// An error for what cannot be done with this model.
    pub(super) fn check_model(&self, spec: &ModelSpec) -> Result<(), PrepareError> {
        let most = spec.hidden_size.min(spec.ffn().size);
        match self.look_ahead {
            Some(rank) if rank > most => Err(PrepareError::LookAheadRank { rank, most }),
            _ => Ok(()),
        }
    }

    /// Tokens to calibrate on. In a large model a token costs more, and shows more neurons.
    pub(super) fn tokens(&self, spec: &ModelSpec) -> usize {
        let default = if spec.hidden_size >= LARGE { 20_000 } else { 40_000 };
        self.tokens.unwrap_or(default)
    }

    /// Perplexity that thresholds may cost; none where neurons are exactly zero by themselves.
    pub(super) fn quality_loss(&self, spec: &ModelSpec) -> Option<f64> {
        self.quality_loss.or((!spec.ffn().activation.is_sparse()).then_some(DEFAULT_LOSS))
    }

    /// The run that the bundle is for, of a checkpoint whose neurons are stored like this.
    pub(super) fn run(&self, stored: WeightFormat) -> ExpectedRun {
        let Self { memory, cost, .. } = *self;
        ExpectedRun { memory, ffn: self.ffn.unwrap_or(stored), resident: self.resident_formats(), cost }
    }

    /// Which weights are rounded for their inputs: all that are quantised but the vocabulary's.
    pub(super) fn rounded_formats(&self) -> RoundedFormats {
        RoundedFormats { ffn: self.ffn, attention: self.resident }
    }

    /// How resident matrices are to be stored.
    pub(super) fn resident_formats(&self) -> ResidentFormats {
        ResidentFormats::new(self.resident, self.embedding)
    }
}

/// Tokens of the pilot that ranks are chosen on, of this many in all.
pub(super) fn pilot_tokens(tokens: usize) -> usize {
    // A tenth is held out, the others may all be trained on.
    (tokens / 4).clamp(TRIAL_TOKENS / 2, TRIAL_TOKENS + TRIAL_TOKENS / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_options_are_named() {
        let refused = |change: &dyn Fn(&mut PrepareOptions)| {
            let mut options = PrepareOptions::new("in", "out");
            change(&mut options);
            match options.check() {
                Err(PrepareError::Option { name, .. }) => Some(name),
                _ => None,
            }
        };
        assert_eq!(refused(&|_| ()), None);
        assert_eq!(refused(&|options| options.recall = f64::NAN), Some("recall"));
        assert_eq!(refused(&|options| options.recall = 1.0), Some("recall"));
        assert_eq!(refused(&|options| options.size_budget = 0.0), Some("size budget"));
        assert_eq!(refused(&|options| options.quality_loss = Some(-0.1)), Some("quality loss"));
        assert_eq!(refused(&|options| options.memory = 1.5), Some("memory"));
        assert_eq!(refused(&|options| options.sequence_tokens = 1), Some("longest sequence"));
        assert_eq!(refused(&|options| options.look_ahead = Some(0)), Some("look-ahead"));
        assert_eq!(refused(&|options| options.minutes = 0), Some("minutes"));
    }
}
