//! The journal's bytes: a segment a life, a record a boundary, each record hashed together with the one before it.
//!
//! Touches: nothing. A torn last record is normal after a crash, and is told apart from damage before the end by looking
//! for a whole record behind the broken one.

use crate::digest::{Digest, Hasher};
use crate::format::record::{self, Fields};
use crate::format::{FORMAT_VERSION, Flaw, value};
use crate::state::Value;

// Segment: | magic 8 | version u32 | length u32 | header, canonical CBOR | chain hash = BLAKE3 of all before, 32 |
// Record:  | length u32 | payload, canonical CBOR | chain hash = BLAKE3(chain hash before, payload), 32 |
const MAGIC: &[u8; 8] = b"UNBRKJNL";
const HEADER: usize = 8 + 4 + 4;
const LENGTH: usize = 4;
const HASH: usize = 32;

/// The largest payload of one record, in bytes.
pub const MAX_RECORD: usize = 16 << 20;
/// How much memory one decoded record may take, in bytes, counted as for any value.
pub const MAX_MEMORY: usize = 256 << 20;
/// The largest payload of a segment's header, in bytes.
pub const MAX_HEADER: usize = 4096;
/// The longest digest that a component may hold, in bytes.
pub const MAX_COMPONENT_DIGEST: usize = 64;

/// How many bytes may be hashed in search of a whole record behind a broken one.
const SEARCH_BUDGET: usize = 256 << 20;

const HEADER_KEYS: [&str; 6] = ["run", "life", "step", "phase", "previous", "created"];
const BOUNDARY: &str = "boundary";
const EVENT: &str = "event";

/// What a segment says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Which run it belongs to.
    pub run_id: String,
    /// Process life that writes it, counted from 1.
    pub life: u32,
    /// Step of the checkpoint this life started from.
    pub step: u64,
    /// Phase of that checkpoint.
    pub phase: u8,
    /// Chain hash of the record at that checkpoint (its `journal_head`); 32 zero bytes for a run's first life.
    pub previous: Digest,
    /// When, as an RFC 3339 timestamp.
    pub created: String,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A boundary: what the step before it was made of.
    Boundary {
        /// Optimizer updates so far.
        step: u64,
        /// 0: after a step inside an epoch. 1: an epoch's after-work is done. 2: the run is finished.
        phase: u8,
        /// Epoch counted from 0.
        epoch: u64,
        /// Position in the epoch: batches handed out.
        position: u64,
        /// Named components in causal order, each name once.
        components: Vec<(String, Component)>,
    },
    /// What is not a step: an override, a signal, a resume, a mark.
    Event {
        /// Which sort, such as `signal`.
        kind: String,
        /// Optimizer updates when it happened.
        step: u64,
        /// Its parts, in order.
        fields: Vec<(String, Value)>,
        /// When, as an RFC 3339 timestamp.
        time: String,
    },
}

/// One named part of a boundary's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Component {
    /// A digest, at most [`MAX_COMPONENT_DIGEST`] bytes.
    Digest(Vec<u8>),
    /// An integer.
    Int(i64),
    /// A float by its bits.
    Float(u64),
    /// Text.
    Text(String),
}

/// A record and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The record.
    pub record: Record,
    /// Its first byte, counted from the start of the segment.
    pub offset: u64,
    /// Chain hash up to and including it.
    pub chain: Digest,
}

/// How a segment ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With a whole record, or with the header where there is none.
    Complete,
    /// With bytes of a record that was never finished. Normal after a crash.
    Torn {
        /// Where the last whole record ends: the length to keep.
        offset: u64,
    },
    /// With damage: whole records follow, or what is there is whole and breaks a rule.
    Damaged {
        /// Where the last good record ends.
        offset: u64,
        /// Number of good records before it.
        record: u64,
        /// Step of the last good boundary before it; the header's step where there is none.
        after_step: u64,
        /// What is wrong.
        what: String,
    },
}

/// Returns the bytes that a segment starts with, and the chain hash that its first record continues.
///
/// # Errors
///
/// [`Flaw::Limit`] or [`Flaw::Malformed`] where a field is too long or not what it should be.
pub fn encode_header(header: &SegmentHeader) -> Result<(Vec<u8>, Digest), Flaw> {
    check_header(header)?;
    let values = [
        Value::Str(header.run_id.clone()),
        Value::Int(i64::from(header.life)),
        record::count("a step", header.step)?,
        Value::Int(i64::from(header.phase)),
        record::digest(&header.previous),
        Value::Str(header.created.clone()),
    ];
    let keys = HEADER_KEYS.iter().map(|key| Value::Str((*key).to_owned()));
    let payload = value::encode(&Value::Dict(keys.zip(values).collect()))?;
    let mut bytes = Vec::with_capacity(HEADER + payload.len() + HASH);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&payload);
    let chain = Digest::of(&bytes);
    bytes.extend_from_slice(&chain.0);
    Ok((bytes, chain))
}

