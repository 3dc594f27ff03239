//! Memory that is lent for a while to be saved: read where it lies until it is wanted back, and by then copied as far as
//! nobody had read it.
//!
//! Touches: reads what it is lent, until [`Lending::fence`] has returned; writes its arena. Whoever writes a checkpoint
//! reads from the first byte on while a copier copies from the last one on: what went to the disk in time takes no memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use crate::arena::{Arena, copy_all};
use crate::digest::{self, Fingerprint};

/// Bytes that are copied at a time.
const BLOCK: usize = 4 << 20;
/// What one thread surely copies in a second, into memory that was never used, on a busy machine.
const COPIED_PER_S: f64 = 2e9;

/// Nobody has copied it.
const FREE: u8 = 0;
/// Somebody copies it.
const BUSY: u8 = 1;
/// It is in the arena.
const COPIED: u8 = 2;
/// All of it was read where it lay, and nobody needs it any more.
const READ: u8 = 3;

/// What is saved of memory that others go on with.
#[derive(Debug)]
pub(crate) struct Lending {
    arena: Arc<Arena>,
    storages: Vec<Lent>,
    /// Of all storages, in their order.
    blocks: Vec<Block>,
    gate: Mutex<Gate>,
    changed: Condvar,
    sampled: Sampled,
    /// Whether what was read where it lay was the same afterwards.
    stayed: OnceLock<bool>,
}

/// One storage's memory and where its copy goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loan {
    /// Its first byte's address.
    pub address: usize,
    /// Its length in bytes.
    pub length: usize,
    /// Where in the arena its copy begins.
    pub place: usize,
    /// Whether it stays as it is until the fence. Otherwise it is copied at once.
    pub lent: bool,
}

/// What of lent memory is compared with what it was when it was lent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sampled {
    /// All of it.
    All,
    /// Windows, elsewhere for each seed.
    Windows(u64),
}

#[derive(Debug)]
struct Lent {
    loan: Loan,
    blocks: Range<usize>,
    /// Of what is lent.
    before: Option<Fingerprint>,
    /// Whether some of it was read where it lay, and not from its copy.
    read: AtomicBool,
}

#[derive(Debug)]
struct Block {
    from: usize,
    to: usize,
    length: usize,
    state: AtomicU8,
    /// How many of its bytes were read where they lay.
    read: AtomicUsize,
}

#[derive(Debug)]
struct Gate {
    /// Bytes that are neither copied nor read.
    left: usize,
    /// How many read lent memory just now.
    readers: usize,
    /// Lent memory is not read any more.
    closed: bool,
    /// Somebody waits at the fence.
    wanted: bool,
    /// How many wait for some block to be copied.
    waiting: usize,
}

impl Lending {
    /// Copies what is not lent, and takes note of what is.
    ///
    /// # Safety
    ///
    /// All of it is readable now; what is lent stays so, and is not written to, until [`Lending::fence`] has returned.
    /// Nobody else uses the arena; no two copies in it have a byte in common.
    pub unsafe fn new(arena: Arc<Arena>, loans: &[Loan], sampled: Sampled) -> Lending {
        let mut blocks = Vec::new();
        let (mut lent, mut at_once) = (Vec::new(), Vec::new());
        let mut storages: Vec<Lent> = Vec::with_capacity(loans.len());
        for &loan in loans {
            assert!(
                loan.place + loan.length <= arena.len(),
                "the arena was made for all of it"
            );
            let first = blocks.len();
            // SAFETY: the caller's promise.
            let bytes = unsafe { look_at(loan.address, loan.length) };
            if loan.lent {
                lent.push(bytes);
            } else {
                // SAFETY: no thread uses the arena yet, this part of it is no other copy's.
                at_once.push((bytes, unsafe {
                    std::slice::from_raw_parts_mut(arena.address().add(loan.place), loan.length)
                }));
            }
            let state = if loan.lent { FREE } else { COPIED };
            blocks.extend((0..loan.length).step_by(BLOCK).map(|at| Block {
                from: loan.address + at,
                to: loan.place + at,
                length: BLOCK.min(loan.length - at),
                state: AtomicU8::new(state),
                read: AtomicUsize::new(0),
            }));
            storages.push(Lent {
                loan,
                blocks: first..blocks.len(),
                before: None,
                read: AtomicBool::new(false),
            });
        }
        let mut before = digest::of_each(&lent, |bytes| sampled.look(bytes)).into_iter();
        for storage in storages.iter_mut().filter(|storage| storage.loan.lent) {
            storage.before = before.next();
        }
        copy_all(at_once);
        let free = blocks.iter().filter(|block| block.is(FREE));
        let gate = Gate {
            left: free.map(|block| block.length).sum(),
            readers: 0,
            closed: false,
            wanted: false,
            waiting: 0,
        };
        Lending {
            arena,
            storages,
            blocks,
            gate: Mutex::new(gate),
            changed: Condvar::new(),
            sampled,
            stayed: OnceLock::new(),
        }
    }

