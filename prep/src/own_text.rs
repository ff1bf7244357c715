//! Self-generated calibration text, for when the user has none.
//!
//! A temporary bundle in the checkpoint's order is made, sampled from, and removed. Sequences begin with what begins a text and
//! are drawn at temperature 1, so that they are spread as the model's own distribution is.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use flashlm::error::RuntimeError;
use flashlm::generate::{Request, generate};
use flashlm::load::load;
use flashlm::options::LoadOptions;
use flashlm::sampler::{Sampler, Sampling};
use flashlm::text::Tokenizer;
use flashlm_formats::bundle::{Bundle, BundleError};
use flashlm_formats::checkpoint::Checkpoint;

use crate::pack::{PackError, PackOptions, pack};
use crate::record::documents::SEPARATOR;
use crate::record::text::between_texts;

/// Why no text was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnTextError {
    /// The temporary bundle.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The temporary bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Running it.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The file system.
    #[error("cannot remove the temporary bundle: {0}")]
    Remove(std::io::Error),
    /// The model has no id to begin with.
    #[error("the model names no token that begins or ends a text, so it cannot write its own; give --text")]
    NoFirstId,
}

/// How much text, and how it is drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnText {
    /// Tokens to write.
    pub tokens: usize,
    /// Longest sequence.
    pub sequence_tokens: usize,
    /// Start of the random numbers.
    pub seed: u64,
    /// Time after which no further sequence is begun.
    pub limit: Duration,
}

/// Lets the model of `checkpoint` write documents, separated by [`SEPARATOR`] lines; the temporary bundle goes to `dir`.
/// Gives the text and the number of its tokens.
pub(crate) fn write_own_text(
    checkpoint: &Checkpoint,
    tokenizer_json: &[u8],
    asked: &OwnText,
    dir: &Path,
    threads: NonZeroUsize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(String, usize), OwnTextError> {
    let path = dir.join("own-text.flashlm");
    let options = PackOptions { tokenizer: tokenizer_json.to_vec(), overwrite: true, ..PackOptions::default() };
    pack(checkpoint, &path, options, &mut |_, _| ())?;
    let text = sample(&path, asked, threads, progress);
    std::fs::remove_file(&path).map_err(OwnTextError::Remove)?;
    text
}

fn sample(
    path: &Path,
    asked: &OwnText,
    threads: NonZeroUsize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(String, usize), OwnTextError> {
    let bundle = Bundle::open(path)?;
    let spec = bundle.spec();
    let context = asked.sequence_tokens.min(spec.max_positions);
    let options = LoadOptions { threads, ..LoadOptions::new(context) };
    let mut forward = load(&bundle, &options, &mut |_, _| ())?.forward;
    let tokenizer = Tokenizer::of(&bundle)?;
    let first = between_texts(&tokenizer, spec);
    if first.is_empty() {
        return Err(OwnTextError::NoFirstId);
    }
    let sampling = Sampling { temperature: 1.0, seed: asked.seed, ..Sampling::default() };
    let mut sampler = Sampler::new(sampling, spec.vocab_size);
    let begin = Instant::now();
    let (mut text, mut written) = (String::new(), 0);
    while written < asked.tokens && begin.elapsed() < asked.limit {
        forward.truncate(0);
        let mut stream = tokenizer.stream(&first);
        if !text.is_empty() {
            text += &format!("\n{SEPARATOR}\n");
        }
        let request = Request {
            prompt: &first,
            tokens: context.saturating_sub(first.len()).max(1),
            eos: &spec.eos,
            stop_ids: &[],
        };
        let generation = generate(&mut forward, &mut sampler, &request, &mut |token| {
            text += &stream.push(token.id);
            if begin.elapsed() < asked.limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        text += &stream.finish();
        written += generation.tokens + first.len();
        progress(written as u64, asked.tokens as u64);
    }
    Ok((text, written))
}
