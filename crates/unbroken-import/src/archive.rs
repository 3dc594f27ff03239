//! The archive that `torch.save` writes: a zip file of stored entries, read strictly.
//!
//! Touches: nothing but the bytes it is given. What the directory at the end says is believed only where the entries
//! agree: no compression, no encryption, no second disk, no name twice, no two entries over the same bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use unbroken::Result;

use crate::{flawed, refused};

const END: u32 = 0x0605_4b50;
const END_BYTES: usize = 22;
const END64: u32 = 0x0606_4b50;
const END64_LOCATOR: u32 = 0x0706_4b50;
const END64_LOCATOR_BYTES: usize = 20;
const DIRECTORY: u32 = 0x0201_4b50;
const DIRECTORY_BYTES: usize = 46;
const LOCAL: u32 = 0x0403_4b50;
const LOCAL_BYTES: usize = 30;
/// A field that is too small for its value; the value is in the entry's extra field.
const ELSEWHERE: u32 = u32::MAX;
const EXTRA64: u16 = 1;

/// Where the entries of an archive are, by name.
#[derive(Debug)]
pub(crate) struct Archive<'a> {
    bytes: &'a [u8],
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    place: Range<usize>,
    crc: u32,
}

impl<'a> Archive<'a> {
    /// Whether bytes look like an archive.
    pub(crate) fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(&LOCAL.to_le_bytes())
    }

    pub(crate) fn open(bytes: &'a [u8]) -> Result<Archive<'a>> {
        let directory = find_directory(bytes)?;
        let end = directory.place.end;
        let mut cursor = Cursor {
            bytes: &bytes[..end],
            at: directory.place.start,
        };
        let mut entries = BTreeMap::new();
        let mut places = Vec::new();
        for _ in 0..directory.count {
            let (name, entry, whole) = read_entry(bytes, &mut cursor, directory.place.start)?;
            places.push(whole);
            if entries.insert(name.clone(), entry).is_some() {
                return Err(flawed(format!("the archive has two entries `{name}`")));
            }
        }
        if cursor.at != end {
            return Err(flawed("the archive's directory is longer than its entries"));
        }
        places.sort_by_key(|place| place.start);
        if places.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err(flawed("two entries of the archive lie over each other"));
        }
        Ok(Archive { bytes, entries })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Where an entry's bytes are, checked against its checksum if it has one.
    pub(crate) fn place(&self, name: &str) -> Result<Range<usize>> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| flawed(format!("the archive has no entry `{name}`")))?;
        // torch can be told to leave checksums out, and writes 0 then.
        if entry.crc != 0 {
            let found = crc32fast::hash(&self.bytes[entry.place.clone()]);
            if found != entry.crc {
                let expected = entry.crc;
                return Err(flawed(format!(
                    "entry `{name}` is damaged: its checksum should be {expected:08x}, and is {found:08x}"
                )));
            }
        }
        Ok(entry.place.clone())
    }

    pub(crate) fn read(&self, name: &str) -> Result<&'a [u8]> {
        Ok(&self.bytes[self.place(name)?])
    }
}

struct Directory {
    place: Range<usize>,
    count: u64,
}

/// Finds the directory by the record that ends the file.
fn find_directory(bytes: &[u8]) -> Result<Directory> {
    let cut_short = || flawed("the archive ends early: its directory is not there");
    let last = bytes.len().checked_sub(END_BYTES).ok_or_else(cut_short)?;
    let first = last.saturating_sub(usize::from(u16::MAX)); // A comment may follow.
    let end = (first..=last)
        .rev()
        .find(|&at| {
            let comment = u16_at(bytes, at + 20).map(usize::from);
            u32_at(bytes, at) == Some(END)
                && comment.is_some_and(|comment| at + END_BYTES + comment == bytes.len())
        })
        .ok_or_else(cut_short)?;
    let field = |at: usize| u64::from(u16_at(bytes, end + at).unwrap_or(0));
    let long = |at: usize| u64::from(u32_at(bytes, end + at).unwrap_or(0));
    if field(4) != field(6) || field(8) != field(10) {
        return Err(refused("an archive over several disks"));
    }
    let (mut count, mut length, mut start, mut limit) = (field(10), long(12), long(16), end as u64);
    let too_small = count == u64::from(u16::MAX) || [length, start].contains(&u64::from(ELSEWHERE));
    if too_small {
        let locator = end.checked_sub(END64_LOCATOR_BYTES).ok_or_else(cut_short)?;
        if u32_at(bytes, locator) != Some(END64_LOCATOR) {
            return Err(cut_short());
        }
        let record = u64_at(bytes, locator + 8).unwrap_or(u64::MAX);
        let at = usize::try_from(record).map_err(|_| cut_short())?;
        if at > locator || u32_at(bytes, at) != Some(END64) {
            return Err(cut_short());
        }
        let wide = |offset: usize| u64_at(bytes, at + offset).ok_or_else(cut_short);
        (count, length, start, limit) = (wide(32)?, wide(40)?, wide(48)?, record);
    }
    let finish = start
        .checked_add(length)
        .filter(|finish| *finish <= limit)
        .ok_or_else(cut_short)?;
    // Each entry has a header of its own in the directory: no count is believed that it has no room for.
    if count > length / DIRECTORY_BYTES as u64 {
        return Err(flawed(
            "the archive says that it has more entries than it has room for",
        ));
    }
    let narrow = |number: u64| usize::try_from(number).map_err(|_| cut_short());
    Ok(Directory {
        place: narrow(start)?..narrow(finish)?,
        count,
    })
}

