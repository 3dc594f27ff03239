//! Whatever happens to a journal is found and named, and costs no checkpoint.
//!
//! Touches: storages in memory, temporary directories, and real processes that race for one run.

mod world;

use std::path::Path;
use std::process::{Command, Stdio};

use unbroken::format::journal::{
    Component, Record, SegmentHeader, SegmentReader, encode_header, encode_record,
};
use unbroken::journal::Story;
use unbroken::run::{Options, Run, read_run};
use unbroken::storage::memory::MemoryStorage;
use unbroken::storage::{Directory, Storage};
use world::{components, open, resumed_step, shared, train};

/// Three lives of two steps each, saved at 2, 4 and 6.
fn three_lives() -> MemoryStorage {
    let memory = MemoryStorage::new();
    for life in 0..3 {
        let run = open(&shared(&memory)).unwrap();
        run.begin().unwrap();
        if life == 0 {
            train(&run, 0..=0).unwrap();
        }
        for step in [2 * life + 1, 2 * life + 2] {
            run.record(step, 0, 0, step, components(step)).unwrap();
        }
        world::commit_at(&run, 2 * life + 2).unwrap();
        run.close().unwrap();
    }
    memory
}

/// What `unbroken verify` says of a journal: its flaws, and the checkpoints whose record is not there.
fn flaws(memory: &MemoryStorage) -> Vec<String> {
    let run = open(&shared(&memory.fork())).unwrap();
    let infos = run.checkpoints();
    let heads: Vec<_> = infos.iter().map(|info| info.journal_head).collect();
    let story = Story::open_with(&Directory::new(shared(memory)), run.id(), &heads).unwrap();
    let mut boundaries = story.boundaries();
    let count = boundaries.by_ref().map(Result::unwrap).count();
    assert!(count <= 6);
    let mut all = story.warnings.clone();
    all.extend(boundaries.conflict_words());
    all.extend(
        infos
            .iter()
            .filter(|info| !story.has_head(&info.journal_head))
            .map(|info| format!("no record of the checkpoint of step {}", info.step)),
    );
    all
}

/// Opens the run, which must go on from its newest checkpoint, and returns what it warns of.
fn warnings(memory: &MemoryStorage) -> Vec<String> {
    let run = open(&shared(&memory.fork())).unwrap();
    assert_eq!(
        resumed_step(&run),
        Some(6),
        "a damaged journal costs no checkpoint"
    );
    run.begin().unwrap();
    train(&run, 7..=7).unwrap();
    run.warnings().to_vec()
}

fn segment(life: u32) -> String {
    format!("journal/{life:06}.journal")
}

#[test]
fn a_whole_journal_has_nothing_to_name() {
    let memory = three_lives();
    assert_eq!(flaws(&memory), [] as [String; 0]);
    assert_eq!(warnings(&memory), [] as [String; 0]);
}

#[test]
fn a_missing_segment_is_named_whichever_it_is() {
    for (life, named) in [
        (1, "`journal/000002.journal` goes on from step 2"),
        (2, "`journal/000003.journal` goes on from step 4"),
        (3, "no record of the checkpoint of step 6"),
    ] {
        let memory = three_lives();
        memory.remove(&segment(life)).unwrap();
        let found = flaws(&memory);
        assert!(
            found.iter().any(|flaw| flaw.contains(named)),
            "life {life}: {found:?}"
        );
        assert!(!warnings(&memory).is_empty(), "life {life}");
    }
}

#[test]
fn a_segment_that_was_swapped_with_anothers_is_named() {
    let memory = three_lives();
    let (second, third) = (
        memory.files()[&segment(2)].clone(),
        memory.files()[&segment(3)].clone(),
    );
    memory.put(&segment(2), third);
    memory.put(&segment(3), second);
    let found = flaws(&memory);
    assert!(
        found
            .iter()
            .any(|flaw| flaw.contains("`journal/000002.journal` is of life 3")),
        "{found:?}"
    );
    assert!(!warnings(&memory).is_empty());
}

