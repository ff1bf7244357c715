//! Conversations as text: chat templates, rendered as transformers renders them, and encoded so that nobody but the template says
//! special tokens.
//!
//! A template is a program from whoever published the model: what it may compute is bounded by fuel, which pays for time and memory
//! alike and grows with the conversation. What somebody typed stays text: where it spells a special token, a mark is put into it before
//! the template sees it, and taken out again after special tokens were found. It knows no models and no sessions.

mod clock;
mod json;
mod marks;
mod python;
mod template;

pub use template::{ChatTemplate, Message, Rendered, Tools};
