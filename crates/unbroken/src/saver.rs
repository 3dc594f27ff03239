//! Saving in the background: the training goes on while a copy of its state is digested and written.
//!
//! Touches: the run that it saves to; memory that it is lent, until [`Saver::fence`] has returned. One save is under way
//! at a time, on threads of its own; the next one waits for it. What is written before the fence needs no copy; one arena
//! holds that of the rest, kept and used again. What nobody has written to since the last save is not copied either: it
//! is digested where it lies.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::arena::Arena;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::manifest::{Manifest, StorageEntry};
use crate::lending::{Bytes, Lending, Loan, Sampled, look_at};
use crate::run::Run;
use crate::state::Value;
use crate::store::{Beside, Checkpoint, CheckpointInfo, Commit, Digested, Retention};

/// Less lent memory than this is copied at once: it takes less time than to look after it.
const WORTH_LENDING: usize = 8 << 20;
/// Smaller storages are copied however long they did not change: it takes less than to remember them.
pub const WORTH_RESTING: usize = 64 << 10;
/// An arena of this many bytes is kept, however little of it is needed.
const WORTH_GIVING_BACK: usize = 64 << 20;
/// Where copies begin in the arena.
const ALIGNMENT: usize = 64;

/// A checkpoint without its memory. See [`Commit`].
#[derive(Clone, Debug)]
pub struct Save {
    /// Optimizer updates so far.
    pub step: u64,
    /// 0: after a step inside an epoch. 1: an epoch's after-work is done. 2: the run is finished.
    pub phase: u8,
    /// The state.
    pub tree: Value,
    /// What may not change.
    pub identity: Vec<(String, Value)>,
    /// What the bits may depend on.
    pub environment: Vec<(String, Value)>,
    /// Logged numbers by name.
    pub metrics: Vec<(String, f64)>,
    /// Whether retention must keep it.
    pub pinned: bool,
    /// What is kept once it is durable; `None` keeps everything.
    pub keep: Option<Retention>,
}

/// The memory of one storage.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Its first byte's address.
    pub address: usize,
    /// Its length in bytes.
    pub length: usize,
    /// Whether it stays as it is until the fence. Otherwise it is copied at once.
    pub lent: bool,
    /// Whether nobody is known to have written to it since the last save. Then it is not copied: it rests. A save that
    /// finds it changed all the same comes to nothing, as what it was at the boundary cannot be told any more.
    pub unmoved: bool,
}

/// What is known of lent memory, and what is looked at.
#[derive(Default)]
pub struct Terms {
    /// Whether all of it is compared with what it was, instead of windows.
    pub full: bool,
    /// How long it will probably be until the fence, at the least. Unknown, it is copied at once.
    pub lent_for: Option<Duration>,
    /// Asked on another thread whether nothing is known to have changed, when all was read or copied.
    pub confirm: Option<Box<dyn FnOnce() -> bool + Send>>,
}

/// What became of a save.
#[derive(Debug)]
pub enum Outcome {
    /// It is durable; older ones that the policy does not keep are gone.
    Saved(CheckpointInfo),
    /// Lent memory changed before all of it was read: nothing is left of the checkpoint.
    Torn {
        /// The step that it was to save.
        step: u64,
    },
    /// Memory that nobody was known to have written to is not what it was at the last save: nothing was written.
    Stirred {
        /// The step that it was to save.
        step: u64,
    },
    /// It could not be written, or older ones could not be deleted.
    Failed {
        /// The step that it was to save.
        step: u64,
        /// Why.
        error: Error,
    },
}

/// Digests of storages by their first byte's address and their length.
type Known = HashMap<(usize, usize), Digest>;

/// Saves one run's checkpoints in the background.
#[derive(Debug)]
pub struct Saver {
    run: Arc<Run>,
    state: Mutex<State>,
    /// Where the last pack has which storage.
    places: Arc<Mutex<Vec<Place>>>,
    /// What large storages were at the last save.
    known: Arc<Mutex<Known>>,
    /// The process that its threads are in: a fork has none of them.
    pid: u32,
}