#[test]
fn a_torn_tail_is_no_flaw_and_a_flipped_bit_before_it_is() {
    let memory = three_lives();
    let whole = memory.files()[&segment(2)].clone();
    let mut torn = whole.clone();
    torn.extend([7, 0, 0, 0, 0x86]);
    memory.put(&segment(2), torn);
    assert_eq!(flaws(&memory), [] as [String; 0]);
    let offsets: Vec<u64> = SegmentReader::new(whole.as_slice())
        .unwrap()
        .map(|entry| entry.unwrap().offset)
        .collect();
    let mut flipped = whole;
    flipped[offsets[0] as usize + 9] ^= 4;
    memory.put(&segment(2), flipped);
    let found = flaws(&memory);
    let named = format!(
        "`journal/000002.journal` is damaged at byte {}, after step 2",
        offsets[0]
    );
    assert!(found.iter().any(|flaw| flaw.starts_with(&named)), "{found:?}");
    assert!(warnings(&memory).iter().any(|flaw| flaw.starts_with(&named)));
}

/// Writes a segment as a life would that started at step 4 beside life 3, and did not know of it.
fn another_life(memory: &MemoryStorage, life: u32, loss: f64) {
    let third = memory.files()[&segment(3)].clone();
    let mut reader = SegmentReader::new(third.as_slice()).unwrap();
    let header = SegmentHeader {
        life,
        ..reader.header().unwrap().clone()
    };
    assert!(reader.next().is_some());
    let (mut bytes, mut chain) = encode_header(&header).unwrap();
    for step in [5, 6] {
        let mut components = components(step);
        if step == 6 {
            components[1].1 = Component::Float(loss.to_bits());
        }
        let (epoch, position) = (0, step);
        let record = Record::Boundary {
            step,
            phase: 0,
            epoch,
            position,
            components,
        };
        let (next, after) = encode_record(&chain, &record).unwrap();
        bytes.extend(next);
        chain = after;
    }
    memory.put(&segment(life), bytes);
}

#[test]
fn two_lives_that_wrote_the_same_steps_differently_are_named_with_the_step() {
    let memory = three_lives();
    another_life(&memory, 4, 0.25);
    let found = flaws(&memory);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("lives 3 and 4 recorded step 6 differently, first in loss"),
        "{found:?}"
    );
    warnings(&memory);
}

#[test]
fn two_lives_that_wrote_the_same_steps_equally_executed_them_again() {
    let memory = three_lives();
    another_life(&memory, 4, 1.0 / 7.0);
    assert_eq!(flaws(&memory), [] as [String; 0]);
    let run_id = open(&shared(&memory.fork())).unwrap().id().to_owned();
    let story = Story::open(&Directory::new(shared(&memory)), &run_id).unwrap();
    let last = story.boundaries().last().unwrap().unwrap();
    assert_eq!((last.step, last.lives), (6, vec![3, 4]));
}

#[test]
fn a_segment_that_another_process_made_first_is_an_error_and_stays_as_it_is() {
    // The lock did not hold, as on a file system that has none: both are life 2, and only one of them can be.
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    train(&run, 0..=2).unwrap();
    run.close().unwrap();
    let late = open(&shared(&memory)).unwrap();
    memory.put(&segment(2), b"of somebody else".to_vec());
    let error = late.begin().unwrap_err();
    assert!(error.to_string().contains("000002.journal"), "{error}");
    assert_eq!(memory.files()[&segment(2)], b"of somebody else");
}

