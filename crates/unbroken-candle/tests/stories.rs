//! The candle example is killed and started again, and must not show it.
//!
//! Touches: temporary directories; processes of its own.

use std::path::Path;
use std::process::Command;

use unbroken::run::{read_checkpoint, read_journal};

/// Runs the example, killing itself at a point if one is given; returns whether it came to its end.
fn run(directory: &Path, crash_at: &str) -> bool {
    // Beside this test's own directory: target/PROFILE/deps/THIS and target/PROFILE/examples/digits.
    let tests = std::env::current_exe().unwrap();
    let program = tests
        .ancestors()
        .nth(2)
        .unwrap()
        .join("examples")
        .join("candle_digits");
    assert!(
        program.is_file(),
        "{} is not there: `cargo test` without --test builds examples",
        program.display()
    );
    let output = Command::new(program)
        .arg(directory)
        .arg("2")
        .env("UNBROKEN_CRASH_AT", crash_at)
        .output()
        .unwrap();
    output.status.success()
}

#[test]
fn kills_leave_no_trace() {
    let home = tempfile::tempdir().unwrap();
    let (reference, killed) = (home.path().join("reference"), home.path().join("killed"));
    assert!(run(&reference, ""));
    for point in [
        "step:1",
        "saving:20:0.3",
        "step:33",
        "step:47",
        "epoch:0",
        "saved:80",
    ] {
        assert!(!run(&killed, point), "{point} was never reached");
    }
    assert!(run(&killed, ""));
    let records = |path: &Path| {
        let boundaries = read_journal(path).unwrap().boundaries.into_iter();
        boundaries
            .map(|entry| (entry.step, entry.phase, entry.components))
            .collect::<Vec<_>>()
    };
    assert_eq!(records(&reference).len(), 96);
    assert_eq!(records(&reference), records(&killed));
    let last = |path: &Path| read_checkpoint(path).unwrap().storages();
    assert_eq!(last(&reference), last(&killed));
}
