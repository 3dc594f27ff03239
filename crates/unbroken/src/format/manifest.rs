//! The manifest: one small file that makes a checkpoint, with everything but the tensors' bytes.
//!
//! Touches: nothing. Its file is immutable and named after its own digest; what a whole manifest says is checked before
//! anyone acts on it, so that an index, a view or a name in it can be trusted.

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::digest::{Digest, unhex};
use crate::format::coded::{BLOCK, WIDTHS};
use crate::format::record::{self, Fields};
use crate::format::{Flaw, value};
use crate::state::{Tensor, Value};

// | magic 8 | version u32 | length u64 | payload, canonical CBOR, `length` bytes | BLAKE3 of all before, 32 |
const MAGIC: &[u8; 8] = b"UNBRKMAN";
const PAYLOAD: usize = 8 + 4 + 8;
const DIGEST: usize = 32;

/// A manifest whose storages are all in one piece each.
const WHOLE: u32 = 1;
/// A manifest with a storage in several pieces.
const IN_PIECES: u32 = 2;
/// A manifest with a storage that is coded.
const CODED: u32 = 3;

/// What the chunks of a storage may measure, in bytes.
const CHUNKS: std::ops::RangeInclusive<u64> = 4 << 10..=64 << 10;
/// The most pieces that all storages of a manifest may have together, those in one piece not counted.
pub const MAX_PIECES: usize = 1 << 17;
/// The most frames that all storages of a manifest may have together.
pub const MAX_FRAMES: usize = 1 << 17;

const KEYS: [&str; 15] = [
    "run",
    "step",
    "phase",
    "parent",
    "life",
    "created",
    "tree",
    "storages",
    "packs",
    "identity",
    "environment",
    "metrics",
    "pinned",
    "journal_head",
    "new_bytes",
];

/// One checkpoint: where it stands in its run, its tree, and where the bytes of its storages are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Which run it belongs to, as in `run.toml`.
    pub run_id: String,
    /// Optimizer updates so far.
    pub step: u64,
    /// 0: after a step inside an epoch. 1: an epoch's after-work is done. 2: the run is finished.
    pub phase: u8,
    /// Name of the checkpoint it followed, if any.
    pub parent: Option<String>,
    /// Process life that wrote it, counted from 1.
    pub life: u32,
    /// When, as an RFC 3339 timestamp.
    pub created: String,
    /// The state.
    pub tree: Value,
    /// The storages that the tree's tensors view, by index.
    pub storages: Vec<StorageEntry>,
    /// The packs that hold them, by index.
    pub packs: Vec<PackEntry>,
    /// What makes this run this run and may not change; text keys, in order.
    pub identity: Vec<(String, Value)>,
    /// What the bits may depend on; text keys, in order.
    pub environment: Vec<(String, Value)>,
    /// Logged numbers by name, floats by their bits.
    pub metrics: Vec<(String, u64)>,
    /// Whether retention must keep it.
    pub pinned: bool,
    /// Chain hash of the journal's last record at this boundary.
    pub journal_head: Digest,
    /// Bytes that this checkpoint added to the disk, its manifest excluded.
    pub new_bytes: u64,
}

/// One storage, and where its bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StorageEntry {
    /// BLAKE3 of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub length: u64,
    /// Where they are.
    pub place: Place,
}

/// Where the bytes of a storage are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// In one piece.
    Whole {
        /// Index into the manifest's packs.
        pack: u32,
        /// First byte, counted from the start of the pack's file.
        offset: u64,
    },
    /// In several.
    Pieces(Pieces),
    /// In another form, block by block.
    Coded(Coded),
}

/// Where the pieces of a storage are, which has few bytes that are not in an older checkpoint too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pieces {
    /// Bytes of a chunk. The storage's last chunk may be shorter.
    pub chunk: u64,
    /// The packs that hold them, in the order in which the pieces first need them.
    pub sources: Vec<Source>,
    /// The pieces in the storage's order. Each but the last has whole chunks.
    pub pieces: Vec<Piece>,
}

/// What a pack holds of a storage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Index into the manifest's packs.
    pub pack: u32,
    /// BLAKE3 of the chaining values of the chunks that it holds, so that each pack can be judged alone.
    pub check: Digest,
}

