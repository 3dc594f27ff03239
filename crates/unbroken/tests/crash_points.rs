//! The process dies, or the power fails, at every single operation; what was acknowledged is there, whole.
//!
//! Touches: memory only.

mod world;

use std::sync::Arc;

use unbroken::run::Run;
use unbroken::storage::Storage;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Leftovers, MemoryStorage};
use unbroken::store::{Best, Order, Retention};
use world::{
    REUSING, assert_exact, commit_with, components, files_in, newest_two, open, resumed_step, shared, train,
};

const LEFTOVERS: [Leftovers; 5] = [
    Leftovers::Nothing,
    Leftovers::Names,
    Leftovers::NamesExcept("checkpoints"),
    Leftovers::NamesExcept("objects"),
    Leftovers::Everything,
];

/// A storage that dies at the `index`-th operation, and the disk below it.
fn dying(memory: MemoryStorage) -> (MemoryStorage, FaultyStorage, Arc<dyn Storage>) {
    let faulty = FaultyStorage::new(Arc::new(memory.clone()));
    let storage: Arc<dyn Storage> = Arc::new(faulty.clone());
    (memory, faulty, storage)
}

/// Opens what a crash left, in each way that it may have left it.
fn after_each_crash(memory: &MemoryStorage, story: &str, check: impl Fn(&MemoryStorage, &str)) {
    for leftovers in LEFTOVERS {
        check(
            &memory.after_power_cut(leftovers),
            &format!("{story}, leaving {leftovers:?}"),
        );
    }
}

#[test]
fn a_crash_anywhere_in_a_new_runs_first_commit_leaves_a_run_that_starts() {
    // An empty directory; the process dies while it makes it a run, begins and commits step 0. The next start must find
    // either nothing or all of step 0, and say nothing about what it swept.
    for fault in [Fault::Crash, Fault::CrashAfter] {
        for index in 0.. {
            let (memory, faulty, storage) = dying(MemoryStorage::new());
            faulty.fail_at(index, fault);
            let committed = open(&storage).and_then(|run| {
                run.begin()?;
                train(&run, 0..=0)
            });
            let survived = committed.is_ok();
            after_each_crash(
                &memory,
                &format!("{fault:?} at operation {index}"),
                |disk, story| {
                    let run = open(&shared(disk)).unwrap_or_else(|error| panic!("{story}: {error}"));
                    assert!(run.rejected().is_empty(), "{story}: {:?}", run.rejected());
                    if survived {
                        assert_eq!(resumed_step(&run), Some(0), "{story}");
                    }
                    if let Some(checkpoint) = run.resumed_from() {
                        assert_exact(checkpoint);
                    }
                    run.begin().unwrap_or_else(|error| panic!("{story}: {error}"));
                    train(&run, resumed_step(&run).map_or(0, |step| step + 1)..=2).unwrap();
                    assert!(files_in(disk, "tmp").is_empty(), "{story}");
                },
            );
            if survived && faulty.operations().len() <= index {
                assert!(index > 20, "only {index} operations were tried");
                break;
            }
        }
    }
}

#[test]
fn a_crash_anywhere_in_a_commit_loses_nothing_that_was_acknowledged() {
    // Steps 0 and 1 are committed; the process dies while step 2 is. Step 1 or step 2 must be there afterwards, whole,
    // with nothing rejected: a checkpoint that is half there is never seen, not even as damaged.
    for fault in [Fault::Crash, Fault::CrashAfter] {
        for index in 0.. {
            let (memory, faulty, storage) = dying(MemoryStorage::new());
            let run = open(&storage).unwrap();
            run.begin().unwrap();
            train(&run, 0..=1).unwrap();
            faulty.fail_at(index, fault);
            let acknowledged = train(&run, 2..=2).is_ok();
            let died = faulty.operations().len() > index;
            drop(run);
            after_each_crash(
                &memory,
                &format!("{fault:?} at operation {index}"),
                |disk, story| {
                    let run = open(&shared(disk)).unwrap_or_else(|error| panic!("{story}: {error}"));
                    let step = resumed_step(&run).unwrap();
                    assert!(step == 2 || (step == 1 && !acknowledged), "{story}: step {step}");
                    assert!(run.rejected().is_empty(), "{story}: {:?}", run.rejected());
                    let warned = run
                        .warnings()
                        .iter()
                        .any(|warning| !warning.starts_with("removed"));
                    assert!(!warned, "{story}: {:?}", run.warnings());
                    assert_exact(run.resumed_from().unwrap());
                    assert!(files_in(disk, "tmp").is_empty(), "{story}");
                    let packs: Vec<_> = files_in(disk, "objects").into_keys().collect();
                    assert_eq!(packs.len() as u64, step + 1, "{story}: {packs:?}");
                    run.begin().unwrap();
                    train(&run, step + 1..=3).unwrap();
                },
            );
            if !died {
                assert!(acknowledged && index > 10, "only {index} operations were tried");
                break;
            }
        }
    }
}

