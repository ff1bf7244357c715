//! The only forward pass there is, driven by a [`ModelSpec`](flashlm_formats::model::ModelSpec).
//!
//! `weights` holds what stays in memory, `layer` computes one block, `attention` and `positions` its parts, `ffn` is the
//! seam where neurons come from, `chosen` computes those that a predictor chose for a token, `forward` runs all layers for a piece of one sequence. Nothing here knows files.

pub mod attention;
pub mod chosen;
pub mod ffn;
pub mod forward;
pub mod kv_cache;
pub mod layer;
pub mod positions;
pub mod tables;
pub mod weights;
