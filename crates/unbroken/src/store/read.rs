//! Reading a checkpoint's bytes: every byte that is handed out was hashed on its way.
//!
//! Touches: packs, read only. First a plan: pieces of packs, each with the parts of storages that lie in it; a storage
//! may lie in several. Then several threads take the next piece: straight into its memory where the system's cache has
//! it, past that cache and from there into its memory where not. What is hashed is what lies in that memory afterwards.
//! Storages that are coded are read block by block: the frames of each block are hashed as they are, and so is the block.
//! While memory for them is made, the system is asked to fetch what comes first.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::parallel::each_in_parallel;
use super::{Checkpoint, OBJECTS, leaf_of, sample};
use crate::arena::{Arena, bring_in};
use crate::digest::{self, Assembly, Digest, GROUP, Hasher, TOGETHER};
use crate::error::{Error, Result};
use crate::format::coded::{self, BLOCK, Decoder};
use crate::format::manifest::{Coded, Layer, PackEntry, Pieces, Place, StorageEntry};
use crate::format::pack;
use crate::storage::{DIRECT_ALIGNMENT, Directory, Source, zeros};

/// Bytes that are read at a time: enough for a disk to be at its best, few enough to be in a cache when they are hashed.
const PIECE: usize = 16 * GROUP;
/// Bytes between two parts that are read along, because one read costs less than two.
const GAP: u64 = 16 << 10;
/// From this many bytes on, a disk is told what will be read while memory for it is made.
const WORTH_FETCHING: u64 = 32 << 20;
/// Most bytes that come into the system's cache by that.
const FETCHED_MOST: u64 = 256 << 20;

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

/// A frame of a block: which of the files has it, from which byte on, and how long it is.
struct Frame {
    source: usize,
    offset: u64,
    length: usize,
}

/// A block of a storage that is coded.
struct Block<'a> {
    /// Which of those that are hashed.
    index: usize,
    /// Which of its blocks.
    number: usize,
    width: usize,
    length: usize,
    /// Its frame in each layer.
    frames: Vec<Frame>,
    /// Where it goes; `None` where only its frames are looked at.
    bytes: Option<Target<'a>>,
}

/// What is read at once.
enum Item<'a> {
    Piece(Piece<'a>),
    Block(Block<'a>),
}

impl Item<'_> {
    /// Where the file has it.
    fn place(&self) -> (usize, u64) {
        match self {
            Item::Piece(piece) => (piece.source, piece.start),
            Item::Block(block) => {
                let last = block.frames.last().expect("a block has a frame");
                (last.source, last.offset)
            }
        }
    }
}

/// What is wanted of something that is hashed.
#[derive(Default)]
struct Wishes<'a> {
    parts: Vec<Wanted<'a>>,
    blocks: Vec<Block<'a>>,
}

impl<'a> Wishes<'a> {
    fn add(&mut self, others: Wishes<'a>) {
        self.parts.extend(others.parts);
        self.blocks.extend(others.blocks);
    }

    /// (bytes to read, what to read in the order in which the files have it).
    fn planned(self) -> (u64, Vec<Item<'a>>) {
        let parts: u64 = self.parts.iter().map(|wanted| wanted.length).sum();
        let blocks: usize = self.blocks.iter().map(|block| block.length).sum();
        let mut items: Vec<Item> = plan(self.parts).into_iter().map(Item::Piece).collect();
        items.extend(self.blocks.into_iter().map(Item::Block));
        items.sort_by_key(Item::place);
        (parts + blocks as u64, items)
    }
}

/// What was found of something that is hashed.
struct Found {
    bytes: Assembly,
    /// Digests of the frames of each layer, if it is coded.
    frames: Vec<Mutex<Vec<Digest>>>,
    /// A block that its frames do not make.
    undecoded: Mutex<Option<usize>>,
}

impl Found {
    /// Nothing yet.
    fn nothing(bytes: Assembly, layers: &[usize]) -> Found {
        let frames = |count: &usize| Mutex::new(vec![Digest([0; 32]); *count]);
        Found {
            bytes,
            frames: layers.iter().map(frames).collect(),
            undecoded: Mutex::default(),
        }
    }