#[derive(Debug, Default)]
struct State {
    flight: Option<Flight>,
    /// The last save's outcome, until it is asked for.
    landed: Option<Outcome>,
    arena: Option<Arc<Arena>>,
}

#[derive(Debug)]
struct Flight {
    lending: Arc<Lending>,
    thread: JoinHandle<Outcome>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What one save works with.
struct Task {
    run: Arc<Run>,
    places: Arc<Mutex<Vec<Place>>>,
    known: Arc<Mutex<Known>>,
    lending: Arc<Lending>,
    regions: Vec<Region>,
    /// Which loan each region is; `None` where it rests.
    numbers: Vec<Option<usize>>,
    resting: Vec<Option<Digest>>,
}

impl Task {
    fn save(&self, save: Save, terms: Terms) -> Outcome {
        let step = save.step;
        let confirm = Mutex::new(terms.confirm);
        let confirmed = || lock(&confirm).take().is_none_or(|confirm| confirm());
        let sound = OnceLock::new();
        let is_sound = || *sound.get_or_init(|| self.lending.is_sound() & confirmed());
        let copier_gives_way = || give_way(COPY_NICE);
        let written = self.lending.copying(terms.lent_for, copier_gives_way, || {
            give_way(NICE); // Only now: a thread starts as nice as the one that starts it, and is not let back.
            self.write(save, &is_sound)
        });
        // Asked in any case: what it holds on to is let go of by asking.
        confirmed();
        match written {
            Ok(Some(checkpoint)) => {
                let manifest = checkpoint.manifest();
                *lock(&self.places) = places_in(manifest);
                let storages = self.regions.iter().map(|region| (region.address, region.length));
                *lock(&self.known) = known_of(storages, manifest);
                Outcome::Saved(checkpoint.info().clone())
            }
            Ok(None) => Outcome::Stirred { step },
            Err(_) if sound.get() == Some(&false) => Outcome::Torn { step },
            Err(error) => Outcome::Failed { step, error },
        }
    }

    /// Writes the checkpoint, and deletes older ones; `None` where something that rests is not what it was.
    fn write(&self, save: Save, is_sound: &dyn Fn() -> bool) -> Result<Option<Checkpoint>> {
        let bytes_of = |(region, number): (&Region, &Option<usize>)| match number {
            Some(number) => Bytes::Lent(self.lending.share(*number)),
            // SAFETY: who started the save promised that what is unmoved stays readable until there is an outcome.
            None => Bytes::Here(unsafe { look_at(region.address, region.length) }),
        };
        let storages: Vec<Bytes> = self.regions.iter().zip(&self.numbers).map(bytes_of).collect();
        let Some(known) = digest_resting(&self.run, &storages, &self.resting) else {
            return Ok(None);
        };
        let commit = Commit {
            step: save.step,
            phase: save.phase,
            tree: save.tree,
            storages,
            identity: save.identity,
            environment: save.environment,
            metrics: save.metrics,
            pinned: save.pinned,
        };
        let beside = Beside {
            known,
            is_sound: Some(is_sound),
            ..Beside::default()
        };
        let checkpoint = self.run.commit_with(commit, beside)?;
        if let Some(keep) = save.keep {
            self.run.prune(&keep, false)?;
        }
        Ok(Some(checkpoint))
    }
}

impl Saver {
    /// A saver for a run; no thread is started before the first save.
    pub fn new(run: Arc<Run>) -> Saver {
        Saver {
            run,
            state: Mutex::default(),
            places: Arc::default(),
            known: Arc::default(),
            pid: std::process::id(),
        }
    }

