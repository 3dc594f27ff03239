//! The journal's bytes: a segment a life, a record a boundary, each record hashed together with the one before it.
//!
//! Touches: nothing; segments are read through a [`Window`], a piece at a time. A torn last record is normal after a
//! crash, and is told apart from damage before the end by looking for a whole record behind the broken one.

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

/// How many bytes are searched at a time.
const SEARCH_PIECE: usize = 64 << 10;

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
    let payload = value::encode(&Value::dict(keys.zip(values).collect()))?;
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
    Payload::of(record).map(|payload| payload.seal(previous))
}

/// A record before it is chained to the one before it. Equal records have equal payloads, and no others do. It is
/// written straight from the record's parts, because one is at every step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Payload {
    /// The payload, behind room for its length.
    bytes: Vec<u8>,
}

impl Payload {
    /// Of any record.
    pub(crate) fn of(record: &Record) -> Result<Payload, Flaw> {
        match record {
            Record::Boundary {
                step,
                phase,
                epoch,
                position,
                components,
            } => Payload::of_boundary(*step, *phase, *epoch, *position, components),
            Record::Event {
                kind,
                step,
                fields,
                time,
            } => Payload::of_event(kind, *step, fields, time),
        }
    }

    fn of_event(kind: &str, step: u64, fields: &[(String, Value)], time: &str) -> Result<Payload, Flaw> {
        record::check_time(time)?;
        let mut out = value::Writer::behind(vec![0; LENGTH], MAX_MEMORY)?;
        out.list(5)?;
        out.text(EVENT)?;
        out.text(kind)?;
        out.int(record::number("a step", step)?);
        out.mapping(
            fields,
            |out, name| out.text(name),
            // The list and the mapping are the two levels that a record has around a user's values.
            |out, value| out.value(value, value::MAX_DEPTH),
        )?;
        out.text(time)?;
        Payload::behind_room(out.finish())
    }

    /// Of a boundary's record.
    pub(crate) fn of_boundary(
        step: u64,
        phase: u8,
        epoch: u64,
        position: u64,
        components: &[(String, Component)],
    ) -> Result<Payload, Flaw> {
        check_boundary(phase, components)?;
        let mut room = Vec::with_capacity(1024);
        room.extend_from_slice(&[0; LENGTH]);
        let mut out = value::Writer::behind(room, MAX_MEMORY)?;
        out.list(6)?;
        out.text(BOUNDARY)?;
        out.int(record::number("a step", step)?);
        out.int(i64::from(phase));
        out.int(record::number("an epoch", epoch)?);
        out.int(record::number("a position", position)?);
        out.mapping(
            components,
            |out, name| out.text(name),
            |out, component| match component {
                Component::Digest(bytes) => out.byte_string(bytes),
                Component::Text(text) => out.text(text),
                Component::Int(number) => {
                    out.int(*number);
                    Ok(())
                }
                Component::Float(bits) => {
                    out.float(*bits);
                    Ok(())
                }
            },
        )?;
        Payload::behind_room(out.finish())
    }

    fn behind_room(bytes: Vec<u8>) -> Result<Payload, Flaw> {
        let length = bytes.len() - LENGTH;
        if length > MAX_RECORD {
            return Err(Flaw::limit(format!(
                "a journal record of {length} bytes, at most {MAX_RECORD} are allowed"
            )));
        }
        Ok(Payload { bytes })
    }

    /// The payload of a whole record's bytes, and its chain hash.
    pub(crate) fn unseal(mut bytes: Vec<u8>) -> (Payload, Digest) {
        let hash = *bytes.last_chunk().expect("a record ends with its chain hash");
        bytes.truncate(bytes.len() - HASH);
        bytes[..LENGTH].fill(0);
        (Payload { bytes }, Digest(hash))
    }

