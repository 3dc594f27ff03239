//! Repair: what is whole stays, what is not is put aside, and nothing that was committed is ever gone.
//!
//! Touches: temporary directories.

mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use unbroken::error::Error;
use unbroken::fork::{Sharing, fork};
use unbroken::repair::{Action, Plan, plan, repair, repair_on};
use unbroken::run::{self, Options, Run};
use unbroken::storage::Storage;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Leftovers, MemoryStorage};
use unbroken::store::Checkpoint;
use world::{assert_exact, files_in, run_in_memory, train};

/// A run with checkpoints at steps 0 to 3, closed.
fn run_in(place: &Path) -> PathBuf {
    let path = place.join("a");
    let options = Options {
        seed: Some(7),
        ..Options::default()
    };
    let run = Run::open(&path, &options).unwrap();
    run.begin().unwrap();
    train(&run, 0..=3).unwrap();
    run.close().unwrap();
    path
}

fn at(path: &Path, step: usize) -> Checkpoint {
    run::read_run(path).unwrap().checkpoints[step].clone()
}

/// The file of the pack that a checkpoint added.
fn own_pack(path: &Path, step: usize) -> PathBuf {
    let name = at(path, step).manifest().packs.last().unwrap().name.clone();
    path.join("objects").join(name)
}

fn flip_last_bit(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(file, bytes).unwrap();
}

fn copy_of(path: &Path) -> PathBuf {
    let copy = path.with_extension("copy");
    for (name, bytes) in files(path) {
        let file = copy.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, bytes).unwrap();
    }
    copy
}

fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            let below = files(&entry.path());
            all.extend(
                below
                    .into_iter()
                    .map(|(file, bytes)| (format!("{name}/{file}"), bytes)),
            );
        } else {
            all.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    all
}

/// Every content that was in `before` is still somewhere.
fn assert_nothing_is_gone(before: &BTreeMap<String, Vec<u8>>, path: &Path) {
    let after = files(path);
    for (name, bytes) in before.iter().filter(|(name, _)| name.as_str() != "lock") {
        assert!(after.values().any(|found| found == bytes), "{name} is gone");
    }
}

fn repaired(path: &Path, copies: &[PathBuf]) -> Plan {
    let before = files(path);
    let planned = plan(path, copies).unwrap();
    assert_eq!(files(path), before, "planning changes nothing");
    assert_eq!(repair(path, copies).unwrap(), planned);
    assert_nothing_is_gone(&before, path);
    let after = plan(path, &[]).unwrap();
    if planned.beyond.is_empty() && !planned.whole.is_empty() {
        assert!(after.is_whole() && after.actions.is_empty(), "{after:?}");
    }
    planned
}

fn resumed_step(path: &Path) -> u64 {
    let run = Run::open(
        path,
        &Options {
            strict: true,
            ..Options::default()
        },
    )
    .unwrap();
    assert_eq!(run.warnings(), [] as [String; 0]);
    let checkpoint = run.resumed_from().unwrap();
    assert_exact(checkpoint);
    checkpoint.info().step
}

#[test]
fn a_whole_run_needs_nothing() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let before = files(&path);
    let done = repair(&path, &[]).unwrap();
    assert!(done.is_whole() && done.actions.is_empty());
    assert_eq!(done.whole.len(), 4);
    assert_eq!(files(&path), before);
}

#[test]
fn a_checkpoint_with_a_damaged_tensor_is_put_aside_with_its_pack_and_its_reason() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let (name, pack) = (at(&path, 3).info().name.clone(), own_pack(&path, 3));
    flip_last_bit(&pack);
    let done = repaired(&path, &[]);
    assert_eq!((done.whole.len(), done.lost.len()), (3, 1));
    assert_eq!(done.lost[0].0, name);
    let aside = path.join("quarantine");
    assert!(aside.join(pack.file_name().unwrap()).is_file());
    let why = fs::read_to_string(aside.join(format!("{name}.why"))).unwrap();
    assert!(why.contains("\"optimizer/0/0\" should be"), "{why}");
    assert_eq!(resumed_step(&path), 2);
}

