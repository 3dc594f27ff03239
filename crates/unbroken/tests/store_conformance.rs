//! What every storage promises, asked of the one on disk and the one in memory.
//!
//! Touches: a temporary directory.

use std::io::ErrorKind;
use std::sync::Arc;

use unbroken::Error;
use unbroken::arena::Arena;
use unbroken::storage::disk::DiskStorage;
use unbroken::storage::faulty::{Fault, FaultyStorage};
use unbroken::storage::memory::{Leftovers, MemoryStorage};
use unbroken::storage::{Claim, DIRECT_ALIGNMENT, Directory, Storage};

/// Runs a check on each storage, fresh.
fn on_each(check: impl Fn(&Directory)) {
    check(&Directory::new(Arc::new(MemoryStorage::new())));
    let place = tempfile::tempdir().unwrap();
    check(&Directory::new(Arc::new(
        DiskStorage::open(place.path()).unwrap(),
    )));
}

fn kind(error: &Error) -> ErrorKind {
    match error {
        Error::Io { source, .. } => source.kind(),
        other => panic!("not an error of the operating system: {other}"),
    }
}

fn put(directory: &Directory, name: &str, bytes: &[u8]) {
    let mut file = directory.create_new(name).unwrap();
    file.write_all(bytes).unwrap();
    file.sync().unwrap();
}

#[test]
fn what_was_written_is_read_back_in_whole_and_in_part() {
    on_each(|directory| {
        directory.create_dir("d").unwrap();
        directory.create_dir("d").unwrap();
        let mut file = directory.create_new("d/f").unwrap();
        file.write_all(b"hello ").unwrap();
        file.write_all(b"").unwrap();
        file.write_all(b"world").unwrap();
        assert_eq!(file.written(), 11);
        file.sync().unwrap();
        directory.sync_dir("d").unwrap();
        assert_eq!(directory.read_all("d/f", 11).unwrap(), b"hello world");
        let source = directory.open("d/f").unwrap();
        assert_eq!(source.len().unwrap(), 11);
        let mut part = [0; 5];
        source.read_exact_at(6, &mut part).unwrap();
        assert_eq!(&part, b"world");
        assert_eq!(
            kind(&source.read_exact_at(7, &mut part).unwrap_err()),
            ErrorKind::UnexpectedEof
        );
        assert_eq!(directory.list("").unwrap(), ["d"]);
        assert_eq!(directory.list("d").unwrap(), ["f"]);
    });
}

#[test]
fn what_is_read_past_the_cache_is_what_was_written_up_to_the_end_of_the_file() {
    let bytes: Vec<u8> = (0..(1 << 20) + 77)
        .map(|index| (index / 512 * 3 + index) as u8)
        .collect();
    on_each(|directory| {
        put(directory, "f", &bytes);
        let source = directory.open("f").unwrap();
        // Whether it is cold is the system's to know; both ways give the same.
        let _ = source.is_cold(0, bytes.len());
        assert!(!source.is_cold(8 << 20, 1 << 20), "nothing is there");
        let mut memory = Arena::new(2 << 20).unwrap();
        let whole = bytes.len().next_multiple_of(DIRECT_ALIGNMENT);
        source
            .read_past_cache(0, &mut memory.bytes_mut()[..whole], bytes.len())
            .unwrap();
        assert!(memory.bytes()[..bytes.len()] == bytes);
        let tail = (1 << 20) - DIRECT_ALIGNMENT;
        let part = &mut memory.bytes_mut()[..2 * DIRECT_ALIGNMENT];
        source
            .read_past_cache(tail as u64, part, DIRECT_ALIGNMENT + 77)
            .unwrap();
        assert!(part[..DIRECT_ALIGNMENT + 77] == bytes[tail..]);
        let beyond = source.read_past_cache(tail as u64, part, DIRECT_ALIGNMENT + 78);
        assert_eq!(kind(&beyond.unwrap_err()), ErrorKind::UnexpectedEof);
    });
}

#[test]
fn bytes_are_written_at_any_place_in_any_order_into_a_file_of_reserved_length() {
    // Large aligned pieces, which the one on disk writes past the page cache, and an unaligned rest.
    const PIECE: usize = 1 << 20;
    let bytes: Vec<u8> = (0..3 * PIECE + 4096 + 77)
        .map(|index| (index / 4096 * 7 + index) as u8)
        .collect();
    let mut arena = vec![0u8; bytes.len() + 4096];
    let aligned = arena.as_ptr().align_offset(4096);
    arena[aligned..aligned + bytes.len()].copy_from_slice(&bytes);
    let arena = &arena[aligned..aligned + bytes.len()];
    on_each(|directory| {
        let file = directory.create_new("f").unwrap();
        file.reserve(bytes.len() as u64).unwrap();
        assert_eq!(directory.open("f").unwrap().len().unwrap(), bytes.len() as u64);
        for index in [3, 1, 0, 2] {
            let end = (index * PIECE + PIECE).min(arena.len());
            file.write_all_at((index * PIECE) as u64, &arena[index * PIECE..end])
                .unwrap();
        }
        file.sync().unwrap();
        assert!(directory.read_all("f", 1 << 30).unwrap() == bytes);
        file.reserve(5).unwrap();
        assert_eq!(directory.read_all("f", 5).unwrap(), &bytes[..5]);
    });
}