    /// A storage's bytes.
    pub fn share(&self, storage: usize) -> Share<'_> {
        Share {
            lending: self,
            storage,
            start: 0,
            length: self.storages[storage].loan.length,
        }
    }

    /// Runs `work`, which reads what is saved, while another thread, once `prepared`, copies what nobody has read yet: as
    /// late as it can where it is known how long the memory will be lent.
    pub fn copying<T>(
        &self,
        lent_for: Option<Duration>,
        prepare: impl FnOnce() + Send,
        work: impl FnOnce() -> T,
    ) -> T {
        if self.lock().left == 0 {
            return work();
        }
        let begun = Instant::now();
        let copy = || {
            prepare();
            self.wait_until_late(begun, lent_for.unwrap_or_default());
            self.close();
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("unbroken-copy".to_owned());
            if thread.spawn_scoped(scope, copy).is_err() {
                self.close();
            }
            let done = work();
            self.abandon();
            done
        })
    }

    /// Waits until what is left to copy takes all the time that there probably is, or somebody wants the memory back.
    fn wait_until_late(&self, begun: Instant, lent_for: Duration) {
        let mut gate = self.lock();
        while gate.left > 0 && !gate.wanted {
            let spare = lent_for.saturating_sub(begun.elapsed() + time_to_copy(gate.left));
            if spare.is_zero() {
                return;
            }
            // Meanwhile some of it is read: then there is more time.
            gate = self
                .changed
                .wait_timeout(gate, spare)
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .0;
        }
    }

    /// Returns when no lent memory is read any more, copying what is left of it.
    pub fn fence(&self) {
        self.lock().wanted = true;
        self.changed.notify_all();
        self.close();
    }

    /// Nobody will read any of it again.
    fn abandon(&self) {
        let free = |block: &&Block| block.passes(FREE, READ);
        let abandoned = self.blocks.iter().filter(free);
        self.done(abandoned.map(|block| block.length).sum());
    }

    /// Whether all that was lent was, when it was read or copied, what it was when it was lent, as far as that is looked at.
    /// Closes the fence.
    pub fn is_sound(&self) -> bool {
        self.close();
        let copied = |lent: &&Lent| !lent.read.load(Ordering::Relaxed);
        self.stayed.get() == Some(&true)
            && self.are_as_before(self.storages.iter().filter(copied), |lent| {
                // SAFETY: the fence is closed, so that all of it is in the arena, and nobody writes there any more.
                unsafe { look_at(self.address() + lent.loan.place, lent.loan.length) }
            })
    }

    fn close(&self) {
        // The last ones first: those who read begin with the first ones.
        for index in (0..self.blocks.len()).rev() {
            self.copy_block(index);
        }
        let mut gate = self.lock();
        while gate.left > 0 {
            gate = self.wait(gate);
        }
        gate.closed = true;
        while gate.readers > 0 {
            gate = self.wait(gate);
        }
        drop(gate);
        self.stayed.get_or_init(|| {
            let read = |lent: &&Lent| lent.read.load(Ordering::Relaxed);
            self.are_as_before(self.storages.iter().filter(read), |lent| {
                // SAFETY: who lent it waits for this at the fence, or has not come there.
                unsafe { look_at(lent.loan.address, lent.loan.length) }
            })
        });
    }

    fn are_as_before<'s>(
        &self,
        storages: impl Iterator<Item = &'s Lent>,
        bytes_of: impl Fn(&'s Lent) -> &'s [u8],
    ) -> bool {
        let lent: Vec<&Lent> = storages.filter(|lent| lent.before.is_some()).collect();
        let bytes: Vec<&[u8]> = lent.iter().map(|lent| bytes_of(lent)).collect();
        let now = digest::of_each(&bytes, |bytes| self.sampled.look(bytes));
        lent.iter().map(|lent| lent.before).eq(now.into_iter().map(Some))
    }

    /// Copies a block, if nobody else does or has.
    fn copy_block(&self, index: usize) {
        let block = &self.blocks[index];
        if !block.passes(FREE, BUSY) {
            return;
        }
        // SAFETY: whoever lent the memory keeps it until the fence, which waits for this; this part of the arena is this
        // block's alone, and read only when it is copied.
        unsafe {
            std::ptr::copy_nonoverlapping(
                std::ptr::with_exposed_provenance(block.from),
                self.arena.address().add(block.to),
                block.length,
            )
        };
        block.state.store(COPIED, Ordering::Release);
        self.done(block.length);
    }

    /// Copies some blocks before all others, and returns when they are copied.
    fn settle(&self, blocks: Range<usize>) {
        blocks.clone().for_each(|index| self.copy_block(index));
        if self.are_copied(blocks.clone()) {
            return;
        }
        let mut gate = self.lock();
        gate.waiting += 1;
        while self.blocks[blocks.clone()].iter().any(|block| block.is(BUSY)) {
            gate = self.wait(gate);
        }
        gate.waiting -= 1;
        assert!(
            self.are_copied(blocks),
            "what was read where it lay is not asked for again"
        );
    }

    fn are_copied(&self, blocks: Range<usize>) -> bool {
        self.blocks[blocks].iter().all(|block| block.is(COPIED))
    }

    /// Leave to read lent memory where it lies; none behind the fence.
    fn reader(&self) -> Option<Reader<'_>> {
        let mut gate = self.lock();
        if gate.closed {
            return None;
        }
        gate.readers += 1;
        Some(Reader(self))
    }

    fn done(&self, bytes: usize) {
        let mut gate = self.lock();
        gate.left -= bytes;
        if gate.left == 0 || gate.waiting > 0 {
            self.changed.notify_all(); // Each call costs more than a small copy.
        }
    }

    /// The arena's.
    fn address(&self) -> usize {
        self.arena.address().expose_provenance()
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'g>(&self, gate: MutexGuard<'g, Gate>) -> MutexGuard<'g, Gate> {
        self.changed
            .wait(gate)
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Block {
    fn is(&self, state: u8) -> bool {
        self.state.load(Ordering::Acquire) == state
    }

    /// Whether it was in the one state and now is in the other.
    fn passes(&self, from: u8, to: u8) -> bool {
        self.state
            .compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }
}