#[test]
fn a_pack_that_whole_checkpoints_need_stays_though_a_damaged_one_named_it_too() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    // Step 0's pack has the frozen leaf that all checkpoints need, last; and two that only step 0 needs.
    let checkpoint = at(&path, 0);
    let (_, offset) = checkpoint.manifest().storages[1].place.whole().unwrap();
    let pack = own_pack(&path, 0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[usize::try_from(offset).unwrap()] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let done = repaired(&path, &[]);
    assert_eq!((done.whole.len(), done.lost.len()), (3, 1));
    assert!(pack.is_file());
    assert_eq!(resumed_step(&path), 3);
}

#[test]
fn what_a_manifest_that_cannot_be_read_may_have_named_is_put_aside_too() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let (info, pack) = (at(&path, 3).info().clone(), own_pack(&path, 3));
    flip_last_bit(&info.path);
    let done = repaired(&path, &[]);
    assert_eq!(done.lost[0].0, info.name);
    assert!(path.join("quarantine").join(pack.file_name().unwrap()).is_file());
    assert_eq!(resumed_step(&path), 2);
}

#[test]
fn whole_files_of_a_copy_take_the_place_of_damaged_and_missing_ones() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let copy = copy_of(&path);
    flip_last_bit(&at(&path, 3).info().path);
    flip_last_bit(&own_pack(&path, 2));
    fs::remove_file(own_pack(&path, 1)).unwrap();
    flip_last_bit(&own_pack(&copy, 0)); // Damage in the copy that nobody asks for.
    let done = repaired(&path, &[place.path().join("a"), copy.clone()]);
    assert_eq!((done.whole.len(), done.lost.len()), (4, 0));
    let restored = |action: &&Action| matches!(action, Action::Restore { copy: from, .. } if *from == copy);
    assert_eq!(done.actions.iter().filter(restored).count(), 3);
    assert_eq!(resumed_step(&path), 3);
}

#[test]
fn a_fork_is_a_copy_of_the_packs_that_it_shares() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let other = place.path().join("b");
    fork(&at(&path, 3), &other, Sharing::Copies).unwrap();
    fs::remove_file(own_pack(&path, 3)).unwrap();
    let done = repaired(&path, std::slice::from_ref(&other));
    assert_eq!((done.whole.len(), done.lost.len()), (4, 0));
    assert_eq!(resumed_step(&path), 3);
}

#[test]
fn nothing_moves_while_no_checkpoint_is_whole() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let packs = [0, 1, 2, 3].map(|step| own_pack(&path, step));
    let (_, frozen) = at(&path, 0).manifest().storages[0].place.whole().unwrap();
    for pack in &packs[1..] {
        fs::write(pack, b"short").unwrap();
    }
    let mut bytes = fs::read(&packs[0]).unwrap();
    bytes[usize::try_from(frozen).unwrap()] ^= 1;
    fs::write(&packs[0], bytes).unwrap();
    let before = files(&path);
    let done = repair(&path, &[]).unwrap();
    assert_eq!((done.actions.len(), done.whole.len(), done.lost.len()), (0, 0, 4));
    let mut after = files(&path);
    after.insert("lock".to_owned(), before["lock"].clone());
    assert_eq!(after, before);
}

#[test]
fn left_overs_go_and_strangers_stay_with_what_they_may_need() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let leftover = path.join(format!("tmp/{}.tmp", "a".repeat(32)));
    let pack = path.join(format!("objects/{}.safetensors", "b".repeat(32)));
    fs::write(&leftover, "x").unwrap();
    fs::write(&pack, "x").unwrap();
    let stranger = path.join("checkpoints/notes.txt");
    fs::write(&stranger, "x").unwrap();
    let done = repair(&path, &[]).unwrap();
    assert_eq!(done.left_alone.len(), 1);
    assert!(stranger.is_file() && pack.is_file() && !leftover.is_file());
    fs::remove_file(&stranger).unwrap();
    repair(&path, &[]).unwrap();
    assert!(!pack.is_file());
    assert_eq!(resumed_step(&path), 3);
}

