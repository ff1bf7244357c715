//! Fused query, key and value projections whose rows stand head by head.

use crate::checkpoint::plan::Part;
use crate::model::Attention;

/// Rows that stand per key head (its queries, its key, its value) as all queries, all keys, all values.
///
/// With one query to a key head that is the order `[query, key, value]` for each head of GPT-NeoX and its kin.
pub(crate) fn by_head(projection: &Part, attention: &Attention) -> Vec<Part> {
    let Attention { heads, kv_heads, head_dim, .. } = *attention;
    let queries = heads / kv_heads;
    let group_rows = (queries + 2) * head_dim;
    let part = |first_head: usize, heads: usize| {
        (0..kv_heads).map(move |group| {
            let start = group * group_rows + first_head * head_dim;
            projection.rows(start..start + heads * head_dim)
        })
    };
    part(0, queries).chain(part(queries, 1)).chain(part(queries + 1, 1)).collect()
}
