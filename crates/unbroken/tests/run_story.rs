//! A run over its lives: who may open it, what it proves when steps are executed again, what it refuses.
//!
//! Touches: temporary directories, and real processes for the lock.

mod world;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use unbroken::error::Error;
use unbroken::format::journal::{Component, SegmentReader};
use unbroken::run::{Extent, Options, Run, Trial};
use unbroken::state::Value;
use unbroken::storage::Storage;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::MemoryStorage;
use world::{
    assert_exact, commit_at, components, files_in, open, resumed_step, run_in_memory, shared, train,
};

fn options() -> Options {
    let settings = vec![
        ("note".to_owned(), Value::Str("first \"try\"\n".to_owned())),
        ("rate".to_owned(), Value::Float(0.1f64.to_bits())),
        ("steps".to_owned(), Value::Int(-3)),
        ("fast".to_owned(), Value::Bool(true)),
    ];
    Options {
        seed: Some(u64::MAX),
        settings,
        ..Options::default()
    }
}

#[test]
fn a_run_keeps_its_id_seed_and_settings_over_its_lives() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("runs/a");
    let run = Run::open(&path, &options()).unwrap();
    let (id, created) = (run.id().to_owned(), run.created().to_owned());
    assert_eq!((run.seed(), run.life(), run.recorded_until()), (u64::MAX, 1, 0));
    assert!(run.resumed_from().is_none());
    run.begin().unwrap();
    train(&run, 0..=1).unwrap();
    run.close().unwrap();
    run.close().unwrap();
    assert!(matches!(commit_at(&run, 2), Err(Error::Invalid { .. })));
    let run = Run::open(&path, &Options::default()).unwrap();
    assert_eq!(
        (run.id(), run.created(), run.seed(), run.life()),
        (&*id, &*created, u64::MAX, 2)
    );
    let mut settings = options().settings;
    settings.sort_by(|(a, _), (b, _)| a.cmp(b));
    assert_eq!(run.settings(), settings);
    assert_exact(run.resumed_from().unwrap());
}

