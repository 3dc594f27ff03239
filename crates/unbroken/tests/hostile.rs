//! A run directory from a stranger: no panic, no bytes that were not verified, no memory beyond what the format allows, no
//! way out of the directory.
//!
//! Touches: memory; a temporary directory with links, pipes and files with holes. The inputs are drawn: `UNBROKEN_SEED=N`
//! draws others, `UNBROKEN_ROUNDS=N` more of them. The same functions are fuzz targets in `fuzz/`.

mod strangers;
mod world;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use unbroken::digest::Digest;
use unbroken::format::Flaw;
use unbroken::format::value::{self, MAX_MEMORY};
use unbroken::run::{Options, Run, read_checkpoint, read_journal, read_run};
use unbroken::state::{Tensor, Value};
use world::{assert_exact, commit_at, resumed_step, train};

/// Counts what each thread holds, and the most that it held.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that ends has no counters any more, and nothing to count.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist for a moment.
        count(size as isize);
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most memory that this thread held during `work` beyond what it held before, in bytes.
fn memory_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    MOST.set(before);
    let done = work();
    (done, (MOST.get() - before) as usize)
}

/// Numbers that depend on a seed only (SplitMix64).
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % bound as u64) as usize
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most + 1);
        (0..length).map(|_| self.below(256) as u8).collect()
    }

    /// Bytes that are nearly these: some flipped, cut, repeated, put in, or replaced by heads that promise much.
    fn mutated(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(6) {
                0 => bytes.truncate(at),
                1 => {
                    let end = at + self.below(bytes.len() - at + 1).min(64);
                    let part = bytes[at..end].to_vec();
                    let to = self.below(bytes.len() + 1);
                    bytes.splice(to..to, part);
                }
                2 => drop(bytes.splice(at..at, self.bytes(8))),
                3 => {
                    let sort = self.below(8) as u8;
                    let mut head = vec![sort << 5 | 0x1b];
                    head.extend((1u64 << self.below(64)).to_be_bytes());
                    bytes.splice(at..at, head);
                }
                _ if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                _ => {}
            }
        }
        bytes
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}

/// What one small input may take.
const SMALL: usize = 4 << 20;

/// Puts a target through drawn bytes and mutations of `examples`, a few kilobytes each; nothing promised is allocated.
fn assail(test: &str, rounds: u64, examples: &[Vec<u8>], target: fn(&[u8])) {
    let seed = number("UNBROKEN_SEED", 1);
    let mut draws = Draws(seed);
    for round in 0..number("UNBROKEN_ROUNDS", rounds) {
        let bytes = match draws.below(3) {
            0 => draws.bytes(600),
            _ => {
                let example = draws.below(examples.len());
                draws.mutated(&examples[example])
            }
        };
        let (outcome, memory) = memory_of(|| catch_unwind(AssertUnwindSafe(|| target(&bytes))));
        let again = format!(
            "round {round}; replay with: UNBROKEN_SEED={seed} UNBROKEN_ROUNDS={} cargo test -p unbroken --test \
             hostile {test}; the bytes are {bytes:02x?}",
            round + 1
        );
        assert!(outcome.is_ok(), "{again}");
        assert!(memory <= SMALL, "{memory} bytes of memory: {again}");
    }
}

/// Files of a small run with a tree of each sort of value.
fn example_files() -> Vec<(String, Vec<u8>)> {
    world::run_in_memory(2).files().into_iter().collect()
}

fn examples(dir: &str) -> Vec<Vec<u8>> {
    let inside = |(name, bytes): (String, Vec<u8>)| name.starts_with(dir).then_some(bytes);
    example_files().into_iter().filter_map(inside).collect()
}

#[test]
fn a_strangers_values_are_their_bytes_or_refused() {
    let trees = (0..3).map(|step| value::encode(&world::tree(step)).unwrap());
    assail(
        "a_strangers_values",
        2000,
        &trees.collect::<Vec<_>>(),
        strangers::values,
    );
}

