//! Memory on huge pages, for copies of a state and for what goes to the disk past the page cache.
//!
//! Touches: its own mapping. Fresh memory costs more than the copy that it is for, so an arena is kept and used again.

use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags};

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
    /// Maps at least `length` bytes.
    ///
    /// # Errors
    ///
    /// Those of the operating system where there is no such address space.
    pub fn new(length: usize) -> io::Result<Arena> {
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
        let arena = Arena {
            mapping,
            mapped,
            start,
            length,
        };
        #[cfg(target_os = "linux")]
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontFork] {
            // Only advice: without huge pages everything works, at half the speed.
            // SAFETY: neither changes what this process reads there; a fork never looks at it.
            let _ = unsafe { rustix::mm::madvise(start.as_ptr().cast(), length, advice) };
        }
        Ok(arena)
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