    /// The whole record's bytes, and the chain hash including it.
    pub(crate) fn seal(self, previous: &Digest) -> (Vec<u8>, Digest) {
        let mut bytes = self.bytes;
        let length = (bytes.len() - LENGTH) as u32;
        bytes[..LENGTH].copy_from_slice(&length.to_le_bytes());
        let chain = link(previous, &bytes[LENGTH..]);
        bytes.extend_from_slice(&chain.0);
        (bytes, chain)
    }
}

fn link(previous: &Digest, payload: &[u8]) -> Digest {
    Hasher::new().update(&previous.0).update(payload).finish()
}

/// The bytes of a segment, of which a piece at a time is looked at. A byte slice is one.
pub trait Window {
    /// What looking may come to besides bytes.
    type Error: From<Flaw>;

    /// How many bytes there are.
    fn length(&self) -> u64;

    /// Returns `length` bytes from `offset` on, or fewer where they end before.
    fn bytes(&mut self, offset: u64, length: usize) -> Result<&[u8], Self::Error>;
}

impl Window for &[u8] {
    type Error = Flaw;

    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn bytes(&mut self, offset: u64, length: usize) -> Result<&[u8], Flaw> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len());
        Ok(&self[start..start.saturating_add(length).min(self.len())])
    }
}

/// Reads one segment, record by record, holding one record at a time.
///
/// ```
/// use unbroken::format::journal::{Ending, SegmentReader};
///
/// let mut reader = SegmentReader::new(b"UNBRKJNL\x01\0".as_slice())?; // The power failed while this was written.
/// assert_eq!(reader.header(), None);
/// assert_eq!(reader.by_ref().count(), 0);
/// assert_eq!(reader.ending()?, Ending::Torn { offset: 0 });
/// # Ok::<(), unbroken::error::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SegmentReader<W> {
    window: W,
    header: Option<SegmentHeader>,
    /// Where the last whole record ends.
    offset: u64,
    chain: Digest,
    records: u64,
    step: u64,
    /// Known once there is nothing more to read.
    ending: Option<Ending>,
}