    /// Digest of a layer's frames' digests.
    fn check(&self, layer: usize) -> Digest {
        let frames = self.frames[layer].lock().expect("nothing panics with it");
        check_of(&frames)
    }
}

/// What a layer is checked by.
pub(super) fn check_of(frames: &[Digest]) -> Digest {
    let mut hasher = Hasher::new();
    for frame in frames {
        hasher.update(&frame.0);
    }
    hasher.finish()
}

/// A thread's own memory, which its next piece finds as the last one left it.
#[derive(Default)]
struct Scratch {
    ordinary: Vec<u8>,
    /// On huge pages, aligned for reads past the system's cache.
    aligned: Option<Arena>,
    decoder: Option<Decoder>,
    block: Vec<u8>,
    differences: Vec<u8>,
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
fn read_all(sources: &[Source], found: &[Found], wishes: Wishes) -> Result<()> {
    let (total, items) = wishes.planned();
    each_in_parallel(total, items, |scratch: &mut Scratch, item| match item {
        Item::Piece(piece) => read_piece(scratch, sources, found, piece),
        Item::Block(block) => read_block(scratch, sources, &found[block.index], block),
    })
}

fn read_piece(scratch: &mut Scratch, sources: &[Source], found: &[Found], piece: Piece) -> Result<()> {
    let source = &sources[piece.source];
    let cold = source.is_cold(piece.start, piece.length);
    let mut parts = piece.parts;
    if let ([part], false) = (parts.as_mut_slice(), cold)
        && let Target::Memory(memory) = &mut part.bytes
    {
        bring_in(memory);
        source.read_exact_at(piece.start, memory)?;
        found[part.index].bytes.put(part.group, memory);
        return Ok(());
    }
    let bytes = scratch.read(source, piece.start, piece.length, cold)?;
    for part in parts {
        let (digest, bytes) = (&found[part.index].bytes, &bytes[part.at..part.at + part.length]);
        match part.bytes {
            Target::Nowhere => digest.put(part.group, bytes),
            Target::Memory(memory) => {
                bring_in(memory);
                let groups = memory.chunks_mut(GROUP).zip(bytes.chunks(GROUP));
                for (group, (memory, bytes)) in groups.enumerate() {
                    memory.copy_from_slice(bytes);
                    digest.put(part.group + group * (GROUP / digest.grain()), memory); // Still in a near cache.
                }
            }
        }
    }
    Ok(())
}

/// Reads a block's frames, and makes the block of them. That they do not make one is no error here: where their digests
/// are not what they should be, that is.
fn read_block(scratch: &mut Scratch, sources: &[Source], found: &Found, mut block: Block) -> Result<()> {
    let (mut memory, mut differences) = (
        std::mem::take(&mut scratch.block),
        std::mem::take(&mut scratch.differences),
    );
    let mut decoder = scratch.decoder.take().unwrap_or_default();
    let wanted = block.bytes.is_some();
    let bytes = match &mut block.bytes {
        Some(Target::Memory(bytes)) => {
            bring_in(bytes);
            &mut bytes[..]
        }
        _ => {
            memory.resize(block.length.max(memory.len()), 0);
            &mut memory[..block.length]
        }
    };
    let mut decoded = true;
    for (layer, frame) in block.frames.iter().enumerate() {
        let source = &sources[frame.source];
        let cold = source.is_cold(frame.offset, frame.length);
        let coded = scratch.read(source, frame.offset, frame.length, cold)?;
        found.frames[layer].lock().expect("nothing panics with it")[block.number] = Digest::of(coded);
        if wanted && layer == 0 {
            decoded = decoder.decode(coded, block.width, bytes).is_ok();
        } else if wanted {
            differences.resize(block.length.max(differences.len()), 0);
            let differences = &mut differences[..block.length];
            decoded = decoded && decoder.decode(coded, block.width, differences).is_ok();
            coded::add(differences, bytes, block.width);
            bytes.copy_from_slice(differences);
        }
    }
    if !decoded {
        *found.undecoded.lock().expect("nothing panics with it") = Some(block.number);
    } else if wanted {
        found
            .bytes
            .put(block.number * (BLOCK / found.bytes.grain()), bytes);
    }
    (scratch.block, scratch.differences, scratch.decoder) = (memory, differences, Some(decoder));
    Ok(())
}

/// What is wrong with bytes that were read.
struct Wrong {
    /// In which of the packs, if it is in one.
    pack: Option<u32>,
    expected: String,
    found: String,
}

impl StorageEntry {
    /// What is found of it, before anything is.
    fn found(&self) -> Found {
        let layers: Vec<usize> = match &self.place {
            Place::Whole { .. } | Place::Pieces(_) => Vec::new(),
            Place::Coded(coded) => coded.layers.iter().map(|layer| layer.frames.len()).collect(),
        };
        Found::nothing(Assembly::of_groups(self.length, self.grain()), &layers)
    }

