//! The manifest: one small file that makes a checkpoint, with everything but the tensors' bytes.
//!
//! Touches: nothing. Its file is immutable and named after its own digest; what a whole manifest says is checked before
//! anyone acts on it, so that an index, a view or a name in it can be trusted.

use std::collections::BTreeSet;

use crate::digest::{Digest, unhex};
use crate::format::record::{self, Fields};
use crate::format::{FORMAT_VERSION, Flaw, value};
use crate::state::{Tensor, Value};

// | magic 8 | version u32 | length u64 | payload, canonical CBOR, `length` bytes | BLAKE3 of all before, 32 |
const MAGIC: &[u8; 8] = b"UNBRKMAN";
const PAYLOAD: usize = 8 + 4 + 8;
const DIGEST: usize = 32;

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

/// Where the bytes of one storage are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageEntry {
    /// BLAKE3 of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub length: u64,
    /// Index into the manifest's packs.
    pub pack: u32,
    /// First byte, counted from the start of the pack's file.
    pub offset: u64,
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
    check(manifest)?;
    let payload = value::encode_nested(&lower(manifest)?, value::MAX_DEPTH + 1, value::MAX_MEMORY)?;
    let mut bytes = Vec::with_capacity(PAYLOAD + payload.len() + DIGEST);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&payload);
    let digest = Digest::of(&bytes);
    bytes.extend_from_slice(&digest.0);
    Ok((bytes, digest))
}

/// Returns the manifest of file bytes and its digest.
///
/// # Errors
///
/// [`Flaw::Damaged`] where the bytes end early or do not hash to their digest; [`Flaw::NotOurs`], [`Flaw::Version`];
/// [`Flaw::Malformed`] where a whole manifest breaks a rule: an index or a view out of bounds, a name that is a path.
pub fn decode(bytes: &[u8]) -> Result<(Manifest, Digest), Flaw> {
    let (payload, digest) = open(bytes)?;
    let manifest = raise(value::decode_nested(
        payload,
        value::MAX_DEPTH + 1,
        value::MAX_MEMORY,
    )?)?;
    check(&manifest)?;
    Ok((manifest, digest))
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
    if version != FORMAT_VERSION {
        return Err(Flaw::Version {
            what: "a manifest",
            found: version,
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
fn open(bytes: &[u8]) -> Result<(&[u8], Digest), Flaw> {
    check_head(bytes, bytes.len() as u64)?;
    let (body, digest) = bytes.split_at(bytes.len() - DIGEST);
    let (expected, found) = (Digest(digest.try_into().expect("32 bytes")), Digest::of(body));
    if expected != found {
        return Err(Flaw::digest("manifest", &expected, &found));
    }
    Ok((&body[PAYLOAD..], found))
}

fn lower(manifest: &Manifest) -> Result<Value, Flaw> {
    let storages = manifest.storages.iter().map(|entry| {
        Ok(Value::List(vec![
            record::digest(&entry.digest),
            record::count("a storage's length", entry.length)?,
            Value::Int(i64::from(entry.pack)),
            record::count("a storage's offset", entry.offset)?,
        ]))
    });
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
    let values = [
        Value::Str(manifest.run_id.clone()),
        record::count("a step", manifest.step)?,
        Value::Int(i64::from(manifest.phase)),
        manifest.parent.clone().map_or(Value::None, Value::Str),
        Value::Int(i64::from(manifest.life)),
        Value::Str(manifest.created.clone()),
        manifest.tree.clone(),
        Value::List(storages.collect::<Result<_, Flaw>>()?),
        Value::List(packs.collect::<Result<_, Flaw>>()?),
        record::named(&manifest.identity),
        record::named(&manifest.environment),
        Value::Dict(metrics.collect()),
        Value::Bool(manifest.pinned),
        record::digest(&manifest.journal_head),
        record::count("new bytes", manifest.new_bytes)?,
    ];
    Ok(Value::Dict(
        KEYS.iter()
            .map(|key| Value::Str((*key).to_owned()))
            .zip(values)
            .collect(),
    ))
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
        storages: fields
            .list()?
            .into_iter()
            .map(raise_storage)
            .collect::<Result<_, _>>()?,
        packs: fields
            .list()?
            .into_iter()
            .map(raise_pack)
            .collect::<Result<_, _>>()?,
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
    let mut fields = Fields::of_list("a storage", value, 4)?;
    Ok(StorageEntry {
        digest: fields.digest()?,
        length: fields.count()?,
        pack: fields.small()?,
        offset: fields.count()?,
    })
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
    for (index, storage) in manifest.storages.iter().enumerate() {
        check_storage(index, storage, &manifest.packs)?;
    }
    check_tree(&manifest.tree, &manifest.storages)?;
    let named = manifest.identity.iter().chain(&manifest.environment);
    named
        .map(|(_, value)| value)
        .try_for_each(|value| check_tree(value, &[]))
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
    let Some(pack) = packs.get(storage.pack as usize) else {
        return Err(Flaw::malformed(format!(
            "storage {index} is in pack {} of {}",
            storage.pack,
            packs.len()
        )));
    };
    match storage.offset.checked_add(storage.length) {
        Some(end) if end <= pack.length => Ok(()),
        _ => Err(Flaw::malformed(format!(
            "storage {index} takes {} bytes at {} of pack {:?}, which has {}",
            storage.length, storage.offset, pack.name, pack.length
        ))),
    }
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
        Value::Object { fields, .. } => fields.iter().try_for_each(|(_, value)| inner(value)),
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