    /// Starts a save and returns. Waits first for one that is under way: its outcome must have been asked for.
    ///
    /// What is neither lent nor resting is copied before this returns. Windows of what is lent are digested now, and again
    /// when all of it was read, on its way to the disk or by being copied; then it is asked whether anything is known to
    /// have changed meanwhile.
    ///
    /// # Durability
    ///
    /// None on return. [`Outcome::Saved`] says that the checkpoint survives a power cut; a kill before costs only it.
    ///
    /// # Errors
    ///
    /// Where there is no memory for the copy, or no thread. Nothing was started then.
    ///
    /// # Safety
    ///
    /// All regions are readable now; lent ones stay so, and are not written to, until [`Saver::fence`] has returned;
    /// unmoved ones, until there is an outcome. (A write before that is found out where it touches a window, and in what
    /// rests wherever it is; it is never a data race of Rust's making alone.)
    pub unsafe fn start(&self, save: Save, regions: &[Region], terms: Terms) -> Result<()> {
        self.check_process()?;
        let mut state = lock(&self.state);
        state.land();
        if state.landed.is_some() {
            return Err(Error::invalid("nobody asked what became of the last save"));
        }
        let lengths: Vec<usize> = regions.iter().map(|region| region.length).collect();
        let resting = resting(regions, &lock(&self.known));
        let (spans, end) = lay_out(&lengths, &lock(&self.places), |index| resting[index].is_some());
        let arena = self.arena(&mut state, end)?;
        let (loans, numbers) = loans(regions, &spans, &resting);
        let sampled = if terms.full {
            Sampled::All
        } else {
            Sampled::Windows(save.step)
        };
        // SAFETY: the caller's promise; no thread uses the arena yet, and no two spans have a byte in common.
        let lending = Arc::new(unsafe { Lending::new(arena, &loans, sampled) });
        let task = Task {
            run: Arc::clone(&self.run),
            places: Arc::clone(&self.places),
            known: Arc::clone(&self.known),
            lending: Arc::clone(&lending),
            regions: regions.to_vec(),
            numbers,
            resting,
        };
        let thread = std::thread::Builder::new().name("unbroken-save".to_owned());
        let thread = thread
            .spawn(move || task.save(save, terms))
            .map_err(|error| Error::io("start a thread to save", self.run.path(), error))?;
        state.flight = Some(Flight { lending, thread });
        Ok(())
    }

    fn arena(&self, state: &mut State, length: usize) -> Result<Arc<Arena>> {
        // The last save has landed; only a fence that is just returning may still hold it.
        let kept = state
            .arena
            .take()
            .filter(|arena| fits(arena.len(), length) && Arc::strong_count(arena) == 1);
        let arena = match kept {
            Some(arena) => arena,
            None => Arc::new(
                Arena::new(length)
                    .map_err(|error| Error::io("take memory to save", self.run.path(), error))?,
            ),
        };
        state.arena = Some(Arc::clone(&arena));
        Ok(arena)
    }

    /// Commits a checkpoint of memory that stays as it is until this returns, like [`Run::commit`]. What did not change
    /// since may rest at the next save.
    ///
    /// # Errors
    ///
    /// Those of [`Run::commit`].
    pub fn commit(&self, commit: Commit<&[u8]>) -> Result<CheckpointInfo> {
        let storages: Vec<(usize, usize)> = commit
            .storages
            .iter()
            .map(|bytes| (bytes.as_ptr().addr(), bytes.len()))
            .collect();
        let checkpoint = self
            .run
            .commit_with(commit.with_storages(Bytes::Here), Beside::default())?;
        *lock(&self.known) = known_of(storages.into_iter(), checkpoint.manifest());
        Ok(checkpoint.info().clone())
    }

    /// Takes note that memory, by its first byte's address and its length, holds what has these digests, as after a resume:
    /// what does not change may rest at the next save.
    pub fn know(&self, storages: impl IntoIterator<Item = ((usize, usize), Digest)>) {
        lock(&self.known).extend(storages);
    }

    /// Returns when no lent memory is read any more, copying what is left of it.
    pub fn fence(&self) {
        if self.pid != std::process::id() {
            return; // What is lent was lent by another process.
        }
        let lending = lock(&self.state)
            .flight
            .as_ref()
            .map(|flight| Arc::clone(&flight.lending));
        if let Some(lending) = lending {
            lending.fence();
        }
    }

    /// Whether a save is under way.
    pub fn is_saving(&self) -> bool {
        let state = lock(&self.state);
        state
            .flight
            .as_ref()
            .is_some_and(|flight| !flight.thread.is_finished())
    }

