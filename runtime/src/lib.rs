//! Runs a bundle inside a memory budget.
//!
//! `load` opens a bundle and plans memory, `model` is the forward pass, `ffn` the places where neurons come from, `generate`
//! turns a prompt into tokens, `text` tokens into text. The runtime knows nothing of training, and never maps a bundle.

pub mod budget;
pub mod error;
pub mod ffn;
pub mod generate;
pub mod load;
pub mod memory;
pub mod model;
pub mod plan;
pub mod predictor;
pub mod sampler;
pub mod text;
