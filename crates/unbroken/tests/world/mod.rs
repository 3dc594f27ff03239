//! A small training as the tests see it: a tree of three leaves that changes with each step, and runs over it.
//!
//! Touches: the storage that it is given.
#![allow(dead_code)] // Each test program uses a part of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use unbroken::digest::GROUP;
use unbroken::error::{Error, Result};
use unbroken::format::journal::Component;
use unbroken::run::{Options, Run};
use unbroken::state::{Tensor, Value};
use unbroken::storage::Storage;
use unbroken::storage::memory::MemoryStorage;
use unbroken::store::{Checkpoint, CheckpointInfo, Commit, Compression, Retention, Tuning};

/// Bytes of the leaf that never changes.
pub const FROZEN: usize = 300;

/// An engine that takes little memory; a deleted pack of any size is written over.
pub const SMALL: Tuning = Tuning {
    piece: GROUP,
    workers: 1,
    reuse_from: 0,
    chunks_from: 16 << 10,
    compression: Compression::None,
};

/// A tensor of float32 over one whole storage.
pub fn leaf(storage: u32, count: u64) -> Value {
    Value::from(Tensor {
        dtype: "float32".to_owned(),
        shape: vec![count],
        strides: vec![1],
        offset: 0,
        storage,
        device: "cpu".to_owned(),
        attrs: Vec::new(),
    })
}

/// The tree after a step.
pub fn tree(step: u64) -> Value {
    let text = |text: &str| Value::Str(text.to_owned());
    let model = Value::dict(vec![
        (text("frozen"), leaf(0, FROZEN as u64 / 4)),
        (text("weight"), leaf(1, 10)),
    ]);
    let optimizer = Value::dict(vec![(
        Value::Int(0),
        Value::Tuple(vec![leaf(2, 10), Value::Int(step as i64)]),
    )]);
    Value::dict(vec![(text("model"), model), (text("optimizer"), optimizer)])
}

/// The bytes of the tree's storages after a step.
pub fn storages(step: u64) -> Vec<Vec<u8>> {
    let numbers = |factor: u64| {
        (0..10u64)
            .flat_map(move |i| ((step * factor + i) as f32).to_le_bytes())
            .collect()
    };
    vec![vec![7; FROZEN], numbers(100), numbers(1000)]
}

/// What one step's record holds.
pub fn components(step: u64) -> Vec<(String, Component)> {
    vec![
        ("batch".to_owned(), Component::Digest(vec![step as u8; 16])),
        (
            "loss".to_owned(),
            Component::Float((1.0 / (step + 1) as f64).to_bits()),
        ),
        ("generators".to_owned(), Component::Int(step as i64 * 3)),
    ]
}

pub fn open(storage: &Arc<dyn Storage>) -> Result<Run> {
    open_tuned(storage, SMALL)
}

pub fn open_tuned(storage: &Arc<dyn Storage>, tuning: Tuning) -> Result<Run> {
    Run::open_on(
        Arc::clone(storage),
        &Options {
            seed: Some(7),
            tuning,
            ..Options::default()
        },
    )
}

/// A training of another state than the small one: what it is after each step, and how it is saved.
#[derive(Clone, Copy)]
pub struct Training {
    pub tree: fn(u64) -> Value,
    pub storages: fn(u64) -> Vec<Vec<u8>>,
    pub tuning: Tuning,
}

impl Training {
    pub fn open(&self, storage: &Arc<dyn Storage>) -> Result<Run> {
        open_tuned(storage, self.tuning)
    }

    pub fn commit(&self, run: &Run, step: u64) -> Result<CheckpointInfo> {
        let storages = (self.storages)(step);
        run.commit(of_tree(
            step,
            (self.tree)(step),
            storages.iter().map(Vec::as_slice).collect(),
        ))
    }

    /// Executes steps and commits after each.
    pub fn train(&self, run: &Run, steps: std::ops::RangeInclusive<u64>) -> Result<()> {
        for step in steps {
            if step > 0 {
                run.record(step, 0, 0, step, components(step))?;
            }
            self.commit(run, step)?;
        }
        Ok(())
    }

