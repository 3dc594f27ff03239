//! Large storages that change in few places: which chunks are written again, and where all of them are then.
//!
//! Touches: nothing; decisions over what is known. A chunk is written where its bytes are others than at the last commit,
//! or where the pack that has it is hardly used for anything else any more: so a storage's bytes on the disk are bounded,
//! and so is what is written beside what changed.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::Known;
use crate::digest::{Digest, GROUP, Hasher};
use crate::format::manifest::{MAX_PIECES, PackEntry, Piece, Pieces, Place, Source};

/// Bytes of a chunk: few rows of a table, and as many as BLAKE3 hashes at full speed.
const CHUNK: usize = 8 << 10;
/// Larger storages have larger chunks rather than more of them, up to [`GROUP`].
const MAX_CHUNKS: usize = 1 << 15;
/// The most packs that pieces of one commit lie in. Each is an open file while they are read.
const MAX_SOURCES: usize = 32;
/// A pack of which less than one part in so many is in use is no longer relied on.
///
/// What is written beside what changed is then at most a third of all that was written: half of what changed.
const IN_USE: u64 = 3;

/// A digest of each chunk of a storage.
pub(super) type Chunks = Arc<[[u8; 32]]>;

/// Bytes of the chunks of a large storage of `length` bytes.
pub(super) fn chunk_size(length: usize) -> usize {
    length
        .div_ceil(MAX_CHUNKS)
        .next_power_of_two()
        .clamp(CHUNK, GROUP)
}

/// How a storage that the last commit had comes into the next one.
#[derive(Debug)]
pub(super) struct Renewal {
    /// Its index.
    pub storage: usize,
    length: u64,
    chunk: usize,
    values: Chunks,
    /// The packs that it was in.
    packs: Arc<[PackEntry]>,
    /// Where each chunk is: index of the pack and offset; `None` where it is written.
    places: Vec<Option<(u32, u64)>>,
}

impl Renewal {
    /// Compares a storage's chunks with those that are `known`; `None` where they cannot be compared.
    pub fn new(
        storage: usize,
        length: usize,
        (known, before): (Known, &Chunks),
        values: &Chunks,
    ) -> Option<Renewal> {
        if matches!(known.place, Place::Coded(_)) {
            return None; // Its chunks are nowhere as they are.
        }
        let chunk = chunk_size(length);
        let mut places = Vec::with_capacity(values.len());
        let pieces = known.place.pieces(length as u64);
        for (index, &(pack, offset, length)) in pieces.iter().enumerate() {
            if index + 1 < pieces.len() && !length.is_multiple_of(chunk as u64) {
                return None; // Of a release with other chunks.
            }
            let starts = (0..length).step_by(chunk);
            places.extend(starts.map(|start| Some((pack, offset + start))));
        }
        if before.len() != values.len() || places.len() != values.len() {
            return None;
        }
        for (place, (before, now)) in places.iter_mut().zip(before.iter().zip(values.iter())) {
            if before != now {
                *place = None;
            }
        }
        Some(Renewal {
            storage,
            length: length as u64,
            chunk,
            values: Arc::clone(values),
            packs: known.packs,
            places,
        })
    }

    fn bytes_of(&self, chunks: Range<usize>) -> Range<usize> {
        chunks.start * self.chunk..(chunks.end * self.chunk).min(self.length as usize)
    }

