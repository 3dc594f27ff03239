//! `unbroken diff`: the first boundary and component where two runs part, or the leaves in which two checkpoints do.
//!
//! Touches: two run directories, read only, without their locks.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value as Json, json};
use unbroken::cause::{Change, Leaf};
use unbroken::localise::{self, Outcome, State, change_words, compare_states};
use unbroken::run;
use unbroken::store::Checkpoint;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::arguments::Diff;
use crate::list::phase_words;
use crate::prove::judge::{self, Recorded};
use crate::target::{self, Target};
use crate::words::{count, line};

pub(crate) fn run(command: &Diff, streams: &mut Streams) -> Answer {
    let names_one = |text: &str| {
        let target = Target::parse(text);
        target.step.is_some() || target.path.is_file()
    };
    if names_one(&command.expected) != names_one(&command.found) {
        return Err(Failure::new("one side names a checkpoint and the other a run")
            .hint("give a step on both sides (RUN@STEP RUN@STEP), or on neither"));
    }
    let sides = (
        Side::open(&command.expected, streams)?,
        Side::open(&command.found, streams)?,
    );
    match (sides.0.place, sides.1.place) {
        (Some(old), Some(new)) => diff_states(command, (&sides.0, &sides.1), (old, new), None, streams),
        _ => diff_runs(command, &sides.0, &sides.1, streams),
    }
}

/// A run, or one of its checkpoints.
struct Side {
    run: Recorded,
    place: Option<(u64, u8)>,
    /// A manifest's own path, wherever it lies.
    manifest: Option<Checkpoint>,
}

impl Side {
    fn open(text: &str, streams: &mut Streams) -> Result<Side, Failure> {
        let target = Target::parse(text);
        if target.step.is_none() && target.path.is_file() {
            let checkpoint = run::read_checkpoint(&target.path)?;
            let info = checkpoint.info();
            let above = info
                .path
                .parent()
                .and_then(Path::parent)
                .unwrap_or(Path::new("."));
            let run = Recorded::open(above, text.to_owned(), None)?;
            let place = Some((info.step, info.phase));
            return Ok(Side {
                run,
                place,
                manifest: Some(checkpoint),
            });
        }
        let run = Recorded::open(&target.path, target.path.display().to_string(), None)?;
        let place = match target.step {
            None => None,
            Some(step) => Some(place_of(&run, &target, step, streams)?),
        };
        Ok(Side {
            run,
            place,
            manifest: None,
        })
    }

    fn state(&self, place: (u64, u8)) -> Result<State<'_>, Failure> {
        if let Some(checkpoint) = &self.manifest {
            return Ok(judge::state_of(checkpoint, &self.run.story)?);
        }
        let state = self.run.state(place, |_| true)?;
        state.ok_or_else(|| Failure::new(format!("the leaves of {} are not recorded", boundary(place))))
    }
}

/// The boundary of a step that has a checkpoint, or had one whose leaves the journal tells.
fn place_of(run: &Recorded, target: &Target, step: u64, streams: &mut Streams) -> Result<(u64, u8), Failure> {
    let info = |checkpoint: &Checkpoint| (checkpoint.info().step, checkpoint.info().phase);
    let held = run
        .overview
        .checkpoints
        .iter()
        .rev()
        .map(info)
        .find(|place| place.0 == step);
    if let Some(place) = held {
        return Ok(place);
    }
    if let Some(place) = run.saved_places().into_iter().rev().find(|place| place.0 == step) {
        streams.note(
            "note",
            &format!(
                "the checkpoint of step {step} is not whole or no longer there; the journal has its digests"
            ),
        );
        return Ok(place);
    }
    Err(target::missing(target, step, &run.overview))
}

fn diff_runs(command: &Diff, expected: &Side, found: &Side, streams: &mut Streams) -> Answer {
    for run in [&expected.run, &found.run] {
        for warning in run.flaws() {
            streams.note("warning", &format!("{}: {warning}", run.name));
        }
    }
    let compared = localise::compare_journals(expected.run.boundaries(), found.run.boundaries())?;
    let nothing = ("a record".to_owned(), "no record".to_owned());
    let (at, component, was, is) = match compared.outcome {
        Outcome::Same => {
            let journal = compared.last_equal.map(|last| (compared.equal, last));
            let common = newest_common(&expected.run, &found.run);
            return match common {
                Some(place) => diff_states(command, (expected, found), (place, place), journal, streams),
                None => same(command, "runs", compared.equal, compared.last_equal, streams),
            };
        }
        Outcome::Parts(parting) => {
            let or_nothing = |text: String| {
                if text.is_empty() {
                    "nothing".to_owned()
                } else {
                    text
                }
            };
            let at = (parting.step, parting.phase);
            (
                at,
                parting.component,
                or_nothing(parting.expected),
                or_nothing(parting.found),
            )
        }
        Outcome::EndsEarly { missing } => (missing, "boundary".to_owned(), nothing.0, nothing.1),
        Outcome::OtherBoundaries {
            expected: Some(old),
            found,
        } if old < found => (old, "boundary".to_owned(), nothing.0, nothing.1),
        Outcome::OtherBoundaries { found, .. } => (found, "boundary".to_owned(), nothing.1, nothing.0),
    };
    if command.json {
        streams.json(&json!({
            "same": false,
            "compared": "journals",
            "equal_boundaries": compared.equal,
            "last_equal": compared.last_equal.map(|(step, phase)| json!({ "step": step, "phase": phase })),
            "part_at": {
                "step": at.0,
                "phase": at.1,
                "component": component,
                "expected": was,
                "found": is,
            },
        }))?;
    } else {
        let through = match compared.last_equal {
            Some(last) => format!("same through {}", boundary(last)),
            None => "nothing in common".to_owned(),
        };
        streams.say(format!(
            "{through}; part at {}: \"{}\" is {} in {} and {} in {}",
            boundary(at),
            line(&component),
            line(&was),
            line(&expected.run.name),
            line(&is),
            line(&found.run.name),
        ))?;
        streams.note(
            "hint",
            "`unbroken explain RUN RUN` names leaves and the likely cause, where both saved one",
        );
    }
    Ok(Verdict::No)
}

