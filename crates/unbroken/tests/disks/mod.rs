//! Every disk that a power cut may leave of a history of operations on a storage.
//!
//! Touches: nothing. What is promised to survive is what POSIX promises and no more, so that the disks of ext4, xfs and
//! btrfs are all among those built here:
//!
//! - A file's bytes survive its sync. Of what was written since, any number of writes may be there, the last of them in
//!   part; or the length arrived before the bytes, which are then zeros or somebody's old ones; or the later pages
//!   arrived and the earlier ones did not.
//! - A name survives the sync of its directory. Of what happened since, each name stands in any of its states by itself:
//!   the two halves of a rename may part, a file may have both names or none.
//! - The operation that was under way may be done, not done, or anything between.
#![allow(dead_code)] // Each test program uses a part of it.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{Hash, Hasher};

use unbroken::storage::Storage;
use unbroken::storage::memory::{Effect, MemoryStorage};

/// How many disks are built of one instant before choosing among them at random.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Up to this many, all.
    pub all_up_to: u64,
    /// Above, this many besides those in which everything or nothing arrived.
    pub drawn: u64,
    /// Seed of the drawing.
    pub seed: u64,
}

/// A file's bytes that survive, and what was written since.
#[derive(Clone, Debug, Default)]
struct Bytes {
    synced: Vec<u8>,
    since: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Written(usize, Vec<u8>),
    Resized(usize),
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Change::Written(offset, bytes) => write(content, *offset, bytes),
            Change::Resized(length) => content.resize(*length, 0),
        }
    }
}