#[test]
fn a_crash_anywhere_in_a_prune_leaves_what_the_policy_keeps() {
    // Steps 0 to 4 with a metric; keep the last two and the best one, step 1. The process dies while the others go. Each
    // checkpoint is afterwards there, whole, or gone; those to be kept are there.
    let policy = Retention {
        last: Some(2),
        best: Some(Best {
            metric: "accuracy".to_owned(),
            order: Order::Max,
            count: 1,
        }),
        ..Retention::default()
    };
    let before = MemoryStorage::new();
    let run = open(&shared(&before)).unwrap();
    run.begin().unwrap();
    for step in 0..=4u64 {
        if step > 0 {
            run.record(step, 0, 0, step, components(step)).unwrap();
        }
        let accuracy = if step == 1 { 0.9 } else { 0.5 };
        commit_with(&run, step, vec![("accuracy".to_owned(), accuracy)], false).unwrap();
    }
    run.close().unwrap();
    for fault in [Fault::Crash, Fault::CrashAfter] {
        for index in 0.. {
            let (memory, faulty, storage) = dying(before.fork());
            let run = open(&storage).unwrap();
            faulty.fail_at(index, fault);
            let pruned = run.prune(&policy, false);
            let died = faulty.operations().len() > index;
            drop(run);
            // A kill, then a start that sweeps, then a power cut.
            let swept = memory.fork();
            drop(open(&shared(&swept)).unwrap());
            let cut = swept.after_power_cut(Leftovers::NamesExcept("checkpoints"));
            let run = open(&shared(&cut)).unwrap();
            let not_whole = run.warnings().iter().any(|warning| warning.contains("not whole"));
            assert!(!not_whole, "{fault:?} at operation {index}: {:?}", run.warnings());
            after_each_crash(
                &memory,
                &format!("{fault:?} at operation {index}"),
                |disk, story| {
                    let run = open(&shared(disk)).unwrap_or_else(|error| panic!("{story}: {error}"));
                    assert_eq!(resumed_step(&run), Some(4), "{story}");
                    assert!(run.rejected().is_empty(), "{story}: {:?}", run.rejected());
                    let not_whole = run.warnings().iter().any(|warning| warning.contains("not whole"));
                    assert!(!not_whole, "{story}: {:?}", run.warnings());
                    let steps: Vec<u64> = run.checkpoints().iter().map(|info| info.step).collect();
                    assert!(
                        [1, 3, 4].iter().all(|step| steps.contains(step)),
                        "{story}: {steps:?}"
                    );
                    assert_eq!(
                        run.prune(&policy, false).unwrap().len(),
                        steps.len() - 3,
                        "{story}"
                    );
                    // The frozen leaf lies in the first commit's pack, which is kept as long as anything refers to it.
                    assert_eq!(files_in(disk, "objects").len(), 4, "{story}");
                    run.close().unwrap();
                    let run = open(&shared(disk)).unwrap();
                    for info in run.checkpoints() {
                        let names = files_in(disk, "checkpoints");
                        assert!(names.contains_key(&info.name), "{story}");
                    }
                    assert_exact(run.resumed_from().unwrap());
                },
            );
            if !died {
                assert_eq!(pruned.unwrap().len(), 2);
                assert!(index > 8, "only {index} operations were tried");
                break;
            }
        }
    }
}

/// Executes a step of a training whose packs are written over the files of deleted ones, and deletes all but two.
fn save_over(run: &Run, step: u64) -> unbroken::Result<()> {
    REUSING.train(run, step..=step)?;
    run.prune(&newest_two(), false).map(drop)
}

#[test]
fn a_crash_anywhere_while_a_deleted_packs_file_is_written_over_harms_no_checkpoint() {
    // Steps 0 to 3 are committed, the last two kept: a deleted pack's file waits in tmp/. The process dies while step 4 is
    // written over it, or while step 2 is deleted. Every checkpoint that is there afterwards is whole.
    let mut reused = 0;
    for fault in [Fault::Crash, Fault::CrashAfter] {
        for index in 0.. {
            let (memory, faulty, storage) = dying(MemoryStorage::new());
            let run = REUSING.open(&storage).unwrap();
            run.begin().unwrap();
            (0..=3).for_each(|step| save_over(&run, step).unwrap());
            faulty.fail_at(index, fault);
            let acknowledged = save_over(&run, 4).is_ok();
            let operations = faulty.operations();
            reused += usize::from(operations.contains(&"reuse"));
            drop(run);
            let story = format!("{fault:?} at operation {index} of {operations:?}");
            after_each_crash(&memory, &story, |disk, story| {
                let run = REUSING.open(&shared(disk)).unwrap();
                let step = resumed_step(&run).unwrap();
                assert!(step == 4 || (step == 3 && !acknowledged), "{story}: step {step}");
                assert!(run.rejected().is_empty(), "{story}: {:?}", run.rejected());
                for info in run.checkpoints() {
                    let checkpoint = run.checkpoint(&info.name).unwrap();
                    REUSING
                        .exact(&checkpoint)
                        .unwrap_or_else(|what| panic!("{story}: {what}"));
                }
                assert!(files_in(disk, "tmp").is_empty(), "{story}");
                run.begin().unwrap();
                (step + 1..=6).for_each(|step| save_over(&run, step).unwrap());
                run.close().unwrap();
                assert!(
                    files_in(disk, "tmp").is_empty(),
                    "{story}: the spare file is left"
                );
                assert_eq!(files_in(disk, "objects").len(), 2, "{story}");
            });
            if operations.len() <= index {
                assert!(acknowledged && index > 20, "only {index} operations were tried");
                break;
            }
        }
    }
    assert!(reused > 20, "a file was reused in {reused} stories only");
}
