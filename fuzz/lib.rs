//! Fuzz targets for every reader of files that others wrote. `tests/attacks/README.md` says how they are run and what came out;
//! `cargo test` replays the corpora on stable Rust.

#[path = "../tests/attacks/targets/mod.rs"]
pub mod targets;
