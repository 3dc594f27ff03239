//! The `unbroken` program on runs that Burn made: every command that answers about a run answers about these.
//!
//! Touches: temporary directories; processes of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

fn example() -> PathBuf {
    // Beside this test's own directory: target/PROFILE/deps/THIS and target/PROFILE/examples/digits.
    let tests = std::env::current_exe().unwrap();
    tests.ancestors().nth(2).unwrap().join("examples").join("digits")
}

/// Trains the digits for an epoch; returns whether they came to its end.
fn train(directory: &Path, options: &[&str], crash_at: &str) -> bool {
    let status = Command::new(example())
        .arg(directory)
        .args(["--epochs", "1", "--save-every", "10"])
        .args(options)
        .env("UNBROKEN_CRASH_AT", crash_at)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    status.success()
}

/// What the program prints, and its exit code.
fn unbroken(arguments: &[&str]) -> (i32, String) {
    let arguments: Vec<_> = ["unbroken"].iter().chain(arguments).map(Into::into).collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = unbroken_cli::run(&arguments, &mut out, &mut err);
    out.append(&mut err);
    (code, String::from_utf8(out).unwrap())
}

/// The same, parsed.
fn ask(arguments: &[&str]) -> (i32, Value) {
    let (code, answer) = unbroken(&[&arguments[..1], &["--json"], &arguments[1..]].concat());
    let parsed = serde_json::Deserializer::from_str(&answer).into_iter().next();
    (
        code,
        parsed
            .and_then(Result::ok)
            .unwrap_or_else(|| panic!("{arguments:?}: {answer}")),
    )
}

#[test]
fn a_run_that_was_killed_is_listed_compared_reported_and_exported_as_one_that_was_not() {
    for options in [&[][..], &["--learner"]] {
        let home = tempfile::tempdir().unwrap();
        let place = |name: &str| home.path().join(name).display().to_string();
        let (whole, killed) = (place("whole"), place("killed"));
        assert!(train(Path::new(&whole), options, ""));
        assert!(!train(Path::new(&killed), options, "step:33"));
        assert!(train(Path::new(&killed), options, ""));

        let (code, listed) = ask(&["list", &killed]);
        assert_eq!(code, 0, "{listed}");
        assert!(listed.to_string().contains("\"step\":47"), "{listed}");
        assert!(listed.to_string().contains("\"loss\""), "{listed}");
        let (code, difference) = ask(&["diff", &whole, &killed]);
        assert_eq!(code, 0, "{difference}");
        let (code, verified) = ask(&["verify", &killed]);
        assert_eq!(code, 0, "{verified}");

        let page = place("report.html");
        let (code, said) = unbroken(&["report", &killed, "-o", &page]);
        assert_eq!(code, 0, "{said}");
        let page = std::fs::read_to_string(page).unwrap();
        assert!(page.contains("2 lives") && page.contains("log/loss"), "{page}");

        let weights = place("weights.safetensors");
        let (code, _) = ask(&["export", &killed, &weights, "--prefix", "objects/model/"]);
        assert_eq!(code, 0);
        let bytes = std::fs::read(weights).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        assert_eq!(header["conv1.weight"]["shape"], serde_json::json!([16, 1, 3, 3]));
    }
}

/// The program is started by a shell that does not become it: a kill has to reach it through the shell, and its own
/// death has to be seen in what the shell ends with.
#[test]
fn a_proof_reaches_a_program_through_the_shell_that_starts_it() {
    let home = tempfile::tempdir().unwrap();
    let script = home.path().join("train.sh");
    let words = format!(
        "'{}' runs/digits --epochs 1 --save-every 10\nexit $?\n",
        example().display()
    );
    std::fs::write(&script, words).unwrap();
    let trials = home.path().join("trials").display().to_string();
    let script = script.display().to_string();
    let (code, proof) = ask(&[
        "prove", "--kills", "3", "--jobs", "1", "--dir", &trials, "--", "sh", &script,
    ]);
    assert_eq!(code, 0, "{proof}");
    assert_eq!(proof["exact"], true, "{proof}");
    assert_eq!(proof["stops"], 3, "{proof}");
}

#[test]
fn history_is_replayed_with_the_journal_that_the_program_chose() {
    let home = tempfile::tempdir().unwrap();
    let run = home.path().join("run").display().to_string();
    assert!(train(Path::new(&run), &[], ""));
    let program = example().display().to_string();
    let (code, replayed) = ask(&[
        "replay",
        &run,
        "--",
        &program,
        &run,
        "--epochs",
        "1",
        "--save-every",
        "10",
    ]);
    assert_eq!(code, 0, "{replayed}");
}
