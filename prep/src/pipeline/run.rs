//! A preparation from its beginning to its end: each stage in turn, as far as it is not done.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flashlm::error::printable;
use flashlm::text::Tokenizer;
use flashlm::threads;
use flashlm_formats::bundle::{Bundle, FlashLayout, LayerSparsity, LayoutOptions, Replacement};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::destination::{Destination, FileKind};
use flashlm_formats::orders::StoredOrders;
use flashlm_formats::recording::HELD_OUT;
use flashlm_formats::thresholds::ThresholdFile;

use super::error::{PrepareError, io_error};
use super::estimate::{Left, estimate};
use super::event::{Event, Observer, Running, Task};
use super::graph::StageKind;
use super::layers::{Layers, Stages};
use super::made_from::{self, MadeFrom, Source};
use super::memory;
use super::options::PrepareOptions;
use super::packed::{self, There};
use super::work::{self, THRESHOLDS_SCRATCH, Work};
use crate::gain;
use crate::inputs::inputs;
use crate::own_text::{OwnText, write_own_text};
use crate::pack::{PackOptions, StoredPart, WIDE_KV_NOTE, pack_unpublished};
use crate::predictors::assemble;
use crate::record::Calibration;
use crate::record::documents::{Documents, read_documents};
use crate::record::text::Sampling;
use crate::report::Made;
use crate::rounding::{ROUNDING_TOKENS, Rounded, round_for};
use crate::thresholds::{VERIFIED, default_tokens, find_thresholds};
use crate::tokenizer::packed_tokenizer;

type Result<T> = std::result::Result<T, PrepareError>;

/// Where weak neurons are left out and more than this is still needed, the long work is not begun unasked: predictors admit more yet.
const TOO_DENSE: f64 = 0.7;

/// What became of the bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was there already, as it would be made.
    UpToDate,
    /// Its predictors were replaced; all else stayed.
    Replaced,
    /// It was packed.
    Packed,
}

/// A prepared bundle.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// What became of it.
    pub outcome: Outcome,
    /// Its bytes.
    pub bytes: u64,
    /// Measured activity of every layer; empty where the bundle was up to date.
    pub layers: Vec<LayerSparsity>,
    /// How the parts of its weights are stored, and what that cost; empty where they were not packed again.
    pub parts: Vec<StoredPart>,
    /// The page that shows what was found, if one was written.
    pub report: Option<PathBuf>,
    /// The directory of intermediate files.
    pub work: PathBuf,
}

impl Prepared {
    /// Share of the neurons that are active, mean over layers.
    pub fn active(&self) -> f64 {
        gain::active(&self.layers)
    }

    /// Share of the neurons that predictors admit, mean over layers.
    pub fn admitted(&self) -> f64 {
        gain::admitted(&self.layers).unwrap_or_default()
    }
}

/// A preparation whose output and work directory are taken, before its checkpoint is opened.
pub struct Preparation<'a> {
    options: &'a PrepareOptions,
    /// The name of the bundle, until it is written.
    reserved: Destination,
    /// The name of the report.
    report: Option<(Destination, &'a Made)>,
    /// The text, where it is not the model that writes it.
    given: Option<Documents>,
    work: Work<'a>,
}

impl<'a> Preparation<'a> {
    /// Takes the output and the work directory, and reads the text; a text that cannot be used leaves nothing.
    ///
    /// # Errors
    /// Impossible options, and files that cannot be used or must not be replaced.
    pub fn begin(options: &'a PrepareOptions, observer: &'a Observer<'a>) -> Result<Self> {
        options.check()?;
        let inputs = inputs([&options.checkpoint].into_iter().chain(&options.text));
        let reserved = Destination::take(&options.output, FileKind::Bundle, &inputs)?;
        let report = match &options.report {
            Some(made) => Some((Destination::take(&options.report_path(), FileKind::Report, &inputs)?, made)),
            None => None,
        };
        let work_dir = options.work_directory();
        packed::look_and_refuse(&work_dir, &options.output, options.force)?;
        let given = match options.text.as_slice() {
            [] => None,
            text => Some(documents(text, observer)?),
        };
        let work = Work::open(&work_dir, &inputs, observer)?;
        work.refuse_inside(inputs.iter().map(|input| (input, false)).chain([(&options.output, true)]))?;
        Ok(Self { options, reserved, report, given, work })
    }

