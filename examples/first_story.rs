//! A first story: prepares the example model, lets it tell a story in less memory than the model and its caches would take, and says
//! what that took. The second time the model is prepared already.
//!
//! `cargo run --release --example first_story`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use flashlm::budget::human_bytes;
use flashlm::options::FfnChoice;
use flashlm::{Model, Percentiles, Report, Sampling, Speculate, memory};
use flashlm_prep::{Event, PrepareOptions, prepare};

const PROMPT: &str = "Once upon a time";
/// For the whole process, keys and values and scratch included.
const MEMORY: &str = "24 MB";
/// Tokens after which the story may end with a sentence, and tokens that it has at most.
const TOKENS: (usize, usize) = (80, 220);
/// Tokens that are enough to see how long reading everything takes.
const BASELINE_TOKENS: usize = 8;

fn main() -> Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the examples lie in the project")?;
    let bundle = root.join("target/tiny-opt.flashlm");
    // A process of its own tells the story, so that its memory is that of a run.
    if std::env::args().nth(1).as_deref() == Some("tell") {
        tell(&bundle)?;
        return Ok(ExitCode::SUCCESS);
    }
    prepare_example(root, &bundle)?;
    let told = Command::new(std::env::current_exe()?).arg("tell").status().context("cannot run the second half")?;
    Ok(told.code().map_or(ExitCode::FAILURE, |code| ExitCode::from(code as u8)))
}

fn prepare_example(root: &Path, bundle: &PathBuf) -> Result<()> {
    if bundle.exists() {
        eprintln!("{} is there already", bundle.display());
    } else {
        eprintln!("Preparing examples/tiny-opt, a model of 15 MB that tells stories; about a minute:");
    }
    let mut options = PrepareOptions::new(root.join("examples/tiny-opt"), bundle);
    options.text.push(root.join("examples/synthetic.txt"));
    prepare(&options, &|event| match event {
        Event::Layer { .. } | Event::Note(_) => eprintln!("  {event}"),
        _ => {}
    })?;
    Ok(())
}

fn tell(bundle: &Path) -> Result<()> {
    let model = Model::open(bundle)?.memory(MEMORY)?.context(PROMPT.len() + TOKENS.1).load()?;
    eprintln!("\nIn {MEMORY} of memory:\n");
    let sampling = Sampling { temperature: 0.5, top_p: 0.9, seed: 10, ..Sampling::default() };
    let mut session = model.session()?.sampling(sampling).speculate(Speculate::Off).max_tokens(TOKENS.1);
    let mut generation = session.generate(PROMPT)?;
    print!("{PROMPT}");
    let mut tokens = 0;
    while let Some(token) = generation.next() {
        let token = token?;
        print!("{}", token.text);
        // A stream that cannot be flushed has lost its reader.
        if std::io::stdout().flush().is_err() {
            break;
        }
        tokens += 1;
        if tokens >= TOKENS.0 && token.text.trim_end().ends_with(['.', '!', '?', '"']) {
            generation.stop();
        }
    }
    println!("\n");
    let report = generation.report().clone();
    let neurons = model.bundle().flash().bytes;
    let peak = memory::peak();
    drop(session);
    drop(model);
    // The pages of its file that the system has in memory it can drop at any time.
    say_what_it_took(bundle, &report, neurons, peak.bytes - peak.program_bytes)
}

fn say_what_it_took(bundle: &Path, report: &Report, neurons: u64, peak: u64) -> Result<()> {
    let (ms, baseline) = (Percentiles::of(&report.decode).median, reading_everything(bundle)?);
    let read = report.decode_reads.per_token(report.decode.len()).bytes_read_per_token;
    eprintln!("The model has 15 MB, and the process took {}, keys, values and scratch included.", human_bytes(peak));
    eprintln!(
        "A token read {} of {} of neurons from flash, and took {ms:.1} ms.",
        human_bytes(read as u64),
        human_bytes(neurons)
    );
    eprintln!("Reading all weights for every token takes {:.1} times as long, here and now.", baseline / ms);
    eprintln!("\nNext: target/tiny-opt.flashlm is a bundle like any other; cargo build --release makes the programs");
    eprintln!("that run it, and docs/reproduce.md shows a model of 13 GB at work without a download.");
    Ok(())
}

/// Milliseconds of a token where all weights are read for each.
fn reading_everything(bundle: &Path) -> Result<f64> {
    let mut options = Model::open(bundle)?.context(PROMPT.len() + BASELINE_TOKENS);
    options.options_mut().ffn = Some(FfnChoice::Naive);
    let model = options.load()?;
    let mut session = model.session()?.max_tokens(BASELINE_TOKENS).ignore_eos();
    let mut generation = session.generate(PROMPT)?;
    for token in &mut generation {
        token?;
    }
    Ok(Percentiles::of(&generation.report().decode).median)
}