    /// Bytes of the groups that it is hashed in.
    fn grain(&self) -> usize {
        match &self.place {
            Place::Whole { .. } | Place::Coded(_) => GROUP,
            Place::Pieces(pieces) => pieces.chunk as usize,
        }
    }

    /// Compares what each pack has with what it should, and all its bytes with its digest.
    fn judge(&self, found: &Found) -> Option<Wrong> {
        let wrong = |pack, expected: Digest, found: Digest| {
            (expected != found).then(|| Wrong {
                pack,
                expected: expected.short(),
                found: found.short(),
            })
        };
        let mut claims = Claim::of(self).into_iter().enumerate();
        let in_pack = claims
            .find_map(|(layer, (pack, claim))| wrong(Some(pack), claim.expected, claim.found(found, layer)));
        let undecoded = || {
            let block = (*found.undecoded.lock().expect("nothing panics with it"))?;
            Some(Wrong {
                pack: None,
                expected: self.digest.short(),
                found: format!("frames that make no block {block}"),
            })
        };
        in_pack
            .or_else(undecoded)
            .or_else(|| wrong(None, self.digest, found.bytes.finish()))
    }
}

/// What one storage wants; `source` says which file a pack is.
fn want<'a>(
    index: usize,
    entry: &StorageEntry,
    mut bytes: Target<'a>,
    mut source: impl FnMut(u32) -> Result<usize>,
) -> Result<Wishes<'a>> {
    let grain = entry.grain();
    let mut wishes = Wishes::default();
    if let Place::Coded(Coded { width, layers }) = &entry.place {
        let mut cursors = Vec::with_capacity(layers.len());
        for layer in layers {
            cursors.push((source(layer.pack)?, layer.frames_at()));
        }
        for (number, start) in (0..entry.length).step_by(BLOCK).enumerate() {
            let length = (entry.length - start).min(BLOCK as u64) as usize;
            let frames = cursors.iter_mut().map(|(source, frames)| {
                let (offset, length) = frames.next().expect("a layer has a frame for each block");
                Frame {
                    source: *source,
                    offset,
                    length,
                }
            });
            wishes.blocks.push(Block {
                index,
                number,
                width: *width as usize,
                length,
                frames: frames.collect(),
                bytes: Some(bytes.cut_off(length)),
            });
        }
        return Ok(wishes);
    }
    let mut at = 0;
    for (pack, offset, length) in entry.place.pieces(entry.length) {
        let bytes = bytes.cut_off(length as usize);
        wishes.parts.push(Wanted {
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
    Ok(wishes)
}

impl Layer {
    /// (offset, length) of each of its frames.
    fn frames_at(&self) -> impl Iterator<Item = (u64, usize)> {
        let mut offset = self.offset;
        self.frames.iter().map(move |length| {
            offset += length;
            (offset - length, *length as usize)
        })
    }
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
        let mut targets = targets;
        self.fill_all(self.checked(&mut targets)?).map(drop)
    }

    /// Reads everything it refers to, and compares each digest.
    ///
    /// # Errors
    ///
    /// `Damaged` for the first difference found.
    pub fn verify(&self) -> Result<()> {
        self.check_packs()?;
        self.fill_all(self.with_the_rest(Vec::new())).map(drop)
    }

    /// Reads everything it refers to, once, and compares each digest. Storages for which there is memory lie there
    /// afterwards.
    ///
    /// # Errors
    ///
    /// `Damaged` for the first difference found; the memory's content is unspecified then.
    pub fn verify_into(&self, targets: Vec<(usize, &mut [u8])>) -> Result<()> {
        self.check_packs()?;
        let mut targets = targets;
        let found = self.fill_all(self.with_the_rest(self.checked(&mut targets)?))?;
        self.note(found, &targets);
        Ok(())
    }

    /// Adds what nobody has memory for.
    fn with_the_rest<'a>(&self, targets: Vec<(usize, Target<'a>)>) -> Vec<(usize, Target<'a>)> {
        let storages = &self.manifest.storages;
        let mut all = targets;
        let mut seen: HashSet<&StorageEntry> = all.iter().map(|(storage, _)| &storages[*storage]).collect();
        for (storage, entry) in storages.iter().enumerate() {
            if seen.insert(entry) {
                all.push((storage, Target::Nowhere));
            }
        }
        all
    }

    /// Asks for memory for all of it, while the first bytes are on their way from the disk.
    pub(crate) fn lent_by<T>(&self, lend: impl FnOnce() -> T) -> T {
        if self.info.size_bytes < WORTH_FETCHING {
            return lend();
        }
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| self.fetch_until(&over));
            let lent = lend();
            over.store(true, Ordering::Relaxed);
            lent
        })
    }

    /// Has the system fetch what will be read first. What cannot be is told when it is read.
    fn fetch_until(&self, over: &AtomicBool) {
        let storages = self.manifest.storages.iter();
        let mut places: Vec<(u32, u64, u64)> = storages
            .flat_map(|entry| entry.place.pieces(entry.length))
            .collect();
        places.sort_unstable();
        let mut left = FETCHED_MOST;
        for pack in places.chunk_by(|before, after| before.0 == after.0) {
            let Ok(source) = open_pack(&self.directory, &self.manifest.packs[pack[0].0 as usize]) else {
                return;
            };
            for &(_, offset, length) in pack {
                for at in (offset..offset + length).step_by(PIECE) {
                    let length = (offset + length - at).min(PIECE as u64);
                    if over.load(Ordering::Relaxed) || left < length {
                        return;
                    }
                    left -= length;
                    source.fetch(at, length as usize);
                }
            }
        }
    }

    /// Refuses memory that does not have its storage's length.
    fn checked<'a>(&self, targets: &'a mut [(usize, &mut [u8])]) -> Result<Vec<(usize, Target<'a>)>> {
        let check = |(storage, memory): &'a mut (usize, &mut [u8])| {
            let (length, given) = (self.entry(*storage)?.length, memory.len());
            if given as u64 != length {
                return Err(Error::invalid(format!(
                    "storage {storage} has {length} bytes, its target {given}"
                )));
            }
            Ok((*storage, Target::Memory(memory)))
        };
        targets.iter_mut().map(check).collect()
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

    /// Reads and compares, and returns what each of those storages was found to be.
    fn fill_all(&self, targets: Vec<(usize, Target)>) -> Result<Vec<(usize, Assembly)>> {
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
        let mut wishes = Wishes::default();
        let mut storages = Vec::with_capacity(targets.len());
        for (index, (storage, bytes)) in targets.into_iter().enumerate() {
            wishes.add(want(index, self.entry(storage)?, bytes, &mut open)?);
            storages.push(storage);
        }
        let entries = storages.iter().map(|&storage| &self.manifest.storages[storage]);
        let found: Vec<Found> = entries.clone().map(StorageEntry::found).collect();
        read_all(&sources, &found, wishes)?;
        for ((&storage, entry), found) in storages.iter().zip(entries).zip(&found) {
            if let Some(wrong) = entry.judge(found) {
                let leaf = leaf_of(&self.manifest.tree, storage);
                let path = match wrong.pack {
                    Some(pack) => sources[packs[&pack]].path(),
                    None => self.info.path.clone(), // Each pack has what the manifest says, which cannot be.
                };
                return Err(Error::Damaged {
                    path,
                    part: leaf,
                    expected: wrong.expected,
                    found: wrong.found,
                });
            }
        }
        let found = found.into_iter().map(|found| found.bytes);
        Ok(storages.into_iter().zip(found).collect())
    }

    /// Keeps the chunks of what is in pieces, and samples of what lies in memory now, for a commit that goes on from it.
    fn note(&self, found: Vec<(usize, Assembly)>, read: &[(usize, &mut [u8])]) {
        let regions: Vec<&[u8]> = read.iter().map(|(_, bytes)| &**bytes).collect();
        let samples = digest::of_each(&regions, sample);
        let mut seen = self.seen.lock().expect("nothing panics with it");
        let storages = read.iter().map(|(storage, _)| *storage);
        seen.samples.extend(storages.zip(samples));
        let in_pieces = |storage: usize| matches!(self.manifest.storages[storage].place, Place::Pieces(_));
        let chunks = found.into_iter().filter(|(storage, _)| in_pieces(*storage));
        seen.chunks
            .extend(chunks.map(|(storage, found)| (storage, found.into_values().into())));
    }
}

