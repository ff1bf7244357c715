//! What each stage is made from: a short name for everything that its result depends on.

use anyhow::Result;
use flashlm_formats::bundle::{FlashLayout, checksum};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_prep::own_text::OwnText;
use flashlm_prep::record::Calibration;
use flashlm_runtime::cache::PolicyKind;

use super::super::thresholds::default_tokens;
use super::PrepareArgs;
use super::packed::Made;
use super::source_hash::source_hash;
use super::work::{Work, fingerprint};

/// Another version may do anything otherwise.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The checkpoint.
pub(super) struct Source {
    /// Weights and configuration, by their contents.
    files: String,
    /// The tokenizer, as the bundle will hold it.
    tokenizer: String,
    /// What the model is taken for, before it has thresholds.
    model: String,
}

impl Source {
    pub(super) fn new(checkpoint: &Checkpoint, tokenizer_file: &[u8], work: &Work) -> Result<Self> {
        Ok(Self {
            files: source_hash(checkpoint, work)?,
            tokenizer: format!("{:016x}", checksum(tokenizer_file)),
            model: format!("{:?} {}", checkpoint.spec(), checkpoint.ffn_dtype()),
        })
    }

    fn parts(&self) -> [&str; 4] {
        [VERSION, &self.files, &self.tokenizer, &self.model]
    }
}

/// What the text that the model writes is made from.
pub(super) fn own_text(source: &Source, asked: &OwnText) -> String {
    fingerprint(&[&source.parts()[..], &["own text", &format!("{asked:?}")]].concat())
}

/// What thresholds are made from; `checkpoint` has none yet.
pub(super) fn thresholds(source: &Source, calibration: &Calibration, checkpoint: &Checkpoint, loss: f64) -> String {
    let measured = format!("{loss} {}", default_tokens(checkpoint.spec()));
    fingerprint(&[VERSION, &source.files, &calibration.id(checkpoint), "thresholds verified", &measured])
}

/// What everything from the recording on is made from.
pub(super) struct MadeFrom {
    pub(super) recorded: String,
    pub(super) trained: String,
    pub(super) ordered: String,
    /// What is measured of layers with these predictors and orders.
    pub(super) measured: String,
    pub(super) bundle: Made,
}

impl MadeFrom {
    /// `checkpoint` has its thresholds.
    pub(super) fn new(
        args: &PrepareArgs,
        source: &Source,
        calibration: &Calibration,
        checkpoint: &Checkpoint,
        layout: &FlashLayout,
    ) -> Self {
        let spec = checkpoint.spec();
        let recorded = fingerprint(&[VERSION, &source.files, &calibration.id(checkpoint)]);
        let training = format!("{} {} {:?} {}", args.size_budget(spec), args.recall, args.look_ahead, args.seed);
        let trained = fingerprint(&[&recorded, "train", &training]);
        let cache = args.cache_share(spec, args.formats.dtype.unwrap_or(checkpoint.ffn_dtype().into()));
        let judged = format!("{} {cache}", PolicyKind::DEFAULT);
        let ordering = format!("{} {} {judged}", layout.records_per_group(), layout.group_bytes());
        let ordered = fingerprint(&[&recorded, "order", &ordering]);
        let measured = fingerprint(&[&trained, &ordered, "sparsity"]);
        let formats = format!("{} {layout:?}", args.formats.describe());
        let flash = fingerprint(&[&source.parts()[..], &["flash", &recorded, &ordered, &formats]].concat());
        let packed = fingerprint(&[&flash, &measured]);
        Self { recorded, trained, ordered, measured, bundle: Made { packed, flash } }
    }
}
