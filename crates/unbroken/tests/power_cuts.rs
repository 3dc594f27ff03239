//! The power fails at every instant of a save, of a prune and of the sweep at open; every disk that may be left is opened.
//!
//! Touches: memory only. `UNBROKEN_EXPLORE=long` explores longer histories, with operations that failed in them, for
//! minutes: `UNBROKEN_EXPLORE=long cargo test --release -p unbroken --test power_cuts -- --nocapture`.

mod disks;
mod world;

use std::io;
use std::path::Path;
use std::sync::Arc;

use disks::{Disk, Effort, Found};
use unbroken::run::Run;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Effect, MemoryStorage};
use unbroken::storage::{Claim, Input, Output, Storage};
use unbroken::store::{Best, Checkpoint, Order, Retention};
use world::{commit_with, components, files_in, open, resumed_step, shared, storages, train, tree};

fn long() -> bool {
    std::env::var("UNBROKEN_EXPLORE").is_ok_and(|effort| effort == "long")
}

fn effort() -> Effort {
    Effort {
        all_up_to: if long() { 1 << 16 } else { 1 << 9 },
        drawn: if long() { 1 << 12 } else { 60 },
        seed: 1,
    }
}

/// What has to be on every disk that a power cut may leave.
#[derive(Clone, Debug, Default, Hash, PartialEq)]
struct Demands {
    /// The newest step that was acknowledged, if one was.
    acknowledged: Option<u64>,
    /// The newest step that was begun.
    attempted: u64,
    /// Steps whose checkpoints must be there.
    kept: Vec<u64>,
    /// Steps whose checkpoints must be gone.
    gone: Vec<u64>,
}

fn exact(checkpoint: &Checkpoint) -> Result<(), String> {
    let step = checkpoint.info().step;
    if checkpoint.tree() != &tree(step) {
        return Err(format!("step {step} has another tree"));
    }
    for (index, bytes) in storages(step).iter().enumerate() {
        let found = checkpoint
            .read(index)
            .map_err(|error| format!("step {step}: {error}"))?;
        if &found != bytes {
            return Err(format!("storage {index} of step {step} has other bytes"));
        }
    }
    Ok(())
}

/// What must hold of any disk: it opens, says nothing of damage, has what it must and nothing by halves, and goes on.
fn check(disk: &MemoryStorage, demands: &Demands) -> Result<(), String> {
    let told = |error: unbroken::Error| error.to_string();
    let run = open(&shared(disk)).map_err(told)?;
    if let Some((name, why)) = run.rejected().first() {
        return Err(format!("{name} is offered and not whole: {why}"));
    }
    // Pages that arrive in another order than they were written look like damage of the journal's unsynced end.
    let expected = |text: &str| text.starts_with("removed") || text.contains("` is damaged at byte");
    if let Some(text) = run.warnings().iter().find(|text| !expected(text)) {
        return Err(format!("a warning: {text}"));
    }
    let step = resumed_step(&run);
    if step < demands.acknowledged || step > Some(demands.attempted) {
        return Err(format!(
            "resumed from {step:?}, {:?} was acknowledged",
            demands.acknowledged
        ));
    }
    let steps: Vec<u64> = run.checkpoints().iter().map(|info| info.step).collect();
    let missing = demands.kept.iter().find(|step| !steps.contains(step));
    let back = demands.gone.iter().find(|step| steps.contains(step));
    if missing.is_some() || back.is_some() {
        return Err(format!(
            "of the checkpoints {steps:?}, {missing:?} is missing, {back:?} should be gone"
        ));
    }
    let mut packs = 0;
    for info in run.checkpoints() {
        let checkpoint = run.checkpoint(&info.name).map_err(told)?;
        exact(&checkpoint)?;
        packs += usize::from(info.new_bytes > 0);
    }
    let left = files_in(disk, "tmp").len();
    // The frozen leaf lies in the pack of step 0, which may stay for its sake alone.
    let unused = files_in(disk, "objects").len() > packs + usize::from(!steps.contains(&0));
    if left > 0 || unused {
        return Err(format!(
            "{left} temporary files are left, or packs that nothing refers to ({unused})"
        ));
    }
    goes_on(disk, run, step)
}

