//! Frames of coded blocks. What holds is said in crates/unbroken/tests/strangers.
#![no_main]

#[path = "../../crates/unbroken/tests/strangers/mod.rs"]
mod strangers;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| strangers::frames(bytes));
