//! The journal on disk: one segment a life, appended to and never rewritten, read back as one story.
//!
//! Touches: one [`Directory`], in `journal/` and `tmp/`. No clocks, no globals. A torn last record is normal after a
//! crash; damage before the end is named and costs what follows it in that segment, never a checkpoint.

use std::collections::{BTreeMap, HashSet};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::journal::{self, Component, Ending, Record, SegmentHeader, SegmentReader};
use crate::state::Value;
use crate::storage::{Directory, File, Source, Syncer};
use crate::store::temporary_name;

/// Directory of the segments.
pub(crate) const JOURNAL: &str = "journal";

/// Kind of the event behind a boundary that came out otherwise than an earlier life recorded it.
///
/// Its field `went_on` tells whether the life went on (its records count from there, and those of earlier lives do
/// not) or stopped (its own records from there do not count). Without it, a second attempt would be compared with the
/// first one's error and be called identical.
pub const DIVERGED: &str = "diverged";

/// How the warning of a life ends that goes on from a record that is not there.
pub(crate) const NO_EARLIER: &str = "which no earlier segment has";

/// The largest segment that is read, in bytes: a million steps of one life, and what a stranger's may cost in memory.
pub(crate) const MAX_SEGMENT: u64 = 2 << 30;

/// What one boundary was made of, and which lives executed the step before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Optimizer updates so far.
    pub step: u64,
    /// 0: after a step inside an epoch. 1: an epoch's after-work is done. 2: the run is finished.
    pub phase: u8,
    /// Epoch counted from 0.
    pub epoch: u64,
    /// Position in the epoch: batches handed out.
    pub position: u64,
    /// Named components in causal order, as the newest of its lives recorded them.
    pub components: Vec<(String, Component)>,
    /// Lives that recorded it, oldest first.
    pub lives: Vec<u32>,
}

/// The first component in which a boundary differs from another record of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Step of the boundary.
    pub step: u64,
    /// Phase of the boundary.
    pub phase: u8,
    /// Which component.
    pub component: String,
    /// What was recorded, such as by an earlier life.
    pub expected: String,
    /// What was found, such as by this life.
    pub found: String,
}

/// What is not a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Process life in which it happened.
    pub life: u32,
    /// Which sort, such as `signal`.
    pub kind: String,
    /// Optimizer updates when it happened.
    pub step: u64,
    /// Its parts, in order.
    pub fields: Vec<(String, Value)>,
    /// When, as an RFC 3339 timestamp.
    pub time: String,
}

/// The segments of all lives, joined.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    /// Each boundary once, in order.
    pub boundaries: Vec<Boundary>,
    /// Events, in the order of lives.
    pub events: Vec<Event>,
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
    /// Highest (step, phase) that any life recorded, whatever was asked for.
    pub last: Option<(u64, u8)>,
    /// Chain hashes that a later life or a checkpoint may name.
    heads: HashSet<Digest>,
}

impl Journal {
    /// Whether a chain hash is in the readable part.
    pub fn has_head(&self, head: &Digest) -> bool {
        self.heads.contains(head)
    }

    /// The boundary at (step, phase), if it was recorded.
    pub fn at(&self, step: u64, phase: u8) -> Option<&Boundary> {
        let found = self
            .boundaries
            .binary_search_by_key(&(step, phase), |boundary| (boundary.step, boundary.phase));
        found.ok().map(|index| &self.boundaries[index])
    }
}

/// The first component in which a boundary differs from what was recorded for it: its name, what was recorded, what
/// was found. A component that only one of them has is a difference too.
pub fn first_difference(recorded: &Boundary, found: &Boundary) -> Option<(String, String, String)> {
    let numbers = [
        ("epoch", recorded.epoch, found.epoch),
        ("position", recorded.position, found.position),
    ];
    if let Some((name, old, new)) = numbers.into_iter().find(|(_, old, new)| old != new) {
        return Some((name.to_owned(), old.to_string(), new.to_string()));
    }
    let (old, new) = (&recorded.components, &found.components);
    for index in 0..old.len().max(new.len()) {
        match (old.get(index), new.get(index)) {
            (Some((name, expected)), Some((other, value))) if name == other => {
                if expected != value {
                    return Some((name.clone(), show(expected), show(value)));
                }
            }
            // Named for what is missing, unless it only comes later and something new is in its place.
            (Some((name, expected)), _) if !new.iter().any(|(other, _)| other == name) => {
                return Some((name.clone(), show(expected), "nothing".to_owned()));
            }
            (_, Some((name, value))) => {
                let elsewhere = old.iter().find(|(other, _)| other == name);
                let expected = elsewhere.map_or("nothing".to_owned(), |_| "it later".to_owned());
                return Some((name.clone(), expected, show(value)));
            }
            (Some((name, expected)), None) => {
                return Some((name.clone(), show(expected), "it earlier".to_owned()));
            }
            (None, None) => unreachable!("the index is below the longer length"),
        }
    }
    None
}

