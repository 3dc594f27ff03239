//! What is read of a checkpoint: what was asked for and little more, once, in whichever way the file gives it.
//!
//! Touches: memory only.

mod world;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use unbroken::digest::GROUP;
use unbroken::error::Error;
use unbroken::run::{Extent, Options, Run};
use unbroken::state::Value;
use unbroken::storage::memory::MemoryStorage;
use unbroken::storage::{Claim, DIRECT_ALIGNMENT, Input, Output, Storage};
use unbroken::store::Checkpoint;
use world::{assert_exact, files_in, leaf, of_tree, open, resumed_step, run_in_memory, shared};

/// Counts the bytes that are read of each file. A cold one has nothing in a cache: it is read past that, as a disk
/// would want it, and ends a read early now and then.
#[derive(Clone, Debug)]
struct Counting {
    inner: Arc<dyn Storage>,
    cold: bool,
    read: Arc<Mutex<BTreeMap<String, u64>>>,
}

impl Counting {
    fn new(inner: &MemoryStorage, cold: bool) -> Counting {
        Counting {
            inner: shared(inner),
            cold,
            read: Arc::default(),
        }
    }

    /// Bytes read of packs since this was asked last.
    fn packs(&self) -> u64 {
        let counts = std::mem::take(&mut *self.read.lock().unwrap());
        let of_packs = counts.iter().filter(|(name, _)| name.starts_with("objects/"));
        of_packs.map(|(_, count)| count).sum()
    }
}

#[derive(Debug)]
struct CountingInput {
    inner: Box<dyn Input>,
    name: String,
    storage: Counting,
}

impl CountingInput {
    fn counted(&self, outcome: io::Result<usize>) -> io::Result<usize> {
        let count = outcome?;
        *self
            .storage
            .read
            .lock()
            .unwrap()
            .entry(self.name.clone())
            .or_default() += count as u64;
        Ok(count)
    }
}

impl Input for CountingInput {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.counted(self.inner.read_at(offset, into))
    }

    fn is_cold(&self, _offset: u64, _length: usize) -> bool {
        self.storage.cold
    }

    fn read_past_cache(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let aligned = [offset as usize, into.as_ptr() as usize, into.len()];
        assert!(
            aligned
                .iter()
                .all(|number| number.is_multiple_of(DIRECT_ALIGNMENT))
        );
        let some = into.len() / if offset.is_multiple_of(3) { 1 } else { 2 };
        self.counted(self.inner.read_at(offset, &mut into[..some]))
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
}

impl Storage for Counting {
    fn location(&self) -> &Path {
        self.inner.location()
    }

    fn create_dir(&self, name: &str) -> io::Result<()> {
        self.inner.create_dir(name)
    }

    fn create_new(&self, name: &str) -> io::Result<Box<dyn Output>> {
        self.inner.create_new(name)
    }

