//! Checkpoints: packs written once, a manifest published by rename, damage found before bytes are handed out.
//!
//! Touches: one [`Directory`], in `checkpoints/`, `objects/` and `tmp/`; the clock and the system's randomness for
//! names. Nothing that was committed is written again. The order of a commit is the whole proof: packs, their sync,
//! their names, the names' sync; then the same for the manifest. Any prefix of it leaves garbage, never damage.

mod compression;
mod form;
mod pack_writer;
mod parallel;
mod read;
mod renewal;
mod retention;
mod write;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::digest::{Digest, Fingerprint, Scattered, WINDOWS};
use crate::error::{Error, Result};
use crate::format::manifest::{self, Manifest, PackEntry, Place, StorageEntry};
use crate::format::{Flaw, pack};
use crate::lending::Bytes;
use crate::state::{Tensor, Value};
use crate::storage::Directory;
use crate::storage::disk::DiskStorage;

use compression::Bases;
pub use compression::Compression;
use form::{Form, Shown};
use pack_writer::Buffers;
pub(crate) use read::{Claim, verify_pack};
use renewal::Chunks;
pub use retention::{Best, Order, Retention};
pub use write::Commit;
use write::counts;
pub(crate) use write::{Beside, Digested};

/// Directory of the manifests.
pub(crate) const CHECKPOINTS: &str = "checkpoints";
/// Directory of the packs.
pub(crate) const OBJECTS: &str = "objects";
/// Directory of files that have no name yet.
pub(crate) const TMP: &str = "tmp";

/// How the name of a file ends that is kept to be written over.
const SPARE: &str = ".old";

/// What the name of a tensor in a pack ends with of which only what changed is there.
const CHANGED: &str = " (changed chunks)";
/// The same of one that is coded.
const COMPRESSED: &str = " (compressed)";

/// The largest manifest that is read, in bytes: the largest encoded value and what surrounds it.
const MAX_MANIFEST: u64 = crate::format::value::MAX_ENCODED as u64 + (1 << 20);

/// What a manifest says of its checkpoint, without its tree.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointInfo {
    /// Optimizer updates so far.
    pub step: u64,
    /// 0: after a step inside an epoch. 1: an epoch's after-work is done. 2: the run is finished.
    pub phase: u8,
    /// Its file name in `checkpoints/`.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Which run it belongs to.
    pub run_id: String,
    /// Process life that wrote it.
    pub life: u32,
    /// When, as an RFC 3339 timestamp.
    pub created: String,
    /// Logged numbers by name.
    pub metrics: Vec<(String, f64)>,
    /// What the bits may depend on.
    pub environment: Vec<(String, Value)>,
    /// What may not change.
    pub identity: Vec<(String, Value)>,
    /// Whether retention must keep it.
    pub pinned: bool,
    /// Chain hash of the journal at its boundary.
    pub journal_head: Digest,
    /// Bytes of all storages that it refers to.
    pub size_bytes: u64,
    /// Bytes that it added to the disk, its manifest excluded.
    pub new_bytes: u64,
}

impl CheckpointInfo {
    fn new(directory: &Directory, name: &str, manifest: &Manifest) -> Self {
        Self {
            step: manifest.step,
            phase: manifest.phase,
            name: name.to_owned(),
            path: directory.path(&format!("{CHECKPOINTS}/{name}")),
            run_id: manifest.run_id.clone(),
            life: manifest.life,
            created: manifest.created.clone(),
            metrics: manifest
                .metrics
                .iter()
                .map(|(name, bits)| (name.clone(), f64::from_bits(*bits)))
                .collect(),
            environment: manifest.environment.clone(),
            identity: manifest.identity.clone(),
            pinned: manifest.pinned,
            journal_head: manifest.journal_head,
            size_bytes: manifest.storages.iter().map(|storage| storage.length).sum(),
            new_bytes: manifest.new_bytes,
        }
    }

    /// What newest means: later boundaries, and of one boundary the later life's.
    pub(crate) fn age(&self) -> (u64, u8, u32, &str, &str) {
        (self.step, self.phase, self.life, &self.created, &self.name)
    }
}

/// One committed checkpoint, its manifest verified. Its tensors are verified as they are read.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    directory: Directory,
    info: Arc<CheckpointInfo>,
    manifest: Arc<Manifest>,
    form: Arc<Form>,
    /// What was found of its storages when they were read.
    seen: Arc<Mutex<Seen>>,
}

