//! When two states are the same: BLAKE3 for what is stored, xxh3-128 for what is compared in memory.
//!
//! Touches: the bytes it is given, read only. A [`Digest`] holds against malice as well as accidents and names things on
//! disk; a [`Fingerprint`] is several times faster, holds against accidents only, and never names anything.

mod short;

use std::fmt;
use std::hash::BuildHasher;
use std::str::FromStr;
use std::sync::Mutex;

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

pub(crate) use self::short::{SHORT, TOGETHER, of_short};
use crate::error::Error;

/// A BLAKE3 digest, 32 bytes. Shown as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Digest of one byte string.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(blake3::hash(bytes).into())
    }

    /// The first 16 hexadecimal digits: enough for names and for people.
    pub fn short(&self) -> String {
        hex(&self.0[..8])
    }

    /// All 64 hexadecimal digits.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = Error;

    /// Reads 64 lower-case hexadecimal digits.
    fn from_str(text: &str) -> Result<Digest, Error> {
        unhex(text)
            .map(Digest)
            .ok_or_else(|| Error::invalid(format!("`{text}` is not a digest (64 hex digits)")))
    }
}

/// Hashes what begins with a digest for a map: a digest's first bytes are as good a hash as any, and at hand.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scattered;

impl BuildHasher for Scattered {
    type Hasher = FirstBytes;

    fn build_hasher(&self) -> FirstBytes {
        FirstBytes(0)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FirstBytes(u64);

impl std::hash::Hasher for FirstBytes {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 ^= u64::from_le_bytes(*first);
        }
    }

    // Lengths: equal bytes have equal ones.
    fn write_u64(&mut self, _: u64) {}

    fn write_usize(&mut self, _: usize) {}
}

/// Takes the digest of bytes that arrive in pieces. Equal to [`Digest::of`] over the pieces laid end to end.
#[derive(Clone, Debug, Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Hasher {
        Hasher::default()
    }

    /// Takes the next piece.
    pub fn update(&mut self, bytes: &[u8]) -> &mut Hasher {
        self.0.update(bytes);
        self
    }

    /// Digest of everything so far.
    pub fn finish(&self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// Bytes that an [`Assembly`] takes as one group: enough to hash at full speed, few enough to keep aside.
pub const GROUP: usize = 64 << 10;

/// Takes the digest of a byte string of known length whose groups arrive in any order, from any thread.
///
/// Equal to [`Digest::of`] over the whole: BLAKE3 is a tree, and a group is one of its subtrees.
#[derive(Debug)]
pub struct Assembly {
    length: u64,
    /// Bytes of a group.
    grain: usize,
    /// The subtrees' values; of a string of one group, the digest itself.
    groups: Mutex<Vec<ChainingValue>>,
}

impl Assembly {
    /// An assembly that has seen nothing.
    pub fn new(length: u64) -> Assembly {
        Assembly::of_groups(length, GROUP)
    }

    /// An assembly whose groups have `grain` bytes, a power of two from 1024 on. It has seen nothing.
    pub fn of_groups(length: u64, grain: usize) -> Assembly {
        assert!(grain >= 1024 && grain.is_power_of_two(), "a group is a subtree");
        let count = usize::try_from(length.div_ceil(grain as u64)).expect("bytes in memory");
        Assembly {
            length,
            grain,
            groups: Mutex::new(vec![ChainingValue::default(); count.max(1)]),
        }
    }

    /// Bytes of the whole string.
    pub fn len(&self) -> usize {
        usize::try_from(self.length).expect("bytes in memory")
    }

    /// Whether that is none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes of a group.
    pub fn grain(&self) -> usize {
        self.grain
    }

    /// Each group's value, a digest of its bytes and its place. Of a string of one group, the digest.
    pub fn into_values(self) -> Vec<[u8; 32]> {
        self.groups.into_inner().expect("nothing panics with it")
    }

    /// Digest of the values of some groups, one after the other.
    pub fn digest_of_values(&self, groups: impl Iterator<Item = std::ops::Range<usize>>) -> Digest {
        let values = self.groups.lock().expect("nothing panics with it");
        let mut hasher = Hasher::new();
        for range in groups {
            hasher.update(values[range].as_flattened());
        }
        hasher.finish()
    }

    /// Whether it is the digest of bytes that are hashed faster with others: see [`of_short`].
    pub(crate) fn is_short(&self) -> bool {
        (1..SHORT as u64).contains(&self.length) && self.length <= self.grain as u64
    }

    /// Takes the digest of all bytes, of which there are not more than a group's.
    pub(crate) fn put_digest(&self, digest: Digest) {
        debug_assert!(self.length <= self.grain as u64, "a digest is no group's value");
        self.groups.lock().expect("nothing panics with it")[0] = digest.0;
    }

    /// Takes whole groups, from group number `first` on; the byte string's last one may be short.
    pub fn put(&self, first: usize, bytes: &[u8]) {
        if self.length <= self.grain as u64 {
            self.put_digest(Digest::of(bytes));
            return;
        }
        let hash = |(index, group): (usize, &[u8])| {
            let offset = ((first + index) * self.grain) as u64;
            let mut hasher = blake3::Hasher::new();
            hasher.set_input_offset(offset).update(group).finalize_non_root()
        };
        let values: Vec<ChainingValue> = bytes.chunks(self.grain).enumerate().map(hash).collect();
        self.groups.lock().expect("nothing panics with it")[first..first + values.len()]
            .copy_from_slice(&values);
    }

    /// The digest, when every group has been put.
    pub fn finish(&self) -> Digest {
        let groups = self.groups.lock().expect("nothing panics with it");
        match self.length {
            0 => Digest::of(&[]),
            length if length <= self.grain as u64 => Digest(groups[0]),
            length => {
                let (left, right) = halves(&groups, length, self.grain);
                Digest(hazmat::merge_subtrees_root(&left, &right, Mode::Hash).into())
            }
        }
    }
}

/// The values of the two subtrees below the root of a tree over more than one group.
fn halves(groups: &[ChainingValue], length: u64, grain: usize) -> (ChainingValue, ChainingValue) {
    let left = hazmat::left_subtree_len(length);
    let (first, second) = groups.split_at((left / grain as u64) as usize);
    (subtree(first, left, grain), subtree(second, length - left, grain))
}

fn subtree(groups: &[ChainingValue], length: u64, grain: usize) -> ChainingValue {
    if groups.len() == 1 {
        return groups[0];
    }
    let (left, right) = halves(groups, length, grain);
    hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash)
}

