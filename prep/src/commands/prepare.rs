//! `flashlm-prep prepare`: everything from a checkpoint to a bundle, in one command.
//!
//! Each stage leaves its files in a directory of its own in the work directory, with a stamp that says what they were made from.
//! What is there and as it was written is not done again; what is not is made anew. Nothing depends on when or how often it was interrupted.

mod estimate;
mod layers;
mod made_from;
mod memory;
mod packed;
mod source_hash;
mod stamp;
mod work;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use flashlm_formats::bundle::{Bundle, FlashLayout, LayoutOptions, Replacement};
use flashlm_formats::checkpoint::Checkpoint;
use flashlm_formats::destination::{Destination, FileKind};
use flashlm_formats::model::{DType, ModelSpec};
use flashlm_formats::recording::HELD_OUT;
use flashlm_formats::weight_format::WeightFormat;
use flashlm_prep::gain::{self, verdict};
use flashlm_prep::ordering::{StoredOrders, usual_cache_share};
use flashlm_prep::own_text::{OwnText, write_own_text};
use flashlm_prep::pack::{PackOptions, pack_unpublished};
use flashlm_prep::predictors::assemble;
use flashlm_prep::record::Calibration;
use flashlm_prep::record::text::Sampling;
use flashlm_prep::thresholds::{DEFAULT_LOSS, ThresholdFile, VERIFIED, default_tokens};
use flashlm_prep::train::TRIAL_TOKENS;
use flashlm_runtime::budget::human_bytes;
use flashlm_runtime::text::Tokenizer;

use super::formats::FormatArgs;
use super::source::{self, CHECKPOINT_HELP};
use super::thresholds;
use super::{Stage, inputs, numbers, publish, say_notes};
use estimate::Left;
use layers::{Layers, Stages};
use made_from::{MadeFrom, Source};
use packed::There;
use work::Work;

/// Arguments of `flashlm-prep prepare`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    flashlm-prep prepare /models/opt-1.3b --text calibration.txt -o opt-1.3b.flashlm\n  \
    flashlm-prep prepare /models/opt-1.3b -o opt-1.3b.flashlm          (the model writes its own calibration text)\n  \
    flashlm-prep prepare facebook/opt-1.3b@main -o opt-1.3b.flashlm    (fetched from the Hugging Face hub)\n\n\
    Interrupted, the same command goes on from there. HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.\n\
     Text of the kind that the model will be used for makes the best predictors.")]
pub(crate) struct PrepareArgs {
    #[arg(value_name = "CHECKPOINT", help = CHECKPOINT_HELP)]
    checkpoint: PathBuf,
    /// The bundle to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Calibration text: files or directories of .txt (documents between lines <|endoftext|>) or .jsonl (field "text") [default: the
    /// model writes its own]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens to calibrate on [default: 40000, for hidden sizes from 2048 on 20000]
    #[arg(long, value_name = "N", value_parser = numbers::tokens)]
    tokens: Option<usize>,
    /// Longest sequence
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = numbers::sequence)]
    sequence_tokens: usize,
    /// Largest size of all predictors, as a share of the FFN's bytes [default: 9%, for hidden sizes from 2048 on 3%]
    #[arg(long, value_name = "PERCENT", value_parser = numbers::percent)]
    size_budget: Option<f64>,
    /// Share of the active neurons that predictors must find
    #[arg(long, value_name = "SHARE", default_value_t = 0.968, value_parser = numbers::share)]
    recall: f64,
    /// Perplexity that may be lost by leaving out weak neurons [default: 1% where no neuron is ever exactly zero (gelu, silu), none
    /// where most are]
    #[arg(long, value_name = "PERCENT", value_parser = numbers::percent)]
    quality_loss: Option<f64>,
    /// Go on where nothing is gained: where most neurons are needed, or the predictors tried admit more than 80 % of them
    #[arg(long)]
    anyway: bool,
    /// Also train predictors of the next layer's neurons, of this rank
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    look_ahead: Option<usize>,
    /// Minutes that the model may write for, when it writes its own text
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = numbers::minutes)]
    minutes: u64,
    #[command(flatten)]
    formats: FormatArgs,
    /// Replace a bundle that is there and was not packed from this work directory
    #[arg(long)]
    force: bool,
    /// Directory for intermediate files [default: the output's name with .work]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Keep the recorded activations, in the work directory's `recording`, which analyze and report read
    #[arg(long)]
    keep_recordings: bool,
    /// Decides the sampling of documents, the training order, and the model's own text
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm_runtime::command_line::thread_count)]
    threads: Option<NonZeroUsize>,
}