/// The newest boundary of which both runs have a whole checkpoint, or else of which both journals tell.
fn newest_common(expected: &Recorded, found: &Recorded) -> Option<(u64, u8)> {
    let held = |run: &Recorded| -> BTreeSet<(u64, u8)> {
        let infos = run.overview.checkpoints.iter().map(Checkpoint::info);
        infos.map(|info| (info.step, info.phase)).collect()
    };
    let newest = |old: BTreeSet<_>, new: BTreeSet<_>| old.intersection(&new).last().copied();
    newest(held(expected), held(found)).or_else(|| newest(expected.saved_places(), found.saved_places()))
}

fn diff_states(
    command: &Diff,
    sides: (&Side, &Side),
    places: ((u64, u8), (u64, u8)),
    journal: Option<(usize, (u64, u8))>,
    streams: &mut Streams,
) -> Answer {
    let (expected, found) = (sides.0.state(places.0)?, sides.1.state(places.1)?);
    let differences = compare_states(&expected, &found)?;
    let total = expected.leaves();
    if command.json {
        let rows: Vec<Json> = differences.iter().map(difference_json).collect();
        streams.json(&json!({
            "same": differences.is_empty(),
            "compared": "checkpoints",
            "equal_boundaries": journal.map(|(equal, _)| equal),
            "expected": expected.name(),
            "found": found.name(),
            "leaves": total,
            "differences": rows,
        }))?;
        return Ok(Verdict::yes_if(differences.is_empty()));
    }
    if differences.is_empty() {
        let before = match journal {
            Some((_, last)) => format!("same through {}; ", boundary(last)),
            None => String::new(),
        };
        let at = boundary(places.0);
        streams.say(format!(
            "{before}checkpoints of {at} are the same in all {total} leaves"
        ))?;
        return Ok(Verdict::Yes);
    }
    for leaf in &differences {
        let path = if leaf.path.is_empty() { "." } else { &leaf.path };
        streams.say(format!("{}: {}", line(path), line(&change_words(&leaf.change))))?;
    }
    let what = count(differences.len(), "difference");
    streams.note(
        "summary",
        &format!("{what} between checkpoints of {total} leaves"),
    );
    Ok(Verdict::No)
}

fn same(
    command: &Diff,
    compared: &str,
    equal: usize,
    last: Option<(u64, u8)>,
    streams: &mut Streams,
) -> Answer {
    if command.json {
        streams.json(&json!({ "same": true, "compared": compared, "equal_boundaries": equal }))?;
        return Ok(Verdict::Yes);
    }
    match last {
        Some(last) => streams.say(format!("same through {}", boundary(last)))?,
        None => {
            return Err(Failure::new(
                "neither run has a journal or a checkpoint in common with the other",
            ));
        }
    }
    streams.note(
        "note",
        "no boundary has a checkpoint in both runs; only the journals were compared",
    );
    Ok(Verdict::Yes)
}

/// A boundary in words: `step 841`, `step 900 (epoch end)`.
fn boundary((step, phase): (u64, u8)) -> String {
    if phase == 0 {
        format!("step {step}")
    } else {
        format!("step {step} ({})", phase_words(phase))
    }
}

fn difference_json(leaf: &Leaf) -> Json {
    let (expected, found) = match &leaf.change {
        Change::Value { expected, found }
        | Change::Content { expected, found }
        | Change::Layout { expected, found } => (Some(expected), Some(found)),
        Change::Elements { .. } | Change::Missing | Change::Extra | Change::Unknown => (None, None),
    };
    let elements = match &leaf.change {
        Change::Elements { elements, .. } => Some(json!({
            "count": elements.total,
            "differing": elements.differing,
            "first": elements.first,
            "max_ulps": elements.max_ulps,
            "not_numbers": elements.not_numbers,
        })),
        _ => None,
    };
    json!({
        "path": leaf.path,
        "change": change_words(&leaf.change),
        "expected": expected,
        "found": found,
        "elements": elements,
    })
}