fn write(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    content.resize(content.len().max(offset + bytes.len()), 0);
    content[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl Bytes {
    fn after(&self, changes: usize) -> Vec<u8> {
        let mut content = self.synced.clone();
        self.since[..changes]
            .iter()
            .for_each(|change| change.apply(&mut content));
        content
    }

    /// Everything that may be in the file after a power cut.
    fn variants(&self) -> Vec<Vec<u8>> {
        let whole = self.after(self.since.len());
        let mut variants: Vec<Vec<u8>> = (0..=self.since.len())
            .map(|changes| self.after(changes))
            .collect();
        let mut changed = Vec::new();
        for (index, change) in self.since.iter().enumerate() {
            // Without this one, whatever came before and after it.
            let mut without = self.after(index);
            self.since[index + 1..]
                .iter()
                .for_each(|change| change.apply(&mut without));
            variants.push(without);
            if let Change::Written(offset, bytes) = change {
                let mut torn = self.after(index);
                write(&mut torn, *offset, &bytes[..bytes.len() / 2]);
                variants.push(torn);
                changed.extend(*offset..offset + bytes.len());
            }
        }
        for (filler, part) in [(0, 2), (0xa5, 2), (0, 1)] {
            let mut other = whole.clone();
            for at in &changed[..changed.len() * part / 2] {
                if let Some(byte) = other.get_mut(*at) {
                    *byte = filler;
                }
            }
            variants.push(other);
        }
        let mut seen = HashSet::new();
        variants.retain(|content| seen.insert(content.clone()));
        variants
    }
}

/// A disk under a history: what is on it for good, and in which states it may be besides.
#[derive(Clone, Debug)]
pub struct Disk {
    files: BTreeMap<usize, Bytes>,
    /// For each name the files it may stand for, none or one; the last is what the living system sees.
    names: BTreeMap<String, Vec<Option<usize>>>,
    /// For each directory whether it may be there.
    directories: BTreeMap<String, Vec<bool>>,
}

fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl Disk {
    /// A storage as it is, all of it on the disk for good.
    pub fn of(storage: &MemoryStorage) -> Disk {
        let contents = storage.files();
        let numbers = storage.numbers();
        let bytes = |name: &String| Bytes {
            synced: contents[name].clone(),
            since: Vec::new(),
        };
        Disk {
            files: numbers.iter().map(|(name, file)| (*file, bytes(name))).collect(),
            names: numbers
                .into_iter()
                .map(|(name, file)| (name, vec![Some(file)]))
                .collect(),
            directories: storage
                .list("")
                .expect("a storage in memory lists its root")
                .into_iter()
                .filter(|name| !contents.contains_key(name))
                .map(|name| (name, vec![true]))
                .collect(),
        }
    }

    fn now(&self, name: &str) -> Option<usize> {
        self.names.get(name).and_then(|states| *states.last()?)
    }

    fn becomes(&mut self, name: &str, file: Option<usize>) {
        let states = self.names.entry(name.to_owned()).or_insert_with(|| vec![None]);
        states.push(file);
    }

    /// Goes on by one operation.
    pub fn apply(&mut self, effect: &Effect) {
        match effect {
            Effect::CreateDir(name) => self
                .directories
                .entry(name.clone())
                .or_insert_with(|| vec![false])
                .push(true),
            Effect::Create { file, name } => {
                self.files.insert(*file, Bytes::default());
                self.becomes(name, Some(*file));
            }
            Effect::Write { file, offset, bytes } => {
                let file = self
                    .files
                    .get_mut(file)
                    .expect("a file is made before it is written");
                file.since.push(Change::Written(*offset, bytes.clone()));
            }
            Effect::Resize { file, length } => {
                let file = self
                    .files
                    .get_mut(file)
                    .expect("a file is made before it is resized");
                file.since.push(Change::Resized(*length));
            }
            Effect::Sync(file) => {
                let file = self
                    .files
                    .get_mut(file)
                    .expect("a file is made before it is synced");
                file.synced = file.after(file.since.len());
                file.since.clear();
            }
            Effect::SyncDir(dir) => {
                for (_, states) in self.names.iter_mut().filter(|(name, _)| parent(name) == dir) {
                    states.drain(..states.len() - 1);
                }
                for (_, states) in self
                    .directories
                    .iter_mut()
                    .filter(|(name, _)| parent(name) == dir)
                {
                    states.drain(..states.len() - 1);
                }
            }
            Effect::Rename { from, to } => {
                let file = self.now(from);
                self.becomes(from, None);
                self.becomes(to, file);
            }
            Effect::Remove(name) => self.becomes(name, None),
        }
    }

    /// Each disk that a power cut at this instant may leave, and whether that is all of them.
    fn states(&self, effort: Effort) -> (Vec<State>, bool) {
        let variants: BTreeMap<usize, Vec<Vec<u8>>> = self
            .files
            .iter()
            .map(|(file, bytes)| (*file, bytes.variants()))
            .collect();
        // What may be one way or another, as the number of ways of each.
        let names: Vec<(&String, Vec<Option<usize>>)> = self
            .names
            .iter()
            .map(|(name, states)| (name, distinct(states)))
            .collect();
        let directories: Vec<(&String, Vec<bool>)> = self
            .directories
            .iter()
            .map(|(name, states)| (name, distinct(states)))
            .collect();
        let files: Vec<(usize, &Vec<Vec<u8>>)> = variants
            .iter()
            .filter(|(file, _)| self.names.values().any(|states| states.contains(&Some(**file))))
            .map(|(file, contents)| (*file, contents))
            .collect();
        let ways: Vec<u64> = (names.iter().map(|(_, states)| states.len()))
            .chain(directories.iter().map(|(_, states)| states.len()))
            .chain(files.iter().map(|(_, contents)| contents.len()))
            .map(|count| count as u64)
            .collect();
        let build = |choice: &[usize]| {
            let (of_names, rest) = choice.split_at(names.len());
            let (of_directories, of_files) = rest.split_at(directories.len());
            let contents: BTreeMap<usize, &Vec<u8>> = files
                .iter()
                .zip(of_files)
                .map(|((file, contents), at)| (*file, &contents[*at]))
                .collect();
            let directories: BTreeSet<String> = directories
                .iter()
                .zip(of_directories)
                .filter(|((_, states), at)| states[**at])
                .map(|((name, _), _)| (*name).clone())
                .collect();
            let there = |name: &str| parent(name).is_empty() || directories.contains(parent(name));
            let files = names
                .iter()
                .zip(of_names)
                .filter_map(|((name, states), at)| Some(((*name).clone(), contents[&states[*at]?].clone())))
                .filter(|(name, _)| there(name))
                .collect();
            State { directories, files }
        };
        let (choices, all) = choices(&ways, effort);
        (choices.iter().map(|choice| build(choice)).collect(), all)
    }
}

/// The ways in which something may be, each once, the living one last.
fn distinct<T: PartialEq + Copy>(states: &[T]) -> Vec<T> {
    let later = |index: usize, state: &T| states[index + 1..].contains(state);
    let last = states
        .iter()
        .enumerate()
        .filter(|(index, state)| !later(*index, state));
    last.map(|(_, state)| *state).collect()
}

/// One of `ways[i]` for each i, in all combinations or in many, and whether in all.
fn choices(ways: &[u64], effort: Effort) -> (Vec<Vec<usize>>, bool) {
    let total = ways
        .iter()
        .fold(1u64, |product, count| product.saturating_mul(*count));
    let nth = |mut number: u64| {
        let digit = |count: &u64| {
            let digit = number % count;
            number /= count;
            digit as usize
        };
        ways.iter().map(digit).collect::<Vec<_>>()
    };
    if total <= effort.all_up_to {
        return ((0..total).map(nth).collect(), true);
    }
    let mut drawing = effort.seed;
    let mut draw = |below: u64| {
        // SplitMix64.
        drawing = drawing.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = drawing;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % below) as usize
    };
    let mut chosen = vec![
        vec![0; ways.len()],
        ways.iter().map(|count| *count as usize - 1).collect(),
    ];
    chosen.extend((0..effort.drawn).map(|_| ways.iter().map(|count| draw(*count)).collect()));
    (chosen, false)
}

/// A disk after a power cut.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct State {
    directories: BTreeSet<String>,
    files: BTreeMap<String, Vec<u8>>,
}

