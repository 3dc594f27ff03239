//! Writing a pack in one pass over memory, digested on its way, with the disk and the processor busy at once.
//!
//! Touches: one file, at every place of it once; the memory that it is given, read only. Some threads digest pieces of
//! the file, others write them: those that wait for the disk need no core. Memory that somebody else might change is
//! copied into an aligned buffer, digested there and written from there; a copy that nobody changes, and that lies as a
//! direct write needs it, is written from where it is. Either way what is digested is what is written.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::arena::Arena;
use crate::digest::{Assembly, Digest, GROUP};
use crate::error::{Error, Result};
use crate::storage::{DIRECT_ALIGNMENT, File};

/// Most threads that digest: beyond that, they are faster than any disk.
const MAX_DIGESTERS: usize = 4;
/// Pieces that are written at once from where they are: longer writes are faster, and these need no buffer.
const AT_ONCE: usize = 4;

/// The buffers that packs are written from, kept from one to the next.
#[derive(Debug)]
pub(super) struct Buffers {
    arena: Option<Arena>,
    piece: usize,
    writers: usize,
}

impl Buffers {
    /// Buffers of `piece` bytes each, for that many writes at a time; memory is taken at the first use.
    pub(super) fn new(piece: usize, writers: usize) -> Buffers {
        assert!(piece >= GROUP && writers > 0, "a group spans two pieces at most");
        Buffers {
            arena: None,
            piece,
            writers,
        }
    }

    fn take(&mut self, count: usize, path: &std::path::Path) -> Result<Vec<&mut [u8]>> {
        let needed = count * self.piece;
        if count > 0 && self.arena.as_ref().is_none_or(|arena| arena.len() < needed) {
            self.arena = None;
            let arena = Arena::new(needed).map_err(|error| Error::io("take memory to write", path, error))?;
            self.arena = Some(arena);
        }
        let Some(arena) = &mut self.arena else {
            return Ok(Vec::new());
        };
        Ok(arena
            .bytes_mut()
            .chunks_exact_mut(self.piece)
            .take(count)
            .collect())
    }
}

/// What of the file has which bytes, and what of their digests is known.
struct Job<'a> {
    file: &'a File,
    piece: usize,
    /// What of the file lies in memory that stays as it is, in the file's order.
    runs: Vec<Run<'a>>,
    /// Header, then storages; where each begins in the file.
    parts: Vec<&'a [u8]>,
    starts: Vec<usize>,
    length: usize,
    /// Of the storages, without the header.
    digests: Vec<Assembly>,
    /// Groups that lie in two pieces, by the second one's number.
    seams: Vec<Mutex<Seam>>,
}

/// Bytes that lie in memory as in the file, whatever parts they are of.
struct Run<'a> {
    /// Where they begin in the file.
    start: usize,
    bytes: &'a [u8],
}

/// The bytes of a group that two pieces bring.
#[derive(Debug, Default)]
struct Seam {
    bytes: Vec<u8>,
    arrived: usize,
}

/// Pieces on their way to the disk, between those who digest and those who write.
struct Line<'a, 'b> {
    job: &'a Job<'a>,
    state: Mutex<State<'a, 'b>>,
    changed: Condvar,
}