#[test]
fn a_file_that_is_nobodys_any_more_is_written_over() {
    on_each(|directory| {
        put(directory, "f", &[1; 10_000]);
        let file = directory.reuse("f").unwrap().expect("nobody else has it");
        file.reserve(3).unwrap();
        file.write_all_at(0, b"new").unwrap();
        file.sync().unwrap();
        assert_eq!(directory.read_all("f", 100).unwrap(), b"new");
        assert_eq!(
            kind(&directory.reuse("nowhere").unwrap_err()),
            ErrorKind::NotFound
        );
    });
}

#[test]
fn a_file_that_somebody_else_has_is_not_written_over() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::new(Arc::new(DiskStorage::open(place.path()).unwrap()));
    put(&directory, "f", b"kept");
    let reader = std::fs::File::open(place.path().join("f")).unwrap();
    assert!(directory.reuse("f").unwrap().is_none(), "it is open");
    drop(reader);
    std::fs::hard_link(place.path().join("f"), place.path().join("link")).unwrap();
    assert!(directory.reuse("f").unwrap().is_none(), "it has another name");
    std::fs::remove_file(place.path().join("link")).unwrap();
    assert!(directory.reuse("f").unwrap().is_some());
}

#[test]
fn a_file_takes_the_place_of_another_only_where_it_is_told_to() {
    on_each(|directory| {
        directory.create_dir("d").unwrap();
        put(directory, "d/a", b"first");
        put(directory, "b", b"second");
        directory.rename_over("b", "d/a").unwrap();
        assert_eq!(directory.read_all("d/a", 100).unwrap(), b"second");
        directory.rename_over("d/a", "c").unwrap();
        assert_eq!(directory.list("").unwrap(), ["c", "d"]);
        assert!(
            directory.rename_over("c", "d").is_err(),
            "a directory is never replaced"
        );
        assert_eq!(directory.read_all("c", 100).unwrap(), b"second");
    });
}

#[test]
fn no_name_is_replaced_by_a_new_one() {
    on_each(|directory| {
        put(directory, "a", b"first");
        put(directory, "b", b"second");
        assert_eq!(
            kind(&directory.create_new("a").unwrap_err()),
            ErrorKind::AlreadyExists
        );
        assert_eq!(
            kind(&directory.rename_new("b", "a").unwrap_err()),
            ErrorKind::AlreadyExists
        );
        assert_eq!(directory.read_all("a", 100).unwrap(), b"first");
        assert_eq!(directory.read_all("b", 100).unwrap(), b"second");
        directory.rename_new("b", "c").unwrap();
        assert_eq!(directory.list("").unwrap(), ["a", "c"]);
        assert_eq!(
            kind(&directory.rename_new("b", "d").unwrap_err()),
            ErrorKind::NotFound
        );
    });
}

#[test]
fn a_file_longer_than_the_limit_is_refused_by_its_length() {
    on_each(|directory| {
        put(directory, "long", &[1; 1000]);
        let error = directory.read_all("long", 999).unwrap_err();
        assert_eq!(kind(&error), ErrorKind::FileTooLarge);
    });
}

#[test]
fn removing_twice_is_fine_and_removing_a_directory_is_not() {
    on_each(|directory| {
        put(directory, "f", b"x");
        directory.create_dir("d").unwrap();
        directory.remove("f").unwrap();
        directory.remove("f").unwrap();
        assert!(directory.remove("d").is_err());
        assert_eq!(directory.list("").unwrap(), ["d"]);
        assert!(directory.list_if_there("nowhere").unwrap().is_empty());
        assert_eq!(kind(&directory.list("nowhere").unwrap_err()), ErrorKind::NotFound);
    });
}

#[test]
fn names_that_lead_out_of_the_directory_are_refused() {
    on_each(|directory| {
        for name in [
            "..",
            "../x",
            "d/../../x",
            "/etc/passwd",
            "d/",
            "a/b/c",
            ".",
            "d/..",
        ] {
            assert_eq!(
                kind(&directory.open(name).unwrap_err()),
                ErrorKind::InvalidInput,
                "{name}"
            );
            assert_eq!(
                kind(&directory.create_new(name).unwrap_err()),
                ErrorKind::InvalidInput,
                "{name}"
            );
            assert!(directory.remove(name).is_err(), "{name}");
        }
    });
}

