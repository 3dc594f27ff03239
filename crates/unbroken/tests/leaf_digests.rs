//! States are compared leaf by leaf without their bytes: of other runs, with damaged packs, after retention.
//!
//! Touches: storages in memory and temporary directories.

mod world;

use std::path::Path;
use std::sync::Arc;

use unbroken::cause::{Change, Leaf};
use unbroken::error::Error;
use unbroken::format::saved::Outline;
use unbroken::journal::Story;
use unbroken::localise::{State, compare_states};
use unbroken::run::{Options, Run, read_run, read_story};
use unbroken::state::{Tensor, Value};
use unbroken::store::{Checkpoint, Retention};
use world::{leaf, of_tree};

fn text(text: &str) -> Value {
    Value::Str(text.to_owned())
}

fn dict(items: Vec<(&str, Value)>) -> Value {
    Value::dict(items.into_iter().map(|(key, value)| (text(key), value)).collect())
}

fn view(shape: &[u64], strides: &[i64], offset: u64, storage: u32) -> Value {
    Value::from(Tensor {
        dtype: "float32".to_owned(),
        shape: shape.to_vec(),
        strides: strides.to_vec(),
        offset,
        storage,
        device: "cpu".to_owned(),
        attrs: vec![("requires_grad".to_owned(), Value::Bool(true))],
    })
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn new_run(path: &Path) -> Run {
    let options = Options {
        seed: Some(1),
        ..Options::default()
    };
    let run = Run::open(path, &options).unwrap();
    run.begin().unwrap();
    run
}

fn commit(run: &Run, step: u64, tree: Value, storages: &[Vec<u8>]) {
    let storages = storages.iter().map(Vec::as_slice).collect();
    run.commit(of_tree(step, tree, storages)).unwrap();
}

/// A run with one checkpoint.
fn run_of(path: &Path, tree: Value, storages: &[Vec<u8>]) {
    let run = new_run(path);
    commit(&run, 0, tree, storages);
    run.close().unwrap();
}

fn checkpoint(path: &Path) -> Checkpoint {
    read_run(path).unwrap().checkpoints.pop().unwrap()
}

fn outline(path: &Path) -> Outline {
    let story = read_story(path).unwrap();
    story.outline(&story.saves[0]).unwrap().unwrap()
}

/// Compares two runs' only checkpoints in every way there is: with bytes, with digests and broken packs, and by the
/// journals alone. Returns what the first way says.
fn compare(expected: &Path, found: &Path) -> Vec<Leaf> {
    let (old, new) = (checkpoint(expected), checkpoint(found));
    let told = (outline(expected), outline(found));
    let held = |checkpoint, outline| State::held(checkpoint, Some(outline));
    let whole = compare_states(&held(&old, &told.0), &held(&new, &told.1)).unwrap();
    let without = compare_states(&State::held(&old, None), &State::held(&new, None)).unwrap();
    assert_eq!(
        whole, without,
        "the journal's digests change nothing where bytes are at hand"
    );
    for path in [expected, found] {
        for pack in std::fs::read_dir(path.join("objects")).unwrap() {
            std::fs::remove_file(pack.unwrap().path()).unwrap();
        }
    }
    let paths = |leaves: &[Leaf]| -> Vec<String> { leaves.iter().map(|leaf| leaf.path.clone()).collect() };
    let broken = compare_states(&held(&old, &told.0), &held(&new, &told.1)).unwrap();
    assert_eq!(
        paths(&broken),
        paths(&whole),
        "packs that are gone change nothing"
    );
    let recorded = |outline: &Outline| State::recorded("pruned", outline.clone());
    let pruned = compare_states(&recorded(&told.0), &recorded(&told.1)).unwrap();
    assert_eq!(
        paths(&pruned),
        paths(&whole),
        "checkpoints that are gone change nothing"
    );
    whole
}

#[test]
fn the_leaf_that_differs_is_named_without_its_bytes() {
    let place = tempfile::tempdir().unwrap();
    let tree = || {
        dict(vec![
            ("w", leaf(0, 3)),
            ("part", view(&[2], &[1], 1, 1)),
            ("rate", Value::Float(0.1f64.to_bits())),
        ])
    };
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    run_of(
        &a,
        tree(),
        &[floats(&[1.0, 2.0, 3.0]), floats(&[4.0, 5.0, 6.0, 7.0])],
    );
    // The fourth element of the second storage is seen by no leaf.
    run_of(
        &b,
        tree(),
        &[floats(&[1.0, 2.0, 3.0]), floats(&[4.0, 5.5, 6.0, 7.5])],
    );
    let leaves = compare(&a, &b);
    let Change::Elements { elements, .. } = &leaves[0].change else {
        panic!("{leaves:?}")
    };
    assert_eq!((leaves.len(), leaves[0].path.as_str()), (1, "part"));
    assert_eq!((elements.total, elements.differing, elements.first), (2, 1, 0));
}

#[test]
fn equal_elements_in_another_layout_are_equal_and_the_layout_is_named() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let columns = [0.5, 1.0, 4.0, 2.0, 5.0, 3.0, 6.0];
    run_of(
        &a,
        dict(vec![("w", view(&[2, 3], &[3, 1], 0, 0))]),
        &[floats(&rows)],
    );
    run_of(
        &b,
        dict(vec![("w", view(&[2, 3], &[1, 2], 1, 0))]),
        &[floats(&columns)],
    );
    let leaves = compare(&a, &b);
    let layout = Change::Layout {
        expected: "row-major in memory of its own".to_owned(),
        found: "strides [1, 2] from element 1".to_owned(),
    };
    assert_eq!((leaves.len(), &leaves[0].change), (1, &layout));
}

