//! Reading a checkpoint's bytes: every byte that is handed out was hashed on its way.
//!
//! Touches: packs, read only. First a plan: pieces of packs, each with the parts of storages that lie in it. Then several
//! threads take the next piece: straight into its memory where the system's cache has it, past that cache and from
//! there into its memory where not. What is hashed is what lies in that memory afterwards.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Checkpoint, OBJECTS, leaf_of};
use crate::arena::{Arena, bring_in};
use crate::digest::{Assembly, Digest, GROUP};
use crate::error::{Error, Result};
use crate::format::manifest::{PackEntry, StorageEntry};
use crate::format::pack;
use crate::storage::{DIRECT_ALIGNMENT, Directory, Source, zeros};

/// Bytes that are read at a time: enough for a disk to be at its best, few enough to be in a cache when they are hashed.
const PIECE: usize = 16 * GROUP;
/// Bytes between two parts that are read along, because one read costs less than two.
const GAP: u64 = 16 << 10;
/// Below this many bytes, starting threads costs more than it gains.
const WORTH_THREADS: u64 = 4 << 20;
/// Most threads that read or hash.
const MAX_THREADS: usize = 8;
/// As many reads are under way at least, however few cores there are.
const IN_FLIGHT: usize = 4;

/// Where bytes go.
enum Target<'a> {
    /// Into memory of their length.
    Memory(&'a mut [u8]),
    /// Nowhere: only their digest matters.
    Nowhere,
}

impl<'a> Target<'a> {
    /// Cuts off what the first `length` bytes go to.
    fn cut_off(&mut self, length: usize) -> Target<'a> {
        match self {
            Target::Nowhere => Target::Nowhere,
            Target::Memory(memory) => {
                let (first, rest) = std::mem::take(memory).split_at_mut(length);
                *memory = rest;
                Target::Memory(first)
            }
        }
    }
}

/// Bytes of a file that are wanted, and hashed together.
struct Wanted<'a> {
    /// Which of the files.
    source: usize,
    offset: u64,
    length: u64,
    bytes: Target<'a>,
}

/// Whole groups of what is wanted; its last group may be short.
struct Part<'a> {
    /// Which of those wanted.
    index: usize,
    /// Number of its first group.
    group: usize,
    /// Where it begins in its piece.
    at: usize,
    length: usize,
    bytes: Target<'a>,
}

/// Parts that lie close to each other in one file and are read at once.
struct Piece<'a> {
    source: usize,
    start: u64,
    length: usize,
    parts: Vec<Part<'a>>,
}

impl Piece<'_> {
    /// How many of `left` bytes from `offset` on it can take: all, or whole groups, or none.
    fn room(&self, source: usize, offset: u64, left: u64) -> usize {
        let near = self.start..=self.start + self.length as u64 + GAP;
        if source != self.source || !near.contains(&offset) {
            return 0;
        }
        let room = (self.start + PIECE as u64).saturating_sub(offset);
        let taken = if left <= room {
            left
        } else {
            room - room % GROUP as u64
        };
        taken as usize
    }
}

/// Plans the reading, in the order in which the files have it.
fn plan(wanted: Vec<Wanted>) -> Vec<Piece> {
    let mut wanted: Vec<_> = wanted.into_iter().enumerate().collect();
    wanted.sort_by_key(|(_, wanted)| (wanted.source, wanted.offset));
    let mut pieces: Vec<Piece> = Vec::new();
    for (index, mut wanted) in wanted {
        let mut from = 0;
        while from < wanted.length {
            let (offset, left) = (wanted.offset + from, wanted.length - from);
            let fits = |piece: &Piece| piece.room(wanted.source, offset, left) > 0;
            if !pieces.last().is_some_and(fits) {
                pieces.push(Piece {
                    source: wanted.source,
                    start: offset,
                    length: 0,
                    parts: Vec::new(),
                });
            }
            let piece = pieces.last_mut().expect("one was just pushed");
            let length = piece.room(wanted.source, offset, left);
            let at = (offset - piece.start) as usize;
            piece.length = piece.length.max(at + length);
            piece.parts.push(Part {
                index,
                group: from as usize / GROUP,
                at,
                length,
                bytes: wanted.bytes.cut_off(length),
            });
            from += length as u64;
        }
    }
    pieces
}

/// A thread's own memory, which its next piece finds as the last one left it.
#[derive(Default)]
struct Scratch {
    ordinary: Vec<u8>,
    /// On huge pages, aligned for reads past the system's cache.
    aligned: Option<Arena>,
}

impl Scratch {
    /// Reads a piece.
    fn read(&mut self, source: &Source, start: u64, length: usize, cold: bool) -> Result<&[u8]> {
        if !cold {
            self.ordinary.resize(length.max(self.ordinary.len()), 0);
            source.read_exact_at(start, &mut self.ordinary[..length])?;
            return Ok(&self.ordinary[..length]);
        }
        let before = (start % DIRECT_ALIGNMENT as u64) as usize;
        let needed = before + length;
        let arena = match &mut self.aligned {
            Some(arena) => arena,
            none => {
                let made = Arena::new(PIECE + 2 * DIRECT_ALIGNMENT);
                none.insert(made.map_err(|error| Error::io("take memory to read", source.path(), error))?)
            }
        };
        let memory = &mut arena.bytes_mut()[..needed.next_multiple_of(DIRECT_ALIGNMENT)];
        source.read_past_cache(start - before as u64, memory, needed)?;
        Ok(&memory[before..needed])
    }
}