/// Some chunks of a storage that lie one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Index into the storage's sources.
    pub source: u32,
    /// First byte, counted from the start of the pack's file.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// A storage as numbers, in planes of their bytes that are compressed where that helps.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Coded {
    /// Bytes of a number: 1, 2, 4 or 8.
    pub width: u64,
    /// The numbers; or what they are differences to, and those differences.
    pub layers: Vec<Layer>,
}

/// As many numbers as a storage has, or differences, coded in one pack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layer {
    /// Index into the manifest's packs.
    pub pack: u32,
    /// BLAKE3 of the digests of the frames, so that each pack can be judged alone and before it is decoded.
    pub check: Digest,
    /// The first frame's first byte, counted from the start of the pack's file.
    pub offset: u64,
    /// The length of each frame in bytes, one for each block of the storage; one behind the other.
    pub frames: Vec<u64>,
}

impl Layer {
    /// The length of all frames.
    pub fn length(&self) -> u64 {
        self.frames
            .iter()
            .fold(0, |sum, length| sum.saturating_add(*length))
    }
}

impl Place {
    /// (pack, offset) of a storage in one piece.
    pub fn whole(&self) -> Option<(u32, u64)> {
        match self {
            Place::Whole { pack, offset } => Some((*pack, *offset)),
            Place::Pieces(_) | Place::Coded(_) => None,
        }
    }

    /// (pack, offset, length) of what a storage of `length` bytes takes of packs: each piece, in its order, or each layer.
    pub fn pieces(&self, length: u64) -> Vec<(u32, u64, u64)> {
        match self {
            Place::Whole { pack, offset } => vec![(*pack, *offset, length)],
            Place::Pieces(Pieces { sources, pieces, .. }) => pieces
                .iter()
                .map(|piece| (sources[piece.source as usize].pack, piece.offset, piece.length))
                .collect(),
            Place::Coded(Coded { layers, .. }) => layers
                .iter()
                .map(|layer| (layer.pack, layer.offset, layer.length()))
                .collect(),
        }
    }

    /// The packs that it takes something of; one that it names twice comes twice.
    pub(crate) fn packs(&self) -> impl Iterator<Item = u32> {
        let (whole, sources, layers): (_, &[Source], &[Layer]) = match self {
            Place::Whole { pack, .. } => (Some(*pack), &[], &[]),
            Place::Pieces(pieces) => (None, &pieces.sources, &[]),
            Place::Coded(coded) => (None, &[], &coded.layers),
        };
        let sources = sources.iter().map(|source| source.pack);
        let layers = layers.iter().map(|layer| layer.pack);
        whole.into_iter().chain(sources).chain(layers)
    }

    /// The same place in a manifest whose packs have other numbers.
    pub(crate) fn with_packs(&self, mut number: impl FnMut(u32) -> u32) -> Place {
        match self {
            Place::Whole { pack, offset } => Place::Whole {
                pack: number(*pack),
                offset: *offset,
            },
            Place::Pieces(pieces) => {
                let mut pieces = pieces.clone();
                for source in &mut pieces.sources {
                    source.pack = number(source.pack);
                }
                Place::Pieces(pieces)
            }
            Place::Coded(coded) => {
                let mut coded = coded.clone();
                for layer in &mut coded.layers {
                    layer.pack = number(layer.pack);
                }
                Place::Coded(coded)
            }
        }
    }
}

/// One pack that a manifest refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackEntry {
    /// File name in `objects/`, such as 32 hexadecimal digits and `.safetensors`.
    pub name: String,
    /// Length of the whole file in bytes.
    pub length: u64,
    /// BLAKE3 of the header bytes, from the start of the file to the first tensor's first byte.
    pub header_digest: Digest,
}

/// The parts of a checkpoint's file name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CheckpointName {
    /// Optimizer updates so far.
    pub step: u64,
    /// 0, 1 or 2, as in the manifest.
    pub phase: u8,
    /// First 8 bytes of the manifest's digest.
    pub digest: [u8; 8],
}

/// Returns a manifest's file bytes and its digest, which is also their last 32 bytes.
///
/// # Errors
///
/// Whatever [`decode`] would refuse.
pub fn encode(manifest: &Manifest) -> Result<(Vec<u8>, Digest), Flaw> {
    Ok(Draft::of(manifest)?.finish(&manifest.storages))
}