/// Where weak neurons are left out and more than this is still needed, the long work is not begun unasked: predictors admit more yet.
const TOO_DENSE: f64 = 0.7;

/// From this hidden size on a model counts as large.
const LARGE: usize = 2048;

impl PrepareArgs {
    fn work_directory(&self) -> PathBuf {
        self.work.clone().unwrap_or_else(|| {
            let mut name = self.output.clone().into_os_string();
            name.push(".work");
            name.into()
        })
    }

    /// Tokens to calibrate on. In a large model a token costs more, and shows more neurons.
    fn tokens(&self, spec: &ModelSpec) -> usize {
        let default = if spec.hidden_size >= LARGE { 20_000 } else { 40_000 };
        self.tokens.unwrap_or(default)
    }

    /// Perplexity that thresholds may cost; none where neurons are exactly zero by themselves.
    fn quality_loss(&self, spec: &ModelSpec) -> Option<f64> {
        self.quality_loss.or((!spec.ffn.activation.is_sparse()).then_some(DEFAULT_LOSS))
    }

    /// The share of its neurons that a layer is likely to have in memory: orders are made for what is not.
    fn cache_share(&self, spec: &ModelSpec, ffn: WeightFormat) -> f64 {
        let resident = self.formats.resident_dtype.unwrap_or(WeightFormat::Plain(DType::F16));
        usual_cache_share(spec, ffn, resident, self.size_budget(spec))
    }

    /// Largest size of the predictors. In a large model 9 % would be hundreds of megabytes, which do more as cached neurons.
    fn size_budget(&self, spec: &ModelSpec) -> f64 {
        self.size_budget.unwrap_or(if spec.hidden_size >= LARGE { 0.03 } else { 0.09 })
    }
}

/// Tokens of the pilot that ranks are chosen on, of so many in all.
fn pilot_tokens(tokens: usize) -> usize {
    // A tenth is held out, the others may all be trained on.
    (tokens / 4).clamp(TRIAL_TOKENS / 2, TRIAL_TOKENS + TRIAL_TOKENS / 8)
}