#[test]
fn another_seed_is_refused_and_changes_nothing() {
    let memory = run_in_memory(1);
    let before = memory.files();
    let error = Run::open_on(
        shared(&memory),
        &Options {
            seed: Some(8),
            ..Options::default()
        },
    )
    .unwrap_err();
    let Error::Identity { differences, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(
        differences,
        &[("seed".to_owned(), "7".to_owned(), "8".to_owned())]
    );
    assert_eq!(memory.files(), before);
}

#[test]
fn a_killed_life_is_compared_with_the_next_one_step_by_step() {
    // Life 1 commits step 2 and records up to step 5. Life 2 executes 3 and 4 the same and 5 differently.
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    train(&run, 0..=2).unwrap();
    for step in 3..=5 {
        run.record(step, 0, 0, step, components(step)).unwrap();
    }
    drop(run); // As a kill would: nothing is closed.
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(
        (resumed_step(&run), run.recorded_until(), run.life()),
        (Some(2), 5, 2)
    );
    run.begin().unwrap();
    for step in 3..=4 {
        assert_eq!(run.record(step, 0, 0, step, components(step)).unwrap(), None);
    }
    let mut other = components(5);
    other[1].1 = Component::Float(0.25f64.to_bits());
    other[2].1 = Component::Int(0);
    let difference = run.record(5, 0, 0, 5, other).unwrap().unwrap();
    assert_eq!((difference.step, difference.component.as_str()), (5, "loss"));
    assert!(
        difference.expected.starts_with("0.1666") && difference.found.starts_with("0.25"),
        "{difference:?}"
    );
    assert_eq!(run.record(6, 0, 0, 6, components(6)).unwrap(), None);
    run.close().unwrap();
    let journal =
        unbroken::journal::read(&unbroken::storage::Directory::new(shared(&memory)), run.id()).unwrap();
    let lives: Vec<_> = journal
        .boundaries
        .iter()
        .map(|boundary| (boundary.step, boundary.lives.clone()))
        .collect();
    let both = || vec![1, 2];
    assert_eq!(
        lives,
        [
            (1, vec![1]),
            (2, vec![1]),
            (3, both()),
            (4, both()),
            (5, both()),
            (6, vec![2])
        ]
    );
    assert_eq!(
        journal.at(5, 0).unwrap().components[2].1,
        Component::Int(0),
        "the newest life counts"
    );
    // Whoever asked for the difference did not write it down, as if it had been killed at that moment.
    assert_eq!(journal.warnings.len(), 1);
    let warning = &journal.warnings[0];
    assert!(
        warning.starts_with("lives 1 and 2 recorded step 5 differently, first in loss"),
        "{warning}"
    );
}

fn other_components(step: u64) -> Vec<(String, Component)> {
    let mut other = components(step);
    other[1].1 = Component::Float(7.5f64.to_bits());
    other
}

fn diverge(run: &Run, step: u64, went_on: bool) {
    let difference = run.record(step, 0, 0, step, other_components(step)).unwrap();
    assert!(difference.is_some(), "step {step} came out otherwise");
    let fields = vec![("went_on".to_owned(), Value::Bool(went_on))];
    run.event(unbroken::journal::DIVERGED, step, fields).unwrap();
}

#[test]
fn a_life_that_stopped_at_a_difference_is_not_what_the_next_one_is_compared_with() {
    // Life 1 commits step 2 and records up to 5. Life 2 executes 4 differently and stops. Life 3 does the same again:
    // compared with life 2 it would be called identical.
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    train(&run, 0..=2).unwrap();
    for step in 3..=5 {
        run.record(step, 0, 0, step, components(step)).unwrap();
    }
    drop(run);
    for _ in 2..=3 {
        let run = open(&shared(&memory)).unwrap();
        assert_eq!(run.recorded_until(), 5);
        run.begin().unwrap();
        assert_eq!(run.record(3, 0, 0, 3, components(3)).unwrap(), None);
        diverge(&run, 4, false);
        drop(run);
    }
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    for step in 3..=5 {
        assert_eq!(run.record(step, 0, 0, step, components(step)).unwrap(), None);
    }
}

#[test]
fn a_life_that_went_on_from_a_difference_is_what_the_next_one_is_compared_with() {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    train(&run, 0..=2).unwrap();
    for step in 3..=6 {
        run.record(step, 0, 0, step, components(step)).unwrap();
    }
    drop(run);
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    diverge(&run, 3, true);
    run.record(4, 0, 0, 4, other_components(4)).unwrap();
    drop(run);
    let run = open(&shared(&memory)).unwrap();
    assert_eq!(
        run.recorded_until(),
        4,
        "what life 1 recorded behind the difference is another story"
    );
    run.begin().unwrap();
    for step in 3..=4 {
        assert_eq!(
            run.record(step, 0, 0, step, other_components(step)).unwrap(),
            None
        );
    }
}

#[test]
fn components_that_are_missing_extra_or_moved_are_differences() {
    let given = |names: &[&str]| -> Vec<(String, Component)> {
        names
            .iter()
            .map(|name| ((*name).to_owned(), Component::Text((*name).to_owned())))
            .collect()
    };
    let cases: [(&[&str], Option<&str>); 6] = [
        (&["a", "b", "c"], None),
        (&["a", "c"], Some("b")),
        (&["a", "b"], Some("c")),
        (&["a", "b", "c", "d"], Some("d")),
        (&["a", "x", "b", "c"], Some("x")),
        (&["b", "a", "c"], Some("b")),
    ];
    for (names, expected) in cases {
        let memory = MemoryStorage::new();
        let run = open(&shared(&memory)).unwrap();
        run.begin().unwrap();
        commit_at(&run, 0).unwrap();
        run.record(1, 0, 0, 1, given(&["a", "b", "c"])).unwrap();
        drop(run);
        let run = open(&shared(&memory)).unwrap();
        run.begin().unwrap();
        let difference = run.record(1, 0, 0, 1, given(names)).unwrap();
        assert_eq!(
            difference.as_ref().map(|difference| &*difference.component),
            expected,
            "{names:?}"
        );
    }
}

#[test]
fn another_position_in_the_epoch_is_a_difference() {
    let memory = run_in_memory(0);
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    run.record(1, 0, 0, 1, components(1)).unwrap();
    drop(run);
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    let difference = run.record(1, 0, 0, 2, components(1)).unwrap().unwrap();
    assert_eq!(
        (&*difference.component, &*difference.expected, &*difference.found),
        ("position", "1", "2")
    );
}

#[test]
fn boundaries_come_in_order_and_only_between_begin_and_close() {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    assert!(matches!(
        run.record(1, 0, 0, 1, components(1)),
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(commit_at(&run, 0), Err(Error::Invalid { .. })));
    assert!(
        files_in(&memory, "journal").is_empty(),
        "nothing is written to the journal before begin"
    );
    run.begin().unwrap();
    assert!(matches!(run.begin(), Err(Error::Invalid { .. })));
    train(&run, 0..=2).unwrap();
    run.event(
        "mark",
        2,
        vec![("text".to_owned(), Value::Str("half way".to_owned()))],
    )
    .unwrap();
    run.record(2, 1, 0, 2, components(2)).unwrap();
    for (step, phase) in [(2, 1), (2, 0), (1, 0)] {
        assert!(
            matches!(
                run.record(step, phase, 0, 0, Vec::new()),
                Err(Error::Invalid { .. })
            ),
            "{step}, {phase}"
        );
    }
    assert!(
        matches!(commit_at(&run, 1), Err(Error::Invalid { .. })),
        "a checkpoint older than the newest"
    );
    run.close().unwrap();
    assert!(matches!(
        run.event("mark", 3, Vec::new()),
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        run.prune(&Default::default(), true),
        Err(Error::Invalid { .. })
    ));
}

#[test]
fn a_journal_that_is_torn_or_damaged_never_costs_a_checkpoint() {
    // Every prefix of the segment, as a power cut may leave it, and every byte of it changed: the run opens at step 2;
    // damage before the end is named. What is torn was never promised and is no reason to speak, and neither is what
    // looks torn: the last record, which is the word about the last checkpoint.
    let before = run_in_memory(2);
    let name = "journal/000001.journal";
    let bytes = before.files()[name].clone();
    let entries = SegmentReader::new(bytes.as_slice()).unwrap().map(Result::unwrap);
    let last = entries.last().unwrap().offset as usize;
    for length in 0..bytes.len() {
        let memory = before.fork();
        memory.put(name, bytes[..length].to_vec());
        let run = open(&shared(&memory)).unwrap();
        assert_eq!(
            (resumed_step(&run), run.life()),
            (Some(2), 2),
            "prefix of {length} bytes"
        );
        assert!(
            run.warnings().iter().all(|warning| !warning.contains("damaged")),
            "{:?}",
            run.warnings()
        );
    }
    for at in (0..bytes.len()).step_by(3) {
        let memory = before.fork();
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        memory.put(name, damaged);
        let run = open(&shared(&memory)).unwrap();
        assert_eq!((resumed_step(&run), run.life()), (Some(2), 2), "byte {at}");
        assert_eq!(
            run.warnings().is_empty(),
            at >= last,
            "byte {at} changed: {:?}",
            run.warnings()
        );
        run.begin().unwrap();
        train(&run, 3..=3).unwrap();
    }
}

#[test]
fn a_record_that_arrived_in_part_is_completed_and_stands_once() {
    for fault in [
        Fault::Device,
        Fault::NoSpace,
        Fault::ShortWrite,
        Fault::Interrupted,
    ] {
        for index in 0..3 {
            let memory = MemoryStorage::new();
            let faulty = FaultyStorage::new(Arc::new(memory.clone()));
            let run = open(&(Arc::new(faulty.clone()) as Arc<dyn Storage>)).unwrap();
            run.begin().unwrap();
            commit_at(&run, 0).unwrap();
            faulty.fail_at(index, fault);
            let mut failures = 0;
            for step in 1..=3 {
                while let Err(error) = run.record(step, 0, 0, step, components(step)) {
                    assert!(matches!(error, Error::Io { doing: "write", .. }), "{error}");
                    failures += 1;
                    faulty.heal();
                }
            }
            let fails = matches!(fault, Fault::Device | Fault::NoSpace);
            assert_eq!(failures, u32::from(fails), "{fault:?} at {index}");
            commit_at(&run, 3).unwrap();
            run.close().unwrap();
            let run = open(&shared(&memory)).unwrap();
            assert!(run.warnings().is_empty(), "{:?}", run.warnings());
            let directory = unbroken::storage::Directory::new(shared(&memory));
            let journal = unbroken::journal::read(&directory, run.id()).unwrap();
            assert_eq!(
                journal
                    .boundaries
                    .iter()
                    .map(|boundary| boundary.step)
                    .collect::<Vec<_>>(),
                [1, 2, 3]
            );
        }
    }
}

#[test]
fn a_directory_that_is_no_run_is_left_as_it_is() {
    let place = tempfile::tempdir().unwrap();
    let listing = |path: &Path| -> Vec<_> {
        let mut names: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    let stranger = place.path().join("photos");
    std::fs::create_dir(&stranger).unwrap();
    std::fs::write(stranger.join("cat.jpg"), b"meow").unwrap();
    let error = Run::open(&stranger, &Options::default()).unwrap_err();
    assert!(error.to_string().contains("cat.jpg"), "{error}");
    assert_eq!(listing(&stranger), ["cat.jpg"]);

    let file = place.path().join("file");
    std::fs::write(&file, b"x").unwrap();
    let error = Run::open(&file, &Options::default()).unwrap_err();
    assert!(
        matches!(error, Error::Io { .. }) && error.to_string().contains("file"),
        "{error}"
    );

    let path = place.path().join("run");
    let run = Run::open(&path, &Options::default()).unwrap();
    run.begin().unwrap();
    commit_at(&run, 0).unwrap();
    run.close().unwrap();
    let config = std::fs::read_to_string(path.join("run.toml")).unwrap();
    let before = listing(&path);
    // As the first releases wrote it.
    let unchecked: String = config
        .split_inclusive('\n')
        .filter(|line| !line.starts_with("check"))
        .collect();
    for (text, said) in [
        (config.replace("format = 1", "format = 2"), "version 2"),
        (config.replace("format = 1", "format = \"1\""), "format"),
        (config.replace("seed", "sead"), "sead"),
        (config.replace("id = \"", "id = \"../"), "run.toml"),
        (unchecked.replace("id = \"", "id = \"../"), "id"),
        (unchecked.replace("seed = ", "check = "), "run.toml"),
        ("][".to_owned(), "run.toml"),
        (String::new(), "format"),
    ] {
        std::fs::write(path.join("run.toml"), &text).unwrap();
        let error = Run::open(&path, &Options::default()).unwrap_err();
        assert!(
            matches!(error, Error::Format { .. } | Error::Damaged { .. }),
            "{text}: {error}"
        );
        assert!(error.to_string().contains(said), "{text}: {error}");
        assert_eq!(listing(&path), before);
    }
    std::fs::remove_file(path.join("run.toml")).unwrap();
    let error = Run::open(&path, &Options::default()).unwrap_err();
    assert!(error.to_string().contains("not a run directory"), "{error}");
    for text in [unchecked, config] {
        std::fs::write(path.join("run.toml"), text).unwrap();
        assert_eq!(
            resumed_step(&Run::open(&path, &Options::default()).unwrap()),
            Some(0)
        );
    }
}

#[test]
fn commits_and_records_go_on_side_by_side() {
    // A background thread commits while the loop records; each checkpoint names the head of its own boundary.
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    commit_at(&run, 0).unwrap();
    std::thread::scope(|scope| {
        let mut committer = None;
        for step in 1..=60u64 {
            run.record(step, 0, 0, step, components(step)).unwrap();
            if step % 10 == 0 {
                if let Some(committer) = committer.take() {
                    std::thread::ScopedJoinHandle::<()>::join(committer).unwrap();
                }
                let run = &run;
                committer = Some(scope.spawn(move || drop(commit_at(run, step).unwrap())));
            }
        }
    });
    let heads: Vec<_> = run.checkpoints().iter().map(|info| info.journal_head).collect();
    assert_eq!(heads.len(), 7);
    let directory = unbroken::storage::Directory::new(shared(&memory));
    let story = unbroken::journal::Story::open_with(&directory, run.id(), &heads).unwrap();
    assert!(heads.iter().all(|head| story.has_head(head)));
    drop(run);
    let run = open(&shared(&memory)).unwrap();
    assert!(run.warnings().is_empty(), "{:?}", run.warnings());
    assert_exact(run.resumed_from().unwrap());
}

/// Set in a child process: the run that it shall hold.
const HOLD: &str = "UNBROKEN_TEST_HOLD";

/// Starts this test program again as a process that holds a run; `how` is what it does besides.
fn holder(path: &Path, how: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_run_is_held_by_one_process_until_it_dies",
            "--nocapture",
        ])
        .env(HOLD, format!("{how}:{}", path.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("held") {
        line.clear();
        assert!(
            lines.read_line(&mut line).unwrap() > 0,
            "the holder ended without a word"
        );
        assert!(!line.contains("let write"), "{line}");
    }
    (child, lines)
}

unsafe extern "C" {
    fn fork() -> i32;
}

/// What the child process does: hold the run until its input ends; with `fork`, leave a child of its own behind.
fn hold(order: &str) {
    let (how, path) = order.split_once(':').unwrap();
    let run = Run::open(Path::new(path), &Options::default()).unwrap();
    run.begin().unwrap();
    if how == "fork" {
        // SAFETY: the child only sleeps, with every descriptor of the parent open, until it is told to end.
        let pid = unsafe { fork() };
        assert!(pid >= 0);
        if pid == 0 {
            let refused = run.record(1, 0, 0, 1, Vec::new()).is_err() && commit_at(&run, 0).is_err();
            println!(
                "{}",
                if refused {
                    "forked and held"
                } else {
                    "the fork was let write"
                }
            );
            std::io::stdout().flush().unwrap();
            let _ = std::io::stdin().read_line(&mut String::new());
            std::process::exit(0);
        }
    } else {
        println!("held");
        std::io::stdout().flush().unwrap();
    }
    let _ = std::io::stdin().read_line(&mut String::new());
}

#[test]
fn a_run_is_held_by_one_process_until_it_dies() {
    if let Ok(order) = std::env::var(HOLD) {
        return hold(&order);
    }
    let place = tempfile::tempdir().unwrap();
    for how in ["hold", "fork"] {
        let path = place.path().join(how);
        let (mut child, _lines) = holder(&path, how);
        let error = Run::open(&path, &Options::default()).unwrap_err();
        let Error::Locked { holder, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(holder, Some(child.id()), "{how}");
        // With `fork`, a child of the holder lives on with its descriptors; its input stays open until the end.
        let input = child.stdin.take();
        child.kill().unwrap();
        child.wait().unwrap();
        let run = Run::open(&path, &Options::default()).unwrap_or_else(|error| panic!("{how}: {error}"));
        assert_eq!(run.life(), 2, "{how}");
        drop(input);
    }
}

#[test]
fn the_same_process_cannot_open_a_run_twice_and_trying_does_not_lose_the_lock() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    let run = Run::open(&path, &Options::default()).unwrap();
    for spelling in [
        path.clone(),
        place.path().join("./run"),
        place.path().join("run/../run"),
    ] {
        let error = Run::open(&spelling, &Options::default()).unwrap_err();
        assert!(
            matches!(error, Error::Locked { holder, .. } if holder == Some(std::process::id())),
            "{error}"
        );
    }
    run.begin().unwrap();
    // Another process still finds it locked.
    let probe = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_run_is_held_by_one_process_until_it_dies",
            "--nocapture",
        ])
        .env(HOLD, format!("hold:{}", path.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!probe.status.success());
    // Code of the user's that reads the file drops a POSIX lock; the next commit takes it again.
    std::fs::read(path.join("lock")).unwrap();
    commit_at(&run, 0).unwrap();
    std::fs::remove_file(path.join("lock")).unwrap();
    let error = commit_at(&run, 0).unwrap_err();
    assert!(error.to_string().contains("lock"), "{error}");
    run.close().unwrap();
    Run::open(&path, &Options::default()).unwrap();
}

#[test]
fn a_run_on_trial_executes_old_steps_again_and_loses_nothing_whatever_comes_out() {
    // Story: 20 steps, a checkpoint after each. The next life goes back five steps and fails; the one after it succeeds.
    let memory = run_in_memory(20);
    let before = files_in(&memory, "checkpoints");
    let extent = Extent { least: 5, most: 50 };
    let run = open(&shared(&memory)).unwrap();
    let trial = run.put_on_trial(extent).unwrap();
    assert_eq!(
        trial,
        Some(Trial {
            from: (15, 0),
            until: (20, 0)
        })
    );
    assert!(run.put_on_trial(extent).is_err());
    assert_exact(run.resumed_from().unwrap());
    assert_eq!((resumed_step(&run), run.recorded_until()), (Some(15), 20));
    run.begin().unwrap();
    assert_eq!(run.record(16, 0, 0, 16, components(16)).unwrap(), None);
    assert!(commit_at(&run, 16).is_err());
    let difference = run.record(17, 0, 0, 17, components(99)).unwrap().unwrap();
    assert_eq!(difference.component, "batch");
    run.event("diverged", 17, vec![("went_on".to_owned(), Value::Bool(false))])
        .unwrap();
    run.close().unwrap();
    assert_eq!(files_in(&memory, "checkpoints"), before);

    let run = open(&shared(&memory)).unwrap();
    assert_eq!(resumed_step(&run), Some(20));
    assert!(run.put_on_trial(extent).unwrap().is_some());
    run.begin().unwrap();
    for step in 16..=20 {
        assert_eq!(run.record(step, 0, 0, step, components(step)).unwrap(), None);
    }
    commit_at(&run, 20).unwrap();
    train(&run, 21..=21).unwrap();
    run.close().unwrap();
    assert_eq!(resumed_step(&open(&shared(&memory)).unwrap()), Some(21));
}

#[test]
fn a_damaged_checkpoint_is_no_place_to_start_a_trial_from() {
    let memory = run_in_memory(20);
    let run = open(&shared(&memory)).unwrap();
    let checkpoint = run.checkpoint(&run.checkpoints()[15].name).unwrap();
    run.close().unwrap();
    let pack = format!("objects/{}", checkpoint.manifest().packs.last().unwrap().name);
    let mut bytes = memory.files()[&pack].clone();
    *bytes.last_mut().unwrap() ^= 1;
    memory.put(&pack, bytes);
    let run = open(&shared(&memory)).unwrap();
    let trial = run.put_on_trial(Extent { least: 5, most: 50 }).unwrap();
    assert_eq!(trial.map(|trial| trial.from), Some((14, 0)));
}

#[test]
fn a_link_in_the_place_of_the_lock_is_named_with_what_to_do() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    Run::open(&path, &Options::default()).unwrap().close().unwrap();
    std::fs::remove_file(path.join("lock")).unwrap();
    std::os::unix::fs::symlink("elsewhere", path.join("lock")).unwrap();
    let error = Run::open(&path, &Options::default()).unwrap_err();
    let told = error.to_string();
    assert!(
        told.contains("lock\": it is a symbolic link, not a plain file"),
        "{told}"
    );
    assert!(error.hint().unwrap().contains("move it away"), "{error:?}");
    assert!(!path.join("elsewhere").exists());
}
