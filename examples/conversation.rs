//! Turn by turn: every line continues everything said before.
//!
//! `cargo run --release --example conversation -- model.flashlm`

use std::io::{BufRead, Write, stdin, stdout};

use anyhow::Result;
use flashlm::{Error, Model};

fn main() -> Result<()> {
    let Some(bundle) = std::env::args().nth(1) else {
        eprintln!("usage: conversation BUNDLE");
        std::process::exit(2);
    };
    let model = Model::open(bundle)?.context(512).load()?;
    let mut session = model.session()?.max_tokens(32);
    for line in stdin().lock().lines().map_while(std::result::Result::ok) {
        match session.generate(&line) {
            Ok(generation) => {
                for token in generation {
                    print!("{}", token?.text);
                    _ = stdout().flush();
                }
                println!();
            }
            // Nothing was said.
            Err(Error::EmptyPrompt) => {}
            Err(Error::ContextFull { .. }) => {
                eprintln!("the context is full: beginning again");
                session.clear();
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
