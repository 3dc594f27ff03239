//! All segments of a run as one story: each boundary once, in order, read a record at a time.
//!
//! Touches: `journal/`, read only. Opening reads every segment once, for its events and what is wrong with it; going
//! through the boundaries reads them again. Memory is bounded by the events, one record a life that runs at the same
//! place, and nothing else.

use std::collections::{BTreeMap, HashSet};

use super::segment::{self, Reader, told};
use super::{Boundary, DIVERGED, Event, NO_EARLIER, Place, field};
use crate::digest::Digest;
use crate::error::Result;
use crate::format::journal::{Ending, Entry, Record, SegmentHeader};
use crate::format::saved::{self, Outline, SAVED, Saved};
use crate::state::Value;
use crate::storage::Directory;
use crate::store::is_damage;

/// The segments of all lives, opened.
#[derive(Clone, Debug)]
pub struct Story {
    directory: Directory,
    /// Events other than [`SAVED`], in the order of lives.
    pub events: Vec<Event>,
    /// Checkpoints as they were saved, in the order of lives.
    pub saves: Vec<Save>,
    /// What each readable segment says of itself, in the order of lives.
    pub lives: Vec<SegmentHeader>,
    /// What is damaged or cannot be followed.
    pub warnings: Vec<String>,
    /// Highest life that has a segment, readable or not.
    pub last_life: u32,
    /// Whether some segment cannot be read at all.
    pub unreadable: bool,
    /// Whether some segment is of another run.
    pub foreign: bool,
    /// Highest (step, phase) that any life recorded, whether it counts or not.
    pub last: Option<(u64, u8)>,
    /// Chain hashes that were asked for and are there.
    heads: HashSet<Digest>,
    parts: Vec<Part>,
}

/// A checkpoint as it was saved; it may be there no longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Save {
    /// Process life that saved it.
    pub life: u32,
    /// Optimizer updates so far.
    pub step: u64,
    /// When, as an RFC 3339 timestamp.
    pub time: String,
    /// What the event says.
    pub saved: Saved,
    /// Where the event is, and the one that has its nodes; `None` where its leaves were left out.
    outline: Option<(u64, u64)>,
}

impl Save {
    /// Whether the journal tells the checkpoint's leaves ([`Story::outline`]).
    pub fn has_leaves(&self) -> bool {
        self.outline.is_some()
    }
}

/// One life's part of the story.
#[derive(Clone, Debug)]
struct Part {
    life: u32,
    name: String,
    /// Its first boundary.
    first: Place,
    /// Where its records end that count, exclusive: its own or a later life's difference. `None` for all.
    end: Option<Place>,
    /// Where its own records took the place of those of earlier lives.
    differences: HashSet<Place>,
}

/// Where a life's records stop counting, and those of earlier lives do.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cuts {
    /// It stopped at a difference: its own from there on do not count.
    pub stop: Option<Place>,
    /// It went on from a difference: those of earlier lives from there on do not count.
    pub cut: Option<Place>,
}

impl Cuts {
    /// Takes note of an event behind a boundary.
    pub fn note(&mut self, last: Option<Place>, kind: &str, fields: &[(String, Value)]) {
        let (Some(last), None) = (last.filter(|_| kind == DIVERGED), self.stop) else {
            return;
        };
        if field(fields, "went_on") == Some(&Value::Bool(true)) {
            self.cut = self.cut.or(Some(last));
        } else {
            self.stop = Some(last);
        }
    }

    /// For each life where its records end that count, exclusive.
    pub fn ends(cuts: &[Cuts]) -> Vec<Option<Place>> {
        let mut ends = vec![None; cuts.len()];
        let mut later: Option<Place> = None;
        for (index, cut) in cuts.iter().enumerate().rev() {
            ends[index] = [cut.stop, later].into_iter().flatten().min();
            later = [cut.cut, later].into_iter().flatten().min();
        }
        ends
    }
}

impl Story {
    /// Opens the segments of a run.
    ///
    /// # Errors
    ///
    /// Only where a segment that is there cannot be read for another reason than its content.
    pub fn open(directory: &Directory, run_id: &str) -> Result<Story> {
        Story::open_with(directory, run_id, &[])
    }

