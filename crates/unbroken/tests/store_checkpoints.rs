//! Checkpoints: what is written, what is not written twice, what a failing disk and damaged files come to.
//!
//! Touches: memory; a temporary directory for reading by path.

mod world;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use unbroken::cause::Change;
use unbroken::error::{Error, Result};
use unbroken::localise::{State, compare_states};
use unbroken::run::{Options, Run, read_checkpoint, read_journal, read_run};
use unbroken::state::Value;
use unbroken::storage::Storage;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Leftovers, MemoryStorage};
use unbroken::store::{Best, CheckpointInfo, Commit, Order, Retention};
use world::{
    FROZEN, assert_exact, commit_at, commit_with, components, files_in, leaf, of_tree, open, resumed_step,
    run_in_memory, shared, storages, train, tree,
};

#[test]
fn what_was_committed_is_what_the_next_life_opens() {
    let memory = run_in_memory(3);
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(resumed_step(&run), Some(3));
    let checkpoint = run.resumed_from().unwrap();
    assert_exact(checkpoint);
    let info = checkpoint.info();
    assert_eq!(
        (info.life, info.run_id.as_str(), info.pinned),
        (1, run.id(), false)
    );
    assert_eq!(info.identity, vec![("workers".to_owned(), Value::Int(2))]);
    assert_eq!(info.size_bytes, FROZEN as u64 + 80);
    assert_eq!(
        run.checkpoints().iter().map(|info| info.step).collect::<Vec<_>>(),
        [0, 1, 2, 3]
    );
    assert!(run.warnings().is_empty(), "{:?}", run.warnings());
}

#[test]
fn equal_storages_are_written_once_in_a_checkpoint_across_checkpoints_and_across_lives() {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    let bytes = [vec![1u8; 500_000], vec![1u8; 500_000], vec![2u8; 10]];
    let commit = |run: &Run, step: u64| {
        let tree = Value::List(vec![leaf(0, 125_000), leaf(1, 125_000)]);
        run.commit(of_tree(step, tree, bytes.iter().map(Vec::as_slice).collect()))
    };
    let first = commit(&run, 0).unwrap();
    assert!(
        (500_010..501_000).contains(&first.new_bytes),
        "{}",
        first.new_bytes
    );
    assert_eq!(first.size_bytes, 1_000_010);
    assert_eq!(commit(&run, 1).unwrap().new_bytes, 0);
    run.close().unwrap();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    assert_eq!(commit(&run, 2).unwrap().new_bytes, 0);
    assert_eq!(files_in(&memory, "objects").len(), 1);
    assert_eq!(files_in(&memory, "checkpoints").len(), 3);
    run.close().unwrap();
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(run.resumed_from().unwrap().read(1).unwrap(), bytes[1]);
}

#[test]
fn a_state_that_changed_from_save_to_save_and_then_stands_still_is_not_written_again() {
    let run = open(&shared(&MemoryStorage::new())).unwrap();
    run.begin().unwrap();
    let commit = |step: u64, weights: &[u8]| {
        let commit = of_tree(step, leaf(0, weights.len() as u64 / 4), vec![weights]);
        run.commit(commit).unwrap().new_bytes
    };
    let mut weights = vec![0u8; 100_000];
    for step in 0..4 {
        weights.fill(step as u8);
        assert!(commit(step, &weights) > 100_000);
    }
    assert_eq!(commit(4, &weights), 0);
    // One byte that no sample looks at is a change like any other, of one chunk.
    weights[1] ^= 1;
    assert!((8192..9000).contains(&commit(5, &weights)));
    assert_eq!(commit(6, &weights), 0);
}

#[test]
fn equal_bytes_that_this_process_never_read_are_read_before_anything_relies_on_them() {
    // Step 1 has other weights than step 0, so that opening reads step 1 only. Step 0's weights rot on the disk; then step 2
    // has the very same weights again. It must be whole, so it must not refer to the rotten ones.
    let memory = run_in_memory(1);
    let pack = pack_of(&memory, 0);
    let weights = world::storages(0)[1].clone();
    let mut bytes = memory.files()[&pack].clone();
    let at = bytes
        .windows(weights.len())
        .position(|window| window == weights)
        .unwrap();
    bytes[at] ^= 1;
    memory.put(&pack, bytes);
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(resumed_step(&run), Some(1));
    run.begin().unwrap();
    run.commit(of_tree(2, leaf(0, 10), vec![&weights])).unwrap();
    run.close().unwrap();
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(resumed_step(&run), Some(2));
    assert_eq!(run.resumed_from().unwrap().read(0).unwrap(), weights);
}

