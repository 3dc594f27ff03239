//! Keys as a pure function of (seed, purpose, epoch, position), and random-access orders made from them.
//!
//! Touches: nothing. Both are a specification for ever: the same numbers give the same bytes on every machine, in every
//! language and in every release. `docs/format.md`, "Keys" and "Orders", has the layout and golden vectors.

use std::sync::LazyLock;

use blake3::hazmat::{ContextKey, HasherExt, hash_derive_key_context};

use crate::error::{Error, Result};

/// Separates these keys from every other use of BLAKE3's key derivation.
const CONTEXT: &str = "unbroken 2026-11-23 keys version 1";

/// Rounds of the network behind [`Order`].
const ROUNDS: usize = 12;

/// The largest length of an [`Order`].
pub const MAX_LENGTH: u64 = 1 << 63;

/// Returns 32 bytes that depend on all four arguments and on nothing else.
pub fn derive_key(seed: u64, purpose: &str, epoch: u64, position: u64) -> [u8; 32] {
    let mut key = [0; 32];
    derive(seed, purpose, epoch, position, &mut key);
    key
}

/// Fills `out` with the first bytes of the key's extendable output.
fn derive(seed: u64, purpose: &str, epoch: u64, position: u64, out: &mut [u8]) {
    // | seed u64 | epoch u64 | position u64 | purpose, UTF-8 |   all little-endian; the fixed widths come first, so
    // that no two argument lists share their bytes.
    static KEYED: LazyLock<ContextKey> = LazyLock::new(|| hash_derive_key_context(CONTEXT));
    let mut hasher = blake3::Hasher::new_from_context_key(&KEYED);
    hasher.update(&seed.to_le_bytes());
    hasher.update(&epoch.to_le_bytes());
    hasher.update(&position.to_le_bytes());
    hasher.update(purpose.as_bytes());
    hasher.finalize_xof().fill(out);
}

/// A permutation of `0..length` for one epoch, any element of it at once and in constant memory.
///
/// An alternating Feistel network over the smallest power of two that holds `length` (at least 256), walked until it
/// lands below `length`: on average at most two passes an element, for lengths above 128.
///
/// ```
/// let order = unbroken::key::Order::new(7, 0, 1_000_000)?;
/// let batch: Vec<u64> = order.slice(500, 508)?.collect();
/// assert_eq!(batch[3], order.at(503)?);
/// # Ok::<(), unbroken::error::Error>(())
/// ```
///
/// Source: cycle walking is from Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002); the round function
/// is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    length: u64,
    /// Bits of the low half; the high half has as many, or one more.
    low_bits: u32,
    low_mask: u64,
    high_mask: u64,
    keys: [u64; ROUNDS],
}

impl Order {
    /// The order of one epoch.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where `length` is above [`MAX_LENGTH`].
    pub fn new(seed: u64, epoch: u64, length: u64) -> Result<Order> {
        if length > MAX_LENGTH {
            return Err(Error::invalid(format!(
                "an order of length {length}, at most 2^63 is possible"
            )));
        }
        let mut bytes = [0; ROUNDS * 8];
        derive(seed, "order", epoch, length, &mut bytes);
        let mut keys = [0; ROUNDS];
        for (key, bytes) in keys.iter_mut().zip(bytes.chunks_exact(8)) {
            *key = u64::from_le_bytes(bytes.try_into().expect("chunks of eight bytes"));
        }
        // Halves below 4 bits would leave the rounds too few distinct functions to mix with.
        let bits = (u64::BITS - length.saturating_sub(1).leading_zeros()).max(8);
        let low_bits = bits / 2;
        let high_bits = bits - low_bits;
        Ok(Order {
            length,
            low_bits,
            low_mask: (1 << low_bits) - 1,
            high_mask: (1 << high_bits) - 1,
            keys,
        })
    }

    /// How many elements it has.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The element at a position.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where `position` is not below the length.
    pub fn at(&self, position: u64) -> Result<u64> {
        if position >= self.length {
            return Err(Error::invalid(format!(
                "position {position} in an order of length {}",
                self.length
            )));
        }
        Ok(self.walk(position))
    }