#[test]
fn a_damaged_journal_is_told_and_left_as_it_is() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let segment = path.join("journal/000001.journal");
    let mut bytes = fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    let done = repair(&path, &[]).unwrap();
    assert!(!done.is_whole() && done.actions.is_empty());
    let told = |words| done.beyond.iter().filter(|what| what.contains(words)).count();
    assert_eq!((told("is damaged at byte"), told("is not there")), (1, 2));
    assert_eq!(fs::read(&segment).unwrap(), bytes);
}

#[test]
fn a_whole_segment_of_a_copy_takes_the_place_of_a_damaged_or_missing_one() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let second = Run::open(&path, &Options::default()).unwrap();
    second.begin().unwrap();
    train(&second, 4..=5).unwrap();
    second.close().unwrap();
    let copy = copy_of(&path);
    let first = path.join("journal/000001.journal");
    let restored = |damage: &dyn Fn()| {
        damage();
        assert!(!plan(&path, &[]).unwrap().is_whole());
        let done = repaired(&path, std::slice::from_ref(&copy));
        assert_eq!(done.beyond, [] as [String; 0]);
        let journal = run::read_journal(&path).unwrap();
        assert_eq!((journal.warnings.len(), journal.boundaries.len()), (0, 5));
    };
    restored(&|| {
        let mut bytes = fs::read(&first).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&first, bytes).unwrap();
    });
    restored(&|| {
        let mut bytes = fs::read(&first).unwrap();
        bytes[20] ^= 1;
        fs::write(&first, bytes).unwrap();
    });
    restored(&|| fs::remove_file(&first).unwrap());
    assert_eq!(resumed_step(&path), 5);
}

#[test]
fn a_run_whose_own_description_is_gone_gets_it_from_a_copy_and_from_no_other_run() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let (copy, other) = (copy_of(&path), place.path().join("b"));
    fork(&at(&path, 3), &other, Sharing::Links).unwrap();
    let config = path.join("run.toml");
    let whole = fs::read(&config).unwrap();
    for damage in [Some(&b"format = 1"[..]), None] {
        match damage {
            Some(bytes) => fs::write(&config, bytes).unwrap(),
            None => fs::remove_file(&config).unwrap(),
        }
        let before = files(&path);
        assert!(repair(&path, &[]).is_err());
        assert!(repair(&path, std::slice::from_ref(&other)).is_err());
        assert_eq!(files(&path), before);
        repaired(&path, &[other.clone(), copy.clone()]);
        assert_eq!(fs::read(&config).unwrap(), whole);
        assert_eq!(resumed_step(&path), 3);
    }
}

#[test]
fn a_segment_of_a_copy_that_went_on_by_itself_is_not_taken() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let copy = copy_of(&path);
    for each in [&path, &copy] {
        let run = Run::open(each, &Options::default()).unwrap();
        run.begin().unwrap();
        train(&run, 4..=6).unwrap();
        run.close().unwrap();
    }
    let segment = path.join("journal/000002.journal");
    let mut bytes = fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    let done = repair(&path, &[copy]).unwrap();
    assert!(done.actions.is_empty() && !done.is_whole(), "{done:?}");
    assert_eq!(fs::read(&segment).unwrap(), bytes);
}

/// Trains a further life, up to a step.
fn go_on(path: &Path, until: u64) {
    let run = Run::open(path, &Options::default()).unwrap();
    let from = run.resumed_from().unwrap().info().step;
    run.begin().unwrap();
    train(&run, from + 1..=until).unwrap();
    run.close().unwrap();
}

fn remove_manifests(path: &Path) {
    for checkpoint in run::read_run(path).unwrap().checkpoints {
        fs::remove_file(&checkpoint.info().path).unwrap();
    }
}

