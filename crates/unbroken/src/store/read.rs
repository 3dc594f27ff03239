//! Reading a checkpoint's bytes: every byte that is handed out was hashed on its way.
//!
//! Touches: packs, read only. Works on several threads where there is much to read, also within one storage.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Checkpoint, OBJECTS, leaf_of};
use crate::digest::{Assembly, Digest, GROUP};
use crate::error::{Error, Result};
use crate::format::manifest::{PackEntry, StorageEntry};
use crate::format::pack;
use crate::storage::{Directory, Source, zeros};

/// Bytes read and hashed at a time: small enough to be in the cache when they are hashed.
const PIECE: usize = 8 * GROUP;
/// Below this many bytes, starting threads costs more than it gains.
const WORTH_THREADS: u64 = 4 << 20;
/// Most threads that read or hash.
const MAX_THREADS: usize = 8;

/// Where one storage's bytes go.
enum Target<'a> {
    /// Into memory of the storage's length.
    Memory(&'a mut [u8]),
    /// Nowhere: only their digest matters.
    Nowhere,
}

/// A part of one storage that is read and hashed at once.
struct Piece<'a> {
    /// Which of the targets.
    target: usize,
    /// Which piece of it.
    index: usize,
    bytes: Target<'a>,
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

    /// Fills memory with verified bytes, each target of exactly its storage's length.
    ///
    /// # Errors
    ///
    /// `Damaged` names file and leaf; the memory's content is unspecified then.
    pub fn read_into(&self, targets: Vec<(usize, &mut [u8])>) -> Result<()> {
        for (storage, memory) in &targets {
            let length = self.entry(*storage)?.length;
            if memory.len() as u64 != length {
                let given = memory.len();
                return Err(Error::invalid(format!(
                    "storage {storage} has {length} bytes, its target {given}"
                )));
            }
        }
        self.fill_all(
            targets
                .into_iter()
                .map(|(storage, memory)| (storage, Target::Memory(memory)))
                .collect(),
        )
    }

    /// Reads everything it refers to, and compares each digest.
    ///
    /// # Errors
    ///
    /// `Damaged` for the first difference found.
    pub fn verify(&self) -> Result<()> {
        self.check_packs()?;
        let mut seen = std::collections::HashSet::new();
        let storages = self.manifest.storages.iter().enumerate();
        let once =
            storages.filter(|(_, entry)| seen.insert((entry.pack, entry.offset, entry.length, entry.digest)));
        self.fill_all(once.map(|(storage, _)| (storage, Target::Nowhere)).collect())
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
        let mut packs = HashMap::new();
        let mut total = 0;
        for (storage, _) in &targets {
            let entry = self.entry(*storage)?;
            total += entry.length;
            if let std::collections::hash_map::Entry::Vacant(vacant) = packs.entry(entry.pack) {
                vacant.insert(open_pack(
                    &self.directory,
                    &self.manifest.packs[entry.pack as usize],
                )?);
            }
        }
        let storages: Vec<usize> = targets.iter().map(|(storage, _)| *storage).collect();
        let entries = storages
            .iter()
            .map(|storage| self.entry(*storage))
            .collect::<Result<Vec<_>>>()?;
        let digests: Vec<Assembly> = entries.iter().map(|entry| Assembly::new(entry.length)).collect();
        let mut pieces = Vec::new();
        for (at, (_, target)) in targets.into_iter().enumerate() {
            cut(at, target, entries[at].length, &mut pieces);
        }
        // In the order in which the disk has them.
        pieces.sort_by_key(|piece| {
            (
                entries[piece.target].pack,
                entries[piece.target].offset,
                piece.index,
            )
        });
        each_in_parallel(total, pieces, |scratch, piece| {
            let entry = entries[piece.target];
            let start = (piece.index * PIECE) as u64;
            let memory = match piece.bytes {
                Target::Memory(memory) => memory,
                Target::Nowhere => {
                    let length = (entry.length - start).min(PIECE as u64) as usize;
                    scratch.resize(length.max(scratch.len()), 0);
                    &mut scratch[..length]
                }
            };
            packs[&entry.pack].read_exact_at(entry.offset + start, memory)?;
            digests[piece.target].put(piece.index * (PIECE / GROUP), memory);
            Ok(())
        })?;
        for (at, entry) in entries.iter().enumerate() {
            let found = digests[at].finish();
            if found != entry.digest {
                let leaf = leaf_of(&self.manifest.tree, storages[at]);
                return Err(damaged(&packs[&entry.pack], leaf, &entry.digest, &found));
            }
        }
        Ok(())
    }
}

/// Cuts what is to be read of one storage into pieces; nothing of an empty one.
fn cut<'a>(target: usize, bytes: Target<'a>, length: u64, pieces: &mut Vec<Piece<'a>>) {
    match bytes {
        Target::Memory(memory) => {
            let parts = memory.chunks_mut(PIECE).enumerate();
            pieces.extend(parts.map(|(index, part)| Piece {
                target,
                index,
                bytes: Target::Memory(part),
            }));
        }
        Target::Nowhere => {
            let count = length.div_ceil(PIECE as u64) as usize;
            pieces.extend((0..count).map(|index| Piece {
                target,
                index,
                bytes: Target::Nowhere,
            }));
        }
    }
}

/// Returns the digest of a part of a file.
pub(super) fn digest_on_disk(source: &Source, offset: u64, length: u64) -> Result<Digest> {
    let digest = Assembly::new(length);
    let mut pieces = Vec::new();
    cut(0, Target::Nowhere, length, &mut pieces);
    each_in_parallel(length, pieces, |scratch, piece| {
        let start = (piece.index * PIECE) as u64;
        scratch.resize((length - start).min(PIECE as u64) as usize, 0);
        source.read_exact_at(offset + start, scratch)?;
        digest.put(piece.index * (PIECE / GROUP), scratch);
        Ok(())
    })?;
    Ok(digest.finish())
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
    work: impl Fn(&mut Vec<u8>, T) -> Result<()> + Sync,
) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = cores.min(MAX_THREADS).min(items.len());
    if total_bytes < WORTH_THREADS || threads < 2 {
        let mut scratch = Vec::new();
        return items.into_iter().try_for_each(|item| work(&mut scratch, item));
    }
    let items = Mutex::new(items.into_iter());
    let failed = AtomicBool::new(false);
    let take_turns = || {
        let mut scratch = Vec::new();
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