    /// Does what is left to do, and writes the bundle.
    ///
    /// # Errors
    /// Whatever any stage meets. What is done by then stays, and the same preparation resumes from there.
    pub fn run(self, mut checkpoint: Checkpoint) -> Result<Prepared> {
        let Self { options, reserved, report, given, work } = self;
        for note in checkpoint.notes() {
            (work.observer)(Event::Note(&note.to_string()));
        }
        options.check_model(checkpoint.spec())?;
        let job = Job::new(options, &work, &checkpoint)?;
        let calibration = job.calibration(given, &checkpoint)?;
        job.find_thresholds(&calibration, &mut checkpoint)?;

        let format = options.ffn.unwrap_or(checkpoint.ffn_dtype().into());
        let layout = FlashLayout::new(checkpoint.spec(), format, LayoutOptions::default())?;
        let from = MadeFrom::new(options, &job.source, &calibration, &checkpoint, &layout);
        let there = packed::look_and_refuse(&work.dir, &options.output, options.force)?;
        // What cannot be resumed is packed again, and so need not be whole.
        let whole = matches!(&there, There::Ours(made) if made.flash == from.bundle.flash)
            && packed::is_whole(&options.output, work.observer);
        if whole && there == There::Ours(from.bundle.clone()) {
            return job.prepared(Outcome::UpToDate, Vec::new(), Vec::new(), None);
        }

        let stages = Stages {
            sparsity: work.stage(StageKind::Sparsity, &from.measured)?,
            predictors: work.stage(StageKind::Predictors, &from.trained)?,
            orders: work.stage(StageKind::Orders, &from.ordered)?,
        };
        let layers = Layers {
            options,
            checkpoint: &checkpoint,
            calibration: &calibration,
            recorded: &from.recorded,
            ffn: format,
            layout: &layout,
            work: &work,
        };
        // Where the neurons lie as they should, only the predictors are replaced.
        let outcome = match whole && packed::is_alone(&options.output) {
            true => Outcome::Replaced,
            false => Outcome::Packed,
        };
        job.announce(&checkpoint, layers.left(&stages, outcome == Outcome::Replaced))?;
        let sparsity = layers.run(&stages)?;
        let parts = job.write_bundle(&checkpoint, &calibration, &stages, &from, sparsity.clone(), outcome, reserved)?;
        let written = report.map(|(destination, made)| layers.write_report(&stages, made, destination));
        let report = written.transpose().map(Option::flatten).unwrap_or_else(|error| {
            // The bundle is there, which is what was asked for.
            (work.observer)(Event::Note(&format!("no page of charts: {error}")));
            None
        });
        job.prepared(outcome, sparsity, parts, report)
    }
}

/// Reads documents, and says at once what is to be said of them: it may explain the error that follows.
fn documents(paths: &[PathBuf], observer: &Observer<'_>) -> Result<Documents> {
    let documents = read_documents(paths)?;
    documents.notes.iter().for_each(|note| observer(Event::Note(note)));
    Ok(documents)
}

/// What the stages of a preparation share.
struct Job<'a> {
    options: &'a PrepareOptions,
    work: &'a Work<'a>,
    tokenizer_file: Vec<u8>,
    tokenizer: Tokenizer,
    source: Source,
    /// What is left to do is known in full only when there are a text and thresholds: said, and refused, before the first long work.
    announced: Cell<bool>,
}

impl<'a> Job<'a> {
    fn new(options: &'a PrepareOptions, work: &'a Work<'a>, checkpoint: &Checkpoint) -> Result<Self> {
        let packed = packed_tokenizer(checkpoint)?;
        for note in &packed.notes {
            (work.observer)(Event::Note(&printable(&note.to_string())));
        }
        let tokenizer = Tokenizer::from_json(&packed.json)?;
        let source = Source::new(checkpoint, &packed.json, work)?;
        Ok(Self { options, work, tokenizer_file: packed.json, tokenizer, source, announced: Cell::new(false) })
    }

    fn tell(&self, event: Event<'_>) {
        (self.work.observer)(event);
    }

