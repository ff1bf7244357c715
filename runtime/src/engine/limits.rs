//! What a sequence may be, checked before memory is taken.

use flashlm_formats::model::ModelSpec;

use crate::error::{Result, RuntimeError};

/// An error unless the model can hold a sequence of `context` tokens. Every way to run a model asks here, before it takes memory:
/// learned positions have no row beyond, and beyond a sliding window the forward pass would compute another model.
pub fn check_context(spec: &ModelSpec, context: usize) -> Result<()> {
    let model_max = spec.max_positions;
    if (1..=model_max).contains(&context) {
        Ok(())
    } else {
        Err(RuntimeError::ContextOutOfRange { context, model_max })
    }
}

/// An error unless `ids` are ids of the model, and at least one.
pub fn check_ids(spec: &ModelSpec, ids: &[u32]) -> Result<()> {
    let vocab_size = spec.vocab_size;
    if let Some(&id) = ids.iter().find(|id| **id as usize >= vocab_size) {
        return Err(RuntimeError::TokenOutOfRange { id, vocab_size });
    }
    if ids.is_empty() { Err(RuntimeError::EmptyPrompt) } else { Ok(()) }
}
