//! Bytes to meaning and back: checkpoints, recordings and bundles.
//!
//! This crate knows files and what is in them. It starts no threads, opens nothing with direct I/O and computes nothing
//! about language; `unsafe` stands only in the one module that opens memory maps.

pub mod bundle;
#[cfg(feature = "preparation")]
pub mod checkpoint;
pub mod destination;
#[cfg(feature = "preparation")]
pub mod mapping;
pub mod model;
pub mod publish;
#[cfg(feature = "preparation")]
pub mod recording;
pub mod regular;
#[cfg(feature = "preparation")]
pub mod seal;
pub mod weight_format;
