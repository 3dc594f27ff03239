//! The journal's bytes: a segment a life, a record a boundary, each record hashed together with the one before it.
//!
//! Touches: nothing. A torn last record is normal after a crash and is told apart from damage before the end.

use crate::digest::Digest;
use crate::format::Flaw;
use crate::state::Value;

/// The largest payload of one record, in bytes.
pub const MAX_RECORD: usize = 16 << 20;

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
        /// Named components in causal order.
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
    /// A digest, at most 64 bytes.
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
    /// With a whole record.
    Complete,
    /// With bytes of a record that was never finished. Normal after a crash.
    Torn {
        /// Where the last whole record ends: the length to keep.
        offset: u64,
    },
    /// With damage: whole records follow, but the chain to them is broken.
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

/// Reads one segment's bytes, record by record.
#[derive(Clone, Debug)]
pub struct SegmentReader<'a> {
    bytes: &'a [u8],
}

/// Returns the bytes that a segment starts with, and the chain hash that its first record continues.
///
/// # Errors
///
/// [`Flaw::Limit`] or [`Flaw::Malformed`] where a field is too long or not what it should be.
pub fn encode_header(header: &SegmentHeader) -> Result<(Vec<u8>, Digest), Flaw> {
    let _ = header;
    unimplemented!()
}

/// Returns the bytes of one record, and the chain hash including it.
///
/// # Errors
///
/// [`Flaw::Limit`] or [`Flaw::Malformed`] where a field is too long or not what it should be.
pub fn encode_record(previous: &Digest, record: &Record) -> Result<(Vec<u8>, Digest), Flaw> {
    let _ = (previous, record);
    unimplemented!()
}

impl<'a> SegmentReader<'a> {
    /// Opens a segment.
    ///
    /// A segment torn inside its header opens: it has no header, no records, and ends torn at 0.
    ///
    /// # Errors
    ///
    /// [`Flaw::NotOurs`], [`Flaw::Version`], [`Flaw::Damaged`] where records follow a header that does not hold.
    pub fn new(bytes: &'a [u8]) -> Result<SegmentReader<'a>, Flaw> {
        Ok(SegmentReader { bytes })
    }

    /// What the segment says of itself; `None` where it is torn before that.
    pub fn header(&self) -> Option<&SegmentHeader> {
        unimplemented!()
    }

    /// Where the last whole record read so far ends.
    pub fn offset(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Chain hash up to and including the last record read so far.
    pub fn chain(&self) -> Digest {
        unimplemented!()
    }

    /// How the segment ends: reads what is left.
    pub fn ending(self) -> Ending {
        unimplemented!()
    }
}

impl Iterator for SegmentReader<'_> {
    type Item = Entry;

    /// The next whole record; `None` at the end, whichever it is (ask [`SegmentReader::ending`]).
    fn next(&mut self) -> Option<Entry> {
        unimplemented!()
    }
}
