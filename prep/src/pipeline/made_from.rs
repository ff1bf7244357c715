//! What each stage is made from: a short name for everything that its result depends on.

use flashlm_formats::bundle::{FlashLayout, checksum};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::weight_format::WeightFormat;

use super::error::PrepareError;
use super::graph::{Input, StageKind};
use super::options::PrepareOptions;
use super::packed::Made;
use super::source_hash::source_hash;
use super::stamp::{Stamp, fingerprint};
use super::work::Work;
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
    /// What the bundle will say of conversations and sampling, if anything: no other stage depends on it.
    chat: Option<String>,
}

impl Source {
    pub(super) fn new(checkpoint: &Checkpoint, tokenizer_file: &[u8], work: &Work<'_>) -> Result<Self, PrepareError> {
        Ok(Self {
            files: source_hash(checkpoint, work)?,
            tokenizer: format!("{:016x}", checksum(tokenizer_file)),
            model: format!("{} {}", checkpoint.spec().text(), checkpoint.ffn_dtype()),
            chat: chat_hash(checkpoint)?,
        })
    }

    fn parts(&self) -> [&str; 4] {
        [VERSION, &self.files, &self.tokenizer, &self.model]
    }
}

/// A hash of what a bundle will say of conversations and sampling; `None` where that is nothing.
fn chat_hash(checkpoint: &Checkpoint) -> Result<Option<String>, PrepareError> {
    let (chat, sampling) = (checkpoint.chat()?, checkpoint.sampling()?);
    let says = chat.is_some() || !sampling.is_empty();
    Ok(says.then(|| format!("{:016x}", checksum(format!("{chat:?} {sampling:?}").as_bytes()))))
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
            Input::SizeBudget => percent(options.size_budget),
            Input::Memory => percent(options.memory),
            Input::Disk => disk(options),
            Input::Recall => options.recall.to_string(),
            Input::LookAhead => or_none(options.look_ahead.map(|rank| rank.to_string())),
            Input::Dtype => format(options.ffn),
            Input::ResidentDtype => format(options.resident),
            Input::EmbeddingDtype => or_none(options.embedding.map(|format| format.to_string())),
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

/// What reads cost, as far as anything depends on it.
fn disk(options: &PrepareOptions) -> String {
    format!("{:.0} ns a request, {:.4} a byte", options.cost.request_ns(), options.cost.byte_ns())
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
        let run = options.run(checkpoint.ffn_dtype().into());
        let for_run = format!("{} {} {}, {}", run.memory, run.ffn, run.resident, disk(options));
        let training =
            format!("{} {for_run} {} {:?} {}", options.size_budget, options.recall, options.look_ahead, options.seed);
        let trained = told.stamp(StageKind::Predictors, &[recorded_by, "train from weights", &training]);
        let cache = run.cache_share(spec);
        let judged = format!("policies by layer {cache}, {}", disk(options));
        let ordering = format!("{} {} {judged}", layout.records_per_group(), layout.group_bytes());
        let ordered = told.stamp(StageKind::Orders, &[recorded_by, "order", &ordering]);
        let measured = told.stamp(StageKind::Sparsity, &[trained.name(), ordered.name(), "sparsity, half-lives"]);
        let formats = format!("{} {layout:?}", formats(options));
        let flash = fingerprint(&[&source.parts()[..], &["flash", recorded_by, ordered.name(), &formats]].concat());
        let packed = match &source.chat {
            None => fingerprint(&[&flash, measured.name()]),
            Some(chat) => fingerprint(&[&flash, measured.name(), chat]),
        };
        Self { recorded, trained, ordered, measured, bundle: Made { packed, flash } }
    }
}

