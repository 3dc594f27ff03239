//! Committing a checkpoint: first a plan of what is new, then the writes in the order that makes them safe.
//!
//! Touches: `tmp/`, `objects/` and `checkpoints/`, only ever making names that were not there; and the file of a deleted
//! pack in `tmp/`, which is written over.
//!
//! Bytes are read once where that is enough: a storage that changed up to the last commit, and of which a sample shows
//! that it changed since, is taken for new and digested while it is written. Others are digested first, so that what is on disk already is not written again.

use std::collections::hash_map::Entry as Slot;
use std::collections::{HashMap, HashSet};

use super::read::{digest_all, digest_on_disk, open_pack};
use super::{CHECKPOINTS, Checkpoint, CheckpointInfo, Habit, OBJECTS, Place, Store, is_damage, pack_tensors};
use super::{leaf_of, pack_writer, random_name, temporary_name};
use crate::digest::{Digest, Fingerprint};
use crate::error::{Error, Result};
use crate::format::manifest::{self, Manifest, PackEntry, StorageEntry};
use crate::format::pack::{self, PackLayout};
use crate::state::Value;
use crate::storage::{File, already_exists};

/// What a checkpoint is made of.
#[derive(Clone, Debug)]
pub struct Commit<'a> {
    /// Optimizer updates so far.
    pub step: u64,
    /// 0: after a step inside an epoch. 1: an epoch's after-work is done. 2: the run is finished.
    pub phase: u8,
    /// The state.
    pub tree: Value,
    /// The storages that its tensors view, by index.
    pub storages: Vec<&'a [u8]>,
    /// What may not change.
    pub identity: Vec<(String, Value)>,
    /// What the bits may depend on.
    pub environment: Vec<(String, Value)>,
    /// Logged numbers by name.
    pub metrics: Vec<(String, f64)>,
    /// Whether retention must keep it.
    pub pinned: bool,
}

/// Which sample of a storage is compared from commit to commit.
const SAMPLE: u64 = 1;

/// Where a storage's bytes are or go.
#[derive(Clone, Copy)]
enum Origin {
    /// On disk already: index among the manifest's packs, offset there.
    There(u32, u64),
    /// Into the new pack: position among the new storages.
    New(usize),
}

/// What a commit will do.
struct Plan {
    origins: Vec<Origin>,
    /// Digests of the storages that were digested first.
    known: Vec<Option<Digest>>,
    packs: Vec<PackEntry>,
    /// Indices of the storages to write, and how the pack that they go to is laid out.
    new: Option<(Vec<usize>, PackLayout)>,
}

impl Plan {
    fn new_bytes(&self) -> u64 {
        self.new.as_ref().map_or(0, |(_, layout)| layout.length)
    }

    /// What the manifest says of the storages; `written` are the digests of the new ones, in their order in the plan.
    fn entries(&self, storages: &[&[u8]], written: &[Digest]) -> Vec<StorageEntry> {
        let describe = |(index, origin): (usize, &Origin)| {
            let (digest, pack, offset) = match (*origin, &self.new) {
                (Origin::New(position), Some((_, layout))) => (
                    written[position],
                    self.packs.len() as u32 - 1,
                    layout.offsets[position],
                ),
                (Origin::There(pack, offset), _) => {
                    let known = self.known[index].expect("what is on disk was found by its digest");
                    (known, pack, offset)
                }
                (Origin::New(_), None) => unreachable!("a new storage has a new pack"),
            };
            StorageEntry {
                digest,
                length: storages[index].len() as u64,
                pack,
                offset,
            }
        };
        self.origins.iter().enumerate().map(describe).collect()
    }
}

