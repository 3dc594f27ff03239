//! Work on several threads: reading, hashing, coding many things, or two things at once.
//!
//! Touches: nothing of its own.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Result;

/// Below this many bytes, starting threads costs more than it gains.
const WORTH_THREADS: u64 = 4 << 20;
/// Most threads that work.
const MAX_THREADS: usize = 8;
/// As many reads are under way at least, however few cores there are.
const IN_FLIGHT: usize = 4;

/// Does `work` on each item, on several threads if `total_bytes` is worth it. The first error stops the rest. Each thread
/// has memory of its own, which its next item finds as the last one left it.
pub(super) fn each_in_parallel<S: Default, T: Send>(
    total_bytes: u64,
    items: Vec<T>,
    work: impl Fn(&mut S, T) -> Result<()> + Sync,
) -> Result<()> {
    if total_bytes < WORTH_THREADS || items.len() < 2 {
        let mut scratch = S::default();
        return items.into_iter().try_for_each(|item| work(&mut scratch, item));
    }
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = cores.clamp(IN_FLIGHT, MAX_THREADS).min(items.len());
    let items = Mutex::new(items.into_iter());
    let failed = AtomicBool::new(false);
    let take_turns = || {
        let mut scratch = S::default();
        while !failed.load(Ordering::Relaxed) {
            let Some(item) = items.lock().expect("nothing panics with it").next() else {
                break;
            };
            if let Err(error) = work(&mut scratch, item) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(take_turns)).collect();
        let own = take_turns();
        helpers.into_iter().fold(own, |outcome, helper| {
            let theirs = helper
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.and(theirs)
        })
    })
}

/// Does two things and returns what came of both: at once, the first one on a thread of its own, if that pays.
pub(super) fn both<A: Send, B>(
    pays: bool,
    first: impl FnOnce() -> A + Send,
    second: impl FnOnce() -> B,
) -> (A, B) {
    if !pays {
        return (first(), second());
    }
    std::thread::scope(|scope| {
        let helper = scope.spawn(first);
        let own = second();
        let theirs = helper
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (theirs, own)
    })
}