#[test]
fn a_strangers_manifest_is_its_bytes_or_refused() {
    let whole = examples("checkpoints/");
    let payloads = whole.iter().map(|bytes| bytes[20..bytes.len() - 32].to_vec());
    let examples: Vec<_> = payloads.chain(whole.clone()).collect();
    assail("a_strangers_manifest", 2000, &examples, strangers::manifests);
}

#[test]
fn a_strangers_frame_makes_its_block_or_is_refused() {
    // Frames of numbers and of one byte, as `frames` wants them: a width, a length, the frame.
    let numbers: Vec<u8> = (0..200u32)
        .flat_map(|number| (number / 7).to_le_bytes())
        .collect();
    let example = |width: u8, block: &[u8]| {
        let mut coder = unbroken::format::coded::Coder::default();
        let frame = coder.encode(block, 1 << width, unbroken::format::coded::Planes::ALL);
        let length = (block.len() / 5) as u16;
        [&[width][..], &length.to_le_bytes(), frame].concat()
    };
    let examples = [example(2, &numbers), example(0, &[7; 500]), example(3, &numbers)];
    assail("a_strangers_frame", 2000, &examples, strangers::frames);
}

#[test]
fn a_strangers_pack_header_is_what_is_written_or_refused() {
    let jsons = examples("objects/").into_iter().map(|bytes| {
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8..end].to_vec()
    });
    assail(
        "a_strangers_pack",
        2000,
        &jsons.collect::<Vec<_>>(),
        strangers::packs,
    );
}

#[test]
fn a_strangers_journal_is_its_bytes_or_refused() {
    let start = strangers::segment_start().0.len();
    let whole = examples("journal/");
    // The run ids differ in length, so that the records are found behind the header's own length.
    let header = 16 + u32::from_le_bytes(whole[0][12..16].try_into().unwrap()) as usize + 32;
    assert!(header > start / 2);
    let records = whole.iter().map(|bytes| bytes[header + 4..].to_vec());
    let examples: Vec<_> = records.chain(whole.clone()).collect();
    assail("a_strangers_journal", 2000, &examples, strangers::journals);
}

#[test]
fn a_strangers_certificate_is_read_or_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("run");
    let run = Run::open(&path, &Options::default()).unwrap();
    run.begin().unwrap();
    train(&run, 0..=2).unwrap();
    run.close().unwrap();
    let text = unbroken::certificate::certify(&path, "2026-11-23T10:00:00Z").unwrap();
    let examples = [text.to_text().into_bytes()];
    assail(
        "a_strangers_certificate",
        2000,
        &examples,
        strangers::certificates,
    );
}

#[test]
fn a_strangers_directory_opens_or_says_what_is_wrong() {
    let examples: Vec<_> = example_files().into_iter().map(|(_, bytes)| bytes).collect();
    assail("a_strangers_directory", 300, &examples, strangers::directories);
}

#[test]
fn a_value_that_would_take_more_memory_than_its_budget_is_refused_before_it_does() {
    // Sixteen million lists of nothing in sixteen megabytes; tensors of 64 dimensions; more values than bytes.
    let head = |sort: u8, count: u32| [vec![sort << 5 | 0x1a], count.to_be_bytes().to_vec()].concat();
    let count: u32 = (1 << 24) - 2;
    let wide = Value::from(Tensor {
        dtype: "x".to_owned(),
        shape: vec![1; 64],
        strides: vec![1; 64],
        offset: 0,
        storage: 0,
        device: "x".to_owned(),
        attrs: Vec::new(),
    });
    let wide = value::encode(&wide).unwrap();
    let many: u32 = 1_000_000;
    let cases = [
        ("lists", [head(4, count), vec![0x80; count as usize]].concat()),
        ("tensors", [head(4, many), wide.repeat(many as usize)].concat()),
        ("a promise", [head(4, count), vec![0xf6; (1 << 24) + 5]].concat()),
    ];
    for (name, bytes) in cases {
        let (outcome, memory) = memory_of(|| value::decode(&bytes));
        assert!(
            matches!(outcome, Err(Flaw::Limit { .. })),
            "{name}: {:?}",
            outcome.map(drop)
        );
        assert!(memory <= MAX_MEMORY + SMALL, "{name}: {memory} bytes");
    }
}