#[test]
fn strides_of_dimensions_of_size_one_mean_nothing() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    run_of(
        &a,
        dict(vec![("w", view(&[1, 2], &[2, 1], 0, 0))]),
        &[floats(&[1.0, 2.0])],
    );
    run_of(
        &b,
        dict(vec![("w", view(&[1, 2], &[77, 1], 0, 0))]),
        &[floats(&[1.0, 2.0])],
    );
    assert_eq!(compare(&a, &b), []);
}

#[test]
fn memory_that_is_no_longer_shared_is_named() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let one = floats(&[1.0, 2.0]);
    run_of(
        &a,
        dict(vec![("w", leaf(0, 2)), ("tied", leaf(0, 2))]),
        std::slice::from_ref(&one),
    );
    run_of(
        &b,
        dict(vec![("w", leaf(0, 2)), ("tied", leaf(1, 2))]),
        &[one.clone(), one],
    );
    let leaves = compare(&a, &b);
    let shared = Change::Layout {
        expected: "memory shared with `w`".to_owned(),
        found: "row-major in memory of its own".to_owned(),
    };
    assert_eq!((leaves.len(), &leaves[0].change), (1, &shared));
    assert_eq!(leaves[0].path, "tied");
}

#[test]
fn what_is_missing_extra_or_of_another_type_is_named_once() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let nested = |value| dict(vec![("x", value), ("y", Value::Int(2))]);
    let old = dict(vec![
        ("gone", nested(Value::Int(1))),
        ("kind", nested(Value::Int(1))),
        ("number", Value::Int(1)),
        (
            "row",
            Value::Tuple(vec![Value::Int(1), Value::Int(2), Value::Int(3)]),
        ),
        ("shape", leaf(0, 2)),
    ]);
    let new = dict(vec![
        ("kind", Value::Int(7)),
        ("number", Value::Float(1f64.to_bits())),
        (
            "row",
            Value::Tuple(vec![Value::Int(1), Value::Int(5), Value::Int(3)]),
        ),
        ("shape", view(&[1, 2], &[2, 1], 0, 0)),
        ("added", nested(Value::Int(1))),
    ]);
    run_of(&a, old, &[floats(&[1.0, 2.0])]);
    run_of(&b, new, &[floats(&[1.0, 2.0])]);
    let (old, new) = (checkpoint(&a), checkpoint(&b));
    let leaves = compare_states(&State::held(&old, None), &State::held(&new, None)).unwrap();
    let paths: Vec<&str> = leaves.iter().map(|leaf| leaf.path.as_str()).collect();
    assert_eq!(paths, ["gone", "kind", "number", "row/1", "shape", "added"]);
    let value = |expected: &str, found: &str| Change::Value {
        expected: expected.to_owned(),
        found: found.to_owned(),
    };
    assert_eq!(leaves[0].change, Change::Missing);
    assert_eq!(leaves[1].change, value("dict", "7"));
    assert_eq!(leaves[2].change, value("1", "1.0"));
    assert_eq!(leaves[3].change, value("2", "5"));
    assert_eq!(leaves[5].change, Change::Extra);
}

#[test]
fn what_a_mapping_lacks_is_named_by_its_key_also_where_it_was_all_there_was() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let none = || dict(vec![]);
    let turns = || dict(vec![("turns", Value::Int(3))]);
    run_of(&a, dict(vec![("best", none()), ("state", turns())]), &[]);
    run_of(&b, dict(vec![("best", turns()), ("state", none())]), &[]);
    let found: Vec<(String, Change)> = compare(&a, &b)
        .into_iter()
        .map(|leaf| (leaf.path, leaf.change))
        .collect();
    assert_eq!(
        found,
        [
            ("state/turns".to_owned(), Change::Missing),
            ("best/turns".to_owned(), Change::Extra),
        ]
    );
}