#[test]
fn a_run_whose_manifests_are_gone_is_not_whole_and_nothing_in_it_moves() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let other = place.path().join("b");
    fork(&at(&path, 3), &other, Sharing::Copies).unwrap();
    remove_manifests(&path);
    let before = files(&path);
    for copies in [&[][..], std::slice::from_ref(&other)] {
        let done = repair(&path, copies).unwrap();
        assert!(!done.is_whole() && done.missing.is_some(), "{done:?}");
        assert_eq!((done.actions.len(), done.whole.len(), done.lost.len()), (0, 0, 0));
    }
    let mut after = files(&path);
    after.insert("lock".to_owned(), before["lock"].clone());
    assert_eq!(after, before);
}

#[test]
fn a_copys_newest_checkpoint_comes_back_where_all_manifests_are_gone() {
    // The copy is older than the run: it has steps 0 to 3, and the run went on to 5. Packs that nothing names any more
    // are put aside, not swept.
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let copy = copy_of(&path);
    go_on(&path, 5);
    let (name, pack) = (at(&copy, 3).info().name.clone(), own_pack(&copy, 3));
    remove_manifests(&path);
    flip_last_bit(&path.join("objects").join(pack.file_name().unwrap()));
    let whole = fs::read(&pack).unwrap();
    flip_last_bit(&pack);
    let next = at(&copy, 2).info().name.clone();
    let planned = plan(&path, std::slice::from_ref(&copy)).unwrap();
    assert_eq!(planned.whole, [next], "the copy's newest that is whole");
    fs::write(&pack, whole).unwrap();
    let done = repaired(&path, &[copy]);
    assert_eq!((done.whole, done.lost.len()), (vec![name], 0));
    assert_eq!(fs::read_dir(path.join("objects")).unwrap().count(), 2);
    assert_eq!(resumed_step(&path), 3);
    go_on(&path, 6);
}

#[test]
fn what_a_copy_trained_by_itself_does_not_come_back_as_the_runs_own() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let copy = copy_of(&path);
    go_on(&path, 5);
    go_on(&copy, 6);
    remove_manifests(&path);
    repaired(&path, &[copy]);
    assert_eq!(resumed_step(&path), 3);
}

#[test]
fn an_older_checkpoint_of_a_copy_comes_back_where_all_that_are_here_are_lost() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let copy = copy_of(&path);
    go_on(&path, 5);
    let packs = [4, 5].map(|step| own_pack(&path, step));
    for step in 0..=3 {
        fs::remove_file(&at(&path, 0).info().path).unwrap();
        assert_eq!(at(&path, 0).info().step, step + 1);
    }
    packs.iter().for_each(|pack| flip_last_bit(pack));
    let done = repaired(&path, &[copy]);
    assert_eq!((done.whole.len(), done.lost.len()), (1, 2));
    assert_eq!(resumed_step(&path), 3);
}

#[test]
fn a_segment_that_is_cut_emptied_or_deleted_is_told_and_replaced_by_a_copys_longer_one() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let copy = copy_of(&path);
    let segment = path.join("journal/000001.journal");
    let length = fs::metadata(&segment).unwrap().len();
    for left in [Some(length / 2), Some(0), None] {
        match left {
            Some(left) => {
                let file = fs::File::options().write(true).open(&segment).unwrap();
                file.set_len(left).unwrap();
            }
            None => fs::remove_file(&segment).unwrap(),
        }
        let alone = repaired(&path, &[]);
        assert!(
            alone.actions.is_empty() && !alone.is_whole(),
            "{left:?}: {alone:?}"
        );
        let told = alone
            .beyond
            .iter()
            .filter(|what| what.contains("was made at is not there"));
        assert!(told.count() > 0, "{:?}", alone.beyond);
        let done = repaired(&path, std::slice::from_ref(&copy));
        assert_eq!((done.actions.len(), done.beyond.len()), (1, 0), "{done:?}");
        assert_eq!(fs::metadata(&segment).unwrap().len(), length);
        assert_eq!(resumed_step(&path), 3);
    }
}