/// A run on disk with steps 0 to 2, closed.
fn on_disk(path: &Path) {
    let run = Run::open(path, &Options::default()).unwrap();
    run.begin().unwrap();
    train(&run, 0..=2).unwrap();
    run.close().unwrap();
}

fn make_pipe(path: &Path) {
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        name,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
}

#[test]
fn links_pipes_devices_and_holes_in_a_strangers_directory_lead_nowhere_and_hang_nothing() {
    // Each kind of trap in the place of each kind of file, and in each directory under a name that would be looked at. The
    // secret outside must not be read as ours, written to, or removed.
    type Trap = fn(&Path, &Path);
    let traps: [(&str, Trap); 7] = [
        ("a link to a file", |path, outside| {
            symlink(outside.join("secret"), path).unwrap()
        }),
        ("a link to a directory", |path, outside| {
            symlink(outside, path).unwrap()
        }),
        ("a link to a device", |path, _| {
            symlink("/dev/zero", path).unwrap()
        }),
        ("a link to itself", |path, _| {
            symlink(path.file_name().unwrap(), path).unwrap()
        }),
        ("a pipe", |path, _| make_pipe(path)),
        ("a file with a hole of 200 megabytes", |path, _| {
            std::fs::File::create(path).unwrap().set_len(200 << 20).unwrap()
        }),
        ("a file with a hole of a terabyte", |path, _| {
            let file = std::fs::File::create(path).unwrap();
            // Where the file system holds none that large, as much as it can.
            drop(file.set_len(1 << 40).or_else(|_| file.set_len(1 << 34)));
        }),
    ];
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), b"secret").unwrap();
    for (kind, trap) in traps {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("run");
        on_disk(&path);
        let name_in = |dir: &str| {
            let mut names: Vec<_> = std::fs::read_dir(path.join(dir)).unwrap().collect();
            names.sort_by_key(|entry| entry.as_ref().unwrap().file_name());
            names.pop().unwrap().unwrap().path()
        };
        let digest = Digest::of(b"").short();
        let places = [
            name_in("checkpoints"),
            name_in("objects"),
            name_in("journal"),
            path.join("run.toml"),
            path.join("lock"),
            path.join(format!("checkpoints/000000009-0-{digest}")),
            path.join(format!("tmp/{}.tmp", "0".repeat(32))),
            path.join(format!("objects/{}.safetensors", "0".repeat(32))),
            path.join("journal/000009.journal"),
            path.join("checkpoints"),
            path.join("objects"),
            path.join("journal"),
        ];
        for at in places {
            let story = format!("{kind} at {}", at.display());
            let aside = place.path().join("aside");
            let was_there = std::fs::rename(&at, &aside).is_ok();
            trap(&at, outside.path());
            let (_, memory) = memory_of(|| {
                if let Ok(run) = Run::open(&path, &Options::default()) {
                    if let Some(checkpoint) = run.resumed_from() {
                        assert_exact(checkpoint);
                    }
                    drop(run.begin());
                    drop(commit_at(&run, 9));
                }
                drop(read_checkpoint(&path).map(|checkpoint| assert_exact(&checkpoint)));
                drop(read_run(&path).map(|overview| overview.checkpoints.len()));
                drop(read_journal(&path));
            });
            assert!(memory < 64 << 20, "{story}: {memory} bytes of memory");
            let left: Vec<_> = std::fs::read_dir(outside.path()).unwrap().collect();
            assert_eq!(left.len(), 1, "{story}");
            assert_eq!(
                std::fs::read(outside.path().join("secret")).unwrap(),
                b"secret",
                "{story}"
            );
            drop(std::fs::remove_file(&at));
            if was_there {
                drop(std::fs::remove_dir_all(&at));
                std::fs::rename(&aside, &at).unwrap();
            }
        }
        std::fs::File::create(path.join("tmp/a"))
            .unwrap()
            .write_all(b"x")
            .unwrap();
        let run = Run::open(&path, &Options::default()).unwrap();
        assert!(resumed_step(&run).is_some(), "{kind}");
    }
}
