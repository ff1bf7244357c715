//! The front door: a model that is opened, loaded and talked to.
//!
//! [`Model`] is one loaded bundle; every [`Session`] is a text of its own on it. What surrounds a text, what ends it and how tokens
//! become text is decided here, so that a program, the `flashlm` command and a server cannot differ.

mod chat;
mod conversation;
#[doc(hidden)]
pub mod draft;
mod generation;
mod model;
mod options;
mod saved;
#[expect(clippy::module_inception, reason = "the type that the module is named for")]
mod session;

pub use conversation::{Conversation, Progress, WhenFull};
pub use generation::{Generation, Token};
pub use model::Model;
pub use options::ModelOptions;
pub use session::Session;
