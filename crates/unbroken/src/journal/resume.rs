//! What a life that resumes needs of the journal: what earlier lives recorded behind its checkpoint.
//!
//! Touches: `journal/`, read only, from its ends. Records are recognised by their own hashes wherever reading starts, so
//! that a run of millions of steps resumes as fast as one of a hundred. What is further back than is read here is not
//! verified here: `unbroken verify` reads all of it.

use std::collections::HashMap;

use super::segment::{self, Reader, told};
use super::story::{Cuts, damage_words, own_header};
use super::{Boundary, NO_EARLIER, Place};
use crate::digest::Digest;
use crate::error::Result;
use crate::format::journal::{Ending, Record};
use crate::storage::Directory;
use crate::store::is_damage;

/// Bytes that are read, newest life first, whatever is needed.
const BUDGET: u64 = 2 << 20;
/// Bytes that are read of a segment at least: enough for some records.
const LEAST: u64 = 16 << 10;

/// The checkpoint that a life starts from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct From {
    pub place: Place,
    pub life: u32,
    pub head: Digest,
}

/// What earlier lives recorded behind a checkpoint.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    /// Boundaries behind it, by place.
    pub boundaries: HashMap<Place, Boundary>,
    /// Whether the record that the checkpoint was made at is there.
    pub has_head: bool,
    /// What is damaged or cannot be followed.
    pub warnings: Vec<String>,
    /// Highest life that has a segment, readable or not.
    pub last_life: u32,
}

/// One segment's end.
struct End {
    life: u32,
    name: String,
    reader: Reader,
    /// Place of the checkpoint that its life started from.
    from: Place,
    /// Chain hash that its first record continues.
    start: Digest,
    previous: Digest,
    scan: Scan,
}

/// What was read of a segment.
#[derive(Default)]
struct Scan {
    /// Whether it was read from its first record on.
    whole: bool,
    first: Option<Place>,
    last: Option<Place>,
    /// Boundaries behind the checkpoint.
    behind: Vec<Boundary>,
    cuts: Cuts,
    /// Chain hashes of what was read.
    chains: Vec<Digest>,
    warning: Option<String>,
}

/// Reads what lies behind a checkpoint.
///
/// # Errors
///
/// Only where a segment that is there cannot be read for another reason than its content.
pub(crate) fn resume(directory: &Directory, run_id: &str, from: From) -> Result<Tail> {
    let (names, others) = segment::list(directory)?;
    let mut tail = Tail {
        last_life: names.keys().next_back().copied().unwrap_or(0),
        warnings: others
            .iter()
            .map(|name| format!("`{name}` is no journal segment; left alone"))
            .collect(),
        ..Tail::default()
    };
    let mut ends = Vec::new();
    let (mut budget, mut complete) = (BUDGET, true);
    for (life, name) in names.into_iter().rev() {
        match End::open(
            directory,
            run_id,
            life,
            name,
            from.place,
            &mut budget,
            &mut tail.warnings,
        ) {
            Ok(end) => ends.extend(end),
            Err(error) if is_damage(&error) => {
                complete = false;
                tail.warnings
                    .push(format!("{error}; what life {life} recorded cannot be verified"));
            }
            Err(error) => return Err(error),
        }
    }
    ends.reverse();
    let oldest = ends
        .iter()
        .position(|end| !end.scan.behind.is_empty())
        .unwrap_or(ends.len());
    let mut before = ends[..oldest].iter().filter_map(|end| end.scan.last).max();
    for end in &mut ends[oldest..] {
        // Only where a life executed again what an earlier one had recorded can it have found a difference.
        if let Some(before) = before.filter(|before| !end.scan.whole && end.from < *before) {
            end.overlap(directory, before)?;
        }
        before = before.max(end.scan.last);
    }
    complete &= ends.iter().all(|end| end.scan.whole);
    tail.join(&mut ends, from, complete);
    Ok(tail)
}

impl End {
    fn open(
        directory: &Directory,
        run_id: &str,
        life: u32,
        name: String,
        from: Place,
        budget: &mut u64,
        warnings: &mut Vec<String>,
    ) -> Result<Option<End>> {
        let reader = segment::reader(directory, &name)?;
        let Some(header) = own_header(&reader, &name, life, run_id, warnings) else {
            return Ok(None);
        };
        let mut end = End {
            life,
            from: (header.step, header.phase),
            start: reader.head(),
            previous: header.previous,
            name,
            reader,
            scan: Scan::default(),
        };
        let (first, length) = (end.reader.offset(), end.reader.length());
        let mut wanted = (*budget).max(LEAST);
        loop {
            let start = length.saturating_sub(wanted).max(first);
            end.scan = end.scan_from(directory, first, start, from)?;
            // Enough is what reaches back to the checkpoint.
            if end.scan.whole || end.scan.first.is_some_and(|place| place <= from) {
                break;
            }
            wanted = wanted.saturating_mul(4);
        }
        *budget = budget.saturating_sub(wanted.min(length));
        warnings.extend(end.scan.warning.take());
        Ok(Some(end))
    }

