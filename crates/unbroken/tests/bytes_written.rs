//! What a checkpoint costs the disk: what changed, and little more; across lives and forks as well.
//!
//! Touches: temporary directories.

mod world;

use std::fs;
use std::path::Path;

use unbroken::fork::{Sharing, fork};
use unbroken::run::{self, Options, Run};
use unbroken::state::Value;
use unbroken::store::Commit;
use world::leaf;

/// A frozen base of 32 tensors, and an adapter of 32 with two moments each.
const LAYERS: u64 = 32;
const FROZEN_ELEMENTS: u64 = 20_000;
const TRAINED_ELEMENTS: u64 = 4_000;
const CHANGED_BYTES: u64 = LAYERS * 3 * TRAINED_ELEMENTS * 4;

fn tree() -> Value {
    let text = |text: String| Value::Str(text);
    let layers = (0..LAYERS).map(|layer| {
        let first = u32::try_from(layer * 4).unwrap();
        let names = ["base.weight", "adapter.weight", "exp_avg", "exp_avg_sq"];
        let parts = names.iter().zip(0..).map(|(name, index)| {
            let count = if index == 0 {
                FROZEN_ELEMENTS
            } else {
                TRAINED_ELEMENTS
            };
            (text((*name).to_owned()), leaf(first + index, count))
        });
        (
            text(format!("model.layers.{layer}")),
            Value::dict(parts.collect()),
        )
    });
    Value::dict(layers.collect())
}

fn storages(step: u64) -> Vec<Vec<u8>> {
    let numbers = |count: u64, seed: u64| {
        let number = move |index: u64| (index * 31 + seed) as f32;
        (0..count)
            .flat_map(move |index| number(index).to_le_bytes())
            .collect()
    };
    (0..LAYERS * 4)
        .map(|index| match index % 4 {
            0 => numbers(FROZEN_ELEMENTS, index),
            _ => numbers(TRAINED_ELEMENTS, index * 1000 + step),
        })
        .collect()
}

fn commit(run: &Run, step: u64) {
    let storages = storages(step);
    run.commit(Commit {
        step,
        phase: 0,
        tree: tree(),
        storages: storages.iter().map(Vec::as_slice).collect(),
        identity: (0..100)
            .map(|index| (format!("optimizer.group0.{index}"), Value::Int(index)))
            .collect(),
        environment: Vec::new(),
        metrics: Vec::new(),
        pinned: false,
    })
    .unwrap();
}

fn open(path: &Path) -> Run {
    let run = Run::open(path, &Options::default()).unwrap();
    run.begin().unwrap();
    run
}

/// Length of every file of a run.
fn bytes_in(path: &Path) -> u64 {
    let length = |entry: fs::DirEntry| match entry.metadata().unwrap() {
        about if about.is_dir() => bytes_in(&entry.path()),
        about => about.len(),
    };
    fs::read_dir(path)
        .unwrap()
        .map(|entry| length(entry.unwrap()))
        .sum()
}

#[test]
fn a_checkpoint_of_a_frozen_base_and_an_adapter_costs_what_the_adapter_has() {
    let place = tempfile::tempdir().unwrap();
    let (first, second) = (place.path().join("a"), place.path().join("b"));
    let run = open(&first);
    commit(&run, 0);
    let cost = |path: &Path, run: &Run, step: u64| {
        let before = bytes_in(path);
        commit(run, step);
        let written = bytes_in(path) - before;
        let ratio = written as f64 / CHANGED_BYTES as f64;
        assert!(
            ratio <= 1.05,
            "step {step}: {written} bytes, {ratio} times what changed"
        );
        assert!(ratio > 1.0, "step {step}: {written} bytes");
    };
    cost(&first, &run, 1);
    cost(&first, &run, 2);
    run.close().unwrap();
    // The next life knows what the last one wrote, and so does a fork.
    let run = open(&first);
    cost(&first, &run, 3);
    run.close().unwrap();
    fork(&run::read_checkpoint(&first).unwrap(), &second, Sharing::Links).unwrap();
    let run = open(&second);
    cost(&second, &run, 4);
    run.close().unwrap();
}

/// Rows of a table, one of its bytes each, and how many of them a step changes: one in a hundred.
const ROW: usize = 1 << 10;
const ROWS: usize = 16 << 10;
const CHANGED_ROWS: usize = ROWS / 100;
/// Bytes of a chunk of a table of this size.
const CHUNK: usize = 8 << 10;