    fn reuse(&self, name: &str) -> io::Result<Option<Box<dyn Output>>> {
        self.inner.reuse(name)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Input>> {
        Ok(Box::new(CountingInput {
            inner: self.inner.open(name)?,
            name: name.to_owned(),
            storage: self.clone(),
        }))
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename_new(from, to)
    }

    fn sync_dir(&self, name: &str) -> io::Result<()> {
        self.inner.sync_dir(name)
    }

    fn list(&self, name: &str) -> io::Result<Vec<String>> {
        self.inner.list(name)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.inner.free_bytes()
    }

    fn lock(&self, name: &str) -> io::Result<Claim> {
        self.inner.lock(name)
    }
}

fn bytes_of(lengths: &[usize]) -> Vec<Vec<u8>> {
    let bytes = |(at, &length): (usize, &usize)| {
        (0..length)
            .map(|index| (index * (2 * at + 3) / 5 + at) as u8)
            .collect()
    };
    lengths.iter().enumerate().map(bytes).collect()
}

/// A run with one checkpoint of storages of these lengths, closed.
fn run_with(storages: &[Vec<u8>]) -> MemoryStorage {
    let memory = MemoryStorage::new();
    let run = open(&shared(&memory)).unwrap();
    run.begin().unwrap();
    let name = |index: usize| Value::Str(format!("w{index:03}"));
    let leaves = storages.iter().enumerate();
    let tree = leaves
        .map(|(index, bytes)| (name(index), leaf(index as u32, bytes.len() as u64 / 4)))
        .collect();
    let storages = storages.iter().map(Vec::as_slice).collect();
    run.commit(of_tree(0, Value::dict(tree), storages)).unwrap();
    run.close().unwrap();
    memory
}

fn newest(storage: &Counting) -> Checkpoint {
    let run = open(&(Arc::new(storage.clone()) as Arc<dyn Storage>)).unwrap();
    let checkpoint = run.resumed_from().unwrap().clone();
    run.close().unwrap();
    storage.packs();
    checkpoint
}

#[test]
fn a_tensor_is_read_without_the_rest() {
    let storages = bytes_of(&[40_000, 8 * GROUP, 400, 30 * GROUP, 100_000]);
    let memory = run_with(&storages);
    for cold in [false, true] {
        let storage = Counting::new(&memory, cold);
        let checkpoint = newest(&storage);
        for (index, expected) in storages.iter().enumerate() {
            assert!(checkpoint.read(index).unwrap() == *expected);
            let (read, length) = (storage.packs(), expected.len() as u64);
            // Past the cache whole blocks are read, at both ends of each piece.
            let more = if cold {
                length / 100 + 2 * DIRECT_ALIGNMENT as u64
            } else {
                0
            };
            assert!(
                (length..=length + more).contains(&read),
                "{read} bytes for {length}"
            );
        }
    }
}

#[test]
fn a_run_that_is_opened_into_memory_reads_every_byte_once() {
    let storages = bytes_of(&[4_000, 70 * GROUP, 40_000, 12, 0, 4_000]);
    let memory = run_with(&storages);
    let storage = Counting::new(&memory, false);
    let mut lent: Vec<Vec<u8>> = storages.iter().map(|bytes| vec![0; bytes.len()]).collect();
    // One is not asked for, and verified all the same.
    let mut targets = Some(
        lent.iter_mut()
            .map(Vec::as_mut_slice)
            .enumerate()
            .skip(1)
            .collect(),
    );
    let run = Run::open_on_into(Arc::new(storage.clone()), &Options::default(), &mut |_| {
        Ok(targets.take().expect("memory is asked for once"))
    })
    .unwrap();
    assert!(run.resumed_from().is_some());
    assert!(lent[1..] == storages[1..]);
    // Twice the header and, before it, its length: by the survey, and before the tensors.
    let (pack, file) = files_in(&memory, "objects").into_iter().next().unwrap();
    let header = run
        .resumed_from()
        .unwrap()
        .manifest()
        .storages
        .iter()
        .map(|entry| entry.place.whole().unwrap().1)
        .min();
    let tensors = file.len() as u64 - header.unwrap();
    assert_eq!(storage.packs(), tensors + 2 * (8 + header.unwrap()), "{pack}");
}

#[test]
fn a_run_that_goes_back_for_a_trial_reads_every_byte_of_where_it_goes_once() {
    let memory = run_in_memory(20);
    let storage = Counting::new(&memory, false);
    let run = open(&(Arc::new(storage.clone()) as Arc<dyn Storage>)).unwrap();
    storage.packs();
    let mut lent: Vec<Vec<u8>> = world::storages(15)
        .iter()
        .map(|bytes| vec![0; bytes.len()])
        .collect();
    let mut targets = Some(lent.iter_mut().map(Vec::as_mut_slice).enumerate().collect());
    let extent = Extent { least: 5, most: 50 };
    let trial = run
        .put_on_trial_into(extent, &mut |_| {
            Ok(targets.take().expect("memory is asked for once"))
        })
        .unwrap();
    assert_eq!(trial.map(|trial| trial.from), Some((15, 0)));
    assert_eq!(lent, world::storages(15));
    let packs = &run.resumed_from().unwrap().manifest().packs;
    // Headers, and before them their lengths, are read twice: when it is opened, and before the tensors.
    let headers: u64 = packs.iter().map(|pack| header_of(&memory, &pack.name)).sum();
    let tensors: u64 = lent.iter().map(|bytes| bytes.len() as u64).sum();
    assert_eq!(storage.packs(), tensors + 2 * headers);
}

/// Bytes of a pack's header and of its length.
fn header_of(memory: &MemoryStorage, pack: &str) -> u64 {
    let bytes = &memory.files()[&format!("objects/{pack}")];
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) + 8
}