/// What a manifest says of one pack: that it has bytes of a storage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Claim {
    expected: Digest,
    what: Claimed,
}

/// What of a storage a pack has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Claimed {
    /// All of it: the digest is the storage's. Or some of it: the digest is of those groups' values.
    Groups {
        /// The storage's length.
        length: u64,
        grain: usize,
        is_whole: bool,
        /// (first byte in the storage, first byte in the pack, length).
        parts: Vec<(u64, u64, u64)>,
    },
    /// A layer: the digest is of its frames' digests. Each frame's first byte in the pack, and its length.
    Frames(Vec<(u64, usize)>),
}

impl Claim {
    /// What a storage says of each pack that it is in, by the pack's index.
    pub(crate) fn of(entry: &StorageEntry) -> Vec<(u32, Claim)> {
        if let Place::Coded(Coded { layers, .. }) = &entry.place {
            let claim = |layer: &Layer| {
                let what = Claimed::Frames(layer.frames_at().collect());
                let expected = layer.check;
                (layer.pack, Claim { expected, what })
            };
            return layers.iter().map(claim).collect();
        }
        // (pack, digest, whether the digest is the storage's)
        let packs: Vec<(u32, Digest, bool)> = match &entry.place {
            Place::Pieces(Pieces { sources, .. }) => sources
                .iter()
                .map(|source| (source.pack, source.check, false))
                .collect(),
            place => place
                .whole()
                .map(|(pack, _)| (pack, entry.digest, true))
                .into_iter()
                .collect(),
        };
        let mut parts: Vec<Vec<(u64, u64, u64)>> = vec![Vec::new(); packs.len()];
        let mut at = 0;
        for (pack, offset, length) in entry.place.pieces(entry.length) {
            let of_pack = packs.iter().position(|(number, ..)| *number == pack);
            parts[of_pack.expect("every piece is in a pack of its storage")].push((at, offset, length));
            at += length;
        }
        let claim = |((pack, expected, is_whole), parts): ((u32, Digest, bool), _)| {
            let what = Claimed::Groups {
                length: entry.length,
                grain: entry.grain(),
                is_whole,
                parts,
            };
            (pack, Claim { expected, what })
        };
        packs.into_iter().zip(parts).map(claim).collect()
    }

