//! Reading a checkpoint's bytes: every byte that is handed out was hashed on its way.
//!
//! Touches: packs, read only. First a plan: pieces of packs, each with the parts of storages that lie in it; a storage
//! may lie in several. Then several threads take the next piece: straight into its memory where the system's cache has
//! it, past that cache and from there into its memory where not. What is hashed is what lies in that memory afterwards.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Checkpoint, OBJECTS, leaf_of};
use crate::arena::{Arena, bring_in};
use crate::digest::{Assembly, Digest, GROUP};
use crate::error::{Error, Result};
use crate::format::manifest::{PackEntry, Pieces, Place, StorageEntry};
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

/// Bytes of a file that are wanted: whole groups of what is hashed together.
struct Wanted<'a> {
    /// Which of those that are hashed.
    index: usize,
    /// Bytes of its groups.
    grain: usize,
    /// Where they begin in it, a whole number of groups.
    at: u64,
    /// Which of the files.
    source: usize,
    offset: u64,
    length: u64,
    bytes: Target<'a>,
}

/// Whole groups of what is wanted; its last group may be short.
struct Part<'a> {
    /// Which of those that are hashed.
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
    fn room(&self, source: usize, grain: usize, offset: u64, left: u64) -> usize {
        let near = self.start..=self.start + self.length as u64 + GAP;
        if source != self.source || !near.contains(&offset) {
            return 0;
        }
        let room = (self.start + PIECE as u64).saturating_sub(offset);
        let taken = if left <= room {
            left
        } else {
            room - room % grain as u64
        };
        taken as usize
    }
}

/// Plans the reading, in the order in which the files have it.
fn plan(wanted: Vec<Wanted>) -> Vec<Piece> {
    let mut wanted = wanted;
    wanted.sort_by_key(|wanted| (wanted.source, wanted.offset));
    let mut pieces: Vec<Piece> = Vec::new();
    for mut wanted in wanted {
        let mut from = 0;
        while from < wanted.length {
            let (offset, left) = (wanted.offset + from, wanted.length - from);
            let room = |piece: &Piece| piece.room(wanted.source, wanted.grain, offset, left);
            if pieces.last().is_none_or(|piece| room(piece) == 0) {
                pieces.push(Piece {
                    source: wanted.source,
                    start: offset,
                    length: 0,
                    parts: Vec::new(),
                });
            }
            let piece = pieces.last_mut().expect("one was just pushed");
            let length = room(piece);
            let at = (offset - piece.start) as usize;
            piece.length = piece.length.max(at + length);
            piece.parts.push(Part {
                index: wanted.index,
                group: (wanted.at + from) as usize / wanted.grain,
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

/// Reads what is wanted of what is hashed.
fn read_all(sources: &[Source], digests: &[Assembly], wanted: Vec<Wanted>) -> Result<()> {
    let total = wanted.iter().map(|wanted| wanted.length).sum();
    each_in_parallel(total, plan(wanted), |scratch, piece| {
        let source = &sources[piece.source];
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
                    let grain = digest.grain();
                    let groups = memory.chunks_mut(grain).zip(found.chunks(grain));
                    for (group, (memory, found)) in groups.enumerate() {
                        memory.copy_from_slice(found);
                        digest.put(part.group + group, memory); // Still in the nearest cache.
                    }
                }
            }
        }
        Ok(())
    })
}

/// What is wrong with bytes that were read.
struct Wrong {
    /// In which of the packs, if it is in one.
    pack: Option<u32>,
    expected: Digest,
    found: Digest,
}

impl StorageEntry {
    /// An assembly that sees what its packs have of it.
    fn assembly(&self) -> Assembly {
        Assembly::of_groups(self.length, self.grain())
    }

    /// Bytes of the groups that it is hashed in.
    fn grain(&self) -> usize {
        match &self.place {
            Place::Whole { .. } => GROUP,
            Place::Pieces(pieces) => pieces.chunk as usize,
        }
    }

    /// Compares all its bytes with its digest, and what each pack has with what it should.
    fn judge(&self, found: &Assembly) -> Option<Wrong> {
        let wrong = |pack, expected: Digest, found: Digest| {
            (expected != found).then_some(Wrong {
                pack,
                expected,
                found,
            })
        };
        let in_pack = |(pack, claim): &(u32, Claim)| wrong(Some(*pack), claim.expected, claim.found(found));
        Claim::of(self)
            .iter()
            .find_map(in_pack)
            .or_else(|| wrong(None, self.digest, found.finish()))
    }
}

/// What one storage wants; `source` says which file a pack is.
fn want<'a>(
    index: usize,
    entry: &StorageEntry,
    mut bytes: Target<'a>,
    mut source: impl FnMut(u32) -> Result<usize>,
) -> Result<Vec<Wanted<'a>>> {
    let grain = entry.grain();
    let (mut at, mut wanted) = (0, Vec::new());
    for (pack, offset, length) in entry.place.pieces(entry.length) {
        let bytes = bytes.cut_off(length as usize);
        wanted.push(Wanted {
            index,
            grain,
            at,
            source: source(pack)?,
            offset,
            length,
            bytes,
        });
        at += length;
    }
    Ok(wanted)
}