    /// A run with checkpoints at steps 0 to `last`, closed.
    pub fn run_with(&self, storage: &Arc<dyn Storage>, last: u64) {
        let run = self.open(storage).unwrap();
        run.begin().unwrap();
        self.train(&run, 0..=last).unwrap();
        run.close().unwrap();
    }

    pub fn in_memory(&self, last: u64) -> MemoryStorage {
        let memory = MemoryStorage::new();
        self.run_with(&shared(&memory), last);
        memory
    }

    /// Whether a checkpoint is the state after its step, read together and one by one; otherwise what is not.
    pub fn exact(&self, checkpoint: &Checkpoint) -> std::result::Result<(), String> {
        let step = checkpoint.info().step;
        let expected = (self.storages)(step);
        let mut together: Vec<Vec<u8>> = expected.iter().map(|bytes| vec![1; bytes.len()]).collect();
        let targets = together.iter_mut().map(Vec::as_mut_slice).enumerate().collect();
        let told = |error: Error| format!("step {step}: {error}");
        checkpoint.read_into(targets).map_err(told)?;
        for (index, bytes) in expected.iter().enumerate() {
            if &checkpoint.read(index).map_err(told)? != bytes || &together[index] != bytes {
                return Err(format!("storage {index} of step {step} has other bytes"));
            }
        }
        (checkpoint.tree() == &(self.tree)(step))
            .then_some(())
            .ok_or_else(|| format!("step {step} has another tree"))
    }

    /// What must hold of any disk: it opens, everything that it offers is whole, nothing acknowledged is missing, and
    /// the training goes on.
    pub fn check(&self, disk: &MemoryStorage, acknowledged: &Option<u64>) -> std::result::Result<(), String> {
        let told = |error: Error| error.to_string();
        let run = self.open(&shared(disk)).map_err(told)?;
        if let Some((name, why)) = run.rejected().first() {
            return Err(format!("{name} is offered and not whole: {why}"));
        }
        let step = resumed_step(&run);
        if step < *acknowledged {
            return Err(format!(
                "resumed from {step:?}, {acknowledged:?} was acknowledged"
            ));
        }
        for info in run.checkpoints() {
            self.exact(&run.checkpoint(&info.name).map_err(told)?)?;
        }
        run.begin().map_err(told)?;
        let next = step.map_or(0, |step| step + 1);
        self.train(&run, next..=next).map_err(told)?;
        let newest = run.checkpoints().pop().expect("one was just made");
        self.exact(&run.checkpoint(&newest.name).map_err(told)?)
    }
}

/// One leaf of several pieces, written by two workers over the files of deleted packs.
pub const REUSING: Training = Training {
    tree: |_| Value::List(vec![leaf(0, 35_000)]),
    storages: |step| {
        let mut bytes = vec![step as u8; 140_000];
        bytes[70_000..].fill(step as u8 + 100);
        vec![bytes]
    },
    tuning: Tuning {
        workers: 2,
        reuse_from: 1000,
        chunks_from: 1 << 20,
        ..SMALL
    },
};

pub fn newest_two() -> Retention {
    Retention {
        last: Some(2),
        ..Retention::default()
    }
}

pub fn commit_at(run: &Run, step: u64) -> Result<CheckpointInfo> {
    commit_with(run, step, Vec::new(), false)
}

pub fn commit_with(
    run: &Run,
    step: u64,
    metrics: Vec<(String, f64)>,
    pinned: bool,
) -> Result<CheckpointInfo> {
    let storages = storages(step);
    run.commit(Commit {
        step,
        phase: 0,
        tree: tree(step),
        storages: storages.iter().map(Vec::as_slice).collect(),
        identity: vec![("workers".to_owned(), Value::Int(2))],
        environment: vec![("torch".to_owned(), Value::Str("2.15.0".to_owned()))],
        metrics,
        pinned,
    })
}

