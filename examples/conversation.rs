//! Turn by turn: every line is answered, or goes on with everything said before where the bundle has no chat template.
//!
//! `cargo run --release --example conversation -- model.flashlm`

use std::io::{BufRead, Write, stdin, stdout};
use std::ops::ControlFlow;

use anyhow::Result;
use flashlm::{Conversation, Error, Model, Progress};

fn main() -> Result<()> {
    let Some(bundle) = std::env::args().nth(1) else {
        eprintln!("usage: conversation BUNDLE");
        std::process::exit(2);
    };
    let model = Model::open(bundle)?.context(512).load()?;
    let session = model.session()?.sampling(model.recommended_sampling()).max_tokens(32);
    let mut conversation = Conversation::new(session, model.chat_template(false)?);
    for line in stdin().lock().lines().map_while(std::result::Result::ok) {
        let answered = conversation.ask(&line, &mut |progress| {
            match progress {
                Progress::Token(token) => print!("{}", token.text),
                Progress::Dropped(turns) => eprintln!("the context is full: {turns} turns are forgotten"),
                Progress::Shortened(tokens) => eprintln!("the context is full: {tokens} tokens are forgotten"),
                Progress::Summarising(_) | Progress::Summary => {}
            }
            _ = stdout().flush();
            ControlFlow::Continue(())
        });
        match answered {
            Ok(_) => println!(),
            // Nothing was said.
            Err(Error::EmptyPrompt) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
