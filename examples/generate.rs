//! Text from a model, at once.
//!
//! `cargo run --release --example generate -- model.flashlm "Once upon a time" 50%`

use anyhow::Result;
use flashlm::Model;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(bundle), Some(prompt)) = (args.next(), args.next()) else {
        eprintln!("usage: generate BUNDLE PROMPT [MEMORY]");
        std::process::exit(2);
    };
    // For the whole process: 50% of the model's size, 4GiB. Without it, what the machine has to give.
    let mut options = Model::open(bundle)?;
    if let Some(memory) = args.next() {
        options = options.memory(&memory)?;
    }
    let model = options.load()?;
    let mut session = model.session()?.max_tokens(64);
    let text: String = session.generate(&prompt)?.map(|token| Ok(token?.text)).collect::<Result<_>>()?;
    println!("{prompt}{text}");
    Ok(())
}
