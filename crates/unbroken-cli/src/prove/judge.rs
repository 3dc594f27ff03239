//! What two directories of runs say of each other: equal to the last bit, or where they part and why.
//!
//! Touches: run directories, read only, without their locks.

use std::fs;
use std::path::Path;

use unbroken::cause::{self, Cause, Leaf, Situation};
use unbroken::format::journal::SegmentHeader;
use unbroken::journal::{Boundary, Event, Journal};
use unbroken::localise::{self, Outcome, Parting};
use unbroken::run::{Overview, read_journal, read_run};
use unbroken::{Error, Value};

/// One run on disk, read.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) name: String,
    pub(crate) journal: Journal,
    pub(crate) overview: Overview,
}

impl Recorded {
    /// The runs of a trial, by name.
    pub(crate) fn all(runs: &Path, steps: Option<u64>) -> Result<Vec<Recorded>, Error> {
        let Ok(entries) = fs::read_dir(runs) else {
            return Ok(Vec::new());
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().join("run.toml").is_file())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
            .into_iter()
            .map(|name| Recorded::open(&runs.join(&name), name, steps))
            .collect()
    }

    pub(crate) fn open(path: &Path, name: String, steps: Option<u64>) -> Result<Recorded, Error> {
        let mut journal = read_journal(path)?;
        if let Some(steps) = steps {
            // A life that is resumed at the last step to prove goes one further before it stops.
            journal
                .boundaries
                .retain(|boundary| boundary.step < steps || (boundary.step, boundary.phase) == (steps, 0));
        }
        Ok(Recorded {
            name,
            journal,
            overview: read_run(path)?,
        })
    }

    /// Boundaries that more than one life recorded.
    pub(crate) fn executed_again(&self) -> usize {
        self.journal
            .boundaries
            .iter()
            .filter(|boundary| boundary.lives.len() > 1)
            .count()
    }

    /// Steps of the checkpoints that later lives started from.
    pub(crate) fn resumed_at(&self) -> Vec<u64> {
        self.journal
            .lives
            .iter()
            .filter(|life| is_resumed(life))
            .map(|life| life.step)
            .collect()
    }
}

/// Whether a life went on with what an earlier one had trained.
fn is_resumed(life: &SegmentHeader) -> bool {
    life.life > 1 && (life.step, life.phase) != (0, 0)
}

/// Where and how a run differs from what was expected of it.
#[derive(Clone, Debug)]
pub(crate) struct Difference {
    pub(crate) run: String,
    pub(crate) parting: Option<Parting>,
    /// Step of the checkpoint that the life in question started from; `None` for the first life.
    pub(crate) resumed_at: Option<u64>,
    /// Differences other than a component's: a boundary too few, a state that differs at the end.
    pub(crate) words: String,
    pub(crate) cause: Option<Cause>,
    /// What the closer look found.
    pub(crate) restored: Vec<Leaf>,
    pub(crate) leaves: Vec<Leaf>,
    /// What the closer look could not do, for people.
    pub(crate) note: Option<String>,
}

impl Difference {
    fn other(run: &str, words: impl Into<String>) -> Difference {
        Difference {
            run: run.to_owned(),
            parting: None,
            resumed_at: None,
            words: words.into(),
            cause: None,
            restored: Vec::new(),
            leaves: Vec::new(),
            note: None,
        }
    }

    pub(crate) fn summary(&self) -> String {
        match &self.parting {
            Some(parting) => format!(
                "differs at {} in {}",
                boundary_words(parting.step, parting.phase),
                parting.component
            ),
            None => self.words.clone(),
        }
    }
}

pub(crate) fn boundary_words(step: u64, phase: u8) -> String {
    match phase {
        1 => format!("step {step}, after the epoch's work"),
        2 => format!("step {step}, finished"),
        _ => format!("step {step}"),
    }
}

