//! The journal on disk: one segment a life, appended to and never rewritten, read back as one story.
//!
//! Touches: one [`Directory`], in `journal/` and `tmp/`. No clocks, no globals. Segments are read a piece at a time,
//! however long they are. A torn last record is normal after a crash; damage before the end is named and costs what
//! follows it in that segment, never a checkpoint.

mod resume;
mod segment;
mod story;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::journal::{self, Component, Payload, Record, SegmentHeader};
use crate::format::saved::{self, Node, Outline, SAVED, Saved};
use crate::state::Value;
use crate::storage::{Directory, File, Syncer};
use crate::store::temporary_name;

pub(crate) use resume::{From, Tail, resume};
pub(crate) use segment::{Segment, reader, segments, told};
pub use story::{Boundaries, Save, Story};

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

/// The largest segment that is read, in bytes: ten million steps of one life.
pub(crate) const MAX_SEGMENT: u64 = 16 << 30;

/// (step, phase) of a boundary.
pub(crate) type Place = (u64, u8);

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

impl Boundary {
    /// A boundary that no life has recorded yet.
    pub fn new(
        step: u64,
        phase: u8,
        epoch: u64,
        position: u64,
        components: Vec<(String, Component)>,
    ) -> Boundary {
        Boundary {
            step,
            phase,
            epoch,
            position,
            components,
            lives: Vec::new(),
        }
    }

    pub(crate) fn place(&self) -> Place {
        (self.step, self.phase)
    }
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

/// A whole journal in memory, for short ones; a [`Story`] is read step by step.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    /// Each boundary once, in order.
    pub boundaries: Vec<Boundary>,
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
}

impl Journal {
    /// The boundary at (step, phase), if it was recorded.
    pub fn at(&self, step: u64, phase: u8) -> Option<&Boundary> {
        let found = self
            .boundaries
            .binary_search_by_key(&(step, phase), Boundary::place);
        found.ok().map(|index| &self.boundaries[index])
    }
}

/// Reads all segments of a run and joins them.
///
/// # Errors
///
/// Only where a segment that is there cannot be read for another reason than its content.
pub fn read(directory: &Directory, run_id: &str) -> Result<Journal> {
    let story = Story::open(directory, run_id)?;
    let mut boundaries = story.boundaries();
    let collected = boundaries.by_ref().collect::<Result<_>>()?;
    let mut warnings = story.warnings.clone();
    warnings.extend(boundaries.conflict_words());
    Ok(Journal {
        boundaries: collected,
        events: story.events,
        saves: story.saves,
        lives: story.lives,
        warnings,
        last_life: story.last_life,
    })
}

/// The field of an event, if it has it.
pub fn field<'a>(fields: &'a [(String, Value)], name: &str) -> Option<&'a Value> {
    fields
        .iter()
        .find(|(found, _)| found == name)
        .map(|(_, value)| value)
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

/// A record of which only a part has arrived.
#[derive(Debug)]
struct Unfinished {
    /// Where in the training it is, if it is a boundary's.
    place: Option<Place>,
    bytes: Vec<u8>,
    /// How many of the bytes arrived.
    done: usize,
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
    /// Chain hash at each boundary since the last commit, and when it was recorded.
    heads: BTreeMap<Place, (Digest, Instant)>,
    /// Nodes of the state that the segment's last saved event left standing.
    nodes: Option<Arc<Vec<Node>>>,
    unfinished: Option<Unfinished>,
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
            nodes: None,
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
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let place = match record {
            Record::Boundary { step, phase, .. } => Some((*step, *phase)),
            Record::Event { .. } => None,
        };
        self.append_payload(Payload::of(record)?, place)
    }

    /// Appends a boundary's record, like [`Writer::append`].
    pub fn append_boundary(&mut self, boundary: &Boundary) -> Result<()> {
        let payload = Payload::of_boundary(
            boundary.step,
            boundary.phase,
            boundary.epoch,
            boundary.position,
            &boundary.components,
        )?;
        self.append_payload(payload, Some(boundary.place()))
    }

    fn append_payload(&mut self, payload: Payload, place: Option<Place>) -> Result<()> {
        if self.finish()?.is_some_and(|finished| finished == payload) {
            return Ok(());
        }
        let (bytes, _) = payload.seal(&self.chain);
        self.unfinished = Some(Unfinished {
            place,
            bytes,
            done: 0,
        });
        if let Err(error) = self.finish() {
            // Where nothing arrived, there is nothing to complete.
            self.unfinished = self.unfinished.take().filter(|left| left.done > 0);
            return Err(error);
        }
        Ok(())
    }

    /// Writes what is left of an unfinished record, and returns it.
    fn finish(&mut self) -> Result<Option<Payload>> {
        let Some(Unfinished { bytes, done, .. }) = &mut self.unfinished else {
            return Ok(None);
        };
        let before = self.file.written();
        let outcome = self.file.write_all(&bytes[*done..]);
        *done += usize::try_from(self.file.written() - before).expect("no more arrived than was given");
        outcome?;
        let Unfinished { place, bytes, .. } = self.unfinished.take().expect("it was there a moment ago");
        let (payload, chain) = Payload::unseal(bytes);
        self.chain = chain;
        if let Some(place) = place {
            self.heads.insert(place, (self.chain, Instant::now()));
        }
        Ok(Some(payload))
    }

    /// Chain hash at the last boundary that is not after (step, phase).
    pub fn head_at(&self, step: u64, phase: u8) -> Digest {
        self.heads
            .range(..=(step, phase))
            .next_back()
            .map_or(self.start, |(_, (chain, _))| *chain)
    }

    /// When a boundary was recorded, if this life did since the last commit.
    pub fn recorded_at(&self, step: u64, phase: u8) -> Option<Instant> {
        self.heads.get(&(step, phase)).map(|(_, instant)| *instant)
    }

    /// Appends the event behind a checkpoint.
    pub fn saved(&mut self, step: u64, saved: &Saved, outline: &Outline, time: String) -> Result<()> {
        let fields = saved::lower(saved, outline, self.nodes.as_ref())?;
        let has_nodes = matches!(saved::nodes_field(&fields), Some(Value::List(_)));
        self.append(&Record::Event {
            kind: SAVED.to_owned(),
            step,
            fields,
            time,
        })?;
        if has_nodes {
            self.nodes = Some(Arc::clone(&outline.nodes));
        }
        Ok(())
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
        let found = segment::head(&self.directory, &old)?;
        if found != self.chain {
            return Err(Error::Damaged {
                path: self.directory.path(&old),
                part: "journal".to_owned(),
                expected: self.chain.short(),
                found: found.short(),
            });
        }
        let temporary = temporary_name()?;
        let new = segment_name(self.life, self.part + 1);
        let mut file = self.directory.create_new(&temporary)?;
        segment::copy(&self.directory, &old, &mut file)?;
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