#[test]
fn packs_that_vanish_under_a_running_run_are_written_again() {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    train(&run, 0..=1).unwrap();
    for name in files_in(&memory, "objects").into_keys() {
        memory.remove(&format!("objects/{name}")).unwrap();
    }
    train(&run, 2..=2).unwrap();
    run.close().unwrap();
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(resumed_step(&run), Some(2));
    assert_exact(run.resumed_from().unwrap());
}

#[test]
fn thousands_of_small_tensors_are_written_with_few_calls() {
    let faulty = FaultyStorage::new(Arc::new(MemoryStorage::new()));
    let run = open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>)).unwrap();
    run.begin().unwrap();
    let bytes: Vec<Vec<u8>> = (0..3000u32).map(|index| index.to_le_bytes().repeat(25)).collect();
    faulty.heal();
    let tree = Value::List((0..3000).map(|index| leaf(index, 25)).collect());
    run.commit(of_tree(0, tree, bytes.iter().map(Vec::as_slice).collect()))
        .unwrap();
    assert!(faulty.operations().len() < 40, "{:?}", faulty.operations());
    run.close().unwrap();
    let run = open(&(Arc::new(faulty) as Arc<dyn Storage>)).unwrap();
    assert_eq!(run.resumed_from().unwrap().read(2999).unwrap(), bytes[2999]);
}

/// Commits thousands of small tensors, all of which have changed.
fn commit_many(run: &Run, step: u64, change: impl FnOnce(&mut Commit<&[u8]>)) -> Result<CheckpointInfo> {
    let bytes: Vec<Vec<u8>> = (0..2000u64).map(|index| many_bytes(step, index)).collect();
    let tree = Value::List((0..2000).map(|index| leaf(index, 10)).collect());
    let mut commit = of_tree(step, tree, bytes.iter().map(Vec::as_slice).collect());
    change(&mut commit);
    run.commit(commit)
}

fn many_bytes(step: u64, index: u64) -> Vec<u8> {
    (step * 1_000_000 + index).to_le_bytes().repeat(5)
}

#[test]
fn thousands_of_tensors_that_the_format_refuses_in_a_form_that_it_knows_leave_nothing_behind() {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    for step in 0..2 {
        commit_many(&run, step, |_| ()).unwrap();
    }
    let before = memory.files();
    let refused = commit_many(&run, 2, |commit| {
        commit.environment = vec![("tensor".to_owned(), leaf(0, 10))];
    });
    assert!(refused.unwrap_err().to_string().contains("storage 0 of 0"));
    for dir in ["tmp", "objects", "checkpoints"] {
        let names = |memory: &BTreeMap<String, Vec<u8>>| -> Vec<String> {
            memory
                .keys()
                .filter(|name| name.starts_with(dir))
                .cloned()
                .collect()
        };
        assert_eq!(names(&memory.files()), names(&before));
    }
    commit_many(&run, 2, |_| ()).unwrap();
    run.close().unwrap();
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(
        run.resumed_from().unwrap().read(1999).unwrap(),
        many_bytes(2, 1999)
    );
}

#[test]
fn an_operation_that_fails_while_thousands_of_tensors_are_saved_costs_that_save_only() {
    for index in 0.. {
        let memory = MemoryStorage::new();
        let faulty = FaultyStorage::new(Arc::new(memory.clone()));
        let run = open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>)).unwrap();
        run.begin().unwrap();
        for step in 0..2 {
            commit_many(&run, step, |_| ()).unwrap();
        }
        faulty.fail_at(index, Fault::Device);
        let outcome = commit_many(&run, 2, |_| ());
        let operations = faulty.operations();
        let story = format!("operation {index} of {operations:?}: {outcome:?}");
        faulty.heal();
        if outcome.is_err() {
            let other = open(&shared(&memory.fork())).unwrap();
            assert_eq!(resumed_step(&other), Some(1), "{story}");
            other.resumed_from().unwrap().verify().unwrap();
            commit_many(&run, 2, |_| ()).unwrap_or_else(|error| panic!("{story}: {error}"));
        }
        assert!(files_in(&memory, "tmp").is_empty(), "{story}");
        let memory = memory.after_power_cut(Leftovers::Nothing);
        let run = open(&shared(&memory)).unwrap();
        assert_eq!(resumed_step(&run), Some(2), "{story}");
        assert_eq!(
            run.resumed_from().unwrap().read(1999).unwrap(),
            many_bytes(2, 1999)
        );
        if operations.len() <= index {
            assert!(outcome.is_ok() && index > 10, "{story}");
            break;
        }
    }
}