impl Sampled {
    fn look(self, bytes: &[u8]) -> Fingerprint {
        match self {
            Sampled::All => Fingerprint::of(bytes),
            Sampled::Windows(seed) => Fingerprint::of_sample(bytes, seed),
        }
    }
}

fn time_to_copy(bytes: usize) -> Duration {
    Duration::from_secs_f64(bytes as f64 / COPIED_PER_S)
}

/// Somebody who reads lent memory: the fence waits for all of them.
struct Reader<'a>(&'a Lending);

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let mut gate = self.0.lock();
        gate.readers -= 1;
        if gate.readers == 0 && gate.closed {
            self.0.changed.notify_all();
        }
    }
}

/// # Safety
///
/// The memory is readable, and nobody writes there, while the slice is used.
pub(crate) unsafe fn look_at<'a>(address: usize, length: usize) -> &'a [u8] {
    if length == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), length) }
}

/// A part of a storage that was lent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share<'a> {
    lending: &'a Lending,
    storage: usize,
    start: usize,
    length: usize,
}

impl<'a> Share<'a> {
    /// A part of it.
    pub fn part(self, range: Range<usize>) -> Share<'a> {
        assert!(range.end <= self.length, "a part lies in its whole");
        Share {
            start: self.start + range.start,
            length: range.len(),
            ..self
        }
    }

    /// How many bytes there are.
    pub fn len(self) -> usize {
        self.length
    }

    /// Where in the arena its copy begins, or would.
    pub fn place(self) -> usize {
        self.lent().loan.place + self.start
    }

    /// Its bytes, which are copied first if they are not. Not for what was [`read`](Share::read) before.
    pub fn all(self) -> &'a [u8] {
        self.lending.settle(self.blocks());
        // SAFETY: its own copy, which nobody writes to any more.
        unsafe { self.copy() }
    }

    /// What `look` tells of its bytes, wherever they are. Not for what was [`read`](Share::read) before.
    pub fn look<T>(self, look: impl FnOnce(&[u8]) -> T) -> T {
        if !self.is_copied()
            && let Some(_reader) = self.lending.reader()
        {
            // SAFETY: who lent it waits at the fence for this reader.
            return look(unsafe { look_at(self.lent().loan.address + self.start, self.length) });
        }
        look(self.all())
    }

    /// Takes its bytes from `from` on, wherever they are, for the only time.
    pub fn read(self, from: usize, into: &mut [u8]) {
        let share = self.part(from..from + into.len());
        if !share.is_copied()
            && let Some(_reader) = self.lending.reader()
        {
            let lent = share.lent();
            lent.read.store(true, Ordering::Relaxed);
            // SAFETY: who lent it waits at the fence for this reader.
            into.copy_from_slice(unsafe { look_at(lent.loan.address + share.start, share.length) });
            share.take_note();
            return;
        }
        into.copy_from_slice(share.all());
    }

    /// Whether its copy is there.
    pub fn is_copied(self) -> bool {
        self.lending.are_copied(self.blocks())
    }

    /// The copies of shares as one, where all are there and each one lies behind the one before it.
    pub fn joined(shares: impl Iterator<Item = Share<'a>>) -> Option<&'a [u8]> {
        let mut all: Option<(Share<'a>, Range<usize>)> = None;
        for share in shares {
            let place = share.place();
            let (first, range) = all.get_or_insert((share, place..place));
            if !share.is_copied() || range.end != place || !std::ptr::eq(first.lending, share.lending) {
                return None;
            }
            range.end += share.length;
        }
        let (first, range) = all?;
        // SAFETY: copies that are there, and nothing between them.
        Some(unsafe { look_at(first.lending.address() + range.start, range.len()) })
    }

    fn lent(self) -> &'a Lent {
        &self.lending.storages[self.storage]
    }

    fn blocks(self) -> Range<usize> {
        let first = self.lent().blocks.start;
        first + self.start / BLOCK..first + (self.start + self.length).div_ceil(BLOCK)
    }

    /// # Safety
    ///
    /// It is copied.
    unsafe fn copy(self) -> &'a [u8] {
        // SAFETY: the caller's promise: nobody writes there any more.
        unsafe { look_at(self.lending.address() + self.place(), self.length) }
    }

    /// Notes that all of it was read where it lies; blocks that were read as a whole need no copy any more.
    fn take_note(self) {
        let end = self.start + self.length;
        for index in self.blocks() {
            let begin = (index - self.lent().blocks.start) * BLOCK;
            let block = &self.lending.blocks[index];
            let taken = end.min(begin + block.length) - self.start.max(begin);
            let before = block.read.fetch_add(taken, Ordering::Relaxed);
            if before + taken == block.length && block.passes(FREE, READ) {
                self.lending.done(block.length);
            }
        }
    }
}

