//! Stories with real processes: the plain example is killed with SIGKILL, started again, and must not show it.
//!
//! Touches: temporary directories; processes of its own. `UNBROKEN_STORY_SEED` replays one chain of kills.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use unbroken::format::journal::Component;
use unbroken::run::{read_checkpoint, read_journal};
use unbroken::train::Draws;

const STEPS: u64 = 94; // Two epochs of 47.

fn example() -> PathBuf {
    // Beside this test's own directory: target/PROFILE/deps/THIS and target/PROFILE/examples/plain.
    let tests = std::env::current_exe().unwrap();
    let program = tests.ancestors().nth(2).unwrap().join("examples").join("plain");
    assert!(
        program.is_file(),
        "{} is not there: `cargo test` without --test builds examples",
        program.display()
    );
    program
}

fn start(directory: &Path, workers: u64, variables: &[(&str, &str)]) -> Child {
    Command::new(example())
        .arg(directory)
        .args([
            "--epochs",
            "2",
            "--save-every",
            "15",
            "--step-ms",
            "3",
            "--workers",
            &workers.to_string(),
        ])
        .envs(variables.iter().copied())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
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

/// Asserts that two finished runs are the same at every boundary and in every byte of the final state.
fn assert_same(reference: &Path, other: &Path, said: &str) {
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
}

/// Whether the process ended by itself before this much time was over; it is killed otherwise.
fn ends_within(child: &mut Child, time: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

fn run_to_the_end(directory: &Path, workers: u64) -> Duration {
    let start_time = Instant::now();
    let status = start(directory, workers, &[]).wait().unwrap();
    assert!(status.success(), "{status}");
    start_time.elapsed()
}

/// A run of 94 steps is killed two to nine times, at instants that a seed decides, with 0, 1 and 3 loader threads. Each
/// start goes on by itself. Its journal and its final bytes must be those of a run that nobody touched.
#[test]
fn kills_at_random_instants_leave_no_trace() {
    let home = tempfile::tempdir().unwrap();
    let reference = home.path().join("reference");
    let duration = run_to_the_end(&reference, 0);
    let given = std::env::var("UNBROKEN_STORY_SEED").ok();
    let seed = given.map_or_else(rand_seed, |text| text.parse().unwrap());
    for (chain, workers) in [(0, 0), (1, 1), (2, 3)] {
        let said = format!("UNBROKEN_STORY_SEED={seed} chain {chain}, {workers} workers");
        println!("{said}");
        let mut draws = Draws::new(unbroken::key::derive_key(seed, "story", 0, chain));
        let directory = home.path().join(format!("killed-{chain}"));
        let mut kills = 2 + draws.below(8);
        while kills > 0 {
            let time = duration.mul_f64(draws.uniform() * 0.6);
            let mut child = start(&directory, workers, &[]);
            match ends_within(&mut child, time) {
                None => kills -= 1,
                Some(status) => {
                    assert!(status.success(), "{said}: {status}");
                    break;
                }
            }
        }
        run_to_the_end(&directory, workers);
        assert_same(&reference, &directory, &said);
    }
}

fn rand_seed() -> u64 {
    u64::from(std::process::id()) ^ Instant::now().elapsed().as_nanos() as u64 ^ unix_time()
}

fn unix_time() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
}

/// The process kills itself at each kind of instant that matters: in mid-epoch, at an epoch's last step before and
/// after it is saved, when the loop is over and the after-work is not done, when that is done, while a save runs.
#[test]
fn kills_at_chosen_instants_leave_no_trace() {
    let home = tempfile::tempdir().unwrap();
    let reference = home.path().join("reference");
    run_to_the_end(&reference, 0);
    let points = [
        "saving:0",
        "step:1",
        "saving:30:0.2",
        "saved:30",
        "step:40",
        "step:47",
        "work:0",
        "epoch:0",
        "step:94",
        "work:1",
    ];
    let directory = home.path().join("killed");
    for (place, point) in points.iter().enumerate() {
        let status = start(&directory, place as u64 % 4, &[("UNBROKEN_CRASH_AT", point)])
            .wait()
            .unwrap();
        assert!(!status.success(), "{point} was never reached");
    }
    run_to_the_end(&directory, 2);
    assert_same(&reference, &directory, "chosen instants");
}

/// SIGTERM during a step: the step is finished and saved, the exit code says "start me again", and the next start goes
/// on as if nothing had been.
#[test]
fn a_stop_signal_finishes_the_step_and_asks_to_be_started_again() {
    let home = tempfile::tempdir().unwrap();
    let (reference, directory) = (home.path().join("reference"), home.path().join("stopped"));
    run_to_the_end(&reference, 0);
    let status = start(&directory, 1, &[("UNBROKEN_STOP_AT", "step:52")])
        .wait()
        .unwrap();
    assert_eq!(status.code(), Some(75));
    let checkpoint = read_checkpoint(&directory).unwrap();
    assert_eq!((checkpoint.info().step, checkpoint.info().phase), (52, 0));
    let events = read_journal(&directory).unwrap().events;
    assert_eq!((events[0].kind.as_str(), events[0].step), ("stopped", 52));
    run_to_the_end(&directory, 1);
    assert_same(&reference, &directory, "stopped");
}
