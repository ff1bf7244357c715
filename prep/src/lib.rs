//! The offline toolchain: from a checkpoint to a bundle that runs fast from flash.
//!
//! [`prepare`] does all of it, or continues with what an earlier run left:
//!
//! ```no_run
//! # fn main() -> Result<(), flashlm_prep::PrepareError> {
//! use flashlm_prep::{Event, PrepareOptions, prepare};
//!
//! let options = PrepareOptions { tokens: Some(20_000), ..PrepareOptions::new("/models/opt-1.3b", "opt-1.3b.flashlm") };
//! let prepared = prepare(&options, &|event| {
//!     if !matches!(event, Event::Progress { .. }) {
//!         eprintln!("{event}");
//!     }
//! })?;
//! println!("{:.1} % of the neurons are active", 100.0 * prepared.active());
//! # Ok(())
//! # }
//! ```
//!
//! The modules are what `flashlm-prep` is built of: [`pipeline`] is the graph of stages, the others are what stages do. None of them
//! knows the command line, and none prints.

pub mod assess;
pub mod coactivation;
pub mod demand;
pub mod evaluate;
pub mod expected_run;
pub mod foreign_orders;
pub mod foreign_predictors;
pub mod gain;
pub mod hub;
pub mod inputs;
mod kv_range;
pub mod layer_files;
mod layers;
mod linear;
pub mod npy;
pub mod ordering;
mod own_text;
pub mod pack;
pub mod pipeline;
pub mod predictors;
mod quantise;
pub mod record;
mod records;
pub mod report;
pub mod rounding;
pub mod sparsity;
pub mod states;
pub mod synthesize;
pub mod threads;
pub mod thresholds;
pub mod tokenizer;
pub mod traces;
pub mod train;

pub use pipeline::{Event, Outcome, PrepareError, PrepareOptions, Prepared, prepare};
