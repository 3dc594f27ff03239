//! Writing a pack in one pass over memory, digested on its way, with the disk and the processor busy at once.
//!
//! Touches: one file, at every place of it once; the memory that it is given, read only. Some threads digest pieces of
//! the file, others write them: those that wait for the disk need no core. Memory that somebody else might change is
//! copied into an aligned buffer, digested there and written from there; a copy that nobody changes, and that lies as a
//! direct write needs it, is written from where it is. Either way what is digested is what is written. Copies may be in
//! the making: those who digest begin with the first piece, those who write from a copy with the last one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::arena::Arena;
use crate::digest::{Assembly, GROUP, TOGETHER, of_short};
use crate::error::{Error, Result};
use crate::lending::{Bytes, Share};
use crate::storage::{DIRECT_ALIGNMENT, File};

/// Most threads that digest: beyond that, they are faster than any disk.
const MAX_DIGESTERS: usize = 4;
/// Bytes that are digested at a time of short parts: they are still in a near cache.
const BATCH: usize = 128 << 10;
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
    /// Where in memory a piece's bytes lie, or will, if they lie there as in the file, and aligned.
    places: Vec<Option<usize>>,
    /// Header, then storages; where each begins in the file.
    parts: Vec<Bytes<'a>>,
    starts: Vec<usize>,
    length: usize,
    /// Of the storages, without the header.
    digests: Vec<Assembly>,
    /// Groups that lie in two pieces, by the second one's number.
    seams: Vec<Mutex<Seam>>,
}

/// The bytes of a group that two pieces bring.
#[derive(Debug, Default)]
struct Seam {
    bytes: Vec<u8>,
    arrived: usize,
}

/// Short parts that are digested together, and where in the piece they are.
#[derive(Debug, Default)]
struct Batch {
    parts: Vec<(usize, Range<usize>)>,
    bytes: usize,
}

impl Batch {
    fn add(&mut self, part: usize, range: Range<usize>) {
        self.bytes += range.len();
        self.parts.push((part, range));
    }

    /// Whether they are as many as are best hashed together, and enough to be worth it.
    fn is_full(&self) -> bool {
        self.parts.len().is_multiple_of(TOGETHER) && self.bytes >= BATCH
    }
}

/// Pieces on their way to the disk, between those who digest and those who write.
struct Line<'a, 'b> {
    job: &'a Job<'a>,
    state: Mutex<State<'b>>,
    changed: Condvar,
}

struct State<'b> {
    /// Number of the next piece to digest.
    next: usize,
    /// Those that may be written from where they are, in the file's order.
    straight: VecDeque<usize>,
    /// Digested, to be written; and empty again.
    filled: VecDeque<(usize, usize, &'b mut [u8])>,
    empty: Vec<&'b mut [u8]>,
    /// How many still digest.
    digesting: usize,
    /// How many pieces were written.
    written: usize,
    failed: bool,
}