impl State {
    fn open(&self) -> MemoryStorage {
        let storage = MemoryStorage::new();
        for directory in &self.directories {
            storage
                .create_dir(directory)
                .expect("a directory is made in memory");
        }
        for (name, bytes) in &self.files {
            storage.put(name, bytes.clone());
        }
        storage
    }

    fn shown(&self) -> String {
        let names = self
            .files
            .iter()
            .map(|(name, bytes)| format!("{name} ({})", bytes.len()));
        names.collect::<Vec<_>>().join(", ")
    }
}

/// What an exploration came to.
#[derive(Debug, Default)]
pub struct Found {
    /// Different disks, each opened once for each thing that had to hold of it.
    pub states: usize,
    /// Instants of which disks were drawn, because they were too many to build all.
    pub drawn: usize,
    /// What did not hold, and of which disk.
    pub violations: Vec<String>,
    seen: HashSet<u64>,
}

impl Found {
    /// Asserts that every disk was as it must be, and that so many were opened at least.
    pub fn assert_none(&self, least: usize) {
        println!("{} different disks were opened", self.states);
        assert!(
            self.violations.is_empty(),
            "{} of {} disks are not as they must be, such as:\n{}",
            self.violations.len(),
            self.states,
            self.violations[0]
        );
        assert!(self.states >= least, "only {} disks were opened", self.states);
    }

    /// Opens every disk that a power cut may leave of `history` on `base`, from its `first` operation on.
    ///
    /// `check` is given the disk and how many operations had been done; what it demands may depend on nothing of that
    /// but `demands`.
    pub fn explore<D: Hash>(
        &mut self,
        base: &Disk,
        history: &[Effect],
        first: usize,
        effort: Effort,
        demands: impl Fn(usize) -> D,
        check: impl Fn(&MemoryStorage, &D) -> Result<(), String>,
    ) {
        let mut disk = base.clone();
        for done in 0..=history.len() {
            if done > 0 {
                disk.apply(&history[done - 1]);
            }
            if done < first {
                continue;
            }
            let demanded = demands(done);
            let (states, all) = disk.states(effort);
            self.drawn += usize::from(!all);
            for state in states {
                let mut hasher = DefaultHasher::new();
                (&state, &demanded).hash(&mut hasher);
                if !self.seen.insert(hasher.finish()) {
                    continue;
                }
                self.states += 1;
                if let Err(what) = check(&state.open(), &demanded) {
                    let last = done.checked_sub(1).map(|last| name_of(&history[last]));
                    let shown = state.shown();
                    let of = history.len();
                    self.violations.push(format!(
                        "{what}; after {done} of {of} operations, the last {last:?}: {shown}"
                    ));
                }
            }
        }
    }
}

fn name_of(effect: &Effect) -> String {
    match effect {
        Effect::Write { file, offset, bytes } => format!("write {} at {offset} of file {file}", bytes.len()),
        other => format!("{other:?}"),
    }
}
