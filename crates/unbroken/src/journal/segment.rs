//! One life's segment on disk, read a piece at a time.
//!
//! Touches: one file of `journal/`, read only; a copy of it, where its life asks for one.

use std::collections::BTreeMap;
use std::io;

use super::{JOURNAL, MAX_SEGMENT, parse_segment_name, segment_name};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::Flaw;
use crate::format::journal::{Ending, Record, SegmentHeader, SegmentReader, Window};
use crate::storage::{Directory, File, Source};
use crate::store::is_damage;

/// Bytes read at a time.
const PIECE: usize = 256 << 10;

/// A segment's file, of which a piece is in memory.
#[derive(Debug)]
pub(crate) struct SegmentFile {
    source: Source,
    /// Measured once: a life may be appending meanwhile.
    length: u64,
    /// Where the piece starts.
    start: u64,
    piece: Vec<u8>,
}

/// What reading a segment may come to.
#[derive(Debug)]
pub(crate) enum Trouble {
    Flaw(Flaw),
    Storage(Error),
}

impl From<Flaw> for Trouble {
    fn from(flaw: Flaw) -> Trouble {
        Trouble::Flaw(flaw)
    }
}

impl Window for SegmentFile {
    type Error = Trouble;

    fn length(&self) -> u64 {
        self.length
    }

    fn bytes(&mut self, offset: u64, length: usize) -> Result<&[u8], Trouble> {
        let end = offset.saturating_add(length as u64).min(self.length);
        let offset = offset.min(end);
        if offset < self.start || end > self.start + self.piece.len() as u64 {
            let wanted = (end - offset).max(PIECE as u64).min(self.length - offset);
            self.piece.resize(wanted as usize, 0);
            self.start = offset;
            let read = self.source.read_exact_at(offset, &mut self.piece);
            read.inspect_err(|_| self.piece.clear())
                .map_err(Trouble::Storage)?;
        }
        Ok(&self.piece[(offset - self.start) as usize..(end - self.start) as usize])
    }
}

pub(crate) type Reader = SegmentReader<SegmentFile>;

/// A segment's name with its reader.
pub(crate) fn reader(directory: &Directory, name: &str) -> Result<Reader> {
    let source = directory.open(name)?;
    let length = source.len()?;
    if length > MAX_SEGMENT {
        let text = format!("{length} bytes, of at most {MAX_SEGMENT} bytes");
        let error = io::Error::new(io::ErrorKind::FileTooLarge, text);
        return Err(Error::io("read", directory.path(name), error));
    }
    let file = SegmentFile {
        length,
        source,
        start: 0,
        piece: Vec::new(),
    };
    SegmentReader::new(file).map_err(|trouble| told(trouble, directory, name))
}

/// What reading came to, with the segment's name.
pub(crate) fn told(trouble: Trouble, directory: &Directory, name: &str) -> Error {
    match trouble {
        Trouble::Flaw(flaw) => flaw.at(directory.path(name)),
        Trouble::Storage(error) => error,
    }
}

/// The segments that count: for each life the name of its newest part. Other names are returned as they are.
pub(crate) fn list(directory: &Directory) -> Result<(BTreeMap<u32, String>, Vec<String>)> {
    let (mut parts, mut others) = (BTreeMap::new(), Vec::new());
    for name in directory.list_if_there(JOURNAL)? {
        match parse_segment_name(&name) {
            // A later part of a life is a copy of the earlier one, made when that could not be synced.
            Some((life, part)) => {
                let newest = parts.entry(life).or_insert(part);
                *newest = part.max(*newest);
            }
            None => others.push(format!("{JOURNAL}/{name}")),
        }
    }
    let names = parts
        .into_iter()
        .map(|(life, part)| (life, segment_name(life, part)));
    Ok((names.collect(), others))
}

/// Chain hash of a segment's last whole record.
pub(crate) fn head(directory: &Directory, name: &str) -> Result<Digest> {
    let mut reader = reader(directory, name)?;
    while reader
        .read()
        .map_err(|trouble| told(trouble, directory, name))?
        .is_some()
    {}
    Ok(reader.head())
}

/// Writes a segment's bytes to another file.
pub(crate) fn copy(directory: &Directory, name: &str, into: &mut File) -> Result<()> {
    let source = directory.open(name)?;
    let length = source.len()?;
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    while done < length {
        let count = piece
            .len()
            .min(usize::try_from(length - done).unwrap_or(usize::MAX));
        source.read_exact_at(done, &mut piece[..count])?;
        into.write_all(&piece[..count])?;
        done += count as u64;
    }
    Ok(())
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
    for name in list(directory)?.0.into_values() {
        match segment(directory, &name) {
            Ok(found) => segments.extend(found),
            Err(error) if is_damage(&error) => unreadable.push(error.to_string()),
            Err(error) => return Err(error),
        }
    }
    Ok((segments, unreadable))
}

fn segment(directory: &Directory, name: &str) -> Result<Option<Segment>> {
    let mut reader = reader(directory, name)?;
    let Some(header) = reader.header().cloned() else {
        return Ok(None); // Torn before it said anything.
    };
    let told = |trouble| told(trouble, directory, name);
    let start = reader.head();
    let mut records = Vec::new();
    while let Some(entry) = reader.read().map_err(told)? {
        match entry.record {
            Record::Boundary { step, .. } | Record::Event { step, .. } => records.push((step, entry.chain)),
        }
    }
    let damage = match reader.ending().map_err(told)? {
        Ending::Damaged { after_step, what, .. } => Some(format!("damaged after step {after_step}: {what}")),
        _ => None,
    };
    Ok(Some(Segment {
        header,
        start,
        records,
        damage,
    }))
}