    /// What is found of a storage of which only this is looked at, before anything is.
    fn nothing(&self) -> Found {
        match &self.what {
            Claimed::Groups { length, grain, .. } => {
                Found::nothing(Assembly::of_groups(*length, *grain), &[])
            }
            Claimed::Frames(frames) => Found::nothing(Assembly::new(0), &[frames.len()]),
        }
    }

    /// What is wanted to judge it alone, from the one file.
    fn wishes(&self, index: usize) -> Wishes<'static> {
        match &self.what {
            Claimed::Groups { grain, parts, .. } => {
                let part = |&(at, offset, length): &(u64, u64, u64)| Wanted {
                    index,
                    grain: *grain,
                    at,
                    source: 0,
                    offset,
                    length,
                    bytes: Target::Nowhere,
                };
                Wishes {
                    parts: parts.iter().map(part).collect(),
                    blocks: Vec::new(),
                }
            }
            Claimed::Frames(frames) => {
                let block = |(number, &(offset, length)): (usize, &(u64, usize))| Block {
                    index,
                    number,
                    width: 1,
                    length,
                    frames: vec![Frame {
                        source: 0,
                        offset,
                        length,
                    }],
                    bytes: None,
                };
                Wishes {
                    parts: Vec::new(),
                    blocks: frames.iter().enumerate().map(block).collect(),
                }
            }
        }
    }

    /// What there is in its place; `layer` is which of the storage's layers it is, if it is one.
    fn found(&self, found: &Found, layer: usize) -> Digest {
        match &self.what {
            Claimed::Frames(_) => found.check(layer),
            Claimed::Groups { is_whole: true, .. } => found.bytes.finish(),
            Claimed::Groups { grain, parts, .. } => {
                let groups = |&(at, _, length): &(u64, u64, u64)| {
                    let first = at as usize / grain;
                    first..first + (length as usize).div_ceil(*grain)
                };
                found.bytes.digest_of_values(parts.iter().map(groups))
            }
        }
    }
}

