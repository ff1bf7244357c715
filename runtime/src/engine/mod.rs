//! Many rows through one model: what a step computes, and the sequences that its rows belong to.
//!
//! [`Executor`] owns what computing needs once for a process: weights, neurons, threads, memory for keys and values. `blocks` shares that
//! memory among sequences. [`Forward`] is an executor with a single sequence.

mod blocks;
mod executor;
mod forward;
mod limits;
mod room;

pub use blocks::KV_BLOCK;
pub use executor::{Executor, Row, SequenceId, Work};
pub use forward::Forward;
pub use limits::{check_context, check_ids};
pub use room::{BATCH_MAX, PIECE_TOKENS, Room, SCRATCH_TOKENS_MIN, in_pieces, resumable};