#[test]
fn a_segment_that_a_kill_ended_stays_though_a_copy_has_more_of_it() {
    // Nothing names a record behind the last checkpoint's: one segment is as good as the other.
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let copy = copy_of(&path);
    let run = Run::open(&path, &Options::default()).unwrap();
    run.begin().unwrap();
    run.record(4, 0, 0, 4, world::components(4)).unwrap();
    run.close().unwrap();
    let longer = copy_of(&path);
    let segment = path.join("journal/000002.journal");
    let file = fs::File::options().write(true).open(&segment).unwrap();
    file.set_len(fs::metadata(&segment).unwrap().len() - 1).unwrap();
    let done = repaired(&path, &[copy, longer]);
    assert!(done.is_whole() && done.actions.is_empty(), "{done:?}");
}

#[test]
fn a_run_that_is_trained_is_not_repaired() {
    let place = tempfile::tempdir().unwrap();
    let path = run_in(place.path());
    let held = Run::open(&path, &Options::default()).unwrap();
    assert!(matches!(repair(&path, &[]), Err(Error::Locked { .. })));
    assert!(plan(&path, &[]).unwrap().is_whole());
    drop(held);
}

#[test]
fn a_repair_can_be_cut_short_anywhere_by_a_kill_or_a_power_cut() {
    // On disk: a manifest that cannot be read, a checkpoint whose pack is damaged, a left-over. The repair dies at each
    // of its operations. Every content must still be there, the newest whole checkpoint offered, and a second repair
    // must finish what the first began.
    let memory = run_in_memory(4);
    let files = memory.files();
    let manifest = |step: u64| {
        let start = format!("checkpoints/{step:09}-");
        let mut names = files.keys().filter(|name| name.starts_with(&start));
        names.next().unwrap().clone()
    };
    let damaged = |name: &String| {
        let mut bytes = files[name].clone();
        *bytes.last_mut().unwrap() ^= 1;
        memory.put(name, bytes);
    };
    let checkpoints = {
        let storage: Arc<dyn Storage> = Arc::new(memory.fork());
        Run::open_on(storage, &Options::default()).unwrap()
    };
    let info = &checkpoints.checkpoints()[3];
    let pack = checkpoints
        .checkpoint(&info.name)
        .unwrap()
        .manifest()
        .packs
        .last()
        .unwrap()
        .name
        .clone();
    damaged(&manifest(4));
    damaged(&format!("objects/{pack}"));
    let before = memory.files();
    let mut cuts = 0;
    loop {
        let trial = memory.fork();
        let faulty = FaultyStorage::new(Arc::new(trial.clone()));
        faulty.fail_at(
            cuts,
            if cuts % 2 == 0 {
                Fault::Crash
            } else {
                Fault::CrashAfter
            },
        );
        let done = repair_on(Arc::new(faulty), &[]).is_ok();
        for leftovers in [Leftovers::Nothing, Leftovers::Names, Leftovers::Everything] {
            let left = trial.after_power_cut(leftovers);
            for (name, bytes) in before.iter().filter(|(name, _)| name.as_str() != "lock") {
                let found = left.files().values().any(|found| found == bytes);
                assert!(found, "{name} is gone after operation {cuts}, {leftovers:?}");
            }
            let again = repair_on(Arc::new(left.clone()), &[]).unwrap();
            assert_eq!(again.whole.len(), 3, "operation {cuts}, {leftovers:?}");
            let run = Run::open_on(
                Arc::new(left),
                &Options {
                    strict: true,
                    ..Options::default()
                },
            )
            .unwrap();
            assert_eq!(run.resumed_from().unwrap().info().step, 2);
        }
        if done {
            break;
        }
        cuts += 1;
    }
    assert!(cuts > 40, "only {cuts} operations");
}

/// A run with steps 0 to 3 in memory, and a whole copy of it on disk.
fn run_with_copy(place: &Path) -> (MemoryStorage, PathBuf) {
    let (memory, copy) = (run_in_memory(3), place.join("copy"));
    for (name, bytes) in memory.files() {
        let file = copy.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, bytes).unwrap();
    }
    (memory, copy)
}