struct State<'a, 'b> {
    /// Number of the next piece to digest.
    next: usize,
    /// Where in the file those are written from where they are, and what.
    straight: VecDeque<(usize, &'a [u8])>,
    /// Digested, to be written; and empty again.
    filled: VecDeque<(usize, usize, &'b mut [u8])>,
    empty: Vec<&'b mut [u8]>,
    /// How many still digest.
    digesting: usize,
    failed: bool,
}

/// Writes header and storages one behind the other, and returns each storage's digest.
///
/// What of the storages lies in `still` nobody changes meanwhile.
///
/// Touches no byte of the file behind them; nothing is durable before the file is synced.
pub(super) fn write<'a>(
    file: &'a File,
    header: &'a [u8],
    storages: impl Iterator<Item = &'a [u8]>,
    still: Option<&'a [u8]>,
    buffers: &mut Buffers,
) -> Result<Vec<Digest>> {
    let job = Job::new(file, header, storages, still, buffers.piece);
    let straight = job.straight();
    let pieces = job.length.div_ceil(job.piece);
    let copied = (0..pieces).filter(|&piece| job.in_place(piece).is_none()).count();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let writers = buffers.writers.min(pieces);
    let digesters = cores.min(MAX_DIGESTERS).min(writers);
    let alone = writers < 2;
    let path = file.path();
    let empty = buffers.take(copied.min(if alone { 1 } else { writers + digesters }), &path)?;
    if alone {
        job.write_alone(empty, straight)?;
    } else {
        let line = Line {
            job: &job,
            state: Mutex::new(State {
                next: 0,
                straight,
                filled: VecDeque::new(),
                empty,
                digesting: digesters,
                failed: false,
            }),
            changed: Condvar::new(),
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..writers).map(|_| scope.spawn(|| line.write())).collect();
            for _ in 1..digesters {
                scope.spawn(|| line.digest());
            }
            line.digest();
            writers.into_iter().try_for_each(|writer| {
                writer
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
    }
    Ok(job.digests.iter().map(Assembly::finish).collect())
}

impl<'a, 'b> Line<'a, 'b> {
    /// Digests pieces until there are no more, or one could not be written.
    fn digest(&self) {
        let pieces = self.job.length.div_ceil(self.job.piece);
        let mut state = self.lock();
        while state.next < pieces && !state.failed {
            let piece = state.next;
            if let Some(bytes) = self.job.in_place(piece) {
                state.next += 1;
                drop(state);
                self.job.digest_in_place(piece, bytes);
                state = self.lock();
            } else if let Some(buffer) = state.empty.pop() {
                state.next += 1;
                drop(state);
                let filled = self.job.fill(piece, buffer);
                state = self.lock();
                state.filled.push_back((piece, filled, buffer));
                self.changed.notify_all();
            } else {
                state = self.wait(state);
            }
        }
        state.digesting -= 1;
        self.changed.notify_all();
    }

    /// Writes what there is to write until nothing more can come, or something could not be written.
    fn write(&self) -> Result<()> {
        let mut state = self.lock();
        while !state.failed {
            if let Some((piece, filled, buffer)) = state.filled.pop_front() {
                drop(state);
                let outcome = self
                    .job
                    .file
                    .write_all_at((piece * self.job.piece) as u64, &buffer[..filled]);
                state = self.lock();
                state.empty.push(buffer);
                self.told(&mut state, outcome)?;
            } else if let Some((offset, bytes)) = state.straight.pop_front() {
                drop(state);
                let outcome = self.job.file.write_all_at(offset as u64, bytes);
                state = self.lock();
                self.told(&mut state, outcome)?;
            } else if state.digesting == 0 {
                break;
            } else {
                state = self.wait(state);
            }
        }
        Ok(())
    }

    /// Lets the others know that a write is over.
    fn told(&self, state: &mut State, outcome: Result<()>) -> Result<()> {
        state.failed |= outcome.is_err();
        self.changed.notify_all();
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, State<'a, 'b>> {
        self.state.lock().expect("nothing panics with it")
    }

    fn wait<'g>(&'g self, state: MutexGuard<'g, State<'a, 'b>>) -> MutexGuard<'g, State<'a, 'b>> {
        self.changed.wait(state).expect("nothing panics with it")
    }
}

impl<'a> Job<'a> {
    fn new(
        file: &'a File,
        header: &'a [u8],
        storages: impl Iterator<Item = &'a [u8]>,
        still: Option<&'a [u8]>,
        piece: usize,
    ) -> Job<'a> {
        let parts: Vec<&[u8]> = std::iter::once(header).chain(storages).collect();
        let mut length = 0;
        let mut starts = Vec::with_capacity(parts.len());
        for part in &parts {
            starts.push(length);
            length += part.len();
        }
        let digest = |part: &&[u8]| Assembly::new(part.len() as u64);
        Job {
            file,
            piece,
            runs: still.map_or_else(Vec::new, |still| runs_in(still, &parts, &starts)),
            starts,
            length,
            digests: parts[1..].iter().map(digest).collect(),
            parts,
            seams: (0..length.div_ceil(piece)).map(|_| Mutex::default()).collect(),
        }
    }

    /// Writes everything on this thread, with one buffer.
    fn write_alone(
        &self,
        mut buffers: Vec<&mut [u8]>,
        straight: impl IntoIterator<Item = (usize, &'a [u8])>,
    ) -> Result<()> {
        for piece in 0..self.length.div_ceil(self.piece) {
            if let Some(bytes) = self.in_place(piece) {
                self.digest_in_place(piece, bytes);
                continue;
            }
            let filled = self.fill(piece, buffers[0]);
            self.file
                .write_all_at((piece * self.piece) as u64, &buffers[0][..filled])?;
        }
        straight
            .into_iter()
            .try_for_each(|(offset, bytes)| self.file.write_all_at(offset as u64, bytes))
    }

    /// The part that has the file's byte `at`, and which of its bytes that is.
    fn find(&self, at: usize) -> (usize, usize) {
        let part = self.starts.partition_point(|&begin| begin <= at) - 1;
        (part, at - self.starts[part])
    }

    /// A whole piece's bytes where it can be written from where they are.
    fn in_place(&self, piece: usize) -> Option<&'a [u8]> {
        self.in_memory(piece * self.piece, self.piece)
            .filter(|bytes| bytes.as_ptr().addr().is_multiple_of(DIRECT_ALIGNMENT))
    }

    /// The file's bytes from `start` on, where they lie in memory as there.
    fn in_memory(&self, start: usize, length: usize) -> Option<&'a [u8]> {
        let run = self
            .runs
            .partition_point(|run| run.start <= start)
            .checked_sub(1)?;
        let run = &self.runs[run];
        run.bytes.get(start - run.start..)?.get(..length)
    }

    /// All that is written from where it is, in as few writes as are worth it.
    fn straight(&self) -> VecDeque<(usize, &'a [u8])> {
        let mut found: VecDeque<(usize, &[u8])> = VecDeque::new();
        for piece in 0..self.length / self.piece {
            let Some(bytes) = self.in_place(piece) else {
                continue;
            };
            let start = piece * self.piece;
            if let Some((before, last)) = found.back_mut()
                && *before + last.len() == start
                && last.len() < AT_ONCE * self.piece
                && let Some(both) = self.in_memory(*before, last.len() + bytes.len())
            {
                *last = both;
            } else {
                found.push_back((start, bytes));
            }
        }
        found
    }

    /// Digests a piece that is written from where it is.
    fn digest_in_place(&self, piece: usize, bytes: &[u8]) {
        self.each_part(piece, bytes.len(), |part, from, range| {
            let bytes = &bytes[range];
            self.each_group(part, from, bytes.len(), |at, stop, group_end| {
                self.digest(piece, part, at, group_end, &bytes[at - from..stop - from]);
            });
        });
    }

    /// Copies what the file has in a piece into the buffer, digests it, and returns how much it is.
    fn fill(&self, piece: usize, buffer: &mut [u8]) -> usize {
        let filled = (self.length - piece * self.piece).min(self.piece);
        self.each_part(piece, filled, |part, from, range| {
            let (source, into) = (&self.parts[part][from..from + range.len()], &mut buffer[range]);
            if part == 0 {
                into.copy_from_slice(source); // The header's digest is in the layout.
                return;
            }
            self.each_group(part, from, source.len(), |at, stop, group_end| {
                let bytes = &mut into[at - from..stop - from];
                bytes.copy_from_slice(&source[at - from..stop - from]);
                self.digest(piece, part, at, group_end, bytes); // Still in the nearest cache.
            });
        });
        filled
    }

    /// Calls `visit` for each part that has a share in the first `length` bytes of a piece: which of the part's bytes is
    /// the share's first, and where the share is in the piece.
    fn each_part(&self, piece: usize, length: usize, mut visit: impl FnMut(usize, usize, Range<usize>)) {
        let start = piece * self.piece;
        let (mut part, mut from) = self.find(start);
        let mut done = 0;
        while done < length {
            let count = (self.parts[part].len() - from).min(length - done);
            visit(part, from, done..done + count);
            done += count;
            (part, from) = (part + 1, 0);
        }
    }

    /// Calls `visit` for each group that `count` bytes of a part, from its byte `from` on, have a share in: where the
    /// share begins and stops, and where the group ends.
    fn each_group(&self, part: usize, from: usize, count: usize, mut visit: impl FnMut(usize, usize, usize)) {
        let mut at = from;
        while at < from + count {
            let group_end = ((at / GROUP + 1) * GROUP).min(self.parts[part].len());
            let stop = group_end.min(from + count);
            visit(at, stop, group_end);
            at = stop;
        }
    }

    /// Digests a share of a group; one that is cut off goes to the seam.
    fn digest(&self, piece: usize, part: usize, at: usize, group_end: usize, bytes: &[u8]) {
        let storage = part - 1;
        if !at.is_multiple_of(GROUP) {
            self.sew(piece, storage, at, group_end, bytes); // It began in the piece before.
        } else if at + bytes.len() < group_end {
            self.sew(piece + 1, storage, at, group_end, bytes);
        } else {
            self.digests[storage].put(at / GROUP, bytes);
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

/// What of a file's parts lies in `memory`, those that lie there one behind the other as in the file as one.
fn runs_in<'a>(memory: &'a [u8], parts: &[&[u8]], starts: &[usize]) -> Vec<Run<'a>> {
    let mut found: Vec<(usize, Range<usize>)> = Vec::new();
    for (part, &start) in parts.iter().zip(starts).filter(|(part, _)| !part.is_empty()) {
        let at = part.as_ptr().addr().checked_sub(memory.as_ptr().addr());
        let Some(at) = at.filter(|at| at + part.len() <= memory.len()) else {
            continue;
        };
        match found.last_mut() {
            Some((first, range)) if range.end == at && *first + range.len() == start => {
                range.end += part.len()
            }
            _ => found.push((start, at..at + part.len())),
        }
    }
    let run = |(start, range): (usize, Range<usize>)| Run {
        start,
        bytes: &memory[range],
    };
    found.into_iter().map(run).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::storage::Directory;
    use crate::storage::faulty::{Fault, FaultyStorage};
    use crate::storage::memory::MemoryStorage;

    fn lengths() -> impl Strategy<Value = Vec<usize>> {
        let length = prop_oneof![0..20usize, 0..5000usize, (GROUP - 3)..(GROUP + 3), 0..(7 * GROUP)];
        proptest::collection::vec(length, 0..8)
    }

    /// Writes storages that lie one behind the other in an arena, from its byte `begin` on, and returns file and digests.
    fn written(
        storages: &[Vec<u8>],
        header: &[u8],
        begin: usize,
        still: bool,
        buffers: &mut Buffers,
    ) -> (Vec<u8>, Vec<Digest>) {
        let bytes = storages.concat();
        let mut arena = Arena::new(begin + bytes.len()).unwrap();
        arena.bytes_mut()[begin..begin + bytes.len()].copy_from_slice(&bytes);
        let still = still.then(|| arena.bytes());
        let mut rest = &arena.bytes()[begin..];
        let slices = storages.iter().map(|storage| {
            let (slice, behind) = rest.split_at(storage.len());
            rest = behind;
            slice
        });
        let memory = MemoryStorage::new();
        let file = Directory::new(Arc::new(memory.clone())).create_new("f").unwrap();
        let digests = write(&file, header, slices, still, buffers).unwrap();
        (memory.files()["f"].clone(), digests)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn every_cut_into_pieces_writes_the_same_file_and_digests(
            lengths in lengths(), header in 1..300usize, pieces in 1..4usize, odd in 0..70usize, writers in 1..4usize,
            still: bool, as_in_the_file: bool
        ) {
            let storages: Vec<Vec<u8>> = lengths
                .iter()
                .enumerate()
                .map(|(at, &length)| (0..length).map(|index| (index * (at + 3) / 5) as u8).collect())
                .collect();
            let header = vec![9; header];
            let mut buffers = Buffers::new(pieces * GROUP + odd, writers);
            let begin = if as_in_the_file { header.len() } else { 64 };
            let (file, digests) = written(&storages, &header, begin, still, &mut buffers);
            let expected: Vec<Digest> = storages.iter().map(|bytes| Digest::of(bytes)).collect();
            prop_assert_eq!(digests, expected);
            prop_assert!(file == [header, storages.concat()].concat());
        }
    }

    #[test]
    fn what_lies_in_memory_as_in_the_file_and_stays_is_written_from_there() {
        let header = vec![9; 128];
        // Few large storages or many small ones: it is all the same where they lie one behind the other.
        let large = vec![3, 11 * GROUP];
        let small = [vec![3], vec![0], vec![GROUP / 8; 88]].concat();
        for (lengths, (still, begin, from_there)) in [&large, &small]
            .into_iter()
            .flat_map(|lengths| [(true, 128, 10), (true, 64, 0), (false, 128, 0)].map(|case| (lengths, case)))
        {
            let mut arena = Arena::new(begin + 12 * GROUP).unwrap();
            arena.bytes_mut()[begin..][..3 + 11 * GROUP].fill(7);
            let mut rest = &arena.bytes()[begin..];
            let storages = lengths.iter().map(|&length| rest.split_off(..length).unwrap());
            let memory = MemoryStorage::new();
            let file = Directory::new(Arc::new(memory)).create_new("f").unwrap();
            let job = Job::new(&file, &header, storages, still.then(|| arena.bytes()), GROUP);
            let straight = job.straight();
            let total: usize = straight.iter().map(|(_, bytes)| bytes.len()).sum();
            assert_eq!(total, from_there * GROUP, "still {still}, from {begin}");
            assert!(straight.iter().all(|(_, bytes)| bytes.len() <= AT_ONCE * GROUP));
            if let Some((offset, _)) = straight.front() {
                assert_eq!((*offset, straight.len()), (GROUP, 3));
            }
        }
    }

    #[test]
    fn a_write_that_fails_ends_all_the_others() {
        // The disk refuses one write after the other, with threads in every stage; no call may wait forever.
        for nth in 0..11 {
            let faulty = FaultyStorage::new(Arc::new(MemoryStorage::new()));
            let file = Directory::new(Arc::new(faulty.clone())).create_new("f").unwrap();
            faulty.fail_at(nth, Fault::Device);
            let storage = vec![5; 9 * GROUP + 1]; // With the header, ten pieces.
            let mut buffers = Buffers::new(GROUP, 3);
            let outcome = write(&file, &[1; 64], std::iter::once(&*storage), None, &mut buffers);
            assert_eq!(outcome.is_err(), nth < 10, "write {nth}");
        }
    }
}