/// A manifest's file that is complete but for the digests of its storages: they may not be known before it is certain
/// that the format takes everything else.
#[derive(Clone, Debug)]
pub struct Draft {
    bytes: Vec<u8>,
    /// Where each storage's digest goes.
    digests: Vec<usize>,
}

/// More than a manifest usually has for a storage and the leaf that views it: memory is taken once.
const USUAL_BYTES: usize = 256;

impl Draft {
    /// Drafts a manifest, whatever the digests of its storages are so far.
    ///
    /// # Errors
    ///
    /// Whatever [`decode`] would refuse.
    pub fn of(manifest: &Manifest) -> Result<Draft, Flaw> {
        check(manifest)?;
        let mut head = Vec::with_capacity(PAYLOAD + manifest.storages.len() * USUAL_BYTES);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&version_of(manifest).to_le_bytes());
        head.extend_from_slice(&[0; 8]);
        let mut digests = Vec::with_capacity(manifest.storages.len());
        let mut bytes = value::encode_mapping(head, &lower(manifest)?, value::MAX_MEMORY, |out, part| {
            match part {
                // The manifest is one level around a user's values.
                Part::Value(value) => out.value(value, value::MAX_DEPTH),
                Part::Storages(storages) => write_storages(out, storages, &mut digests),
            }
        })?;
        let length = (bytes.len() - PAYLOAD) as u64;
        bytes[PAYLOAD - 8..PAYLOAD].copy_from_slice(&length.to_le_bytes());
        Ok(Draft { bytes, digests })
    }

    /// How long the file will be.
    pub fn length(&self) -> u64 {
        (self.bytes.len() + DIGEST) as u64
    }

    /// Returns the file's bytes and its digest, given the same storages with their digests.
    pub fn finish(mut self, storages: &[StorageEntry]) -> (Vec<u8>, Digest) {
        assert_eq!(storages.len(), self.digests.len(), "they are the same storages");
        for (&at, storage) in self.digests.iter().zip(storages) {
            self.bytes[at..at + DIGEST].copy_from_slice(&storage.digest.0);
        }
        let digest = Digest::of(&self.bytes);
        self.bytes.extend_from_slice(&digest.0);
        (self.bytes, digest)
    }
}

/// Returns the manifest of file bytes and its digest.
///
/// # Errors
///
/// [`Flaw::Damaged`] where the bytes end early or do not hash to their digest; [`Flaw::NotOurs`], [`Flaw::Version`];
/// [`Flaw::Malformed`] where a whole manifest breaks a rule: an index or a view out of bounds, a name that is a path.
pub fn decode(bytes: &[u8]) -> Result<(Manifest, Digest), Flaw> {
    let (version, payload, digest) = open(bytes)?;
    let manifest = raise(value::decode_nested(
        payload,
        value::MAX_DEPTH + 1,
        value::MAX_MEMORY,
    )?)?;
    let expected = version_of(&manifest);
    if version != expected {
        return Err(Flaw::malformed(format!(
            "a manifest of version {version} with what version {expected} is for"
        )));
    }
    check(&manifest)?;
    Ok((manifest, digest))
}

/// One manifest has one form: the oldest version that can say what it says.
fn version_of(manifest: &Manifest) -> u32 {
    let needed = |storage: &StorageEntry| match storage.place {
        Place::Whole { .. } => WHOLE,
        Place::Pieces(_) => IN_PIECES,
        Place::Coded(_) => CODED,
    };
    manifest.storages.iter().map(needed).max().unwrap_or(WHOLE)
}

/// Bytes that a manifest begins with.
pub(crate) const HEAD: usize = PAYLOAD;

