//! A full disk: what a training does about it, decided in one place.
//!
//! Touches: the clock, while it waits. What is written, and whether that worked, its callers know.

use std::thread;
use std::time::Duration;

use super::stop::Stop;
use crate::error::{Error, Result};

const POLL: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What a training does when there is no room for what it writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// It ends with the error. Make room, and start the same command again.
    #[default]
    Stop,
    /// It pauses, and tries again until there is room. A stop request ends the wait, and the training with the error.
    Wait,
    /// It goes on without, and tries again when a checkpoint is due. What the journal could not take is kept in memory and
    /// written then. A kill in the meantime costs the steps since the last checkpoint. The first checkpoint of a run and the
    /// last one of a life are never left out.
    GoOn,
}

/// What comes after a write that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The same again: there may be room now.
    Again,
    /// The training goes on without it.
    Without,
}

/// Whether the disk was full, and what is done about it.
#[derive(Debug)]
pub(super) struct FullDisk {
    policy: OnFull,
    full: bool,
    pause: Duration,
}

impl FullDisk {
    pub(super) fn new(policy: OnFull) -> FullDisk {
        FullDisk {
            policy,
            full: false,
            pause: POLL,
        }
    }

    /// Notes that the disk took what was written.
    pub(super) fn took(&mut self, notes: &mut Vec<String>) {
        if self.full {
            notes.push("there is room on the disk again".to_owned());
            *self = FullDisk::new(self.policy);
        }
    }

    /// Decides what comes after an error, and waits where that is to wait. `required`: there is no going on without it.
    ///
    /// # Errors
    ///
    /// The error itself, where it is another one, or nothing is to be done about it but to end.
    pub(super) fn refused(
        &mut self,
        error: Error,
        required: bool,
        stop: &Stop,
        notes: &mut Vec<String>,
    ) -> Result<Then> {
        let (does, then) = match self.policy {
            _ if !error.is_full() => return Err(error),
            OnFull::Stop => return Err(error),
            OnFull::GoOn if required => return Err(error),
            OnFull::GoOn => (
                "training goes on, and what is missing is written when there is room",
                Then::Without,
            ),
            OnFull::Wait => ("training waits for room", Then::Again),
        };
        if !self.full {
            self.full = true;
            notes.push(format!("{error}; {does}"));
        }
        if then == Then::Again {
            if !wait(self.pause, stop) {
                return Err(error);
            }
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        Ok(then)
    }
}

/// Waits, and tells whether nobody asked to stop meanwhile.
fn wait(pause: Duration, stop: &Stop) -> bool {
    let mut left = pause;
    while !left.is_zero() && stop.reason().is_none() {
        thread::sleep(left.min(POLL));
        left = left.saturating_sub(POLL);
    }
    stop.reason().is_none()
}