    /// Returns what became of the last save, once; `None` while it is under way.
    pub fn outcome(&self) -> Option<Outcome> {
        let mut state = lock(&self.state);
        if state
            .flight
            .as_ref()
            .is_some_and(|flight| flight.thread.is_finished())
        {
            state.land();
        }
        state.landed.take()
    }

    /// Waits until no save is under way, and returns what became of the last one, once.
    pub fn wait(&self) -> Option<Outcome> {
        if self.pid != std::process::id() {
            return None;
        }
        let mut state = lock(&self.state);
        state.land();
        state.landed.take()
    }

    fn check_process(&self) -> Result<()> {
        if self.pid == std::process::id() {
            return Ok(());
        }
        Err(Error::invalid(
            "this process is a fork of the one that opened the run; only that one writes",
        ))
    }
}

impl State {
    /// Waits for the save that is under way.
    fn land(&mut self) {
        if let Some(flight) = self.flight.take() {
            let outcome = flight.thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            self.landed = Some(outcome);
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // Lent memory must not be read by a thread that outlives whoever keeps it.
        if self.pid == std::process::id() {
            lock(&self.state).land();
        }
    }
}

/// The loans of what does not rest, and which one each region is.
fn loans(
    regions: &[Region],
    spans: &[Range<usize>],
    resting: &[Option<Digest>],
) -> (Vec<Loan>, Vec<Option<usize>>) {
    let moving = || {
        let pairs = regions.iter().zip(spans).zip(resting);
        pairs.filter_map(|(pair, rests)| rests.is_none().then_some(pair))
    };
    let lent = moving().filter(|(region, _)| region.lent);
    let is_worth_it = lent.map(|(region, _)| region.length).sum::<usize>() >= WORTH_LENDING;
    let loan = |(region, span): (&Region, &Range<usize>)| Loan {
        address: region.address,
        length: region.length,
        place: span.start,
        lent: region.lent && is_worth_it,
    };
    let mut count = 0..;
    let number = |rests: &Option<Digest>| if rests.is_none() { count.next() } else { None };
    (moving().map(loan).collect(), resting.iter().map(number).collect())
}

/// What each region was at the last save, of those that rest.
fn resting(regions: &[Region], known: &Known) -> Vec<Option<Digest>> {
    let rests = |region: &Region| {
        let digest = || known.get(&(region.address, region.length)).copied();
        region.unmoved.then(digest).flatten()
    };
    regions.iter().map(rests).collect()
}

/// What is to be known of storages at the next save.
fn known_of(storages: impl Iterator<Item = (usize, usize)>, manifest: &Manifest) -> Known {
    let entries = storages.zip(&manifest.storages);
    entries
        .filter(|((_, length), _)| *length >= WORTH_RESTING)
        .map(|(key, entry)| (key, entry.digest))
        .collect()
}

/// Digests what rests; `None` where something is not what it was.
fn digest_resting(
    run: &Run,
    storages: &[Bytes],
    resting: &[Option<Digest>],
) -> Option<Vec<(usize, Digested)>> {
    let indices: Vec<usize> = (0..storages.len())
        .filter(|&index| resting[index].is_some())
        .collect();
    let bytes: Vec<&[u8]> = indices.iter().map(|&index| storages[index].all()).collect();
    let found: Vec<(usize, Digested)> = indices.into_iter().zip(run.digest(&bytes)).collect();
    let stayed = |(index, found): &(usize, Digested)| resting[*index] == Some(found.digest);
    found.iter().all(stayed).then_some(found)
}

/// Whether an arena is long enough, and not so long that it wastes memory.
fn fits(has: usize, needed: usize) -> bool {
    has >= needed && has <= needed.saturating_mul(2).max(WORTH_GIVING_BACK)
}

/// What a storage was last: its length, and where it went in the pack; `None` where it was on disk already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    length: usize,
    offset: Option<usize>,
}

/// Where a checkpoint's own pack, the last one, has which storage.
fn places_in(manifest: &Manifest) -> Vec<Place> {
    let own = manifest
        .packs
        .len()
        .checked_sub(1)
        .filter(|_| manifest.new_bytes > 0);
    let place = |storage: &StorageEntry| Place {
        length: storage.length as usize,
        offset: storage
            .place
            .whole()
            .filter(|(pack, _)| own == Some(*pack as usize))
            .map(|(_, offset)| offset as usize),
    };
    manifest.storages.iter().map(place).collect()
}

/// Where in the arena each storage's copy goes, and how long the arena must be. What rests has no copy.
///
/// Where the last pack was of the same storages, the arena is laid out as that one was: the next one is probably laid
/// out so, too, and what lies in memory as in the file is written from there.
fn lay_out(lengths: &[usize], places: &[Place], rests: impl Fn(usize) -> bool) -> (Vec<Range<usize>>, usize) {
    let as_before = lengths.iter().eq(places.iter().map(|place| &place.length));
    let mut spans = vec![0..0; lengths.len()];
    let mut placed: Vec<bool> = (0..lengths.len()).map(&rests).collect();
    let mut end = 0;
    if as_before {
        let offset_of = |&index: &usize| places[index].offset;
        let mut order: Vec<usize> = (0..lengths.len())
            .filter(|index| !rests(*index) && offset_of(index).is_some())
            .collect();
        order.sort_by_key(offset_of);
        for index in order {
            let start = offset_of(&index).expect("others were left out");
            if start >= end {
                end = start + lengths[index]; // Else its bytes are another's, too, which now has the place.
                spans[index] = start..end;
                placed[index] = true;
            }
        }
    }
    for (index, length) in lengths.iter().enumerate().filter(|(index, _)| !placed[*index]) {
        let start = end.next_multiple_of(ALIGNMENT);
        end = start + length;
        spans[index] = start..end;
    }
    (spans, end)
}

/// How far the training goes first. At 19 it hardly notices a save, and whoever waits for one on a busy machine waits for
/// long; at 5 it loses 3 % of its time while a save is under way.
const NICE: i32 = 10;
/// The same of copying, which the training waits for if it is late.
const COPY_NICE: i32 = 5;

/// Lets the training go first where there are fewer cores than threads.
fn give_way(nice: i32) {
    // On Linux this is the calling thread's own, and that of the threads it starts. Refused, nothing is lost.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::setpriority_process(None, nice);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(length: usize, offset: Option<usize>) -> Place {
        Place { length, offset }
    }

