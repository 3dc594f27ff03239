//! What two directories of runs say of each other: equal to the last bit, or where they part and why.
//!
//! Touches: run directories, read only, without their locks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use unbroken::cause::{self, Cause, Leaf, Situation};
use unbroken::format::journal::SegmentHeader;
use unbroken::journal::{Boundary, DIVERGED, Event, Story, field};
use unbroken::localise::{self, Outcome, Parting, State};
use unbroken::run::{Overview, read_run, read_story};
use unbroken::store::Checkpoint;
use unbroken::{Error, Value};

/// One run on disk, opened.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) name: String,
    pub(crate) story: Story,
    pub(crate) overview: Overview,
    pub(crate) totals: Totals,
    /// The last step that counts, where not all do.
    steps: Option<u64>,
}

/// What one pass over a run's boundaries counts.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) boundaries: usize,
    /// Boundaries that more than one life recorded.
    pub(crate) again: usize,
    /// Steps that more than one life executed: first and last of each stretch.
    pub(crate) stretches: Vec<(u64, u64)>,
    /// The last step.
    pub(crate) last: u64,
    /// For each life the last step that counts, and how many boundaries it recorded that an earlier life had.
    pub(crate) lives: BTreeMap<u32, (u64, usize)>,
    /// Epochs whose after-work was done, with the step at which it was.
    pub(crate) epochs: Vec<(u64, u64)>,
    /// What two lives recorded differently without a word.
    pub(crate) conflicts: Vec<String>,
}

impl Totals {
    fn take(&mut self, boundary: &Boundary) {
        self.boundaries += 1;
        self.last = boundary.step;
        for (index, life) in boundary.lives.iter().enumerate() {
            let (last, again) = self.lives.entry(*life).or_default();
            *last = boundary.step;
            *again += usize::from(index > 0);
        }
        if boundary.phase == 1 {
            // The record at an epoch's end carries the epoch that comes next.
            self.epochs
                .push((boundary.epoch.saturating_sub(1), boundary.step));
        }
        if boundary.lives.len() > 1 {
            self.again += 1;
            match self.stretches.last_mut() {
                Some((_, to)) if *to + 1 >= boundary.step => *to = boundary.step,
                _ => self.stretches.push((boundary.step, boundary.step)),
            }
        }
    }
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
        let mut recorded = Recorded {
            name,
            story: read_story(path)?,
            overview: read_run(path)?,
            totals: Totals::default(),
            steps,
        };
        let mut totals = Totals::default();
        let mut boundaries = recorded.story.boundaries();
        for boundary in boundaries.by_ref() {
            let boundary = boundary?;
            if counts(&boundary, steps) {
                totals.take(&boundary);
            }
        }
        totals.conflicts = boundaries.conflict_words();
        recorded.totals = totals;
        Ok(recorded)
    }

    /// The boundaries that count, in order.
    pub(crate) fn boundaries(&self) -> impl Iterator<Item = Result<Boundary, Error>> + '_ {
        let all = self.story.boundaries();
        all.filter(|boundary| !matches!(boundary, Ok(boundary) if !counts(boundary, self.steps)))
    }

    /// What is wrong with the journal, in words.
    pub(crate) fn flaws(&self) -> impl Iterator<Item = &String> {
        self.story.warnings.iter().chain(&self.totals.conflicts)
    }

    /// The first difference between two executions of one step that a life of the run noticed.
    pub(crate) fn diverged(&self) -> Option<&Event> {
        self.story.events.iter().find(|event| event.kind == DIVERGED)
    }

    /// Steps of the checkpoints that later lives started from.
    pub(crate) fn resumed_at(&self) -> Vec<u64> {
        self.story
            .lives
            .iter()
            .filter(|life| is_resumed(life))
            .map(|life| life.step)
            .collect()
    }

    /// Every checkpoint that is there or that the journal tells of, in the order of boundaries.
    pub(crate) fn saves(&self) -> Vec<Saving> {
        let mut all: BTreeMap<(u64, u8, u32, String), Saving> = BTreeMap::new();
        for checkpoint in &self.overview.checkpoints {
            let info = checkpoint.info();
            let saving = Saving {
                step: info.step,
                phase: info.phase,
                life: info.life,
                name: info.name.clone(),
                created: info.created.clone(),
                held: true,
                pinned: info.pinned,
                size_bytes: Some(info.size_bytes),
                new_bytes: Some(info.new_bytes),
                ..Saving::default()
            };
            all.insert(saving.key(), saving);
        }
        for save in &self.story.saves {
            let told = Saving {
                step: save.step,
                phase: save.saved.phase,
                life: save.life,
                name: save.saved.checkpoint.clone(),
                created: save.time.clone(),
                size_bytes: Some(save.saved.size_bytes),
                new_bytes: Some(save.saved.new_bytes),
                ..Saving::default()
            };
            let saving = all.entry(told.key()).or_insert(told);
            saving.durable_us = Some(save.saved.durable_us);
            saving.commit_us = Some(save.saved.commit_us);
        }
        all.into_values().collect()
    }

    /// Boundaries of which the journal tells the leaves of a checkpoint.
    pub(crate) fn saved_places(&self) -> BTreeSet<(u64, u8)> {
        let told = self.story.saves.iter().filter(|save| save.has_leaves());
        told.map(|save| (save.step, save.saved.phase)).collect()
    }

    /// The newest state of a boundary, as a checkpoint or as the journal tells of one; of lives that `wanted` says.
    pub(crate) fn state(
        &self,
        place: (u64, u8),
        wanted: impl Fn(u32) -> bool,
    ) -> Result<Option<State<'_>>, Error> {
        let here = |checkpoint: &&Checkpoint| {
            let info = checkpoint.info();
            (info.step, info.phase) == place && wanted(info.life)
        };
        if let Some(checkpoint) = self.overview.checkpoints.iter().rev().find(here) {
            return Ok(Some(self.held(checkpoint)?));
        }
        let saves = self.story.saves.iter().rev();
        let mut saves = saves.filter(|save| (save.step, save.saved.phase) == place && wanted(save.life));
        let Some(save) = saves.find(|save| save.has_leaves()) else {
            return Ok(None);
        };
        let outline = self.story.outline(save)?;
        Ok(outline.map(|outline| State::recorded(&save.saved.checkpoint, outline)))
    }

    fn held<'a>(&self, checkpoint: &'a Checkpoint) -> Result<State<'a>, Error> {
        state_of(checkpoint, &self.story)
    }
}