/// Returns the bytes of one record, and the chain hash including it.
///
/// # Errors
///
/// [`Flaw::Limit`] or [`Flaw::Malformed`] where a field is too long or not what it should be.
pub fn encode_record(previous: &Digest, record: &Record) -> Result<(Vec<u8>, Digest), Flaw> {
    check_record(record)?;
    let payload = value::encode_nested(&lower(record)?, value::MAX_DEPTH + 2, MAX_MEMORY)?;
    if payload.len() > MAX_RECORD {
        let length = payload.len();
        return Err(Flaw::limit(format!(
            "a journal record of {length} bytes, at most {MAX_RECORD} are allowed"
        )));
    }
    let chain = link(previous, &payload);
    let mut bytes = Vec::with_capacity(LENGTH + payload.len() + HASH);
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&payload);
    bytes.extend_from_slice(&chain.0);
    Ok((bytes, chain))
}

fn link(previous: &Digest, payload: &[u8]) -> Digest {
    Hasher::new().update(&previous.0).update(payload).finish()
}

/// Reads one segment's bytes, record by record.
///
/// ```
/// use unbroken::format::journal::{Ending, SegmentReader};
///
/// let mut reader = SegmentReader::new(b"UNBRKJNL\x01\0")?; // The power failed while the header was written.
/// assert_eq!(reader.header(), None);
/// assert_eq!(reader.by_ref().count(), 0);
/// assert_eq!(reader.ending(), Ending::Torn { offset: 0 });
/// # Ok::<(), unbroken::error::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SegmentReader<'a> {
    bytes: &'a [u8],
    header: Option<SegmentHeader>,
    /// Where the last whole record ends.
    offset: usize,
    chain: Digest,
    records: u64,
    step: u64,
    /// Known once there is nothing more to read.
    ending: Option<Ending>,
}

impl<'a> SegmentReader<'a> {
    /// Opens a segment.
    ///
    /// A segment torn inside its header opens: it has no header, no records, and ends torn at 0.
    ///
    /// # Errors
    ///
    /// [`Flaw::NotOurs`], [`Flaw::Version`]; [`Flaw::Damaged`] where records follow a header that does not hold;
    /// [`Flaw::Malformed`] where the header is whole and breaks a rule.
    pub fn new(bytes: &'a [u8]) -> Result<SegmentReader<'a>, Flaw> {
        let chain = Digest([0; 32]);
        let torn = Some(Ending::Torn { offset: 0 });
        let mut reader = SegmentReader {
            bytes,
            header: None,
            offset: 0,
            chain,
            records: 0,
            step: 0,
            ending: torn,
        };
        // A file system may give a file its length before its bytes: then they are zero.
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(reader);
        }
        if !MAGIC.starts_with(&bytes[..bytes.len().min(MAGIC.len())]) {
            return Err(Flaw::NotOurs {
                what: "a journal segment",
            });
        }
        let Some((head, rest)) = bytes.split_at_checked(HEADER) else {
            return Ok(reader);
        };
        let version = u32::from_le_bytes(head[8..12].try_into().expect("four bytes"));
        let length = u32::from_le_bytes(head[12..16].try_into().expect("four bytes")) as usize;
        // Zero where the length reached the disk and the bytes did not.
        if version != FORMAT_VERSION && !bytes[MAGIC.len()..].iter().all(|byte| *byte == 0) {
            return Err(Flaw::Version {
                what: "a journal segment",
                found: version,
            });
        }
        let whole = (1..=MAX_HEADER).contains(&length) && rest.len() >= length + HASH;
        let end = HEADER + if whole { length } else { 0 };
        if !whole || Digest::of(&bytes[..end]).0 != bytes[end..end + HASH] {
            let hash_broken = whole && continues(bytes, end + HASH, &Digest::of(&bytes[..end]));
            return if hash_broken || has_record_after(bytes, HEADER) {
                Err(Flaw::Damaged {
                    part: "header of the journal segment".to_owned(),
                    expected: "whole where records follow".to_owned(),
                    found: "other bytes".to_owned(),
                })
            } else {
                Ok(reader)
            };
        }
        let header = raise_header(value::decode(&bytes[HEADER..end])?)?;
        reader.step = header.step;
        reader.header = Some(header);
        reader.offset = end + HASH;
        reader.chain = Digest(bytes[end..end + HASH].try_into().expect("32 bytes"));
        reader.ending = None;
        Ok(reader)
    }

