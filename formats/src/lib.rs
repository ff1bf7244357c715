//! Bytes to meaning and back: checkpoints, recordings, what is made of them, and bundles.
//!
//! This crate knows files and what is in them. It starts no threads, opens nothing with direct I/O and computes nothing
//! about language; `unsafe` is only in the one module that opens memory maps.

pub mod bundle;
pub mod chat;
#[cfg(feature = "preparation")]
pub mod checkpoint;
pub mod destination;
pub mod ids;
#[cfg(feature = "preparation")]
pub mod mapping;
pub mod model;
pub mod model_name;
#[cfg(feature = "preparation")]
pub mod orders;
pub mod page_cache;
#[cfg(feature = "preparation")]
pub mod predictors;
pub mod publish;
#[cfg(feature = "preparation")]
pub mod recording;
pub mod regular;
pub mod seal;
pub mod sessions;
#[cfg(feature = "preparation")]
pub mod thresholds;
pub mod weight_format;