/// One checkpoint, there or not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saving {
    pub(crate) step: u64,
    pub(crate) phase: u8,
    pub(crate) life: u32,
    pub(crate) name: String,
    pub(crate) created: String,
    pub(crate) held: bool,
    pub(crate) pinned: bool,
    pub(crate) size_bytes: Option<u64>,
    pub(crate) new_bytes: Option<u64>,
    /// As the journal tells, if it does: it is a word less than the checkpoint.
    pub(crate) durable_us: Option<u64>,
    pub(crate) commit_us: Option<u64>,
}

impl Saving {
    fn key(&self) -> (u64, u8, u32, String) {
        (self.step, self.phase, self.life, self.name.clone())
    }
}

/// A checkpoint's state with what the journal has recorded of it.
pub(crate) fn state_of<'a>(checkpoint: &'a Checkpoint, story: &Story) -> Result<State<'a>, Error> {
    let save = story.save_of(&checkpoint.info().name);
    let outline = save.map(|save| story.outline(save)).transpose()?.flatten();
    Ok(State::held(checkpoint, outline.as_ref()))
}

/// A life that is resumed at the last step to prove goes one further before it stops.
fn counts(boundary: &Boundary, steps: Option<u64>) -> bool {
    steps.is_none_or(|steps| boundary.step < steps || (boundary.step, boundary.phase) == (steps, 0))
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
    if let Some(difference) = compare_journals(expected, found)? {
        return Ok(Some(difference));
    }
    if let Some(event) = found.diverged() {
        return other(format!(
            "step {} came out differently when life {} executed it again, in {}",
            event.step,
            event.life,
            event_text(event, "component")
        ));
    }
    if let Some(warning) = found.flaws().next() {
        return other(format!("the journal is not whole: {warning}"));
    }
    match (
        expected.overview.checkpoints.last(),
        found.overview.checkpoints.last(),
    ) {
        (Some(old), Some(new)) => {
            let (old, new) = (expected.held(old)?, found.held(new)?);
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
///
/// # Errors
///
/// Where a journal cannot be read.
pub(crate) fn compare_journals(expected: &Recorded, found: &Recorded) -> Result<Option<Difference>, Error> {
    let compared = localise::compare_journals(expected.boundaries(), found.boundaries())?;
    Ok(match compared.outcome {
        Outcome::Same => None,
        Outcome::Parts(parting) => Some(parted(expected, found, *parting, &[], &[])),
        other => Some(Difference::other(&found.name, outcome_words(&other))),
    })
}

/// A journal that is too short or too long, in words.
pub(crate) fn outcome_words(outcome: &Outcome) -> String {
    let words = |place: &(u64, u8)| boundary_words(place.0, place.1);
    match outcome {
        Outcome::EndsEarly { missing } => format!("ends before {}", words(missing)),
        Outcome::OtherBoundaries {
            expected: Some(expected),
            ..
        } => format!("{} is missing", words(expected)),
        Outcome::OtherBoundaries {
            expected: None,
            found,
        } => format!("{} was not expected", words(found)),
        Outcome::Same | Outcome::Parts(_) => String::new(),
    }
}

fn event_text(event: &Event, name: &str) -> String {
    match field(&event.fields, name) {
        Some(Value::Str(text)) => text.clone(),
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
        .story
        .lives
        .iter()
        .find(|life| life.life == parting.life && is_resumed(life));
    let before = parting.last_equal.unwrap_or_default();
    let settings = changed_settings(expected, found);
    let situation = Situation {
        phase: parting.phase,
        component: &parting.component,
        first_after_resume: header.is_some_and(|header| (header.step, header.phase) == before),
        resumed: header.is_some(),
        expected: parting.expected_window(),
        found: parting.found_window(),
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
    let compared = localise::compare_journals(old.boundaries(), new.boundaries())?;
    let Outcome::Parts(parting) = compared.outcome else {
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
    with_leaves(&old, &new, *parting)
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
    let place = (parting.step, parting.phase);
    let leaves = match (expected.state(place, |_| true)?, found.state(place, |_| true)?) {
        (Some(old), Some(new)) => localise::compare_states(&old, &new)?,
        _ => Vec::new(),
    };
    let restored = restored_leaves(found, parting.life)?;
    Ok(parted(expected, found, parting, &restored, &leaves))
}

/// Leaves in which what a life put back differs from the checkpoint it started from.
fn restored_leaves(run: &Recorded, life: u32) -> Result<Vec<Leaf>, Error> {
    let resumed = |header: &&SegmentHeader| header.life == life && is_resumed(header);
    let Some(header) = run.story.lives.iter().find(resumed) else {
        return Ok(Vec::new());
    };
    let place = (header.step, header.phase);
    match (
        run.state(place, |other| other < life)?,
        run.state(place, |other| other == life)?,
    ) {
        (Some(original), Some(again)) => localise::compare_states(&original, &again),
        _ => Ok(Vec::new()),
    }
}