impl Store {
    /// Writes one checkpoint. With `still`, nobody changes the storages' bytes meanwhile: they may be written from where
    /// they are.
    ///
    /// # Durability
    ///
    /// On return the checkpoint survives a power cut.
    ///
    /// # Errors
    ///
    /// Nothing that was committed before is touched; what was written of this one is removed, or swept at the next
    /// commit or open.
    pub(crate) fn commit(
        &mut self,
        commit: Commit,
        life: u32,
        created: String,
        journal_head: Digest,
        still: bool,
    ) -> Result<Checkpoint> {
        self.remove_leftovers();
        let plan = self.plan(&commit)?;
        let count = plan.new.as_ref().map_or(0, |(new, _)| new.len());
        let mut manifest = Manifest {
            run_id: self.run_id.clone(),
            step: commit.step,
            phase: commit.phase,
            parent: self.newest().map(|entry| entry.info.name.clone()),
            life,
            created,
            tree: commit.tree,
            storages: plan.entries(&commit.storages, &vec![Digest([0; 32]); count]),
            packs: plan.packs.clone(),
            identity: commit.identity,
            environment: commit.environment,
            metrics: commit
                .metrics
                .into_iter()
                .map(|(name, value)| (name, value.to_bits()))
                .collect(),
            pinned: commit.pinned,
            journal_head,
            new_bytes: plan.new_bytes(),
        };
        // Encoded before anything is written: what the format refuses costs no disk. The digests change no length.
        let needed = plan.new_bytes() + manifest::encode(&manifest)?.0.len() as u64;
        self.check_space(needed)?;

        let mut made = Vec::new();
        let published = self.publish_all(&mut manifest, &plan, &commit.storages, still, &mut made);
        let name = match published {
            Ok(name) => name,
            Err(error) => {
                // Before measuring, so that the error tells the space there is and not the space there was.
                self.leftovers.extend(made.into_iter().rev());
                self.leftovers.extend(self.spare.take());
                self.remove_leftovers();
                return Err(self.with_space(error, needed));
            }
        };
        self.remember(&manifest.storages, &commit.storages);

        let info = std::sync::Arc::new(CheckpointInfo::new(&self.directory, &name, &manifest));
        let manifest = std::sync::Arc::new(manifest);
        let checkpoint = Checkpoint {
            directory: self.directory.clone(),
            info,
            manifest,
        };
        self.admit(&checkpoint, true);
        Ok(checkpoint)
    }

    /// Puts pack and manifest in place, and returns the manifest's name. `made` receives each name as it comes to be.
    fn publish_all(
        &mut self,
        manifest: &mut Manifest,
        plan: &Plan,
        storages: &[&[u8]],
        still: bool,
        made: &mut Vec<String>,
    ) -> Result<String> {
        if let Some((new, layout)) = &plan.new {
            let pack = manifest.packs.last().expect("a new pack is the manifest's last");
            let name = format!("{OBJECTS}/{}", pack.name);
            let spare = self.spare.take_if(|_| layout.length >= self.tuning.reuse_from);
            let (temporary, file) = self.open_temporary(spare, made)?;
            file.reserve(layout.length)?;
            let regions = layout.order.iter().map(|&at| storages[new[at]]);
            let digests = pack_writer::write(&file, &layout.header, regions, still, &mut self.buffers)?;
            let mut written = vec![Digest([0; 32]); new.len()];
            for (&at, digest) in layout.order.iter().zip(digests) {
                written[at] = digest;
                let index = new[at];
                if plan.known[index].is_some_and(|known| known != digest) {
                    let leaf = leaf_of(&manifest.tree, index);
                    return Err(Error::invalid(format!(
                        "`{leaf}` changed while it was being saved"
                    )));
                }
            }
            self.publish(&file, &temporary, &name, OBJECTS, made)?;
            manifest.storages = plan.entries(storages, &written);
        }
        let (bytes, digest) = manifest::encode(manifest)?;
        let name = manifest::checkpoint_name(manifest.step, manifest.phase, &digest);
        let (temporary, mut file) = self.open_temporary(None, made)?;
        file.write_all(&bytes)?;
        self.publish(
            &file,
            &temporary,
            &format!("{CHECKPOINTS}/{name}"),
            CHECKPOINTS,
            made,
        )?;
        Ok(name)
    }