    /// Opens the segments of a run, looking for chain hashes on the way ([`Story::has_head`]).
    ///
    /// # Errors
    ///
    /// Those of [`Story::open`].
    pub fn open_with(directory: &Directory, run_id: &str, heads: &[Digest]) -> Result<Story> {
        let (names, others) = segment::list(directory)?;
        let mut story = Story {
            directory: directory.clone(),
            events: Vec::new(),
            saves: Vec::new(),
            lives: Vec::new(),
            warnings: others
                .iter()
                .map(|name| format!("`{name}` is no journal segment; left alone"))
                .collect(),
            last_life: names.keys().next_back().copied().unwrap_or(0),
            unreadable: false,
            foreign: false,
            last: None,
            heads: HashSet::new(),
            parts: Vec::new(),
        };
        let mut readers = BTreeMap::new();
        for (life, name) in names {
            match segment::reader(directory, &name) {
                Ok(reader) => drop(readers.insert(life, (name, reader))),
                Err(error) => story.lost(life, error)?,
            }
        }
        let previous = readers
            .values()
            .filter_map(|(_, reader)| Some(reader.header()?.previous));
        let wanted: HashSet<Digest> = previous.chain(heads.iter().copied()).collect();
        let mut cuts = Vec::new();
        for (life, (name, reader)) in readers {
            story.foreign |= reader.header().is_some_and(|header| header.run_id != run_id);
            if let Some(header) = own_header(&reader, &name, life, run_id, &mut story.warnings) {
                cuts.push(story.tell(life, &name, reader, header, &wanted)?);
            }
        }
        for (part, end) in story.parts.iter_mut().zip(Cuts::ends(&cuts)) {
            part.end = end;
        }
        Ok(story)
    }

    /// Notes that a segment cannot be read from some point on; an error if that is for another reason than its content.
    fn lost(&mut self, life: u32, error: crate::Error) -> Result<()> {
        if !is_damage(&error) {
            return Err(error);
        }
        self.unreadable = true;
        self.warnings
            .push(format!("{error}; what life {life} recorded cannot be verified"));
        Ok(())
    }

    /// Goes through one segment.
    fn tell(
        &mut self,
        life: u32,
        name: &str,
        mut reader: Reader,
        header: SegmentHeader,
        wanted: &HashSet<Digest>,
    ) -> Result<Cuts> {
        if header.previous != Digest([0; 32]) && !self.heads.contains(&header.previous) {
            let (step, previous) = (header.step, header.previous.short());
            self.warnings.push(format!(
                "`{name}` goes on from step {step} and record {previous}, {NO_EARLIER}"
            ));
        }
        self.lives.push(header);
        let mut part = Part {
            life,
            name: name.to_owned(),
            first: (u64::MAX, 0),
            end: None,
            differences: HashSet::new(),
        };
        let (mut cuts, mut last, mut standing, mut nodes_at) = (Cuts::default(), None, None, None);
        if wanted.contains(&reader.head()) {
            self.heads.insert(reader.head());
        }
        let ending = loop {
            let entry = match reader.read() {
                Ok(Some(entry)) => entry,
                Ok(None) => break reader.ending(),
                Err(trouble) => break Err(trouble),
            };
            if wanted.contains(&entry.chain) {
                self.heads.insert(entry.chain);
            }
            match entry.record {
                Record::Boundary { step, phase, .. } => {
                    if last.is_none() {
                        part.first = (step, phase);
                    }
                    last = Some((step, phase));
                    self.last = self.last.max(last);
                }
                Record::Event {
                    kind,
                    step,
                    fields,
                    time,
                } if kind == SAVED => match saved::raise(&fields, &mut standing) {
                    Ok((saved, outline)) => {
                        if matches!(saved::nodes_field(&fields), Some(Value::List(_))) {
                            nodes_at = Some(entry.offset);
                        }
                        let outline = outline.and(nodes_at).map(|nodes| (entry.offset, nodes));
                        self.saves.push(Save {
                            life,
                            step,
                            time,
                            saved,
                            outline,
                        });
                    }
                    Err(flaw) => self.warnings.push(format!(
                        "`{name}` tells of a checkpoint of step {step} in a way that cannot be read: {flaw}"
                    )),
                },
                Record::Event {
                    kind,
                    step,
                    fields,
                    time,
                } => {
                    cuts.note(last, &kind, &fields);
                    if kind == DIVERGED {
                        part.differences.extend(last);
                    }
                    self.events.push(Event {
                        life,
                        kind,
                        step,
                        fields,
                        time,
                    });
                }
            }
        };
        match ending {
            Ok(ending) => self.warnings.extend(damage_words(name, &ending)),
            Err(trouble) => self.lost(life, told(trouble, &self.directory, name))?,
        }
        self.parts.push(part);
        Ok(cuts)
    }

