//! What a model expects after each token of a text: its likeliest next token, and how likely the actual one was.
//!
//! `cargo run --release --example logits -- model.flashlm "Once upon a time there was"`

use anyhow::Result;
use flashlm::Model;
use flashlm::sampler::greedy;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(bundle), Some(text)) = (args.next(), args.next()) else {
        eprintln!("usage: logits BUNDLE TEXT");
        std::process::exit(2);
    };
    let model = Model::open(bundle)?.load()?;
    let ids = model.tokenizer().encode(&text)?;
    let name = |id: u32| model.tokenizer().decode(&[id]);
    model.session()?.logits(&ids, &mut |at, logits| {
        let likeliest = greedy(logits);
        let Some(&next) = ids.get(at + 1) else {
            println!("{:>12} -> {:?}", name(ids[at]), name(likeliest));
            return Ok(());
        };
        let largest = logits[likeliest as usize];
        let sum: f32 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        let probability = (logits[next as usize] - largest).exp() / sum;
        println!("{:>12} -> {:?}; {:?} came ({probability:.4})", name(ids[at]), name(likeliest), name(next));
        Ok(())
    })?;
    Ok(())
}