/// The next steps are executed and committed, and are there in the life after.
fn goes_on(disk: &MemoryStorage, run: Run, step: Option<u64>) -> Result<(), String> {
    let told = |error: unbroken::Error| error.to_string();
    let next = step.map_or(0, |step| step + 1);
    run.begin().map_err(told)?;
    train(&run, next..=next + 1).map_err(told)?;
    run.close().map_err(told)?;
    drop(run);
    let run = open(&shared(disk)).map_err(told)?;
    match run.resumed_from() {
        Some(checkpoint) if checkpoint.info().step == next + 1 => exact(checkpoint),
        other => Err(format!("went on to step {}, and found {other:?}", next + 1)),
    }
}

fn policy() -> Retention {
    Retention {
        last: Some(2),
        best: Some(Best {
            metric: "accuracy".to_owned(),
            order: Order::Max,
            count: 1,
        }),
        ..Retention::default()
    }
}

/// A run with steps 0 to `last`, the best of them step 1, closed. The policy keeps that and the newest two.
fn scored(last: u64) -> MemoryStorage {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    for step in 0..=last {
        if step > 0 {
            run.record(step, 0, 0, step, components(step)).unwrap();
        }
        let accuracy = if step == 1 { 0.9 } else { 0.5 };
        commit_with(&run, step, vec![("accuracy".to_owned(), accuracy)], false).unwrap();
    }
    run.close().unwrap();
    memory
}