    /// Opens a file under a temporary name: the spare one if it can be written over, else a new one.
    fn open_temporary(&mut self, spare: Option<String>, made: &mut Vec<String>) -> Result<(String, File)> {
        if let Some(spare) = spare {
            made.push(spare.clone());
            match self.directory.reuse(&spare)? {
                Some(file) => return Ok((spare, file)),
                None => self.leftovers.extend(made.pop()), // Somebody reads it or has linked to it.
            }
        }
        let temporary = temporary_name()?;
        made.push(temporary.clone());
        let file = self.directory.create_new(&temporary)?;
        Ok((temporary, file))
    }

    /// Gives a written file its name, each step durable before the next.
    fn publish(
        &self,
        file: &File,
        temporary: &str,
        name: &str,
        dir: &str,
        made: &mut Vec<String>,
    ) -> Result<()> {
        file.sync()?; // Bytes before name: a name must never outlive its bytes.
        let renamed = self.directory.rename_new(temporary, name);
        if !matches!(&renamed, Err(error) if already_exists(error)) {
            made.push(name.to_owned()); // Also after an error: some file systems rename and then fail.
        }
        renamed?;
        self.directory.sync_dir(dir) // The name is only a promise until its directory is synced.
    }

    /// Decides which storages are on disk already and lays out the rest.
    fn plan(&mut self, commit: &Commit) -> Result<Plan> {
        let known = self.digest_doubtful(&commit.storages);
        let mut packs: Vec<PackEntry> = Vec::new();
        let mut pack_indices: HashMap<String, u32> = HashMap::new();
        let mut new: Vec<usize> = Vec::new();
        let mut first: HashMap<(Digest, u64), usize> = HashMap::new();
        let mut usable: HashMap<String, bool> = HashMap::new();
        let mut origins = Vec::with_capacity(commit.storages.len());
        for (index, bytes) in commit.storages.iter().enumerate() {
            let mut add = || {
                new.push(index);
                new.len() - 1
            };
            let Some(digest) = known[index] else {
                origins.push(Origin::New(add()));
                continue;
            };
            let key = (digest, bytes.len() as u64);
            let Some(place) = self.reusable(&key, &mut usable)? else {
                origins.push(Origin::New(*first.entry(key).or_insert_with(add)));
                continue;
            };
            let pack = match pack_indices.entry(place.pack.name.clone()) {
                Slot::Occupied(slot) => *slot.get(),
                Slot::Vacant(slot) => {
                    packs.push(place.pack.clone());
                    *slot.insert(packs.len() as u32 - 1)
                }
            };
            origins.push(Origin::There(pack, place.offset));
        }
        let mut layout = None;
        if !new.is_empty() {
            let planned = pack::plan(&pack_tensors(&commit.tree, &commit.storages, &new))?;
            packs.push(PackEntry {
                name: format!("{}.safetensors", random_name()?),
                length: planned.length,
                header_digest: planned.header_digest,
            });
            layout = Some((new, planned));
        }
        Ok(Plan {
            origins,
            known,
            packs,
            new: layout,
        })
    }

    /// Digests the storages that may be on disk already, or equal to each other. The others are taken for new: they
    /// changed from the last commit but one to the last and again since, or nothing of their length is anywhere.
    fn digest_doubtful(&self, storages: &[&[u8]]) -> Vec<Option<Digest>> {
        let mut counts: HashMap<u64, usize> = HashMap::new();
        for storage in storages {
            *counts.entry(storage.len() as u64).or_default() += 1;
        }
        let lengths: HashSet<u64> = self.places.keys().map(|(_, length)| *length).collect();
        let is_new = |index: usize| {
            let length = storages[index].len() as u64;
            let habit = self
                .habits
                .get(index)
                .filter(|_| self.habits.len() == storages.len());
            let as_before = habit.is_some_and(|habit| {
                let differs = || Fingerprint::of_sample(storages[index], SAMPLE) != habit.sample;
                habit.changes && habit.length == length && differs()
            });
            as_before || (counts[&length] == 1 && !lengths.contains(&length))
        };
        let doubtful: Vec<usize> = (0..storages.len()).filter(|&index| !is_new(index)).collect();
        let regions: Vec<&[u8]> = doubtful.iter().map(|&index| storages[index]).collect();
        let mut known = vec![None; storages.len()];
        for (index, digest) in doubtful.into_iter().zip(digest_all(&regions)) {
            known[index] = Some(digest);
        }
        known
    }

