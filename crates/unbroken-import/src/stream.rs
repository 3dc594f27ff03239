//! The format before the archive (torch up to 1.5, or on request): five pickles, then each storage's bytes.
//!
//! Touches: nothing but the bytes it is given.
//!
//! ```text
//! pickle  the magic number
//! pickle  the version, 1001
//! pickle  about the machine: {"little_endian": True, ...}
//! pickle  the object
//! pickle  list of the storages' keys
//! then for each key: number of elements, 8 bytes; the elements
//! ```

use std::ops::Range;

use unbroken::{Result, Value};

use crate::machine::{self, Arena};
use crate::meaning::Storages;
use crate::node::{Id, Node};
use crate::{MAX_PICKLE, Parts, flawed, refused};

/// 0x1950a86a20f9469cfc6c, most significant byte first.
const MAGIC: [u8; 10] = [0x19, 0x50, 0xa8, 0x6a, 0x20, 0xf9, 0x46, 0x9c, 0xfc, 0x6c];
const VERSION: i64 = 1001;
/// Where a tar archive says that it is one.
const TAR: Range<usize> = 257..262;

pub(crate) fn read(file: &[u8], storages: &mut Storages) -> Result<Parts> {
    if file.get(TAR) == Some(b"ustar") {
        return Err(refused(
            "a tar archive, as torch 0.1 wrote: save it again with a later torch",
        ));
    }
    let not_ours = || flawed("not a file that torch.save wrote");
    if file.first() != Some(&0x80) {
        return Err(not_ours());
    }
    // The pickles' lengths are not written: what may be a pickle ends where the longest one would.
    let pickles = &file[..file.len().min(MAX_PICKLE)];
    let mut arena = Arena::new(pickles.len());
    let mut at = 0;
    let mut next =
        |arena: &mut Arena, storages: &mut Storages| machine::run(arena, storages, pickles, &mut at);
    let magic = next(&mut arena, storages).map_err(|_| not_ours())?;
    if !is_integer(arena.get(magic), &MAGIC) {
        return Err(not_ours());
    }
    let version = next(&mut arena, storages)?;
    if !matches!(arena.get(version), Node::Plain(Value::Int(VERSION))) {
        return Err(refused(format!(
            "a file of another version than {VERSION} of the old format"
        )));
    }
    let machine = next(&mut arena, storages)?;
    if !is_little_endian(&arena, machine) {
        return Err(refused("a file of a machine with the other byte order"));
    }
    let root = next(&mut arena, storages)?;
    let keys = next(&mut arena, storages)?;
    let places = find_storages(file, at, &arena, keys, storages)?;
    Ok((arena, root, places))
}

fn is_integer(node: &Node, bytes: &[u8]) -> bool {
    matches!(node, Node::Plain(value) if *value == Value::integer(false, bytes))
}

fn is_little_endian(arena: &Arena, machine: Id) -> bool {
    let Node::Dict(items) = arena.get(machine) else {
        return false;
    };
    items.iter().any(|(key, value)| {
        matches!(arena.get(*key), Node::Plain(Value::Str(name)) if name == "little_endian")
            && matches!(arena.get(*value), Node::Plain(Value::Bool(true)))
    })
}

/// Goes along the storages' bytes, which stand in the order of the keys.
fn find_storages(
    file: &[u8],
    mut at: usize,
    arena: &Arena,
    keys: Id,
    storages: &Storages,
) -> Result<Vec<Range<usize>>> {
    let wrong = || flawed("the file's list of storages is not that of its tensors");
    let cut_short = || flawed("the file ends early: not all of its storages are there");
    let Node::List(keys) = arena.get(keys) else {
        return Err(wrong());
    };
    let mut places: Vec<Option<Range<usize>>> = vec![None; storages.wanted.len()];
    for key in keys {
        let Node::Plain(Value::Str(key)) = arena.get(*key) else {
            return Err(wrong());
        };
        let index = storages.index(key).ok_or_else(wrong)?;
        let wanted = &storages.wanted[index];
        let count = file.get(at..at.saturating_add(8)).ok_or_else(cut_short)?;
        let count = u64::from_le_bytes(count.try_into().expect("eight bytes"));
        if count.checked_mul(wanted.element_bytes) != Some(wanted.bytes) {
            return Err(flawed(format!(
                "storage `{key}` has another length than its tensors say"
            )));
        }
        let start = at + 8;
        let length = usize::try_from(wanted.bytes).map_err(|_| cut_short())?;
        let end = start
            .checked_add(length)
            .filter(|end| *end <= file.len())
            .ok_or_else(cut_short)?;
        if places[index].replace(start..end).is_some() {
            return Err(wrong());
        }
        at = end;
    }
    places.into_iter().collect::<Option<_>>().ok_or_else(wrong)
}