/// What a commit that goes on from a checkpoint wants to know of its storages, by their index.
#[derive(Debug, Default)]
struct Seen {
    /// Of those in pieces.
    chunks: HashMap<usize, Chunks>,
    samples: HashMap<usize, Sample>,
}

impl Checkpoint {
    fn new(directory: &Directory, name: &str, manifest: Arc<Manifest>, form: Arc<Form>) -> Checkpoint {
        Checkpoint {
            directory: directory.clone(),
            info: Arc::new(CheckpointInfo::new(directory, name, &manifest)),
            manifest,
            form,
            seen: Arc::default(),
        }
    }

    /// The run directory that it lies in.
    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// What its manifest says of it.
    pub fn info(&self) -> &CheckpointInfo {
        &self.info
    }

    /// The state.
    pub fn tree(&self) -> &Value {
        &self.manifest.tree
    }

    /// The whole manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn shared_manifest(&self) -> Arc<Manifest> {
        Arc::clone(&self.manifest)
    }

    /// What follows from the form of its tree.
    pub(crate) fn form(&self) -> &Arc<Form> {
        &self.form
    }

    /// (length in bytes, digest) of each storage.
    pub fn storages(&self) -> Vec<(u64, Digest)> {
        self.manifest
            .storages
            .iter()
            .map(|storage| (storage.length, storage.digest))
            .collect()
    }

    /// Opens a checkpoint by its manifest's path, wherever the run directory lies. Needs no lock.
    ///
    /// # Errors
    ///
    /// Damage of the manifest, or of a pack's length or header.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let parts = path.file_name().and_then(|name| name.to_str()).zip(path.parent());
        let Some((name, dir)) = parts else {
            return Err(Error::invalid(format!(
                "{} is not the path of a checkpoint",
                path.display()
            )));
        };
        let above = dir.parent().filter(|_| dir.ends_with(CHECKPOINTS));
        let Some(above) = above else {
            return Err(Error::Format {
                path: Some(path.to_path_buf()),
                what: format!("a checkpoint lies in a run's `{CHECKPOINTS}`"),
            });
        };
        let above = if above.as_os_str().is_empty() {
            Path::new(".")
        } else {
            above
        };
        let storage = DiskStorage::open(above).map_err(|error| Error::io("open directory", above, error))?;
        Checkpoint::open_in(&Directory::new(Arc::new(storage)), name)
    }

    pub(crate) fn open_in(directory: &Directory, name: &str) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::load(directory, name)?;
        checkpoint.check_packs()?;
        Ok(checkpoint)
    }

    /// Reads and verifies a manifest; its packs are looked at by [`Checkpoint::check_packs`].
    pub(crate) fn load(directory: &Directory, name: &str) -> Result<Checkpoint> {
        let file = format!("{CHECKPOINTS}/{name}");
        let flawed = |flaw: Flaw| flaw.at(directory.path(&file));
        // Its first bytes first: a stranger's file with holes costs no memory.
        let source = directory.open(&file)?;
        let length = source.len()?;
        let mut head = vec![0; length.min(manifest::HEAD as u64) as usize];
        source.read_exact_at(0, &mut head)?;
        manifest::check_head(&head, length).map_err(flawed)?;
        let bytes = source.read_all(MAX_MANIFEST)?;
        let (manifest, digest) = manifest::decode(&bytes).map_err(flawed)?;
        let expected = manifest::checkpoint_name(manifest.step, manifest.phase, &digest);
        if name != expected {
            let (path, part) = (directory.path(&file), "name".to_owned());
            return Err(Error::Damaged {
                path,
                part,
                expected,
                found: name.to_owned(),
            });
        }
        let manifest = Arc::new(manifest);
        let form = Form::of(Arc::clone(&manifest));
        Ok(Checkpoint::new(directory, name, manifest, form))
    }
}

/// Whether an error means that a checkpoint is not whole, rather than that looking at it did not work this time.
pub(crate) fn is_damage(error: &Error) -> bool {
    match error {
        Error::Damaged { .. } | Error::Format { .. } => true,
        Error::Io { source, .. } => {
            let kinds = [
                io::ErrorKind::NotFound,
                io::ErrorKind::UnexpectedEof,
                io::ErrorKind::InvalidInput, // Not a plain file.
                io::ErrorKind::FileTooLarge,
            ];
            // A device that cannot read a sector will not read it next time.
            kinds.contains(&source.kind())
                || source.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
        }
        _ => false,
    }
}