#[test]
fn an_operation_of_a_commit_that_fails_once_costs_that_commit_only() {
    // Steps 0 and 1 are committed. In step 2's commit one operation fails; the error says which and where. Everything
    // before is whole, nothing of step 2 is claimed, and the same commit works when made again.
    for fault in [
        Fault::Device,
        Fault::NoSpace,
        Fault::TooManyFiles,
        Fault::Interrupted,
        Fault::ShortWrite,
    ] {
        for index in 0.. {
            let memory = MemoryStorage::new();
            let faulty = FaultyStorage::new(Arc::new(memory.clone()));
            let storage: Arc<dyn Storage> = Arc::new(faulty.clone());
            let run = open(&storage).unwrap();
            run.begin().unwrap();
            train(&run, 0..=1).unwrap();
            run.record(2, 0, 0, 2, components(2)).unwrap();
            faulty.fail_at(index, fault);
            let outcome = commit_at(&run, 2);
            let (operations, failed) = (faulty.operations(), faulty.failed());
            let story = format!("{fault:?} at operation {index} of {operations:?}");
            faulty.heal();
            match &outcome {
                Ok(info) => assert!(
                    memory.files().contains_key(&format!("checkpoints/{}", info.name)),
                    "{story}"
                ),
                Err(Error::Io {
                    doing,
                    path,
                    needed_bytes,
                    free_bytes,
                    ..
                }) => {
                    let named = |(call, name): &(&str, String)| {
                        doing.contains(call) && path == &Path::new("memory:").join(name)
                    };
                    assert!(failed.iter().any(named), "{story}: {failed:?}, {outcome:?}");
                    let known = needed_bytes.is_some_and(|bytes| bytes > 80) && *free_bytes == Some(4096);
                    assert!(fault != Fault::NoSpace || known, "{story}: {outcome:?}");
                }
                Err(other) => panic!("{story}: {other}"),
            }
            if outcome.is_err() {
                // What another process would see at this moment.
                let other = open(&shared(&memory.fork())).unwrap();
                assert_eq!(resumed_step(&other), Some(1), "{story}");
                assert!(other.rejected().is_empty(), "{story}: {:?}", other.rejected());
                commit_at(&run, 2).unwrap_or_else(|error| panic!("{story}: {error}"));
            }
            train(&run, 3..=3).unwrap_or_else(|error| panic!("{story}: {error}"));
            assert!(
                files_in(&memory, "tmp").is_empty(),
                "{story}: {:?}",
                files_in(&memory, "tmp").keys()
            );
            assert_eq!(files_in(&memory, "objects").len(), 4, "{story}");
            assert_eq!(files_in(&memory, "checkpoints").len(), 4, "{story}");
            // Also after a power cut: no sync was taken for done that was not.
            let memory = memory.after_power_cut(Leftovers::Nothing);
            let run = open(&shared(&memory)).unwrap();
            assert_eq!(resumed_step(&run), Some(3), "{story}");
            assert!(run.warnings().is_empty(), "{story}: {:?}", run.warnings());
            assert_exact(run.resumed_from().unwrap());
            if operations.len() <= index {
                assert!(outcome.is_ok() && index > 10, "{story}");
                break;
            }
        }
    }
}

/// Name of the only file in a directory of the run that belongs to a step: its manifest, or the pack it added.
fn manifest_of(memory: &MemoryStorage, step: u64) -> String {
    let names = files_in(memory, "checkpoints");
    let name = names
        .into_keys()
        .find(|name| name.starts_with(&format!("{step:09}-")))
        .unwrap();
    format!("checkpoints/{name}")
}

fn pack_of(memory: &MemoryStorage, step: u64) -> String {
    let run = open(&shared(&memory.fork())).unwrap();
    let overview = run.checkpoints();
    let info = overview.iter().find(|info| info.step == step).unwrap();
    let bytes = memory.files()[&format!("checkpoints/{}", info.name)].clone();
    let (manifest, _) = unbroken::format::manifest::decode(&bytes).unwrap();
    format!("objects/{}", manifest.packs.last().unwrap().name)
}

