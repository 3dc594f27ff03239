//! Storages in pieces: large ones that change in few places, through failing disks, power cuts, damage and repair.
//!
//! Touches: memory; temporary directories for repair.

mod disks;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use disks::{Disk, Effort, Found};
use unbroken::error::Error;
use unbroken::fork::{Sharing, fork};
use unbroken::format::manifest::Place;
use unbroken::repair::{Action, repair};
use unbroken::run::{self, Options, Run};
use unbroken::state::Value;
use unbroken::storage::Storage;
use unbroken::storage::disk::DiskStorage;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Leftovers, MemoryStorage};
use unbroken::store::Checkpoint;
use world::{
    SMALL, Training, components, damage_each_pack, files_in, leaf, newest_two, resumed_step, shared,
};

const CHUNK: usize = 8 << 10;
/// Five chunks and a bit.
const TABLE: usize = 5 * CHUNK + 100;

/// Two tables, of which each step changes 64 bytes in one chunk and in two of the six, and a leaf that changes all over.
fn storages(step: u64) -> Vec<Vec<u8>> {
    let table = |factor: u64| {
        let mut bytes: Vec<u8> = (0..TABLE as u32)
            .map(|index| (index / 3 * factor as u32) as u8)
            .collect();
        for (chunk, bytes) in bytes.chunks_mut(CHUNK).enumerate() {
            let changes =
                |at: &u64| at * factor % 6 == chunk as u64 || (factor == 5 && at % 6 == chunk as u64);
            let changed = (1..=step).filter(changes).count();
            let touched = bytes.len().min(64);
            bytes[..touched]
                .iter_mut()
                .for_each(|byte| *byte ^= changed as u8);
        }
        bytes
    };
    let dense = (0..600u64).map(|index| (index * 7 + step * 13) as u8).collect();
    vec![table(1), table(5), dense]
}

fn tree(step: u64) -> Value {
    let text = |text: &str| Value::Str(text.to_owned());
    Value::dict(vec![
        (text("embedding"), leaf(0, TABLE as u64 / 4)),
        (text("moment"), leaf(1, TABLE as u64 / 4)),
        (text("model"), leaf(2, 150)),
        (text("step"), Value::Int(step as i64)),
    ])
}

/// What of it is saved in pieces once it has been saved twice.
const PIECES: Training = Training {
    tree,
    storages,
    tuning: SMALL,
};

fn in_pieces(checkpoint: &Checkpoint) -> bool {
    let storages = &checkpoint.manifest().storages;
    storages[..2]
        .iter()
        .all(|storage| matches!(storage.place, Place::Pieces(_)))
}

#[test]
fn what_was_saved_in_pieces_is_read_back_whole_in_every_life_and_whatever_else_is_deleted() {
    let memory = MemoryStorage::new();
    let mut pieced = 0;
    for life in 0..6 {
        let run = PIECES.open(&shared(&memory)).unwrap();
        assert!(run.warnings().is_empty() && run.rejected().is_empty());
        assert_eq!(resumed_step(&run), (life * 5u64).checked_sub(1));
        run.begin().unwrap();
        for step in life * 5..life * 5 + 5 {
            PIECES.train(&run, step..=step).unwrap();
            if life > 1 {
                run.prune(&newest_two(), false).unwrap();
            }
            for info in run.checkpoints() {
                let checkpoint = run.checkpoint(&info.name).unwrap();
                PIECES.exact(&checkpoint).unwrap();
                checkpoint.verify().unwrap();
                pieced += usize::from(in_pieces(&checkpoint) && info.step == step);
            }
            let named = run.checkpoints().into_iter().flat_map(|info| {
                let checkpoint = run.checkpoint(&info.name).unwrap();
                checkpoint
                    .manifest()
                    .packs
                    .iter()
                    .map(|pack| pack.name.clone())
                    .collect::<Vec<_>>()
            });
            let named: std::collections::BTreeSet<String> = named.collect();
            assert_eq!(
                files_in(&memory, "objects").into_keys().collect::<Vec<_>>(),
                Vec::from_iter(named)
            );
        }
        run.close().unwrap();
    }
    assert!(pieced > 20, "only {pieced} saves were in pieces");
}

