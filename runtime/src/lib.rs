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
//! The modules are what `flashlm` and `flashlm-prep` are built from, floor by floor: `cache`, `planner` and `replay` decide what stays in
//! memory and what is read together; `neurons` are the places where neurons come from; `forward` is the forward pass; `engine` runs
//! steps of rows of many sequences; `plan` and `load` turn a bundle and a budget into an engine; `session` is the front door. The
//! runtime knows nothing of training, and never maps a bundle.

pub mod budget;
pub mod buffers;
pub mod cache;
pub mod command_line;
pub mod console;
pub mod disk_cost;
pub mod engine;
pub mod error;
pub mod forward;
pub mod generate;
pub mod guard;
pub mod load;
pub mod memory;
pub mod neurons;
pub mod options;
pub mod plan;
pub mod planner;
pub mod replay;
pub mod reuse;
pub mod sampler;
pub mod session;
pub mod signals;
pub mod tables;
pub mod tensors;
pub mod terminal;
pub mod text;
pub mod threads;
mod tokenizer_limits;

pub use error::{Result, RuntimeError as Error};
pub use generate::{Finish, Generation as Report, Percentiles};
pub use sampler::Sampling;
pub use session::{Generation, Model, ModelOptions, Session, Token};
