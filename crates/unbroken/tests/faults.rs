//! Each operation of a life fails once, in each way in which a disk can fail: opening, beginning, recording, reading,
//! saving over a deleted pack's file, pruning, closing. Saving into new files is in store_checkpoints.rs.
//!
//! Touches: memory only.

mod world;

use std::path::Path;
use std::sync::Arc;

use unbroken::error::Error;
use unbroken::run::Run;
use unbroken::storage::Storage;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Leftovers, MemoryStorage};
use unbroken::store::Retention;
use world::{
    REUSING, assert_exact, commit_at, components, files_in, newest_two, open, resumed_step, run_in_memory,
    shared, train,
};

const FAULTS: [Fault; 5] = [
    Fault::Device,
    Fault::NoSpace,
    Fault::TooManyFiles,
    Fault::Interrupted,
    Fault::ShortWrite,
];

fn breakable(memory: &MemoryStorage) -> (FaultyStorage, Arc<dyn Storage>) {
    let faulty = FaultyStorage::new(shared(memory));
    (faulty.clone(), Arc::new(faulty))
}

/// Does `act` on a fresh copy for each fault at each of its operations. `judge` is told what came of it, whether the fault
/// struck, and a sentence for messages.
fn each_fault<T>(
    before: &MemoryStorage,
    least: usize,
    prepare: impl Fn(&Arc<dyn Storage>) -> Option<Run>,
    act: impl Fn(&Arc<dyn Storage>, Option<&Run>) -> unbroken::Result<T>,
    judge: impl Fn(&MemoryStorage, unbroken::Result<T>, Option<Run>, &str),
) {
    for fault in FAULTS {
        for index in 0.. {
            let memory = before.fork();
            let (faulty, storage) = breakable(&memory);
            let run = prepare(&storage);
            faulty.fail_at(index, fault);
            let outcome = act(&storage, run.as_ref());
            let operations = faulty.operations();
            let (retried, failed) = (faulty.retried_syncs(), faulty.failed());
            faulty.heal();
            let last = operations.get(index);
            let story = format!(
                "{fault:?} at operation {index}, {last:?}, of {}",
                operations.len()
            );
            assert_eq!(retried, 0, "{story}: a sync was tried again");
            if let Err(error) = &outcome {
                let Error::Io {
                    doing, path, source, ..
                } = error
                else {
                    panic!("{story}: {error}")
                };
                // The call and the file are named that failed, not those of a call that came of it.
                let named = |(call, name): &(&str, String)| {
                    doing.contains(call) && path == &Path::new("memory:").join(name)
                };
                let refused_before = fault == Fault::NoSpace && failed.is_empty();
                assert!(
                    failed.iter().any(named) || refused_before,
                    "{story}: {failed:?}, {error}"
                );
                assert!(source.raw_os_error().is_some(), "{story}: {error}");
            }
            judge(&memory, outcome, run, &story);
            if operations.len() <= index {
                assert!(index >= least, "only {index} operations were tried");
                break;
            }
        }
    }
}

#[test]
fn an_operation_that_fails_while_a_run_is_opened_is_named_or_costs_nothing() {
    // Never an older checkpoint in silence: a file that cannot be read is named, and what can be tried again is an error.
    each_fault(
        &run_in_memory(2),
        20,
        |_| None,
        |storage, _| open(storage),
        |memory, outcome, _, story| {
            match outcome {
                Ok(run) => {
                    let step = resumed_step(&run);
                    assert_exact(run.resumed_from().unwrap());
                    // The device failed to read a byte of the newest: it will not read it next time either.
                    let passed_over = story.starts_with("Device") && run.rejected().len() == 1;
                    assert!(
                        step == Some(2) || (step == Some(1) && passed_over),
                        "{story}: {step:?}"
                    );
                }
                Err(error) => assert!(!story.starts_with("Short"), "{story}: {error}"),
            }
            let run = open(&shared(memory)).unwrap_or_else(|error| panic!("{story}: {error}"));
            assert_eq!(resumed_step(&run), Some(2), "{story}");
            assert!(run.rejected().is_empty(), "{story}");
        },
    );
}

#[test]
fn an_operation_that_fails_while_a_run_is_made_leaves_a_directory_that_can_be_made_one() {
    each_fault(
        &MemoryStorage::new(),
        8,
        |_| None,
        |storage, _| open(storage),
        |memory, outcome, _, story| {
            drop(outcome);
            let run = open(&shared(memory)).unwrap_or_else(|error| panic!("{story}: {error}"));
            run.begin().unwrap();
            train(&run, 0..=1).unwrap();
            assert!(files_in(memory, "tmp").is_empty(), "{story}");
        },
    );
}

#[test]
fn an_operation_that_fails_while_a_life_begins_can_be_made_again() {
    each_fault(
        &run_in_memory(1),
        4,
        |storage| Some(open(storage).unwrap()),
        |_, run| run.unwrap().begin(),
        |memory, outcome, run, story| {
            let run = run.unwrap();
            if outcome.is_err() {
                run.begin().unwrap_or_else(|error| panic!("{story}: {error}"));
            }
            train(&run, 2..=3).unwrap_or_else(|error| panic!("{story}: {error}"));
            let cut = memory.after_power_cut(Leftovers::Nothing);
            let run = open(&shared(&cut)).unwrap();
            assert_eq!(resumed_step(&run), Some(3), "{story}");
            assert!(run.warnings().is_empty(), "{story}: {:?}", run.warnings());
        },
    );
}

