//! From a checkpoint's directory to a bundle, with progress; after an interruption it resumes where it was.
//!
//! `cargo run --release --example prepare -- CHECKPOINT_DIR model.flashlm calibration.txt`

use flashlm_prep::{Event, Outcome, PrepareError, PrepareOptions, prepare};

fn main() -> Result<(), PrepareError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [checkpoint, output, texts @ ..] = &args[..] else {
        eprintln!("usage: prepare CHECKPOINT_DIR OUTPUT [TEXT..]");
        std::process::exit(2);
    };
    let mut options = PrepareOptions::new(checkpoint, output);
    // Without a text the model writes its own. More tokens make better predictors; these are enough to see it work.
    options.text = texts.iter().map(Into::into).collect();
    options.tokens = Some(2000);
    let prepared = prepare(&options, &|event| match event {
        Event::Progress { done, total } => eprint!("\r{:3} %", 100 * done / total.max(1)),
        Event::Ended => eprintln!(),
        event => eprintln!("{event}"),
    })?;
    match prepared.outcome {
        Outcome::UpToDate => println!("{output} was there already"),
        _ => println!("{output}: {} bytes, {:.1} % of the neurons active", prepared.bytes, 100.0 * prepared.active()),
    }
    Ok(())
}
