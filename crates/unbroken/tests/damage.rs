//! Every single bit of a small run is flipped, every file cut at every length, deleted, and replaced by another one.
//!
//! Touches: memory only.

mod world;

use unbroken::error::Error;
use unbroken::format::journal::SegmentReader;
use unbroken::run::{Options, Run};
use unbroken::storage::Storage;
use unbroken::storage::memory::MemoryStorage;
use world::{assert_exact, files_in, open, resumed_step, run_in_memory, shared};

/// What a damaged run has to come to.
struct Expected {
    /// Files of the newest checkpoint, without which it cannot be.
    newest: Vec<String>,
    /// The pack that both checkpoints refer to.
    shared: String,
    older: String,
    /// The journal without its last record, the word about the newest checkpoint: what looks torn there is no damage.
    promised: Vec<u8>,
}

/// A run with steps 0 and 1, and which of its files belong to which.
fn small_run() -> (MemoryStorage, Expected) {
    let memory = run_in_memory(1);
    let run = open(&shared(&memory.fork())).unwrap();
    let infos = run.checkpoints();
    let manifest = |step: usize| format!("checkpoints/{}", infos[step].name);
    let packs = &run.resumed_from().unwrap().manifest().packs;
    let expected = Expected {
        newest: vec![manifest(1), format!("objects/{}", packs[1].name)],
        shared: format!("objects/{}", packs[0].name),
        older: manifest(0),
        promised: {
            let bytes = &memory.files()["journal/000001.journal"];
            let records = SegmentReader::new(bytes.as_slice()).unwrap().map(Result::unwrap);
            bytes[..records.last().unwrap().offset as usize].to_vec()
        },
    };
    (memory, expected)
}

fn strict() -> Options {
    Options {
        seed: Some(7),
        strict: true,
        ..Options::default()
    }
}

/// Opens a run of which one file is not as it was, and judges. What is damaged must be named, and never handed out.
fn judge(memory: &MemoryStorage, expected: &Expected, file: &str, story: &str) {
    let stem = file.rsplit_once('/').map_or(file, |(_, stem)| stem);
    match open(&shared(&memory.fork())) {
        Ok(run) => {
            assert_exact(
                run.resumed_from()
                    .unwrap_or_else(|| panic!("{story}: a fresh start")),
            );
            let told = |texts: Vec<String>| texts.iter().any(|text| text.contains(stem));
            let rejected = run.rejected().iter().map(|(name, why)| format!("{name}: {why}"));
            if expected.newest.iter().any(|name| name == file) {
                assert_eq!(resumed_step(&run), Some(0), "{story}");
                assert!(told(rejected.collect()), "{story}: {:?}", run.rejected());
                let refused = Run::open_on(shared(&memory.fork()), &strict());
                assert!(refused.is_err(), "{story}: strict");
                return;
            }
            assert_eq!(resumed_step(&run), Some(1), "{story}");
            if file == expected.shared {
                // In what only the older one has: nothing read it yet.
                let older = run.checkpoint(&run.checkpoints()[0].name).unwrap();
                let Err(Error::Damaged { path, part, .. }) = older.verify() else {
                    panic!("{story}: not found")
                };
                assert!(path.ends_with(file), "{story}: {}", path.display());
                assert!(part.contains('/'), "{story}: no leaf is named but {part}");
            } else if file == expected.older {
                assert!(told(run.warnings().to_vec()), "{story}: {:?}", run.warnings());
            } else {
                // The journal: the checkpoint stands by itself, what can no longer be compared is said.
                assert!(file.starts_with("journal/"), "{story}: {file} is not looked at");
                let said = |text: &String| text.contains("journal");
                let as_promised = |bytes: &Vec<u8>| bytes.starts_with(&expected.promised);
                assert!(
                    run.warnings().iter().any(said) || memory.files().get(file).is_some_and(as_promised),
                    "{story}: {:?}",
                    run.warnings()
                );
            }
        }
        Err(Error::NoWholeCheckpoint { rejected, .. }) => {
            assert_eq!(file, expected.shared, "{story}: {rejected:?}");
            let named = rejected.iter().all(|(_, why)| why.contains(stem));
            assert!(named, "{story}: {rejected:?}");
        }
        Err(error) => {
            assert_eq!(file, "run.toml", "{story}: {error}");
            assert!(error.to_string().contains("run.toml"), "{story}: {error}");
        }
    }
}

#[test]
fn every_flipped_bit_of_every_file_is_found_before_a_byte_is_handed_out() {
    let (before, expected) = small_run();
    let mut flips = 0;
    for (file, bytes) in before.files() {
        for bit in 0..bytes.len() * 8 {
            let memory = before.fork();
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            memory.put(&file, damaged);
            judge(&memory, &expected, &file, &format!("bit {bit} of {file}"));
            flips += 1;
        }
    }
    println!("{flips} bits");
    assert!(flips > 15_000, "only {flips} bits");
}

#[test]
fn every_file_cut_at_any_length_is_found() {
    let (before, expected) = small_run();
    for (file, bytes) in before.files() {
        for length in 0..bytes.len() {
            let memory = before.fork();
            memory.put(&file, bytes[..length].to_vec());
            judge(&memory, &expected, &file, &format!("{file} cut at {length}"));
        }
        let memory = before.fork();
        memory.put(&file, [bytes.as_slice(), &[0]].concat());
        if file.starts_with("journal/") {
            continue; // A byte behind the last record is what a crash leaves.
        }
        judge(&memory, &expected, &file, &format!("{file} with a byte too many"));
    }
}

#[test]
fn every_deleted_file_is_missed_or_never_was() {
    let (before, expected) = small_run();
    for file in before.files().into_keys() {
        let memory = before.fork();
        memory.remove(&file).unwrap();
        let story = format!("{file} deleted");
        if file == expected.newest[0] {
            // A checkpoint without a manifest was never committed.
            let run = open(&shared(&memory)).unwrap();
            assert_eq!(resumed_step(&run), Some(0), "{story}");
            assert_exact(run.resumed_from().unwrap());
        } else if file == expected.older {
            let run = open(&shared(&memory)).unwrap();
            assert_eq!(resumed_step(&run), Some(1), "{story}");
            assert_exact(run.resumed_from().unwrap());
        } else {
            judge(&memory, &expected, &file, &story);
        }
    }
}

#[test]
fn every_file_under_the_name_of_another_one_is_found() {
    // Of the same run and of another one: a backup put back in part, a directory copied over another.
    let (before, expected) = small_run();
    let other = run_in_memory(1);
    let sources: Vec<(String, Vec<u8>)> = before.files().into_iter().chain(other.files()).collect();
    for (file, bytes) in before.files() {
        for (source, stale) in &sources {
            if stale == &bytes {
                continue;
            }
            let memory = before.fork();
            memory.put(&file, stale.clone());
            let story = format!("{file} replaced by {source}");
            if file == "run.toml" && source == "run.toml" {
                // Whole, and of another run: whose the checkpoints are is known, and nothing is begun in their place.
                let error = open(&shared(&memory)).unwrap_err();
                assert!(
                    matches!(error, Error::NoWholeCheckpoint { .. }),
                    "{story}: {error}"
                );
                assert!(error.to_string().contains("another run"), "{story}: {error}");
                assert_eq!(files_in(&memory, "objects").len(), 2, "{story}");
            } else {
                judge(&memory, &expected, &file, &story);
            }
        }
    }
}