    /// Says what the preparation takes, once. An error where there is too little memory or room on the disk.
    fn announce(&self, checkpoint: &Checkpoint, left: Left) -> Result<()> {
        if self.announced.replace(true) {
            return Ok(());
        }
        let tokenizer_bytes = self.tokenizer_file.len() as u64;
        let memory = memory::least(
            checkpoint,
            left.tokens as u64,
            self.options.sequence_tokens,
            tokenizer_bytes,
            self.options.rounded_formats(),
        );
        self.tell(Event::Announced(&estimate(self.options, checkpoint, self.work, left, memory)?));
        memory::check(memory)
    }

    /// The text as tokens: what was given, or what the model writes.
    fn calibration(&self, given: Option<Documents>, checkpoint: &Checkpoint) -> Result<Calibration> {
        let Self { options, .. } = self;
        let documents = match given {
            Some(documents) => documents,
            None => documents(&[self.own_text(checkpoint)?], self.work.observer)?,
        };
        let spec = checkpoint.spec();
        let sampling = Sampling {
            tokens: options.tokens(spec),
            sequence_tokens: options.sequence_tokens,
            seed: options.seed,
            held_out: HELD_OUT,
        };
        let calibration = Calibration::new(&documents, &self.tokenizer, spec, sampling)?;
        calibration.notes.iter().for_each(|note| self.tell(Event::Note(note)));
        Ok(calibration)
    }

    /// The text that the model wrote, now or earlier.
    fn own_text(&self, checkpoint: &Checkpoint) -> Result<PathBuf> {
        let Self { options, work, .. } = self;
        let tokens = options.tokens(checkpoint.spec());
        let asked = OwnText {
            tokens,
            sequence_tokens: options.sequence_tokens,
            seed: options.seed,
            limit: Duration::from_secs(options.minutes.saturating_mul(60)),
        };
        let made_from = made_from::own_text(&self.source, options, checkpoint.spec(), &asked);
        let dir = work.stage(StageKind::OwnText, &made_from)?;
        let path = dir.join("text.txt");
        if work.is_whole(&dir) {
            return Ok(path);
        }
        self.announce(checkpoint, Left::all(checkpoint, true, tokens))?;
        let begin = Instant::now();
        let task = Running::begin(work.observer, Task::WritingText);
        task.at(0, tokens as u64);
        let threads = options.threads.unwrap_or_else(threads::default_count);
        let (text, written) =
            write_own_text(checkpoint, &self.tokenizer_file, &asked, &work.dir, threads, &mut |done, total| {
                task.at(done, total);
            })?;
        drop(task);
        work::publish(&path, text.as_bytes())?;
        work::seal_whole(&dir, std::slice::from_ref(&path))?;
        self.tell(Event::TextWritten {
            tokens: written,
            seconds: begin.elapsed().as_secs_f64(),
            stopped_after: (written < tokens).then_some(options.minutes),
            path: &path,
        });
        Ok(path)
    }

    /// Gives thresholds to a checkpoint that needs some, found now or earlier, and says what to expect before the long work begins.
    fn find_thresholds(&self, calibration: &Calibration, checkpoint: &mut Checkpoint) -> Result<()> {
        let Self { options, work, .. } = self;
        let Some(loss) = options.quality_loss(checkpoint.spec()) else { return Ok(()) };
        if let Some(dense) = gain::dense_by_nature(checkpoint.spec()) {
            self.tell(Event::Note(&dense));
        }
        let made_from = made_from::thresholds(options, &self.source, calibration, checkpoint, loss);
        let dir = work.stage(StageKind::Thresholds, &made_from)?;
        let path = dir.join("thresholds.json");
        if !work.is_whole(&dir) {
            self.announce(checkpoint, Left::all(checkpoint, false, calibration.tokens.len()))?;
            self.measure_thresholds(calibration, checkpoint, loss, &path)?;
            work::seal_whole(&dir, std::slice::from_ref(&path))?;
        }
        let measured = ThresholdFile::apply(&path, checkpoint)?.measured;
        self.tell(Event::Thresholds { measured: &measured, checkpoint });
        let active = measured.mean_active();
        if active > TOO_DENSE && options.quality_loss.is_none() && !options.anyway {
            let (checkpoint, output) = (options.checkpoint.clone(), options.output.clone());
            return Err(PrepareError::TooDense { checkpoint, output, active });
        }
        Ok(())
    }