impl<W: Window> SegmentReader<W> {
    /// Opens a segment.
    ///
    /// A segment torn inside its header opens: it has no header, no records, and ends torn at 0.
    ///
    /// # Errors
    ///
    /// [`Flaw::NotOurs`], [`Flaw::Version`]; [`Flaw::Damaged`] where records follow a header that does not hold;
    /// [`Flaw::Malformed`] where the header is whole and breaks a rule. Errors of the window.
    pub fn new(window: W) -> Result<SegmentReader<W>, W::Error> {
        let mut reader = SegmentReader {
            window,
            header: None,
            offset: 0,
            chain: Digest([0; 32]),
            records: 0,
            step: 0,
            ending: Some(Ending::Torn { offset: 0 }),
        };
        let bytes = reader.window.bytes(0, HEADER + MAX_HEADER + HASH)?.to_vec();
        // A file system may give a file its length before its bytes: then they are zero.
        if bytes.iter().all(|byte| *byte == 0) {
            return match reader.find_record(HEADER as u64)? {
                Search::Nothing => Ok(reader),
                _ => Err(header_damaged().into()),
            };
        }
        if !MAGIC.starts_with(&bytes[..bytes.len().min(MAGIC.len())]) {
            return Err(Flaw::NotOurs {
                what: "a journal segment",
            }
            .into());
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
                newest: FORMAT_VERSION,
            }
            .into());
        }
        let whole = (1..=MAX_HEADER).contains(&length) && rest.len() >= length + HASH;
        let end = HEADER + if whole { length } else { 0 };
        let chain = Digest::of(&bytes[..end]);
        if !whole || chain.0 != bytes[end..end + HASH] {
            let hash_broken = whole && reader.continues((end + HASH) as u64, &chain)?;
            return match reader.find_record(HEADER as u64)? {
                Search::Nothing if !hash_broken => Ok(reader),
                _ => Err(header_damaged().into()),
            };
        }
        let header = raise_header(value::decode(&bytes[HEADER..end])?)?;
        reader.step = header.step;
        reader.header = Some(header);
        reader.offset = (end + HASH) as u64;
        reader.chain = chain;
        reader.ending = None;
        Ok(reader)
    }

    /// What the segment says of itself; `None` where it is torn before that.
    pub fn header(&self) -> Option<&SegmentHeader> {
        self.header.as_ref()
    }

    /// Where the last whole record read so far ends; after the last one, the length to keep.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes the segment has.
    pub fn length(&self) -> u64 {
        self.window.length()
    }

    /// Chain hash up to and including the last record read so far. All zero where there is no header.
    pub fn head(&self) -> Digest {
        self.chain
    }

    /// Goes on with the first record that starts at `offset` or behind it, found by its own hash.
    ///
    /// Returns whether there is one; where there is none, nothing changes. What lies before it is not looked at, and
    /// counts of records start there.
    ///
    /// # Errors
    ///
    /// Those of the window.
    pub fn skip_to(&mut self, offset: u64) -> Result<bool, W::Error> {
        let Search::At(found) = self.find_record(offset.saturating_sub(1))? else {
            return Ok(false);
        };
        self.seek(found)?;
        Ok(true)
    }

    /// Goes on with the record at `offset`, where one was seen before.
    pub(crate) fn seek(&mut self, offset: u64) -> Result<(), W::Error> {
        let before = self.window.bytes(offset - HASH as u64, HASH)?;
        self.chain = Digest(before.try_into().expect("a record stands behind 32 bytes"));
        self.offset = offset;
        self.ending = None;
        Ok(())
    }

    /// How the segment ends, where the end was reached.
    pub(crate) fn end(&self) -> Option<Ending> {
        self.ending.clone()
    }

    /// How the segment ends: reads what is left.
    ///
    /// # Errors
    ///
    /// Those of the window.
    pub fn ending(mut self) -> Result<Ending, W::Error> {
        while self.read()?.is_some() {}
        Ok(self.ending.expect("a reader that has nothing more knows why"))
    }

    /// The next whole record; `None` at the end, whichever it is (ask [`SegmentReader::ending`]).
    ///
    /// # Errors
    ///
    /// Those of the window.
    pub fn read(&mut self) -> Result<Option<Entry>, W::Error> {
        if self.ending.is_some() {
            return Ok(None);
        }
        let chain = self.chain;
        let whole = self.frame(self.offset)?.and_then(|(payload, stored)| {
            let next = link(&chain, payload);
            (next.0 == *stored).then(|| {
                let decoded = value::decode_nested(payload, value::MAX_DEPTH + 2, MAX_MEMORY).and_then(raise);
                (decoded, payload.len(), next)
            })
        });
        let Some((decoded, length, chain)) = whole else {
            self.ending = Some(self.classify()?);
            return Ok(None);
        };
        let record = match decoded {
            Ok(record) => record,
            Err(flaw) => {
                self.ending = Some(self.damaged(flaw.to_string()));
                return Ok(None);
            }
        };
        if let Record::Boundary { step, .. } = record {
            self.step = step;
        }
        let offset = self.offset;
        self.offset += (LENGTH + length + HASH) as u64;
        self.chain = chain;
        self.records += 1;
        Ok(Some(Entry {
            record,
            offset,
            chain,
        }))
    }

    /// Says why there is no whole record at `offset`.
    fn classify(&mut self) -> Result<Ending, W::Error> {
        if self.offset == self.window.length() {
            return Ok(Ending::Complete);
        }
        // The payload may be whole and only its hash broken: then the next record continues the hash it should have.
        let chain = self.chain;
        let should = self
            .frame(self.offset)?
            .map(|(payload, _)| (payload.len(), link(&chain, payload)));
        let hash_broken = match should {
            Some((length, chain)) => self.continues(self.offset + (LENGTH + length + HASH) as u64, &chain)?,
            None => false,
        };
        if !hash_broken && matches!(self.find_record(self.offset)?, Search::Nothing) {
            return Ok(Ending::Torn { offset: self.offset });
        }
        Ok(self.damaged("the record does not hash to its chain hash, and whole records follow".to_owned()))
    }

    fn damaged(&self, what: String) -> Ending {
        Ending::Damaged {
            offset: self.offset,
            record: self.records,
            after_step: self.step,
            what,
        }
    }

    /// The payload and the stored chain hash of what might be a record; `None` where its length cannot be one.
    fn frame(&mut self, offset: u64) -> Result<Option<Frame<'_>>, W::Error> {
        let Some(length) = self.window.bytes(offset, LENGTH)?.first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        let end = offset.saturating_add((LENGTH + length + HASH) as u64);
        if !(1..=MAX_RECORD).contains(&length) || end > self.window.length() {
            return Ok(None);
        }
        let bytes = self.window.bytes(offset, LENGTH + length + HASH)?;
        let framed = bytes.split_at_checked(LENGTH + length);
        Ok(framed.and_then(|(record, hash)| Some((&record[LENGTH..], hash.first_chunk()?))))
    }

    /// Whether a whole record at `offset` continues a chain.
    fn continues(&mut self, offset: u64, previous: &Digest) -> Result<bool, W::Error> {
        let framed = self.frame(offset)?;
        Ok(framed.is_some_and(|(payload, stored)| link(previous, payload).0 == *stored))
    }

    /// Looks for a whole record that starts behind `offset`.
    ///
    /// Each record continues the 32 bytes right before it, so one can be recognised without reading what comes earlier.
    /// Hashing is bounded.
    fn find_record(&mut self, offset: u64) -> Result<Search, W::Error> {
        let mut budget = SEARCH_BUDGET;
        let mut first = offset.max(HASH as u64 - 1) + 1;
        loop {
            // A piece is looked at as a copy: what might be a record is asked for through the same window.
            let piece = self.window.bytes(first, SEARCH_PIECE + LENGTH)?.to_vec();
            if piece.len() <= LENGTH {
                return Ok(Search::Nothing);
            }
            let count = if piece.iter().all(|byte| *byte == 0) {
                0 // A file of holes.
            } else {
                piece.len() - LENGTH
            };
            for start in 0..count {
                // A record is a list of five or six parts; the check spares nearly all the hashing.
                if !matches!(piece[start + LENGTH], 0x85 | 0x86) {
                    continue;
                }
                let place = first + start as u64;
                let Some(length) = self.frame(place)?.map(|(payload, _)| payload.len()) else {
                    continue;
                };
                if length > budget {
                    return Ok(Search::GivenUp);
                }
                budget -= length;
                let previous = self.window.bytes(place - HASH as u64, HASH)?;
                let previous = Digest(previous.try_into().expect("places start behind a hash"));
                if self.continues(place, &previous)? {
                    return Ok(Search::At(place));
                }
            }
            first += (piece.len() - LENGTH) as u64;
        }
    }
}

