//! The boundary to rows of the vocabulary's matrices that do not stay in memory.

use flashlm_kernels::Threads;

use crate::error::Result;
use crate::neurons::counters::ReadCounters;

/// Gives the rows after those that [`OuterWeights`](super::weights::OuterWeights) holds.
pub trait TableSource: Send {
    /// The embedding of a token, `[embed]`.
    fn embedding(&mut self, id: u32, out: &mut [f32]) -> Result<()>;

    /// The logits of the rows that are not in memory, into their places in `logits`, `[vocab]`; `input` is `[embed]`.
    fn logits(&mut self, threads: &Threads, input: &[f32], logits: &mut [f32]) -> Result<()>;

    /// Bytes and device requests read so far.
    fn read_counters(&self) -> ReadCounters;
}