/// Whether a file of `length` bytes that begins like this can be a manifest. Spares reading one that cannot.
pub(crate) fn check_head(head: &[u8], length: u64) -> Result<(), Flaw> {
    let start = &head[..head.len().min(MAGIC.len())];
    if !MAGIC.starts_with(start) {
        return Err(Flaw::NotOurs { what: "a manifest" });
    }
    let Some((head, _)) = head.split_at_checked(PAYLOAD) else {
        return Err(Flaw::ends_early("manifest", (PAYLOAD + DIGEST) as u64, length));
    };
    let version = u32::from_le_bytes(head[8..12].try_into().expect("four bytes"));
    if !(WHOLE..=CODED).contains(&version) {
        return Err(Flaw::Version {
            what: "a manifest",
            found: version,
            newest: CODED,
        });
    }
    let payload = u64::from_le_bytes(head[12..20].try_into().expect("eight bytes"));
    let expected = payload.saturating_add((PAYLOAD + DIGEST) as u64);
    if expected != length {
        return Err(Flaw::ends_early("manifest", expected, length));
    }
    Ok(())
}

/// Checks everything around the payload.
fn open(bytes: &[u8]) -> Result<(u32, &[u8], Digest), Flaw> {
    check_head(bytes, bytes.len() as u64)?;
    let (body, digest) = bytes.split_at(bytes.len() - DIGEST);
    let (expected, found) = (Digest(digest.try_into().expect("32 bytes")), Digest::of(body));
    if expected != found {
        return Err(Flaw::digest("manifest", &expected, &found));
    }
    let version = u32::from_le_bytes(body[8..12].try_into().expect("four bytes"));
    Ok((version, &body[PAYLOAD..], found))
}