/// Compares a trial's runs with the reference's: journals, then events, then the final states.
///
/// # Errors
///
/// Where a run or the bytes of a checkpoint cannot be read.
pub(crate) fn compare(expected: &[Recorded], found: &[Recorded]) -> Result<Option<Difference>, Error> {
    for old in expected {
        let Some(new) = found.iter().find(|new| new.name == old.name) else {
            return Ok(Some(Difference::other(
                &old.name,
                format!("the run `{}` was not made", old.name),
            )));
        };
        if let Some(difference) = compare_runs(old, new)? {
            return Ok(Some(difference));
        }
    }
    let extra = found
        .iter()
        .find(|new| expected.iter().all(|old| old.name != new.name));
    Ok(extra.map(|new| Difference::other(&new.name, format!("the run `{}` was not expected", new.name))))
}

/// Compares one run with another.
///
/// # Errors
///
/// Where the bytes of a checkpoint cannot be read.
pub(crate) fn compare_runs(expected: &Recorded, found: &Recorded) -> Result<Option<Difference>, Error> {
    let other = |words: String| Ok(Some(Difference::other(&found.name, words)));
    if let Some(difference) = compare_journals(expected, found) {
        return Ok(Some(difference));
    }
    if let Some(event) = found.journal.events.iter().find(|event| event.kind == "diverged") {
        return other(format!(
            "step {} came out differently when life {} executed it again, in {}",
            event.step,
            event.life,
            event_text(event, "component")
        ));
    }
    if let Some(warning) = found.journal.warnings.first() {
        return other(format!("the journal is not whole: {warning}"));
    }
    let last = |run: &Recorded| run.overview.checkpoints.last().cloned();
    match (last(expected), last(found)) {
        (Some(old), Some(new)) => {
            if let Some(leaf) = localise::compare_states(&old, &new)?.first() {
                return other(format!(
                    "the final state differs in {}: {}",
                    leaf.path,
                    localise::change_words(&leaf.change)
                ));
            }
            Ok(None)
        }
        (None, None) => Ok(None),
        _ => other("one of the two has no checkpoint".to_owned()),
    }
}

/// Compares what two runs recorded, and nothing else.
pub(crate) fn compare_journals(expected: &Recorded, found: &Recorded) -> Option<Difference> {
    let words = match localise::compare_journals(&expected.journal.boundaries, &found.journal.boundaries) {
        Outcome::Same { .. } => return None,
        Outcome::Parts(parting) => return Some(parted(expected, found, parting, &[], &[])),
        Outcome::EndsEarly {
            missing: (step, phase),
        } => {
            format!("ends before {}", boundary_words(step, phase))
        }
        Outcome::OtherBoundaries {
            expected: Some((step, phase)),
            ..
        } => {
            format!("{} is missing", boundary_words(step, phase))
        }
        Outcome::OtherBoundaries {
            expected: None,
            found,
        } => {
            let (step, phase) = found.unwrap_or_default();
            format!("{} was not expected", boundary_words(step, phase))
        }
    };
    Some(Difference::other(&found.name, words))
}

fn event_text(event: &Event, name: &str) -> String {
    match event.fields.iter().find(|(field, _)| field == name) {
        Some((_, Value::Str(text))) => text.clone(),
        _ => "an unknown component".to_owned(),
    }
}

/// Whether two runs part at this boundary in this component, and what else is known then.
fn parted(
    expected: &Recorded,
    found: &Recorded,
    parting: Parting,
    restored: &[Leaf],
    leaves: &[Leaf],
) -> Difference {
    let header = found
        .journal
        .lives
        .iter()
        .find(|life| life.life == parting.life && is_resumed(life));
    let before = parting
        .index
        .checked_sub(1)
        .and_then(|index| found.journal.boundaries.get(index));
    let place =
        |boundary: Option<&Boundary>| boundary.map_or((0, 0), |boundary| (boundary.step, boundary.phase));
    let settings = changed_settings(expected, found);
    let situation = Situation {
        phase: parting.phase,
        component: &parting.component,
        first_after_resume: header.is_some_and(|header| (header.step, header.phase) == place(before)),
        resumed: header.is_some(),
        expected: localise::window(&expected.journal.boundaries, parting.index),
        found: localise::window(&found.journal.boundaries, parting.index),
        settings: &settings,
        restored,
        leaves,
    };
    Difference {
        run: found.name.clone(),
        resumed_at: header.map(|header| header.step),
        words: String::new(),
        cause: cause::likely(&situation),
        restored: restored.to_vec(),
        leaves: leaves.to_vec(),
        note: None,
        parting: Some(parting),
    }
}

