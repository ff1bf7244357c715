//! Text as it comes, drawn at random, with what it cost.
//!
//! `cargo run --release --example stream -- model.flashlm "Once upon a time"`

use std::io::Write;

use anyhow::Result;
use flashlm::{Model, Percentiles, Sampling};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(bundle), Some(prompt)) = (args.next(), args.next()) else {
        eprintln!("usage: stream BUNDLE PROMPT");
        std::process::exit(2);
    };
    let model = Model::open(bundle)?.load()?;
    for notice in model.notices().iter().filter(|notice| notice.important) {
        eprintln!("{}", notice.text);
    }
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, seed: 1, ..Sampling::default() };
    let mut session = model.session()?.sampling(sampling).max_tokens(64).stop("\n\n");
    let mut generation = session.generate(&prompt)?;
    print!("{prompt}");
    for token in &mut generation {
        print!("{}", token?.text);
        // A stream that cannot be flushed has lost its reader.
        if std::io::stdout().flush().is_err() {
            break;
        }
    }
    println!();
    let report = generation.report();
    let ms = Percentiles::of(&report.decode);
    eprintln!("{} tokens at {:.2} ms (median), ended by {:?}", report.tokens, ms.median, report.finish);
    Ok(())
}