/// An xxh3-128 hash in its canonical, big-endian form. Shown as 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 16]);

impl Fingerprint {
    /// Fingerprint of one region's bytes, without its length.
    pub fn of(region: &[u8]) -> Fingerprint {
        Fingerprint(xxh3_128(region).to_be_bytes())
    }

    /// One fingerprint over regions: each one's length (u64, little-endian) before its bytes, so that moving a byte
    /// from one region to the next changes it.
    pub fn of_regions(regions: &[&[u8]]) -> Fingerprint {
        let mut state = Xxh3::new();
        for region in regions {
            state.update(&(region.len() as u64).to_le_bytes());
            state.update(region);
        }
        Fingerprint(state.digest128().to_be_bytes())
    }

    /// One fingerprint over bytes `[start, start + length)` of the regions laid end to end, as a ring.
    ///
    /// `start` counts modulo the total; a window longer than the ring is cut to one turn. Lengths are not hashed.
    pub fn of_window(regions: &[&[u8]], start: u64, length: u64) -> Fingerprint {
        let total: u64 = regions.iter().map(|region| region.len() as u64).sum();
        let mut state = Xxh3::new();
        if total > 0 {
            let start = start % total;
            let length = length.min(total);
            let tail = length.min(total - start);
            update_range(&mut state, regions, start, tail);
            update_range(&mut state, regions, 0, length - tail);
        }
        Fingerprint(state.digest128().to_be_bytes())
    }

    /// Fingerprint of eight windows spread over a region, elsewhere for each seed; of all of a short one. A window has 64
    /// to 256 bytes, in a region of 16 KiB and less to one of 64 KiB and more. Different ones say that the bytes differ.
    /// Equal ones say nothing for sure.
    pub fn of_sample(region: &[u8], seed: u64) -> Fingerprint {
        let Some(windows) = windows(region, seed) else {
            return Fingerprint::of(region);
        };
        let (mut all, mut length) = ([0; WINDOWS * WIDEST], 0);
        for window in windows {
            all[length..length + window.len()].copy_from_slice(window);
            length += window.len();
        }
        Fingerprint::of(&all[..length])
    }

    /// The fingerprint of each window of [`Fingerprint::of_sample`]; of a short region, of all of it each time. How many
    /// differ says how much of a region has changed.
    pub fn of_windows(region: &[u8], seed: u64) -> [Fingerprint; WINDOWS] {
        windows(region, seed).map_or_else(
            || [Fingerprint::of(region); WINDOWS],
            |windows| windows.map(Fingerprint::of),
        )
    }
}