pub(crate) fn run(args: &PrepareArgs) -> Result<ExitCode> {
    let begin = Instant::now();
    let inputs = inputs([&args.checkpoint].into_iter().chain(&args.text));
    let reserved = Destination::take(&args.output, FileKind::Bundle, &inputs)?;
    let work_dir = args.work_directory();
    packed::refuse_other(&packed::look(&work_dir, &args.output)?, &work_dir, &args.output, args.force)?;
    // Before there is a work directory: a text that cannot be used leaves nothing.
    let given = if args.text.is_empty() { None } else { Some(super::documents(&args.text)?) };
    let work = Work::open(&work_dir, &inputs)?;
    work.refuse_inside(inputs.iter().map(|input| (input, false)).chain([(&args.output, true)]))?;
    let mut checkpoint = source::open(&args.checkpoint)?;
    for note in checkpoint.notes() {
        eprintln!("note: {note}");
    }
    let spec = checkpoint.spec().clone();
    let tokens = args.tokens(&spec);
    let most = spec.hidden_size.min(spec.ffn.size);
    ensure!(
        args.look_ahead.is_none_or(|rank| rank <= most),
        "--look-ahead {}: predictors of this model have a rank of {most} at most",
        args.look_ahead.unwrap_or_default()
    );
    let tokenizer_file = super::tokenizer(&checkpoint)?;
    let tokenizer = Tokenizer::from_json(&tokenizer_file)?;
    let source = Source::new(&checkpoint, &tokenizer_file, &work)?;
    // What is left to do is known in full only when there are a text and thresholds: said, and refused, before the first long work.
    let mut announced = false;
    let tokenizer_bytes = tokenizer_file.len() as u64;
    let mut announce = |checkpoint: &Checkpoint, left: Left| -> Result<()> {
        if !std::mem::replace(&mut announced, true) {
            let memory = memory::least(checkpoint, left.tokens as u64, args.sequence_tokens, tokenizer_bytes);
            estimate::announce(args, checkpoint, &work, left, memory)?;
            memory::check(memory)?;
        }
        Ok(())
    };
    let documents = match given {
        Some(documents) => documents,
        None => {
            super::documents(&[own_text(args, tokens, &checkpoint, &tokenizer_file, &source, &work, &mut announce)?])?
        }
    };
    let sampling = Sampling { tokens, sequence_tokens: args.sequence_tokens, seed: args.seed, held_out: HELD_OUT };
    let calibration = Calibration::new(&documents, &tokenizer, &spec, sampling)?;

    say_notes(&calibration.notes);
    find_thresholds(args, &mut checkpoint, &calibration, &source, &work, &mut announce)?;

    let format = args.formats.dtype.unwrap_or(checkpoint.ffn_dtype().into());
    let layout = FlashLayout::new(&spec, format, LayoutOptions::default())?;
    let from = MadeFrom::new(args, &source, &calibration, &checkpoint, &layout);
    let there = packed::look(&work.dir, &args.output)?;
    packed::refuse_other(&there, &work.dir, &args.output, args.force)?;
    // What cannot be gone on with is packed again, and so need not be whole.
    let whole =
        matches!(&there, There::Ours(made) if made.flash == from.bundle.flash) && packed::is_whole(&args.output);
    if whole && there == There::Ours(from.bundle.clone()) {
        eprintln!("{} is up to date", args.output.display());
        return Ok(ExitCode::SUCCESS);
    }

    let stages = Stages {
        sparsity: work.stage("sparsity", &from.measured)?,
        predictors: work.stage("predictors", &from.trained)?,
        orders: work.stage("orders", &from.ordered)?,
    };
    let layers = Layers {
        args,
        checkpoint: &checkpoint,
        calibration: &calibration,
        recorded: &from.recorded,
        ffn: format,
        layout: &layout,
        work: &work,
    };
    let replaced = whole && packed::is_alone(&args.output);
    announce(&checkpoint, layers.left(&stages, replaced))?;
    let sparsity = layers.run(&stages)?;
    let admitted = gain::admitted(&sparsity).unwrap_or_default();

    let orders = StoredOrders::read(&stages.orders, &spec)?;
    let predictors = assemble(&stages.predictors, &spec, &orders.layers)?;
    let active = sparsity.iter().map(|layer| f64::from(layer.active)).sum::<f64>() / sparsity.len().max(1) as f64;
    // It was long ago that it was looked at.
    packed::refuse_other(&packed::look(&work.dir, &args.output)?, &work.dir, &args.output, args.force)?;
    let identity = if replaced {
        // The neurons lie as they should: only the predictors are replaced.
        let mut manifest = Bundle::open(&args.output)?.manifest().clone();
        manifest.predictors = Some(predictors.0);
        manifest.sparsity = Some(sparsity);
        let replacement = Replacement::begin(&args.output, Some(&predictors.1), &manifest)?;
        let identity = replacement.identity();
        work.record_bundle(identity, &from.bundle)?;
        replacement.write()?;
        identity
    } else {
        let options = PackOptions {
            tokenizer: tokenizer_file,
            orders: Some((orders.name, orders.layers)),
            predictors: Some(predictors),
            sparsity: Some(sparsity),
            ffn: args.formats.dtype,
            resident: args.formats.resident_dtype,
            overwrite: true,
            ..PackOptions::default()
        };
        let stage = Stage::bytes("packing");
        drop(reserved);
        let bundle = pack_unpublished(&checkpoint, &args.output, options, &mut |done, total| stage.set(done, total))?;
        super::note_wide_kv(bundle.manifest());
        let identity = bundle.identity();
        work.record_bundle(identity, &from.bundle)?;
        bundle.publish()?;
        identity
    };
    work.keep_record(identity, &from.bundle);
    if !args.keep_recordings {
        work.clear("recording")?;
    }
    let bytes = std::fs::metadata(&args.output)?.len();
    if admitted <= gain::POINTLESS {
        eprintln!("{}", verdict(active));
    }
    eprintln!(
        "wrote {} ({}) in {:.0} s; intermediate files are in {}",
        args.output.display(),
        human_bytes(bytes),
        begin.elapsed().as_secs_f64(),
        work.dir.display()
    );
    if admitted > gain::POINTLESS {
        let pointless = gain::pointless(admitted, &args.checkpoint, &args.output);
        eprintln!("note: {:.1} % of the neurons are active on average, but {pointless}", 100.0 * active);
    }
    Ok(ExitCode::SUCCESS)
}

