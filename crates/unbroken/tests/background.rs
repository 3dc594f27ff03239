//! Saving in the background: a slow disk, one that fails, memory that changes too early. What is acknowledged is there.
//!
//! Touches: memory only.

mod world;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unbroken::run::Run;
use unbroken::saver::{Outcome, Region, Save, Saver, Terms};
use unbroken::state::Value;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Leftovers, MemoryStorage};
use unbroken::storage::{Claim, Input, Output, Storage};
use unbroken::store::Retention;
use world::{components, leaf, open, resumed_step, shared};

/// A storage whose writes take their time.
#[derive(Debug)]
struct Slow(MemoryStorage, Duration);

#[derive(Debug)]
struct SlowOutput(Box<dyn Output>, Duration);

impl Output for SlowOutput {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        std::thread::sleep(self.1);
        self.0.write_at(offset, bytes)
    }

    fn reserve(&self, length: u64) -> io::Result<()> {
        self.0.reserve(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

impl Storage for Slow {
    fn location(&self) -> &Path {
        self.0.location()
    }

    fn create_dir(&self, name: &str) -> io::Result<()> {
        self.0.create_dir(name)
    }

    fn create_new(&self, name: &str) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(SlowOutput(self.0.create_new(name)?, self.1)))
    }

    fn reuse(&self, name: &str) -> io::Result<Option<Box<dyn Output>>> {
        self.0.reuse(name)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Input>> {
        self.0.open(name)
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename_new(from, to)
    }

    fn link_new(&self, from: &dyn Storage, name: &str, to: &str) -> io::Result<()> {
        self.0.link_new(from, name, to)
    }

    fn sync_dir(&self, name: &str) -> io::Result<()> {
        self.0.sync_dir(name)
    }

    fn list(&self, name: &str) -> io::Result<Vec<String>> {
        self.0.list(name)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.0.free_bytes()
    }

    fn lock(&self, name: &str) -> io::Result<Claim> {
        self.0.lock(name)
    }
}

/// A state of two storages: a large one, which is lent, and a small one, which is copied.
struct State {
    large: Vec<u64>,
    small: Vec<u64>,
}

const LARGE: usize = (9 << 20) / 8;

impl State {
    fn new() -> State {
        State {
            large: vec![0; LARGE],
            small: vec![0; 10],
        }
    }

    fn set(&mut self, step: u64) {
        self.large.fill(step);
        self.small.fill(step);
    }

    /// Its regions, the large one as nobody is known to have written to it.
    fn regions_at_rest(&self) -> Vec<Region> {
        let mut regions = self.regions();
        regions[0].unmoved = true;
        regions
    }

    fn regions(&self) -> Vec<Region> {
        let region = |words: &[u64], lent| Region {
            address: words.as_ptr().expose_provenance(),
            length: words.len() * 8,
            lent,
            unmoved: false,
        };
        vec![region(&self.large, true), region(&self.small, false)]
    }
}

fn save_at(step: u64) -> Save {
    Save {
        step,
        phase: 0,
        tree: Value::List(vec![leaf(0, 2 * LARGE as u64), leaf(1, 20)]),
        identity: Vec::new(),
        environment: Vec::new(),
        metrics: Vec::new(),
        pinned: false,
        keep: Some(Retention {
            last: Some(2),
            ..Retention::default()
        }),
    }
}

fn start(saver: &Saver, step: u64, state: &State) {
    // SAFETY: every test calls the fence before it changes or drops the state, except where it says so.
    unsafe { saver.start(save_at(step), &state.regions(), Terms::default()) }.unwrap();
}

fn looking_at_all() -> Terms {
    Terms {
        full: true,
        ..Terms::default()
    }
}

fn begun(storage: Arc<dyn Storage>) -> Arc<Run> {
    let run = open(&storage).unwrap();
    run.begin().unwrap();
    Arc::new(run)
}

fn record(run: &Run, step: u64) {
    if step > 0 {
        run.record(step, 0, 0, step, components(step)).unwrap();
    }
}

/// Asserts that every checkpoint holds its own step's number and no other.
fn assert_one_step_each(run: &Run) {
    for info in run.checkpoints() {
        let checkpoint = run.checkpoint(&info.name).unwrap();
        for storage in 0..2 {
            let bytes = checkpoint.read(storage).unwrap();
            let expected = info.step.to_le_bytes().repeat(bytes.len() / 8);
            assert!(bytes == expected, "storage {storage} of step {}", info.step);
        }
    }
}

#[test]
fn a_slow_disk_gets_one_step_into_each_checkpoint_while_training_goes_on() {
    // Each write takes 40 ms. The state changes right after each fence, long before the checkpoint is written.
    let memory = MemoryStorage::new();
    let run = begun(Arc::new(Slow(memory.clone(), Duration::from_millis(40))));
    let saver = Saver::new(Arc::clone(&run));
    let mut state = State::new();
    let mut in_flight = 0;
    for step in 0..=5 {
        state.set(step);
        record(&run, step);
        let begun = Instant::now();
        start(&saver, step, &state);
        saver.fence();
        state.set(1000 + step);
        in_flight += usize::from(saver.is_saving());
        assert!(begun.elapsed() < Duration::from_secs(20));
        let Some(Outcome::Saved(info)) = saver.wait() else {
            panic!("step {step} was not saved")
        };
        assert_eq!(info.step, step);
        assert!(
            saver.wait().is_none() && saver.outcome().is_none(),
            "an outcome is told once"
        );
    }
    assert_eq!(in_flight, 6, "the training went on while each was written");
    assert_eq!(
        run.checkpoints().iter().map(|info| info.step).collect::<Vec<_>>(),
        [4, 5]
    );
    assert_one_step_each(&run);
    let run = open(&shared(&memory.after_power_cut(Leftovers::Nothing))).unwrap();
    assert_eq!(resumed_step(&run), Some(5));
}

#[test]
fn what_is_written_before_the_fence_and_what_is_copied_for_it_make_one_step() {
    // Each write takes 3 ms. The fence comes at any moment of a save: what it copies is written after it. Some storages
    // are as they were, so that they are copied to be looked at, among others that are read where they lie.
    const WORDS: usize = 300_000;
    let memory = MemoryStorage::new();
    let run = begun(Arc::new(Slow(memory.clone(), Duration::from_millis(3))));
    let saver = Saver::new(Arc::clone(&run));
    let mut storages: Vec<Vec<u64>> = (0..20).map(|index| vec![0; WORDS + 1000 * index]).collect();
    let value = |index: u64, step: u64| 100 * index + if index.is_multiple_of(3) { step / 3 } else { step };
    for step in 0..=24 {
        for (index, storage) in storages.iter_mut().enumerate() {
            storage.fill(value(index as u64, step));
        }
        record(&run, step);
        let regions: Vec<Region> = storages
            .iter()
            .map(|words| Region {
                address: words.as_ptr().expose_provenance(),
                length: words.len() * 8,
                lent: true,
                unmoved: false,
            })
            .collect();
        let leaves = storages.iter().enumerate();
        let tree = Value::List(
            leaves
                .map(|(index, words)| leaf(index as u32, 2 * words.len() as u64))
                .collect(),
        );
        let terms = Terms {
            lent_for: (step % 3 > 0).then_some(Duration::from_secs(3600)),
            ..Terms::default()
        };
        let save = Save {
            tree,
            ..save_at(step)
        };
        // SAFETY: the state is there until the end, and changes only after the fence.
        unsafe { saver.start(save, &regions, terms) }.unwrap();
        std::thread::sleep(Duration::from_millis(2 * step));
        saver.fence();
        storages.iter_mut().for_each(|storage| storage.fill(u64::MAX));
        let Some(Outcome::Saved(info)) = saver.wait() else {
            panic!("step {step} was not saved")
        };
        let checkpoint = run.checkpoint(&info.name).unwrap();
        for (index, storage) in storages.iter().enumerate() {
            let expected = value(index as u64, step).to_le_bytes().repeat(storage.len());
            assert!(
                checkpoint.read(index).unwrap() == expected,
                "storage {index} of step {step}"
            );
        }
    }
}

#[test]
fn a_save_that_is_waited_for_before_the_fence_reads_all_of_it_where_it_lies() {
    let run = begun(shared(&MemoryStorage::new()));
    let saver = Saver::new(Arc::clone(&run));
    let mut state = State::new();
    for step in 0..=2 {
        state.set(step);
        record(&run, step);
        let terms = Terms {
            lent_for: Some(Duration::from_secs(3600)),
            ..looking_at_all()
        };
        // SAFETY: the state is there until the end, and changes only after the fence.
        unsafe { saver.start(save_at(step), &state.regions(), terms) }.unwrap();
        assert!(matches!(saver.wait(), Some(Outcome::Saved(_))), "step {step}");
        saver.fence();
        state.set(1000 + step);
        assert_one_step_each(&run);
    }
}

#[test]
fn a_save_that_fails_is_told_and_leaves_the_older_checkpoints() {
    for fault in [Fault::Device, Fault::NoSpace] {
        let faulty = FaultyStorage::new(Arc::new(MemoryStorage::new()));
        let run = begun(Arc::new(faulty.clone()));
        let saver = Saver::new(Arc::clone(&run));
        let mut state = State::new();
        for step in 0..=6 {
            state.set(step);
            record(&run, step);
            if step == 3 {
                faulty.fail_at(4, fault);
            }
            start(&saver, step, &state);
            saver.fence();
            let outcome = saver.wait();
            if step == 3 {
                assert!(
                    matches!(outcome, Some(Outcome::Failed { step: 3, .. })),
                    "{outcome:?}"
                );
                assert_eq!(run.checkpoints().last().unwrap().step, 2);
                faulty.heal();
            } else {
                assert!(matches!(outcome, Some(Outcome::Saved(_))), "{step}: {outcome:?}");
            }
            assert_one_step_each(&run);
        }
        assert_eq!(
            run.checkpoints().iter().map(|info| info.step).collect::<Vec<_>>(),
            [5, 6]
        );
    }
}

#[test]
fn memory_that_changes_before_it_is_copied_is_found_out() {
    // The end of what is lent is written to as soon as a save has begun: before it is copied, if not every time.
    let run = begun(shared(&MemoryStorage::new()));
    let saver = Saver::new(Arc::clone(&run));
    let mut state = State::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    for step in 0.. {
        assert!(Instant::now() < deadline, "nobody noticed in {step} saves");
        record(&run, step);
        let regions = state.regions();
        // SAFETY: the state is there until the end; that it changes is what this test is about.
        unsafe { saver.start(save_at(step), &regions, looking_at_all()) }.unwrap();
        let last = state.large.last_mut().expect("it is not empty");
        // SAFETY: a word of the state's own; volatile, so that it happens here and now.
        unsafe { std::ptr::from_mut(last).write_volatile(step + 1) };
        saver.fence();
        match saver.wait() {
            Some(Outcome::Torn { step: torn }) => {
                assert_eq!(torn, step);
                break;
            }
            outcome => assert!(matches!(outcome, Some(Outcome::Saved(_))), "{outcome:?}"),
        }
    }
}

#[test]
fn a_save_that_is_known_to_be_torn_writes_nothing() {
    let memory = MemoryStorage::new();
    let run = begun(shared(&memory));
    let saver = Saver::new(Arc::clone(&run));
    let state = State::new();
    let before = memory.files().len();
    let terms = Terms {
        confirm: Some(Box::new(|| false)),
        ..looking_at_all()
    };
    // SAFETY: the state is there until the end.
    unsafe { saver.start(save_at(0), &state.regions(), terms) }.unwrap();
    saver.fence();
    assert!(matches!(saver.wait(), Some(Outcome::Torn { step: 0 })));
    assert_eq!(memory.files().len(), before);
    start(&saver, 0, &state);
    saver.fence();
    assert!(matches!(saver.wait(), Some(Outcome::Saved(_))));
}

#[test]
fn what_rests_is_not_copied_and_stands_in_each_checkpoint_all_the_same() {
    let run = begun(shared(&MemoryStorage::new()));
    let saver = Saver::new(Arc::clone(&run));
    let mut state = State::new();
    state.set(7);
    for step in 0..=3 {
        record(&run, step);
        state.small.fill(step);
        // At first nobody knows what it was before, whatever is said of it.
        // SAFETY: the state is there until the end, and changes only when there is an outcome.
        unsafe { saver.start(save_at(step), &state.regions_at_rest(), Terms::default()) }.unwrap();
        saver.fence();
        let Some(Outcome::Saved(info)) = saver.wait() else {
            panic!("step {step} was not saved")
        };
        let checkpoint = run.checkpoint(&info.name).unwrap();
        assert_eq!(
            checkpoint.read(0).unwrap(),
            7u64.to_le_bytes().repeat(LARGE),
            "step {step}"
        );
        assert_eq!(
            checkpoint.read(1).unwrap(),
            step.to_le_bytes().repeat(10),
            "step {step}"
        );
        if step > 0 {
            assert!(
                info.new_bytes < 1000,
                "step {step} wrote {} bytes",
                info.new_bytes
            );
        }
    }
}

#[test]
fn what_does_not_rest_though_it_was_said_to_is_found_out_wherever_it_changed() {
    let memory = MemoryStorage::new();
    let run = begun(shared(&memory));
    let saver = Saver::new(Arc::clone(&run));
    let mut state = State::new();
    let mut step = 0;
    let mut save = |state: &State, regions: Vec<Region>| {
        record(&run, step);
        // SAFETY: the state is there until the end, and changes only when there is an outcome.
        unsafe { saver.start(save_at(step), &regions, Terms::default()) }.unwrap();
        saver.fence();
        let outcome = saver.wait();
        let saved = match outcome {
            Some(Outcome::Saved(info)) => Some(run.checkpoint(&info.name).unwrap().read(0).unwrap()),
            Some(Outcome::Stirred { step: told }) => {
                assert_eq!(told, step);
                None
            }
            other => panic!("{other:?}"),
        };
        step += 1;
        assert!(saved.is_none_or(|bytes| {
            bytes
                .chunks(8)
                .zip(&state.large)
                .all(|(bytes, word)| bytes == word.to_le_bytes())
        }));
        memory.files().into_keys().collect::<BTreeSet<_>>()
    };
    let mut files = save(&state, state.regions());
    // One bit, anywhere: windows of a tensor miss most places, digests of all of it none.
    for word in [0, 1, LARGE / 2 + 4321, LARGE - 1] {
        state.large[word] ^= 1 << 40;
        assert_eq!(
            save(&state, state.regions_at_rest()),
            files,
            "word {word}: nothing was written"
        );
        let before = files;
        files = save(&state, state.regions());
        assert_ne!(files, before, "word {word}: saved when nothing is said of it");
    }
}

#[test]
fn an_outcome_that_nobody_asked_for_stops_the_next_save() {
    let run = begun(shared(&MemoryStorage::new()));
    let saver = Saver::new(run);
    let state = State::new();
    start(&saver, 0, &state);
    saver.fence();
    // SAFETY: nothing is started.
    let refused = unsafe { saver.start(save_at(1), &state.regions(), Terms::default()) };
    assert!(refused.unwrap_err().to_string().contains("nobody asked"));
    assert!(matches!(saver.wait(), Some(Outcome::Saved(_))));
}

#[test]
fn a_crash_anywhere_in_a_save_in_the_background_costs_only_that_checkpoint() {
    // Steps 0 and 1 are durable. The process dies at each operation of step 2's save.
    for fault in [Fault::Crash, Fault::CrashAfter] {
        for index in 0.. {
            let memory = MemoryStorage::new();
            let faulty = FaultyStorage::new(Arc::new(memory.clone()));
            let run = begun(Arc::new(faulty.clone()));
            let saver = Saver::new(Arc::clone(&run));
            let state = State::new();
            let small = |step: u64| {
                let regions = vec![state.regions()[1]];
                let save = Save {
                    tree: leaf(0, 20),
                    ..save_at(step)
                };
                record(&run, step);
                // SAFETY: the state is there until the end.
                unsafe { saver.start(save, &regions, Terms::default()) }.unwrap();
                saver.fence();
                matches!(saver.wait(), Some(Outcome::Saved(_)))
            };
            assert!(small(0) && small(1));
            run.record(2, 0, 0, 2, components(2)).unwrap();
            faulty.fail_at(index, fault);
            let save = Save {
                tree: leaf(0, 20),
                ..save_at(2)
            };
            // SAFETY: as above.
            unsafe { saver.start(save, &[state.regions()[1]], Terms::default()) }.unwrap();
            let saved = matches!(saver.wait(), Some(Outcome::Saved(_)));
            let died = faulty.operations().len() > index;
            for leftovers in [Leftovers::Nothing, Leftovers::Names, Leftovers::Everything] {
                let story = format!("{fault:?} at operation {index}, leaving {leftovers:?}");
                let run = open(&shared(&memory.after_power_cut(leftovers))).unwrap();
                let step = resumed_step(&run).unwrap();
                assert!(step == 2 || (step == 1 && !saved), "{story}: step {step}");
                assert!(run.rejected().is_empty(), "{story}: {:?}", run.rejected());
            }
            if !died {
                assert!(saved && index > 10, "only {index} operations were tried");
                break;
            }
        }
    }
}
