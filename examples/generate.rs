//! Text from a model, at once.
//!
//! `cargo run --release --example generate -- model.flashlm "Once upon a time"`

use flashlm_runtime::{Model, Result};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(bundle), Some(prompt)) = (args.next(), args.next()) else {
        eprintln!("usage: generate BUNDLE PROMPT");
        std::process::exit(2);
    };
    // Half of the model's size, for the whole process.
    let model = Model::open(bundle)?.memory("50%")?.load()?;
    let mut session = model.session()?.max_tokens(64);
    let text = session.generate(&prompt)?.map(|token| Ok(token?.text)).collect::<Result<String>>()?;
    println!("{prompt}{text}");
    Ok(())
}
