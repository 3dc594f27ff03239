//! Forks: a new run at another one's checkpoint, that shares its tensors and lives without it.
//!
//! Touches: temporary directories.

mod world;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use unbroken::error::Error;
use unbroken::fork::{FORKED, Sharing, fork};
use unbroken::format::saved::Outline;
use unbroken::run::{self, Options, Run};
use unbroken::state::{Tensor, Value};
use unbroken::store::{Checkpoint, Commit, Retention};
use world::{assert_exact, commit_at, components, leaf, train};

fn source(path: &Path, last: u64) -> Run {
    let settings = vec![("front".to_owned(), Value::Str("test".to_owned()))];
    let options = Options {
        seed: Some(11),
        settings,
        ..Options::default()
    };
    let run = Run::open(path, &options).unwrap();
    run.begin().unwrap();
    train(&run, 0..=last).unwrap();
    run
}

fn at(path: &Path, step: u64) -> Checkpoint {
    let found = run::read_run(path).unwrap().checkpoints;
    found
        .into_iter()
        .rfind(|checkpoint| checkpoint.info().step == step)
        .unwrap()
}

fn open(path: &Path) -> Run {
    let run = Run::open(path, &Options::default()).unwrap();
    run.begin().unwrap();
    run
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_fork_goes_on_where_its_source_was_and_writes_no_tensor() {
    let place = tempfile::tempdir().unwrap();
    let (old, new) = (place.path().join("a"), place.path().join("deep/b"));
    drop(source(&old, 5));
    let forked = fork(&at(&old, 3), &new, Sharing::Links).unwrap();
    assert_eq!(forked.written_bytes, 0);
    for name in names(&new.join("objects")) {
        let inode = |path: &Path| fs::metadata(path.join("objects").join(&name)).unwrap().ino();
        assert_eq!(inode(&old), inode(&new), "{name} has one set of bytes");
    }
    let run = open(&new);
    assert_eq!((run.seed(), run.life(), run.recorded_until()), (11, 2, 3));
    assert_eq!(run.warnings(), [] as [String; 0]);
    assert_eq!(
        run.settings(),
        [("front".to_owned(), Value::Str("test".to_owned()))]
    );
    assert_eq!(run.id(), forked.run_id);
    assert_ne!(run.id(), run::read_run(&old).unwrap().id);
    let from = run.resumed_from().unwrap();
    assert_exact(from);
    assert_eq!(
        (from.info().step, from.info().new_bytes, from.info().pinned),
        (3, 0, false)
    );
    train(&run, 4..=6).unwrap();
    assert_exact(&at(&new, 6));
    run.close().unwrap();
    // The frozen leaf is not written by the fork's own checkpoints either.
    let frozen = |step| at(&new, step).manifest().storages[0].place.whole().unwrap();
    let pack = |step: u64| at(&new, step).manifest().packs[frozen(step).0 as usize].clone();
    assert_eq!(pack(6), pack(3));
}

#[test]
fn the_journal_of_a_fork_tells_where_it_came_from_and_what_was_before() {
    let place = tempfile::tempdir().unwrap();
    let [first, second, third] = ["a", "b", "c"].map(|name| place.path().join(name));
    let old = source(&first, 4);
    let old_name = fork(&at(&first, 4), &second, Sharing::Links).unwrap().checkpoint;
    let run = open(&second);
    train(&run, 5..=6).unwrap();
    drop(run);
    fork(&at(&second, 6), &third, Sharing::Links).unwrap();
    let journal = run::read_journal(&third).unwrap();
    assert_eq!(journal.warnings, [] as [String; 0]);
    let steps: Vec<u64> = journal.boundaries.iter().map(|boundary| boundary.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    assert_eq!(journal.at(2, 0).unwrap().components, components(2));
    let event = journal.events.iter().find(|event| event.kind == FORKED).unwrap();
    let field = |name: &str| {
        event
            .fields
            .iter()
            .find(|(other, _)| other == name)
            .unwrap()
            .1
            .clone()
    };
    assert_eq!((event.step, event.life), (6, 1));
    assert_eq!(
        field("run"),
        Value::Str(run::read_run(&second).unwrap().id.clone())
    );
    let first_name = at(&first, 4).info().name.clone();
    assert_ne!(first_name, old_name, "a fork's manifest is its own");
    let ancestor = Value::List(vec![Value::Str(old.id().to_owned()), Value::Str(first_name)]);
    assert_eq!(field("ancestors"), Value::List(vec![ancestor]));
}

/// A state with a view that is not its storage's bytes in order: its content is not told by the manifest.
fn commit_transposed(run: &Run, step: u64) {
    let Value::Tensor(tensor) = leaf(0, 6) else {
        panic!("a leaf is a tensor");
    };
    let transposed = Tensor {
        shape: vec![3, 2],
        strides: vec![1, 3],
        ..Arc::unwrap_or_clone(tensor)
    };
    let tree = Value::dict(vec![
        (Value::Str("t".to_owned()), Value::from(transposed)),
        (Value::Str("w".to_owned()), leaf(1, 2)),
    ]);
    let (first, second) = ((0..24).collect::<Vec<u8>>(), [9; 8]);
    run.record(step, 0, 0, step, components(step)).unwrap();
    run.commit(Commit {
        step,
        phase: 0,
        tree,
        storages: vec![&first, &second],
        identity: Vec::new(),
        environment: Vec::new(),
        metrics: Vec::new(),
        pinned: false,
    })
    .unwrap();
}

fn outline_of(path: &Path, checkpoint: &str) -> Option<Outline> {
    let story = run::read_story(path).unwrap();
    let save = story.save_of(checkpoint)?;
    story.outline(save).unwrap()
}

#[test]
fn the_journal_of_a_fork_has_the_digests_of_its_first_checkpoints_leaves() {
    let place = tempfile::tempdir().unwrap();
    let [old, new, silent] = ["a", "b", "c"].map(|name| place.path().join(name));
    let run = source(&old, 1);
    commit_transposed(&run, 2);
    run.close().unwrap();
    let recorded = outline_of(&old, &at(&old, 2).info().name).unwrap();
    let forked = fork(&at(&old, 2), &new, Sharing::Links).unwrap();
    assert_eq!(outline_of(&new, &forked.checkpoint), Some(recorded.clone()));
    // Where the source's journal says nothing of it, the bytes do.
    fs::remove_dir_all(old.join("journal")).unwrap();
    fs::create_dir(old.join("journal")).unwrap();
    let forked = fork(&at(&old, 2), &silent, Sharing::Copies).unwrap();
    assert_eq!(outline_of(&silent, &forked.checkpoint), Some(recorded));
    let story = run::read_story(&silent).unwrap();
    let saved = &story.save_of(&forked.checkpoint).unwrap().saved;
    let info = at(&silent, 2).info().clone();
    assert_eq!(
        (saved.size_bytes, saved.new_bytes),
        (info.size_bytes, info.new_bytes)
    );
}

#[test]
fn a_fork_can_be_made_while_its_source_is_trained_and_outlives_it() {
    let place = tempfile::tempdir().unwrap();
    let (old, new) = (place.path().join("a"), place.path().join("b"));
    let run = source(&old, 3);
    fork(&at(&old, 2), &new, Sharing::Links).unwrap();
    commit_at(&run, 4).unwrap();
    let newest_only = Retention {
        last: Some(1),
        ..Retention::default()
    };
    run.prune(&newest_only, false).unwrap();
    commit_at(&run, 5).unwrap(); // Over the blocks of what went, if it likes: not over those that the fork names.
    run.close().unwrap();
    at(&new, 2).verify().unwrap();
    fs::remove_dir_all(&old).unwrap();
    at(&new, 2).verify().unwrap();
    let run = open(&new);
    assert_exact(run.resumed_from().unwrap());
}

#[test]
fn pruning_a_fork_leaves_its_source_whole() {
    let place = tempfile::tempdir().unwrap();
    let (old, new) = (place.path().join("a"), place.path().join("b"));
    drop(source(&old, 3));
    fork(&at(&old, 2), &new, Sharing::Links).unwrap();
    let run = open(&new);
    train(&run, 3..=5).unwrap();
    let newest_only = Retention {
        last: Some(1),
        ..Retention::default()
    };
    assert_eq!(run.prune(&newest_only, false).unwrap().len(), 3);
    run.close().unwrap();
    for step in 0..=3 {
        at(&old, step).verify().unwrap();
    }
}

#[test]
fn copies_share_nothing() {
    let place = tempfile::tempdir().unwrap();
    let (old, new) = (place.path().join("a"), place.path().join("b"));
    drop(source(&old, 1));
    let forked = fork(&at(&old, 1), &new, Sharing::Copies).unwrap();
    assert!(forked.written_bytes > 0 && forked.shared_bytes == 0);
    assert_eq!(at(&new, 1).info().new_bytes, forked.written_bytes);
    for name in names(&new.join("objects")) {
        assert_eq!(fs::metadata(new.join("objects").join(name)).unwrap().nlink(), 1);
    }
}

#[test]
fn a_fork_of_a_damaged_checkpoint_is_refused_and_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let (old, new) = (place.path().join("a"), place.path().join("b"));
    drop(source(&old, 1));
    let checkpoint = at(&old, 1);
    let pack = old.join("objects").join(&checkpoint.manifest().packs[1].name);
    let mut bytes = fs::read(&pack).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&pack, bytes).unwrap();
    for sharing in [Sharing::Links, Sharing::Copies] {
        assert!(matches!(
            fork(&checkpoint, &new, sharing),
            Err(Error::Damaged { .. })
        ));
    }
    fs::remove_file(&pack).unwrap();
    assert!(matches!(
        fork(&checkpoint, &new, Sharing::Links),
        Err(Error::Io { .. })
    ));
    assert_eq!(names(place.path()), ["a"]);
}