fn names_in(memory: &MemoryStorage, dir: &str) -> Vec<String> {
    let names = files_in(memory, dir).into_keys();
    names.map(|name| format!("{dir}/{name}")).collect()
}

fn remove_durably(memory: &MemoryStorage, name: &str) {
    memory.remove(name).unwrap();
    memory.sync_dir(name.split_once('/').unwrap().0).unwrap();
}

/// Repairs from a copy, and fails or dies at each operation in turn, in each way. Every content must still be there then,
/// and a second repair must finish what the first began.
fn fails_anywhere(memory: &MemoryStorage, copy: &PathBuf, whole: usize) {
    let copies = std::slice::from_ref(copy);
    let before = memory.files();
    let check = |left: MemoryStorage, story: &str| {
        let (found, again) = (left.files(), repair_on(Arc::new(left.clone()), copies));
        for (name, bytes) in before.iter().filter(|(name, _)| name.as_str() != "lock") {
            let kept = |files: &BTreeMap<String, Vec<u8>>| files.values().any(|found| found == bytes);
            assert!(
                kept(&found) && kept(&left.files()),
                "{name} is gone after {story}"
            );
        }
        assert_eq!(again.expect(story).whole.len(), whole, "{story}");
        assert!(
            repair_on(Arc::new(left.clone()), &[]).unwrap().actions.is_empty(),
            "{story}"
        );
        let strict = Options {
            strict: true,
            ..Options::default()
        };
        let run = Run::open_on(Arc::new(left), &strict).expect(story);
        assert_eq!(run.warnings(), [] as [String; 0], "{story}");
        assert_exact(run.resumed_from().unwrap());
        assert_eq!(run.resumed_from().unwrap().info().step, 3, "{story}");
    };
    for fault in [Fault::Crash, Fault::CrashAfter, Fault::Device, Fault::NoSpace] {
        let mut operations = 0;
        loop {
            let trial = memory.fork();
            let faulty = FaultyStorage::new(Arc::new(trial.clone()));
            faulty.fail_at(operations, fault);
            // One that a failing device can do without is none that ends the repair.
            let _ = repair_on(Arc::new(faulty.clone()), copies);
            let story = format!("{fault:?} at operation {operations}");
            let cuts = match fault {
                Fault::Crash | Fault::CrashAfter => {
                    &[Leftovers::Nothing, Leftovers::Names, Leftovers::Everything][..]
                }
                _ => &[],
            };
            for leftovers in cuts {
                check(
                    trial.after_power_cut(*leftovers),
                    &format!("{story}, {leftovers:?}"),
                );
            }
            check(trial, &story);
            if faulty.operations().len() <= operations {
                break;
            }
            operations += 1;
        }
        assert!(operations > 30, "only {operations} operations");
    }
}

#[test]
fn a_restore_from_a_copy_can_fail_or_be_cut_short_anywhere() {
    let place = tempfile::tempdir().unwrap();
    let (memory, copy) = run_with_copy(place.path());
    let damage = |name: &str, length: usize| {
        let mut bytes = memory.files()[name].clone();
        bytes.truncate(bytes.len() - length);
        *bytes.last_mut().unwrap() ^= 1;
        memory.put(name, bytes);
    };
    let (packs, manifests) = (names_in(&memory, "objects"), names_in(&memory, "checkpoints"));
    damage(&packs[0], 0);
    remove_durably(&memory, &packs[1]);
    damage(&manifests[1], 1);
    let segment = "journal/000001.journal";
    damage(segment, memory.files()[segment].len() / 2);
    fails_anywhere(&memory, &copy, 4);
}

#[test]
fn bringing_a_checkpoint_back_from_a_copy_can_fail_or_be_cut_short_anywhere() {
    let place = tempfile::tempdir().unwrap();
    let (memory, copy) = run_with_copy(place.path());
    for manifest in names_in(&memory, "checkpoints") {
        remove_durably(&memory, &manifest);
    }
    fails_anywhere(&memory, &copy, 1);
}
