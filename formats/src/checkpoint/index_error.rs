//! What can be wrong with the index of a sharded checkpoint.

use super::listing::list;

/// How an index can lie about its shards.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Not an index.
    #[error("it should be an object with \"weight_map\": {{tensor: file}}: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// A shard outside the directory.
    #[error(
        "the shard {shard:?} is not a plain file name; shards must lie beside the index. Do not use this checkpoint"
    )]
    Path {
        /// The name in the index.
        shard: String,
    },
    /// Shards that are not there.
    #[error("{} shard(s) are missing: {}. Download them", shards.len(), list(shards))]
    MissingShards {
        /// Their names.
        shards: Vec<String>,
    },
    /// Tensors that are not where the index says.
    #[error("{} tensor(s) are not in the shard named for them: {}. Download the index and the shards again", tensors.len(), list(tensors))]
    NotInShard {
        /// `tensor (shard)`.
        tensors: Vec<String>,
    },
    /// One tensor in two shards, and the index names neither.
    #[error("tensor {tensor:?} is in {first} and in {second}, and the index does not say which counts. Download again")]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: String,
        /// The other.
        second: String,
    },
    /// More shards than any model has.
    #[error("{found} shards; at most {limit} are opened")]
    TooManyShards {
        /// Number of shards.
        found: usize,
        /// The bound.
        limit: usize,
    },
}