/// A part of a manifest, to be written.
enum Part<'a> {
    Value(Cow<'a, Value>),
    /// Thousands perhaps, so that they are written without becoming values.
    Storages(&'a [StorageEntry]),
}

/// A manifest's parts. The tree is as large as the rest is not, and is only looked at.
fn lower(manifest: &Manifest) -> Result<Vec<(&str, Part<'_>)>, Flaw> {
    let packs = manifest.packs.iter().map(|entry| {
        Ok(Value::List(vec![
            Value::Str(entry.name.clone()),
            record::count("a pack's length", entry.length)?,
            record::digest(&entry.header_digest),
        ]))
    });
    let metrics = manifest
        .metrics
        .iter()
        .map(|(name, bits)| (Value::Str(name.clone()), Value::Float(*bits)));
    let owned = |value| Part::Value(Cow::Owned(value));
    let parts = [
        owned(Value::Str(manifest.run_id.clone())),
        owned(record::count("a step", manifest.step)?),
        owned(Value::Int(i64::from(manifest.phase))),
        owned(manifest.parent.clone().map_or(Value::None, Value::Str)),
        owned(Value::Int(i64::from(manifest.life))),
        owned(Value::Str(manifest.created.clone())),
        Part::Value(Cow::Borrowed(&manifest.tree)),
        Part::Storages(&manifest.storages),
        owned(Value::List(packs.collect::<Result<_, Flaw>>()?)),
        owned(record::named(&manifest.identity)),
        owned(record::named(&manifest.environment)),
        owned(Value::dict(metrics.collect())),
        owned(Value::Bool(manifest.pinned)),
        owned(record::digest(&manifest.journal_head)),
        owned(record::count("new bytes", manifest.new_bytes)?),
    ];
    Ok(KEYS.into_iter().zip(parts).collect())
}

/// Writes what lists of storages hold, and notes where each one's digest is.
fn write_storages(
    out: &mut value::Writer,
    storages: &[StorageEntry],
    digests: &mut Vec<usize>,
) -> Result<(), Flaw> {
    out.list(storages.len())?;
    for storage in storages {
        // | list of 3 to 5, 1 byte | byte string of 32, 2 bytes | digest | ...
        digests.push(out.bytes().len() + 1 + 2);
        write_storage(out, storage)?;
    }
    Ok(())
}

fn write_storage(out: &mut value::Writer, entry: &StorageEntry) -> Result<(), Flaw> {
    let length = record::number("a storage's length", entry.length)?;
    let parts = match &entry.place {
        Place::Whole { .. } => 4,
        Place::Pieces(_) => 5,
        Place::Coded(_) => 3,
    };
    out.list(parts)?;
    out.byte_string(&entry.digest.0)?;
    out.int(length);
    match &entry.place {
        Place::Whole { pack, offset } => {
            out.int(i64::from(*pack));
            out.int(record::number("a storage's offset", *offset)?);
            Ok(())
        }
        Place::Pieces(pieces) => lower_pieces(pieces)?
            .iter()
            .try_for_each(|part| out.value(part, value::MAX_DEPTH)),
        Place::Coded(coded) => out.value(&lower_coded(coded)?, value::MAX_DEPTH),
    }
}

/// What is said of pieces: the length of a chunk, the sources and the pieces.
fn lower_pieces(found: &Pieces) -> Result<[Value; 3], Flaw> {
    let source = |source: &Source| {
        Value::List(vec![
            Value::Int(i64::from(source.pack)),
            record::digest(&source.check),
        ])
    };
    let piece = |piece: &Piece| {
        Ok(Value::List(vec![
            Value::Int(i64::from(piece.source)),
            record::count("a piece's offset", piece.offset)?,
            record::count("a piece's length", piece.length)?,
        ]))
    };
    Ok([
        record::count("a chunk's length", found.chunk)?,
        Value::List(found.sources.iter().map(source).collect()),
        Value::List(found.pieces.iter().map(piece).collect::<Result<_, Flaw>>()?),
    ])
}

fn lower_coded(coded: &Coded) -> Result<Value, Flaw> {
    let layers = coded
        .layers
        .iter()
        .map(lower_layer)
        .collect::<Result<_, Flaw>>()?;
    let width = record::count("a number's length", coded.width)?;
    Ok(Value::List(vec![width, Value::List(layers)]))
}

fn lower_layer(layer: &Layer) -> Result<Value, Flaw> {
    let frame = |length: &u64| record::count("a frame's length", *length);
    Ok(Value::List(vec![
        Value::Int(i64::from(layer.pack)),
        record::digest(&layer.check),
        record::count("a layer's offset", layer.offset)?,
        Value::List(layer.frames.iter().map(frame).collect::<Result<_, Flaw>>()?),
    ]))
}

fn raise(value: Value) -> Result<Manifest, Flaw> {
    let mut fields = Fields::of_dict("a manifest", value, &KEYS)?;
    Ok(Manifest {
        run_id: fields.text()?,
        step: fields.count()?,
        phase: fields.small()?,
        parent: fields.optional_text()?,
        life: fields.small()?,
        created: fields.text()?,
        tree: fields.value()?,
        storages: raise_all(fields.list()?, raise_storage)?,
        packs: raise_all(fields.list()?, raise_pack)?,
        identity: fields.named()?,
        environment: fields.named()?,
        metrics: fields
            .named()?
            .into_iter()
            .map(raise_metric)
            .collect::<Result<_, _>>()?,
        pinned: fields.bool()?,
        journal_head: fields.digest()?,
        new_bytes: fields.count()?,
    })
}

fn raise_storage(value: Value) -> Result<StorageEntry, Flaw> {
    // Each form has a length of its own.
    let parts = match &value {
        Value::List(parts) if (3..=5).contains(&parts.len()) => parts.len(),
        _ => 4,
    };
    let mut fields = Fields::of_list("a storage", value, parts)?;
    let (digest, length) = (fields.digest()?, fields.count()?);
    let place = match parts {
        3 => raise_coded(fields.value()?)?,
        4 => Place::Whole {
            pack: fields.small()?,
            offset: fields.count()?,
        },
        _ => Place::Pieces(Pieces {
            chunk: fields.count()?,
            sources: raise_all(fields.list()?, raise_source)?,
            pieces: raise_all(fields.list()?, raise_piece)?,
        }),
    };
    Ok(StorageEntry {
        digest,
        length,
        place,
    })
}

fn raise_all<T>(values: Vec<Value>, raise: fn(Value) -> Result<T, Flaw>) -> Result<Vec<T>, Flaw> {
    values.into_iter().map(raise).collect()
}

fn raise_source(value: Value) -> Result<Source, Flaw> {
    let mut fields = Fields::of_list("a source of pieces", value, 2)?;
    Ok(Source {
        pack: fields.small()?,
        check: fields.digest()?,
    })
}

fn raise_piece(value: Value) -> Result<Piece, Flaw> {
    let mut fields = Fields::of_list("a piece", value, 3)?;
    Ok(Piece {
        source: fields.small()?,
        offset: fields.count()?,
        length: fields.count()?,
    })
}

fn raise_coded(value: Value) -> Result<Place, Flaw> {
    let mut fields = Fields::of_list("a coded storage", value, 2)?;
    Ok(Place::Coded(Coded {
        width: fields.count()?,
        layers: raise_all(fields.list()?, raise_layer)?,
    }))
}

fn raise_layer(value: Value) -> Result<Layer, Flaw> {
    let mut fields = Fields::of_list("a layer", value, 4)?;
    Ok(Layer {
        pack: fields.small()?,
        check: fields.digest()?,
        offset: fields.count()?,
        frames: raise_all(fields.list()?, raise_frame)?,
    })
}

fn raise_frame(value: Value) -> Result<u64, Flaw> {
    let length = match value {
        Value::Int(length) => u64::try_from(length).ok(),
        _ => None,
    };
    length.ok_or_else(|| Flaw::malformed("a frame's length is not a count"))
}

fn raise_pack(value: Value) -> Result<PackEntry, Flaw> {
    let mut fields = Fields::of_list("a pack", value, 3)?;
    Ok(PackEntry {
        name: fields.text()?,
        length: fields.count()?,
        header_digest: fields.digest()?,
    })
}

fn raise_metric((name, value): (String, Value)) -> Result<(String, u64), Flaw> {
    match value {
        Value::Float(bits) => Ok((name, bits)),
        _ => Err(Flaw::malformed(format!("the metric {name:?} is not a float"))),
    }
}

/// Checks what a manifest says; binds both directions.
fn check(manifest: &Manifest) -> Result<(), Flaw> {
    record::check_run_id(&manifest.run_id)?;
    record::check_phase(manifest.phase)?;
    record::check_time(&manifest.created)?;
    if let Some(parent) = manifest
        .parent
        .as_deref()
        .filter(|name| parse_checkpoint_name(name).is_none())
    {
        return Err(Flaw::malformed(format!(
            "the parent {parent:?} is not a checkpoint's name"
        )));
    }
    if manifest.life == 0 {
        return Err(Flaw::malformed("life 0; lives count from 1"));
    }
    check_packs(&manifest.packs)?;
    let count = |of: fn(&Place) -> usize| manifest.storages.iter().map(|storage| of(&storage.place)).sum();
    check_count("pieces", count(piece_count), MAX_PIECES)?;
    check_count("frames", count(frame_count), MAX_FRAMES)?;
    for (index, storage) in manifest.storages.iter().enumerate() {
        check_storage(index, storage, &manifest.packs)?;
    }
    check_tree(&manifest.tree, &manifest.storages)?;
    let named = manifest.identity.iter().chain(&manifest.environment);
    named
        .map(|(_, value)| value)
        .try_for_each(|value| check_tree(value, &[]))
}

fn piece_count(place: &Place) -> usize {
    match place {
        Place::Whole { .. } | Place::Coded(_) => 0,
        Place::Pieces(pieces) => pieces.pieces.len(),
    }
}

/// How many frames a storage has.
pub(crate) fn frame_count(place: &Place) -> usize {
    match place {
        Place::Whole { .. } | Place::Pieces(_) => 0,
        Place::Coded(coded) => coded.layers.iter().map(|layer| layer.frames.len()).sum(),
    }
}

fn check_count(what: &str, count: usize, most: usize) -> Result<(), Flaw> {
    if count > most {
        return Err(Flaw::limit(format!(
            "{count} {what} in a manifest; at most {most} are allowed"
        )));
    }
    Ok(())
}

fn check_packs(packs: &[PackEntry]) -> Result<(), Flaw> {
    let mut names = BTreeSet::new();
    for pack in packs {
        if !is_file_name(&pack.name) {
            return Err(Flaw::malformed(format!(
                "the pack {:?} is not a plain file name",
                pack.name
            )));
        }
        if !names.insert(&pack.name) {
            return Err(Flaw::malformed(format!("the pack {:?} twice", pack.name)));
        }
    }
    Ok(())
}

fn check_storage(index: usize, storage: &StorageEntry, packs: &[PackEntry]) -> Result<(), Flaw> {
    match &storage.place {
        Place::Whole { .. } => {}
        Place::Pieces(pieces) => check_pieces(index, storage.length, pieces)?,
        Place::Coded(coded) => check_coded(index, storage.length, coded)?,
    }
    for (number, offset, length) in storage.place.pieces(storage.length) {
        let Some(pack) = packs.get(number as usize) else {
            return Err(Flaw::malformed(format!(
                "storage {index} is in pack {number} of {}",
                packs.len()
            )));
        };
        if offset.checked_add(length).is_none_or(|end| end > pack.length) {
            return Err(Flaw::malformed(format!(
                "storage {index} takes {length} bytes at {offset} of pack {:?}, which has {}",
                pack.name, pack.length
            )));
        }
    }
    Ok(())
}

/// Checks that pieces make up their storage in the one way in which they are written: no byte of a pack twice.
fn check_pieces(index: usize, length: u64, found: &Pieces) -> Result<(), Flaw> {
    let wrong = |what: String| Err(Flaw::malformed(format!("storage {index} in pieces: {what}")));
    let Pieces {
        chunk,
        sources,
        pieces,
    } = found;
    if !CHUNKS.contains(chunk) || !chunk.is_power_of_two() {
        return wrong(format!("chunks of {chunk} bytes"));
    }
    if pieces.len() < 2 {
        return wrong(format!("{} of them", pieces.len()));
    }
    let (mut used, mut sum) = (0, 0u64);
    for (number, piece) in pieces.iter().enumerate() {
        if piece.source as usize > used || piece.source as usize >= sources.len() {
            return wrong(format!("piece {number} is in source {}", piece.source));
        }
        used = used.max(piece.source as usize + 1);
        let is_last = number + 1 == pieces.len();
        if piece.length == 0 || !(is_last || piece.length.is_multiple_of(*chunk)) {
            return wrong(format!("piece {number} has {} bytes", piece.length));
        }
        sum = sum.saturating_add(piece.length);
    }
    if used != sources.len() {
        return wrong(format!("{used} of {} sources are used", sources.len()));
    }
    if sum != length {
        return wrong(format!("{sum} bytes of {length}"));
    }
    if sources
        .iter()
        .map(|source| source.pack)
        .collect::<BTreeSet<_>>()
        .len()
        < sources.len()
    {
        return wrong("two sources are one pack".to_owned());
    }
    let goes_on = |pair: &[Piece]| {
        pair[0].source == pair[1].source && pair[0].offset.checked_add(pair[0].length) == Some(pair[1].offset)
    };
    if pieces.windows(2).any(goes_on) {
        return wrong("two of them are one".to_owned());
    }
    let mut sorted = pieces.clone();
    sorted.sort_unstable_by_key(|piece| (piece.source, piece.offset));
    let overlap = |pair: &[Piece]| {
        pair[0].source == pair[1].source && pair[0].offset.saturating_add(pair[0].length) > pair[1].offset
    };
    if sorted.windows(2).any(overlap) {
        return wrong("two of them overlap".to_owned());
    }
    Ok(())
}

/// Checks that layers have one frame for each block of their storage, none longer than the block.
fn check_coded(index: usize, length: u64, coded: &Coded) -> Result<(), Flaw> {
    let wrong = |what: String| Err(Flaw::malformed(format!("storage {index} is coded: {what}")));
    if !WIDTHS.contains(&coded.width) {
        return wrong(format!("numbers of {} bytes", coded.width));
    }
    if length == 0 || !(1..=2).contains(&coded.layers.len()) {
        return wrong(format!("{length} bytes in {} layers", coded.layers.len()));
    }
    if let [first, second] = coded.layers.as_slice()
        && first.pack == second.pack
    {
        return wrong("two layers are in one pack".to_owned());
    }
    let block = BLOCK as u64;
    for layer in &coded.layers {
        if layer.frames.len() as u64 != length.div_ceil(block) {
            return wrong(format!("{} frames of {length} bytes", layer.frames.len()));
        }
        for (frame, start) in layer.frames.iter().zip((0..length).step_by(BLOCK)) {
            let most = block.min(length - start);
            if *frame == 0 || *frame > most {
                return wrong(format!("a frame of {frame} bytes of a block of {most}"));
            }
        }
    }
    Ok(())
}

/// Whether a name is one part of a path and safe to join to a directory, on every platform.
fn is_file_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=128).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