impl Checkpoint {
    /// Returns one storage's bytes, verified.
    ///
    /// # Errors
    ///
    /// `Damaged` names file and leaf.
    pub fn read(&self, storage: usize) -> Result<Vec<u8>> {
        let entry = self.entry(storage)?;
        // What is not there takes no memory.
        for (pack, ..) in entry.place.pieces(entry.length) {
            open_pack(&self.directory, &self.manifest.packs[pack as usize])?;
        }
        let mut bytes = zeros(entry.length).map_err(|error| Error::io("read", &self.info.path, error))?;
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
        let storages = &self.manifest.storages;
        let mut seen: HashSet<&StorageEntry> =
            targets.iter().map(|(storage, _)| &storages[*storage]).collect();
        for (storage, entry) in storages.iter().enumerate() {
            if seen.insert(entry) {
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
        self.manifest
            .packs
            .iter()
            .try_for_each(|entry| check_pack(&self.directory, entry).map(drop))
    }

    fn entry(&self, storage: usize) -> Result<&StorageEntry> {
        let count = self.manifest.storages.len();
        let missing = || Error::invalid(format!("storage {storage} of a checkpoint that has {count}"));
        self.manifest.storages.get(storage).ok_or_else(missing)
    }

    fn fill_all(&self, targets: Vec<(usize, Target)>) -> Result<()> {
        let mut packs: HashMap<u32, usize> = HashMap::new();
        let mut sources = Vec::new();
        let mut open = |pack: u32| {
            if let Some(source) = packs.get(&pack) {
                return Ok(*source);
            }
            sources.push(open_pack(&self.directory, &self.manifest.packs[pack as usize])?);
            packs.insert(pack, sources.len() - 1);
            Ok(sources.len() - 1)
        };
        let mut wanted = Vec::with_capacity(targets.len());
        let mut storages = Vec::with_capacity(targets.len());
        for (index, (storage, bytes)) in targets.into_iter().enumerate() {
            wanted.extend(want(index, self.entry(storage)?, bytes, &mut open)?);
            storages.push(storage);
        }
        let entries = storages.iter().map(|&storage| &self.manifest.storages[storage]);
        let digests: Vec<Assembly> = entries.clone().map(StorageEntry::assembly).collect();
        read_all(&sources, &digests, wanted)?;
        for ((&storage, entry), digest) in storages.iter().zip(entries).zip(&digests) {
            if let Some(wrong) = entry.judge(digest) {
                let leaf = leaf_of(&self.manifest.tree, storage);
                let path = match wrong.pack {
                    Some(pack) => sources[packs[&pack]].path(),
                    None => self.info.path.clone(), // Each pack has what the manifest says, which cannot be.
                };
                return Err(damaged(path, leaf, &wrong.expected, &wrong.found));
            }
        }
        for (storage, digest) in storages.into_iter().zip(digests) {
            self.note_chunks(storage, digest);
        }
        Ok(())
    }

    /// Keeps what was found of a storage in pieces, for a commit that goes on from it.
    fn note_chunks(&self, storage: usize, found: Assembly) {
        if let Place::Pieces(_) = self.manifest.storages[storage].place {
            let mut chunks = self.chunks.lock().expect("nothing panics with it");
            chunks.insert(storage, found.into_values().into());
        }
    }
}

/// What a manifest says of one pack: that it has bytes of a storage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Claim {
    /// The storage's length.
    length: u64,
    grain: usize,
    /// Digest of the storage, or, where others have the rest of it, of its groups' values.
    expected: Digest,
    is_whole: bool,
    /// (first byte in the storage, first byte in the pack, length).
    parts: Vec<(u64, u64, u64)>,
}

impl Claim {
    /// What a storage says of each pack that it is in, by the pack's index.
    pub(crate) fn of(entry: &StorageEntry) -> Vec<(u32, Claim)> {
        let claim = |expected, is_whole| Claim {
            length: entry.length,
            grain: entry.grain(),
            expected,
            is_whole,
            parts: Vec::new(),
        };
        let mut claims: Vec<(u32, Claim)> = match &entry.place {
            Place::Whole { pack, .. } => vec![(*pack, claim(entry.digest, true))],
            Place::Pieces(Pieces { sources, .. }) => sources
                .iter()
                .map(|source| (source.pack, claim(source.check, false)))
                .collect(),
        };
        let mut at = 0;
        for (pack, offset, length) in entry.place.pieces(entry.length) {
            let of_pack = claims.iter_mut().find(|(number, _)| *number == pack);
            let (_, claim) = of_pack.expect("every piece is in a pack of its storage");
            claim.parts.push((at, offset, length));
            at += length;
        }
        claims
    }