    /// What the segment says of itself; `None` where it is torn before that.
    pub fn header(&self) -> Option<&SegmentHeader> {
        self.header.as_ref()
    }

    /// Where the last whole record read so far ends; after the last one, the length to keep.
    pub fn offset(&self) -> u64 {
        self.offset as u64
    }

    /// Chain hash up to and including the last record read so far. All zero where there is no header.
    pub fn head(&self) -> Digest {
        self.chain
    }

    /// How the segment ends: reads what is left.
    pub fn ending(mut self) -> Ending {
        self.by_ref().for_each(drop);
        self.ending.expect("a reader that has nothing more knows why")
    }

    /// Reads the record at `offset`; `None` where there is no whole one that continues the chain.
    fn whole(&self) -> Option<(&'a [u8], Digest)> {
        let (payload, stored) = frame(self.bytes, self.offset)?;
        let chain = link(&self.chain, payload);
        (chain.0 == *stored).then_some((payload, chain))
    }

    /// Says why there is no whole record at `offset`.
    fn classify(&self) -> Ending {
        // The payload may be whole and only its hash broken: then the next record continues the hash it should have.
        let hash_broken = || {
            let (payload, _) = frame(self.bytes, self.offset)?;
            let next = self.offset + LENGTH + payload.len() + HASH;
            continues(self.bytes, next, &link(&self.chain, payload)).then_some(())
        };
        if self.offset == self.bytes.len() {
            Ending::Complete
        } else if hash_broken().is_some() || has_record_after(self.bytes, self.offset) {
            self.damaged("the record does not hash to its chain hash, and whole records follow".to_owned())
        } else {
            Ending::Torn {
                offset: self.offset as u64,
            }
        }
    }

    fn damaged(&self, what: String) -> Ending {
        Ending::Damaged {
            offset: self.offset as u64,
            record: self.records,
            after_step: self.step,
            what,
        }
    }
}

impl Iterator for SegmentReader<'_> {
    type Item = Entry;

    /// The next whole record; `None` at the end, whichever it is (ask [`SegmentReader::ending`]).
    fn next(&mut self) -> Option<Entry> {
        if self.ending.is_some() {
            return None;
        }
        let Some((payload, chain)) = self.whole() else {
            self.ending = Some(self.classify());
            return None;
        };
        let decoded = value::decode_nested(payload, value::MAX_DEPTH + 2, MAX_MEMORY).and_then(raise);
        let record = match decoded {
            Ok(record) => record,
            Err(flaw) => {
                self.ending = Some(self.damaged(flaw.to_string()));
                return None;
            }
        };
        if let Record::Boundary { step, .. } = record {
            self.step = step;
        }
        let offset = self.offset as u64;
        self.offset += LENGTH + payload.len() + HASH;
        self.chain = chain;
        self.records += 1;
        Some(Entry {
            record,
            offset,
            chain,
        })
    }
}

/// The payload and the stored chain hash of what might be a record; `None` where its length cannot be one.
fn frame(bytes: &[u8], offset: usize) -> Option<(&[u8], &[u8; HASH])> {
    let (length, rest) = bytes.get(offset..)?.split_first_chunk::<LENGTH>()?;
    let length = u32::from_le_bytes(*length) as usize;
    if !(1..=MAX_RECORD).contains(&length) {
        return None;
    }
    let (payload, rest) = rest.split_at_checked(length)?;
    Some((payload, rest.first_chunk::<HASH>()?))
}

/// Whether a whole record at `offset` continues a chain.
fn continues(bytes: &[u8], offset: usize, previous: &Digest) -> bool {
    frame(bytes, offset).is_some_and(|(payload, stored)| link(previous, payload).0 == *stored)
}

/// Whether a whole record starts somewhere behind `offset`.
///
/// Each record continues the 32 bytes right before it, so one can be recognised without reading what comes earlier.
/// Hashing is bounded: where the budget runs out, the answer is that one does, the safer of the two.
fn has_record_after(bytes: &[u8], offset: usize) -> bool {
    let mut budget = SEARCH_BUDGET;
    for start in offset.max(HASH - 1) + 1..bytes.len() {
        let Some((payload, _)) = frame(bytes, start) else {
            continue;
        };
        // A record is a list of five or six parts; the check spares nearly all the hashing.
        if !matches!(payload[0], 0x85 | 0x86) {
            continue;
        }
        if payload.len() > budget {
            return true;
        }
        budget -= payload.len();
        let previous = Digest(bytes[start - HASH..start].try_into().expect("32 bytes"));
        if continues(bytes, start, &previous) {
            return true;
        }
    }
    false
}