    /// Reads from the first record at or behind `start` to the end.
    fn scan_from(&mut self, directory: &Directory, first: u64, start: u64, from: Place) -> Result<Scan> {
        let mut scan = Scan {
            whole: start == first,
            ..Scan::default()
        };
        let name = &self.name;
        let reader = &mut self.reader;
        let mut read = || -> Result<Option<Ending>, segment::Trouble> {
            let there = if start == first {
                reader.seek(first).map(|()| true)
            } else {
                reader.skip_to(start)
            };
            if !there? {
                return Ok(None);
            }
            while let Some(entry) = reader.read()? {
                scan.chains.push(entry.chain);
                match entry.record {
                    Record::Boundary {
                        step,
                        phase,
                        epoch,
                        position,
                        components,
                    } => {
                        let place = (step, phase);
                        scan.first = scan.first.or(Some(place));
                        scan.last = Some(place);
                        if place > from {
                            let boundary = Boundary::new(step, phase, epoch, position, components);
                            scan.behind.push(boundary);
                        }
                    }
                    Record::Event { kind, fields, .. } => scan.cuts.note(scan.last, &kind, &fields),
                }
            }
            Ok(reader.end())
        };
        match read() {
            Ok(ending) => scan.warning = ending.and_then(|ending| damage_words(name, &ending)),
            Err(trouble) => {
                let error = told(trouble, directory, name);
                if !is_damage(&error) {
                    return Err(error);
                }
                scan.warning = Some(format!(
                    "{error}; what life {} recorded cannot be verified",
                    self.life
                ));
            }
        }
        Ok(scan)
    }

    /// Looks for differences in the part that an earlier life had recorded, up to the boundary `before`.
    fn overlap(&mut self, directory: &Directory, before: Place) -> Result<()> {
        let (mut cuts, mut last) = (Cuts::default(), None);
        let mut reader = segment::reader(directory, &self.name)?;
        loop {
            let entry = match reader.read() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(trouble) => {
                    let error = told(trouble, directory, &self.name);
                    return if is_damage(&error) { Ok(()) } else { Err(error) };
                }
            };
            match entry.record {
                Record::Boundary { step, phase, .. } if (step, phase) > before => break,
                Record::Boundary { step, phase, .. } => last = Some((step, phase)),
                Record::Event { kind, fields, .. } => cuts.note(last, &kind, &fields),
            }
        }
        let earliest = |a: Option<Place>, b: Option<Place>| [a, b].into_iter().flatten().min();
        self.scan.cuts.stop = earliest(cuts.stop, self.scan.cuts.stop);
        self.scan.cuts.cut = earliest(cuts.cut, self.scan.cuts.cut);
        Ok(())
    }
}

impl Tail {
    fn join(&mut self, ends: &mut [End], from: From, complete: bool) {
        let cuts: Vec<Cuts> = ends.iter().map(|end| end.scan.cuts).collect();
        for (index, (end, stop)) in ends.iter_mut().zip(Cuts::ends(&cuts)).enumerate() {
            for mut boundary in end.scan.behind.drain(..) {
                let place = boundary.place();
                if stop.is_some_and(|stop| place >= stop) {
                    break;
                }
                let restarts = cuts[index].cut == Some(place);
                let earlier = self.boundaries.remove(&place).filter(|_| !restarts);
                boundary.lives = earlier.map_or_else(Vec::new, |earlier| earlier.lives);
                boundary.lives.push(end.life);
                self.boundaries.insert(place, boundary);
            }
        }
        self.has_head = ends.iter().any(|end| {
            end.life <= from.life && (end.start == from.head || end.scan.chains.contains(&from.head))
        });
        if complete {
            self.follow(ends);
        }
    }

    /// Names lives that go on from a record that no earlier one has. Only a journal that was read in full can tell.
    fn follow(&mut self, ends: &[End]) {
        for (index, end) in ends.iter().enumerate() {
            let earlier = &ends[..index];
            let known = |head: &Digest| {
                earlier
                    .iter()
                    .any(|end| end.start == *head || end.scan.chains.contains(head))
            };
            if end.previous != Digest([0; 32]) && !known(&end.previous) {
                let (name, step, previous) = (&end.name, end.from.0, end.previous.short());
                self.warnings.push(format!(
                    "`{name}` goes on from step {step} and record {previous}, {NO_EARLIER}"
                ));
            }
        }
    }
}
