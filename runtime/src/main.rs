//! `flashlm`.
fn main() {}
