//! `flashlm-prep evaluate`: what a bundle's predictors cost in quality.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use flashlm::KvDtype;
use flashlm::text::Tokenizer;
use flashlm_formats::bundle::Bundle;
use flashlm_prep::evaluate::{Computed, Evaluation, PredictorChoice, Windows, evaluate};
use flashlm_prep::record::documents::pieces;
use flashlm_prep::record::text::between_texts;

use super::{Stage, numbers, source};

/// Arguments of `flashlm-prep evaluate`.
#[derive(Args)]
#[command(
    after_help = "Example:\n  flashlm-prep evaluate model.flashlm --against /models/opt-1.3b --text held-out.txt\n\n\
    The text should be one that the predictors were not trained on. The predictor decides at every position."
)]
pub(crate) struct EvaluateArgs {
    /// The bundle
    #[arg(value_name = "BUNDLE")]
    bundle: PathBuf,
    /// The checkpoint that it was made from: a directory, or org/name[@revision] on the Hub
    #[arg(long, value_name = "CHECKPOINT")]
    against: PathBuf,
    /// Text to score: files (.txt with documents between lines <|endoftext|>, .jsonl) or directories of them
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Score at most this many tokens
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = numbers::sequence)]
    tokens: usize,
    /// Ids that go through the model together
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = numbers::sequence)]
    window: usize,
    /// Cut windows out of all documents joined into one stream, as perplexities are often published; otherwise no window reaches
    /// from one document into the next, as in what `record` and `prepare` report
    #[arg(long)]
    join_documents: bool,
    /// Which neurons the bundle computes
    #[arg(long, value_enum, default_value = "bundle")]
    predictor: PredictorArg,
    /// How the bundle's keys and values are stored: f16, f32 or int8; those of the checkpoint are exact
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    kv: KvDtype,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm::command_line::thread_count)]
    threads: Option<NonZeroUsize>,
    /// Directory for scratch files [default: the system's]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum PredictorArg {
    /// What its predictors choose
    Bundle,
    /// All of them: the quality without predictors
    All,
    /// Those above their layer's threshold, as if predictors never erred
    Active,
}

/// Longest piece of text that is tokenized at once.
const PIECE_BYTES: usize = 64 << 10;

pub(crate) fn run(args: &EvaluateArgs) -> Result<ExitCode> {
    let bundle = Bundle::open(&args.bundle)?;
    let checkpoint = source::open(&args.against)?;
    let tokenizer = Tokenizer::of(&bundle)?;
    let spec = bundle.spec();
    let documents = super::documents(&args.text)?;
    let begin = between_texts(&tokenizer, spec);
    let (mut texts, mut count) = (Vec::new(), 0);
    for document in &documents.texts {
        let mut ids = if args.join_documents { begin.clone() } else { Vec::new() };
        // Not more is tokenized than is asked for.
        for piece in pieces(document, PIECE_BYTES) {
            if count + ids.len() < args.tokens {
                ids.extend(tokenizer.encode_bare(piece)?);
            }
        }
        ids.truncate(args.tokens - count);
        count += ids.len();
        texts.push(ids);
        if count == args.tokens {
            break;
        }
    }
    let window = args.window.min(spec.max_positions).max(2);
    let first = tokenizer.first_ids();
    let windows = match args.join_documents {
        true => Windows::new([&texts.concat()[..]], window, [first; 2]),
        false => Windows::new(texts.iter().map(Vec::as_slice), window, [&begin, first]),
    };
    let neurons = match args.predictor {
        PredictorArg::Bundle => PredictorChoice::Bundle,
        PredictorArg::All => PredictorChoice::All,
        PredictorArg::Active => PredictorChoice::Active,
    };
    let computed = Computed { neurons, kv: args.kv };
    let scratch = args.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let stage = Stage::new("evaluating", "layers", spec.layers.len() as u64);
    let threads = super::threads(args.threads)?;
    let progress = &mut |done, total| stage.set(done as u64, total as u64);
    let evaluation = evaluate(&bundle, &checkpoint, &windows, computed, &threads, &scratch, progress, &mut |_, _| ())?;
    drop(stage);
    if args.json {
        super::print_json(&evaluation)?;
    } else {
        print(&evaluation, &windows, args.join_documents);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(evaluation: &Evaluation, windows: &Windows, joined: bool) {
    let Evaluation { perplexity, top1_agreement, kl_mean, positions, predictor_bytes, ffn_bytes, layers } = evaluation;
    let percent = |share: f64| 100.0 * share;
    // Where everything is computed nothing was predicted, so there are no false alarms.
    let alarms = |rate: Option<f64>| rate.map_or("-".to_owned(), |rate| format!("{:.2}%", percent(rate)));
    let cut = if joined { "of the documents joined to one stream" } else { "none with tokens of two documents" };
    println!("{positions} positions in {}, {cut}", super::counted(windows.offsets.len() - 1, "window"));
    println!(
        "  perplexity        {:.4} dense, {:.4} bundle ({:+.2} %)",
        perplexity.dense,
        perplexity.bundle,
        percent(perplexity.bundle / perplexity.dense - 1.0)
    );
    println!("  top-1 agreement   {:.2} %", percent(*top1_agreement));
    println!("  KL divergence     {kl_mean:.5} nats");
    println!(
        "  predictors        {predictor_bytes} bytes, {:.2} % of the FFN",
        percent(*predictor_bytes as f64 / *ffn_bytes as f64)
    );
    println!("\n  layer   active  predicted  false neg.  false pos.  energy kept");
    for (layer, l) in layers.iter().enumerate() {
        println!(
            "  {layer:>5} {:>7.2}% {:>9.2}% {:>10.2}% {:>11} {:>11.2}%",
            percent(l.active_fraction),
            percent(l.predicted_fraction),
            percent(l.false_negative_rate),
            alarms(l.false_positive_rate),
            percent(l.energy_recall)
        );
    }
    println!(
        "   mean {:>7.2}% {:>9.2}% {:>10.2}% {:>11} {:>11.2}%",
        percent(evaluation.mean(|l| l.active_fraction)),
        percent(evaluation.mean(|l| l.predicted_fraction)),
        percent(evaluation.mean(|l| l.false_negative_rate)),
        alarms(evaluation.mean_of_some(|l| l.false_positive_rate)),
        percent(evaluation.mean(|l| l.energy_recall))
    );
}