    /// The elements at positions `start..stop`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where `start <= stop <= length` does not hold.
    pub fn slice(&self, start: u64, stop: u64) -> Result<impl Iterator<Item = u64> + '_> {
        if start > stop || stop > self.length {
            return Err(Error::invalid(format!(
                "positions {start}..{stop} in an order of length {}",
                self.length
            )));
        }
        Ok((start..stop).map(|position| self.walk(position)))
    }

    /// Walks from a position along the network's cycle to the first element below the length.
    fn walk(&self, position: u64) -> u64 {
        // Ends: the cycle comes back to `position`, which is below the length.
        let mut element = self.permute(position);
        while element >= self.length {
            element = self.permute(element);
        }
        element
    }

    /// One pass through the network: a permutation of `0..2^bits`.
    fn permute(&self, element: u64) -> u64 {
        let mut low = element & self.low_mask;
        let mut high = element >> self.low_bits;
        for pair in self.keys.chunks_exact(2) {
            high ^= mix(low ^ pair[0]) & self.high_mask;
            low ^= mix(high ^ pair[1]) & self.low_mask;
        }
        high << self.low_bits | low
    }
}

/// The finalizer of SplitMix64: every bit of the input reaches every bit of the output.
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::digest::hex;

    fn all(seed: u64, epoch: u64, length: u64) -> Vec<u64> {
        Order::new(seed, epoch, length)
            .unwrap()
            .slice(0, length)
            .unwrap()
            .collect()
    }

    fn is_permutation(order: &[u64]) -> bool {
        let mut seen = vec![false; order.len()];
        order
            .iter()
            .all(|&element| !std::mem::replace(&mut seen[element as usize], true))
    }

    /// Sum over cells of (found - expected)^2 / expected.
    fn chi_square(counts: &[u32]) -> f64 {
        let expected = counts.iter().sum::<u32>() as f64 / counts.len() as f64;
        counts
            .iter()
            .map(|&count| (f64::from(count) - expected).powi(2) / expected)
            .sum()
    }

    /// Far out on the right of the chi-square distribution: mean plus six standard deviations.
    fn limit(cells: usize) -> f64 {
        let freedom = cells as f64 - 1.0;
        freedom + 6.0 * (2.0 * freedom).sqrt()
    }

    #[test]
    fn every_short_length_is_a_permutation() {
        for length in 0..300 {
            assert!(is_permutation(&all(1, 2, length)), "length {length}");
        }
        for length in [511, 512, 513, 4095, 4096, 4097, 65_537] {
            assert!(is_permutation(&all(3, 4, length)), "length {length}");
        }
        assert_eq!(all(9, 9, 0), [0; 0]);
        assert_eq!(all(9, 9, 1), [0]);
    }

    #[test]
    fn the_longest_order_works_at_both_ends() {
        let order = Order::new(5, 6, MAX_LENGTH).unwrap();
        assert!(order.at(0).unwrap() < MAX_LENGTH && order.at(MAX_LENGTH - 1).unwrap() < MAX_LENGTH);
        assert!(order.at(MAX_LENGTH).is_err());
        assert!(Order::new(5, 6, MAX_LENGTH + 1).is_err());
        assert!(order.slice(3, 2).is_err());
        assert!(order.slice(0, MAX_LENGTH + 1).is_err());
    }

    #[test]
    fn every_argument_of_a_key_changes_it() {
        let key = derive_key(1, "worker", 2, 3);
        assert_eq!(key, derive_key(1, "worker", 2, 3));
        for other in [
            derive_key(2, "worker", 2, 3),
            derive_key(1, "work", 2, 3),
            derive_key(1, "worker", 3, 3),
        ] {
            assert_ne!(key, other);
        }
        assert_ne!(key, derive_key(1, "worker", 2, 4));
    }

    #[test]
    fn short_orders_take_every_arrangement_equally_often() {
        // The rank of a permutation is its number among all of them; 2 to 5 elements have 2 to 120.
        for length in 2..=5u64 {
            let cells = (1..=length).product::<u64>() as usize;
            let mut counts = vec![0; cells];
            for epoch in 0..(cells * 60) as u64 {
                let order = all(length, epoch, length);
                let rank = (0..order.len()).fold(0, |rank, i| {
                    rank * (order.len() - i)
                        + order[i + 1..].iter().filter(|&&later| later < order[i]).count()
                });
                counts[rank] += 1;
            }
            assert!(chi_square(&counts) < limit(cells), "length {length}: {counts:?}");
        }
    }

    #[test]
    fn every_element_comes_first_equally_often() {
        for length in [3, 7, 10, 100, 257] {
            let (mut by_epoch, mut by_seed) = (vec![0; length as usize], vec![0; length as usize]);
            for round in 0..length * 40 {
                by_epoch[Order::new(11, round, length).unwrap().at(0).unwrap() as usize] += 1;
                by_seed[Order::new(round, 3, length).unwrap().at(length - 1).unwrap() as usize] += 1;
            }
            assert!(
                chi_square(&by_epoch) < limit(by_epoch.len()),
                "length {length}: {by_epoch:?}"
            );
            assert!(
                chi_square(&by_seed) < limit(by_seed.len()),
                "length {length}: {by_seed:?}"
            );
        }
    }

    #[test]
    fn neighbours_are_not_neighbours_any_more() {
        // Steps between successive elements, in sixteenths of what they can be, are uniform for a random permutation.
        for length in [65, 1025, 4097] {
            let mut counts = vec![0; 16];
            for epoch in 0..20_000 / length {
                let order = all(17, epoch, length);
                for pair in order.windows(2) {
                    let step = (pair[1] + length - pair[0]) % length;
                    counts[((step - 1) * 16 / (length - 1)) as usize] += 1;
                }
            }
            assert!(chi_square(&counts) < limit(16), "length {length}: {counts:?}");
        }
    }

    #[test]
    fn keys_and_orders_of_version_1_stay_as_they_are() {
        assert_eq!(
            hex(&derive_key(0, "", 0, 0)),
            "22986aa21fb86740e72688bcbe23cbc08f9a75e2b5f9d5aca489b51922faa979"
        );
        assert_eq!(
            hex(&derive_key(1, "worker", 2, 3)),
            "8e6058526a09b26168e744297cb6b156cf62b3fcc512f7a58e7c12b1ef46e4d3"
        );
        assert_eq!(all(0, 0, 10), [2, 5, 8, 3, 7, 6, 4, 0, 1, 9]);
        assert_eq!(all(1, 0, 10), [1, 8, 9, 6, 0, 7, 3, 5, 4, 2]);
        assert_eq!(all(1, 1, 10), [4, 8, 7, 1, 6, 5, 0, 3, 9, 2]);
        let long = Order::new(1, 0, 10_000_000).unwrap();
        assert_eq!(
            long.slice(5_000_000, 5_000_004).unwrap().collect::<Vec<_>>(),
            [5_128_699, 9_265_889, 5_706_963, 8_560_769]
        );
        let longest = Order::new(u64::MAX, u64::MAX, MAX_LENGTH).unwrap();
        assert_eq!(longest.at(MAX_LENGTH - 1).unwrap(), 4_094_428_796_282_004_647);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_order_is_a_permutation(seed: u64, epoch: u64, length in 0u64..5000) {
            prop_assert!(is_permutation(&all(seed, epoch, length)));
        }

        #[test]
        fn another_epoch_and_another_seed_have_another_order(seed: u64, epoch: u64, length in 30u64..2000) {
            let order = all(seed, epoch, length);
            prop_assert_ne!(&order, &all(seed, epoch.wrapping_add(1), length));
            prop_assert_ne!(&order, &all(seed.wrapping_add(1), epoch, length));
        }

        #[test]
        fn a_slice_is_the_elements_at_its_positions(seed: u64, length in 1u64..MAX_LENGTH, at: u64, count in 0u64..20) {
            let order = Order::new(seed, 0, length).unwrap();
            let start = at % length;
            let stop = (start + count).min(length);
            let slice: Vec<u64> = order.slice(start, stop).unwrap().collect();
            let each: Vec<u64> = (start..stop).map(|position| order.at(position).unwrap()).collect();
            prop_assert!(slice.iter().all(|&element| element < length));
            prop_assert_eq!(slice, each);
        }
    }
}
