//! Direct transfers with four under way: as four threads make them, and as io_uring does on one thread.
//!
//!     direct_io DIRECTORY [ROUNDS]
//!
//! Touches: two files of 1 GB in the directory, removed at the end; 1 GB of memory on huge pages. Each round does every
//! way once, in another order than the last; what is printed are ratios within a round, and processor time of all threads,
//! the kernel's own for this process among them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use unbroken::arena::Arena;

const LENGTH: usize = 1 << 30;
const IN_FLIGHT: usize = 4;
const ROUNDS: usize = 11;

/// Who makes the transfers.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Four threads, a `pread` or `pwrite` at a time each.
    Threads,
    /// One thread, four entries in a ring.
    Ring,
    /// The same, the memory made known to the kernel before.
    Registered,
}

const WAYS: [Way; 3] = [Way::Threads, Way::Ring, Way::Registered];

/// What is transferred.
#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    piece: usize,
    reads: bool,
    /// Into a file whose blocks were set aside and never written.
    fresh: bool,
}

/// The pieces are those of the engine: it writes 4 MiB at a time and reads 1 MiB.
const WORKS: [Work; 4] = [
    Work {
        name: "write, blocks written before",
        piece: 4 << 20,
        reads: false,
        fresh: false,
    },
    Work {
        name: "write, blocks set aside",
        piece: 4 << 20,
        reads: false,
        fresh: true,
    },
    Work {
        name: "read, 4 MiB at a time",
        piece: 4 << 20,
        reads: true,
        fresh: false,
    },
    Work {
        name: "read, 1 MiB at a time",
        piece: 1 << 20,
        reads: true,
        fresh: false,
    },
];

/// What one transfer took.
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    processor: f64,
}

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let Some(directory) = arguments.next() else {
        return Err(io::Error::other("direct_io DIRECTORY [ROUNDS]"));
    };
    let rounds = arguments
        .next()
        .map_or(Ok(ROUNDS), |text| text.parse())
        .map_err(io::Error::other)?;
    let (old, fresh) = (
        Path::new(&directory).join("direct_io.old"),
        Path::new(&directory).join("direct_io.new"),
    );
    let outcome = measure(&old, &fresh, rounds);
    for path in [&old, &fresh] {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    outcome
}

fn measure(old: &Path, fresh: &Path, rounds: usize) -> io::Result<()> {
    let mut memory = Arena::new(LENGTH)?;
    fill(memory.bytes_mut(), 0);
    let mut plain = IoUring::new(IN_FLIGHT as u32)?;
    let mut registered = IoUring::new(IN_FLIGHT as u32)?;
    let begun = Instant::now();
    register(&registered, memory.bytes_mut())?;
    println!("registering 1 GB: {:.1} ms", begun.elapsed().as_secs_f64() * 1e3);

    let file = create(old)?;
    transfer(Way::Threads, &WORKS[0], &file, memory.bytes_mut(), &mut plain)?;
    file.sync_all()?;
    for work in WORKS {
        let mut costs: [Vec<Cost>; 3] = Default::default();
        for round in 0..rounds {
            for turn in 0..WAYS.len() {
                let which = (round + turn) % WAYS.len();
                let ring = if WAYS[which] == Way::Registered {
                    &mut registered
                } else {
                    &mut plain
                };
                let file = if work.fresh { &create(fresh)? } else { &file };
                if !work.reads {
                    fill(memory.bytes_mut(), round * WAYS.len() + turn + 1);
                }
                let (begun, before) = (Instant::now(), processor_time()?);
                transfer(WAYS[which], &work, file, memory.bytes_mut(), ring)?;
                if !work.reads {
                    file.sync_data()?;
                }
                costs[which].push(Cost {
                    wall: begun.elapsed().as_secs_f64(),
                    processor: (processor_time()? - before).as_secs_f64(),
                });
                if work.fresh {
                    std::fs::remove_file(fresh)?;
                }
            }
        }
        report(&work, &costs);
    }
    Ok(())
}

fn report(work: &Work, costs: &[Vec<Cost>; 3]) {
    let [threads, plain, registered] = costs;
    let quarters_of = |found: &[Cost], of: fn(&Cost) -> f64| quarters(found.iter().map(of).collect());
    println!("{}", work.name);
    println!(
        "  threads          {} s a GB, {} s of processor",
        quarters_of(threads, |cost| cost.wall),
        quarters_of(threads, |cost| cost.processor)
    );
    for (name, ring) in [("ring", plain), ("ring, registered", registered)] {
        let ratios = ring
            .iter()
            .zip(threads)
            .map(|(ring, threads)| ring.wall / threads.wall);
        println!(
            "  {name:16} {} times the threads' wall time, {} s of processor",
            quarters(ratios.collect()),
            quarters_of(ring, |cost| cost.processor)
        );
    }
}

