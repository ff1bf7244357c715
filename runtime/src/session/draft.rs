//! The bundle of a smaller model that guesses: whether it can, and what it takes.

use std::path::Path;

use flashlm_formats::bundle::Bundle;

use crate::error::{Result, RuntimeError};
use crate::load::Notice;
use crate::options::{FfnChoice, LoadOptions};
use crate::plan::plan;
use crate::text::Tokenizer;

/// Opens the bundle at `path`, whose model is to guess for `model`.
///
/// # Errors
/// `Bundle`, `Tokenizer` with what is wrong with the file; `OtherTokenizer` where its ids mean other tokens.
pub fn open(path: &Path, model: &Bundle) -> Result<Bundle> {
    let draft = Bundle::open(path)?;
    if draft.tokenizer() == model.tokenizer() {
        return Ok(draft);
    }
    match Tokenizer::of(&draft)?.first_difference(&Tokenizer::of(model)?) {
        None => Ok(draft),
        Some((id, there, here)) => {
            let word = |token: Option<String>| token.map_or_else(|| "no token".into(), |token| format!("{token:?}"));
            let difference = format!(
                "{}: their tokenizers differ, id {id} is {} for the one and {} for the other",
                model.path().display(),
                word(there),
                word(here)
            );
            Err(RuntimeError::OtherTokenizer { draft: draft.path().to_path_buf(), difference })
        }
    }
}

/// How a draft model is loaded beside a model that is loaded by `options`: all of it in memory, with as little else as works.
///
/// # Errors
/// `ContextOutOfRange`.
pub(super) fn options(draft: &Bundle, options: &LoadOptions) -> Result<LoadOptions> {
    let least = LoadOptions {
        context: options.context.min(draft.spec().max_positions),
        ffn: Some(FfnChoice::Resident),
        budget: Some(1),
        batch: 1,
        speculate: Default::default(),
        draft_bytes: 0,
        reads: None,
        policy: None,
        kv: None,
        ..options.clone()
    };
    match plan(draft, &least) {
        Err(RuntimeError::BudgetTooSmall { needed, .. }) => Ok(LoadOptions { budget: Some(needed), ..least }),
        other => other.map(|_| least),
    }
}

/// Bytes of the budget of `options` that the draft model takes.
///
/// # Errors
/// As [`options`].
pub fn bytes(draft: &Bundle, options: &LoadOptions) -> Result<u64> {
    Ok(plan(draft, &self::options(draft, options)?)?.plan.bytes_beside())
}

/// What should be known of a draft model beside `model` with this context.
pub(super) fn notices(model: &Bundle, draft: &Bundle, context: usize) -> Vec<Notice> {
    let notice = |important, text| Notice { important, text };
    let mut notices = vec![notice(false, format!("{} guesses", draft.path().display()))];
    let positions = draft.spec().max_positions;
    if positions < context {
        let text = format!(
            "the draft model has positions for {positions} tokens, and the context holds {context}: what comes later is guessed without it"
        );
        notices.push(notice(true, text));
    }
    if draft.manifest().model_bytes >= model.manifest().model_bytes {
        let text = "the draft model is not smaller than the model that it guesses for".to_owned();
        notices.push(notice(true, text));
    }
    notices
}
