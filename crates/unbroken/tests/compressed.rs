//! Compressed storages: by themselves and as differences, through lives, failing disks, power cuts, damage and repair.
//!
//! Touches: memory; temporary directories for repair.

mod disks;
mod world;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use disks::{Disk, Effort, Found};
use unbroken::error::Error;
use unbroken::fork::{Sharing, fork};
use unbroken::format::coded::BLOCK;
use unbroken::format::manifest::{Coded, Place};
use unbroken::repair::{Action, repair};
use unbroken::run::{self, Run};
use unbroken::state::{Tensor, Value};
use unbroken::storage::Storage;
use unbroken::storage::disk::DiskStorage;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Leftovers, MemoryStorage};
use unbroken::store::{Checkpoint, Compression, Tuning};
use world::{
    SMALL, Training, components, damage_each_pack, files_in, leaf, newest_two, resumed_step, shared,
};

/// Numbers of a leaf: few enough to try everything with.
const COUNT: usize = 1500;

const fn tuned(compression: Compression) -> Tuning {
    Tuning { compression, ..SMALL }
}

/// A small model whose weights and moments move a little at each step, with noise beside it that nothing shortens.
const DIFFERENCES: Training = Training {
    tree,
    storages,
    tuning: tuned(Compression::Differences),
};
const ALONE: Training = Training {
    tuning: tuned(Compression::Alone),
    ..DIFFERENCES
};
const PLAIN: Training = Training {
    tuning: SMALL,
    ..DIFFERENCES
};

fn noise(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    })
}

/// Weights around zero that have moved by a thousandth of themselves at each step.
fn weights(seed: u64, count: usize, step: u64) -> impl Iterator<Item = f32> {
    let (starts, ways) = (noise(seed), noise(seed + 1));
    let number = move |(start, way): (u64, u64)| {
        let start = (start % 20_001) as f32 / 1e5 - 0.1;
        start * (1.0 + 1e-4 * step as f32 * (way % 11) as f32)
    };
    starts.zip(ways).take(count).map(number)
}

fn storages(step: u64) -> Vec<Vec<u8>> {
    let floats = |seed| weights(seed, COUNT, step).flat_map(f32::to_le_bytes).collect();
    let halves =
        weights(3, COUNT, step).flat_map(|number| number.to_bits().to_le_bytes().into_iter().skip(2));
    let counts = (0..COUNT as u64).flat_map(|index| (index * step).to_le_bytes());
    let random = noise(step + 10).flat_map(u64::to_le_bytes).take(COUNT * 4 + 3);
    vec![
        floats(1),
        halves.collect(),
        counts.collect(),
        random.collect(),
        vec![9; COUNT],
        vec![step as u8; 5],
    ]
}

const NAMES: [&str; 6] = ["weight", "half", "counts", "noise", "frozen", "small"];

fn tree(step: u64) -> Value {
    let text = |text: &str| Value::Str(text.to_owned());
    let of = |dtype: &str, storage, count: usize| {
        let Value::Tensor(tensor) = leaf(storage, count as u64) else {
            unreachable!()
        };
        Value::from(Tensor {
            dtype: dtype.to_owned(),
            ..Arc::unwrap_or_clone(tensor)
        })
    };
    let leaves = [
        of("float32", 0, COUNT),
        of("bfloat16", 1, COUNT),
        of("int64", 2, COUNT),
        of("uint8", 3, COUNT * 4 + 3),
        of("bool", 4, COUNT),
        of("uint8", 5, 5),
    ];
    let mut items: Vec<(Value, Value)> = NAMES.map(text).into_iter().zip(leaves).collect();
    items.push((text("step"), Value::Int(step as i64)));
    Value::dict(items)
}

fn coded(checkpoint: &Checkpoint, storage: usize) -> Option<&Coded> {
    match &checkpoint.manifest().storages[storage].place {
        Place::Coded(coded) => Some(coded),
        Place::Whole { .. } | Place::Pieces(_) => None,
    }
}

/// How many layers each storage has; 0 where it is not coded.
fn layers(checkpoint: &Checkpoint) -> Vec<usize> {
    let count = checkpoint.manifest().storages.len();
    (0..count)
        .map(|storage| coded(checkpoint, storage).map_or(0, |coded| coded.layers.len()))
        .collect()
}

fn newest(run: &Run) -> Checkpoint {
    run.checkpoint(&run.checkpoints().last().unwrap().name).unwrap()
}

