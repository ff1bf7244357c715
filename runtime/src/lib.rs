//! Runs a language model that does not fit in memory.
//!
//! [`Model`] is the front door:
//!
//! ```no_run
//! # fn main() -> flashlm::Result<()> {
//! use flashlm::Model;
//!
//! let model = Model::open("model.flashlm")?.memory("50%")?.load()?;
//! for token in model.session()?.generate("Once upon a time")? {
//!     print!("{}", token?.text);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Modules without a page here are what `flashlm` and `flashlm-prep` are built from, floor by floor, and may change with any version: `cache`, `planner` and `replay` decide what stays in
//! memory and what is read together; `neurons` are the places where neurons come from; `forward` is the forward pass; `engine` runs
//! steps of rows of many sequences; `plan` and `load` turn a bundle and a budget into an engine; `session` is the front door. The
//! runtime knows nothing of training, and never maps a bundle.

pub mod budget;
pub mod cache;
pub mod chat;
pub mod error;
pub mod generate;
pub mod options;
pub mod plan;
pub mod sampler;
pub mod session;
pub mod speculate;
pub mod text;

// What the two programs and their tests build on: any version may change it.
#[doc(hidden)]
pub mod buffers;
#[doc(hidden)]
pub mod command_line;
#[doc(hidden)]
pub mod console;
#[doc(hidden)]
pub mod disk_cost;
#[doc(hidden)]
pub mod engine;
#[doc(hidden)]
pub mod forward;
#[doc(hidden)]
pub mod guard;
#[doc(hidden)]
pub mod kept;
#[doc(hidden)]
pub mod load;
#[doc(hidden)]
pub mod manual;
#[doc(hidden)]
pub mod memory;
#[doc(hidden)]
pub mod neurons;
#[doc(hidden)]
pub mod planner;
#[doc(hidden)]
pub mod replay;
#[doc(hidden)]
pub mod reuse;
#[doc(hidden)]
pub mod signals;
#[doc(hidden)]
pub mod tables;
#[doc(hidden)]
pub mod tensors;
#[doc(hidden)]
pub mod terminal;
#[doc(hidden)]
pub mod threads;
mod tokenizer_limits;

pub use error::{Result, RuntimeError as Error};
pub use forward::kv::KvDtype;
pub use generate::{Finish, Generation as Report, Percentiles};
pub use sampler::Sampling;
pub use session::{Conversation, Generation, Model, ModelOptions, Progress, Session, Token, WhenFull};
pub use speculate::Speculate;