/// Reads one pack, alone, and compares what it holds with what manifests say of it.
///
/// # Errors
///
/// `Damaged`; where it is in a storage's bytes, the part is that claim's number: `storage 3`.
pub(crate) fn verify_pack(directory: &Directory, pack: &PackEntry, claims: &[Claim]) -> Result<()> {
    let sources = [check_pack(directory, pack)?];
    let found: Vec<Found> = claims.iter().map(Claim::nothing).collect();
    let mut wishes = Wishes::default();
    for (index, claim) in claims.iter().enumerate() {
        wishes.add(claim.wishes(index));
    }
    read_all(&sources, &found, wishes)?;
    for (index, (claim, found)) in claims.iter().zip(&found).enumerate() {
        let found = claim.found(found, 0);
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
    let wishes = want(0, entry, Target::Nowhere, |pack| Ok(pack as usize))?;
    let found = [entry.found()];
    read_all(&sources, &found, wishes)?;
    Ok(entry.judge(&found[0]).is_none())
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

/// What a thread digests at a time.
enum Work<'a> {
    /// A piece of a region, by its number.
    Piece(&'a Assembly, usize, &'a [u8]),
    /// Short regions.
    Short(&'a [(&'a [u8], &'a Assembly)]),
}

/// Digests each region, in groups of so many bytes, on several threads where there is much to hash.
pub(super) fn digest_all(regions: &[(&[u8], usize)]) -> Vec<Assembly> {
    let total = regions.iter().map(|(region, _)| region.len() as u64).sum();
    let digests: Vec<Assembly> = regions
        .iter()
        .map(|(region, grain)| Assembly::of_groups(region.len() as u64, *grain))
        .collect();
    let all = || regions.iter().map(|(region, _)| *region).zip(&digests);
    let short: Vec<(&[u8], &Assembly)> = all().filter(|(_, digest)| digest.is_short()).collect();
    let pieces = all()
        .filter(|(_, digest)| !digest.is_short())
        .flat_map(|(region, digest)| {
            let parts = region.chunks(PIECE).enumerate();
            parts.map(move |(index, part)| Work::Piece(digest, index, part))
        });
    let work = short.chunks(4 * TOGETHER).map(Work::Short).chain(pieces);
    let done = each_in_parallel(total, work.collect(), |(), work| {
        match work {
            Work::Piece(digest, index, part) => digest.put(index * (PIECE / digest.grain()), part),
            Work::Short(short) => {
                let regions: Vec<&[u8]> = short.iter().map(|(region, _)| *region).collect();
                for ((_, digest), found) in short.iter().zip(digest::of_short(&regions)) {
                    digest.put_digest(found);
                }
            }
        }
        Ok(())
    });
    done.expect("hashing memory cannot fail");
    digests
}
