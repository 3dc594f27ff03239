//! A changed environment on trial: which recorded steps are executed again under it before anything new is trained.
//!
//! Touches: nothing. The plan is a pure function of what the checkpoints and the journal say.

use crate::journal::Boundary;
use crate::state::Value;
use crate::store::CheckpointInfo;

/// What a life executes again, under a journal that holds it already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// Boundary of the checkpoint that it starts from.
    pub from: (u64, u8),
    /// The last boundary that it is compared at.
    pub until: (u64, u8),
}

/// How much is executed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// As many steps as this are wanted; fewer are taken where there are no more.
    pub least: u64,
    /// More steps than this are not.
    pub most: u64,
}

/// Chooses the checkpoint to start from: the newest that the journal holds enough steps behind.
///
/// Those are eligible that were made under the settings and the environment of the newest, and behind which the journal
/// has each step.
///
/// # Arguments
///
/// * `checkpoints`: The run's, newest first.
/// * `boundaries`: The joined journal.
///
/// Returns an index into the checkpoints, and the trial; `None` where nothing can be tried.
pub(crate) fn plan(
    checkpoints: &[CheckpointInfo],
    boundaries: &[Boundary],
    extent: Extent,
) -> Option<(usize, Trial)> {
    let newest = checkpoints.first()?;
    let last = boundaries.last()?;
    let until = (last.step, last.phase);
    if until < (newest.step, newest.phase) {
        return None; // The journal has lost what lies before the newest.
    }
    let mut best = None;
    for (index, info) in checkpoints.iter().enumerate() {
        let steps = last.step.saturating_sub(info.step);
        let alike = agree(&info.identity, &newest.identity) && agree(&info.environment, &newest.environment);
        if steps > extent.most || !alike || !holds_each(boundaries, info.step, last.step) {
            break;
        }
        if steps > 0 && info.phase < 2 {
            let from = (info.step, info.phase);
            best = Some((index, Trial { from, until }));
        }
        if steps >= extent.least {
            break;
        }
    }
    best
}

/// Whether nothing that both name differs.
fn agree(old: &[(String, Value)], new: &[(String, Value)]) -> bool {
    old.iter().all(|(name, value)| {
        let other = new.iter().find(|(other, _)| other == name);
        other.is_none_or(|(_, other)| other == value)
    })
}

/// Whether each step after `from` up to `last` was recorded.
fn holds_each(boundaries: &[Boundary], from: u64, last: u64) -> bool {
    let inside = |boundary: &&Boundary| boundary.phase == 0 && boundary.step > from && boundary.step <= last;
    boundaries.iter().filter(inside).count() as u64 == last - from
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn info(step: u64, torch: &str) -> CheckpointInfo {
        CheckpointInfo {
            step,
            phase: 0,
            name: step.to_string(),
            path: std::path::PathBuf::new(),
            run_id: String::new(),
            life: 1,
            created: String::new(),
            metrics: Vec::new(),
            environment: vec![("torch".to_owned(), Value::Str(torch.to_owned()))],
            identity: Vec::new(),
            pinned: false,
            journal_head: Digest([0; 32]),
            size_bytes: 0,
            new_bytes: 0,
        }
    }

    fn checkpoints(steps: &[u64]) -> Vec<CheckpointInfo> {
        steps.iter().map(|step| info(*step, "2.14")).collect()
    }

    fn journal(steps: impl Iterator<Item = u64>) -> Vec<Boundary> {
        let boundary = |step| Boundary {
            step,
            phase: 0,
            epoch: 0,
            position: 0,
            components: vec![],
            lives: vec![1],
        };
        steps.map(boundary).collect()
    }

    fn start(checkpoints: &[CheckpointInfo], journal: &[Boundary]) -> Option<u64> {
        let extent = Extent { least: 10, most: 100 };
        plan(checkpoints, journal, extent).map(|(index, trial)| {
            assert_eq!(trial.from.0, checkpoints[index].step);
            trial.from.0
        })
    }

    #[test]
    fn what_a_kill_left_behind_the_newest_checkpoint_is_enough_if_it_is_long_enough() {
        assert_eq!(start(&checkpoints(&[100, 80]), &journal(1..=112)), Some(100));
        assert_eq!(start(&checkpoints(&[100, 80]), &journal(1..=109)), Some(80));
        assert_eq!(
            start(&checkpoints(&[100, 95, 80, 60]), &journal(1..=100)),
            Some(80)
        );
    }

    #[test]
    fn where_there_is_little_as_much_as_there_is_is_tried() {
        assert_eq!(start(&checkpoints(&[100, 97]), &journal(1..=100)), Some(97));
        assert_eq!(start(&checkpoints(&[100]), &journal(1..=103)), Some(100));
        assert_eq!(start(&checkpoints(&[100]), &journal(1..=100)), None);
        assert_eq!(start(&checkpoints(&[]), &journal(1..=3)), None);
        assert_eq!(start(&checkpoints(&[100]), &journal(1..=90)), None);
    }

    #[test]
    fn a_trial_is_bounded_and_needs_every_step() {
        assert_eq!(start(&checkpoints(&[500, 300]), &journal(1..=500)), None);
        let gap = journal((1..=90).chain(92..=100));
        assert_eq!(start(&checkpoints(&[100, 95, 80]), &gap), Some(95));
    }

    #[test]
    fn steps_of_another_environment_are_not_tried() {
        let mut all = checkpoints(&[100, 95]);
        all.push(info(80, "2.13"));
        assert_eq!(start(&all, &journal(1..=100)), Some(95));
    }
}