#[test]
fn what_a_checkpoint_in_pieces_added_and_what_it_has_are_told_as_they_are() {
    let memory = PIECES.in_memory(4);
    let run = PIECES.open(&shared(&memory)).unwrap();
    let info = run.resumed_from().unwrap().info().clone();
    assert_eq!(info.size_bytes, (2 * TABLE + 600) as u64);
    let packs: u64 = files_in(&memory, "objects")
        .values()
        .map(|bytes| bytes.len() as u64)
        .sum();
    let added: u64 = run.checkpoints().iter().map(|info| info.new_bytes).sum();
    assert_eq!(added, packs);
    // Three chunks, the leaf, two headers.
    let new = info.new_bytes as usize;
    assert!((3 * CHUNK + 600..3 * CHUNK + 600 + 1500).contains(&new), "{new}");
}

#[test]
fn an_operation_of_a_commit_in_pieces_that_fails_once_costs_that_commit_only() {
    for fault in [Fault::Device, Fault::TooManyFiles, Fault::ShortWrite] {
        for index in 0.. {
            let memory = MemoryStorage::new();
            let faulty = FaultyStorage::new(shared(&memory));
            let run = PIECES
                .open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>))
                .unwrap();
            run.begin().unwrap();
            PIECES.train(&run, 0..=3).unwrap();
            run.record(4, 0, 0, 4, components(4)).unwrap();
            faulty.fail_at(index, fault);
            let outcome = PIECES.commit(&run, 4);
            let operations = faulty.operations();
            faulty.heal();
            let story = format!("{fault:?} at operation {index} of {operations:?}");
            if outcome.is_err() {
                let other = PIECES.open(&shared(&memory.fork())).unwrap();
                assert_eq!(resumed_step(&other), Some(3), "{story}");
                assert!(other.rejected().is_empty(), "{story}: {:?}", other.rejected());
                PIECES
                    .commit(&run, 4)
                    .unwrap_or_else(|error| panic!("{story}: {error}"));
            }
            assert!(files_in(&memory, "tmp").is_empty(), "{story}");
            let memory = memory.after_power_cut(Leftovers::Nothing);
            let run = PIECES.open(&shared(&memory)).unwrap();
            let newest = run.resumed_from().unwrap();
            assert_eq!(newest.info().step, 4, "{story}");
            PIECES.exact(newest).unwrap();
            if operations.len() <= index {
                assert!(outcome.is_ok() && index > 15, "{story}");
                break;
            }
        }
    }
}

