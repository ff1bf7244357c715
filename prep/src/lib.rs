//! The offline toolchain: from a checkpoint to a bundle that runs fast from flash.

pub mod coactivation;
pub mod disk_cost;
pub mod evaluate;
pub mod foreign_predictors;
pub mod gain;
pub mod hub;
mod kv_range;
pub mod layers;
pub mod ordering;
pub mod own_text;
pub mod pack;
pub mod predictors;
pub mod quantise;
pub mod record;
pub mod records;
pub mod report;
pub mod sparsity;
pub mod states;
pub mod synthesize;
pub mod threads;
pub mod thresholds;
pub mod tokenizer;
pub mod train;
pub mod wanted;