/// Settings that differ between the runs' newest checkpoints: name, expected, found.
fn changed_settings(expected: &Recorded, found: &Recorded) -> Vec<(String, String, String)> {
    let identity = |run: &Recorded| {
        run.overview
            .checkpoints
            .last()
            .map(|checkpoint| checkpoint.info().identity.clone())
            .unwrap_or_default()
    };
    let (old, new) = (identity(expected), identity(found));
    old.iter()
        .filter_map(|(name, value)| {
            let (_, other) = new.iter().find(|(other, _)| other == name)?;
            (value != other).then(|| {
                (
                    name.clone(),
                    crate::words::value(value),
                    crate::words::value(other),
                )
            })
        })
        .collect()
}

/// Looks again with the two runs repeated and their states saved at the boundary where they part.
///
/// # Errors
///
/// Where a run or the bytes of a checkpoint cannot be read.
pub(crate) fn look_closer(first: &Difference, expected: &Path, found: &Path) -> Result<Difference, Error> {
    let open = |runs: &Path| Recorded::open(&runs.join(&first.run), first.run.clone(), None);
    let (old, new) = (open(expected)?, open(found)?);
    let Outcome::Parts(parting) =
        localise::compare_journals(&old.journal.boundaries, &new.journal.boundaries)
    else {
        let note =
            "when both were repeated they did not differ: something is not deterministic, or depends on time";
        return Ok(Difference {
            note: Some(note.to_owned()),
            ..first.clone()
        });
    };
    let place = (parting.step, parting.phase);
    if first
        .parting
        .as_ref()
        .is_some_and(|first| (first.step, first.phase) != place)
    {
        let note = format!(
            "when both were repeated they differed first at {}",
            boundary_words(place.0, place.1)
        );
        return Ok(Difference {
            note: Some(note),
            ..first.clone()
        });
    }
    with_leaves(&old, &new, parting)
}

/// Adds to a difference the leaves that checkpoints at hand show.
///
/// # Errors
///
/// Where the bytes of a checkpoint cannot be read.
pub(crate) fn leaves_of(
    difference: &Difference,
    expected: &Recorded,
    found: &Recorded,
) -> Result<Difference, Error> {
    match &difference.parting {
        Some(parting) => with_leaves(expected, found, parting.clone()),
        None => Ok(difference.clone()),
    }
}

fn with_leaves(expected: &Recorded, found: &Recorded, parting: Parting) -> Result<Difference, Error> {
    let at = |run: &Recorded| {
        let mut all = run.overview.checkpoints.iter().rev();
        all.find(|checkpoint| {
            (checkpoint.info().step, checkpoint.info().phase) == (parting.step, parting.phase)
        })
        .cloned()
    };
    let leaves = match (at(expected), at(found)) {
        (Some(old), Some(new)) => localise::compare_states(&old, &new)?,
        _ => Vec::new(),
    };
    let restored = restored_leaves(found, parting.life)?;
    Ok(parted(expected, found, parting, &restored, &leaves))
}

/// Leaves in which what a life put back differs from the checkpoint it started from.
fn restored_leaves(run: &Recorded, life: u32) -> Result<Vec<Leaf>, Error> {
    let Some(header) = run
        .journal
        .lives
        .iter()
        .find(|header| header.life == life && is_resumed(header))
    else {
        return Ok(Vec::new());
    };
    let mut here = run.overview.checkpoints.iter().filter(|checkpoint| {
        (checkpoint.info().step, checkpoint.info().phase) == (header.step, header.phase)
    });
    let original = here
        .clone()
        .rev()
        .find(|checkpoint| checkpoint.info().life < life);
    let again = here.find(|checkpoint| checkpoint.info().life == life);
    match (original, again) {
        (Some(original), Some(again)) => localise::compare_states(original, again),
        _ => Ok(Vec::new()),
    }
}