/// From so many regions on, looking at each of them is worth starting threads.
const WORTH_THREADS: usize = 1024;
/// Most threads that look: what they wait for is memory.
const MAX_THREADS: usize = 4;

/// Returns what `look` tells of each region, in their order; of many, on several threads.
pub(crate) fn of_each<R: Copy + Sync, T: Send>(regions: &[R], look: impl Fn(R) -> T + Sync) -> Vec<T> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = cores.min(MAX_THREADS);
    if regions.len() < WORTH_THREADS || threads < 2 {
        return regions.iter().map(|&region| look(region)).collect();
    }
    let look_at = |share: &[R]| share.iter().map(|&region| look(region)).collect::<Vec<T>>();
    let (own, others) = regions.split_at(regions.len().div_ceil(threads));
    std::thread::scope(|scope| {
        let shares = others.chunks(own.len());
        let helpers: Vec<_> = shares.map(|share| scope.spawn(move || look_at(share))).collect();
        let mut found = look_at(own);
        for helper in helpers {
            found.extend(
                helper
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
        }
        found
    })
}

/// Windows in a sample.
pub const WINDOWS: usize = 8;
/// Bytes that memory is read by, on nearly every machine, and of the narrowest window. A state of thousands of small
/// tensors is looked at while training stands still, and what takes the time is how many of these come from memory.
const CACHE_LINE: usize = 64;
/// Bytes of the widest window.
const WIDEST: usize = 256;

/// A sample of a region that is longer than that. Windows begin and end where cache lines do, if the region does.
fn windows(region: &[u8], seed: u64) -> Option<[&[u8]; WINDOWS]> {
    let lines = region.len() / WINDOWS / CACHE_LINE;
    let width = (region.len() >> 8).clamp(CACHE_LINE, WIDEST) / CACHE_LINE;
    if lines <= width {
        return None;
    }
    let shift = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % (lines - width + 1);
    let window = |index| {
        let start = (index * region.len() / WINDOWS / CACHE_LINE + shift) * CACHE_LINE;
        &region[start..start + width * CACHE_LINE]
    };
    let windows = std::array::from_fn(window);
    bring_near(&windows);
    Some(windows)
}

/// Reads a byte of each cache line of all windows: memory is asked for all of them at once. Hashing one after the other
/// waits for each, which takes more than twice as long, and a state of small tensors has thousands.
fn bring_near(windows: &[&[u8]; WINDOWS]) {
    let mut read = 0;
    for window in windows {
        read ^= window
            .iter()
            .step_by(CACHE_LINE)
            .fold(window[window.len() - 1], |all, byte| all ^ byte); // Its last line, where the region begins within one.
    }
    std::hint::black_box(read);
}