#[test]
fn every_kind_of_incomplete_newest_checkpoint_falls_back_and_is_named() {
    // A run with steps 0 to 4. The newest, or the two newest, are damaged in one way; the next life goes on from the
    // newest whole one and names each that it passed over. With `strict` it refuses instead.
    type Damage = fn(&MemoryStorage);
    let kinds: [(&str, u64, usize, Damage); 8] = [
        ("a truncated pack", 3, 1, |memory| {
            let name = pack_of(memory, 4);
            let mut bytes = memory.files()[&name].clone();
            bytes.truncate(bytes.len() - 1);
            memory.put(&name, bytes);
        }),
        ("empty files in the two newest", 2, 2, |memory| {
            for step in [3, 4] {
                let (pack, manifest) = (pack_of(memory, step), manifest_of(memory, step));
                memory.put(&pack, Vec::new());
                memory.put(&manifest, Vec::new());
            }
        }),
        ("a deleted manifest", 3, 0, |memory| {
            memory.remove(&manifest_of(memory, 4)).unwrap()
        }),
        ("a deleted pack", 3, 1, |memory| {
            memory.remove(&pack_of(memory, 4)).unwrap()
        }),
        ("an empty directory with a higher number", 4, 1, |memory| {
            memory
                .create_dir("checkpoints/000000009-0-0123456789abcdef")
                .unwrap();
        }),
        ("an older pack under the newest one's name", 3, 1, |memory| {
            let older = memory.files()[&pack_of(memory, 2)].clone();
            memory.put(&pack_of(memory, 4), older);
        }),
        ("an older manifest under the newest one's name", 3, 1, |memory| {
            let older = memory.files()[&manifest_of(memory, 2)].clone();
            memory.put(&manifest_of(memory, 4), older);
        }),
        ("a changed byte in a tensor", 3, 1, |memory| {
            let name = pack_of(memory, 4);
            let mut bytes = memory.files()[&name].clone();
            *bytes.last_mut().unwrap() ^= 1;
            memory.put(&name, bytes);
        }),
    ];
    let before = run_in_memory(4);
    for (kind, step, rejected, damage) in kinds {
        let memory = before.fork();
        damage(&memory);
        let strict = Run::open_on(
            shared(&memory.fork()),
            &Options {
                strict: true,
                ..Options::default()
            },
        );
        assert_eq!(strict.is_err(), rejected > 0, "{kind}");
        let run = open(&shared(&memory)).unwrap();
        assert_eq!(resumed_step(&run), Some(step), "{kind}");
        assert_exact(run.resumed_from().unwrap());
        assert_eq!(run.rejected().len(), rejected, "{kind}: {:?}", run.rejected());
        assert!(
            run.rejected()
                .iter()
                .all(|(name, why)| name.len() > 20 && !why.is_empty()),
            "{kind}"
        );
        run.begin().unwrap();
        // What earlier lives executed is executed again, and is the same.
        train(&run, step + 1..=6).unwrap();
        run.close().unwrap();
        let run = open(&shared(&memory)).unwrap();
        assert_eq!(resumed_step(&run), Some(6), "{kind}");
    }
}

#[test]
fn a_run_whose_checkpoints_are_all_lost_is_refused_and_left_alone() {
    type Damage = fn(&MemoryStorage);
    let kinds: [(&str, Damage); 3] = [
        ("all manifests deleted", |memory| {
            for name in files_in(memory, "checkpoints").into_keys() {
                memory.remove(&format!("checkpoints/{name}")).unwrap();
            }
        }),
        ("all manifests empty", |memory| {
            for name in files_in(memory, "checkpoints").into_keys() {
                memory.put(&format!("checkpoints/{name}"), Vec::new());
            }
        }),
        ("all packs deleted", |memory| {
            for name in files_in(memory, "objects").into_keys() {
                memory.remove(&format!("objects/{name}")).unwrap();
            }
        }),
    ];
    for (kind, damage) in kinds {
        let memory = run_in_memory(2);
        damage(&memory);
        let before: Vec<_> = memory
            .files()
            .into_iter()
            .filter(|(name, _)| name != "lock")
            .collect();
        for _ in 0..2 {
            let error = open(&shared(&memory)).unwrap_err();
            assert!(
                matches!(&error, Error::NoWholeCheckpoint { rejected, .. } if !rejected.is_empty()),
                "{kind}: {error}"
            );
        }
        let after: Vec<_> = memory
            .files()
            .into_iter()
            .filter(|(name, _)| name != "lock")
            .collect();
        assert_eq!(after, before, "{kind}");
    }
}

