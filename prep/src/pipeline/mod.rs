//! Everything from a checkpoint to a bundle, as a graph of stages.
//!
//! Each stage leaves its files in a directory of its own in the work directory, with a stamp that says what they were made from.
//! What is there and as it was written is not done again; what is not is made again. Nothing depends on when or how often it was
//! interrupted. [`STAGES`] says what each stage is made from.
//!
//! ```no_run
//! # fn main() -> Result<(), flashlm_prep::PrepareError> {
//! use flashlm_prep::{Event, PrepareOptions, prepare};
//!
//! let mut options = PrepareOptions::new("/models/opt-1.3b", "opt-1.3b.flashlm");
//! options.text.push("calibration.txt".into());
//! let prepared = prepare(&options, &|event| {
//!     if let Event::Note(_) | Event::Layer { .. } = event {
//!         eprintln!("{event}");
//!     }
//! })?;
//! println!("{}: {} bytes", options.output.display(), prepared.bytes);
//! # Ok(())
//! # }
//! ```
//!
//! Knows nothing of command lines, and prints nothing: what happens is told to an [`Observer`].

mod announced;
mod error;
mod estimate;
mod event;
mod graph;
mod layers;
mod made_from;
mod memory;
mod options;
mod packed;
mod run;
mod source_hash;
mod stamp;
mod work;

pub use announced::{Estimate, duration};
pub use error::PrepareError;
pub use estimate::estimate_whole;
pub use event::{Event, Observer, Task};
pub use graph::{Input, STAGES, Stage, StageKind};
pub use options::PrepareOptions;
pub use run::{Outcome, Preparation, Prepared};

use flashlm_formats::checkpoint::Checkpoint;

/// Prepares the checkpoint that `options` name, or continues with it; `observer` is told what happens.
///
/// # Errors
/// Options that cannot be followed, files that cannot be read or written, and models that nothing is gained for.
pub fn prepare(options: &PrepareOptions, observer: &Observer<'_>) -> Result<Prepared, PrepareError> {
    let preparation = Preparation::begin(options, observer)?;
    preparation.run(Checkpoint::open(&options.checkpoint)?)
}