#[test]
fn a_record_that_fails_can_be_made_again_and_is_there_once() {
    each_fault(
        &run_in_memory(1),
        1,
        |storage| {
            let run = open(storage).unwrap();
            run.begin().unwrap();
            Some(run)
        },
        |_, run| run.unwrap().record(2, 0, 0, 2, components(2)),
        |memory, outcome, run, story| {
            let run = run.unwrap();
            if outcome.is_err() {
                let again = run.record(2, 0, 0, 2, components(2));
                again.unwrap_or_else(|error| panic!("{story}: {error}"));
            }
            commit_at(&run, 2).unwrap_or_else(|error| panic!("{story}: {error}"));
            run.close().unwrap();
            let run = open(&shared(memory)).unwrap();
            assert_eq!(resumed_step(&run), Some(2), "{story}");
            assert!(run.warnings().is_empty(), "{story}: {:?}", run.warnings());
        },
    );
}

#[test]
fn a_close_that_fails_says_so_and_gives_the_lock_back() {
    each_fault(
        &run_in_memory(1),
        1,
        |storage| {
            let run = open(storage).unwrap();
            run.begin().unwrap();
            run.record(2, 0, 0, 2, components(2)).unwrap();
            Some(run)
        },
        |_, run| run.unwrap().close(),
        |memory, outcome, run, story| {
            drop(outcome);
            let next = open(&shared(memory)).unwrap_or_else(|error| panic!("{story}: {error}"));
            assert_eq!(resumed_step(&next), Some(1), "{story}");
            drop(run);
        },
    );
}

#[test]
fn a_read_that_fails_hands_out_nothing_and_works_the_next_time() {
    each_fault(
        &run_in_memory(1),
        4,
        |storage| Some(open(storage).unwrap()),
        |_, run| {
            let run = run.unwrap();
            let checkpoint = run.checkpoint(&run.checkpoints()[0].name)?;
            checkpoint.verify()?;
            let storages = checkpoint.storages().len();
            (0..storages)
                .map(|storage| checkpoint.read(storage))
                .collect::<unbroken::Result<Vec<_>>>()
        },
        |_, outcome, run, story| {
            if let Ok(found) = outcome {
                assert_eq!(found, world::storages(0), "{story}");
            }
            let run = run.unwrap();
            assert_exact(&run.checkpoint(&run.checkpoints()[0].name).unwrap());
        },
    );
}

#[test]
fn an_operation_that_fails_while_checkpoints_are_deleted_loses_none_that_is_kept() {
    let policy = Retention {
        last: Some(2),
        ..Retention::default()
    };
    each_fault(
        &run_in_memory(4),
        10,
        |storage| Some(open(storage).unwrap()),
        |_, run| run.unwrap().prune(&policy, false),
        |memory, outcome, run, story| {
            let run = run.unwrap();
            let now = open(&shared(&memory.fork())).unwrap();
            assert_eq!(resumed_step(&now), Some(4), "{story}");
            assert!(now.rejected().is_empty(), "{story}");
            if outcome.is_err() {
                run.prune(&policy, false)
                    .unwrap_or_else(|error| panic!("{story}: {error}"));
            }
            run.close().unwrap();
            let run = open(&shared(&memory.after_power_cut(Leftovers::Nothing))).unwrap();
            let steps: Vec<u64> = run.checkpoints().iter().map(|info| info.step).collect();
            assert_eq!(steps, [3, 4], "{story}");
            assert!(run.rejected().is_empty(), "{story}");
            assert_exact(run.resumed_from().unwrap());
        },
    );
}

#[test]
fn an_operation_that_fails_while_several_writers_save_over_a_deleted_packs_file_costs_that_save_only() {
    let prepare = |storage: &Arc<dyn Storage>| {
        let run = REUSING.open(storage).unwrap();
        run.begin().unwrap();
        for step in 0..=3 {
            REUSING.train(&run, step..=step).unwrap();
            run.prune(&newest_two(), false).unwrap();
        }
        run.record(4, 0, 0, 4, components(4)).unwrap();
        Some(run)
    };
    each_fault(
        &MemoryStorage::new(),
        12,
        prepare,
        |_, run| REUSING.commit(run.unwrap(), 4),
        |memory, outcome, run, story| {
            let run = run.unwrap();
            let now = REUSING.open(&shared(&memory.fork())).unwrap();
            assert_eq!(
                resumed_step(&now),
                Some(if outcome.is_ok() { 4 } else { 3 }),
                "{story}"
            );
            assert!(now.rejected().is_empty(), "{story}");
            // The file that waits to be written over may still do so; nothing else is left.
            let left = files_in(memory, "tmp").into_keys();
            assert!(left.into_iter().all(|name| name.ends_with(".old")), "{story}");
            if outcome.is_err() {
                REUSING
                    .commit(&run, 4)
                    .unwrap_or_else(|error| panic!("{story}: {error}"));
            }
            run.prune(&newest_two(), false)
                .unwrap_or_else(|error| panic!("{story}: {error}"));
            run.close().unwrap();
            assert!(files_in(memory, "tmp").is_empty(), "{story}");
            let run = REUSING
                .open(&shared(&memory.after_power_cut(Leftovers::Nothing)))
                .unwrap();
            let steps: Vec<u64> = run.checkpoints().iter().map(|info| info.step).collect();
            assert_eq!(steps, [3, 4], "{story}");
            for info in run.checkpoints() {
                REUSING.exact(&run.checkpoint(&info.name).unwrap()).unwrap();
            }
        },
    );
}