/// Writes header and storages one behind the other, and returns what was digested of each, in groups of as many bytes as
/// it says: a power of two up to [`GROUP`].
///
/// Touches no byte of the file behind them; nothing is durable before the file is synced.
pub(super) fn write<'a>(
    file: &'a File,
    header: &'a [u8],
    storages: impl Iterator<Item = (Bytes<'a>, usize)>,
    buffers: &mut Buffers,
) -> Result<Vec<Assembly>> {
    let job = Job::new(file, header, storages, buffers.piece);
    let pieces = job.pieces();
    let straight: VecDeque<usize> = (0..pieces).filter(|&piece| job.places[piece].is_some()).collect();
    let copied = (0..pieces).filter(|&piece| job.in_place(piece).is_none()).count();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let writers = buffers.writers.min(pieces);
    let digesters = cores.min(MAX_DIGESTERS).min(writers);
    let alone = writers < 2;
    let path = file.path();
    let empty = buffers.take(copied.min(if alone { 1 } else { writers + digesters }), &path)?;
    if alone {
        job.write_alone(empty)?;
    } else {
        let line = Line {
            job: &job,
            state: Mutex::new(State {
                next: 0,
                straight,
                filled: VecDeque::new(),
                empty,
                digesting: digesters,
                written: 0,
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
        assert_eq!(line.lock().written, pieces, "every piece is written once");
    }
    Ok(job.digests)
}

impl<'a, 'b> Line<'a, 'b> {
    /// Digests pieces until there are no more, or one could not be written.
    fn digest(&self) {
        let pieces = self.job.pieces();
        let mut state = self.lock();
        while state.next < pieces && !state.failed {
            let piece = state.next;
            if let Some(bytes) = self.job.in_place(piece) {
                state.next += 1;
                drop(state);
                self.job.digest_in_place(piece, bytes);
                state = self.lock();
                self.changed.notify_all(); // Meanwhile others may have been copied.
            } else if let Some(buffer) = state.empty.pop() {
                state.next += 1;
                if let Ok(at) = state.straight.binary_search(&piece) {
                    state.straight.remove(at); // It may be copied any moment, and is written from the buffer.
                }
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
                self.told(&mut state, 1, outcome)?;
            } else if let Some((piece, bytes)) = self.job.take_last(&mut state.straight) {
                drop(state);
                let outcome = self.job.file.write_all_at((piece * self.job.piece) as u64, bytes);
                state = self.lock();
                self.told(&mut state, bytes.len() / self.job.piece, outcome)?;
            } else if state.digesting == 0 {
                break;
            } else {
                state = self.wait(state);
            }
        }
        Ok(())
    }

    /// Lets the others know that a write is over.
    fn told(&self, state: &mut State, pieces: usize, outcome: Result<()>) -> Result<()> {
        state.written += pieces;
        state.failed |= outcome.is_err();
        self.changed.notify_all();
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, State<'b>> {
        self.state.lock().expect("nothing panics with it")
    }

    fn wait<'g>(&'g self, state: MutexGuard<'g, State<'b>>) -> MutexGuard<'g, State<'b>> {
        self.changed.wait(state).expect("nothing panics with it")
    }
}

impl<'a> Job<'a> {
    fn new(
        file: &'a File,
        header: &'a [u8],
        storages: impl Iterator<Item = (Bytes<'a>, usize)>,
        piece: usize,
    ) -> Job<'a> {
        let (mut parts, mut digests) = (vec![Bytes::Here(header)], Vec::new());
        for (bytes, grain) in storages {
            parts.push(bytes);
            digests.push(Assembly::of_groups(bytes.len() as u64, grain));
        }
        let mut length = 0;
        let mut starts = Vec::with_capacity(parts.len());
        for part in &parts {
            starts.push(length);
            length += part.len();
        }
        let mut job = Job {
            file,
            piece,
            places: Vec::new(),
            starts,
            length,
            digests,
            parts,
            seams: (0..length.div_ceil(piece)).map(|_| Mutex::default()).collect(),
        };
        job.places = (0..job.pieces()).map(|piece| job.place(piece)).collect();
        job
    }

    fn pieces(&self) -> usize {
        self.length.div_ceil(self.piece)
    }

    /// Writes everything on this thread, with one buffer.
    fn write_alone(&self, mut buffers: Vec<&mut [u8]>) -> Result<()> {
        for piece in 0..self.pieces() {
            let at = (piece * self.piece) as u64;
            if let Some(bytes) = self.in_place(piece) {
                self.digest_in_place(piece, bytes);
                self.file.write_all_at(at, bytes)?;
                continue;
            }
            let filled = self.fill(piece, buffers[0]);
            self.file.write_all_at(at, &buffers[0][..filled])?;
        }
        Ok(())
    }

    /// The part that has the file's byte `at`, and which of its bytes that is.
    fn find(&self, at: usize) -> (usize, usize) {
        let part = self.starts.partition_point(|&begin| begin <= at) - 1;
        (part, at - self.starts[part])
    }

    /// The parts of whole pieces; `None` where they are not all lent.
    fn shares(&self, pieces: Range<usize>) -> Option<Vec<Share<'a>>> {
        let mut shares = Some(Vec::new());
        if pieces.end * self.piece > self.length {
            return None; // The last one is cut off, which no direct write may be.
        }
        self.each_part(pieces.start, pieces.len() * self.piece, |part, from, range| {
            if range.is_empty() {
                return;
            }
            match (
                &mut shares,
                self.parts[part].part(from..from + range.len()).share(),
            ) {
                (Some(shares), Some(share)) => shares.push(share),
                _ => shares = None,
            }
        });
        shares
    }

    /// Where in memory a whole piece lies, if it does as in the file, and aligned.
    fn place(&self, piece: usize) -> Option<usize> {
        let shares = self.shares(piece..piece + 1)?;
        let first = shares.first()?.place();
        let mut end = first;
        for share in &shares {
            if share.place() != end {
                return None;
            }
            end += share.len();
        }
        first.is_multiple_of(DIRECT_ALIGNMENT).then_some(first)
    }

    /// A whole piece's bytes where it can be written from where they are, now that they are there.
    fn in_place(&self, piece: usize) -> Option<&'a [u8]> {
        self.places[piece]?;
        Share::joined(self.shares(piece..piece + 1)?.into_iter())
    }

    /// Takes the last of the pieces that can be written from where they are, and those before it that are worth one write
    /// with it.
    fn take_last(&self, straight: &mut VecDeque<usize>) -> Option<(usize, &'a [u8])> {
        let last = straight
            .iter()
            .rposition(|&piece| self.in_place(piece).is_some())?;
        let end = straight[last] + 1;
        let is_next = |at: usize| {
            let (piece, place) = (straight[at], self.places[straight[at]]);
            piece + 1 == straight[at + 1]
                && place.map(|place| place + self.piece) == self.places[piece + 1]
                && self.in_place(piece).is_some()
        };
        let mut first = last;
        while first > 0 && last + 1 - first < AT_ONCE && is_next(first - 1) {
            first -= 1;
        }
        let piece = straight[first];
        straight.drain(first..=last);
        let shares = self.shares(piece..end)?;
        Some((
            piece,
            Share::joined(shares.into_iter()).expect("each is there, behind the one before"),
        ))
    }

    /// Digests a piece that is written from where it is.
    fn digest_in_place(&self, piece: usize, bytes: &[u8]) {
        let mut batch = Batch::default();
        self.each_part(piece, bytes.len(), |part, from, range| {
            if self.is_short(part, range.len()) {
                batch.add(part, range);
                if batch.is_full() {
                    self.digest_batch(&mut batch, bytes);
                }
                return;
            }
            let bytes = &bytes[range];
            self.each_group(part, from, bytes.len(), |at, stop, group_end| {
                self.digest(piece, part, at, group_end, &bytes[at - from..stop - from]);
            });
        });
        self.digest_batch(&mut batch, bytes);
    }

    /// Copies what the file has in a piece into the buffer, digests it, and returns how much it is.
    fn fill(&self, piece: usize, buffer: &mut [u8]) -> usize {
        let filled = (self.length - piece * self.piece).min(self.piece);
        let mut batch = Batch::default();
        self.each_part(piece, filled, |part, from, range| {
            let (source, into) = (self.parts[part], &mut buffer[range.clone()]);
            if part == 0 {
                source.read(from, into); // The header's digest is in the layout.
                return;
            }
            if self.is_short(part, range.len()) {
                source.read(from, into);
                batch.add(part, range);
                if batch.is_full() {
                    self.digest_batch(&mut batch, buffer);
                }
                return;
            }
            self.each_group(part, from, into.len(), |at, stop, group_end| {
                let bytes = &mut into[at - from..stop - from];
                source.read(at, bytes);
                self.digest(piece, part, at, group_end, bytes); // Still in the nearest cache.
            });
        });
        self.digest_batch(&mut batch, buffer);
        filled
    }

    /// Whether a part is digested with others, and all of it is `count` bytes.
    fn is_short(&self, part: usize, count: usize) -> bool {
        part > 0 && self.digests[part - 1].is_short() && self.parts[part].len() == count
    }

    /// Digests parts that lie in a piece's bytes, and empties the batch.
    fn digest_batch(&self, batch: &mut Batch, bytes: &[u8]) {
        let short: Vec<&[u8]> = batch
            .parts
            .iter()
            .map(|(_, range)| &bytes[range.clone()])
            .collect();
        for ((part, _), digest) in batch.parts.iter().zip(of_short(&short)) {
            self.digests[part - 1].put_digest(digest);
        }
        *batch = Batch::default();
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
            self.put(storage, at, bytes);
        }
    }

    /// Digests a whole group.
    fn put(&self, storage: usize, at: usize, bytes: &[u8]) {
        let digest = &self.digests[storage];
        digest.put(at / digest.grain(), bytes);
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
            self.put(storage, group * GROUP, &whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::digest::Digest;
    use crate::lending::{Lending, Loan, Sampled};
    use crate::storage::Directory;
    use crate::storage::faulty::{Fault, FaultyStorage};
    use crate::storage::memory::MemoryStorage;

    fn lengths() -> impl Strategy<Value = Vec<usize>> {
        let length = prop_oneof![
            1 => 0..20usize,
            1 => 0..5000usize,
            1 => (GROUP - 3)..(GROUP + 3),
            3 => 0..(7 * GROUP)
        ];
        let short = proptest::collection::vec(0..5000usize, 0..80);
        prop_oneof![3 => proptest::collection::vec(length, 0..8), 1 => short]
    }

    /// Loans of storages whose copies lie one behind the other, from the arena's byte `begin` on.
    fn lending(storages: &[Vec<u8>], begin: usize, lent: bool) -> Lending {
        let mut place = begin;
        let loan = |storage: &Vec<u8>| {
            let loan = Loan {
                address: storage.as_ptr().expose_provenance(),
                length: storage.len(),
                place,
                lent,
            };
            place += storage.len();
            loan
        };
        let loans: Vec<Loan> = storages.iter().map(loan).collect();
        let arena = Arc::new(Arena::new(place).unwrap());
        // SAFETY: the caller keeps the storages; no two places have a byte in common.
        unsafe { Lending::new(arena, &loans, Sampled::All) }
    }

    /// Writes storages, and returns file and digests.
    fn written<'a>(
        header: &[u8],
        storages: impl Iterator<Item = Bytes<'a>>,
        buffers: &mut Buffers,
    ) -> (Vec<u8>, Vec<Digest>) {
        let memory = MemoryStorage::new();
        let file = Directory::new(Arc::new(memory.clone())).create_new("f").unwrap();
        let storages: Vec<Bytes> = storages.collect();
        let grains = [1 << 10, 8 << 10, GROUP].into_iter().cycle();
        let digests = write(&file, header, storages.into_iter().zip(grains), buffers).unwrap();
        (
            memory.files()["f"].clone(),
            digests.iter().map(Assembly::finish).collect(),
        )
    }

    #[derive(Clone, Copy, Debug)]
    enum Memory {
        /// It stays as it is.
        Here,
        /// A copy was made before.
        Copied,
        /// It is lent, and copied by another thread meanwhile, or not at all.
        Lent { copier: bool },
    }

    /// What a piece is longer than whole groups: most are aligned, so that they may be written from where they are.
    fn odd() -> impl Strategy<Value = usize> {
        prop_oneof![4 => Just(0), 1 => 0..70usize]
    }

    fn memory() -> impl Strategy<Value = Memory> {
        prop_oneof![
            1 => Just(Memory::Here),
            1 => Just(Memory::Copied),
            2 => any::<bool>().prop_map(|copier| Memory::Lent { copier })
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn every_cut_into_pieces_writes_the_same_file_and_digests(
            lengths in lengths(), header in 1..300usize, pieces in 1..4usize, odd in odd(), writers in 1..4usize,
            memory in memory(), as_in_the_file: bool, settled in 0..256u32
        ) {
            let storages: Vec<Vec<u8>> = lengths
                .iter()
                .enumerate()
                .map(|(at, &length)| (0..length).map(|index| (index * (at + 3) / 5) as u8).collect())
                .collect();
            let header = vec![9; header];
            let mut buffers = Buffers::new(pieces * GROUP + odd, writers);
            let begin = if as_in_the_file { header.len() } else { 64 };
            let lending = lending(&storages, begin, matches!(memory, Memory::Lent { .. }));
            let shares = || (0..storages.len()).map(|index| Bytes::Lent(lending.share(index)));
            // Copied before all others, wherever they are among them.
            for (index, share) in shares().enumerate().filter(|(index, _)| settled >> (index % 8) & 1 == 1) {
                prop_assert_eq!(share.all(), &storages[index]);
            }
            let (file, digests) = match memory {
                Memory::Here => written(&header, storages.iter().map(|bytes| Bytes::Here(bytes)), &mut buffers),
                Memory::Copied | Memory::Lent { copier: false } => written(&header, shares(), &mut buffers),
                Memory::Lent { copier: true } => lending.copying(None, || (), || written(&header, shares(), &mut buffers)),
            };
            prop_assert!(lending.is_sound());
            let expected: Vec<Digest> = storages.iter().map(|bytes| Digest::of(bytes)).collect();
            prop_assert_eq!(digests, expected);
            prop_assert!(file == [header, storages.concat()].concat());
        }
    }

    #[test]
    fn what_lies_in_memory_as_in_the_file_and_is_copied_is_written_from_there() {
        let header = vec![9; 128];
        // Few large storages or many small ones: it is all the same where they lie one behind the other.
        let large = vec![3, 11 * GROUP];
        let small = [vec![3], vec![0], vec![GROUP / 8; 88]].concat();
        for (lengths, (lent, begin, from_there)) in [&large, &small].into_iter().flat_map(|lengths| {
            [(false, 128, 10), (false, 64, 0), (true, 128, 0)].map(|case| (lengths, case))
        }) {
            let storages: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![7; length]).collect();
            let lending = lending(&storages, begin, lent);
            let shares = (0..storages.len()).map(|index| Bytes::Lent(lending.share(index)));
            let file = Directory::new(Arc::new(MemoryStorage::new()));
            let file = file.create_new("f").unwrap();
            let job = Job::new(&file, &header, shares.map(|share| (share, GROUP)), GROUP);
            let mut straight: VecDeque<usize> = (0..job.pieces())
                .filter(|&piece| job.places[piece].is_some())
                .collect();
            assert_eq!(
                straight.len(),
                if begin == 128 { 10 } else { 0 },
                "lent {lent}, from {begin}"
            );
            let writes: Vec<(usize, &[u8])> = std::iter::from_fn(|| job.take_last(&mut straight)).collect();
            let total: usize = writes.iter().map(|(_, bytes)| bytes.len()).sum();
            assert_eq!(total, from_there * GROUP, "lent {lent}, from {begin}");
            assert!(writes.iter().all(|(_, bytes)| bytes.len() <= AT_ONCE * GROUP));
            if let Some((piece, _)) = writes.last() {
                assert_eq!((*piece, writes.len()), (1, 3));
            }
            assert!(lending.is_sound());
        }
    }

    #[test]
    fn pieces_that_are_copied_among_others_that_never_are_all_reach_the_file() {
        let storages: Vec<Vec<u8>> = (1..6).map(|number| vec![number; 4 * GROUP]).collect();
        let header = vec![9; 128];
        let lending = lending(&storages, header.len(), true);
        for copied in [0, 2, 3] {
            lending.share(copied).all();
        }
        let shares = (0..storages.len()).map(|index| Bytes::Lent(lending.share(index)));
        let (file, _) = written(&header, shares, &mut Buffers::new(GROUP, 2));
        assert!(file == [header, storages.concat()].concat());
        assert!(lending.is_sound());
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
            let outcome = write(
                &file,
                &[1; 64],
                std::iter::once((Bytes::Here(&storage), GROUP)),
                &mut buffers,
            );
            assert_eq!(outcome.is_err(), nth < 10, "write {nth}");
        }
    }
}