#[test]
fn the_order_of_a_mappings_keys_is_state() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let item = |name: &'static str| (name, Value::Int(1));
    run_of(
        &a,
        dict(vec![("m", dict(vec![item("x"), item("y"), item("z")]))]),
        &[],
    );
    run_of(
        &b,
        dict(vec![("m", dict(vec![item("x"), item("z"), item("y")]))]),
        &[],
    );
    let leaves = compare(&a, &b);
    assert_eq!((leaves.len(), leaves[0].path.as_str()), (1, "m"));
    assert!(matches!(&leaves[0].change, Change::Value { expected, .. } if expected == "`m/z` behind `m/y`"));
}

#[test]
fn what_nothing_has_used_yet_is_not_compared() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let tree = |seed| {
        dict(vec![
            ("untouched", dict(vec![("seed", Value::Int(seed))])),
            ("w", Value::Int(1)),
        ])
    };
    run_of(&a, tree(1), &[]);
    run_of(&b, tree(2), &[]);
    assert_eq!(compare(&a, &b), []);
}

#[test]
fn bytes_that_repeat_without_end_are_told_by_their_storage() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let endless = || dict(vec![("w", view(&[1 << 40, 1 << 20], &[0, 0], 0, 0))]);
    run_of(&a, endless(), &[floats(&[1.0])]);
    run_of(&b, endless(), &[floats(&[2.0])]);
    let leaves = compare(&a, &b);
    assert!(matches!(leaves[0].change, Change::Content { .. }), "{leaves:?}");
    let (c, d) = (place.path().join("c"), place.path().join("d"));
    run_of(&c, endless(), &[floats(&[2.0])]);
    run_of(&d, endless(), &[floats(&[2.0])]);
    assert_eq!(compare(&c, &d), []);
}

#[test]
fn damage_is_an_error_only_where_no_digest_settles_it() {
    let place = tempfile::tempdir().unwrap();
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let part = |offset| dict(vec![("w", view(&[2], &[1], offset, 0))]);
    run_of(&a, part(0), &[floats(&[1.0, 2.0, 1.0])]);
    run_of(&b, part(1), &[floats(&[3.0, 1.0, 2.0])]);
    let told = (outline(&a), outline(&b));
    let (old, new) = (checkpoint(&a), checkpoint(&b));
    for pack in std::fs::read_dir(b.join("objects")).unwrap() {
        std::fs::remove_file(pack.unwrap().path()).unwrap();
    }
    let error = compare_states(&State::held(&old, None), &State::held(&new, None)).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let leaves = compare_states(
        &State::held(&old, Some(&told.0)),
        &State::held(&new, Some(&told.1)),
    )
    .unwrap();
    assert_eq!(
        leaves.len(),
        1,
        "equal elements, and another place in memory: {leaves:?}"
    );
    assert!(matches!(leaves[0].change, Change::Layout { .. }));
}

#[test]
fn the_digests_of_a_pruned_checkpoint_stay_in_the_journal() {
    // Three lives save the same leaves; retention leaves the last checkpoint. Every one can still be told.
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    for life in 0..3u64 {
        let run = new_run(&path);
        for step in [2 * life, 2 * life + 1] {
            if step > 0 {
                run.record(step, 0, 0, step, Vec::new()).unwrap();
            }
            commit(
                &run,
                step,
                dict(vec![("w", leaf(0, 1))]),
                &[floats(&[step as f32])],
            );
        }
        run.prune(
            &Retention {
                last: Some(1),
                ..Retention::default()
            },
            false,
        )
        .unwrap();
        run.close().unwrap();
    }
    assert_eq!(read_run(&path).unwrap().checkpoints.len(), 1);
    let story: Story = read_story(&path).unwrap();
    let outlines: Vec<Outline> = story
        .saves
        .iter()
        .map(|save| story.outline(save).unwrap().unwrap())
        .collect();
    assert_eq!(
        story.saves.iter().map(|save| save.step).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5]
    );
    for (step, found) in outlines.iter().enumerate() {
        let leaves = compare_states(
            &State::recorded("0", outlines[0].clone()),
            &State::recorded("n", found.clone()),
        )
        .unwrap();
        assert_eq!(leaves.len(), usize::from(step > 0));
        assert_eq!(found.root() == outlines[0].root(), step == 0);
    }
}