/// A storage that forgets some of what makes writing durable.
#[derive(Clone, Debug)]
struct Careless {
    inner: Arc<dyn Storage>,
    forgets: Forgets,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Forgets {
    /// Nothing: as careful as its inner storage.
    Nothing,
    /// To sync files.
    Files,
    /// To sync this directory.
    Directory(&'static str),
    /// To remove files in this directory.
    Removal(&'static str),
}

impl Careless {
    fn over(memory: &MemoryStorage, forgets: Forgets) -> Arc<dyn Storage> {
        Arc::new(Careless {
            inner: shared(memory),
            forgets,
        })
    }

    fn output(&self, output: Box<dyn Output>) -> Box<dyn Output> {
        if self.forgets == Forgets::Files {
            Box::new(Unsynced(output))
        } else {
            output
        }
    }
}

#[derive(Debug)]
struct Unsynced(Box<dyn Output>);

impl Output for Unsynced {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_at(offset, bytes)
    }

    fn reserve(&self, length: u64) -> io::Result<()> {
        self.0.reserve(length)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Storage for Careless {
    fn location(&self) -> &Path {
        self.inner.location()
    }

    fn create_dir(&self, name: &str) -> io::Result<()> {
        self.inner.create_dir(name)
    }

    fn create_new(&self, name: &str) -> io::Result<Box<dyn Output>> {
        self.inner.create_new(name).map(|output| self.output(output))
    }

    fn reuse(&self, name: &str) -> io::Result<Option<Box<dyn Output>>> {
        Ok(self.inner.reuse(name)?.map(|output| self.output(output)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Input>> {
        self.inner.open(name)
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename_new(from, to)
    }

    fn sync_dir(&self, name: &str) -> io::Result<()> {
        if self.forgets
            == Forgets::Directory(match name {
                "" => "",
                "checkpoints" => "checkpoints",
                "objects" => "objects",
                "journal" => "journal",
                _ => return self.inner.sync_dir(name),
            })
        {
            return Ok(());
        }
        self.inner.sync_dir(name)
    }

    fn list(&self, name: &str) -> io::Result<Vec<String>> {
        self.inner.list(name)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match self.forgets {
            Forgets::Removal(dir) if name.starts_with(dir) => Ok(()),
            _ => self.inner.remove(name),
        }
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.inner.free_bytes()
    }

    fn lock(&self, name: &str) -> io::Result<Claim> {
        self.inner.lock(name)
    }
}

/// What is asked of a history: from which operation on to look, and which step was acknowledged by which operation.
struct Told {
    base: Disk,
    history: Vec<Effect>,
    acknowledged: Vec<(usize, u64)>,
    attempted: u64,
}

impl Told {
    fn explore(&self, found: &mut Found) {
        let demands = |done: usize| Demands {
            acknowledged: self
                .acknowledged
                .iter()
                .rev()
                .find(|(at, _)| *at <= done)
                .map(|(_, step)| *step),
            attempted: self.attempted,
            ..Demands::default()
        };
        found.explore(&self.base, &self.history, 0, effort(), demands, check);
    }
}

/// A directory that becomes a run, and its steps 0 to `last`.
fn new_run(last: u64, forgets: Forgets) -> Told {
    let memory = MemoryStorage::new();
    let base = Disk::of(&memory);
    memory.record();
    let run = open(&Careless::over(&memory, forgets)).unwrap();
    run.begin().unwrap();
    let mut acknowledged = Vec::new();
    for step in 0..=last {
        train(&run, step..=step).unwrap();
        acknowledged.push((memory.history().len(), step));
    }
    Told {
        base,
        history: memory.history(),
        acknowledged,
        attempted: last,
    }
}

/// The next life of a run with steps 0 and 1, and its steps 2 and 3. One operation of step 2's commit fails where `fault`
/// says; tells whether there was such an operation.
fn two_saves(forgets: Forgets, fault: Option<(usize, Fault)>) -> (Told, bool) {
    let memory = scored(1);
    let base = Disk::of(&memory);
    memory.record();
    let faulty = FaultyStorage::new(Careless::over(&memory, forgets));
    let run = open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>)).unwrap();
    run.begin().unwrap();
    let mut acknowledged = vec![(0, 1)];
    let mut struck = true;
    for step in 2..=3 {
        run.record(step, 0, 0, step, components(step)).unwrap();
        // Records that only the system has: the end of the journal may be torn.
        run.event("mark", step, Vec::new()).unwrap();
        if let (2, Some((at, fault))) = (step, fault) {
            faulty.fail_at(at, fault);
            let failed = world::commit_at(&run, step).is_err();
            struck = failed || faulty.operations().len() > at;
            faulty.heal();
            if !failed {
                acknowledged.push((memory.history().len(), step));
                continue;
            }
        }
        world::commit_at(&run, step).unwrap();
        acknowledged.push((memory.history().len(), step));
    }
    let told = Told {
        base,
        history: memory.history(),
        acknowledged,
        attempted: 3,
    };
    (told, struck)
}

/// A life in which older checkpoints are deleted, and whose next save is written over the file of a deleted pack.
fn a_save_over_a_deleted_pack() -> Told {
    let memory = scored(3);
    let base = Disk::of(&memory);
    memory.record();
    let faulty = FaultyStorage::new(shared(&memory));
    let run = open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>)).unwrap();
    run.begin().unwrap();
    let mut acknowledged = vec![(0, 3)];
    train(&run, 4..=4).unwrap();
    acknowledged.push((memory.history().len(), 4));
    run.prune(&policy(), false).unwrap();
    train(&run, 5..=5).unwrap();
    acknowledged.push((memory.history().len(), 5));
    assert!(faulty.operations().contains(&"reuse"));
    Told {
        base,
        history: memory.history(),
        acknowledged,
        attempted: 5,
    }
}

/// The newest step before a prune.
const NEWEST: u64 = 6;

/// A prune that has all it asks of its storage, or forgets something.
fn a_prune(forgets: Forgets, found: &mut Found) {
    let memory = scored(NEWEST);
    let base = Disk::of(&memory);
    memory.record();
    let run = open(&Careless::over(&memory, forgets)).unwrap();
    run.prune(&policy(), false).unwrap();
    let history = memory.history();
    let demands = |done: usize| demands_of_prune(done == history.len());
    found.explore(&base, &history, 0, effort(), demands, check);
}

fn demands_of_prune(acknowledged: bool) -> Demands {
    Demands {
        acknowledged: Some(NEWEST),
        attempted: NEWEST,
        kept: vec![1, NEWEST - 1, NEWEST],
        gone: if acknowledged {
            vec![0, 2, 3, 4]
        } else {
            Vec::new()
        },
    }
}

/// The life after a prune that was killed before its operation `at`: it opens the run, sweeps, and the power fails. Tells
/// whether the prune has that many operations.
fn a_sweep(at: usize, forgets: Forgets, found: &mut Found) -> bool {
    let memory = scored(NEWEST);
    let base = Disk::of(&memory);
    memory.record();
    let faulty = FaultyStorage::new(shared(&memory));
    let run = open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>)).unwrap();
    faulty.fail_at(at, Fault::Crash);
    let pruned = run.prune(&policy(), false);
    drop(run);
    let killed = memory.history().len();
    drop(open(&Careless::over(&memory, forgets)).unwrap());
    let demands = |_| demands_of_prune(false);
    found.explore(&base, &memory.history(), killed, effort(), demands, check);
    pruned.is_err()
}

#[test]
fn a_power_cut_at_any_instant_of_a_runs_beginning_leaves_nothing_or_what_was_acknowledged() {
    let mut found = Found::default();
    new_run(if long() { 3 } else { 1 }, Forgets::Nothing).explore(&mut found);
    found.assert_none(1000);
}

#[test]
fn a_power_cut_at_any_instant_of_a_save_leaves_the_newest_acknowledged_checkpoint() {
    let mut found = Found::default();
    two_saves(Forgets::Nothing, None).0.explore(&mut found);
    found.assert_none(600);
    assert_eq!(found.drawn, 0, "every disk was built");
}

#[test]
fn a_power_cut_at_any_instant_of_a_save_over_a_deleted_packs_file_leaves_the_newest_acknowledged_checkpoint()
{
    let mut found = Found::default();
    a_save_over_a_deleted_pack().explore(&mut found);
    found.assert_none(1000);
}

#[test]
fn a_power_cut_after_a_save_that_failed_leaves_the_newest_acknowledged_checkpoint() {
    // One operation of step 2's commit fails; the commit is made again. In short explorations a sample of the places.
    let mut found = Found::default();
    for fault in [Fault::Device, Fault::NoSpace] {
        for at in (1..).step_by(if long() { 1 } else { 12 }) {
            let (told, struck) = two_saves(Forgets::Nothing, Some((at, fault)));
            if !struck {
                break;
            }
            told.explore(&mut found);
        }
    }
    found.assert_none(2000);
}

#[test]
fn a_power_cut_at_any_instant_of_a_prune_leaves_what_the_policy_keeps() {
    let mut found = Found::default();
    a_prune(Forgets::Nothing, &mut found);
    found.assert_none(25);
    assert_eq!(found.drawn, 0, "every disk was built");
}

#[test]
fn a_power_cut_in_the_sweep_after_a_prune_that_was_killed_leaves_what_the_policy_keeps() {
    let mut found = Found::default();
    let kills = (0..)
        .take_while(|at| a_sweep(*at, Forgets::Nothing, &mut found))
        .count();
    assert!(kills > 10, "only {kills} operations were tried");
    found.assert_none(100);
}

#[test]
fn each_sync_that_is_left_out_is_found() {
    fn assert_finds(words: &str, explore: impl FnOnce(&mut Found)) {
        let mut found = Found::default();
        explore(&mut found);
        let told = found.violations.iter().any(|what| what.contains(words));
        assert!(told, "{words}: {:?}", found.violations);
    }
    let beginning = |forgets| move |found: &mut Found| new_run(0, forgets).explore(found);
    let saves = |forgets| move |found: &mut Found| two_saves(forgets, None).0.explore(found);
    let prune = |forgets| move |found: &mut Found| a_prune(forgets, found);
    assert_finds("resumed from None", beginning(Forgets::Directory("")));
    assert_finds("run.toml", beginning(Forgets::Files));
    assert_finds("is offered and not whole", saves(Forgets::Files));
    assert_finds("is offered and not whole", saves(Forgets::Directory("objects")));
    assert_finds(
        "resumed from Some(1), Some(2)",
        saves(Forgets::Directory("checkpoints")),
    );
    assert_finds("the journal does not hold", saves(Forgets::Directory("journal")));
    assert_finds("is not whole", prune(Forgets::Directory("checkpoints")));
    assert_finds("should be gone", prune(Forgets::Removal("checkpoints")));
}

#[test]
fn a_sweep_that_does_not_sync_first_is_found() {
    let mut found = Found::default();
    let mut at = 0;
    while a_sweep(at, Forgets::Directory("checkpoints"), &mut found) && found.violations.is_empty() {
        at += 1;
    }
    let told = found.violations.iter().any(|what| what.contains("is not whole"));
    assert!(told, "{:?}", found.violations);
}
