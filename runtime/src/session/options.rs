//! How a model is to be loaded.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use flashlm_formats::bundle::Bundle;
use flashlm_formats::sessions::Origin;

use super::model::Model;
use super::{draft, saved};
use crate::budget::Budget;
use crate::error::{Result, RuntimeError};
use crate::forward::kv::KvDtype;
use crate::load::{load, load_on};
use crate::options::LoadOptions;
use crate::plan::{Planned, plan};
use crate::speculate::Speculate;
use crate::text::Tokenizer;
use crate::threads;

/// Default context of a session, in tokens, if the model allows as many.
const CONTEXT: usize = 2048;

/// A bundle that is opened and checked, but not loaded: says how much memory to take, and for what.
///
/// ```no_run
/// # fn main() -> flashlm::Result<()> {
/// use flashlm::Model;
/// let model = Model::open("model.flashlm")?.memory("50%")?.context(512).load()?;
/// # Ok(())
/// # }
/// ```
pub struct ModelOptions {
    bundle: Bundle,
    tokenizer: Tokenizer,
    load: LoadOptions,
    /// A model that guesses.
    draft: Option<Bundle>,
}

impl Model {
    /// Opens a bundle and checks it; memory is taken by [`ModelOptions::load`].
    ///
    /// # Errors
    /// `Bundle` with what is wrong with the file.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelOptions> {
        ModelOptions::of(Bundle::open(path.as_ref())?)
    }
}

impl ModelOptions {
    /// The same for a bundle that is open.
    ///
    /// # Errors
    /// `Tokenizer` if its tokenizer cannot be used.
    pub fn of(bundle: Bundle) -> Result<Self> {
        let tokenizer = Tokenizer::of(&bundle)?;
        let context = bundle.spec().max_positions.min(CONTEXT);
        let load = LoadOptions { speculate: Speculate::Auto, ..LoadOptions::new(context) };
        Ok(Self { bundle, tokenizer, load, draft: None })
    }

    /// Memory for the whole process: `"50%"` of the model, `"4GiB"`, `"6.7GB"` or a number of bytes. Without it, what the machine and
    /// its memory cgroups leave, less a reserve.
    ///
    /// # Errors
    /// `Budget` where that is not an amount.
    pub fn memory(mut self, amount: &str) -> Result<Self> {
        let budget: Budget = amount.parse().map_err(RuntimeError::Budget)?;
        self.load.budget = Some(budget.bytes(self.bundle.manifest().model_bytes));
        Ok(self)
    }

    /// Context of a session in tokens, prompt and answer together; by default 2048, or what the model allows.
    pub fn context(mut self, tokens: usize) -> Self {
        self.load.context = tokens;
        self
    }

    /// Sessions that there is memory for at the same time; by default 1.
    pub fn sessions(mut self, count: usize) -> Self {
        self.load.sequences = count;
        self
    }

    /// Threads that compute; by default all processors.
    pub fn threads(mut self, count: NonZeroUsize) -> Self {
        self.load.threads = count;
        self
    }

    /// How keys and values are stored: by default in f16, unless the bundle says that this is too narrow. With `Int8` a context takes
    /// about half the memory, and the text is another.
    pub fn kv(mut self, dtype: KvDtype) -> Self {
        self.load.kv = Some(dtype);
        self
    }

    /// Computes every neuron, whatever the bundle's predictors choose: the text of the model without predictors.
    pub fn exact(mut self) -> Self {
        self.load.predict = false;
        self
    }

    /// Tokens that are guessed and verified in one step: by default as many as pay, which may be none. The text is the same.
    pub fn speculate(mut self, how: Speculate) -> Self {
        self.load.speculate = how;
        self
    }

    /// A smaller model that guesses: its bundle must have the same tokenizer. All of it is kept in memory, which the budget includes.
    ///
    /// # Errors
    /// `Bundle`, `Tokenizer` with what is wrong with the file; `OtherTokenizer`.
    pub fn draft(mut self, path: impl AsRef<Path>) -> Result<Self> {
        self.draft = Some(draft::open(path.as_ref(), &self.bundle)?);
        Ok(self)
    }

    /// Everything else that can be chosen.
    pub fn options_mut(&mut self) -> &mut LoadOptions {
        &mut self.load
    }

    /// Text to token ids.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The bundle.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// What loading would take, and how the memory would be used.
    ///
    /// # Errors
    /// `BudgetTooSmall` with the smallest budget that works; `ContextOutOfRange`.
    pub fn plan(&self) -> Result<Planned> {
        plan(&self.bundle, &self.load_options()?)
    }

    /// With what the draft model takes.
    fn load_options(&self) -> Result<LoadOptions> {
        let draft_bytes = self.draft.as_ref().map_or(Ok(0), |draft| draft::bytes(draft, &self.load))?;
        Ok(LoadOptions { draft_bytes, ..self.load.clone() })
    }

    /// Reads what the plan says into memory.
    ///
    /// # Errors
    /// Those of [`ModelOptions::plan`], and whatever can go wrong with reading.
    pub fn load(self) -> Result<Model> {
        self.load_with(&mut |_, _| ())
    }

    /// As [`ModelOptions::load`]; `progress` is told bytes read and bytes in all.
    pub fn load_with(self, progress: &mut dyn FnMut(u64, u64)) -> Result<Model> {
        let options = self.load_options()?;
        // What does not fit is said before anything is read.
        let origin = self.origin()?;
        let Some(bundle) = &self.draft else {
            let loaded = load(&self.bundle, &options, progress)?;
            return Ok(Model::new(self.bundle, self.tokenizer, origin, loaded, None));
        };
        let threads = Arc::new(threads::start(options.threads)?);
        let guesses = load_on(Some(Arc::clone(&threads)), bundle, &draft::options(bundle, &options)?, progress)?;
        let mut loaded = load_on(Some(threads), &self.bundle, &options, progress)?;
        loaded.notices.extend(draft::notices(&self.bundle, bundle, options.context));
        Ok(Model::new(self.bundle, self.tokenizer, origin, loaded, Some(guesses.forward.into_executor())))
    }

    /// What sessions will be computed with.
    fn origin(&self) -> Result<Origin> {
        Ok(saved::origin(&self.bundle, self.load.kv(&self.bundle), self.plan()?.predicted))
    }

    /// Looks whether a saved session can be gone on with, before the model is loaded.
    ///
    /// # Errors
    /// `SavedSession` with what is wrong with the file, `OtherSession` where it was computed otherwise; those of [`ModelOptions::plan`].
    pub fn check_session(&self, path: &Path) -> Result<()> {
        saved::open(path, &self.origin()?).map(|_| ())
    }
}
