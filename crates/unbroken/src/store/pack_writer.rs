//! Writing a pack in one pass over memory: each piece is copied into an aligned buffer, digested there and written.
//!
//! Touches: one file, at every place of it once; the memory that it is given, read once. Several workers each take the
//! next piece of the file, so that one digests while another's write is under way. What is digested is what is written.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::arena::Arena;
use crate::digest::{Assembly, Digest, GROUP};
use crate::error::{Error, Result};
use crate::storage::File;

/// The buffers that packs are written from, kept from one to the next.
#[derive(Debug)]
pub(super) struct Buffers {
    arena: Option<Arena>,
    piece: usize,
    workers: usize,
}

impl Buffers {
    /// Buffers of `piece` bytes each for that many workers; memory is taken at the first use.
    pub(super) fn new(piece: usize, workers: usize) -> Buffers {
        assert!(piece >= GROUP && workers > 0, "a group spans two pieces at most");
        Buffers {
            arena: None,
            piece,
            workers,
        }
    }

    fn take(&mut self, count: usize, path: &std::path::Path) -> Result<impl Iterator<Item = &mut [u8]>> {
        let needed = count * self.piece;
        if self.arena.as_ref().is_none_or(|arena| arena.len() < needed) {
            self.arena = None;
            let arena = Arena::new(needed).map_err(|error| Error::io("take memory to write", path, error))?;
            self.arena = Some(arena);
        }
        let arena = self.arena.as_mut().expect("it was just made");
        Ok(arena.bytes_mut().chunks_exact_mut(self.piece).take(count))
    }
}

/// The pack while it is written.
struct Job<'a> {
    file: &'a File,
    piece: usize,
    /// Header, then storages; where each begins in the file.
    parts: Vec<&'a [u8]>,
    starts: Vec<usize>,
    length: usize,
    /// Of the storages, without the header.
    digests: Vec<Assembly>,
    /// Groups that lie in two pieces, by the second one's number.
    seams: Vec<Mutex<Seam>>,
    next: AtomicUsize,
    failed: AtomicBool,
}

/// The bytes of a group that two workers bring.
#[derive(Debug, Default)]
struct Seam {
    bytes: Vec<u8>,
    arrived: usize,
}

/// Writes header and storages one behind the other, and returns each storage's digest.
///
/// Touches no byte of the file behind them; nothing is durable before the file is synced.
pub(super) fn write<'a>(
    file: &File,
    header: &'a [u8],
    storages: impl Iterator<Item = &'a [u8]>,
    buffers: &mut Buffers,
) -> Result<Vec<Digest>> {
    let parts: Vec<&[u8]> = std::iter::once(header).chain(storages).collect();
    let mut length = 0;
    let mut starts = Vec::with_capacity(parts.len());
    for part in &parts {
        starts.push(length);
        length += part.len();
    }
    let pieces = length.div_ceil(buffers.piece);
    let job = Job {
        file,
        piece: buffers.piece,
        starts,
        length,
        digests: parts[1..]
            .iter()
            .map(|part| Assembly::new(part.len() as u64))
            .collect(),
        parts,
        seams: (0..pieces).map(|_| Mutex::default()).collect(),
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    };
    let workers = buffers.workers.min(pieces);
    let path = file.path();
    let mut memory = buffers.take(workers, &path)?;
    let own = memory.next().expect("at least one buffer");
    std::thread::scope(|scope| {
        let helpers: Vec<_> = memory.map(|buffer| scope.spawn(|| job.work(buffer))).collect();
        let outcome = job.work(own);
        helpers.into_iter().fold(outcome, |outcome, helper| {
            outcome.and(
                helper
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            )
        })
    })?;
    Ok(job.digests.iter().map(Assembly::finish).collect())
}

