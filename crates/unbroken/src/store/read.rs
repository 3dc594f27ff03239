//! Reading a checkpoint's bytes: every byte that is handed out was hashed on its way.
//!
//! Touches: packs, read only. Works on several threads where there is much to read.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::{Checkpoint, OBJECTS, leaf_of};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::format::manifest::{PackEntry, StorageEntry};
use crate::format::pack;
use crate::storage::{Directory, Source};

/// Bytes read and hashed at a time: small enough to be in the cache when they are hashed.
const PIECE: usize = 1 << 20;
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

impl Checkpoint {
    /// Returns one storage's bytes, verified.
    ///
    /// # Errors
    ///
    /// `Damaged` names file and leaf.
    pub fn read(&self, storage: usize) -> Result<Vec<u8>> {
        let entry = self.entry(storage)?;
        let pack = open_pack(&self.directory, &self.manifest.packs[entry.pack as usize])?;
        // The pack is as long as the manifest says and the storage lies in it: the length is backed by bytes on disk.
        let mut bytes =
            vec![0; usize::try_from(entry.length).expect("a storage that is on disk fits in memory")];
        self.fill(&pack, storage, &mut Target::Memory(&mut bytes))?;
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
        each_in_parallel(total, targets, |(storage, mut target)| {
            self.fill(&packs[&self.entry(storage)?.pack], storage, &mut target)
        })
    }

    fn fill(&self, pack: &Source, storage: usize, target: &mut Target) -> Result<()> {
        let entry = self.entry(storage)?;
        let found = match target {
            Target::Memory(memory) => {
                let mut hasher = Hasher::new();
                for (index, piece) in memory.chunks_mut(PIECE).enumerate() {
                    pack.read_exact_at(entry.offset + (index * PIECE) as u64, piece)?;
                    hasher.update(piece);
                }
                hasher.finish()
            }
            Target::Nowhere => digest_on_disk(pack, entry.offset, entry.length)?,
        };
        if found == entry.digest {
            return Ok(());
        }
        Err(damaged(
            pack,
            leaf_of(&self.manifest.tree, storage),
            &entry.digest,
            &found,
        ))
    }
}

/// Returns the digest of a part of a file.
pub(super) fn digest_on_disk(source: &Source, offset: u64, length: u64) -> Result<Digest> {
    let mut hasher = Hasher::new();
    let mut piece = vec![0; usize::try_from(length).map_or(PIECE, |length| length.min(PIECE))];
    let mut done = 0;
    while done < length {
        let count = usize::try_from(length - done).map_or(piece.len(), |left| left.min(piece.len()));
        source.read_exact_at(offset + done, &mut piece[..count])?;
        hasher.update(&piece[..count]);
        done += count as u64;
    }
    Ok(hasher.finish())
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
    let mut digests = vec![Digest([0; 32]); regions.len()];
    let work = regions.iter().zip(&mut digests).collect();
    let done = each_in_parallel(total, work, |(region, digest): (&&[u8], &mut Digest)| {
        *digest = Digest::of(region);
        Ok(())
    });
    done.expect("hashing memory cannot fail");
    digests
}

/// Does `work` on each item, on several threads if `total_bytes` is worth it. The first error stops the rest.
fn each_in_parallel<T: Send>(
    total_bytes: u64,
    items: Vec<T>,
    work: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = cores.min(MAX_THREADS).min(items.len());
    if total_bytes < WORTH_THREADS || threads < 2 {
        return items.into_iter().try_for_each(work);
    }
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let take_turns = || {
        while !failed.load(Ordering::Relaxed) {
            let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) else {
                break;
            };
            let item = item
                .lock()
                .expect("an item is taken once")
                .take()
                .expect("an item is taken once");
            if let Err(error) = work(item) {
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
