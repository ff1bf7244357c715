//! Runs a bundle inside a memory budget.
//!
//! `load` opens a bundle and plans memory, `model` is the forward pass, `ffn` the places where neurons come from, `generate`
//! turns a prompt into tokens, `text` tokens into text. `cache` and `planner` decide what stays in memory and what is read
//! together; `replay` runs recorded tokens through both. The runtime knows nothing of training, and never maps a bundle.

pub mod budget;
pub mod cache;
pub mod command_line;
pub mod console;
pub mod engine;
pub mod error;
pub mod forward;
pub mod generate;
pub mod guard;
pub mod load;
pub mod memory;
pub mod neurons;
pub mod plan;
pub mod planner;
pub mod replay;
pub mod reuse;
pub mod sampler;
pub mod signals;
pub mod tables;
pub mod tensors;
pub mod terminal;
pub mod text;
pub mod threads;
mod tokenizer_limits;