#[test]
fn what_was_compressed_is_read_back_whole_in_every_life_and_whatever_else_is_deleted() {
    for trainings in [
        [ALONE; 4],
        [DIFFERENCES; 4],
        [ALONE, DIFFERENCES, PLAIN, DIFFERENCES],
    ] {
        let memory = MemoryStorage::new();
        let mut seen = BTreeSet::new();
        for (life, training) in trainings.into_iter().enumerate() {
            let run = training.open(&shared(&memory)).unwrap();
            assert!(run.warnings().is_empty() && run.rejected().is_empty());
            assert_eq!(resumed_step(&run), (life as u64 * 5).checked_sub(1));
            run.begin().unwrap();
            for step in life as u64 * 5..life as u64 * 5 + 5 {
                training.train(&run, step..=step).unwrap();
                if life > 0 {
                    run.prune(&newest_two(), false).unwrap();
                }
                seen.extend(layers(&newest(&run)));
                let mut named = BTreeSet::new();
                for info in run.checkpoints() {
                    let checkpoint = run.checkpoint(&info.name).unwrap();
                    training.exact(&checkpoint).unwrap();
                    checkpoint.verify().unwrap();
                    named.extend(checkpoint.manifest().packs.iter().map(|pack| pack.name.clone()));
                }
                assert_eq!(
                    BTreeSet::from_iter(files_in(&memory, "objects").into_keys()),
                    named
                );
            }
            run.close().unwrap();
        }
        assert!(seen.contains(&0) && seen.contains(&1), "{seen:?}");
        assert_eq!(
            seen.contains(&2),
            trainings[1].tuning.compression == Compression::Differences
        );
    }
}

#[test]
fn differences_are_shorter_than_numbers_alone_and_those_than_what_is_not_compressed() {
    let bytes = |training: Training| {
        let run = training.open(&shared(&training.in_memory(6))).unwrap();
        run.checkpoints().iter().map(|info| info.new_bytes).sum::<u64>()
    };
    let (plain, alone, differences) = (bytes(PLAIN), bytes(ALONE), bytes(DIFFERENCES));
    assert!(
        alone * 10 < plain * 9 && differences * 10 < alone * 9,
        "{plain}, {alone}, {differences}"
    );
}

/// A large leaf and noise of the same length: both of several blocks, the last one of an odd length.
const LARGE: Training = Training {
    tree: |step| {
        let text = |text: &str| Value::Str(text.to_owned());
        let noise = Tensor {
            dtype: "uint8".to_owned(),
            shape: vec![LARGE_BYTES as u64],
            ..bytes_of(1)
        };
        Value::dict(vec![
            (text("weight"), leaf(0, LARGE_BYTES as u64 / 4)),
            (text("noise"), Value::from(noise)),
            (text("step"), Value::Int(step as i64)),
        ])
    },
    storages: |step| {
        let weight = weights(5, LARGE_BYTES / 4, step).flat_map(f32::to_le_bytes);
        let noise = noise(step + 1).flat_map(u64::to_le_bytes).take(LARGE_BYTES);
        vec![weight.chain([1, 2, 3]).collect(), noise.collect()]
    },
    tuning: Tuning {
        piece: 1 << 20,
        workers: 3,
        ..DIFFERENCES.tuning
    },
};
const LARGE_BYTES: usize = 2 * BLOCK + 4000;

fn bytes_of(storage: u32) -> Tensor {
    let Value::Tensor(tensor) = leaf(storage, 0) else {
        unreachable!("a leaf is a tensor")
    };
    Arc::unwrap_or_clone(tensor)
}

#[test]
fn storages_of_many_blocks_are_written_and_read_by_many_threads() {
    for compression in [Compression::Alone, Compression::Differences] {
        let training = Training {
            tuning: Tuning {
                compression,
                ..LARGE.tuning
            },
            ..LARGE
        };
        let memory = training.in_memory(2);
        let run = training.open(&shared(&memory)).unwrap();
        for info in run.checkpoints() {
            let checkpoint = run.checkpoint(&info.name).unwrap();
            training.exact(&checkpoint).unwrap();
            let weight = coded(&checkpoint, 0).unwrap();
            assert!(weight.layers.iter().all(|layer| layer.frames.len() == 3));
            assert_eq!(weight.width, 4);
        }
        let differs = compression == Compression::Differences;
        assert_eq!(layers(&newest(&run)), [if differs { 2 } else { 1 }, 0]);
    }
}

