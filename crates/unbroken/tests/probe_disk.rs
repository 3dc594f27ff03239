//! What a file system does is tried in earnest, and nothing of it stays.
//!
//! Touches: temporary directories, a process that it kills.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use unbroken::storage::probe::{Outcome, probe};

/// Names the directory that this program's other self tries.
const OTHER_SELF: &str = "UNBROKEN_TEST_PROBE";

#[test]
fn this_systems_disk_does_what_a_run_needs() {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let found = probe(place.path()).unwrap();
    for outcome in [&found.rename_new, &found.hard_links, &found.sync_dir] {
        assert_eq!(*outcome, Outcome::Works, "{found:?}");
    }
    assert!(
        !matches!(found.lock, Outcome::Broken(_) | Outcome::Refused(_)),
        "{found:?}"
    );
    assert!(!matches!(found.direct, Outcome::Broken(_)), "{found:?}");
    assert!(found.commit.is_some() && found.free_bytes > 0, "{found:?}");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn a_probe_that_is_killed_leaves_nothing() {
    if let Some(place) = std::env::var_os(OTHER_SELF) {
        loop {
            probe(place.as_ref()).unwrap();
        }
    }
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for delay in [0, 3, 10, 25] {
        let mut other = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_probe_that_is_killed_leaves_nothing"])
            .env(OTHER_SELF, place.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let patience = Instant::now() + Duration::from_secs(30);
        while fs::read_dir(place.path()).unwrap().count() == 0 {
            assert!(Instant::now() < patience, "nothing was tried");
        }
        std::thread::sleep(Duration::from_millis(delay));
        other.kill().unwrap();
        other.wait().unwrap();
        while fs::read_dir(place.path()).unwrap().count() > 0 {
            assert!(Instant::now() < patience, "left after {delay} ms");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