    fn place() -> impl Strategy<Value = Place> {
        (0..300usize, proptest::option::of(0..900usize)).prop_map(|(length, offset)| at(length, offset))
    }

    proptest! {
        #[test]
        fn no_two_copies_share_a_byte_wherever_the_last_pack_had_them(
            places in proptest::collection::vec(place(), 0..9), other: bool, resting in 0..512u32
        ) {
            let mut lengths: Vec<usize> = places.iter().map(|place| place.length).collect();
            if other {
                lengths.push(70);
            }
            let rests = |index: usize| resting >> index & 1 == 1;
            let (spans, end) = lay_out(&lengths, &places, rests);
            let copied = lengths.iter().enumerate().map(|(index, &length)| if rests(index) { 0 } else { length });
            prop_assert!(spans.iter().map(ExactSizeIterator::len).eq(copied));
            prop_assert!(spans.iter().all(|span| span.end <= end));
            let mut by_start: Vec<&Range<usize>> = spans.iter().filter(|span| !span.is_empty()).collect();
            by_start.sort_by_key(|span| span.start);
            prop_assert!(by_start.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    }

    #[test]
    fn copies_lie_as_the_last_pack_had_them_and_what_was_on_disk_lies_behind() {
        let places = [
            at(10, Some(202)),
            at(70, None),
            at(74, Some(128)),
            at(10, Some(202)),
        ];
        let nothing_rests = |_| false;
        let (spans, end) = lay_out(&[10, 70, 74, 10], &places, nothing_rests);
        assert_eq!(spans, [202..212, 256..326, 128..202, 384..394]);
        assert_eq!(end, 394);
        let (spans, _) = lay_out(&[10, 71, 74, 10], &places, nothing_rests);
        assert_eq!(spans, [0..10, 64..135, 192..266, 320..330]);
    }
}