/// A commit of a tree and nothing beside it.
pub fn of_tree(step: u64, tree: Value, storages: Vec<&[u8]>) -> Commit<&[u8]> {
    Commit {
        step,
        phase: 0,
        tree,
        storages,
        identity: Vec::new(),
        environment: Vec::new(),
        metrics: Vec::new(),
        pinned: false,
    }
}

/// Executes steps and commits after each.
pub fn train(run: &Run, steps: std::ops::RangeInclusive<u64>) -> Result<()> {
    for step in steps {
        if step > 0 {
            assert_eq!(
                run.record(step, 0, 0, step, components(step))?,
                None,
                "step {step}"
            );
        }
        commit_at(run, step)?;
    }
    Ok(())
}

/// Asserts that a checkpoint is exactly the state after its step.
pub fn assert_exact(checkpoint: &Checkpoint) {
    let step = checkpoint.info().step;
    assert_eq!(checkpoint.tree(), &tree(step));
    let expected = storages(step);
    assert_eq!(checkpoint.storages().len(), expected.len());
    for (index, bytes) in expected.iter().enumerate() {
        assert_eq!(
            &checkpoint.read(index).unwrap(),
            bytes,
            "storage {index} at step {step}"
        );
    }
    let mut memory: Vec<Vec<u8>> = expected.iter().map(|bytes| vec![0; bytes.len()]).collect();
    checkpoint
        .read_into(memory.iter_mut().map(Vec::as_mut_slice).enumerate().collect())
        .unwrap();
    assert_eq!(memory, expected);
}

/// A run with checkpoints at steps 0 to `last`, in memory, closed.
pub fn run_in_memory(last: u64) -> MemoryStorage {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    train(&run, 0..=last).unwrap();
    run.close().unwrap();
    memory
}

pub fn shared(memory: &MemoryStorage) -> Arc<dyn Storage> {
    Arc::new(memory.clone())
}

pub fn resumed_step(run: &Run) -> Option<u64> {
    run.resumed_from().map(|checkpoint| checkpoint.info().step)
}

/// Files below a directory, by their names there.
pub fn files_in(memory: &MemoryStorage, dir: &str) -> BTreeMap<String, Vec<u8>> {
    let inside =
        |(name, bytes): (String, Vec<u8>)| Some((name.strip_prefix(&format!("{dir}/"))?.to_owned(), bytes));
    memory.files().into_iter().filter_map(inside).collect()
}

/// Flips a bit of every `stride`-th byte of a checkpoint's packs, one at a time. Where the checkpoint needs the byte, that
/// is found and named by file and leaf (`names` by storage), and where not, it is whole. Returns how often either was so.
pub fn damage_each_pack(
    memory: &MemoryStorage,
    checkpoint: &Checkpoint,
    stride: usize,
    names: &[&str],
) -> (usize, usize) {
    let (mut found, mut unused) = (0, 0);
    for (number, pack) in checkpoint.manifest().packs.iter().enumerate() {
        let file = format!("objects/{}", pack.name);
        let bytes = memory.files()[&file].clone();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
        for at in (header..pack.length).step_by(stride) {
            let mut damaged = bytes.clone();
            damaged[at as usize] ^= 1 << (at % 8);
            memory.put(&file, damaged);
            let hit = checkpoint.manifest().storages.iter().position(|entry| {
                let mut places = entry.place.pieces(entry.length).into_iter();
                places.any(|(pack, offset, length)| {
                    pack as usize == number && (offset..offset + length).contains(&at)
                })
            });
            let story = format!("byte {at} of {file}");
            match (hit, checkpoint.verify()) {
                (None, Ok(())) => unused += 1,
                (Some(index), Err(Error::Damaged { path, part, .. })) => {
                    assert!(path.ends_with(&pack.name), "{story}: {}", path.display());
                    assert_eq!(part, names[index], "{story}");
                    assert!(checkpoint.read(index).is_err(), "{story}");
                    found += 1;
                }
                (hit, outcome) => panic!("{story}: {hit:?}, {outcome:?}"),
            }
        }
        memory.put(&file, bytes);
    }
    checkpoint.verify().unwrap();
    (found, unused)
}