    /// Takes note of which storages change from one commit to the next and are equal to no other.
    fn remember(&mut self, storages: &[StorageEntry], bytes: &[&[u8]]) {
        let mut counts: HashMap<&Digest, usize> = HashMap::new();
        for storage in storages {
            *counts.entry(&storage.digest).or_default() += 1;
        }
        let before = std::mem::take(&mut self.habits);
        let habit = |(index, storage): (usize, &StorageEntry)| {
            let there = self.places.contains_key(&(storage.digest, storage.length));
            let old = before.get(index).filter(|_| before.len() == storages.len());
            Habit {
                length: storage.length,
                sample: Fingerprint::of_sample(bytes[index], SAMPLE),
                changes: counts[&storage.digest] == 1
                    && !there
                    && old.is_some_and(|old| old.length == storage.length),
            }
        };
        self.habits = storages.iter().enumerate().map(habit).collect();
    }

    /// Where equal bytes are that can be relied on. What this process never read is read first.
    fn reusable(&mut self, key: &(Digest, u64), usable: &mut HashMap<String, bool>) -> Result<Option<Place>> {
        let Some(place) = self.places.get(key) else {
            return Ok(None);
        };
        let pack = place.pack.clone();
        let whole = |outcome: Result<bool>| match outcome {
            Err(error) if is_damage(&error) => Ok(false),
            outcome => outcome,
        };
        let there = match usable.get(&pack.name) {
            Some(there) => *there,
            None => whole(open_pack(&self.directory, &pack).map(|_| true))?,
        };
        usable.insert(pack.name.clone(), there);
        let sound = there
            && (place.verified
                || whole(
                    open_pack(&self.directory, &pack)
                        .and_then(|source| digest_on_disk(&source, place.offset, key.1))
                        .map(|found| found == key.0),
                )?);
        if !sound {
            self.places.remove(key);
            return Ok(None);
        }
        let place = self
            .places
            .get_mut(key)
            .expect("the place was there a moment ago");
        place.verified = true;
        Ok(Some(place.clone()))
    }

    /// Refuses what cannot fit before any of it is written. That it fits now promises nothing.
    fn check_space(&mut self, needed: u64) -> Result<()> {
        let short =
            |directory: &crate::storage::Directory| directory.free_bytes().is_ok_and(|free| free < needed);
        if short(&self.directory) {
            self.leftovers.extend(self.spare.take());
            self.remove_leftovers();
        }
        if short(&self.directory) {
            let full = std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
            return Err(self.with_space(
                Error::io("make room in", self.directory.path(OBJECTS), full),
                needed,
            ));
        }
        Ok(())
    }

    /// Says how much space a full disk would have needed.
    fn with_space(&self, mut error: Error, needed: u64) -> Error {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        if let Error::Io {
            source,
            needed_bytes,
            free_bytes,
            ..
        } = &mut error
            && matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge)
        {
            *needed_bytes = Some(needed);
            *free_bytes = self.directory.free_bytes().ok();
        }
        error
    }

    /// Removes what failed commits left; what cannot be removed now is tried again.
    pub(super) fn remove_leftovers(&mut self) {
        let directory = self.directory.clone();
        // In order: a manifest goes, for good, before its pack. Where it stays, so does everything behind it.
        let mut stuck = false;
        self.leftovers.retain(|name| {
            let is_manifest = name.starts_with(CHECKPOINTS);
            let removed = || {
                directory.remove(name)?;
                if is_manifest {
                    directory.sync_dir(CHECKPOINTS)
                } else {
                    Ok(())
                }
            };
            stuck = stuck || removed().is_err();
            stuck
        });
    }
}
