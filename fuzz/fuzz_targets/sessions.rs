#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| flashlm_fuzz::targets::sessions(bytes));
