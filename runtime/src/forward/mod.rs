//! The only forward pass there is, driven by a [`ModelSpec`](flashlm_formats::model::ModelSpec).
//!
//! `weights` holds what stays in memory, `embed` begins, `block` computes one block, `attention`, `kv` and `positions` its parts, `head`
//! ends; `tables` is the seam to rows of the vocabulary that are elsewhere, as `neurons::source` is to neurons. Nothing here knows files,
//! or who the sequences are.

pub mod attention;
pub mod block;
pub mod embed;
pub mod head;
pub mod kv;
pub mod positions;
pub mod tables;
pub mod weights;
