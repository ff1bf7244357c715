//! Fused query, key and value projections whose rows stand head by head.

use crate::checkpoint::plan::{Blocks, Part};
use crate::model::Attention;

/// Rows that stand per key head (its queries, its key, its value) as all queries, all keys, all values.
///
/// With one query to a key head that is the order `[query, key, value]` for each head of GPT-NeoX and its kin.
pub(crate) fn by_head(projection: &Part, attention: &Attention) -> Vec<Part> {
    let Attention { heads, kv_heads, head_dim, .. } = *attention;
    let queries = heads / kv_heads;
    let group_rows = (queries + 2) * head_dim;
    let part = |first_head: usize, heads: usize| {
        let (first, len) = (first_head * head_dim, heads * head_dim);
        projection.rows(Blocks { first, len, step: group_rows, count: kv_heads })
    };
    vec![part(0, queries), part(queries, 1), part(queries + 1, 1)]
}