#[test]
fn a_disk_that_gets_full_in_a_commit_in_pieces_is_told_and_the_next_commit_is_in_pieces_again() {
    // Steps 0 to 3 are committed. In step 4's commit the disk gets full at one of its operations, and stays so for
    // another attempt. Then there is room again.
    let mut struck = BTreeMap::new();
    for index in 0.. {
        let memory = MemoryStorage::new();
        let faulty = FaultyStorage::new(shared(&memory));
        let run = PIECES
            .open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>))
            .unwrap();
        run.begin().unwrap();
        PIECES.train(&run, 0..=3).unwrap();
        run.record(4, 0, 0, 4, components(4)).unwrap();
        let before = memory.files();
        faulty.fail_at(index, Fault::NoSpace);
        let outcome = PIECES.commit(&run, 4);
        let operations = faulty.operations();
        let story = format!("full at operation {index} of {operations:?}");
        let info = match outcome {
            Ok(info) => info,
            Err(error) => {
                let first = operations[index..]
                    .iter()
                    .find(|&&operation| takes_room(operation));
                let first =
                    *first.unwrap_or_else(|| panic!("{story}: nothing had to be written, and {error}"));
                *struck.entry(first).or_insert(0) += 1;
                told_of_full_disk(&error, Some(first), &story);
                assert_eq!(
                    objects_and_manifests(&memory.files()),
                    objects_and_manifests(&before),
                    "{story}"
                );
                // What cannot fit is refused before anything is written.
                let again = PIECES.commit(&run, 4).expect_err(&story);
                told_of_full_disk(&again, None, &story);
                let tried = &faulty.operations()[operations.len()..];
                assert!(
                    !tried.iter().any(|&operation| takes_room(operation)),
                    "{story}: {tried:?}"
                );
                faulty.heal();
                PIECES
                    .commit(&run, 4)
                    .unwrap_or_else(|error| panic!("{story}: {error}"))
            }
        };
        faulty.heal();
        PIECES
            .train(&run, 5..=5)
            .unwrap_or_else(|error| panic!("{story}: {error}"));
        assert!(files_in(&memory, "tmp").is_empty(), "{story}");
        for (name, bytes) in objects_and_manifests(&before) {
            assert_eq!(memory.files().get(name), Some(bytes), "{story}: {name}");
        }
        // Also after a power cut: no sync was taken for done that was not.
        let run = PIECES
            .open(&shared(&memory.after_power_cut(Leftovers::Nothing)))
            .unwrap();
        assert!(run.rejected().is_empty() && run.warnings().is_empty(), "{story}");
        let checkpoints = run.checkpoints();
        let steps: Vec<u64> = checkpoints.iter().map(|info| info.step).collect();
        assert_eq!(steps, [0, 1, 2, 3, 4, 5], "{story}");
        assert_eq!(checkpoints[4].name, info.name, "{story}");
        for info in &checkpoints {
            let checkpoint = run.checkpoint(&info.name).unwrap();
            PIECES
                .exact(&checkpoint)
                .unwrap_or_else(|why| panic!("{story}: {why}"));
            assert!(
                in_pieces(&checkpoint) || info.step < 4,
                "{story}: step {}",
                info.step
            );
        }
        if operations.len() <= index {
            break;
        }
    }
    // Two packs and a manifest are made, written and renamed; the packs' space is set aside first.
    for (operation, least) in [("create", 3), ("reserve", 2), ("write", 3), ("rename", 3)] {
        assert!(struck.get(operation) >= Some(&least), "{struck:?}");
    }
}

fn takes_room(operation: &str) -> bool {
    ["create", "reserve", "write", "rename"].contains(&operation)
}

/// Files that a checkpoint is made of.
fn objects_and_manifests(files: &BTreeMap<String, Vec<u8>>) -> BTreeMap<&String, &Vec<u8>> {
    let journal = |name: &str| name.starts_with("journal/");
    files.iter().filter(|(name, _)| !journal(name)).collect()
}

/// The error says which call failed where, how many bytes were needed and how many there are.
fn told_of_full_disk(error: &Error, operation: Option<&str>, story: &str) {
    let Error::Io {
        doing,
        path,
        source,
        needed_bytes: Some(needed),
        free_bytes: Some(4096),
    } = error
    else {
        panic!("{story}: {error:?}")
    };
    assert!(
        doing.contains(operation.unwrap_or("make room")),
        "{story}: {error}"
    );
    assert!(path.starts_with("memory:"), "{story}: {error}");
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{story}");
    // Three chunks and the leaf, two headers and the manifest; not the tables.
    let new = 3 * CHUNK as u64 + 600;
    assert!((new..new + 6000).contains(needed), "{story}: {needed} bytes");
    let words = error.to_string();
    assert!(
        words.contains(&format!("{needed} bytes needed")) && words.contains("4096 bytes free"),
        "{words}"
    );
}

#[test]
fn a_power_cut_at_any_instant_of_saves_in_pieces_and_prunes_leaves_what_was_acknowledged() {
    let memory = PIECES.in_memory(4);
    let base = Disk::of(&memory);
    memory.record();
    let run = PIECES.open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    let mut acknowledged = vec![(0, 4)];
    for step in 5..=5 {
        PIECES.train(&run, step..=step).unwrap();
        acknowledged.push((memory.history().len(), step));
        run.prune(&newest_two(), false).unwrap();
    }
    let newest = run.checkpoints().last().unwrap().name.clone();
    assert!(in_pieces(&run.checkpoint(&newest).unwrap()));
    let effort = Effort {
        all_up_to: 1 << 8,
        drawn: 20,
        seed: 1,
    };
    let demands = |done: usize| {
        let before = acknowledged.iter().rev().find(|(at, _)| *at <= done);
        before.map(|(_, step)| *step)
    };
    let mut found = Found::default();
    let check = |disk: &MemoryStorage, acknowledged: &Option<u64>| PIECES.check(disk, acknowledged);
    found.explore(&base, &memory.history(), 0, effort, demands, check);
    found.assert_none(200);
}