/// Reads what is wanted and returns the digest of each.
fn read_all(sources: &[&Source], wanted: Vec<Wanted>) -> Result<Vec<Digest>> {
    let total = wanted.iter().map(|wanted| wanted.length).sum();
    let digests: Vec<Assembly> = wanted.iter().map(|wanted| Assembly::new(wanted.length)).collect();
    each_in_parallel(total, plan(wanted), |scratch, piece| {
        let source = sources[piece.source];
        let cold = source.is_cold(piece.start, piece.length);
        let mut parts = piece.parts;
        if let ([part], false) = (parts.as_mut_slice(), cold)
            && let Target::Memory(memory) = &mut part.bytes
        {
            bring_in(memory);
            source.read_exact_at(piece.start, memory)?;
            digests[part.index].put(part.group, memory);
            return Ok(());
        }
        let found = scratch.read(source, piece.start, piece.length, cold)?;
        for part in parts {
            let (digest, found) = (&digests[part.index], &found[part.at..part.at + part.length]);
            match part.bytes {
                Target::Nowhere => digest.put(part.group, found),
                Target::Memory(memory) => {
                    bring_in(memory);
                    let groups = memory.chunks_mut(GROUP).zip(found.chunks(GROUP));
                    for (group, (memory, found)) in groups.enumerate() {
                        memory.copy_from_slice(found);
                        digest.put(part.group + group, memory); // Still in the nearest cache.
                    }
                }
            }
        }
        Ok(())
    })?;
    Ok(digests.iter().map(Assembly::finish).collect())
}

impl Checkpoint {
    /// Returns one storage's bytes, verified.
    ///
    /// # Errors
    ///
    /// `Damaged` names file and leaf.
    pub fn read(&self, storage: usize) -> Result<Vec<u8>> {
        let entry = self.entry(storage)?;
        let pack = open_pack(&self.directory, &self.manifest.packs[entry.pack as usize])?;
        let mut bytes = zeros(entry.length).map_err(|error| Error::io("read", pack.path(), error))?;
        self.fill_all(vec![(storage, Target::Memory(&mut bytes))])?;
        Ok(bytes)
    }

    /// Fills memory with verified bytes, each target of exactly its storage's length. Nothing else is read but what lies
    /// between them and costs no read of its own.
    ///
    /// # Errors
    ///
    /// `Damaged` names file and leaf; the memory's content is unspecified then.
    pub fn read_into(&self, targets: Vec<(usize, &mut [u8])>) -> Result<()> {
        self.fill_all(self.checked(targets)?)
    }

    /// Reads everything it refers to, and compares each digest.
    ///
    /// # Errors
    ///
    /// `Damaged` for the first difference found.
    pub fn verify(&self) -> Result<()> {
        self.verify_into(Vec::new())
    }

    /// Reads everything it refers to, once, and compares each digest. Storages for which there is memory lie there
    /// afterwards.
    ///
    /// # Errors
    ///
    /// `Damaged` for the first difference found; the memory's content is unspecified then.
    pub fn verify_into(&self, targets: Vec<(usize, &mut [u8])>) -> Result<()> {
        self.check_packs()?;
        let mut targets = self.checked(targets)?;
        let place = |entry: &StorageEntry| (entry.pack, entry.offset, entry.length, entry.digest);
        let mut seen: HashSet<_> = targets
            .iter()
            .map(|(storage, _)| place(&self.manifest.storages[*storage]))
            .collect();
        for (storage, entry) in self.manifest.storages.iter().enumerate() {
            if seen.insert(place(entry)) {
                targets.push((storage, Target::Nowhere));
            }
        }
        self.fill_all(targets)
    }