#[test]
fn only_plain_files_open() {
    on_each(|directory| {
        directory.create_dir("d").unwrap();
        assert_eq!(kind(&directory.open("d").unwrap_err()), ErrorKind::InvalidInput);
        assert!(directory.create_new("d").is_err());
        put(directory, "f", b"x");
        assert!(directory.create_dir("f").is_err());
    });
}

#[test]
fn a_storage_is_locked_once_until_the_lock_is_dropped() {
    on_each(|directory| {
        let Claim::Held(lock) = directory.lock("lock").unwrap() else {
            panic!("nobody holds it")
        };
        lock.check().unwrap();
        let Claim::Refused(holder) = directory.lock("lock").unwrap() else {
            panic!("it is held")
        };
        assert_eq!(holder, Some(std::process::id()));
        lock.check().unwrap();
        drop(lock);
        assert!(matches!(directory.lock("lock").unwrap(), Claim::Held(_)));
    });
}

#[test]
fn interrupted_and_short_calls_are_carried_on_with() {
    for fault in [Fault::Interrupted, Fault::ShortWrite] {
        for at in 0..12 {
            let faulty = FaultyStorage::new(Arc::new(MemoryStorage::new()));
            let directory = Directory::new(Arc::new(faulty.clone()));
            faulty.fail_at(at, fault);
            directory.create_dir("d").unwrap();
            let mut file = directory.create_new("d/t").unwrap();
            file.write_all(b"some bytes").unwrap();
            let synced = file.sync();
            // A sync is the one call that is not made again: what it would then say is worth nothing.
            let sync_index = faulty
                .operations()
                .iter()
                .position(|operation| *operation == "sync")
                .unwrap();
            assert_eq!(
                synced.is_err(),
                fault == Fault::Interrupted && sync_index == at,
                "{fault:?} at {at}"
            );
            directory.rename_new("d/t", "d/f").unwrap();
            directory.sync_dir("d").unwrap();
            assert_eq!(
                directory.read_all("d/f", 100).unwrap(),
                b"some bytes",
                "{fault:?} at {at}"
            );
        }
    }
}

#[test]
fn a_link_planted_in_the_directory_is_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), b"secret").unwrap();
    let place = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path().join("secret"), place.path().join("file")).unwrap();
    std::os::unix::fs::symlink(outside.path(), place.path().join("dir")).unwrap();
    let directory = Directory::new(Arc::new(DiskStorage::open(place.path()).unwrap()));
    assert!(directory.open("file").is_err());
    assert!(directory.open("dir/secret").is_err());
    assert!(directory.list("dir").is_err());
    assert!(directory.create_dir("dir").is_err());
    assert!(directory.create_new("dir/new").is_err());
    assert!(directory.remove("dir/secret").is_err());
    assert!(directory.lock("file").is_err());
    assert_eq!(std::fs::read(outside.path().join("secret")).unwrap(), b"secret");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn directories_are_made_with_their_parents_and_a_file_in_the_way_is_an_error() {
    let place = tempfile::tempdir().unwrap();
    let deep = place.path().join("a/b/c");
    DiskStorage::create(&deep).unwrap();
    DiskStorage::create(&deep).unwrap();
    assert!(deep.is_dir());
    std::fs::write(place.path().join("file"), b"x").unwrap();
    assert_eq!(
        DiskStorage::create(&place.path().join("file"))
            .unwrap_err()
            .kind(),
        ErrorKind::NotADirectory
    );
    assert_eq!(
        DiskStorage::create(&place.path().join("file/x"))
            .unwrap_err()
            .kind(),
        ErrorKind::NotADirectory
    );
}

#[test]
fn a_power_cut_takes_what_was_not_synced() {
    let memory = MemoryStorage::new();
    memory.create_dir("d").unwrap();
    let file = memory.create_new("d/f").unwrap();
    file.write_at(0, b"kept").unwrap();
    file.sync().unwrap();
    file.write_at(4, b" lost").unwrap();
    let read = |storage: &MemoryStorage| storage.files().get("d/f").cloned();
    assert_eq!(read(&memory.after_power_cut(Leftovers::Nothing)), None);
    assert_eq!(read(&memory.after_power_cut(Leftovers::Names)).unwrap(), b"kept");
    assert_eq!(
        read(&memory.after_power_cut(Leftovers::Everything)).unwrap(),
        b"kept lost"
    );
    memory.sync_dir("d").unwrap();
    assert_eq!(
        read(&memory.after_power_cut(Leftovers::Nothing)).unwrap(),
        b"kept"
    );
    memory.remove("d/f").unwrap();
    assert_eq!(
        read(&memory.after_power_cut(Leftovers::Nothing)).unwrap(),
        b"kept"
    );
    memory.sync_dir("d").unwrap();
    assert_eq!(read(&memory.after_power_cut(Leftovers::Nothing)), None);
}
