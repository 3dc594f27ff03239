//! When to save: a decision as plain data.
//!
//! Touches: nothing. Clocks are passed in.

use std::time::Duration;

/// When a boundary becomes a checkpoint. Any of the conditions that is met suffices.
///
/// Step 0, a stop request and the end of the run are always checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// After each multiple of this many steps.
    pub every_steps: Option<u64>,
    /// At the first boundary this long after the last checkpoint was durable.
    pub every: Option<Duration>,
    /// When an epoch's after-work is done.
    pub epoch_ends: bool,
}

impl Default for Policy {
    /// Once a minute, and at epoch ends.
    fn default() -> Policy {
        Policy {
            every_steps: None,
            every: Some(Duration::from_secs(60)),
            epoch_ends: true,
        }
    }
}

impl Policy {
    /// After each multiple of this many steps, and at epoch ends.
    pub fn every_steps(steps: u64) -> Policy {
        Policy {
            every_steps: Some(steps),
            every: None,
            epoch_ends: true,
        }
    }

    /// At the first boundary this long after the last checkpoint was durable, and at epoch ends.
    pub fn every(time: Duration) -> Policy {
        Policy {
            every_steps: None,
            every: Some(time),
            epoch_ends: true,
        }
    }

    /// The same without epoch ends.
    pub fn not_at_epoch_ends(self) -> Policy {
        Policy {
            epoch_ends: false,
            ..self
        }
    }

    /// Whether the boundary (step, phase) is to be saved, this long after the last commit.
    pub(super) fn due(&self, step: u64, phase: u8, since_last: Duration) -> bool {
        (phase == 1 && self.epoch_ends)
            || (phase == 0
                && self
                    .every_steps
                    .is_some_and(|steps| steps > 0 && step.is_multiple_of(steps)))
            || self.every.is_some_and(|time| since_last >= time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boundary_is_due_by_steps_time_or_epoch_end() {
        let (soon, late) = (Duration::from_secs(1), Duration::from_secs(61));
        let steps = Policy::every_steps(50);
        assert!(steps.due(100, 0, soon) && !steps.due(101, 0, late));
        assert!(steps.due(101, 1, soon) && !steps.not_at_epoch_ends().due(100, 1, soon));
        assert!(Policy::default().due(7, 0, late) && !Policy::default().due(7, 0, soon));
    }
}
