//! What each stage is made from: a short name for everything that its result depends on.

use anyhow::Result;
use flashlm_formats::bundle::{FlashLayout, checksum};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_prep::own_text::OwnText;
use flashlm_prep::record::Calibration;
use flashlm_prep::thresholds::default_tokens;
use flashlm_runtime::cache::PolicyKind;

use super::PrepareArgs;
use super::packed::Made;
use super::source_hash::source_hash;
use super::stamp::Stamp;
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

    /// What of it can be told.
    fn inputs(&self) -> Vec<(&'static str, String)> {
        vec![("the checkpoint", self.files.clone()), ("the tokenizer", self.tokenizer.clone())]
    }
}

/// An option with its value, as it is written on the command line or near enough.
fn option(name: &'static str, value: impl std::fmt::Display) -> (&'static str, String) {
    (name, value.to_string())
}

/// A share, as options give them.
fn percent(share: f64) -> String {
    format!("{}%", (share * 1e8).round() / 1e6)
}

fn or_none(value: Option<String>) -> String {
    value.unwrap_or_else(|| "not given".into())
}

/// What the text follows from.
fn sampled(
    source: &Source,
    args: &PrepareArgs,
    calibration: &Calibration,
    tokens: usize,
) -> Vec<(&'static str, String)> {
    let mut inputs = source.inputs();
    inputs.push(option("the text", format!("{:016x}", calibration.text_fingerprint)));
    inputs.push(option("--tokens", tokens));
    inputs.push(option("--sequence-tokens", args.sequence_tokens));
    inputs.push(option("--seed", args.seed));
    inputs
}

/// What the text that the model writes is made from.
pub(super) fn own_text(source: &Source, asked: &OwnText) -> Stamp {
    let mut inputs = source.inputs();
    inputs.push(option("--tokens", asked.tokens));
    inputs.push(option("--sequence-tokens", asked.sequence_tokens));
    inputs.push(option("--seed", asked.seed));
    inputs.push(option("--minutes", asked.limit.as_secs() / 60));
    Stamp::new(&[&source.parts()[..], &["own text", &format!("{asked:?}")]].concat(), inputs)
}

/// What thresholds are made from; `checkpoint` has none yet.
pub(super) fn thresholds(
    args: &PrepareArgs,
    source: &Source,
    calibration: &Calibration,
    checkpoint: &Checkpoint,
    loss: f64,
) -> Stamp {
    let measured = format!("{loss} {}", default_tokens(checkpoint.spec()));
    let parts = [VERSION, &source.files, &calibration.id(checkpoint), "thresholds verified", &measured];
    let mut inputs = sampled(source, args, calibration, args.tokens(checkpoint.spec()));
    inputs.push(option("--quality-loss", percent(loss)));
    Stamp::new(&parts, inputs)
}

/// What everything from the recording on is made from.
pub(super) struct MadeFrom {
    pub(super) recorded: Stamp,
    pub(super) trained: Stamp,
    pub(super) ordered: Stamp,
    /// What is measured of layers with these predictors and orders.
    pub(super) measured: Stamp,
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
        let mut inputs = sampled(source, args, calibration, args.tokens(spec));
        inputs.push(option("--quality-loss", or_none(args.quality_loss(spec).map(percent))));
        let recorded = Stamp::new(&[VERSION, &source.files, &calibration.id(checkpoint)], inputs.clone());
        let recorded_by = recorded.name();
        let training = format!("{} {} {:?} {}", args.size_budget(spec), args.recall, args.look_ahead, args.seed);
        let of_training = [
            option("--size-budget", percent(args.size_budget(spec))),
            option("--recall", args.recall),
            option("--look-ahead", or_none(args.look_ahead.map(|rank| rank.to_string()))),
        ];
        let with = |more: &[(&'static str, String)]| [&inputs[..], more].concat();
        let trained = Stamp::new(&[recorded_by, "train", &training], with(&of_training));
        let cache = args.cache_share(spec, args.formats.dtype.unwrap_or(checkpoint.ffn_dtype().into()));
        let judged = format!("{} {cache}", PolicyKind::DEFAULT);
        let ordering = format!("{} {} {judged}", layout.records_per_group(), layout.group_bytes());
        let formats = format!("{} {layout:?}", args.formats.describe());
        // An order is judged with what formats and predictors leave of the memory.
        let format =
            |format: Option<WeightFormat>| format.map_or("the checkpoint's".into(), |format| format.to_string());
        let of_orders = [
            of_training[0].clone(),
            option("--dtype", format(args.formats.dtype)),
            option("--resident-dtype", format(args.formats.resident_dtype)),
        ];
        let ordered = Stamp::new(&[recorded_by, "order", &ordering], with(&of_orders));
        let of_both = with(&[&of_training[..], &of_orders[1..]].concat());
        let measured = Stamp::new(&[trained.name(), ordered.name(), "sparsity"], of_both);
        let flash = fingerprint(&[&source.parts()[..], &["flash", recorded_by, ordered.name(), &formats]].concat());
        let packed = fingerprint(&[&flash, measured.name()]);
        Self { recorded, trained, ordered, measured, bundle: Made { packed, flash } }
    }
}