/// What is in `checkpoints/`.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// This run's checkpoints with verified manifests and packs that are there, newest first.
    pub whole: Vec<Checkpoint>,
    /// Names that should be checkpoints and are not whole, newest first, and why.
    pub rejected: Vec<(manifest::CheckpointName, String, Error)>,
    /// Whole manifests of other runs.
    pub foreign: Vec<Checkpoint>,
    /// Names that are none of ours.
    pub unknown: Vec<String>,
    /// Packs that any readable manifest refers to, rejected ones included.
    pub referenced: BTreeSet<String>,
    /// Whether every file is accounted for: all manifests could be read. No pack may be deleted otherwise.
    pub complete: bool,
}

/// Whether a file among the manifests is certainly none: desktops, file systems and copying programs leave such names.
fn is_aside(name: &str) -> bool {
    name.starts_with('.')
}

/// Looks at every manifest.
///
/// # Errors
///
/// Those that are not damage (no file descriptors left, no permission): nothing can be said then.
pub(crate) fn survey(directory: &Directory, run_id: &str) -> Result<Survey> {
    let mut survey = Survey {
        complete: true,
        ..Survey::default()
    };
    for name in directory.list_if_there(CHECKPOINTS)? {
        if is_aside(&name) {
            continue;
        }
        let Some(parts) = manifest::parse_checkpoint_name(&name) else {
            survey.unknown.push(name);
            survey.complete = false;
            continue;
        };
        let checkpoint = match Checkpoint::load(directory, &name) {
            Ok(checkpoint) => checkpoint,
            Err(error) if is_damage(&error) => {
                survey.rejected.push((parts, name, error));
                survey.complete = false;
                continue;
            }
            Err(error) => return Err(error),
        };
        survey
            .referenced
            .extend(checkpoint.manifest.packs.iter().map(|pack| pack.name.clone()));
        if checkpoint.info.run_id != run_id {
            survey.foreign.push(checkpoint);
            continue;
        }
        match checkpoint.check_packs() {
            Ok(()) => survey.whole.push(checkpoint),
            Err(error) if is_damage(&error) => survey.rejected.push((parts, name, error)),
            Err(error) => return Err(error),
        }
    }
    survey.whole.sort_by(|a, b| b.info.age().cmp(&a.info.age()));
    survey.rejected.sort_by(|(a, ..), (b, ..)| b.cmp(a));
    Ok(survey)
}

/// Where the bytes of a storage are, for those who would write them again.
#[derive(Clone, Debug)]
struct Known {
    /// Where they are, in packs that are counted among these.
    place: Place,
    /// All packs of the checkpoint that has them: thousands of storages share the list.
    packs: Arc<[PackEntry]>,
    /// Whether this process wrote or read these bytes. Others are read before anything new relies on them.
    verified: bool,
}

impl Known {
    /// The packs that the bytes are in.
    fn used_packs(&self) -> impl Iterator<Item = &PackEntry> {
        self.place.packs().map(|pack| &self.packs[pack as usize])
    }
}

/// The checkpoints of one run, for its one writer.
#[derive(Debug)]
pub struct Store {
    directory: Directory,
    run_id: String,
    /// This run's whole checkpoints by name.
    catalog: BTreeMap<String, Entry>,
    places: HashMap<(Digest, u64), Known, Scattered>,
    /// Which of the places are in pieces, at most.
    in_pieces: Vec<(Digest, u64)>,
    /// Files of failed commits that could not be removed yet.
    leftovers: Vec<String>,
    /// Whether manifests were removed that may come back, and their packs are still there: the next prune goes on.
    removing: bool,
    tuning: Tuning,
    buffers: Buffers,
    /// What the last commit found, storage by storage.
    habits: Vec<Habit>,
    /// Checkpoints of which every byte was read before others were deleted.
    read_back: BTreeSet<String>,
    /// A deleted pack's file in `tmp/`, to be written over by the next pack.
    spare: Option<String>,
    /// What compressed storages are differences to.
    bases: Option<Bases>,
    /// The last commit's form.
    form: Option<Arc<Form>>,
    /// Why the last prune deleted no pack, if it did not.
    held_up: Option<String>,
    /// What was noticed since it was last asked for.
    notices: Vec<String>,
}

