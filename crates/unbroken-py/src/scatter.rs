//! A hash for addresses, of which a capture asks for thousands.
//!
//! Touches: nothing.

use std::hash::{BuildHasher, Hasher};

/// Address and length in bytes.
pub(crate) type Key = (usize, usize);

/// Hashes addresses and lengths, which nobody chooses to be alike.
#[derive(Clone, Copy, Default)]
pub(crate) struct Scatter;

impl BuildHasher for Scatter {
    type Hasher = Scattered;

    fn build_hasher(&self) -> Scattered {
        Scattered(0)
    }
}

pub(crate) struct Scattered(u64);

impl Hasher for Scattered {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn write_u64(&mut self, number: u64) {
        // Odd, and of no pattern: 2^64 over the golden ratio. What is multiplied counts in the high bits, hence the turn.
        self.0 = (self.0 ^ number)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(32);
    }
}