/// A payload, and the chain hash behind it.
type Frame<'a> = (&'a [u8], &'a [u8; HASH]);

/// What a search for a record came to.
enum Search {
    /// One starts here.
    At(u64),
    Nothing,
    /// It would have taken too long. For what is torn or damaged, that counts as found: the safer of the two.
    GivenUp,
}

fn header_damaged() -> Flaw {
    Flaw::Damaged {
        part: "header of the journal segment".to_owned(),
        expected: "whole where records follow".to_owned(),
        found: "other bytes".to_owned(),
    }
}

impl<W: Window> Iterator for SegmentReader<W> {
    type Item = Result<Entry, W::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
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
        } => check_boundary(*phase, components),
        Record::Event { time, .. } => record::check_time(time),
    }
}

fn check_boundary(phase: u8, components: &[(String, Component)]) -> Result<(), Flaw> {
    record::check_phase(phase)?;
    let too_long = |component: &Component| matches!(component, Component::Digest(bytes) if bytes.len() > MAX_COMPONENT_DIGEST);
    match components.iter().find(|(_, component)| too_long(component)) {
        Some((name, _)) => Err(Flaw::limit(format!(
            "the digest {name:?} is longer than {MAX_COMPONENT_DIGEST} bytes"
        ))),
        None => Ok(()),
    }
}
