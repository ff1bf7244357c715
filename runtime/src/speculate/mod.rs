//! Guesses of what comes next, which one step of the model confirms or refutes.
//!
//! A draft proposes tokens; they are computed together with the token before them, and what the sampler chooses after each row is
//! compared with what was proposed. So the text is that of a run without drafts, bit for bit, whoever guesses and however often: a row's
//! bits do not depend on the rows beside it, and the sampler takes one step for each token of the text. Guesses only decide what it costs.

mod counters;
mod model;
mod ngrams;
mod pace;
mod speculation;
mod step_times;

use crate::error::Result;
use crate::sampler::Sampler;

pub use counters::{SpeculationCounters, SpeculationFigures};
pub use model::ModelDraft;
pub use speculation::{Speculate, Speculation};

/// Classes that drafts sort their guesses into, by how sure they are: how often each comes true is measured.
pub const CLASSES: usize = 8;

/// A guess of the next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guess {
    /// The token.
    pub id: u32,
    /// How sure the draft is, from 0 to [`CLASSES`] - 1.
    pub class: usize,
    /// Whether what it took to guess is what the next guess takes, too: not where much text had to be read before.
    pub is_usual: bool,
}

/// Who guesses.
pub trait Draft: Send {
    /// What comes after `text` and the guesses `drafted` so far, if these come true; `None` where nothing suggests itself. `sampler`
    /// is what will choose.
    ///
    /// # Errors
    /// What a model that guesses can run into.
    fn guess(&mut self, text: &[u32], drafted: &[u32], sampler: &Sampler) -> Result<Option<Guess>>;

    /// How often guesses of a class come true, before any was tried.
    fn expected(&self, class: usize) -> f64;
}