/// Shows a component to people: numbers as numbers with the bits of a float, digests by their first digits.
pub fn show(component: &Component) -> String {
    match component {
        Component::Digest(bytes) => bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect(),
        Component::Int(number) => number.to_string(),
        Component::Float(bits) => format!("{} (bits {bits:016x})", f64::from_bits(*bits)),
        Component::Text(text) => text.clone(),
    }
}

/// `000003.journal`, or `000003-1.journal` for the first copy of it.
fn segment_name(life: u32, part: u32) -> String {
    match part {
        0 => format!("{JOURNAL}/{life:06}.journal"),
        part => format!("{JOURNAL}/{life:06}-{part}.journal"),
    }
}

pub(crate) fn parse_segment_name(name: &str) -> Option<(u32, u32)> {
    let stem = name.strip_suffix(".journal")?;
    let (life, part) = stem.split_once('-').unwrap_or((stem, "0"));
    let (life, part) = (life.parse().ok()?, part.parse().ok()?);
    (segment_name(life, part) == format!("{JOURNAL}/{name}")).then_some((life, part))
}

/// Reads one segment's file. One that is nothing but zeros, the trace of a power cut or a file of holes, is as an empty one.
fn read_segment(directory: &Directory, name: &str) -> Result<Vec<u8>> {
    let source = directory.open(name)?;
    let length = source.len()?;
    if length <= MAX_SEGMENT && only_zeros(&source, length)? {
        return Ok(Vec::new());
    }
    source.read_all(MAX_SEGMENT)
}

/// Whether a file holds nothing but zeros, in little memory; the first bytes of one that was written tell.
fn only_zeros(source: &Source, length: u64) -> Result<bool> {
    let zeros = vec![0; length.min(1 << 20) as usize];
    let mut piece = zeros.clone();
    let mut done = 0;
    while done < length {
        let count = (length - done).min(piece.len() as u64) as usize;
        source.read_exact_at(done, &mut piece[..count])?;
        if piece[..count] != zeros[..count] {
            return Ok(false);
        }
        done += count as u64;
    }
    Ok(true)
}

/// Reads all segments of a run and joins them.
///
/// Boundaries up to and including `after` are checked and counted, and not returned.
///
/// # Errors
///
/// Only where a segment that is there cannot be read for another reason than its content.
pub fn read(directory: &Directory, run_id: &str, after: Option<(u64, u8)>) -> Result<Journal> {
    let mut journal = Journal::default();
    let mut segments = BTreeMap::new();
    for name in directory.list_if_there(JOURNAL)? {
        match parse_segment_name(&name) {
            // A later part of a life is a copy of the earlier one, made when that could not be synced.
            Some((life, part)) => {
                let newest = segments.entry(life).or_insert(part);
                *newest = part.max(*newest);
            }
            None => journal
                .warnings
                .push(format!("`{JOURNAL}/{name}` is no journal segment; left alone")),
        }
    }
    let mut joined = BTreeMap::new();
    for (life, part) in segments {
        journal.last_life = life;
        let name = segment_name(life, part);
        let outcome = read_segment(directory, &name).and_then(|bytes| {
            let reader = SegmentReader::new(&bytes).map_err(|flaw| flaw.at(directory.path(&name)))?;
            journal.join(&name, run_id, life, reader, after, &mut joined);
            Ok(())
        });
        match outcome {
            Ok(()) => {}
            Err(error) if crate::store::is_damage(&error) => {
                journal.unreadable = true;
                journal
                    .warnings
                    .push(format!("{error}; what life {life} recorded cannot be verified"));
            }
            Err(error) => return Err(error),
        }
    }
    journal.boundaries = joined.into_values().collect();
    Ok(journal)
}

