//! The offline toolchain: from a checkpoint to a bundle that runs fast from flash.

pub mod pack;
pub mod record;
pub mod records;
pub mod tokenizer;