/// Checks every tensor of a tree against the storages. No deeper than what was encoded or decoded.
fn check_tree(value: &Value, storages: &[StorageEntry]) -> Result<(), Flaw> {
    check_tree_within(value, storages, value::MAX_DEPTH)
}

fn check_tree_within(value: &Value, storages: &[StorageEntry], depth: usize) -> Result<(), Flaw> {
    // Too deep is for the codec to say, which sees it too.
    let Some(depth) = depth.checked_sub(1) else {
        return Ok(());
    };
    let inner = |value: &Value| check_tree_within(value, storages, depth);
    match value {
        Value::List(items) | Value::Tuple(items) | Value::Set(items) | Value::FrozenSet(items) => {
            items.iter().try_for_each(inner)
        }
        Value::Dict(items) => items
            .iter()
            .try_for_each(|(key, value)| inner(key).and_then(|()| inner(value))),
        Value::Object(object) => object.fields.iter().try_for_each(|(_, value)| inner(value)),
        Value::Tensor(tensor) => {
            check_view(tensor, storages)?;
            tensor.attrs.iter().try_for_each(|(_, value)| inner(value))
        }
        _ => Ok(()),
    }
}

fn check_view(tensor: &Tensor, storages: &[StorageEntry]) -> Result<(), Flaw> {
    let Some(storage) = storages.get(tensor.storage as usize) else {
        let (index, count) = (tensor.storage, storages.len());
        return Err(Flaw::malformed(format!(
            "a tensor views storage {index} of {count}"
        )));
    };
    let Some(size) = element_size(&tensor.dtype) else {
        return Ok(());
    };
    if tensor.shape.contains(&0) {
        return Ok(());
    }
    let outside = || {
        Flaw::malformed(format!(
            "a tensor of {} {:?} with strides {:?} at {} leaves its storage of {} bytes",
            tensor.dtype, tensor.shape, tensor.strides, tensor.offset, storage.length
        ))
    };
    // The elements furthest to either side; 128 bits hold one dimension's reach but not the sum of many.
    let (mut first, mut last) = (i128::from(tensor.offset), i128::from(tensor.offset));
    for (size, stride) in tensor.shape.iter().zip(&tensor.strides) {
        let reach = i128::from(size - 1) * i128::from(*stride);
        let side = if reach < 0 { &mut first } else { &mut last };
        *side = side.checked_add(reach).ok_or_else(outside)?;
    }
    let end = last
        .checked_add(1)
        .and_then(|count| count.checked_mul(i128::from(size)))
        .ok_or_else(outside)?;
    if first < 0 || end > i128::from(storage.length) {
        Err(outside())
    } else {
        Ok(())
    }
}