#[test]
fn damage_anywhere_in_a_checkpoint_in_pieces_is_found_and_named_by_file_and_leaf() {
    let memory = PIECES.in_memory(6);
    let run = PIECES.open(&shared(&memory)).unwrap();
    let name = run.resumed_from().unwrap().info().name.clone();
    let checkpoint = run.checkpoint(&name).unwrap();
    drop(run);
    let (found, unused) = damage_each_pack(&memory, &checkpoint, 509, &["embedding", "moment", "model"]);
    let sources = checkpoint.manifest().packs.len();
    assert!(
        found > 150 && unused > 20 && sources > 4,
        "{found}, {unused}, {sources}"
    );
}

fn on_disk(place: &Path, last: u64) -> PathBuf {
    let path = place.join("a");
    fs::create_dir_all(&path).unwrap();
    PIECES.run_with(
        &(Arc::new(DiskStorage::open(&path).unwrap()) as Arc<dyn Storage>),
        last,
    );
    path
}

fn resumed(path: &Path) -> u64 {
    let run = Run::open(path, &Options::default()).unwrap();
    let checkpoint = run.resumed_from().unwrap();
    PIECES.exact(checkpoint).unwrap();
    checkpoint.info().step
}

/// Damages the pack that has most of step 7's first table, in a chunk that step 7 has in it and step 8 does not, and
/// returns its path.
fn damage(path: &Path) -> PathBuf {
    let checkpoints = run::read_run(path).unwrap().checkpoints;
    let places = |step: usize| {
        let manifest = checkpoints[step].manifest();
        let entry = &manifest.storages[0];
        let pieces = entry.place.pieces(entry.length).into_iter();
        let named = pieces.flat_map(|(pack, offset, length)| {
            let name = manifest.packs[pack as usize].name.clone();
            (0..length)
                .step_by(CHUNK)
                .map(move |start| (name.clone(), offset + start))
        });
        named.collect::<Vec<_>>()
    };
    let (before, after) = (places(7), places(8));
    let (pack, offset) = before
        .into_iter()
        .find(|place| !after.contains(place))
        .expect("step 8 changed a chunk");
    let file = path.join("objects").join(pack);
    let mut bytes = fs::read(&file).unwrap();
    bytes[offset as usize] ^= 1;
    fs::write(&file, bytes).unwrap();
    file
}

#[test]
fn a_repair_puts_aside_what_needs_a_damaged_chunk_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let path = on_disk(place.path(), 8);
    let pack = damage(&path);
    let done = repair(&path, &[]).unwrap();
    let lost: Vec<&str> = done.lost.iter().map(|(name, _)| &name[6..9]).collect();
    assert!(lost.contains(&"007") && !lost.contains(&"008"), "{:?}", done.lost);
    let said = &done.lost[0].1;
    let stem = pack.file_name().unwrap().to_str().unwrap();
    assert!(said.contains(stem) && said.contains("\"embedding\""), "{said}");
    assert_eq!(resumed(&path), 8);
    let after = repair(&path, &[]).unwrap();
    assert!(after.is_whole() && after.actions.is_empty(), "{after:?}");
}

#[test]
fn a_repair_finds_a_whole_pack_of_pieces_in_a_copy_and_a_fork_is_one() {
    let place = tempfile::tempdir().unwrap();
    let path = on_disk(place.path(), 8);
    let other = place.path().join("b");
    let forked = fork(
        &run::read_run(&path).unwrap().checkpoints[7],
        &other,
        Sharing::Copies,
    )
    .unwrap();
    assert_eq!(forked.shared_bytes, 0);
    assert_eq!(resumed(&other), 7);
    damage(&path);
    let done = repair(&path, std::slice::from_ref(&other)).unwrap();
    let restored = |action: &&Action| matches!(action, Action::Restore { .. });
    assert_eq!(done.actions.iter().filter(restored).count(), 1);
    assert_eq!((done.whole.len(), done.lost.len()), (9, 0));
    assert_eq!(resumed(&path), 8);
}
