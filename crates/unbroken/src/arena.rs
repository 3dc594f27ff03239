//! Memory: on huge pages for copies of a state and for what goes to the disk past the page cache, on ordinary ones for what
//! is filled once; copied in parallel.
//!
//! Touches: its own mappings, and what it is given to copy. Fresh memory costs more than the copy that it is for, so an
//! arena is kept and used again.

use std::io;
use std::ptr::{self, NonNull};
use std::sync::Mutex;

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Bytes that one thread copies at a time.
const COPIED: usize = 1 << 20;
/// Below this many bytes, starting threads costs more than it gains.
const WORTH_THREADS: usize = 8 << 20;
/// Most threads that copy: two or three have all of a machine's memory bandwidth.
const MAX_COPIERS: usize = 4;

/// What a huge page is on this platform, and what arenas are aligned to.
const HUGE: usize = 2 << 20;

/// Zeroed memory, aligned to 2 MiB, of a whole number of those.
#[derive(Debug)]
pub struct Arena {
    mapping: NonNull<u8>,
    mapped: usize,
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: an arena owns its memory, as a vector does.
unsafe impl Send for Arena {}
// SAFETY: through a shared reference it can only be read.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps at least `length` bytes, on huge pages where there are any.
    ///
    /// # Errors
    ///
    /// Those of the operating system where there is no such address space.
    pub fn new(length: usize) -> io::Result<Arena> {
        let arena = Arena::ordinary(length)?;
        arena.ask_for_huge_pages();
        Ok(arena)
    }

    /// Maps at least `length` bytes on pages as the system gives them: for what is filled once and given back.
    ///
    /// # Errors
    ///
    /// Those of the operating system where there is no such address space.
    pub fn ordinary(length: usize) -> io::Result<Arena> {
        let too_long = || io::Error::from(io::ErrorKind::OutOfMemory);
        let length = length
            .max(1)
            .checked_next_multiple_of(HUGE)
            .ok_or_else(too_long)?;
        let mapped = length.checked_add(HUGE).ok_or_else(too_long)?; // Room to align; untouched, it costs nothing.
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping, at an address that the kernel picks, takes nobody else's memory.
        let mapping =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), mapped, protection, MapFlags::PRIVATE) }?;
        let mapping = NonNull::new(mapping.cast::<u8>()).expect("a mapping is not at address 0");
        // SAFETY: the mapping is one huge page longer than what is used of it.
        let start = unsafe { mapping.add(mapping.align_offset(HUGE)) };
        Ok(Arena {
            mapping,
            mapped,
            start,
            length,
        })
    }

    fn ask_for_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontFork] {
            // Only advice: without huge pages everything works, at half the speed.
            // SAFETY: neither changes what this process reads there; a fork never looks at it.
            let _ = unsafe { rustix::mm::madvise(self.start.as_ptr().cast(), self.length, advice) };
        }
    }

    /// Gives the memory back while the caller goes on: taking its pages from the process takes as long as a copy.
    pub fn give_back(self) {
        let thread = std::thread::Builder::new().name("unbroken-free".to_owned());
        // Where there is no thread, it is given back here.
        let _ = thread.spawn(move || drop(self));
    }

    /// How many bytes it has.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes; it always has.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Where it begins, for those who share it and see to it that nobody reads what somebody writes.
    pub fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is readable, initialised and this arena's own; borrowing keeps writers away.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    /// Its bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, which nothing borrows any more.
        let _ = unsafe { rustix::mm::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

/// Brings in the pages behind memory that is about to be filled, all at once: half the cost of one fault a page.
///
/// Huge pages are not asked for. Clearing one costs three times as much where a hypervisor has taken the free ones
/// back, and what is filled here stays in use for long.
pub(crate) fn bring_in(memory: &mut [u8]) {
    let page = rustix::param::page_size();
    let skipped = memory.as_ptr().align_offset(page);
    let whole = memory.len().saturating_sub(skipped) / page * page;
    #[cfg(target_os = "linux")]
    if whole > 0 {
        // Where the system does not know the advice, pages come as they are touched.
        // SAFETY: a part of the slice; what is in it stays as it is.
        let _ = unsafe {
            rustix::mm::madvise(
                memory.as_mut_ptr().add(skipped).cast(),
                whole,
                Advice::LinuxPopulateWrite,
            )
        };
    }
}

/// Copies from each first to each second one, of the same length, on several threads where there is much to copy.
pub fn copy_all(copies: Vec<(&[u8], &mut [u8])>) {
    let total: usize = copies.iter().map(|(from, _)| from.len()).sum();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    if total < WORTH_THREADS || cores < 2 {
        return copies.into_iter().for_each(|(from, to)| to.copy_from_slice(from));
    }
    let pieces = copies.into_iter().flat_map(|(from, to)| {
        assert_eq!(from.len(), to.len(), "a copy is as long as what it is of");
        from.chunks(COPIED).zip(to.chunks_mut(COPIED))
    });
    let pieces = Mutex::new(pieces);
    let take_turns = || {
        loop {
            let Some((from, to)) = pieces.lock().expect("nothing panics with it").next() else {
                break;
            };
            to.copy_from_slice(from);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..cores.min(MAX_COPIERS) {
            scope.spawn(take_turns);
        }
        take_turns();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_copied_however_many_threads_do_it() {
        for lengths in [vec![0, 1, 3000], vec![5 << 20, 7, 6 << 20, 0]] {
            let from: Vec<Vec<u8>> = lengths
                .iter()
                .map(|&length| (0..length).map(|index| (index * 7 / 3) as u8).collect())
                .collect();
            let mut to: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0; length]).collect();
            let from_slices = from.iter().map(Vec::as_slice);
            copy_all(from_slices.zip(to.iter_mut().map(Vec::as_mut_slice)).collect());
            assert!(from == to);
        }
    }

    #[test]
    fn an_arena_is_aligned_zeroed_and_as_long_as_asked() {
        let mut arena = Arena::new(3 << 20).unwrap();
        assert_eq!(arena.len(), 4 << 20);
        assert_eq!(arena.bytes().as_ptr() as usize % HUGE, 0);
        assert!(arena.bytes().iter().all(|&byte| byte == 0));
        arena.bytes_mut().fill(7);
        assert!(arena.bytes().iter().all(|&byte| byte == 7));
        assert!(Arena::new(usize::MAX).is_err());
    }

    #[test]
    fn an_arena_that_is_given_back_is_unmapped() {
        let mut arena = Arena::ordinary(64 << 20).unwrap();
        arena.bytes_mut().fill(7);
        let (start, length) = (arena.start.addr().get(), arena.len());
        arena.give_back();
        // Nobody says when: the kernel is asked until nothing is mapped there any more.
        let is_mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
            maps.lines().any(|line| {
                let (first, rest) = line.split_once('-').expect("a range");
                let last = rest.split(' ').next().expect("its end");
                let parse = |text| usize::from_str_radix(text, 16).expect("an address");
                parse(first) < start + length && parse(last) > start
            })
        };
        while is_mapped() {
            std::thread::yield_now();
        }
    }
}