    /// (pack, bytes) of each chunk that stays where it is.
    fn kept(&self) -> impl Iterator<Item = (&PackEntry, u64)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(index, place)| {
            let (pack, _) = (*place)?;
            let bytes = self.bytes_of(index..index + 1);
            Some((&self.packs[pack as usize], bytes.len() as u64))
        })
    }

    /// The packs in which chunks stay.
    pub fn kept_in(&self) -> impl Iterator<Item = &PackEntry> {
        let used: HashSet<u32> = self.places.iter().flatten().map(|(pack, _)| *pack).collect();
        let packs = self.packs.iter().zip(0..);
        packs.filter_map(move |(pack, number)| used.contains(&number).then_some(pack))
    }

    /// Writes what is in packs of these names.
    fn leave(&mut self, names: &HashSet<String>) {
        for place in &mut self.places {
            if place.is_some_and(|(pack, _)| names.contains(&self.packs[pack as usize].name)) {
                *place = None;
            }
        }
    }

    /// The parts of the storage that are written, in its order.
    pub fn written(&self) -> Vec<Range<usize>> {
        let mut written: Vec<Range<usize>> = Vec::new();
        let places = self.places.iter().enumerate();
        for (index, _) in places.filter(|(_, place)| place.is_none()) {
            let bytes = self.bytes_of(index..index + 1);
            match written.last_mut() {
                Some(last) if last.end == bytes.start => last.end = bytes.end,
                _ => written.push(bytes),
            }
        }
        written
    }

    /// Whether it saves half of the storage.
    fn pays(&self) -> bool {
        let written: usize = self.written().iter().map(Range::len).sum();
        written as u64 * 2 <= self.length
    }

    /// Where all of it is, once what is written lies in pack `new`, one part behind the other from `offset` on. `number`
    /// says which numbers the other packs have.
    pub fn place(&self, new: u32, mut offset: u64, mut number: impl FnMut(&PackEntry) -> u32) -> Place {
        let mut packs: Vec<(u32, Hasher)> = Vec::new();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut numbers: Vec<Option<u32>> = vec![None; self.packs.len()]; // Of those that are still in use.
        for (index, (place, value)) in self.places.iter().zip(self.values.iter()).enumerate() {
            let length = self.bytes_of(index..index + 1).len() as u64;
            let (pack, from) = match *place {
                Some((pack, from)) => {
                    let at = pack as usize;
                    let old = *numbers[at].get_or_insert_with(|| number(&self.packs[at]));
                    (old, from)
                }
                None => {
                    offset += length;
                    (new, offset - length)
                }
            };
            let source = packs
                .iter()
                .position(|(number, _)| *number == pack)
                .unwrap_or_else(|| {
                    packs.push((pack, Hasher::new()));
                    packs.len() - 1
                });
            packs[source].1.update(value);
            match pieces.last_mut() {
                Some(last) if last.source as usize == source && last.offset + last.length == from => {
                    last.length += length;
                }
                _ => pieces.push(Piece {
                    source: source as u32,
                    offset: from,
                    length,
                }),
            }
        }
        let source = |(pack, hasher): (u32, Hasher)| Source {
            pack,
            check: hasher.finish(),
        };
        Place::Pieces(Pieces {
            chunk: self.chunk as u64,
            sources: packs.into_iter().map(source).collect(),
            pieces,
        })
    }

    /// How many pieces it will have.
    fn count(&self) -> usize {
        match self.place(u32::MAX, 0, index_among(&self.packs)) {
            Place::Pieces(pieces) => pieces.pieces.len(),
            _ => 1,
        }
    }
}

fn index_among(packs: &[PackEntry]) -> impl FnMut(&PackEntry) -> u32 {
    |pack| {
        let found = packs.iter().position(|other| other == pack);
        found.expect("it is one of them") as u32
    }
}

/// Decides which packs are still relied on, and returns the storages that are worth it; the others are written whole.
///
/// `used` are the bytes of each pack, by its name, that the rest of the commit is in.
pub(super) fn settle(mut renewals: Vec<Renewal>, used: &HashMap<String, u64>) -> Vec<Renewal> {
    let mut kept: HashMap<String, (u64, u64)> = HashMap::new();
    for (pack, bytes) in renewals.iter().flat_map(Renewal::kept) {
        match kept.get_mut(&pack.name) {
            Some((sum, _)) => *sum += bytes,
            None => drop(kept.insert(pack.name.clone(), (bytes, pack.length))),
        }
    }
    let in_use = |name: &str, bytes: u64| bytes + used.get(name).copied().unwrap_or(0);
    let (mut left, mut stay): (HashSet<String>, Vec<(u64, String)>) = Default::default();
    for (name, (bytes, length)) in kept {
        if in_use(&name, bytes).saturating_mul(IN_USE) < length {
            left.insert(name);
        } else {
            stay.push((bytes, name));
        }
    }
    if stay.len() >= MAX_SOURCES {
        stay.sort();
        let smallest = stay.drain(..stay.len() - MAX_SOURCES / 2);
        left.extend(smallest.map(|(_, name)| name));
    }
    for renewal in &mut renewals {
        renewal.leave(&left);
    }
    renewals.retain(Renewal::pays);
    let mut counted: Vec<(usize, Renewal)> = renewals
        .into_iter()
        .map(|renewal| (renewal.count(), renewal))
        .collect();
    counted.sort_by_key(|(count, renewal)| (*count, renewal.storage));
    let mut sum: usize = counted.iter().map(|(count, _)| count).sum();
    while sum > MAX_PIECES {
        sum -= counted.pop().map_or(0, |(count, _)| count);
    }
    counted.into_iter().map(|(_, renewal)| renewal).collect()
}

/// Digests of the parts of a storage that are written.
pub(super) fn digests_of(parts: &[Range<usize>], bytes: &[u8]) -> Vec<Digest> {
    parts
        .iter()
        .map(|part| Digest::of(&bytes[part.clone()]))
        .collect()
}