    /// Whether a run with this journal must have a checkpoint: it has been trained, or nobody can tell any more.
    pub fn has_begun(&self) -> bool {
        self.last.is_some_and(|(step, _)| step > 0) || self.unreadable || self.foreign
    }

    /// What is wrong with the journal of a run with these checkpoints (name, chain hash), in words: damage, segments and
    /// records that are missing, lives that wrote at the same time. The hashes must have been asked for.
    ///
    /// # Errors
    ///
    /// Where a segment cannot be read any more.
    pub fn flaws(&self, checkpoints: &[(String, Digest)]) -> Result<Vec<String>> {
        let mut boundaries = self.boundaries();
        for boundary in boundaries.by_ref() {
            boundary?;
        }
        let mut flaws = self.warnings.clone();
        flaws.extend(boundaries.conflict_words());
        let lost = checkpoints.iter().filter(|(_, head)| !self.has_head(head));
        flaws.extend(
            lost.map(|(name, _)| format!("the record that checkpoint {name} was made at is not there")),
        );
        Ok(flaws)
    }

    /// Whether a chain hash that was asked for is in the readable part.
    pub fn has_head(&self, head: &Digest) -> bool {
        self.heads.contains(head)
    }

    /// Goes through the boundaries, each once, in order.
    pub fn boundaries(&self) -> Boundaries<'_> {
        let mut waiting: Vec<&Part> = self
            .parts
            .iter()
            .filter(|part| part.first.0 != u64::MAX)
            .collect();
        waiting.sort_by_key(|part| std::cmp::Reverse((part.first, part.life)));
        Boundaries {
            story: self,
            waiting,
            open: Vec::new(),
            conflicts: Vec::new(),
            conflicting: 0,
        }
    }

    /// The leaves of a checkpoint as it was saved; `None` where the event does not have them.
    ///
    /// # Errors
    ///
    /// Where the segment cannot be read any more.
    pub fn outline(&self, save: &Save) -> Result<Option<Outline>> {
        let Some(part) = self.parts.iter().find(|part| part.life == save.life) else {
            return Ok(None);
        };
        let Some((at, nodes_at)) = save.outline else {
            return Ok(None);
        };
        let mut reader = segment::reader(&self.directory, &part.name)?;
        let mut standing = None;
        for offset in [nodes_at, at] {
            let found = reader.seek(offset).and_then(|()| reader.read());
            let found = found.map_err(|trouble| told(trouble, &self.directory, &part.name))?;
            let Some(Entry {
                record: Record::Event { fields, .. },
                ..
            }) = found
            else {
                return Ok(None);
            };
            let raised = saved::raise(&fields, &mut standing);
            let (_, outline) = raised.map_err(|flaw| flaw.at(self.directory.path(&part.name)))?;
            if offset == at {
                return Ok(outline);
            }
        }
        Ok(None)
    }

    /// The newest save of a checkpoint, by its name.
    pub fn save_of(&self, checkpoint: &str) -> Option<&Save> {
        self.saves
            .iter()
            .rev()
            .find(|save| save.saved.checkpoint == checkpoint)
    }
}

/// The header of a life's own segment; `None`, with a word where one is due, where it is none.
pub(super) fn own_header(
    reader: &Reader,
    name: &str,
    life: u32,
    run_id: &str,
    warnings: &mut Vec<String>,
) -> Option<SegmentHeader> {
    let header = reader.header().cloned()?; // Torn before it said anything otherwise.
    if header.run_id == run_id && header.life == life {
        return Some(header);
    }
    let (run, other) = (&header.run_id, header.life);
    warnings.push(format!("`{name}` is of life {other} of run {run}; left alone"));
    None
}

pub(super) fn damage_words(name: &str, ending: &Ending) -> Option<String> {
    let Ending::Damaged {
        offset,
        after_step,
        what,
        ..
    } = ending
    else {
        return None;
    };
    Some(format!(
        "`{name}` is damaged at byte {offset}, after step {after_step}: {what}; what follows in it cannot be verified"
    ))
}

/// The boundaries of a [`Story`], in order.
#[derive(Debug)]
pub struct Boundaries<'a> {
    story: &'a Story,
    /// Parts that start later, the next one last.
    waiting: Vec<&'a Part>,
    open: Vec<Cursor<'a>>,
    conflicts: Vec<String>,
    conflicting: usize,
}

