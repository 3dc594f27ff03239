//! `unbroken diff`: the first boundary and component where two runs part, or the leaves in which two checkpoints do.
//!
//! Touches: two run directories, read only, without their locks.

use serde_json::{Value as Json, json};
use unbroken::compare::{Elements, LeafDifference, compare_checkpoints, compare_journals};
use unbroken::run::Overview;
use unbroken::store::Checkpoint;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::arguments::Diff;
use crate::leaves::leaves;
use crate::list::phase_words;
use crate::target::{self, Target};
use crate::words::{count, line};

pub(crate) fn run(command: &Diff, streams: &mut Streams) -> Answer {
    let (expected, found) = (Target::parse(&command.expected), Target::parse(&command.found));
    let names_one = |target: &Target| target.step.is_some() || target.path.is_file();
    match (names_one(&expected), names_one(&found)) {
        (false, false) => diff_runs(command, &expected, &found, streams),
        (true, true) => {
            let expected = target::open_checkpoint(&command.expected, streams)?;
            let found = target::open_checkpoint(&command.found, streams)?;
            diff_checkpoints(command, &expected, &found, None, streams)
        }
        _ => Err(Failure::new("one side names a checkpoint and the other a run")
            .hint("give a step on both sides (RUN@STEP RUN@STEP), or on neither")),
    }
}

fn diff_runs(command: &Diff, expected: &Target, found: &Target, streams: &mut Streams) -> Answer {
    let overviews = (target::open_run(&expected.path)?, target::open_run(&found.path)?);
    let journals = (
        target::open_journal(&expected.path)?,
        target::open_journal(&found.path)?,
    );
    for (target, journal) in [(expected, &journals.0), (found, &journals.1)] {
        for warning in &journal.warnings {
            streams.note("warning", &format!("{}: {warning}", target.path.display()));
        }
    }
    let comparison = compare_journals(&journals.0, &journals.1);
    let Some(difference) = comparison.difference else {
        let Some((expected, found)) = newest_common(overviews) else {
            return same(command, "runs", comparison.equal, comparison.last_equal, streams);
        };
        let journal = comparison.last_equal.map(|last| (comparison.equal, last));
        return diff_checkpoints(command, &expected, &found, journal, streams);
    };
    if command.json {
        streams.json(&json!({
            "same": false,
            "compared": "journals",
            "equal_boundaries": comparison.equal,
            "last_equal": comparison.last_equal.map(|(step, phase)| json!({ "step": step, "phase": phase })),
            "part_at": {
                "step": difference.step,
                "phase": difference.phase,
                "component": difference.component,
                "expected": difference.expected,
                "found": difference.found,
            },
        }))?;
    } else {
        let through = match comparison.last_equal {
            Some(last) => format!("same through {}", boundary(last)),
            None => "nothing in common".to_owned(),
        };
        streams.say(format!(
            "{through}; part at {}: \"{}\" is {} in {} and {} in {}",
            boundary((difference.step, difference.phase)),
            line(&difference.component),
            line(&difference.expected),
            line(&expected.path.display().to_string()),
            line(&difference.found),
            line(&found.path.display().to_string()),
        ))?;
        streams.note(
            "hint",
            "`unbroken log RUN --components --steps N` shows all components of a step",
        );
    }
    Ok(Verdict::No)
}

/// The newest boundary of which both runs have a whole checkpoint.
fn newest_common((expected, found): (Overview, Overview)) -> Option<(Checkpoint, Checkpoint)> {
    let key = |checkpoint: &Checkpoint| (checkpoint.info().step, checkpoint.info().phase);
    let mut others = found.checkpoints;
    for checkpoint in expected.checkpoints.into_iter().rev() {
        if let Some(index) = others.iter().rposition(|other| key(other) == key(&checkpoint)) {
            return Some((checkpoint, others.swap_remove(index)));
        }
    }
    None
}

fn diff_checkpoints(
    command: &Diff,
    expected: &Checkpoint,
    found: &Checkpoint,
    journal: Option<(usize, (u64, u8))>,
    streams: &mut Streams,
) -> Answer {
    let differences = compare_checkpoints(expected, found, true)?;
    let total = leaves(expected.tree()).len();
    if command.json {
        let rows: Vec<Json> = differences.iter().map(difference_json).collect();
        streams.json(&json!({
            "same": differences.is_empty(),
            "compared": "checkpoints",
            "equal_boundaries": journal.map(|(equal, _)| equal),
            "expected": expected.info().name,
            "found": found.info().name,
            "leaves": total,
            "differences": rows,
        }))?;
        return Ok(Verdict::yes_if(differences.is_empty()));
    }
    let at = boundary((expected.info().step, expected.info().phase));
    if differences.is_empty() {
        let before = match journal {
            Some((_, last)) => format!("same through {}; ", boundary(last)),
            None => String::new(),
        };
        streams.say(format!(
            "{before}checkpoints of {at} are the same in all {total} leaves"
        ))?;
        return Ok(Verdict::Yes);
    }
    for difference in &differences {
        streams.say(difference_words(difference))?;
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

fn difference_words(difference: &LeafDifference) -> String {
    let path = if difference.path.is_empty() {
        "."
    } else {
        &difference.path
    };
    let mut words = format!(
        "{}: {} -> {}",
        line(path),
        line(&difference.expected),
        line(&difference.found)
    );
    if let Some(elements) = &difference.elements {
        words.push_str(&format!("; {}", elements_words(elements)));
    }
    words
}

fn elements_words(elements: &Elements) -> String {
    let mut words = format!(
        "{} of {} elements differ, first at {}",
        elements.differing, elements.count, elements.first
    );
    if let Some(ulps) = elements.max_ulp {
        words.push_str(&format!(
            ", at most {} apart",
            count(usize::try_from(ulps).unwrap_or(usize::MAX), "ulp")
        ));
    }
    words
}

fn difference_json(difference: &LeafDifference) -> Json {
    json!({
        "path": difference.path,
        "expected": difference.expected,
        "found": difference.found,
        "elements": difference.elements.as_ref().map(|elements| json!({
            "count": elements.count,
            "differing": elements.differing,
            "first": elements.first,
            "max_ulps": elements.max_ulp,
        })),
    })
}
