//! Stories with real processes: the digits under Burn are killed with SIGKILL, started again, and must not show it.
//!
//! Touches: temporary directories; processes of its own. `UNBROKEN_STORY_SEED` replays the kills.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use unbroken::format::journal::Component;
use unbroken::run::{read_checkpoint, read_journal};
use unbroken::train::Draws;

const STEPS: u64 = 94; // Two epochs of 47.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loop {
    Own,
    Learner,
}

fn example() -> PathBuf {
    // Beside this test's own directory: target/PROFILE/deps/THIS and target/PROFILE/examples/digits.
    let tests = std::env::current_exe().unwrap();
    let program = tests.ancestors().nth(2).unwrap().join("examples").join("digits");
    assert!(
        program.is_file(),
        "{} is not there: `cargo test` without --test builds examples",
        program.display()
    );
    program
}

fn start(directory: &Path, which: Loop, workers: u64, variables: &[(&str, &str)]) -> Child {
    let mut command = Command::new(example());
    command.arg(directory).args([
        "--epochs",
        "2",
        "--save-every",
        "10",
        "--workers",
        &workers.to_string(),
    ]);
    if which == Loop::Learner {
        command.arg("--learner");
    }
    command
        .envs(variables.iter().copied())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn run_to_the_end(directory: &Path, which: Loop, workers: u64, variables: &[(&str, &str)]) -> Duration {
    let begun = Instant::now();
    let status = start(directory, which, workers, variables).wait().unwrap();
    assert!(status.success(), "{status}");
    begun.elapsed()
}

/// Everything that the journal says of each boundary, lives aside.
type Story = Vec<(u64, u8, u64, u64, Vec<(String, Component)>)>;

fn story(directory: &Path) -> Story {
    let journal = read_journal(directory).unwrap();
    assert_eq!(journal.warnings, Vec::<String>::new());
    let boundaries = journal.boundaries.into_iter();
    boundaries
        .map(|entry| {
            (
                entry.step,
                entry.phase,
                entry.epoch,
                entry.position,
                entry.components,
            )
        })
        .collect()
}

/// Burn's metric files by name: what each metric was at each step.
fn metrics(directory: &Path) -> BTreeMap<PathBuf, String> {
    let home = PathBuf::from(format!("{}-metrics", directory.display()));
    let (mut found, mut left) = (BTreeMap::new(), vec![home.clone()]);
    while let Some(next) = left.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else {
                found.insert(
                    path.strip_prefix(&home).unwrap().to_owned(),
                    std::fs::read_to_string(&path).unwrap(),
                );
            }
        }
    }
    found
}

fn assert_same(reference: &Path, other: &Path, which: Loop, said: &str) {
    let (expected, found) = (story(reference), story(other));
    assert_eq!(expected.len(), STEPS as usize + 2, "{said}");
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(expected, found, "{said}");
    }
    assert_eq!(expected.len(), found.len(), "{said}");
    let (expected, found) = (
        read_checkpoint(reference).unwrap(),
        read_checkpoint(other).unwrap(),
    );
    assert_eq!((found.info().step, found.info().phase), (STEPS, 2), "{said}");
    assert_eq!(expected.tree(), found.tree(), "{said}");
    assert_eq!(expected.storages(), found.storages(), "{said}");
    if which == Loop::Learner {
        let expected = metrics(reference);
        // Accuracy, loss and rate of two epochs in training, accuracy and loss of two in validation.
        assert_eq!(expected.len(), 10, "{said}");
        assert_eq!(expected, metrics(other), "{said}");
    }
}