#[test]
fn what_is_far_behind_the_checkpoint_is_not_read_at_resume() {
    // 30000 steps, the last checkpoint 50 steps before the end. The journal's beginning is destroyed: a resume does not
    // look there and compares what was executed behind the checkpoint all the same; reading all of it names the damage.
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    train(&run, 0..=0).unwrap();
    for step in 1..=30_000 {
        run.record(step, 0, 0, step, components(step)).unwrap();
        if step == 29_950 {
            world::commit_at(&run, step).unwrap();
        }
    }
    drop(run);
    let mut bytes = memory.files()[&segment(1)].clone();
    assert!(bytes.len() > 3_100_000, "{}", bytes.len());
    bytes[100_000..1_000_000].fill(0x5a);
    memory.put(&segment(1), bytes);
    let run = open(&shared(&memory.fork())).unwrap();
    assert_eq!((resumed_step(&run), run.recorded_until()), (Some(29_950), 30_000));
    assert_eq!(run.warnings(), [] as [String; 0]);
    run.begin().unwrap();
    assert_eq!(
        run.record(29_951, 0, 0, 29_951, components(29_951)).unwrap(),
        None
    );
    let difference = run.record(29_952, 0, 0, 29_952, components(1)).unwrap();
    assert_eq!(difference.unwrap().component, "batch");
    let story = Story::open(&Directory::new(shared(&memory)), run.id()).unwrap();
    assert!(
        story.warnings[0].contains("is damaged at byte"),
        "{:?}",
        story.warnings
    );
}

#[test]
fn a_checkpoint_far_before_the_journals_end_is_reached_all_the_same() {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    train(&run, 0..=10).unwrap();
    for step in 11..=25_000 {
        run.record(step, 0, 0, step, components(step)).unwrap();
    }
    drop(run);
    let run = open(&shared(&memory)).unwrap();
    assert_eq!((resumed_step(&run), run.recorded_until()), (Some(10), 25_000));
    assert_eq!(run.warnings(), [] as [String; 0]);
    run.begin().unwrap();
    for step in [11, 12_345] {
        assert_eq!(
            run.record(step, 0, 0, step, components(step)).unwrap(),
            None,
            "{step}"
        );
    }
    assert!(run.record(25_000, 0, 0, 25_000, components(1)).unwrap().is_some());
}

/// Set in a child process: the run that it shall train.
const RACE: &str = "UNBROKEN_TEST_RACE";

/// What a racing process does: take steps of the run until it has 12, killed by nobody, refused by the lock perhaps.
fn race(path: &Path) {
    loop {
        let Ok(run) = Run::open(path, &Options::default()) else {
            continue; // The other one has it.
        };
        let from = run.resumed_from().map_or(0, |checkpoint| checkpoint.info().step);
        if from >= 12 {
            return;
        }
        run.begin().unwrap();
        if from == 0 && run.resumed_from().is_none() {
            world::commit_at(&run, 0).unwrap();
        }
        for step in from + 1..=from + 2 {
            assert_eq!(run.record(step, 0, 0, step, components(step)).unwrap(), None);
        }
        world::commit_at(&run, from + 2).unwrap();
        // Left as a kill would leave it: only the lock goes with the value.
    }
}

#[test]
fn two_processes_that_race_for_one_run_never_write_at_the_same_time() {
    if let Ok(path) = std::env::var(RACE) {
        return race(Path::new(&path));
    }
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    let start = || {
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "two_processes_that_race_for_one_run_never_write_at_the_same_time",
            ])
            .env(RACE, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    for child in [start(), start()] {
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
    }
    let overview = read_run(&path).unwrap();
    assert_eq!(overview.checkpoints.last().unwrap().info().step, 12);
    let journal = unbroken::run::read_journal(&path).unwrap();
    assert_eq!(journal.warnings, [] as [String; 0]);
    let steps: Vec<(u64, usize)> = journal
        .boundaries
        .iter()
        .map(|boundary| (boundary.step, boundary.lives.len()))
        .collect();
    assert_eq!(steps, (1..=12).map(|step| (step, 1)).collect::<Vec<_>>());
    assert_eq!(journal.lives.len(), 6, "each life took two steps");
}