/// What a storage's bytes are by windows: cheap to take, and other ones are proof of other bytes.
type Sample = [Fingerprint; WINDOWS];

/// Takes the sample that is compared from commit to commit.
fn sample(bytes: &[u8]) -> Sample {
    const SEED: u64 = 1;
    Fingerprint::of_windows(bytes, SEED)
}

/// What a storage is expected to do from one commit to the next.
#[derive(Clone, Debug)]
struct Habit {
    digest: Digest,
    length: u64,
    /// Whether the last commit found bytes there that were nowhere else.
    changes: bool,
    /// Of the last commit's bytes: another one now is proof of a change. Unknown where the checkpoint that a life begins
    /// with was read into no memory.
    windows: Option<Sample>,
    /// Digests of the last commit's chunks, unless most of them are expected to change.
    chunks: Option<Chunks>,
}

/// How the engine works. The defaults are measured; tests take small sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Bytes that are copied, digested and written at a time; at least [`crate::digest::GROUP`].
    pub piece: usize,
    /// Writes that are under way at a time; there are a few buffers more, that others digest into. With 1, all of it is
    /// done by the thread that commits.
    pub workers: usize,
    /// Packs from this size on are written over the file of a deleted one.
    pub reuse_from: u64,
    /// Storages from this size on are compared with the last commit's by chunks.
    pub chunks_from: usize,
    /// Whether what is written is compressed.
    pub compression: Compression,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            piece: 4 << 20,
            workers: 4,
            reuse_from: 1 << 20,
            chunks_from: 1 << 20,
            compression: Compression::None,
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    info: Arc<CheckpointInfo>,
    packs: Arc<[PackEntry]>,
}

impl Store {
    /// Returns a store over a run's whole checkpoints. The caller holds the run's lock.
    pub(crate) fn new(directory: Directory, run_id: String, whole: &[Checkpoint], tuning: Tuning) -> Store {
        let mut store = Store {
            directory,
            run_id,
            catalog: BTreeMap::new(),
            places: HashMap::default(),
            in_pieces: Vec::new(),
            leftovers: Vec::new(),
            removing: false,
            buffers: Buffers::new(tuning.piece, tuning.workers),
            tuning,
            habits: Vec::new(),
            read_back: BTreeSet::new(),
            spare: None,
            bases: None,
            form: None,
            held_up: None,
            notices: Vec::new(),
        };
        for checkpoint in whole {
            store.admit(checkpoint, false);
        }
        store
    }

    /// Takes note that every byte of a checkpoint was read, and that training goes on from it.
    pub(crate) fn trust(&mut self, checkpoint: &Checkpoint) {
        self.admit(checkpoint, true);
        let mut seen = checkpoint.seen.lock().expect("nothing panics with it");
        let manifest = &checkpoint.manifest;
        let others = self
            .catalog
            .values()
            .filter(|entry| entry.info.name != checkpoint.info.name);
        let older: HashSet<&str> = others
            .flat_map(|entry| entry.packs.iter().map(|pack| pack.name.as_str()))
            .collect();
        let is_own = |pack: u32| !older.contains(manifest.packs[pack as usize].name.as_str());
        let counts = counts(&manifest.storages);
        let habit = |(index, storage): (usize, &StorageEntry)| Habit {
            digest: storage.digest,
            length: storage.length,
            changes: counts[&storage.digest] == 1 && storage.place.packs().any(is_own),
            windows: seen.samples.remove(&index),
            chunks: seen.chunks.remove(&index),
        };
        self.habits = manifest.storages.iter().enumerate().map(habit).collect();
    }

    fn admit(&mut self, checkpoint: &Checkpoint, verified: bool) {
        let manifest = &checkpoint.manifest;
        let packs: Arc<[PackEntry]> = manifest.packs.as_slice().into();
        for storage in &manifest.storages {
            let key = (storage.digest, storage.length);
            let in_pieces = matches!(storage.place, Place::Pieces(_));
            let known = || Known {
                place: storage.place.clone(),
                packs: Arc::clone(&packs),
                verified,
            };
            if verified {
                self.in_pieces.extend(in_pieces.then_some(key));
                self.places.insert(key, known());
            } else if !in_pieces {
                // Pieces take memory, and only those of the newest one are likely to be needed again.
                self.places.entry(key).or_insert_with(known);
            }
        }
        let entry = Entry {
            info: Arc::clone(&checkpoint.info),
            packs,
        };
        self.catalog.insert(checkpoint.info.name.clone(), entry);
    }

