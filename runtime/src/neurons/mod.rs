//! Where the neurons of an FFN come from, and their arithmetic. Nothing here knows attention, sequences or sampling.
//!
//! An [`FfnSource`](source::FfnSource) computes the FFN of one block: `resident` from memory, `streamed` by reading every neuron, `flash`
//! by reading the few that matter, `predicted` any that has all of them, with a predictor's choice. `dense` computes consecutive
//! records and `chosen` single ones, so the arithmetic is the same; `hook` is who watches.

mod activation;
pub mod checks;
pub mod chosen;
pub mod counters;
pub mod dense;
pub mod flash;
pub mod hook;
pub mod params;
pub mod place;
pub mod predicted;
pub mod predictor;
pub mod records;
pub mod resident;
pub mod scratch;
pub mod selection;
pub mod source;
pub mod streamed;