#[test]
fn memory_is_asked_for_again_where_an_older_checkpoint_takes_a_damaged_ones_place() {
    let memory = run_in_memory(2);
    let run = open(&shared(&memory)).unwrap();
    let pack = format!("objects/{}", run.resumed_from().unwrap().manifest().packs[1].name);
    run.close().unwrap();
    let mut bytes = memory.files()[&pack].clone();
    *bytes.last_mut().unwrap() ^= 1;
    memory.put(&pack, bytes);
    let expected = world::storages(1);
    let empty = || {
        expected
            .iter()
            .map(|bytes| vec![0; bytes.len()])
            .collect::<Vec<_>>()
    };
    let (mut first, mut second) = (empty(), empty());
    let mut lent = vec![&mut second, &mut first].into_iter().collect::<Vec<_>>();
    let mut steps = Vec::new();
    let run = Run::open_on_into(shared(&memory), &Options::default(), &mut |checkpoint| {
        steps.push(checkpoint.info().step);
        let memory = lent.pop().expect("two checkpoints are read");
        Ok(memory.iter_mut().map(Vec::as_mut_slice).enumerate().collect())
    })
    .unwrap();
    assert_eq!(steps, [2, 1]);
    assert_eq!(resumed_step(&run), Some(1));
    assert_exact(run.resumed_from().unwrap());
    assert_eq!(second, expected);
}

#[test]
fn memory_that_nobody_lends_is_an_error_and_the_lock_is_given_back() {
    let memory = run_in_memory(1);
    let refused = Run::open_on_into(shared(&memory), &Options::default(), &mut |_| {
        Err(Error::invalid("no memory"))
    });
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    let wrong = Run::open_on_into(shared(&memory), &Options::default(), &mut |_| {
        Ok(vec![(7, &mut [])])
    });
    assert!(matches!(wrong, Err(Error::Invalid { .. })), "{wrong:?}");
    assert_eq!(resumed_step(&open(&shared(&memory)).unwrap()), Some(1));
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    let words = prop_oneof![
        0..20usize,
        0..1500usize,
        (GROUP / 4 - 1)..(GROUP / 4 + 2),
        0..(40 * GROUP / 4)
    ];
    proptest::collection::vec(words.prop_map(|words| words * 4), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn whatever_is_read_together_is_what_was_saved_and_a_flipped_bit_in_it_is_found(
        lengths in lengths(), chosen in proptest::collection::vec(any::<bool>(), 8), cold: bool, flip: prop::sample::Index
    ) {
        let storages = bytes_of(&lengths);
        let memory = run_with(&storages);
        let storage = Counting::new(&memory, cold);
        let checkpoint = newest(&storage);
        let asked = || (0..storages.len()).filter(|&index| chosen[index]);
        let mut found: Vec<Vec<u8>> = storages.iter().map(|bytes| vec![0; bytes.len()]).collect();
        let mut read = |checkpoint: &Checkpoint| {
            let targets = found.iter_mut().map(Vec::as_mut_slice).enumerate();
            checkpoint.read_into(targets.filter(|(index, _)| chosen[*index]).collect())
        };
        read(&checkpoint).unwrap();
        let (pack, mut bytes) = files_in(&memory, "objects").into_iter().next().expect("one pack");
        let at = flip.index(bytes.len());
        bytes[at] ^= 4;
        memory.put(&format!("objects/{pack}"), bytes);
        let outcome = read(&checkpoint);
        let whole = checkpoint.verify();
        for index in asked() {
            prop_assert!(outcome.is_err() || found[index] == storages[index]);
        }
        let covers = |index: usize| {
            let entry = &checkpoint.manifest().storages[index];
            let mut places = entry.place.pieces(entry.length).into_iter();
            places.any(|(_, offset, length)| (offset..offset + length).contains(&(at as u64)))
        };
        prop_assert_eq!(outcome.is_err(), asked().any(covers));
        prop_assert!(whole.is_err());
    }
}