#[test]
fn a_fork_takes_an_empty_place_and_no_other() {
    let place = tempfile::tempdir().unwrap();
    let (old, new) = (place.path().join("a"), place.path().join("b"));
    drop(source(&old, 1));
    let checkpoint = at(&old, 1);
    for taken in [&old, &{
        fs::write(place.path().join("file"), "x").unwrap();
        place.path().join("file")
    }] {
        let error = fork(&checkpoint, taken, Sharing::Links).unwrap_err();
        assert!(error.to_string().contains("is there already"), "{error}");
    }
    fs::create_dir(&new).unwrap();
    fork(&checkpoint, &new, Sharing::Links).unwrap();
    assert_eq!(names(place.path()), ["a", "b", "file"]);
}

#[test]
fn what_a_killed_fork_left_is_removed_by_the_next_one_and_a_living_one_is_not() {
    let place = tempfile::tempdir().unwrap();
    let (old, new) = (place.path().join("a"), place.path().join("b"));
    drop(source(&old, 1));
    let staged = |digit: &str| place.path().join(format!(".b.{}.unfinished", digit.repeat(32)));
    // The dead one has a lock that nobody holds; of the living one, the lock is held.
    drop(Run::open(&staged("1"), &Options::default()).unwrap());
    let living = Run::open(&staged("2"), &Options::default()).unwrap();
    fork(&at(&old, 1), &new, Sharing::Links).unwrap();
    assert!(!staged("1").exists());
    assert!(staged("2").exists());
    drop(living);
}
