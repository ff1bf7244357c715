//! What each stage is made from: a short name for everything that its result depends on.

use flashlm_formats::bundle::{FlashLayout, checksum};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_runtime::cache::PolicyKind;

use super::error::PrepareError;
use super::graph::{Input, StageKind};
use super::options::PrepareOptions;
use super::packed::Made;
use super::source_hash::source_hash;
use super::stamp::Stamp;
use super::work::{Work, fingerprint};
use crate::own_text::OwnText;
use crate::record::Calibration;
use crate::thresholds::default_tokens;

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
    pub(super) fn new(checkpoint: &Checkpoint, tokenizer_file: &[u8], work: &Work<'_>) -> Result<Self, PrepareError> {
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

/// What stamps can tell of the inputs.
struct Told<'a> {
    source: &'a Source,
    options: &'a PrepareOptions,
    spec: &'a ModelSpec,
    /// Hash of the text, once there is one.
    text: u64,
}

impl Told<'_> {
    /// The value of an input: of an option as it is written on the command line or near enough, of others a hash.
    fn value(&self, input: Input) -> String {
        let Self { source, options, spec, text } = self;
        let format =
            |format: Option<WeightFormat>| format.map_or("the checkpoint's".into(), |format| format.to_string());
        match input {
            Input::Checkpoint => source.files.clone(),
            Input::Tokenizer => source.tokenizer.clone(),
            Input::Text => format!("{text:016x}"),
            Input::Tokens => options.tokens(spec).to_string(),
            Input::SequenceTokens => options.sequence_tokens.to_string(),
            Input::Seed => options.seed.to_string(),
            Input::Minutes => options.minutes.to_string(),
            Input::QualityLoss => or_none(options.quality_loss(spec).map(percent)),
            Input::SizeBudget => percent(options.size_budget(spec)),
            Input::Recall => options.recall.to_string(),
            Input::LookAhead => or_none(options.look_ahead.map(|rank| rank.to_string())),
            Input::Dtype => format(options.ffn),
            Input::ResidentDtype => format(options.resident),
        }
    }

    /// The stamp of a stage that follows from `parts`; what it tells are the inputs that the graph names.
    fn stamp(&self, kind: StageKind, parts: &[&str]) -> Stamp {
        let inputs = kind.stage().inputs.iter().map(|&input| (input.name(), self.value(input)));
        Stamp::new(parts, inputs.collect())
    }
}

/// A share, as options give them.
fn percent(share: f64) -> String {
    format!("{}%", (share * 1e8).round() / 1e6)
}

fn or_none(value: Option<String>) -> String {
    value.unwrap_or_else(|| "not given".into())
}

/// What the text that the model writes is made from.
pub(super) fn own_text(source: &Source, options: &PrepareOptions, spec: &ModelSpec, asked: &OwnText) -> Stamp {
    let asked = format!("{asked:?}");
    let parts = [&source.parts()[..], &["own text", &asked]].concat();
    Told { source, options, spec, text: 0 }.stamp(StageKind::OwnText, &parts)
}

/// What thresholds are made from; `checkpoint` has none yet.
pub(super) fn thresholds(
    options: &PrepareOptions,
    source: &Source,
    calibration: &Calibration,
    checkpoint: &Checkpoint,
    loss: f64,
) -> Stamp {
    let spec = checkpoint.spec();
    let measured = format!("{loss} {}", default_tokens(spec));
    let parts = [VERSION, &source.files, &calibration.id(checkpoint), "thresholds verified", &measured];
    Told { source, options, spec, text: calibration.text_fingerprint }.stamp(StageKind::Thresholds, &parts)
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
        options: &PrepareOptions,
        source: &Source,
        calibration: &Calibration,
        checkpoint: &Checkpoint,
        layout: &FlashLayout,
    ) -> Self {
        let spec = checkpoint.spec();
        let told = Told { source, options, spec, text: calibration.text_fingerprint };
        let recorded = told.stamp(StageKind::Recording, &[VERSION, &source.files, &calibration.id(checkpoint)]);
        let recorded_by = recorded.name();
        let training =
            format!("{} {} {:?} {}", options.size_budget(spec), options.recall, options.look_ahead, options.seed);
        let trained = told.stamp(StageKind::Predictors, &[recorded_by, "train", &training]);
        let cache = options.cache_share(spec, options.ffn.unwrap_or(checkpoint.ffn_dtype().into()));
        let judged = format!("{} {cache}", PolicyKind::DEFAULT);
        let ordering = format!("{} {} {judged}", layout.records_per_group(), layout.group_bytes());
        let ordered = told.stamp(StageKind::Orders, &[recorded_by, "order", &ordering]);
        let measured = told.stamp(StageKind::Sparsity, &[trained.name(), ordered.name(), "sparsity"]);
        let formats = format!("{} {layout:?}", formats(options));
        let flash = fingerprint(&[&source.parts()[..], &["flash", recorded_by, ordered.name(), &formats]].concat());
        let packed = fingerprint(&[&flash, measured.name()]);
        Self { recorded, trained, ordered, measured, bundle: Made { packed, flash } }
    }
}

/// How weights are stored, in words.
fn formats(options: &PrepareOptions) -> String {
    let name = |format: Option<WeightFormat>| format.map_or("as it is".into(), |format| format.to_string());
    format!("ffn {}, resident {}", name(options.ffn), name(options.resident))
}
