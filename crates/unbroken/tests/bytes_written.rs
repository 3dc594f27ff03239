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
            Value::Dict(parts.collect()),
        )
    });
    Value::Dict(layers.collect())
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