/// The bytes of one storage, or of a part of it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bytes<'a> {
    /// They stay as they are.
    Here(&'a [u8]),
    /// They are lent, or were.
    Lent(Share<'a>),
}

impl<'a> Bytes<'a> {
    /// How many there are.
    pub fn len(self) -> usize {
        match self {
            Bytes::Here(bytes) => bytes.len(),
            Bytes::Lent(share) => share.length,
        }
    }

    /// Some of them.
    pub fn part(self, range: Range<usize>) -> Bytes<'a> {
        match self {
            Bytes::Here(bytes) => Bytes::Here(&bytes[range]),
            Bytes::Lent(share) => Bytes::Lent(share.part(range)),
        }
    }

    /// All of them: see [`Share::all`].
    pub fn all(self) -> &'a [u8] {
        match self {
            Bytes::Here(bytes) => bytes,
            Bytes::Lent(share) => share.all(),
        }
    }

    /// All of them, unless they have yet to be copied.
    pub fn at_hand(self) -> Option<&'a [u8]> {
        match self {
            Bytes::Here(bytes) => Some(bytes),
            Bytes::Lent(share) => share.is_copied().then(|| share.all()),
        }
    }

    /// What `look` tells of them: see [`Share::look`].
    pub fn look<T>(self, look: impl FnOnce(&[u8]) -> T) -> T {
        match self {
            Bytes::Here(bytes) => look(bytes),
            Bytes::Lent(share) => share.look(look),
        }
    }

    /// Takes some of them, for the only time: see [`Share::read`].
    pub fn read(self, from: usize, into: &mut [u8]) {
        match self {
            Bytes::Here(bytes) => into.copy_from_slice(&bytes[from..from + into.len()]),
            Bytes::Lent(share) => share.read(from, into),
        }
    }

    /// The share, where they are lent.
    pub fn share(self) -> Option<Share<'a>> {
        match self {
            Bytes::Here(_) => None,
            Bytes::Lent(share) => Some(share),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALIGNMENT: usize = 64;

    /// Loans of storages, each copy behind the one before it, and their arena.
    fn lend(storages: &[Vec<u8>], sampled: Sampled) -> Lending {
        let mut end = 0;
        let loan = |storage: &Vec<u8>| {
            let place = usize::next_multiple_of(end, ALIGNMENT);
            end = place + storage.len();
            Loan {
                address: storage.as_ptr().expose_provenance(),
                length: storage.len(),
                place,
                lent: true,
            }
        };
        let loans: Vec<Loan> = storages.iter().map(loan).collect();
        let arena = Arc::new(Arena::new(end).unwrap());
        // SAFETY: every test keeps the storages until it has come to the fence; no two copies share a byte.
        unsafe { Lending::new(arena, &loans, sampled) }
    }

    fn storage(length: usize, seed: usize) -> Vec<u8> {
        (0..length).map(|index| (index / 7 * seed) as u8).collect()
    }

    /// How many bytes of the arena were ever written to.
    fn copied_bytes(lending: &Lending) -> usize {
        let copied = lending.blocks.iter().filter(|block| block.is(COPIED));
        copied.map(|block| block.length).sum()
    }

    #[test]
    fn what_is_read_in_time_is_never_copied() {
        let storages = [storage(2 * BLOCK + 5, 3), storage(100, 5)];
        let lending = lend(&storages, Sampled::All);
        for (index, storage) in storages.iter().enumerate() {
            let mut read = vec![0; storage.len()];
            for (at, part) in read.chunks_mut(1 << 20).enumerate() {
                lending.share(index).read(at << 20, part);
            }
            assert!(read == *storage);
        }
        assert_eq!(lending.lock().left, 0);
        lending.fence();
        assert!(lending.is_sound());
        assert_eq!(copied_bytes(&lending), 0);
    }

    #[test]
    fn what_is_known_to_be_lent_for_long_is_not_copied_before_it_is_wanted_back() {
        let storages = [storage(BLOCK, 3), storage(BLOCK, 5)];
        let lending = lend(&storages, Sampled::All);
        let hour = Duration::from_secs(3600);
        let copied = lending.copying(
            Some(hour),
            || (),
            || {
                lending.share(0).read(0, &mut vec![0; BLOCK]);
                std::thread::sleep(Duration::from_millis(20));
                let before = copied_bytes(&lending);
                lending.fence();
                (before, copied_bytes(&lending))
            },
        );
        assert_eq!(copied, (0, BLOCK));
    }

    #[test]
    fn behind_the_fence_only_the_copy_is_read() {
        let mut storages = [storage(2 * BLOCK + 5, 3)];
        let before = storages[0].clone();
        let lending = lend(&storages, Sampled::Windows(4));
        let mut read = vec![0; before.len()];
        let (first, rest) = read.split_at_mut(BLOCK + 9);
        lending.share(0).read(0, first);
        lending.fence();
        assert_eq!(
            copied_bytes(&lending),
            BLOCK + 5,
            "all but the block that was read as a whole"
        );
        storages[0].fill(0);
        lending.share(0).read(BLOCK + 9, rest);
        assert!(read == before);
        assert!(lending.is_sound(), "it changed when it was not lent any more");
    }

    #[test]
    fn a_storage_that_is_asked_for_as_a_whole_is_copied_and_looked_at_where_it_is() {
        let mut storages = [storage(BLOCK, 3), storage(BLOCK + 1, 5)];
        let before = storages.clone();
        let lending = lend(&storages, Sampled::Windows(4));
        let at = lending.share(1).look(|bytes| bytes.as_ptr().addr());
        assert_eq!(at, storages[1].as_ptr().addr());
        assert_eq!(copied_bytes(&lending), 0);
        let copy = lending.share(1).all();
        assert_eq!(copied_bytes(&lending), BLOCK + 1);
        assert_eq!(
            lending.share(1).look(|bytes| bytes.as_ptr().addr()),
            copy.as_ptr().addr()
        );
        let part = lending.share(1).part(3..BLOCK);
        assert!(copy == before[1] && part.all() == &before[1][3..BLOCK]);
        assert!(Share::joined([lending.share(0), lending.share(1)].into_iter()).is_none());
        lending.fence();
        storages.iter_mut().for_each(|storage| storage.fill(0));
        let both = Share::joined([lending.share(0), lending.share(1)].into_iter());
        assert!(both.is_some_and(|both| both == before.concat()));
    }

    #[test]
    fn a_change_before_the_fence_is_found_out_whether_it_was_read_or_copied() {
        for read_first in [false, true] {
            for sampled in [Sampled::All, Sampled::Windows(9)] {
                let mut storages = [storage(BLOCK + 5, 3), storage(10, 3)];
                let lending = lend(&storages, sampled);
                if read_first {
                    lending.share(0).read(0, &mut vec![0; BLOCK + 5]);
                }
                // All of it: windows show that.
                storages[0].iter_mut().for_each(|byte| *byte ^= 1);
                lending.fence();
                assert!(!lending.is_sound(), "{sampled:?}, read {read_first}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn whoever_comes_first_everybody_reads_what_was_lent(
            lengths in proptest::collection::vec(0..(2 * BLOCK + 9), 1..5), step in 1..(BLOCK + 9),
            pause_us in 0..2000u64, lent_for in proptest::option::of(0..100_000u64), whole in 0..16u32
        ) {
            let mut storages: Vec<Vec<u8>> = lengths.iter().enumerate().map(|(at, &length)| storage(length, at + 3)).collect();
            let before = storages.clone();
            let lending = lend(&storages, Sampled::All);
            let reader = || {
                let read = |index: usize| {
                    let share = lending.share(index);
                    if whole >> index & 1 == 1 {
                        return share.all().to_vec();
                    }
                    let mut read = vec![0; before[index].len()];
                    for (at, part) in read.chunks_mut(step).enumerate() {
                        share.read(at * step, part);
                    }
                    read
                };
                let read: Vec<Vec<u8>> = (0..before.len()).map(read).collect();
                assert!(lending.is_sound());
                read
            };
            let read = std::thread::scope(|scope| {
                let saving = scope.spawn(|| lending.copying(lent_for.map(Duration::from_micros), || (), reader));
                std::thread::sleep(Duration::from_micros(pause_us));
                lending.fence();
                storages.iter_mut().for_each(|storage| storage.fill(0));
                saving.join().unwrap()
            });
            prop_assert!(read == before);
        }
    }
}