    /// This run's checkpoints, oldest first.
    pub fn checkpoints(&self) -> Vec<CheckpointInfo> {
        let mut infos: Vec<CheckpointInfo> =
            self.catalog.values().map(|entry| (*entry.info).clone()).collect();
        infos.sort_by(|a, b| a.age().cmp(&b.age()));
        infos
    }

    pub(crate) fn set_compression(&mut self, compression: Compression) {
        self.tuning.compression = compression;
        if compression != Compression::Differences {
            self.bases = None; // Memory that nothing needs any more.
        }
    }

    /// (step, phase) of this run's newest checkpoint.
    pub(crate) fn newest_boundary(&self) -> Option<(u64, u8)> {
        self.newest().map(|entry| (entry.info.step, entry.info.phase))
    }

    /// What was noticed since this was last asked.
    pub(crate) fn take_notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notices)
    }

    /// Gives up what is kept for later. What cannot be removed is swept at the next open.
    pub(crate) fn close(&mut self) {
        self.leftovers.extend(self.spare.take());
        self.remove_leftovers();
    }

    fn newest(&self) -> Option<&Entry> {
        self.catalog
            .values()
            .max_by(|a, b| a.info.age().cmp(&b.info.age()))
    }
}

/// Removes what no manifest refers to: files without a name yet, packs of commits that never came to be.
///
/// Only names of our own making are touched, and packs only where every manifest could be read. Returns how many
/// files went.
pub(crate) fn sweep(directory: &Directory, survey: &Survey) -> Result<usize> {
    let mut count = 0;
    for name in directory.list_if_there(TMP)? {
        if is_temporary_name(&name) {
            directory.remove(&format!("{TMP}/{name}"))?;
            count += 1;
        } else if name.strip_suffix(SPARE).is_some_and(is_random_name) {
            directory.remove(&format!("{TMP}/{name}"))?; // Kept on purpose, so that nothing was cut short.
        }
    }
    if survey.complete {
        let garbage = unreferenced_packs(directory, &survey.referenced)?;
        if !garbage.is_empty() {
            // A manifest that another life removed must not come back after a power cut that its pack does not survive.
            directory.sync_dir(CHECKPOINTS)?;
        }
        count += garbage.len();
        remove_packs(directory, &garbage)?;
    }
    Ok(count)
}

/// Packs that are not `referenced`; the caller has seen every manifest.
fn unreferenced_packs(directory: &Directory, referenced: &BTreeSet<String>) -> Result<Vec<String>> {
    let names = directory.list_if_there(OBJECTS)?;
    Ok(names
        .into_iter()
        .filter(|name| is_pack_name(name) && !referenced.contains(name))
        .collect())
}

/// Removes packs; the caller has made sure that no manifest of theirs can come back.
fn remove_packs(directory: &Directory, names: &[String]) -> Result<()> {
    names
        .iter()
        .try_for_each(|name| directory.remove(&format!("{OBJECTS}/{name}")))
}

/// 32 hexadecimal digits that nothing else is called.
pub(crate) fn random_name() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| Error::Unsupported {
        what: format!("randomness of the operating system ({error})"),
    })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A name below `tmp/`.
pub(crate) fn temporary_name() -> Result<String> {
    Ok(format!("{TMP}/{}.tmp", random_name()?))
}

/// Whether a name in `tmp/` is one of ours.
pub(crate) fn is_temporary_name(name: &str) -> bool {
    name.strip_suffix(".tmp").is_some_and(is_random_name)
}