/// Gives thresholds to a checkpoint that needs some, found now or earlier, and says what to expect before the long work begins.
fn find_thresholds(
    args: &PrepareArgs,
    checkpoint: &mut Checkpoint,
    calibration: &Calibration,
    source: &Source,
    work: &Work,
    announce: &mut dyn FnMut(&Checkpoint, Left) -> Result<()>,
) -> Result<()> {
    let Some(loss) = args.quality_loss(checkpoint.spec()) else { return Ok(()) };
    if let Some(dense) = gain::dense_by_nature(checkpoint.spec()) {
        eprintln!("note: {dense}");
    }
    let dir = work.stage("thresholds", &made_from::thresholds(args, source, calibration, checkpoint, loss))?;
    let path = dir.join("thresholds.json");
    if !work::is_whole(&dir) {
        announce(checkpoint, Left::all(checkpoint, false, calibration.tokens.len()))?;
        let calibration = calibration.sample(default_tokens(checkpoint.spec()), VERIFIED);
        let scratch = work.path("thresholds.scratch");
        let measured = thresholds::measure(checkpoint, &calibration, loss, args.threads, &scratch);
        work.clear("thresholds.scratch")?;
        publish(&path, &ThresholdFile::new(checkpoint, measured?).to_json())?;
        work::seal_whole(&dir, std::slice::from_ref(&path))?;
    }
    let measured = ThresholdFile::apply(&path, checkpoint)?.measured;
    for line in thresholds::table(&measured, checkpoint) {
        eprintln!("{line}");
    }
    let mean = measured.mean_active();
    eprintln!("{}", verdict(mean));
    ensure!(
        mean <= TOO_DENSE || args.quality_loss.is_some() || args.anyway,
        "preparing this model gains next to nothing, so nothing was done: take a ReLU (relufied) version of it, say what may be \
         lost (--quality-loss 5%), run it without predictors (flashlm-prep convert {} -o {}), or go on all the same (--anyway)",
        args.checkpoint.display(),
        args.output.display()
    );
    Ok(())
}

/// The text that the model wrote, now or earlier.
fn own_text(
    args: &PrepareArgs,
    tokens: usize,
    checkpoint: &Checkpoint,
    tokenizer_file: &[u8],
    source: &Source,
    work: &Work,
    announce: &mut dyn FnMut(&Checkpoint, Left) -> Result<()>,
) -> Result<PathBuf> {
    let limit = Duration::from_secs(60 * args.minutes);
    let asked = OwnText { tokens, sequence_tokens: args.sequence_tokens, seed: args.seed, limit };
    let dir = work.stage("own-text", &made_from::own_text(source, &asked))?;
    let path = dir.join("text.txt");
    if !work::is_whole(&dir) {
        announce(checkpoint, Left::all(checkpoint, true, tokens))?;
        let begin = Instant::now();
        let stage = Stage::new("the model writes calibration text", "tokens", tokens as u64);
        let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
        let (text, written) =
            write_own_text(checkpoint, tokenizer_file, &asked, &work.dir, threads, &mut |done, total| {
                stage.set(done, total);
            })?;
        drop(stage);
        publish(&path, text.as_bytes())?;
        work::seal_whole(&dir, std::slice::from_ref(&path))?;
        eprintln!(
            "the model wrote {written} tokens in {:.0} s{}: {}",
            begin.elapsed().as_secs_f64(),
            if written < tokens {
                format!(" (stopped after {} minutes; --minutes allows more, --text is better)", args.minutes)
            } else {
                String::new()
            },
            path.display()
        );
    }
    Ok(path)
}