    /// Refuses memory that does not have its storage's length.
    fn checked<'a>(&self, targets: Vec<(usize, &'a mut [u8])>) -> Result<Vec<(usize, Target<'a>)>> {
        let check = |(storage, memory): (usize, &'a mut [u8])| {
            let (length, given) = (self.entry(storage)?.length, memory.len());
            if given as u64 != length {
                return Err(Error::invalid(format!(
                    "storage {storage} has {length} bytes, its target {given}"
                )));
            }
            Ok((storage, Target::Memory(memory)))
        };
        targets.into_iter().map(check).collect()
    }

    /// Checks that each pack is there, as long as it should be, with the header that the manifest names.
    pub fn check_packs(&self) -> Result<()> {
        for entry in &self.manifest.packs {
            let source = open_pack(&self.directory, entry)?;
            let mut first = [0; 8];
            source.read_exact_at(0, &mut first)?;
            let length = pack::header_length(first)
                .map_err(|flaw| flaw.at(source.path()))?
                .min(entry.length);
            let mut header = vec![0; usize::try_from(length).expect("a header fits in memory")];
            source.read_exact_at(0, &mut header)?;
            let found = Digest::of(&header);
            if found != entry.header_digest {
                return Err(damaged(
                    &source,
                    "header".to_owned(),
                    &entry.header_digest,
                    &found,
                ));
            }
        }
        Ok(())
    }

    fn entry(&self, storage: usize) -> Result<&StorageEntry> {
        let count = self.manifest.storages.len();
        let missing = || Error::invalid(format!("storage {storage} of a checkpoint that has {count}"));
        self.manifest.storages.get(storage).ok_or_else(missing)
    }

    fn fill_all(&self, targets: Vec<(usize, Target)>) -> Result<()> {
        let mut packs: HashMap<u32, usize> = HashMap::new();
        let mut sources = Vec::new();
        let mut wanted = Vec::with_capacity(targets.len());
        let mut storages = Vec::with_capacity(targets.len());
        for (storage, bytes) in targets {
            let entry = self.entry(storage)?;
            let source = match packs.get(&entry.pack) {
                Some(source) => *source,
                None => {
                    let pack = &self.manifest.packs[entry.pack as usize];
                    sources.push(open_pack(&self.directory, pack)?);
                    packs.insert(entry.pack, sources.len() - 1);
                    sources.len() - 1
                }
            };
            storages.push((storage, source));
            wanted.push(Wanted {
                source,
                offset: entry.offset,
                length: entry.length,
                bytes,
            });
        }
        let digests = read_all(&sources.iter().collect::<Vec<_>>(), wanted)?;
        for ((storage, source), found) in storages.into_iter().zip(digests) {
            let expected = &self.manifest.storages[storage].digest;
            if found != *expected {
                let leaf = leaf_of(&self.manifest.tree, storage);
                return Err(damaged(&sources[source], leaf, expected, &found));
            }
        }
        Ok(())
    }
}

/// Returns the digest of a part of a file.
pub(super) fn digest_on_disk(source: &Source, offset: u64, length: u64) -> Result<Digest> {
    let wanted = Wanted {
        source: 0,
        offset,
        length,
        bytes: Target::Nowhere,
    };
    Ok(read_all(&[source], vec![wanted])?[0])
}

/// Opens a pack that is as long as its manifest says.
pub(super) fn open_pack(directory: &Directory, entry: &PackEntry) -> Result<Source> {
    let source = directory.open(&format!("{OBJECTS}/{}", entry.name))?;
    let length = source.len()?;
    if length != entry.length {
        let (expected, found) = (format!("{} bytes long", entry.length), format!("{length} bytes"));
        return Err(Error::Damaged {
            path: source.path(),
            part: "pack".to_owned(),
            expected,
            found,
        });
    }
    Ok(source)
}

fn damaged(source: &Source, part: String, expected: &Digest, found: &Digest) -> Error {
    Error::Damaged {
        path: source.path(),
        part,
        expected: expected.short(),
        found: found.short(),
    }
}

/// Returns the digest of each region, on several threads where there is much to hash.
pub(super) fn digest_all(regions: &[&[u8]]) -> Vec<Digest> {
    let total = regions.iter().map(|region| region.len() as u64).sum();
    let digests: Vec<Assembly> = regions
        .iter()
        .map(|region| Assembly::new(region.len() as u64))
        .collect();
    let pieces = regions.iter().zip(&digests).flat_map(|(region, digest)| {
        let parts = region.chunks(PIECE).enumerate();
        parts.map(move |(index, part)| (digest, index, part))
    });
    let done = each_in_parallel(total, pieces.collect(), |_, (digest, index, part)| {
        digest.put(index * (PIECE / GROUP), part);
        Ok(())
    });
    done.expect("hashing memory cannot fail");
    digests.iter().map(Assembly::finish).collect()
}

/// Does `work` on each item, on several threads if `total_bytes` is worth it. The first error stops the rest. Each thread
/// has memory of its own, which its next item finds as the last one left it.
fn each_in_parallel<T: Send>(
    total_bytes: u64,
    items: Vec<T>,
    work: impl Fn(&mut Scratch, T) -> Result<()> + Sync,
) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = cores.clamp(IN_FLIGHT, MAX_THREADS).min(items.len());
    if total_bytes < WORTH_THREADS || threads < 2 {
        let mut scratch = Scratch::default();
        return items.into_iter().try_for_each(|item| work(&mut scratch, item));
    }
    let items = Mutex::new(items.into_iter());
    let failed = AtomicBool::new(false);
    let take_turns = || {
        let mut scratch = Scratch::default();
        while !failed.load(Ordering::Relaxed) {
            let Some(item) = items.lock().expect("nothing panics with it").next() else {
                break;
            };
            if let Err(error) = work(&mut scratch, item) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(take_turns)).collect();
        let own = take_turns();
        helpers.into_iter().fold(own, |outcome, helper| {
            let theirs = helper
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.and(theirs)
        })
    })
}
