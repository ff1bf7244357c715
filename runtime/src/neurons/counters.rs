//! What was read from flash, and what waiting for it cost.

use serde::Serialize;

/// What a source has read from flash since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadCounters {
    /// Bytes that reached memory.
    pub bytes: u64,
    /// Device requests.
    pub reads: u64,
    /// Those of them that repeat one that failed.
    pub retries: u64,
    /// Nanoseconds spent waiting for them.
    pub wait_ns: u64,
    /// Nanoseconds spent on deciding what to read and where to.
    pub planning_ns: u64,
    /// Groups of neurons that were wanted, and those of them that were in memory already.
    pub wanted: u64,
    /// See `wanted`.
    pub hits: u64,
    /// Bytes prefetched and then not needed.
    pub unused_prefetch_bytes: u64,
    /// Bytes of weights and predictors that computing touched.
    pub touched_bytes: u64,
    /// Neurons that predictors chose for rows that were not of a longer piece of a prompt: by row, and each once for those together.
    pub row_neurons: u64,
    /// See `row_neurons`.
    pub step_neurons: u64,
}

impl ReadCounters {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            reads: self.reads + other.reads,
            retries: self.retries + other.retries,
            wait_ns: self.wait_ns + other.wait_ns,
            planning_ns: self.planning_ns + other.planning_ns,
            wanted: self.wanted + other.wanted,
            hits: self.hits + other.hits,
            unused_prefetch_bytes: self.unused_prefetch_bytes + other.unused_prefetch_bytes,
            touched_bytes: self.touched_bytes + other.touched_bytes,
            row_neurons: self.row_neurons + other.row_neurons,
            step_neurons: self.step_neurons + other.step_neurons,
        }
    }

    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            bytes: self.bytes - before.bytes,
            reads: self.reads - before.reads,
            retries: self.retries - before.retries,
            wait_ns: self.wait_ns - before.wait_ns,
            planning_ns: self.planning_ns - before.planning_ns,
            wanted: self.wanted - before.wanted,
            hits: self.hits - before.hits,
            unused_prefetch_bytes: self.unused_prefetch_bytes.saturating_sub(before.unused_prefetch_bytes),
            touched_bytes: self.touched_bytes - before.touched_bytes,
            row_neurons: self.row_neurons - before.row_neurons,
            step_neurons: self.step_neurons - before.step_neurons,
        }
    }
}

/// What a token, or the mean of several, read from flash and waited for, under the names that `--json` has everywhere.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ReadFigures {
    /// Bytes, as the device saw them.
    pub bytes_read_per_token: f64,
    /// Device requests.
    pub reads_per_token: f64,
    /// Bytes prefetched and then not needed.
    pub unused_prefetch_bytes_per_token: f64,
    /// Share of the wanted groups of neurons that were in memory already; 0 where none are looked up.
    pub hit_rate: f64,
    /// Waiting for reads.
    pub io_wait_ms: f64,
    /// Deciding what to read and where to.
    pub planning_ms: f64,
    /// Reads that failed and were repeated, in all.
    pub read_retries: u64,
}

impl ReadCounters {
    /// Means over this many tokens.
    pub fn per_token(self, tokens: usize) -> ReadFigures {
        let mean = |count: u64| count as f64 / tokens.max(1) as f64;
        ReadFigures {
            bytes_read_per_token: mean(self.bytes),
            reads_per_token: mean(self.reads),
            unused_prefetch_bytes_per_token: mean(self.unused_prefetch_bytes),
            hit_rate: self.hits as f64 / self.wanted.max(1) as f64,
            io_wait_ms: mean(self.wait_ns) / 1e6,
            planning_ms: mean(self.planning_ns) / 1e6,
            read_retries: self.retries,
        }
    }
}
