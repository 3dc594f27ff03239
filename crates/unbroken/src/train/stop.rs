//! Stop requests: a signal becomes a flag, and the flag is read at boundaries.
//!
//! Touches: the process's handlers of SIGTERM, SIGINT and SIGUSR1, from `install` on. Once the training is dropped they
//! do again what they do by default.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

use crate::error::{Error, Result};

const NAMES: [(i32, &str); 3] = [(SIGTERM, "SIGTERM"), (SIGINT, "SIGINT"), (SIGUSR1, "SIGUSR1")];

/// Which stop signal came, if one did.
#[derive(Debug, Default)]
pub(super) struct Stop {
    /// 0, or a signal's place in `NAMES` plus one.
    flag: Arc<AtomicUsize>,
    /// Whether nobody reads the flag any more.
    over: Arc<AtomicBool>,
}

impl Stop {
    /// From here on the signals raise the flag and do nothing else.
    pub(super) fn install(&self) -> Result<()> {
        for (place, (signal, name)) in NAMES.iter().enumerate() {
            // In this order: a signal that nobody would read ends the process before it is noted.
            flag::register_conditional_default(*signal, Arc::clone(&self.over))
                .and_then(|_| flag::register_usize(*signal, Arc::clone(&self.flag), place + 1))
                .map_err(|error| Error::Unsupported {
                    what: format!("a handler for {name} ({error})"),
                })?;
        }
        Ok(())
    }

    /// Does what a signal would, by its place in `NAMES`.
    #[cfg(test)]
    pub(super) fn request(&self, place: usize) {
        self.flag.store(place + 1, Ordering::Relaxed);
    }

    /// Name of the signal that came.
    pub(super) fn reason(&self) -> Option<&'static str> {
        self.flag
            .load(Ordering::Relaxed)
            .checked_sub(1)
            .map(|place| NAMES[place].1)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