#[test]
fn thousands_of_leaves_add_sixteen_bytes_each_to_the_journal() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    let run = new_run(&path);
    const LEAVES: u32 = 4000;
    let tree = || {
        let tensors = (0..LEAVES).map(|index| (Value::Str(format!("layer.{index}.weight")), leaf(index, 1)));
        Value::dict(tensors.collect())
    };
    let journal = path.join("journal/000001.journal");
    let mut lengths = vec![std::fs::metadata(&journal).unwrap().len()];
    for step in 0..4u64 {
        let storages: Vec<Vec<u8>> = (0..LEAVES)
            .map(|index| floats(&[index as f32 + step as f32]))
            .collect();
        if step > 0 {
            run.record(step, 0, 0, step, Vec::new()).unwrap();
        }
        commit(&run, step, tree(), &storages);
        lengths.push(std::fs::metadata(&journal).unwrap().len());
    }
    let grown: Vec<u64> = lengths.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(grown[0] < u64::from(LEAVES) * 80, "paths, once: {grown:?}");
    assert!(
        grown[1..]
            .iter()
            .all(|bytes| *bytes < u64::from(LEAVES) * 16 + 600),
        "{grown:?}"
    );
}

#[test]
fn a_save_says_how_long_it_took_and_what_it_added() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    let run = new_run(&path);
    commit(&run, 0, dict(vec![("w", leaf(0, 256))]), &[vec![1; 1024]]);
    run.record(1, 0, 0, 1, Vec::new()).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30)); // A snapshot that takes its time.
    commit(&run, 1, dict(vec![("w", leaf(0, 256))]), &[vec![1; 1024]]);
    run.close().unwrap();
    let infos = read_run(&path).unwrap().checkpoints;
    let story = read_story(&path).unwrap();
    for (save, checkpoint) in story.saves.iter().zip(&infos) {
        let info = checkpoint.info();
        assert_eq!(save.saved.checkpoint, info.name);
        assert_eq!(
            (save.saved.size_bytes, save.saved.new_bytes),
            (info.size_bytes, info.new_bytes)
        );
        assert!(save.saved.commit_us <= save.saved.durable_us);
    }
    assert_eq!(
        story.saves[1].saved.new_bytes, 0,
        "the same bytes are there already"
    );
    assert!(story.saves[1].saved.durable_us >= 30_000, "from the boundary on");
    assert!(story.saves[1].saved.commit_us < story.saves[1].saved.durable_us);
}

#[test]
fn a_state_whose_form_changes_between_saves_is_told_and_packed_as_it_is_each_time() {
    let place = tempfile::tempdir().unwrap();
    let (path, alone) = (place.path().join("run"), place.path().join("alone"));
    let state = |name: &str, attr: &str, count: Value| {
        let mut tree = dict(vec![
            (name, view(&[2], &[1], 0, 0)),
            ("w", leaf(1, 8)),
            ("n", count),
        ]);
        if let Value::Dict(items) = &mut tree
            && let Value::Tensor(tensor) = &mut Arc::make_mut(items)[0].1
        {
            Arc::make_mut(tensor).attrs = vec![(attr.to_owned(), Value::Bool(true))];
        }
        tree
    };
    let states = [
        state("v", "flag", Value::Int(1)),
        state("v", "flag", Value::Int(2)),  // The same form.
        state("u", "flag", Value::Int(3)),  // Another name.
        state("u", "other", Value::Int(4)), // Another look.
        state("u", "other", Value::None),   // A value of another type.
        state("v", "flag", Value::Int(6)),  // The first form again.
    ];
    let run = new_run(&path);
    for (step, tree) in states.iter().enumerate() {
        let number = step as f32;
        let storages = [floats(&[number, 0.5]), vec![step as u8; 32]];
        commit(&run, step as u64, tree.clone(), &storages);
        let fresh = alone.join(step.to_string());
        run_of(&fresh, tree.clone(), &storages);
        let story = read_story(&path).unwrap();
        let saved = story.saves.last().unwrap();
        assert_eq!(
            story.outline(saved).unwrap().unwrap(),
            outline(&fresh),
            "step {step}"
        );
        assert_eq!(header(&path, step), header(&fresh, 0), "step {step}");
    }
    run.close().unwrap();
}

/// The header of the pack that a step's checkpoint added.
fn header(path: &Path, step: usize) -> Vec<u8> {
    let run = read_run(path).unwrap();
    let mut checkpoints = run.checkpoints.iter();
    let checkpoint = checkpoints
        .find(|checkpoint| checkpoint.info().step == step as u64)
        .unwrap();
    let pack = checkpoint.manifest().packs.last().unwrap();
    let bytes = std::fs::read(path.join("objects").join(&pack.name)).unwrap();
    let (length, _) = bytes.split_first_chunk().unwrap();
    bytes[..8 + u64::from_le_bytes(*length) as usize].to_vec()
}