fn is_random_name(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

pub(crate) fn is_pack_name(name: &str) -> bool {
    name.strip_suffix(".safetensors").is_some_and(is_random_name)
}

/// Calls `visit` with each tensor leaf and its path, in the tree's order.
pub(crate) fn walk<'t>(tree: &'t Value, visit: &mut dyn FnMut(&str, &'t Tensor)) {
    descend(tree, &mut String::new(), 0, visit);
}

fn descend<'t>(value: &'t Value, path: &mut String, depth: usize, visit: &mut dyn FnMut(&str, &'t Tensor)) {
    // Deeper trees are refused when they are encoded; looking for names must not overflow the stack before.
    if depth > crate::format::value::MAX_DEPTH + 1 {
        return;
    }
    match value {
        Value::List(items) | Value::Tuple(items) | Value::Set(items) | Value::FrozenSet(items) => {
            for (index, item) in items.iter().enumerate() {
                below(&index.to_string(), item, path, depth, visit);
            }
        }
        Value::Dict(items) => {
            for (key, item) in &**items {
                below(&key_text(key), item, path, depth, visit);
            }
        }
        Value::Object(object) => {
            for (name, item) in &object.fields {
                below(name, item, path, depth, visit);
            }
        }
        Value::Tensor(tensor) => {
            visit(path, tensor);
            for (name, item) in &tensor.attrs {
                below(name, item, path, depth, visit);
            }
        }
        _ => {}
    }
}

fn below<'t>(
    part: &str,
    child: &'t Value,
    path: &mut String,
    depth: usize,
    visit: &mut dyn FnMut(&str, &'t Tensor),
) {
    let length = path.len();
    if length > 0 {
        path.push('/');
    }
    path.push_str(part);
    descend(child, path, depth + 1, visit);
    path.truncate(length);
}

/// A mapping's key as a part of a path.
pub fn key_text(key: &Value) -> Cow<'_, str> {
    let text = match key {
        Value::Str(text) => return Cow::Borrowed(text),
        Value::Int(number) => number.to_string(),
        Value::Tuple(parts) => parts.iter().map(key_text).collect::<Vec<_>>().join(","),
        Value::None => "None".to_owned(),
        Value::Bool(flag) => if *flag { "True" } else { "False" }.to_owned(),
        Value::Float(bits) => f64::from_bits(*bits).to_string(),
        other => crate::format::value::digest_value(other).map_or("?".to_owned(), |digest| digest.short()),
    };
    Cow::Owned(text)
}

/// Whether a tensor is its storage's bytes in order, from the first on.
pub fn contiguous(tensor: &Tensor) -> bool {
    let mut expected: i64 = 1;
    for (&size, &stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
        if size != 1 {
            if stride != expected {
                return false;
            }
            expected = expected.saturating_mul(i64::try_from(size).unwrap_or(i64::MAX));
        }
    }
    tensor.offset == 0
}

/// Path of the first leaf that views a storage, for messages.
pub(crate) fn leaf_of(tree: &Value, storage: usize) -> String {
    let mut found = None;
    walk(tree, &mut |path, tensor| {
        if tensor.storage as usize == storage && found.is_none() {
            found = Some(path.to_owned());
        }
    });
    found.unwrap_or_else(|| format!("storage {storage}"))
}

/// Names for what goes into a pack: a storage's first leaf's path, made unique, and its look if it is the whole storage
/// that is written; otherwise what else it is, and how many bytes.
fn pack_tensors(tree: &Value, storages: &[Bytes], new: &[Shown]) -> Vec<pack::PackTensor> {
    // A storage's first leaf: its path, and dtype and shape if it is the whole storage.
    type Look<'t> = Option<(&'t str, &'t [u64])>;
    let mut first: Vec<Option<(String, Look)>> = vec![None; storages.len()];
    walk(tree, &mut |path, tensor| {
        // What has no such storage is refused when the tree is encoded.
        if let Some(first @ None) = first.get_mut(tensor.storage as usize) {
            let look = contiguous(tensor).then_some((tensor.dtype.as_str(), tensor.shape.as_slice()));
            *first = Some((path.to_owned(), look));
        }
    });
    let mut taken = HashSet::new();
    let describe = |&(index, other): &Shown| {
        let (mut path, mut look) = first[index].take().unwrap_or_default();
        if let Some((what, _)) = other {
            look = None;
            path = if path.is_empty() { path } else { path + what };
        }
        let usable = !path.is_empty() && path != "__metadata__" && path.len() <= pack::MAX_NAME;
        let name = if usable && taken.insert(path.clone()) {
            path
        } else {
            let mut name = format!("storage {index}");
            while !taken.insert(name.clone()) {
                name.push('\'');
            }
            name
        };
        let length = other.map_or(storages[index].len() as u64, |(_, bytes)| bytes);
        pack::describe(name, length, look)
    };
    new.iter().map(describe).collect()
}