#[test]
fn noise_is_written_as_it_is_and_makes_no_manifest_of_another_version() {
    let only_noise = Training {
        tree: |step| {
            let noise = Tensor {
                dtype: "float32".to_owned(),
                shape: vec![10_000],
                ..bytes_of(0)
            };
            Value::List(vec![Value::from(noise), Value::Int(step as i64)])
        },
        storages: |step| vec![noise(step + 1).flat_map(u64::to_le_bytes).take(40_000).collect()],
        ..ALONE
    };
    let memory = only_noise.in_memory(3);
    let run = only_noise.open(&shared(&memory)).unwrap();
    only_noise.exact(&newest(&run)).unwrap();
    assert_eq!(layers(&newest(&run)), [0]);
    for (name, bytes) in files_in(&memory, "checkpoints") {
        assert_eq!(bytes[8..12], 1u32.to_le_bytes(), "{name}");
    }
}

#[test]
fn a_base_that_was_deleted_by_others_is_made_anew() {
    let memory = DIFFERENCES.in_memory(0);
    let run = DIFFERENCES.open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    DIFFERENCES.train(&run, 1..=2).unwrap();
    assert_eq!(layers(&newest(&run))[0], 2);
    let base = coded(&newest(&run), 0).unwrap().layers[0].pack as usize;
    let pack = newest(&run).manifest().packs[base].name.clone();
    memory.remove(&format!("objects/{pack}")).unwrap();
    DIFFERENCES.train(&run, 3..=4).unwrap();
    let checkpoint = newest(&run);
    DIFFERENCES.exact(&checkpoint).unwrap();
    assert_eq!(layers(&checkpoint)[0], 2);
    let names: Vec<&String> = checkpoint
        .manifest()
        .packs
        .iter()
        .map(|pack| &pack.name)
        .collect();
    assert!(!names.contains(&&pack), "{names:?}");
}

#[test]
fn a_new_base_is_made_when_the_state_has_moved_away_from_the_old_one() {
    // At step 8 the state jumps; from there on it moves as slowly as before.
    let jumping = Training {
        storages: |step| storages(if step < 8 { step } else { step + 3000 }),
        ..DIFFERENCES
    };
    let memory = jumping.in_memory(14);
    let run = jumping.open(&shared(&memory)).unwrap();
    let layers: Vec<usize> = run
        .checkpoints()
        .iter()
        .map(|info| layers(&run.checkpoint(&info.name).unwrap())[0])
        .collect();
    assert!(layers[1..8].iter().all(|&layers| layers == 2), "{layers:?}");
    assert!(layers[8..11].contains(&1), "{layers:?}");
    assert!(layers[12..].iter().all(|&layers| layers == 2), "{layers:?}");
    jumping.exact(&newest(&run)).unwrap();
}

#[test]
fn an_operation_of_a_compressing_commit_that_fails_once_costs_that_commit_only() {
    for fault in [
        Fault::Device,
        Fault::TooManyFiles,
        Fault::ShortWrite,
        Fault::Interrupted,
    ] {
        for index in 0.. {
            let memory = MemoryStorage::new();
            let faulty = FaultyStorage::new(shared(&memory));
            let run = DIFFERENCES
                .open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>))
                .unwrap();
            run.begin().unwrap();
            DIFFERENCES.train(&run, 0..=2).unwrap();
            run.record(3, 0, 0, 3, components(3)).unwrap();
            faulty.fail_at(index, fault);
            let outcome = DIFFERENCES.commit(&run, 3);
            let operations = faulty.operations();
            faulty.heal();
            let story = format!("{fault:?} at operation {index} of {operations:?}");
            if outcome.is_err() {
                let other = DIFFERENCES.open(&shared(&memory.fork())).unwrap();
                assert_eq!(resumed_step(&other), Some(2), "{story}");
                assert!(other.rejected().is_empty(), "{story}: {:?}", other.rejected());
                DIFFERENCES
                    .commit(&run, 3)
                    .unwrap_or_else(|error| panic!("{story}: {error}"));
            }
            assert!(files_in(&memory, "tmp").is_empty(), "{story}");
            DIFFERENCES.train(&run, 4..=4).unwrap();
            assert_eq!(layers(&newest(&run))[0], 2, "{story}");
            let memory = memory.after_power_cut(Leftovers::Nothing);
            let run = DIFFERENCES.open(&shared(&memory)).unwrap();
            assert_eq!(resumed_step(&run), Some(4), "{story}");
            for info in run.checkpoints() {
                DIFFERENCES.exact(&run.checkpoint(&info.name).unwrap()).unwrap();
            }
            if operations.len() <= index {
                assert!(outcome.is_ok() && index > 15, "{story}");
                break;
            }
        }
    }
}