/// A table, and a model beside it that changes all over.
struct Tables {
    table: Vec<u8>,
    moment: Vec<u8>,
    dense: Vec<u8>,
    random: u64,
}

impl Tables {
    fn new() -> Tables {
        let table: Vec<u8> = (0..ROWS * ROW / 8)
            .flat_map(|index| (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        Tables {
            moment: vec![0; table.len()],
            table,
            dense: vec![1; 2 << 20],
            random: 7,
        }
    }

    /// Changes rows here and there, always the first one among them, and returns how many bytes the changed chunks of
    /// both tables have.
    fn step(&mut self) -> u64 {
        let mut chunks = std::collections::BTreeSet::new();
        for index in 0..CHANGED_ROWS {
            self.random = self
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let row = if index == 0 {
                0
            } else {
                (self.random >> 33) as usize % ROWS
            };
            for byte in 0..ROW {
                self.table[row * ROW + byte] ^= (self.random >> (byte % 32 + 8)) as u8 | 1;
                self.moment[row * ROW + byte] = self.moment[row * ROW + byte].wrapping_add(1);
            }
            chunks.insert(row * ROW / CHUNK);
        }
        for byte in &mut self.dense {
            *byte = byte.wrapping_mul(5).wrapping_add(3);
        }
        (2 * chunks.len() * CHUNK) as u64
    }

    fn storages(&self) -> Vec<&[u8]> {
        vec![&self.table, &self.moment, &self.dense]
    }

    fn commit(&self, run: &Run, step: u64) {
        let names = ["embedding", "exp_avg", "model"];
        let leaves = names.iter().zip(self.storages()).zip(0..);
        let tree = leaves
            .map(|((name, bytes), index)| {
                (
                    Value::Str((*name).to_owned()),
                    leaf(index, bytes.len() as u64 / 4),
                )
            })
            .collect();
        run.commit(Commit {
            step,
            phase: 0,
            tree: Value::dict(tree),
            storages: self.storages(),
            identity: Vec::new(),
            environment: Vec::new(),
            metrics: Vec::new(),
            pinned: false,
        })
        .unwrap();
    }

    fn assert_saved(&self, path: &Path) {
        let checkpoint = run::read_checkpoint(path).unwrap();
        for (index, bytes) in self.storages().into_iter().enumerate() {
            assert!(checkpoint.read(index).unwrap() == bytes, "storage {index}");
        }
    }
}

#[test]
fn a_table_of_which_few_rows_change_costs_little_more_than_the_chunks_that_they_are_in() {
    let place = tempfile::tempdir().unwrap();
    let (path, other) = (place.path().join("a"), place.path().join("b"));
    let keep = unbroken::store::Retention {
        last: Some(2),
        ..Default::default()
    };
    let mut tables = Tables::new();
    let sizes = (2 * ROWS * ROW, tables.dense.len() as u64);
    let run = open(&path);
    // The first two are whole: nobody knows yet what changes.
    for step in 0..2 {
        tables.step();
        tables.commit(&run, step);
    }
    let (mut changed, mut written) = (0, 0);
    let mut save = |tables: &mut Tables, run: &Run, step: u64| {
        let before: u64 = run.checkpoints().iter().map(|info| info.new_bytes).sum();
        changed += tables.step() + sizes.1;
        tables.commit(run, step);
        written += run.checkpoints().iter().map(|info| info.new_bytes).sum::<u64>() - before;
        (changed, written)
    };
    for step in 2..20 {
        let (changed, written) = save(&mut tables, &run, step);
        let ratio = written as f64 / changed as f64;
        assert!(ratio <= 1.5, "step {step}: {ratio}");
        run.prune(&keep, false).unwrap();
        let on_disk = bytes_in(&path.join("objects"));
        assert!(on_disk < 3 * sizes.0 as u64, "step {step}: {on_disk}");
    }
    tables.assert_saved(&path);
    run.close().unwrap();
    // The next life goes on from the pieces, and so does a fork's.
    let run = open(&path);
    let (_, before) = save(&mut tables, &run, 30);
    let (_, after) = save(&mut tables, &run, 31);
    assert!(after - before < sizes.0 as u64 / 4, "{before} {after}");
    run.close().unwrap();
    fork(&run::read_checkpoint(&path).unwrap(), &other, Sharing::Links).unwrap();
    let run = open(&other);
    let (_, before) = save(&mut tables, &run, 32);
    let (_, after) = save(&mut tables, &run, 33);
    assert!(after - before < sizes.0 as u64 / 4, "{before} {after}");
    tables.assert_saved(&other);
    run.close().unwrap();
}