impl Journal {
    fn join(
        &mut self,
        name: &str,
        run_id: &str,
        life: u32,
        mut reader: SegmentReader,
        after: Option<(u64, u8)>,
        joined: &mut BTreeMap<(u64, u8), Boundary>,
    ) {
        let Some(header) = reader.header().cloned() else {
            return;
        }; // Torn before it said anything.
        if header.run_id != run_id || header.life != life {
            let (run, other) = (&header.run_id, header.life);
            self.foreign |= header.run_id != run_id;
            self.warnings
                .push(format!("`{name}` is of life {other} of run {run}; left alone"));
            return;
        }
        if header.previous != Digest([0; 32]) && !self.heads.contains(&header.previous) {
            let (step, previous) = (header.step, header.previous.short());
            self.warnings.push(format!(
                "`{name}` goes on from step {step} and record {previous}, {NO_EARLIER}"
            ));
        }
        self.lives.push(header);
        self.heads.insert(reader.head());
        let mut stopped = false;
        // This life's last boundary, and what it took the place of.
        let mut last = None;
        let mut replaced: Option<Boundary> = None;
        for entry in reader.by_ref() {
            self.heads.insert(entry.chain);
            match entry.record {
                Record::Boundary {
                    step,
                    phase,
                    epoch,
                    position,
                    components,
                } => {
                    let key = (step, phase);
                    self.last = self.last.max(Some(key));
                    if stopped {
                        continue;
                    }
                    last = Some(key);
                    replaced = joined.remove(&key);
                    if after.is_some_and(|after| key <= after) {
                        continue;
                    }
                    let mut lives = replaced
                        .as_ref()
                        .map_or_else(Vec::new, |earlier| earlier.lives.clone());
                    lives.push(life);
                    joined.insert(
                        key,
                        Boundary {
                            step,
                            phase,
                            epoch,
                            position,
                            components,
                            lives,
                        },
                    );
                }
                Record::Event {
                    kind,
                    step,
                    fields,
                    time,
                } => {
                    if kind == DIVERGED && !stopped {
                        let went_on = fields
                            .iter()
                            .any(|(name, value)| name == "went_on" && *value == Value::Bool(true));
                        stopped = !went_on;
                        match (last, replaced.take()) {
                            (Some(key), _) if went_on => {
                                if let Some(boundary) = joined.get_mut(&key) {
                                    boundary.lives = vec![life];
                                }
                                joined.retain(|other, boundary| *other <= key || boundary.lives == [life]);
                            }
                            (Some(key), Some(earlier)) => drop(joined.insert(key, earlier)),
                            (Some(key), None) => drop(joined.remove(&key)),
                            (None, _) => {}
                        }
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
        }
        if let Ending::Damaged {
            offset,
            after_step,
            what,
            ..
        } = reader.ending()
        {
            self.warnings.push(format!(
                "`{name}` is damaged at byte {offset}, after step {after_step}: {what}; \
                 what follows in it cannot be verified"
            ));
        }
    }
}

/// One life's segment, as it is on disk: the chain that its records make.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) header: SegmentHeader,
    /// Chain hash that the first record continues.
    pub(crate) start: Digest,
    /// (step, chain hash up to and including it) of each whole record.
    pub(crate) records: Vec<(u64, Digest)>,
    /// What is wrong with what follows, if something is.
    pub(crate) damage: Option<String>,
}

/// Reads the segments of all lives one by one, in order; those without a readable header by what is wrong with them.
pub(crate) fn segments(directory: &Directory) -> Result<(Vec<Segment>, Vec<String>)> {
    let (mut segments, mut unreadable) = (Vec::new(), Vec::new());
    let mut newest = BTreeMap::new();
    for (life, part) in directory
        .list_if_there(JOURNAL)?
        .iter()
        .filter_map(|name| parse_segment_name(name))
    {
        let highest = newest.entry(life).or_insert(part);
        *highest = part.max(*highest);
    }
    for (life, part) in newest {
        let name = segment_name(life, part);
        let bytes = read_segment(directory, &name)?;
        let mut reader = match SegmentReader::new(&bytes) {
            Ok(reader) => reader,
            Err(flaw) => {
                unreadable.push(flaw.at(directory.path(&name)).to_string());
                continue;
            }
        };
        let Some(header) = reader.header().cloned() else {
            continue;
        };
        let start = reader.head();
        let records = reader
            .by_ref()
            .map(|entry| match entry.record {
                Record::Boundary { step, .. } | Record::Event { step, .. } => (step, entry.chain),
            })
            .collect();
        let damage = match reader.ending() {
            Ending::Damaged { after_step, what, .. } => {
                Some(format!("damaged after step {after_step}: {what}"))
            }
            _ => None,
        };
        segments.push(Segment {
            header,
            start,
            records,
            damage,
        });
    }
    Ok((segments, unreadable))
}

/// Appends to one life's segment.
#[derive(Debug)]
pub(crate) struct Writer {
    directory: Directory,
    file: File,
    life: u32,
    part: u32,
    chain: Digest,
    /// Chain hash of the header, which stands for the boundary that the life started from.
    start: Digest,
    /// Chain hash at each boundary since the last commit.
    heads: BTreeMap<(u64, u8), Digest>,
    /// A record that only a part of arrived, its chain hash, and how many of its bytes did.
    unfinished: Option<(Record, Vec<u8>, usize)>,
    /// Whether a sync failed: the system may have dropped what was written.
    doubtful: bool,
    /// A file that a copy replaced and that could not be removed yet.
    replaced: Option<String>,
}

impl Writer {
    /// Starts a life's segment.
    ///
    /// # Durability
    ///
    /// On return the segment's name and header survive a power cut.
    pub fn begin(directory: &Directory, header: &SegmentHeader) -> Result<Writer> {
        let (bytes, chain) = journal::encode_header(header)?;
        // Under a name of its own first, so that an attempt that fails can be made again.
        let temporary = temporary_name()?;
        let mut file = directory.create_new(&temporary)?;
        let name = segment_name(header.life, 0);
        let started = file
            .write_all(&bytes)
            .and_then(|()| file.sync())
            .and_then(|()| directory.rename_new(&temporary, &name))
            .and_then(|()| {
                directory
                    .sync_dir(JOURNAL)
                    .inspect_err(|_| drop(directory.remove(&name)))
            });
        if let Err(error) = started {
            let _ = directory.remove(&temporary); // Swept at the next open otherwise.
            return Err(error);
        }
        Ok(Writer {
            directory: directory.clone(),
            file,
            life: header.life,
            part: 0,
            chain,
            start: chain,
            heads: BTreeMap::new(),
            unfinished: None,
            doubtful: false,
            replaced: None,
        })
    }

    /// Appends one record with one write call.
    ///
    /// # Durability
    ///
    /// On return the operating system has it: it survives a kill, not a power cut.
    ///
    /// # Errors
    ///
    /// The record is not in the journal, or in part; giving the same record again completes it.
    pub fn append(&mut self, record: Record) -> Result<()> {
        let finished = self.finish()?;
        if finished.as_ref() == Some(&record) {
            return Ok(());
        }
        let (bytes, _) = journal::encode_record(&self.chain, &record)?;
        self.unfinished = Some((record, bytes, 0));
        if let Err(error) = self.finish() {
            if matches!(self.unfinished, Some((_, _, 0))) {
                self.unfinished = None; // Nothing arrived, so there is nothing to complete.
            }
            return Err(error);
        }
        Ok(())
    }

    /// Writes what is left of an unfinished record, and returns it.
    fn finish(&mut self) -> Result<Option<Record>> {
        let Some((_, bytes, done)) = &mut self.unfinished else {
            return Ok(None);
        };
        let before = self.file.written();
        let outcome = self.file.write_all(&bytes[*done..]);
        *done += usize::try_from(self.file.written() - before).expect("no more arrived than was given");
        outcome?;
        let (record, bytes, _) = self.unfinished.take().expect("it was there a moment ago");
        let hash = bytes.last_chunk().expect("a record ends with its chain hash");
        self.chain = Digest(*hash);
        if let Record::Boundary { step, phase, .. } = record {
            self.heads.insert((step, phase), self.chain);
        }
        Ok(Some(record))
    }

    /// Chain hash at the last boundary that is not after (step, phase).
    pub fn head_at(&self, step: u64, phase: u8) -> Digest {
        self.heads
            .range(..=(step, phase))
            .next_back()
            .map_or(self.start, |(_, chain)| *chain)
    }

    /// Forgets the chain hashes of boundaries before (step, phase), which was committed.
    pub fn forget_before(&mut self, step: u64, phase: u8) {
        self.start = self.head_at(step, phase);
        self.heads = self.heads.split_off(&(step, phase));
    }

    /// Returns a handle that syncs everything appended so far, without stopping others from appending.
    ///
    /// # Errors
    ///
    /// After a failed sync the segment is first copied to a new file; if what was written is no longer there, that
    /// is an error.
    pub fn syncer(&mut self) -> Result<Syncer> {
        self.finish()?;
        if self.doubtful {
            self.copy()?;
        }
        if let Some(name) = &self.replaced {
            self.directory.remove(name)?;
            self.replaced = None;
        }
        Ok(self.file.syncer())
    }

    /// Takes note that a sync failed.
    pub fn doubt(&mut self) {
        self.doubtful = true;
    }

    /// Writes the segment to a new file, durably: a failed sync must not be tried again on the old one.
    fn copy(&mut self) -> Result<()> {
        let old = segment_name(self.life, self.part);
        let bytes = self.directory.read_all(&old, MAX_SEGMENT)?;
        let mut reader = SegmentReader::new(&bytes).map_err(|flaw| flaw.at(self.directory.path(&old)))?;
        reader.by_ref().for_each(drop);
        if reader.head() != self.chain {
            return Err(Error::Damaged {
                path: self.directory.path(&old),
                part: "journal".to_owned(),
                expected: self.chain.short(),
                found: reader.head().short(),
            });
        }
        let temporary = temporary_name()?;
        let new = segment_name(self.life, self.part + 1);
        let mut file = self.directory.create_new(&temporary)?;
        file.write_all(&bytes)?;
        file.sync()?;
        self.directory.rename_new(&temporary, &new)?;
        self.file = file;
        self.part += 1;
        self.replaced = Some(old);
        self.directory.sync_dir(JOURNAL)?;
        self.doubtful = false;
        Ok(())
    }
}
