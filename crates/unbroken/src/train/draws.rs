//! Random numbers from a key, for programs that have no generator of their own.
//!
//! Touches: nothing. A specification for ever: the same key gives the same numbers on every machine and in every
//! release. `docs/guide/rust.md`, "Draws", has it in words.

/// A stream of random numbers that is a pure function of a key of 32 bytes.
///
/// The stream is BLAKE3's extendable output, keyed with the key, over the empty input, read as little-endian words.
#[derive(Clone, Debug)]
pub struct Draws {
    output: blake3::OutputReader,
    block: [u8; Draws::BLOCK],
    used: usize,
}

impl Draws {
    const BLOCK: usize = 512;

    /// The stream of a key.
    pub fn new(key: [u8; 32]) -> Draws {
        let output = blake3::Hasher::new_keyed(&key).finalize_xof();
        Draws {
            output,
            block: [0; Draws::BLOCK],
            used: Draws::BLOCK,
        }
    }

    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        if self.used == Draws::BLOCK {
            self.output.fill(&mut self.block);
            self.used = 0;
        }
        let word = self.block[self.used..self.used + 8]
            .try_into()
            .expect("eight bytes of a block");
        self.used += 8;
        u64::from_le_bytes(word)
    }

    /// The next number in [0, 1), a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.word() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// The next integer below `limit`, each as likely as the others.
    ///
    /// Source: Lemire, "Fast Random Integer Generation in an Interval" (2019), with rejection.
    ///
    /// # Panics
    ///
    /// Where `limit` is 0: there is no such integer.
    pub fn below(&mut self, limit: u64) -> u64 {
        assert!(limit > 0, "no integer is below 0");
        // Words below 2^64 mod limit would make some integers one word likelier than others.
        let rejected = limit.wrapping_neg() % limit;
        loop {
            let product = u128::from(self.word()) * u128::from(limit);
            if product as u64 >= rejected {
                return (product >> 64) as u64;
            }
        }
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.uniform() < probability
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_of_version_1_stays_as_it_is() {
        let mut draws = Draws::new([7; 32]);
        let first: Vec<u64> = (0..3).map(|_| draws.word()).collect();
        let mut bytes = [0; 24];
        blake3::Hasher::new_keyed(&[7; 32])
            .finalize_xof()
            .fill(&mut bytes);
        let expected: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(first, expected);
        assert_eq!(first[0], GOLDEN);
    }

    const GOLDEN: u64 = 0xe422_3c84_9286_dc29;

    #[test]
    fn a_long_stream_is_the_same_as_one_read_across_blocks() {
        let mut draws = Draws::new([1; 32]);
        let words: Vec<u64> = (0..200).map(|_| draws.word()).collect();
        let mut bytes = vec![0; 1600];
        blake3::Hasher::new_keyed(&[1; 32])
            .finalize_xof()
            .fill(&mut bytes);
        for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
            assert_eq!(word.to_le_bytes(), bytes);
        }
    }

    #[test]
    fn integers_below_a_limit_are_all_there_and_evenly_often() {
        let mut draws = Draws::new([3; 32]);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[draws.below(7) as usize] += 1;
        }
        // Six standard deviations of a binomial count around 10 000.
        assert!(
            counts.iter().all(|count| count.abs_diff(10_000) < 560),
            "{counts:?}"
        );
        assert!((0..1000).all(|_| (0.0..1.0).contains(&draws.uniform())));
    }
}