    fn measure_thresholds(
        &self,
        calibration: &Calibration,
        checkpoint: &Checkpoint,
        loss: f64,
        path: &Path,
    ) -> Result<()> {
        let sample = calibration.sample(default_tokens(checkpoint.spec()), VERIFIED);
        let scratch = self.work.path(THRESHOLDS_SCRATCH);
        let threads = crate::threads::start(self.options.threads)?;
        let task = Running::begin(self.work.observer, Task::MeasuringThresholds);
        let progress = &mut |done, total| task.at(done, total);
        let measured = find_thresholds(checkpoint, &sample, loss, &threads, &scratch, progress);
        drop(task);
        self.work.clear(THRESHOLDS_SCRATCH)?;
        work::publish(path, &ThresholdFile::new(checkpoint, measured?).to_json())
    }

    /// The weights that are quantised, rounded for the inputs that the text gives them.
    fn rounded(&self, checkpoint: &Checkpoint, calibration: &Calibration) -> Result<Option<Arc<Rounded>>> {
        let Self { options, work, .. } = self;
        let formats = options.rounded_formats();
        if formats.is_plain() {
            return Ok(None);
        }
        let sample = calibration.sample(ROUNDING_TOKENS, 0.0);
        let threads = crate::threads::start(options.threads)?;
        let task = Running::begin(work.observer, Task::Rounding);
        let progress = &mut |done, total| task.at(done, total);
        Ok(Some(Arc::new(round_for(checkpoint, &sample, formats, &threads, &work.dir, progress)?)))
    }

    /// Writes the bundle, or its predictors alone, and remembers that it is ours before it has its name.
    #[expect(clippy::too_many_arguments, reason = "all that a bundle is made of")]
    fn write_bundle(
        &self,
        checkpoint: &Checkpoint,
        calibration: &Calibration,
        stages: &Stages,
        from: &MadeFrom,
        sparsity: Vec<LayerSparsity>,
        outcome: Outcome,
        reserved: Destination,
    ) -> Result<Vec<StoredPart>> {
        let Self { options, work, .. } = self;
        let spec = checkpoint.spec();
        let orders = StoredOrders::read(&stages.orders, spec)?;
        let predictors = assemble(&stages.predictors, spec, &orders.layers)?;
        // It was long ago that it was looked at.
        packed::look_and_refuse(&work.dir, &options.output, options.force)?;
        let (identity, parts) = if outcome == Outcome::Replaced {
            let mut manifest = Bundle::open(&options.output)?.manifest().clone();
            manifest.predictors = Some(predictors.0);
            manifest.sparsity = Some(sparsity);
            manifest.chat = checkpoint.chat()?;
            manifest.sampling = checkpoint.sampling()?;
            let replacement = Replacement::begin(&options.output, Some(&predictors.1), &manifest)?;
            let identity = replacement.identity();
            work.record_bundle(identity, &from.bundle)?;
            replacement.write()?;
            (identity, Vec::new())
        } else {
            let contents = PackOptions {
                tokenizer: self.tokenizer_file.clone(),
                orders: Some((orders.name, orders.layers)),
                predictors: Some(predictors),
                sparsity: Some(sparsity),
                ffn: options.ffn,
                resident: options.resident_formats(),
                rounded: self.rounded(checkpoint, calibration)?,
                overwrite: true,
                ..PackOptions::default()
            };
            let task = Running::begin(work.observer, Task::Packing);
            drop(reserved);
            let progress = &mut |done, total| task.at(done, total);
            let (bundle, parts) = pack_unpublished(checkpoint, &options.output, contents, progress)?;
            drop(task);
            if bundle.manifest().wide_kv {
                self.tell(Event::Note(WIDE_KV_NOTE));
            }
            let identity = bundle.identity();
            work.record_bundle(identity, &from.bundle)?;
            bundle.publish()?;
            (identity, parts)
        };
        work.keep_record(identity, &from.bundle);
        if !options.keep_recordings {
            work.clear(StageKind::Recording.directory())?;
        }
        Ok(parts)
    }

    fn prepared(
        &self,
        outcome: Outcome,
        layers: Vec<LayerSparsity>,
        parts: Vec<StoredPart>,
        report: Option<PathBuf>,
    ) -> Result<Prepared> {
        let output = &self.options.output;
        let bytes = output.metadata().map_err(io_error("cannot look at", output))?.len();
        Ok(Prepared { outcome, bytes, layers, parts, report, work: self.work.dir.clone() })
    }
}
