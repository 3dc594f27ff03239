//! Checkpoints that `torch.save` wrote, read without torch, without Python and without executing anything.
//!
//! Touches: the bytes it is given; [`import`] one file, read only, and the run directory that it makes. A pickle is a
//! program; here it is run by a machine that can make lists, numbers and tensors and that knows a short list of names.
//! Whatever else it names is refused by that name, before anything is written.

mod archive;
mod machine;
mod meaning;
mod node;
mod plain;
mod stream;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use unbroken::fork;
use unbroken::run::Options;
use unbroken::state::Value;
use unbroken::storage::Directory;
use unbroken::storage::disk::{self, DiskStorage};
use unbroken::store::{CheckpointInfo, Commit};
use unbroken::{Digest, Error, Result};

use crate::archive::Archive;
use crate::machine::Arena;
use crate::meaning::Storages;

/// Kind of the event that an imported run's journal begins with. Its fields: `file`, `bytes`, `digest` (BLAKE3).
pub const IMPORTED: &str = "imported";

/// Longest pickle that is read, in bytes.
const MAX_PICKLE: usize = 256 << 20;

/// What a file holds.
#[derive(Debug)]
pub struct Legacy {
    /// The object that was saved.
    pub tree: Value,
    /// Where in the file the bytes of each storage are, for the first ones.
    places: Vec<Range<usize>>,
    /// The bytes of the others.
    owned: Vec<Vec<u8>>,
    /// Attributes of mappings that have no place in a plain mapping, such as a state dict's `_metadata`.
    pub attributes_dropped: usize,
}

impl Legacy {
    /// The bytes of each storage, given the file that they were read from.
    pub fn storages<'a>(&'a self, file: &'a [u8]) -> Vec<&'a [u8]> {
        let places = self.places.iter().map(|place| &file[place.clone()]);
        places.chain(self.owned.iter().map(Vec::as_slice)).collect()
    }
}

/// Reads a file's bytes.
///
/// # Errors
///
/// `Unsupported` for what is refused by name; `Format` for bytes that are not whole or not such a file.
pub fn read(file: &[u8]) -> Result<Legacy> {
    let mut storages = Storages::default();
    let (arena, root, places) = if Archive::is_one(file) {
        read_archive(file, &mut storages)?
    } else {
        stream::read(file, &mut storages)?
    };
    let mut owned = Vec::new();
    let tree = plain::value(&arena, root, places.len(), &mut owned)?;
    Ok(Legacy {
        tree,
        places,
        owned,
        attributes_dropped: storages.attributes_dropped,
    })
}

type Parts = (Arena, node::Id, Vec<Range<usize>>);

fn read_archive(file: &[u8], storages: &mut Storages) -> Result<Parts> {
    let archive = Archive::open(file)?;
    let mut pickles = archive.names().filter_map(|name| name.strip_suffix("/data.pkl"));
    let (Some(prefix), None) = (pickles.next(), pickles.next()) else {
        return Err(flawed(
            "not a file that torch.save wrote: it has not one `data.pkl`",
        ));
    };
    let prefix = prefix.to_owned();
    if archive.has(&format!("{prefix}/constants.pkl")) {
        return Err(refused("a TorchScript archive: it holds a program"));
    }
    let order = format!("{prefix}/byteorder");
    if archive.has(&order) && archive.read(&order)? != b"little" {
        return Err(refused("a file of a machine with the other byte order"));
    }
    let pickle = archive.read(&format!("{prefix}/data.pkl"))?;
    check_length(pickle)?;
    let mut arena = Arena::new(pickle.len());
    let root = machine::run(&mut arena, storages, pickle, &mut 0)?;
    let mut places = Vec::with_capacity(storages.wanted.len());
    for wanted in &storages.wanted {
        let place = archive.place(&format!("{prefix}/data/{}", wanted.key))?;
        if place.len() as u64 != wanted.bytes {
            let (key, expected, found) = (&wanted.key, wanted.bytes, place.len());
            return Err(flawed(format!(
                "storage `{key}` should have {expected} bytes, and has {found}"
            )));
        }
        places.push(place);
    }
    Ok((arena, root, places))
}

fn check_length(pickle: &[u8]) -> Result<()> {
    if pickle.len() > MAX_PICKLE {
        return Err(refused(format!(
            "a pickle of {} bytes, tensors not counted",
            pickle.len()
        )));
    }
    Ok(())
}

/// What an import came to.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The checkpoint.
    pub checkpoint: CheckpointInfo,
    /// See [`Legacy::attributes_dropped`].
    pub attributes_dropped: usize,
    /// Number of storages.
    pub storages: usize,
}

/// Makes a run directory whose only checkpoint holds what a file holds.
///
/// # Durability
///
/// On return the run survives a power cut.
///
/// # Errors
///
/// Those of [`read`], naming the file; `place` is then as it was.
pub fn import(file: &Path, place: &Path, step: u64) -> Result<Imported> {
    let bytes = read_file(file)?;
    let legacy = read(&bytes).map_err(|error| at(error, file))?;
    let storages = legacy.storages(&bytes);
    let count = storages.len();
    let fields = vec![
        ("file".to_owned(), Value::Str(file.to_string_lossy().into_owned())),
        (
            "bytes".to_owned(),
            Value::integer(false, &(bytes.len() as u64).to_be_bytes()),
        ),
        ("digest".to_owned(), Value::Bytes(Digest::of(&bytes).0.to_vec())),
    ];
    let options = Options {
        settings: vec![("front".to_owned(), Value::Str("import".to_owned()))],
        ..Options::default()
    };
    let commit = Commit {
        step,
        phase: 0,
        tree: legacy.tree.clone(),
        storages,
        identity: Vec::new(),
        environment: Vec::new(),
        metrics: Vec::new(),
        pinned: false,
    };
    let checkpoint = fork::plant(place, &options, (IMPORTED, fields), commit)?;
    Ok(Imported {
        checkpoint,
        attributes_dropped: legacy.attributes_dropped,
        storages: count,
    })
}

/// Reads the file that a person named, also by a link: caches of model hubs are made of links.
fn read_file(file: &Path) -> Result<Vec<u8>> {
    let file = &disk::resolve(file).map_err(|error| Error::io("open", file, error))?;
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let name = file.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| Error::invalid(format!("`{}` is not the path of a file", file.display())))?;
    let storage = DiskStorage::open(parent).map_err(|error| Error::io("open directory", parent, error))?;
    Directory::new(Arc::new(storage)).read_all(name, u64::MAX >> 1)
}

fn at(error: Error, file: &Path) -> Error {
    match error {
        Error::Format { path: None, what } => Error::Format {
            path: Some(file.to_owned()),
            what,
        },
        Error::Unsupported { what } => Error::Unsupported {
            what: format!("\"{}\" holds {what}", file.display()),
        },
        other => other,
    }
}

/// Bytes that are not as they should be.
pub(crate) fn flawed(what: impl Into<String>) -> Error {
    Error::Format {
        path: None,
        what: what.into(),
    }
}

/// What is understood and not read.
pub(crate) fn refused(what: impl Into<String>) -> Error {
    Error::Unsupported { what: what.into() }
}