#[test]
fn reading_a_damaged_tensor_names_its_file_and_leaf() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    let run = Run::open(&path, &Options::default()).unwrap();
    run.begin().unwrap();
    let info = commit_at(&run, 0).unwrap();
    run.close().unwrap();
    let whole = read_checkpoint(&info.path).unwrap();
    assert_exact(&whole);
    assert_exact(&read_checkpoint(&path).unwrap());
    let pack = path.join("objects").join(&whole.manifest().packs[0].name);
    let mut bytes = std::fs::read(&pack).unwrap();
    let weight = whole.manifest().storages[1].place.whole().unwrap().1 as usize;
    bytes[weight] ^= 4;
    std::fs::write(&pack, bytes).unwrap();
    let opened = read_checkpoint(&info.path).unwrap();
    assert_eq!(opened.read(0).unwrap().len(), FROZEN);
    for error in [opened.read(1).unwrap_err(), opened.verify().unwrap_err()] {
        let Error::Damaged {
            path,
            part,
            expected,
            found,
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!((path, part.as_str()), (&pack, "model/weight"));
        assert_ne!(expected, found);
    }
    assert!(matches!(
        read_checkpoint(&path),
        Err(Error::NoWholeCheckpoint { .. })
    ));
    let mut small = [0; 3];
    assert!(matches!(
        opened.read_into(vec![(0, &mut small[..])]),
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(opened.read(99), Err(Error::Invalid { .. })));
}

#[test]
fn the_newest_the_best_and_the_pinned_stay_and_another_runs_checkpoint_is_untouched() {
    // Steps 9000 to 10100 by 100, the best at 9300, a pinned one at 9500; a directory with step 50000 of another run.
    let other = run_in_memory(0);
    let run = open(&shared(&other)).unwrap();
    run.begin().unwrap();
    run.record(50_000, 0, 0, 0, components(1)).unwrap();
    let foreign = commit_at(&run, 50_000).unwrap();
    run.close().unwrap();
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.close().unwrap();
    let theirs: Vec<_> = other
        .files()
        .into_iter()
        .filter(|(name, _)| name.starts_with("objects/"))
        .collect();
    let manifest = format!("checkpoints/{}", foreign.name);
    for (name, bytes) in theirs
        .iter()
        .cloned()
        .chain([(manifest.clone(), other.files()[&manifest].clone())])
    {
        memory.put(&name, bytes);
    }
    let policy = Retention {
        last: Some(2),
        best: Some(Best {
            metric: "score".to_owned(),
            order: Order::Min,
            count: 1,
        }),
        ..Retention::default()
    };
    let run = open(&shared(&memory)).unwrap();
    assert!(
        run.warnings()
            .iter()
            .any(|warning| warning.contains(&foreign.name)),
        "{:?}",
        run.warnings()
    );
    run.begin().unwrap();
    for step in (9_000..=10_100).step_by(100) {
        run.record(step, 0, 0, step, components(step)).unwrap();
        let score = if step == 9_300 { 0.1 } else { step as f64 };
        let score = if step == 9_100 { f64::NAN } else { score };
        commit_with(&run, step, vec![("score".to_owned(), score)], step == 9_500).unwrap();
        let shown = run.prune(&policy, true).unwrap();
        assert_eq!(
            run.prune(&policy, false).unwrap(),
            shown,
            "the dry run shows what goes"
        );
        let kept: Vec<u64> = run.checkpoints().iter().map(|info| info.step).collect();
        assert!(
            kept.contains(&step) && (step < 9_100 || kept.contains(&(step - 100))),
            "{kept:?}"
        );
    }
    let kept: Vec<u64> = run.checkpoints().iter().map(|info| info.step).collect();
    assert_eq!(kept, [9_300, 9_500, 10_000, 10_100]);
    run.close().unwrap();
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(resumed_step(&run), Some(10_100));
    let files = memory.files();
    assert!(files.contains_key(&manifest));
    assert!(theirs.iter().all(|(name, bytes)| files.get(name) == Some(bytes)));
    assert_eq!(files_in(&memory, "checkpoints").len(), 5);
    assert!(matches!(
        run.prune(
            &Retention {
                last: Some(0),
                ..Retention::default()
            },
            true
        ),
        Err(Error::Invalid { .. })
    ));
    assert!(run.prune(&Retention::default(), false).unwrap().is_empty());
    let every = Retention {
        every: Some(500),
        ..Retention::default()
    };
    assert_eq!(run.prune(&every, false).unwrap().len(), 1);
    let kept: Vec<u64> = run.checkpoints().iter().map(|info| info.step).collect();
    assert_eq!(kept, [9_500, 10_000, 10_100]);
}

/// Commits step 3's state at all three of its boundaries, pruning after each.
fn end_at_step_3(run: &Run, keep: &Retention) {
    let storages = storages(3);
    for phase in 0..=2 {
        run.record(3, phase, 0, 3, components(3)).unwrap();
        let storages = storages.iter().map(Vec::as_slice).collect();
        let mut commit = of_tree(3, tree(3), storages);
        (commit.phase, commit.metrics) = (phase, vec![("score".to_owned(), 1.0)]);
        run.commit(commit).unwrap();
        run.prune(keep, false).unwrap();
    }
}

#[test]
fn a_flipped_bit_at_the_runs_end_leaves_the_step_before_where_two_are_kept() {
    // The checkpoints of one step share their packs: three manifests on one copy of the bytes are no second chance.
    let memory = run_in_memory(2);
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    let keep = Retention {
        last: Some(2),
        ..Retention::default()
    };
    end_at_step_3(&run, &keep);
    let infos = run.checkpoints();
    let kept: Vec<_> = infos.iter().map(|info| (info.step, info.phase)).collect();
    assert_eq!(kept, [(2, 0), (3, 2)]);
    run.close().unwrap();
    let pack = pack_of(&memory, 3);
    let mut bytes = memory.files()[&pack].clone();
    *bytes.last_mut().unwrap() ^= 1;
    memory.put(&pack, bytes);
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(resumed_step(&run), Some(2));
    assert_exact(run.resumed_from().unwrap());
}

#[test]
fn every_rule_counts_steps_and_keeps_the_newest_of_each() {
    let memory = run_in_memory(2);
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    commit_with(&run, 2, vec![("score".to_owned(), 2.0)], false).unwrap();
    end_at_step_3(&run, &Retention::default());
    let kept = |policy: Retention| {
        let gone = run.prune(&policy, true).unwrap();
        let infos = run.checkpoints().into_iter();
        let kept = infos.filter(|info| !gone.contains(&info.name));
        kept.map(|info| (info.step, info.phase)).collect::<Vec<_>>()
    };
    let rule = Retention::default;
    let last = Some(3);
    assert_eq!(kept(Retention { last, ..rule() }), [(1, 0), (2, 0), (3, 2)]);
    let every = Some(2);
    assert_eq!(kept(Retention { every, ..rule() }), [(0, 0), (2, 0), (3, 2)]);
    let best = Some(Best {
        metric: "score".to_owned(),
        order: Order::Min,
        count: 2,
    });
    assert_eq!(kept(Retention { best, ..rule() }), [(2, 0), (3, 0), (3, 2)]);
}

#[test]
fn nothing_is_deleted_while_the_newest_checkpoint_is_damaged() {
    let memory = run_in_memory(3);
    let run = open(&shared(&memory)).unwrap();
    let pack = pack_of(&memory, 3);
    let mut bytes = memory.files()[&pack].clone();
    *bytes.last_mut().unwrap() ^= 1;
    memory.put(&pack, bytes);
    let before = files_in(&memory, "checkpoints");
    let error = run
        .prune(
            &Retention {
                last: Some(1),
                ..Retention::default()
            },
            false,
        )
        .unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    assert_eq!(files_in(&memory, "checkpoints"), before);
}

#[test]
fn packs_stay_while_a_manifest_cannot_be_read() {
    let memory = run_in_memory(3);
    let manifest = manifest_of(&memory, 1);
    memory.put(&manifest, b"rubbish".to_vec());
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(run.rejected(), [], "an older one is a warning");
    assert!(
        run.warnings()
            .iter()
            .any(|warning| warning.contains("000000001-")),
        "{:?}",
        run.warnings()
    );
    let gone = run
        .prune(
            &Retention {
                last: Some(1),
                ..Retention::default()
            },
            false,
        )
        .unwrap();
    assert_eq!(gone.len(), 2);
    assert_eq!(files_in(&memory, "objects").len(), 4);
    run.close().unwrap();
    memory.remove(&manifest).unwrap();
    open(&shared(&memory)).unwrap();
    assert_eq!(
        files_in(&memory, "objects").len(),
        2,
        "the newest one's and the one with the frozen leaf"
    );
}

#[test]
fn a_desktops_file_among_the_manifests_keeps_no_pack() {
    let memory = run_in_memory(3);
    let leftover = format!("objects/{}.safetensors", "b".repeat(32));
    memory.put("checkpoints/.DS_Store", b"desktop".to_vec());
    memory.put(&leftover, b"never referred to".to_vec());
    let run = open(&shared(&memory)).unwrap();
    assert!(!memory.files().contains_key(&leftover), "swept at open");
    assert_eq!(run.warnings().len(), 1, "{:?}", run.warnings());
    let newest = Retention {
        last: Some(1),
        ..Retention::default()
    };
    assert_eq!(run.prune(&newest, false).unwrap().len(), 3);
    assert_eq!(files_in(&memory, "objects").len(), 2);
    assert_eq!(run.take_notices(), [] as [String; 0]);
    assert!(memory.files().contains_key("checkpoints/.DS_Store"));
}

#[test]
fn a_strangers_file_keeps_all_packs_and_is_named_once_until_it_is_gone() {
    let memory = run_in_memory(1);
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    let newest = Retention {
        last: Some(1),
        ..Retention::default()
    };
    let save = |step| {
        train(&run, step..=step).unwrap();
        run.prune(&newest, false).unwrap();
        (run.take_notices(), files_in(&memory, "objects").len())
    };
    let manifest = manifest_of(&memory, 1);
    memory.put("checkpoints/notes.txt", b"mine".to_vec());
    let (notices, packs) = save(2);
    assert!(
        notices[0].contains("`checkpoints/notes.txt` is no checkpoint"),
        "{notices:?}"
    );
    assert_eq!((notices.len(), packs), (1, 3));
    assert_eq!(save(3), (Vec::new(), 4));
    memory.remove("checkpoints/notes.txt").unwrap();
    assert_eq!(save(4), (Vec::new(), 2));
    memory.put(&manifest, b"rubbish".to_vec());
    let (notices, packs) = save(5);
    assert!(notices[0].contains("000000001-0-"), "{notices:?}");
    assert_eq!((notices.len(), packs), (1, 3));
}

#[test]
fn two_checkpoints_are_compared_leaf_by_leaf() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    let run = Run::open(
        &path,
        &Options {
            seed: Some(1),
            ..Options::default()
        },
    )
    .unwrap();
    run.begin().unwrap();
    train(&run, 0..=2).unwrap();
    let overview = read_run(&path).unwrap();
    assert_eq!((overview.checkpoints.len(), overview.seed), (3, 1));
    let (one, two) = (&overview.checkpoints[1], &overview.checkpoints[2]);
    let state = |checkpoint| State::held(checkpoint, None);
    assert_eq!(compare_states(&state(one), &state(one)).unwrap(), []);
    let leaves = compare_states(&state(one), &state(two)).unwrap();
    let paths: Vec<&str> = leaves.iter().map(|leaf| leaf.path.as_str()).collect();
    assert_eq!(paths, ["model/weight", "optimizer/0/0", "optimizer/0/1"]);
    let Change::Elements { elements, .. } = &leaves[0].change else {
        panic!("{:?}", leaves[0])
    };
    assert_eq!((elements.total, elements.differing, elements.first), (10, 10, 0));
    // 100.0 and 200.0 have equal significands: their distance is one doubling, 2^23 places.
    assert_eq!(elements.max_ulps, 1 << 23);
    let number = Change::Value {
        expected: "1".to_owned(),
        found: "2".to_owned(),
    };
    assert_eq!(leaves[2].change, number);
}

#[test]
fn a_missing_run_is_an_error_that_names_it() {
    let place = tempfile::tempdir().unwrap();
    let nowhere = place.path().join("nowhere");
    for error in [
        read_checkpoint(&nowhere).unwrap_err(),
        read_journal(&nowhere).unwrap_err(),
    ] {
        assert!(error.to_string().contains("nowhere"), "{error}");
    }
    let error = read_journal(place.path()).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error}");
    let Error::Io { source, .. } = read_journal(&nowhere).unwrap_err() else {
        panic!("not found is of the system")
    };
    assert_eq!(source.kind(), ErrorKind::NotFound);
}