/// Two to nine kills at instants that a seed decides, then to the end.
fn kill_chain(which: Loop, workers: &[u64]) {
    let home = tempfile::tempdir().unwrap();
    let reference = home.path().join("reference");
    let duration = run_to_the_end(&reference, which, 0, &[]);
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("UNBROKEN_STORY_SEED").map_or_else(|_| clock(), |text| text.parse().unwrap());
    for (chain, workers) in workers.iter().enumerate() {
        let said = format!("UNBROKEN_STORY_SEED={seed} chain {chain}, {which:?}, {workers} workers");
        println!("{said}");
        let mut draws = Draws::new(unbroken::key::derive_key(seed, "story", 0, chain as u64));
        let directory = home.path().join(format!("killed-{chain}"));
        for _ in 0..2 + draws.below(8) {
            let mut child = start(&directory, which, *workers, &[]);
            std::thread::sleep(duration.mul_f64(draws.uniform() * 0.7));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        run_to_the_end(&directory, which, *workers, &[]);
        assert_same(&reference, &directory, which, &said);
    }
}

/// The process kills itself in mid-epoch, inside an accumulation window, at an epoch's last step before and after it is
/// saved, when the loop is over and the after-work is not done, when that is done, while a save runs.
fn chosen_kills(which: Loop) {
    let home = tempfile::tempdir().unwrap();
    let (reference, directory) = (home.path().join("reference"), home.path().join("killed"));
    run_to_the_end(&reference, which, 0, &[]);
    for (place, point) in [
        "saving:0",
        "step:11",
        "saving:20:0.5",
        "saved:30",
        "step:47",
        "work:0",
        "epoch:0",
        "step:94",
    ]
    .iter()
    .enumerate()
    {
        let status = start(
            &directory,
            which,
            place as u64 % 4,
            &[("UNBROKEN_CRASH_AT", point)],
        )
        .wait()
        .unwrap();
        assert!(!status.success(), "{point} was never reached");
    }
    run_to_the_end(&directory, which, 3, &[]);
    assert_same(&reference, &directory, which, "chosen instants");
}

#[test]
fn kills_at_random_instants_leave_no_trace_in_a_loop_of_ones_own() {
    kill_chain(Loop::Own, &[0, 1, 3]);
}

#[test]
fn kills_at_random_instants_leave_no_trace_under_the_learner() {
    kill_chain(Loop::Learner, &[3, 0, 1]);
}

#[test]
fn kills_at_chosen_instants_leave_no_trace_in_a_loop_of_ones_own() {
    chosen_kills(Loop::Own);
}

#[test]
fn kills_at_chosen_instants_leave_no_trace_under_the_learner() {
    chosen_kills(Loop::Learner);
}

#[test]
fn any_number_of_kernel_threads_and_workers_gives_the_same_bits() {
    let home = tempfile::tempdir().unwrap();
    let full = ("UNBROKEN_JOURNAL", "full");
    for (which, others) in [
        (Loop::Own, &[("2", 1), ("4", 4)][..]),
        (Loop::Learner, &[("4", 3)]),
    ] {
        let reference = home.path().join(format!("{which:?}"));
        run_to_the_end(&reference, which, 0, &[("RAYON_NUM_THREADS", "1"), full]);
        for (threads, workers) in others {
            let said = format!("{which:?}, {threads} threads, {workers} workers");
            let directory = home.path().join(&said);
            let variables = [("RAYON_NUM_THREADS", *threads), full];
            run_to_the_end(&directory, which, *workers, &variables);
            assert_same(&reference, &directory, which, &said);
        }
    }
}

#[test]
fn a_stop_signal_under_the_learner_saves_the_step_and_asks_to_be_started_again() {
    let home = tempfile::tempdir().unwrap();
    let (reference, directory) = (home.path().join("reference"), home.path().join("stopped"));
    run_to_the_end(&reference, Loop::Learner, 0, &[]);
    let status = start(&directory, Loop::Learner, 1, &[("UNBROKEN_STOP_AT", "step:53")])
        .wait()
        .unwrap();
    assert_eq!(status.code(), Some(75));
    assert_eq!(read_checkpoint(&directory).unwrap().info().step, 53);
    run_to_the_end(&directory, Loop::Learner, 1, &[]);
    assert_same(&reference, &directory, Loop::Learner, "stopped");
}
