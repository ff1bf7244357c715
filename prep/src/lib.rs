//! The offline toolchain.