/// Reads an entry's header in the directory, and its own before its bytes. Returns also all of the file that it takes.
fn read_entry(bytes: &[u8], cursor: &mut Cursor, limit: usize) -> Result<(String, Entry, Range<usize>)> {
    let head = cursor.take(DIRECTORY_BYTES)?;
    let short = |at: usize| u16_at(head, at).unwrap_or(0);
    let long = |at: usize| u32_at(head, at).unwrap_or(0);
    if long(0) != DIRECTORY {
        return Err(flawed("the archive's directory is damaged"));
    }
    let (flags, method, crc) = (short(8), short(10), long(16));
    let [name_bytes, extra_bytes, comment_bytes] = [28, 30, 32].map(|at| usize::from(short(at)));
    let name = cursor.take(name_bytes)?.to_vec();
    let name = String::from_utf8(name).map_err(|_| flawed("an entry's name is not UTF-8"))?;
    let extra = cursor.take(extra_bytes)?;
    cursor.take(comment_bytes)?;
    if flags & 1 != 0 {
        return Err(refused(format!("entry `{name}`, which is encrypted")));
    }
    if method != 0 {
        return Err(refused(format!(
            "entry `{name}`, which is compressed: torch.save stores entries as they are"
        )));
    }
    let mut wide = wide_fields(extra);
    let mut widen = |small: u32| match small {
        ELSEWHERE => wide
            .next()
            .ok_or_else(|| flawed(format!("entry `{name}` has no length"))),
        small => Ok(u64::from(small)),
    };
    // In this order, and only those that are needed (APPNOTE 4.5.3).
    let (length, stored, offset) = (widen(long(24))?, widen(long(20))?, widen(long(42))?);
    if length != stored {
        return Err(flawed(format!("entry `{name}` is stored, and has two lengths")));
    }
    let outside = || flawed(format!("entry `{name}` reaches beyond the archive"));
    let narrow = |number: u64| usize::try_from(number).map_err(|_| outside());
    let (offset, length) = (narrow(offset)?, narrow(length)?);
    let own = offset
        .checked_add(LOCAL_BYTES)
        .filter(|end| *end <= limit)
        .map(|end| &bytes[offset..end]);
    let own = own.ok_or_else(outside)?;
    let own_short = |at: usize| usize::from(u16_at(own, at).unwrap_or(0));
    let own_name = offset + LOCAL_BYTES..offset + LOCAL_BYTES + own_short(26);
    if u32_at(own, 0) != Some(LOCAL)
        || own_short(8) != 0
        || bytes.get(own_name.clone()) != Some(name.as_bytes())
    {
        return Err(flawed(format!(
            "entry `{name}` is not where the archive's directory says"
        )));
    }
    let start = own_name.end + own_short(28);
    let end = start
        .checked_add(length)
        .filter(|end| *end <= limit)
        .ok_or_else(outside)?;
    let entry = Entry {
        place: start..end,
        crc,
    };
    Ok((name, entry, offset..end))
}

/// The 64-bit numbers of an entry's extra field, in order.
fn wide_fields(extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut rest = extra;
    let mut found: &[u8] = &[];
    while let (Some(kind), Some(length)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let Some(body) = rest.get(4..4 + usize::from(length)) else {
            break;
        };
        if kind == EXTRA64 {
            found = body;
        }
        rest = &rest[4 + usize::from(length)..];
    }
    found
        .chunks_exact(8)
        .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.saturating_add(count));
        self.at += count;
        taken.ok_or_else(|| flawed("the archive's directory ends early"))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let part = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(part.try_into().expect("two bytes")))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let part = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(part.try_into().expect("four bytes")))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(part.try_into().expect("eight bytes")))
}