/// Hashes bytes `[start, start + length)` of regions laid end to end; the caller keeps the range inside them.
fn update_range(state: &mut Xxh3, regions: &[&[u8]], start: u64, length: u64) {
    let (mut skip, mut left) = (start, length);
    for region in regions {
        if left == 0 {
            return;
        }
        let size = region.len() as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        let taken = left.min(size - skip);
        state.update(&region[skip as usize..(skip + taken) as usize]);
        left -= taken;
        skip = 0;
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// Lower-case hexadecimal digits of bytes.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}

/// The bytes of exactly `2 * N` lower-case hexadecimal digits.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_many_regions_there_are_each_is_looked_at_in_its_place() {
        let bytes: Vec<u8> = (0..9000u32).map(|index| (index * 7 / 3) as u8).collect();
        for count in [0, 1, WORTH_THREADS, 3 * WORTH_THREADS + 1] {
            let regions: Vec<&[u8]> = (0..count)
                .map(|index| &bytes[index..index + index % 3000])
                .collect();
            let expected: Vec<Fingerprint> = regions.iter().map(|region| Fingerprint::of(region)).collect();
            assert_eq!(of_each(&regions, Fingerprint::of), expected);
        }
    }

    #[test]
    fn samples_are_of_eight_windows_inside_the_region_and_all_of_it_is_looked_at_in_time() {
        for length in [
            0,
            1,
            511,
            512,
            1023,
            1024,
            1100,
            12_500,
            16 << 10,
            40_000,
            65_536,
            70_001,
        ] {
            let region = vec![0u8; length];
            let mut looked_at = vec![length < 1024; length];
            for seed in 0..4000 {
                for window in windows(&region, seed).into_iter().flatten() {
                    let start = window.as_ptr().addr() - region.as_ptr().addr();
                    assert!((64..=256).contains(&window.len()), "{length}");
                    looked_at[start..start + window.len()].fill(true);
                }
            }
            // What is behind the last whole line of an eighth may be left out.
            let left_out = looked_at.iter().filter(|looked_at| !**looked_at).count();
            assert!(left_out <= WINDOWS * CACHE_LINE, "{left_out} of {length}");
            let mut changed = region.clone();
            if let Some(windows) = windows(&region, 7) {
                let start = windows[3].as_ptr().addr() - region.as_ptr().addr();
                changed[start + 5] ^= 1;
                let (before, now) = (
                    Fingerprint::of_windows(&region, 7),
                    Fingerprint::of_windows(&changed, 7),
                );
                let differ = (0..WINDOWS).filter(|&index| before[index] != now[index]);
                assert_eq!(differ.collect::<Vec<_>>(), [3]);
                assert_ne!(
                    Fingerprint::of_sample(&region, 7),
                    Fingerprint::of_sample(&changed, 7)
                );
            }
        }
    }

    #[test]
    fn groups_in_any_order_give_the_digest_of_the_whole() {
        let bytes: Vec<u8> = (0..5 * GROUP + 3).map(|index| (index * 31 / 7) as u8).collect();
        let lengths = [
            0,
            1,
            GROUP - 1,
            GROUP,
            GROUP + 1,
            2 * GROUP,
            3 * GROUP,
            4 * GROUP - 5,
            bytes.len(),
        ];
        for length in lengths {
            let bytes = &bytes[..length];
            for (run, grain) in [(1, GROUP), (2, GROUP), (6, GROUP), (3, 1024), (5, 8192)] {
                let assembly = Assembly::of_groups(length as u64, grain);
                let pieces: Vec<_> = bytes.chunks(run * grain).enumerate().collect();
                for (index, piece) in pieces.into_iter().rev() {
                    assembly.put(index * run, piece);
                }
                assert_eq!(
                    assembly.finish(),
                    Digest::of(bytes),
                    "{length} bytes in runs of {run} groups of {grain}"
                );
            }
        }
    }

    #[test]
    fn a_digest_survives_its_own_text() {
        let digest = Digest::of(b"");
        // Source: the empty input of BLAKE3's published test vectors.
        assert_eq!(
            digest.to_string(),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        );
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert_eq!(digest.short(), "af1349b9f5f9a1a6");
        assert!("AF1349".parse::<Digest>().is_err());
        assert!(digest.to_string().to_uppercase().parse::<Digest>().is_err());
    }

    #[test]
    fn pieces_hash_like_the_whole() {
        let bytes: Vec<u8> = (0..10_000u32).map(|i| (i * 7) as u8).collect();
        let mut hasher = Hasher::new();
        for piece in bytes.chunks(333) {
            hasher.update(piece);
        }
        assert_eq!(hasher.finish(), Digest::of(&bytes));
    }

    #[test]
    fn moving_a_byte_between_regions_changes_the_fingerprint() {
        let parted = Fingerprint::of_regions(&[b"ab", b"c"]);
        assert_ne!(parted, Fingerprint::of_regions(&[b"a", b"bc"]));
        assert_ne!(parted, Fingerprint::of_regions(&[b"ab", b"c", b""]));
        assert_eq!(parted, Fingerprint::of_regions(&[b"ab", b"c"]));
    }

    #[test]
    fn a_window_over_regions_equals_the_window_over_the_bytes_laid_end_to_end() {
        let bytes: Vec<u8> = (0..29).collect();
        let regions = [&bytes[..3], &bytes[3..3], &bytes[3..20], &bytes[20..]];
        for start in 0..60u64 {
            for length in 0..40u64 {
                let ring: Vec<u8> = (start..start + length.min(29)).map(|i| (i % 29) as u8).collect();
                assert_eq!(
                    Fingerprint::of_window(&regions, start, length),
                    Fingerprint::of(&ring),
                    "{start} {length}"
                );
            }
        }
        assert_eq!(Fingerprint::of_window(&[], 5, 7), Fingerprint::of(b""));
    }

    #[test]
    fn fingerprints_of_version_1_stay_as_they_are() {
        // Source: xxHash's XXH3_128bits of the empty input, canonical form.
        assert_eq!(
            Fingerprint::of(b"").to_string(),
            "99aa06d3014798d86001c324468d497f"
        );
    }
}