fn lower(record: &Record) -> Result<Value, Flaw> {
    Ok(Value::List(match record {
        Record::Boundary {
            step,
            phase,
            epoch,
            position,
            components,
        } => {
            let components = components.iter().map(|(name, component)| {
                let value = match component {
                    Component::Digest(bytes) => Value::Bytes(bytes.clone()),
                    Component::Int(number) => Value::Int(*number),
                    Component::Float(bits) => Value::Float(*bits),
                    Component::Text(text) => Value::Str(text.clone()),
                };
                (Value::Str(name.clone()), value)
            });
            vec![
                Value::Str(BOUNDARY.to_owned()),
                record::count("a step", *step)?,
                Value::Int(i64::from(*phase)),
                record::count("an epoch", *epoch)?,
                record::count("a position", *position)?,
                Value::Dict(components.collect()),
            ]
        }
        Record::Event {
            kind,
            step,
            fields,
            time,
        } => vec![
            Value::Str(EVENT.to_owned()),
            Value::Str(kind.clone()),
            record::count("a step", *step)?,
            record::named(fields),
            Value::Str(time.clone()),
        ],
    }))
}

fn raise(value: Value) -> Result<Record, Flaw> {
    let sort = match &value {
        Value::List(items) => items.first().cloned(),
        _ => None,
    };
    let record = match sort {
        Some(Value::Str(sort)) if sort == BOUNDARY => {
            let mut fields = Fields::of_list("a boundary's record", value, 6)?;
            fields.text()?;
            Record::Boundary {
                step: fields.count()?,
                phase: fields.small()?,
                epoch: fields.count()?,
                position: fields.count()?,
                components: fields
                    .named()?
                    .into_iter()
                    .map(raise_component)
                    .collect::<Result<_, _>>()?,
            }
        }
        Some(Value::Str(sort)) if sort == EVENT => {
            let mut fields = Fields::of_list("an event's record", value, 5)?;
            fields.text()?;
            Record::Event {
                kind: fields.text()?,
                step: fields.count()?,
                fields: fields.named()?,
                time: fields.text()?,
            }
        }
        _ => {
            return Err(Flaw::malformed(
                "a journal record of a sort that this release does not know",
            ));
        }
    };
    check_record(&record)?;
    Ok(record)
}

fn raise_component((name, value): (String, Value)) -> Result<(String, Component), Flaw> {
    let component = match value {
        Value::Bytes(bytes) => Component::Digest(bytes),
        Value::Int(number) => Component::Int(number),
        Value::Float(bits) => Component::Float(bits),
        Value::Str(text) => Component::Text(text),
        _ => {
            return Err(Flaw::malformed(format!(
                "the component {name:?} is of no known sort"
            )));
        }
    };
    Ok((name, component))
}

fn raise_header(value: Value) -> Result<SegmentHeader, Flaw> {
    let mut fields = Fields::of_dict("a journal segment's header", value, &HEADER_KEYS)?;
    let header = SegmentHeader {
        run_id: fields.text()?,
        life: fields.small()?,
        step: fields.count()?,
        phase: fields.small()?,
        previous: fields.digest()?,
        created: fields.text()?,
    };
    check_header(&header)?;
    Ok(header)
}

fn check_header(header: &SegmentHeader) -> Result<(), Flaw> {
    record::check_run_id(&header.run_id)?;
    record::check_phase(header.phase)?;
    record::check_time(&header.created)?;
    if header.life == 0 {
        Err(Flaw::malformed("life 0; lives count from 1"))
    } else {
        Ok(())
    }
}

fn check_record(record: &Record) -> Result<(), Flaw> {
    match record {
        Record::Boundary {
            phase, components, ..
        } => {
            record::check_phase(*phase)?;
            let too_long = |component: &Component| matches!(component, Component::Digest(bytes) if bytes.len() > MAX_COMPONENT_DIGEST);
            match components.iter().find(|(_, component)| too_long(component)) {
                Some((name, _)) => Err(Flaw::limit(format!(
                    "the digest {name:?} is longer than {MAX_COMPONENT_DIGEST} bytes"
                ))),
                None => Ok(()),
            }
        }
        Record::Event { time, .. } => record::check_time(time),
    }
}