    fn found(&self, digest: &Assembly) -> Digest {
        if self.is_whole {
            return digest.finish();
        }
        let groups = |&(at, _, length): &(u64, u64, u64)| {
            let first = at as usize / self.grain;
            first..first + (length as usize).div_ceil(self.grain)
        };
        digest.digest_of_values(self.parts.iter().map(groups))
    }
}

/// Reads one pack, alone, and compares what it holds with what manifests say of it.
///
/// # Errors
///
/// `Damaged`; where it is in a storage's bytes, the part is that claim's number: `storage 3`.
pub(crate) fn verify_pack(directory: &Directory, pack: &PackEntry, claims: &[Claim]) -> Result<()> {
    let sources = [check_pack(directory, pack)?];
    let assembly = |claim: &Claim| Assembly::of_groups(claim.length, claim.grain);
    let digests: Vec<Assembly> = claims.iter().map(assembly).collect();
    let wanted = claims.iter().enumerate().flat_map(|(index, claim)| {
        claim.parts.iter().map(move |&(at, offset, length)| Wanted {
            index,
            grain: claim.grain,
            at,
            source: 0,
            offset,
            length,
            bytes: Target::Nowhere,
        })
    });
    read_all(&sources, &digests, wanted.collect())?;
    for (index, (claim, digest)) in claims.iter().zip(&digests).enumerate() {
        let found = claim.found(digest);
        if found != claim.expected {
            let (path, part) = (sources[0].path(), format!("storage {index}"));
            return Err(damaged(path, part, &claim.expected, &found));
        }
    }
    Ok(())
}

/// Says whether the bytes of a storage are where it says, on packs that are open: those that `packs` says.
pub(super) fn is_there(directory: &Directory, packs: &[PackEntry], entry: &StorageEntry) -> Result<bool> {
    let mut sources = Vec::new();
    for pack in packs {
        sources.push(open_pack(directory, pack)?);
    }
    let wanted = want(0, entry, Target::Nowhere, |pack| Ok(pack as usize))?;
    let digests = [entry.assembly()];
    read_all(&sources, &digests, wanted)?;
    Ok(entry.judge(&digests[0]).is_none())
}

/// Opens a pack and checks its header.
fn check_pack(directory: &Directory, entry: &PackEntry) -> Result<Source> {
    let source = open_pack(directory, entry)?;
    let mut first = [0; 8];
    source.read_exact_at(0, &mut first)?;
    let length = pack::header_length(first)
        .map_err(|flaw| flaw.at(source.path()))?
        .min(entry.length);
    let mut header = vec![0; usize::try_from(length).expect("a header fits in memory")];
    source.read_exact_at(0, &mut header)?;
    let found = Digest::of(&header);
    if found != entry.header_digest {
        let (path, part) = (source.path(), "header".to_owned());
        return Err(damaged(path, part, &entry.header_digest, &found));
    }
    Ok(source)
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

fn damaged(path: PathBuf, part: String, expected: &Digest, found: &Digest) -> Error {
    Error::Damaged {
        path,
        part,
        expected: expected.short(),
        found: found.short(),
    }
}

/// Digests each region, in groups of so many bytes, on several threads where there is much to hash.
pub(super) fn digest_all(regions: &[(&[u8], usize)]) -> Vec<Assembly> {
    let total = regions.iter().map(|(region, _)| region.len() as u64).sum();
    let digests: Vec<Assembly> = regions
        .iter()
        .map(|(region, grain)| Assembly::of_groups(region.len() as u64, *grain))
        .collect();
    let pieces = regions.iter().zip(&digests).flat_map(|((region, _), digest)| {
        let parts = region.chunks(PIECE).enumerate();
        parts.map(move |(index, part)| (digest, index, part))
    });
    let done = each_in_parallel(total, pieces.collect(), |_, (digest, index, part)| {
        digest.put(index * (PIECE / digest.grain()), part);
        Ok(())
    });
    done.expect("hashing memory cannot fail");
    digests
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