/// Bytes of one element, for the dtypes whose elements are whole bytes; `None` where a front knows better.
pub fn element_size(dtype: &str) -> Option<u64> {
    match dtype {
        "bool" | "uint8" | "int8" | "quint8" | "qint8" => Some(1),
        "float8_e4m3fn" | "float8_e4m3fnuz" | "float8_e5m2" | "float8_e5m2fnuz" | "float8_e8m0fnu" => Some(1),
        "float4_e2m1fn_x2" => Some(1),
        "uint16" | "int16" | "float16" | "bfloat16" => Some(2),
        "uint32" | "int32" | "float32" | "qint32" | "complex32" => Some(4),
        "uint64" | "int64" | "float64" | "complex64" => Some(8),
        "complex128" => Some(16),
        _ => None,
    }
}

/// The file name of a checkpoint: `000001200-0-9f3c51d0a1b2c3d4`.
pub fn checkpoint_name(step: u64, phase: u8, digest: &Digest) -> String {
    format!("{step:09}-{phase}-{}", digest.short())
}

/// Reads a checkpoint's file name; `None` where it is not one.
pub fn parse_checkpoint_name(name: &str) -> Option<CheckpointName> {
    let mut parts = name.split('-');
    let (digits, phase, digest) = (parts.next()?, parts.next()?, parts.next()?);
    let step = digits.parse().ok().filter(|step| *step <= record::MAX_COUNT)?;
    let phase = phase.parse().ok().filter(|phase| *phase <= record::MAX_PHASE)?;
    let parsed = CheckpointName {
        step,
        phase,
        digest: unhex(digest)?,
    };
    // One name for one checkpoint: no other padding, sign or case.
    let canonical = format!("{step:09}-{phase}-{digest}");
    (canonical == name).then_some(parsed)
}