/// How weights are stored, in words.
fn formats(options: &PrepareOptions) -> String {
    let name = |format: Option<WeightFormat>| format.map_or("as it is".into(), |format| format.to_string());
    let how = if options.rounded_formats().is_plain() { "" } else { ", rounded for inputs" };
    format!("ffn {}, resident {}{how}", name(options.ffn), options.resident_formats())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::path::Path;
    use std::time::Duration;

    use flashlm::disk_cost::ReadCost;
    use flashlm::text::Tokenizer;
    use flashlm_formats::bundle::LayoutOptions;
    use flashlm_formats::recording::HELD_OUT;

    use super::*;
    use crate::record::documents::read_documents;
    use crate::record::text::Sampling;
    use crate::tokenizer::tokenizer_json;

    struct Case {
        checkpoint: Checkpoint,
        calibration: Calibration,
        source: Source,
    }

    impl Case {
        /// The example model, and its text.
        fn new() -> Self {
            let examples = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("examples");
            let checkpoint = Checkpoint::open(examples.join("tiny-opt")).unwrap();
            let tokenizer = tokenizer_json(&checkpoint).unwrap();
            let documents = read_documents(&[examples.join("synthetic.txt")]).unwrap();
            let sampling = Sampling { tokens: 2000, sequence_tokens: 64, seed: 1, held_out: HELD_OUT };
            let ids = Tokenizer::from_json(&tokenizer).unwrap();
            let calibration = Calibration::new(&documents, &ids, checkpoint.spec(), sampling).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let work = Work::open(&dir.path().join("work"), &[], &|_| ()).unwrap();
            let source = Source::new(&checkpoint, &tokenizer, &work).unwrap();
            Case { checkpoint, calibration, source }
        }

        /// The stamp of every stage before the bundle, and the name of all that the bundle is made from.
        fn stamps(&self, options: &PrepareOptions) -> Vec<(StageKind, String)> {
            let Case { checkpoint, calibration, source } = self;
            let format = options.ffn.unwrap_or(checkpoint.ffn_dtype().into());
            let layout = FlashLayout::new(checkpoint.spec(), format, LayoutOptions::default()).unwrap();
            let from = MadeFrom::new(options, source, calibration, checkpoint, &layout);
            let asked = OwnText {
                tokens: options.tokens(checkpoint.spec()),
                sequence_tokens: options.sequence_tokens,
                seed: options.seed,
                limit: Duration::from_secs(60 * options.minutes),
            };
            let loss = options.quality_loss.unwrap_or(0.02);
            let name = |kind, stamp: &Stamp| (kind, stamp.name().to_owned());
            vec![
                name(StageKind::OwnText, &own_text(source, options, checkpoint.spec(), &asked)),
                name(StageKind::Thresholds, &thresholds(options, source, calibration, checkpoint, loss)),
                name(StageKind::Recording, &from.recorded.and(&calibration.id(checkpoint))),
                name(StageKind::Predictors, &from.trained),
                name(StageKind::Orders, &from.ordered),
                name(StageKind::Sparsity, &from.measured),
                (StageKind::Bundle, from.bundle.packed),
            ]
        }
    }

    fn options() -> PrepareOptions {
        PrepareOptions { tokens: Some(2000), sequence_tokens: 64, minutes: 3, ..PrepareOptions::new("", "") }
    }

    /// Names since an architecture is named by its JSON. Where one changes, everybody's work directories are made again from that
    /// stage on: that may be, but not by accident. A new version of the program changes them all.
    #[test]
    fn work_directories_stay_valid() {
        assert_eq!(VERSION, "0.1.0", "names of another version: write them down here");
        let found = Case::new().stamps(&options());
        let names: Vec<&str> = found.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "3014d40ff73712c9",
                "094bc214bec5ab23",
                "feb1e25dee0b1cf7",
                "5e20600812b7e0ad",
                "20d4cfe9e60198d4",
                "99a6f567b64ca50d",
                "cbc78598d2436941",
            ]
        );
    }

    /// Another chat template needs another manifest, and nothing else.
    #[test]
    fn a_chat_template_is_packed_anew_and_nothing_before_it() {
        let mut case = Case::new();
        let flash = |case: &Case| {
            let Case { checkpoint, calibration, source } = case;
            let format: WeightFormat = checkpoint.ffn_dtype().into();
            let layout = FlashLayout::new(checkpoint.spec(), format, LayoutOptions::default()).unwrap();
            MadeFrom::new(&options(), source, calibration, checkpoint, &layout).bundle.flash
        };
        let (before, flash_before) = (case.stamps(&options()), flash(&case));
        let dir = tempfile::tempdir().unwrap();
        for entry in case.checkpoint.dir().read_dir().unwrap().flatten() {
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        let mut hashes = vec![None];
        for template in ["{{ messages }}", "{{ messages[0] }}"] {
            std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
            hashes.push(chat_hash(&Checkpoint::open(dir.path()).unwrap()).unwrap());
        }
        assert_eq!(hashes[0], case.source.chat, "the example has none");
        assert!(hashes[1].is_some() && hashes[1] != hashes[2]);
        case.source.chat = hashes.pop().unwrap();
        let after = case.stamps(&options());
        assert_eq!(after[..after.len() - 1], before[..before.len() - 1]);
        assert_ne!(after.last(), before.last());
        assert_eq!(flash(&case), flash_before);
    }

    #[test]
    fn a_stage_depends_on_the_inputs_that_the_graph_names_and_on_no_others() {
        let case = Case::new();
        let before = case.stamps(&options());
        let changes: [(Input, fn(&mut PrepareOptions)); 13] = [
            (Input::Tokens, |options| options.tokens = Some(1000)),
            (Input::SequenceTokens, |options| options.sequence_tokens = 32),
            (Input::Seed, |options| options.seed = 2),
            (Input::Minutes, |options| options.minutes = 4),
            (Input::QualityLoss, |options| options.quality_loss = Some(0.03)),
            (Input::SizeBudget, |options| options.size_budget = 0.5),
            (Input::Memory, |options| options.memory = 0.3),
            (Input::Disk, |options| options.cost = ReadCost::new(40_000.0, 1.0).unwrap()),
            (Input::Recall, |options| options.recall = 0.9),
            (Input::LookAhead, |options| options.look_ahead = Some(8)),
            (Input::Dtype, |options| options.ffn = Some(WeightFormat::INT8)),
            (Input::ResidentDtype, |options| options.resident = Some(WeightFormat::INT8)),
            (Input::EmbeddingDtype, |options| options.embedding = Some(WeightFormat::INT8)),
        ];
        for (input, change) in changes {
            let mut options = options();
            change(&mut options);
            let after = case.stamps(&options);
            let changed: Vec<StageKind> =
                before.iter().zip(&after).filter(|(before, after)| before != after).map(|(_, after)| after.0).collect();
            let names = |kind: &StageKind| kind.stage().inputs.contains(&input);
            assert!(changed.iter().all(names), "{input:?} changes {changed:?}");
            assert!(!changed.is_empty(), "{input:?} changes nothing");
        }
        // What decides nothing of the result changes no stamp.
        let other = PrepareOptions {
            threads: NonZeroUsize::new(1),
            keep_recordings: true,
            anyway: true,
            force: true,
            work: Some("elsewhere".into()),
            ..options()
        };
        assert_eq!(case.stamps(&other), before);
    }
}