#[test]
fn a_power_cut_at_any_instant_of_compressing_saves_and_prunes_leaves_what_was_acknowledged() {
    let memory = DIFFERENCES.in_memory(2);
    let base = Disk::of(&memory);
    memory.record();
    let run = DIFFERENCES.open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    let mut acknowledged = vec![(0, 2)];
    // The first save of this life is a base, the second one differences; then the first base goes.
    for step in 3..=4 {
        DIFFERENCES.train(&run, step..=step).unwrap();
        acknowledged.push((memory.history().len(), step));
    }
    run.prune(&newest_two(), false).unwrap();
    assert_eq!(layers(&newest(&run))[0], 2);
    let effort = Effort {
        all_up_to: 1 << 5,
        drawn: 6,
        seed: 1,
    };
    let demands = |done: usize| {
        let before = acknowledged.iter().rev().find(|(at, _)| *at <= done);
        before.map(|(_, step)| *step)
    };
    let mut found = Found::default();
    let check = |disk: &MemoryStorage, acknowledged: &Option<u64>| DIFFERENCES.check(disk, acknowledged);
    found.explore(&base, &memory.history(), 0, effort, demands, check);
    found.assert_none(150);
}

#[test]
fn damage_anywhere_in_compressed_packs_is_found_and_named_by_file_and_leaf() {
    let memory = DIFFERENCES.in_memory(2);
    let run = DIFFERENCES.open(&shared(&memory)).unwrap();
    let checkpoint = newest(&run);
    drop(run);
    let (found, unused) = damage_each_pack(&memory, &checkpoint, 17, &NAMES);
    assert!(found > 500 && unused > 20, "{found}, {unused}");
}

#[test]
fn frames_of_other_numbers_that_a_stranger_sealed_are_refused() {
    // Every check of every pack holds; only what the frames decode to is not what the manifest says.
    let memory = ALONE.in_memory(0);
    let run = ALONE.open(&shared(&memory)).unwrap();
    let checkpoint = newest(&run);
    drop(run);
    for (change, said) in [(0, "frames that make no block 0"), (1, "found")] {
        let mut manifest = checkpoint.manifest().clone();
        let storage = &mut manifest.storages[0];
        let Place::Coded(found) = &mut storage.place else {
            panic!("it is coded")
        };
        match change {
            0 => found.width = 8,
            _ => storage.digest = unbroken::Digest::of(b"other bytes"),
        }
        let (bytes, digest) = unbroken::format::manifest::encode(&manifest).unwrap();
        let name = unbroken::format::manifest::checkpoint_name(0, 0, &digest);
        memory.put(&format!("checkpoints/{name}"), bytes);
        let run = ALONE.open(&shared(&memory)).unwrap();
        let error = run.checkpoint(&name).unwrap().read(0).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert!(matches!(error, Error::Damaged { part, .. } if part == "weight"));
    }
}

fn on_disk(path: &Path, last: u64) {
    fs::create_dir_all(path).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(DiskStorage::open(path).unwrap());
    DIFFERENCES.run_with(&storage, last);
}

#[test]
fn a_repair_puts_aside_what_needs_a_damaged_base_or_finds_it_in_a_fork_of_copies() {
    let place = tempfile::tempdir().unwrap();
    let (path, other) = (place.path().join("a"), place.path().join("b"));
    on_disk(&path, 3);
    let checkpoints = run::read_run(&path).unwrap().checkpoints;
    fork(&checkpoints[3], &other, Sharing::Copies).unwrap();
    DIFFERENCES
        .exact(run::read_run(&other).unwrap().checkpoints.last().unwrap())
        .unwrap();
    let layer = &coded(&checkpoints[3], 0).unwrap().layers[0];
    let pack = path
        .join("objects")
        .join(&checkpoints[3].manifest().packs[layer.pack as usize].name);
    let whole = fs::read(&pack).unwrap();
    let mut bytes = whole.clone();
    bytes[layer.offset as usize] ^= 1;
    fs::write(&pack, &bytes).unwrap();

    let done = repair(&path, std::slice::from_ref(&other)).unwrap();
    let restored = |action: &&Action| matches!(action, Action::Restore { .. });
    assert_eq!(done.actions.iter().filter(restored).count(), 1);
    assert_eq!((done.whole.len(), done.lost.len()), (4, 0));
    assert_eq!(fs::read(&pack).unwrap(), whole);

    fs::write(&pack, bytes).unwrap();
    let done = repair(&path, &[]).unwrap();
    assert_eq!((done.whole.len(), done.lost.len()), (0, 4));
    let said = &done.lost[0].1;
    assert!(
        said.contains("\"weight\"") && said.contains(pack.file_name().unwrap().to_str().unwrap()),
        "{said}"
    );
}