#[derive(Debug)]
struct Cursor<'a> {
    part: &'a Part,
    reader: Reader,
    /// The boundary that it stands at.
    next: Boundary,
}

/// Conflicts that are told one by one.
const MAX_CONFLICTS: usize = 3;

impl Boundaries<'_> {
    /// Boundaries so far that two lives recorded differently without noticing, in words.
    ///
    /// A life compares what it executes with all that was recorded before it began. Where two differ and the later one
    /// does not say so, it did not see the earlier one's record: both wrote at the same time, or it was killed in
    /// between.
    pub fn conflict_words(&self) -> Vec<String> {
        let mut words = self.conflicts.clone();
        if self.conflicting > words.len() {
            words.push(format!(
                "the same of {} more boundaries",
                self.conflicting - words.len()
            ));
        }
        words
    }

    fn step(&mut self) -> Result<Option<Boundary>> {
        let place = |cursor: &Cursor| cursor.next.place();
        let Some(first) = self
            .open
            .iter()
            .map(place)
            .chain(self.waiting.last().map(|part| part.first))
            .min()
        else {
            return Ok(None);
        };
        while let Some(part) = self.waiting.pop_if(|part| part.first == first) {
            let mut reader = segment::reader(&self.story.directory, &part.name)?;
            if let Some(next) = next_of(&mut reader, part, None, &self.story.directory)? {
                self.open.push(Cursor { part, reader, next });
            }
        }
        self.open.sort_by_key(|cursor| cursor.part.life);
        let mut merged: Option<Boundary> = None;
        let mut index = 0;
        while index < self.open.len() {
            let cursor = &mut self.open[index];
            if cursor.next.place() != first {
                index += 1;
                continue;
            }
            let following = next_of(
                &mut cursor.reader,
                cursor.part,
                Some(first),
                &self.story.directory,
            )?;
            let part = cursor.part;
            let mut boundary = match following {
                Some(following) => {
                    index += 1;
                    std::mem::replace(&mut cursor.next, following)
                }
                None => self.open.remove(index).next,
            };
            if let Some(earlier) = merged {
                let differ = (earlier.epoch, earlier.position, &earlier.components)
                    != (boundary.epoch, boundary.position, &boundary.components);
                if differ && !part.differences.contains(&first) {
                    self.conflict(&earlier, &boundary);
                }
                boundary.lives.splice(..0, earlier.lives);
            }
            merged = Some(boundary);
        }
        // Whatever was open at this place may have ended before it.
        match merged {
            Some(boundary) => Ok(Some(boundary)),
            None => self.step(),
        }
    }

    fn conflict(&mut self, earlier: &Boundary, later: &Boundary) {
        self.conflicting += 1;
        if self.conflicts.len() < MAX_CONFLICTS {
            let component = super::first_difference(earlier, later).map_or(String::new(), |(name, ..)| name);
            self.conflicts.push(format!(
                "lives {} and {} recorded step {} differently, first in {component}, and life {} does not say so: \
                 two processes wrote at the same time, or it was killed at that moment",
                earlier.lives.last().copied().unwrap_or(0),
                later.lives.last().copied().unwrap_or(0),
                later.step,
                later.lives.last().copied().unwrap_or(0),
            ));
        }
    }
}

/// A part's next boundary that counts.
fn next_of(
    reader: &mut Reader,
    part: &Part,
    last: Option<Place>,
    directory: &Directory,
) -> Result<Option<Boundary>> {
    loop {
        let entry = match reader.read() {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(None),
            Err(trouble) => {
                // What a disk cannot read was named when the story was opened.
                let error = told(trouble, directory, &part.name);
                return if is_damage(&error) { Ok(None) } else { Err(error) };
            }
        };
        let Record::Boundary {
            step,
            phase,
            epoch,
            position,
            components,
        } = entry.record
        else {
            continue;
        };
        let place = (step, phase);
        if part.end.is_some_and(|end| place >= end) {
            return Ok(None);
        }
        // A life records in order; what does not come after the one before it is not its own doing.
        if last.is_none_or(|last| place > last) {
            let mut boundary = Boundary::new(step, phase, epoch, position, components);
            boundary.lives.push(part.life);
            return Ok(Some(boundary));
        }
    }
}

impl Iterator for Boundaries<'_> {
    type Item = Result<Boundary>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}