/// Lower quarter, median, upper quarter.
fn quarters(mut found: Vec<f64>) -> String {
    found.sort_by(f64::total_cmp);
    let at = |part: usize| found[(found.len() - 1) * part / 4];
    format!("{:.2} {:.2} {:.2}", at(1), at(2), at(3))
}

/// Makes a file whose blocks are set aside, for direct transfers.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    // SAFETY: a plain call on a descriptor that is open.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, LENGTH as i64) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes that no two pages and no two rounds have in common.
fn fill(memory: &mut [u8], round: usize) {
    for (page, bytes) in memory.chunks_mut(4096).enumerate() {
        let number = (round << 40 | page) as u64;
        bytes[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
}

fn processor_time() -> io::Result<Duration> {
    let mut found = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the structure that it is given.
    let found = unsafe {
        if libc::getrusage(libc::RUSAGE_SELF, found.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        found.assume_init()
    };
    let time = |of: libc::timeval| Duration::new(of.tv_sec as u64, of.tv_usec as u32 * 1000);
    Ok(time(found.ru_utime) + time(found.ru_stime))
}

fn register(ring: &IoUring, memory: &mut [u8]) -> io::Result<()> {
    let region = libc::iovec {
        iov_base: memory.as_mut_ptr().cast(),
        iov_len: memory.len(),
    };
    // SAFETY: the memory outlives the ring's last use of it: both are dropped where `measure` ends.
    unsafe { ring.submitter().register_buffers(&[region]) }
}

fn transfer(way: Way, work: &Work, file: &File, memory: &mut [u8], ring: &mut IoUring) -> io::Result<()> {
    match way {
        Way::Threads => by_threads(work, file, memory),
        Way::Ring => by_ring(work, file, memory, ring, false),
        Way::Registered => by_ring(work, file, memory, ring, true),
    }
}

fn by_threads(work: &Work, file: &File, memory: &mut [u8]) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let start = memory.as_mut_ptr().expose_provenance();
    let take_turns = || -> io::Result<()> {
        loop {
            let at = next.fetch_add(work.piece, Ordering::Relaxed);
            if at >= LENGTH {
                return Ok(());
            }
            // SAFETY: each piece is inside the memory and is one thread's.
            let done = unsafe {
                let piece = std::ptr::with_exposed_provenance_mut::<libc::c_void>(start + at);
                if work.reads {
                    libc::pread(file.as_raw_fd(), piece, work.piece, at as i64)
                } else {
                    libc::pwrite(file.as_raw_fd(), piece, work.piece, at as i64)
                }
            };
            whole(done as i64, work)?;
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..IN_FLIGHT).map(|_| scope.spawn(take_turns)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("nothing panics there"))
    })
}

fn by_ring(
    work: &Work,
    file: &File,
    memory: &mut [u8],
    ring: &mut IoUring,
    registered: bool,
) -> io::Result<()> {
    let descriptor = types::Fd(file.as_raw_fd());
    let entry = |at: usize| {
        let (piece, length, offset) = (memory[at..].as_ptr().cast_mut(), work.piece as u32, at as u64);
        match (work.reads, registered) {
            (true, false) => opcode::Read::new(descriptor, piece, length)
                .offset(offset)
                .build(),
            (true, true) => opcode::ReadFixed::new(descriptor, piece, length, 0)
                .offset(offset)
                .build(),
            (false, false) => opcode::Write::new(descriptor, piece, length)
                .offset(offset)
                .build(),
            (false, true) => opcode::WriteFixed::new(descriptor, piece, length, 0)
                .offset(offset)
                .build(),
        }
    };
    let (mut next, mut under_way, mut outcome) = (0, 0, Ok(()));
    // After an error too, what is under way comes back before anybody has the memory again.
    while (next < LENGTH && outcome.is_ok()) || under_way > 0 {
        while next < LENGTH && under_way < IN_FLIGHT && outcome.is_ok() {
            // SAFETY: file and memory stay until all that is under way has come back.
            unsafe { ring.submission().push(&entry(next)) }.expect("there is room for as many");
            next += work.piece;
            under_way += 1;
        }
        ring.submit_and_wait(1)?;
        for done in ring.completion() {
            outcome = outcome.and(whole(i64::from(done.result()), work));
            under_way -= 1;
        }
    }
    outcome
}

/// Refuses a transfer that was cut short: on a file that is as long, none is.
fn whole(done: i64, work: &Work) -> io::Result<()> {
    match usize::try_from(done) {
        Ok(done) if done == work.piece => Ok(()),
        Ok(done) => Err(io::Error::other(format!("{done} bytes of {}", work.piece))),
        Err(_) => Err(io::Error::other(format!("a transfer failed: {done}"))),
    }
}
