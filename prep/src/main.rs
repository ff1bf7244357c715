//! `flashlm-prep`.
fn main() {}
