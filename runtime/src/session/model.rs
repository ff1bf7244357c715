//! A loaded model.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flashlm_formats::bundle::Bundle;
use flashlm_formats::model::ModelSpec;
use flashlm_formats::sessions::Origin;

use crate::engine::Executor;
use crate::error::Result;
use crate::load::{Loaded, Notice};
use crate::plan::MemoryPlan;
use crate::sampler::Sampling;
use crate::speculate::{Draft, ModelDraft};
use crate::text::Tokenizer;

/// A bundle in memory, as far as the budget allows, with its tokenizer.
///
/// ```no_run
/// # fn main() -> flashlm::Result<()> {
/// use flashlm::Model;
///
/// let model = Model::open("model.flashlm")?.memory("50%")?.load()?;
/// for token in model.session()?.generate("Once upon a time")? {
///     print!("{}", token?.text);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Model {
    bundle: Bundle,
    tokenizer: Tokenizer,
    plan: MemoryPlan,
    notices: Vec<Notice>,
    /// What its sessions are computed with.
    origin: Origin,
    /// One step at a time, of whichever session.
    executor: Mutex<Executor>,
    /// A smaller model that guesses, if there is one.
    draft: Option<Arc<Mutex<Executor>>>,
}

impl Model {
    pub(super) fn new(
        bundle: Bundle,
        tokenizer: Tokenizer,
        origin: Origin,
        loaded: Loaded,
        draft: Option<Executor>,
    ) -> Self {
        let Loaded { forward, plan, notices } = loaded;
        let (executor, draft) = (Mutex::new(forward.into_executor()), draft.map(|draft| Arc::new(Mutex::new(draft))));
        Self { bundle, tokenizer, plan, notices, origin, executor, draft }
    }

    /// What its sessions are computed with.
    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Guesses of the draft model for a text that is chosen by `sampling`.
    pub(super) fn draft(&self, sampling: Sampling) -> Result<Option<Box<dyn Draft>>> {
        let Some(executor) = &self.draft else { return Ok(None) };
        Ok(Some(Box::new(ModelDraft::open(executor, sampling, self.spec().vocab_size)?)))
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        self.bundle.spec()
    }

    /// The bundle that it was loaded from.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Text to token ids and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The memory that it uses.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// What was chosen while loading, and what the user should know.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// A step that panicked leaves the executor as an error does: what it was doing has to be repeated.
    pub(super) fn executor(&self) -> MutexGuard<'_, Executor> {
        self.executor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