impl Job<'_> {
    /// Writes pieces until there are no more, or one could not be written.
    fn work(&self, buffer: &mut [u8]) -> Result<()> {
        while !self.failed.load(Ordering::Relaxed) {
            let piece = self.next.fetch_add(1, Ordering::Relaxed);
            let start = piece * self.piece;
            if start >= self.length {
                break;
            }
            let filled = (self.length - start).min(self.piece);
            self.fill(piece, start, &mut buffer[..filled]);
            if let Err(error) = self.file.write_all_at(start as u64, &buffer[..filled]) {
                self.failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Copies what the file has from `start` on into the buffer, and digests it.
    fn fill(&self, piece: usize, start: usize, buffer: &mut [u8]) {
        let mut part = self.starts.partition_point(|&begin| begin <= start) - 1;
        let mut done = 0;
        while done < buffer.len() {
            let from = start + done - self.starts[part];
            let count = (self.parts[part].len() - from).min(buffer.len() - done);
            self.copy(piece, part, from, &mut buffer[done..done + count]);
            done += count;
            part += 1;
        }
    }

    /// Copies bytes of one part, from its byte `from` on, and digests them; a group that is cut off goes to the seam.
    fn copy(&self, piece: usize, part: usize, from: usize, into: &mut [u8]) {
        let source = &self.parts[part][from..from + into.len()];
        let Some(storage) = part.checked_sub(1) else {
            return into.copy_from_slice(source); // The header's digest is in the layout.
        };
        let end = from + into.len();
        let mut at = from;
        while at < end {
            let group_end = ((at / GROUP + 1) * GROUP).min(self.parts[part].len());
            let stop = group_end.min(end);
            let bytes = &mut into[at - from..stop - from];
            bytes.copy_from_slice(&source[at - from..stop - from]);
            if !at.is_multiple_of(GROUP) {
                self.sew(piece, storage, at, group_end, bytes); // It began in the piece before.
            } else if stop < group_end {
                self.sew(piece + 1, storage, at, group_end, bytes);
            } else {
                self.digests[storage].put(at / GROUP, bytes); // Still in the nearest cache.
            }
            at = stop;
        }
    }

    /// Brings a part of a group; whoever brings the last one digests it.
    fn sew(&self, seam: usize, storage: usize, at: usize, group_end: usize, bytes: &[u8]) {
        let (group, within) = (at / GROUP, at % GROUP);
        let mut seam = self.seams[seam].lock().expect("nothing panics with it");
        seam.bytes.resize(group_end - group * GROUP, 0);
        seam.bytes[within..within + bytes.len()].copy_from_slice(bytes);
        seam.arrived += bytes.len();
        if seam.arrived == seam.bytes.len() {
            let whole = std::mem::take(&mut seam.bytes);
            drop(seam);
            self.digests[storage].put(group, &whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::storage::Directory;
    use crate::storage::memory::MemoryStorage;

    fn lengths() -> impl Strategy<Value = Vec<usize>> {
        let length = prop_oneof![0..20usize, 0..5000usize, (GROUP - 3)..(GROUP + 3), 0..(7 * GROUP)];
        proptest::collection::vec(length, 0..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn every_cut_into_pieces_writes_the_same_file_and_digests(
            lengths in lengths(), header in 1..300usize, pieces in 1..4usize, odd in 0..70usize, workers in 1..4usize
        ) {
            let storages: Vec<Vec<u8>> = lengths
                .iter()
                .enumerate()
                .map(|(at, &length)| (0..length).map(|index| (index * (at + 3) / 5) as u8).collect())
                .collect();
            let header = vec![9; header];
            let memory = MemoryStorage::new();
            let file = Directory::new(Arc::new(memory.clone())).create_new("f").unwrap();
            let mut buffers = Buffers::new(pieces * GROUP + odd, workers);
            let digests = write(&file, &header, storages.iter().map(Vec::as_slice), &mut buffers).unwrap();
            let expected: Vec<Digest> = storages.iter().map(|bytes| Digest::of(bytes)).collect();
            prop_assert_eq!(digests, expected);
            prop_assert!(memory.files()["f"] == [header, storages.concat()].concat());
        }
    }
}
