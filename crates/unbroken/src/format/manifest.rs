//! The manifest: one small file that makes a checkpoint, with everything but the tensors' bytes.
//!
//! Touches: nothing.

use crate::digest::Digest;
use crate::format::Flaw;
use crate::state::Value;

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
    /// File name in `objects/`: 32 hexadecimal digits and `.safetensors`.
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
    let _ = manifest;
    unimplemented!()
}

/// Returns the manifest of file bytes and its digest.
///
/// # Errors
///
/// [`Flaw::Damaged`] where the bytes end early or do not hash to their digest; [`Flaw::NotOurs`], [`Flaw::Version`];
/// [`Flaw::Malformed`] where a whole manifest breaks a rule: an index or a view out of bounds, a name that is a path.
pub fn decode(bytes: &[u8]) -> Result<(Manifest, Digest), Flaw> {
    let _ = bytes;
    unimplemented!()
}

/// The file name of a checkpoint: `000001200-0-9f3c51d0a1b2c3d4`.
pub fn checkpoint_name(step: u64, phase: u8, digest: &Digest) -> String {
    format!("{step:09}-{phase}-{}", digest.short())
}

/// Reads a checkpoint's file name; `None` where it is not one.
pub fn parse_checkpoint_name(name: &str) -> Option<CheckpointName> {
    let _ = name;
    unimplemented!()
}
