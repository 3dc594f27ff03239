//! Committing a checkpoint: first a plan of what is new, then the writes in the order that makes them safe.
//!
//! Touches: `tmp/`, `objects/` and `checkpoints/`, only ever making names that were not there.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use super::read::{digest_all, digest_on_disk, open_pack};
use super::{CHECKPOINTS, Checkpoint, CheckpointInfo, OBJECTS, Place, Store, is_damage, pack_tensors};
use super::{random_name, temporary_name};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::manifest::{self, Manifest, PackEntry, StorageEntry};
use crate::format::pack::{self, PackLayout};
use crate::state::Value;
use crate::storage::{File, already_exists};

/// Bytes that are collected before they are written, so that small tensors share a call.
const BUFFER: usize = 1 << 20;
/// Storages from this size on are written from where they are.
const LARGE: usize = 64 << 10;

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

/// What a commit will do: where each storage's bytes are or go.
struct Plan {
    storages: Vec<StorageEntry>,
    packs: Vec<PackEntry>,
    /// Indices of the storages to write, and how the pack that they go to is laid out.
    new: Option<(Vec<usize>, PackLayout)>,
}

impl Store {
    /// Writes one checkpoint.
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
    ) -> Result<CheckpointInfo> {
        self.remove_leftovers();
        let plan = self.plan(&commit)?;
        let new_bytes = plan.new.as_ref().map_or(0, |(_, layout)| layout.length);
        let Plan { storages, packs, new } = plan;
        let manifest = Manifest {
            run_id: self.run_id.clone(),
            step: commit.step,
            phase: commit.phase,
            parent: self.newest().map(|entry| entry.info.name.clone()),
            life,
            created,
            tree: commit.tree,
            storages,
            packs,
            identity: commit.identity,
            environment: commit.environment,
            metrics: commit
                .metrics
                .into_iter()
                .map(|(name, value)| (name, value.to_bits()))
                .collect(),
            pinned: commit.pinned,
            journal_head,
            new_bytes,
        };
        // Encoded before anything is written: what the format refuses costs no disk.
        let (bytes, digest) = manifest::encode(&manifest)?;
        let name = manifest::checkpoint_name(manifest.step, manifest.phase, &digest);
        let needed = new_bytes + bytes.len() as u64;

        let mut made = Vec::new();
        let published = self.publish_all(&manifest, new, &commit.storages, &bytes, &name, &mut made);
        if let Err(error) = published {
            // Before measuring, so that the error tells the space there is and not the space there was.
            self.leftovers.extend(made.into_iter().rev());
            self.remove_leftovers();
            return Err(self.with_space(error, needed));
        }

        let info = std::sync::Arc::new(CheckpointInfo::new(&self.directory, &name, &manifest));
        let manifest = std::sync::Arc::new(manifest);
        let checkpoint = Checkpoint {
            directory: self.directory.clone(),
            info,
            manifest,
        };
        self.admit(&checkpoint, true);
        Ok((*checkpoint.info).clone())
    }

    /// Puts pack and manifest in place. `made` receives each name as it comes to be.
    fn publish_all(
        &self,
        manifest: &Manifest,
        new: Option<(Vec<usize>, PackLayout)>,
        storages: &[&[u8]],
        manifest_bytes: &[u8],
        name: &str,
        made: &mut Vec<String>,
    ) -> Result<()> {
        if let Some((indices, layout)) = new {
            let entry = manifest.packs.last().expect("a new pack is the manifest's last");
            self.publish(&format!("{OBJECTS}/{}", entry.name), OBJECTS, made, |file| {
                let regions = layout.order.iter().map(|&at| storages[indices[at]]);
                write_joined(file, std::iter::once(layout.header.as_slice()).chain(regions))
            })?;
        }
        self.publish(&format!("{CHECKPOINTS}/{name}"), CHECKPOINTS, made, |file| {
            file.write_all(manifest_bytes)
        })
    }

    /// Writes a file and gives it its name, each step durable before the next.
    fn publish(
        &self,
        name: &str,
        dir: &str,
        made: &mut Vec<String>,
        write: impl FnOnce(&mut File) -> Result<()>,
    ) -> Result<()> {
        let temporary = temporary_name()?;
        made.push(temporary.clone());
        let mut file = self.directory.create_new(&temporary)?;
        write(&mut file)?;
        file.sync()?; // Bytes before name: a name must never outlive its bytes.
        let renamed = self.directory.rename_new(&temporary, name);
        if !matches!(&renamed, Err(error) if already_exists(error)) {
            made.push(name.to_owned()); // Also after an error: some file systems rename and then fail.
        }
        renamed?;
        self.directory.sync_dir(dir) // The name is only a promise until its directory is synced.
    }

    /// Decides which storages are on disk already and lays out the rest.
    fn plan(&mut self, commit: &Commit) -> Result<Plan> {
        let digests = digest_all(&commit.storages);
        let mut packs: Vec<PackEntry> = Vec::new();
        let mut pack_indices: HashMap<String, u32> = HashMap::new();
        let mut new: Vec<usize> = Vec::new();
        let mut first: HashMap<(Digest, u64), usize> = HashMap::new();
        let mut usable: HashMap<String, bool> = HashMap::new();
        // For each storage its place, or the position in `new` of the storage that it equals.
        let mut sources: Vec<std::result::Result<(u32, u64), usize>> = Vec::new();
        for (index, bytes) in commit.storages.iter().enumerate() {
            let key = (digests[index], bytes.len() as u64);
            if let Some(place) = self.reusable(&key, &mut usable)? {
                let pack = match pack_indices.entry(place.pack.name.clone()) {
                    Slot::Occupied(slot) => *slot.get(),
                    Slot::Vacant(slot) => {
                        packs.push(place.pack.clone());
                        *slot.insert(packs.len() as u32 - 1)
                    }
                };
                sources.push(Ok((pack, place.offset)));
                continue;
            }
            let position = *first.entry(key).or_insert_with(|| {
                new.push(index);
                new.len() - 1
            });
            sources.push(Err(position));
        }
        let mut layout = None;
        if !new.is_empty() {
            let planned = pack::plan(&pack_tensors(&commit.tree, &commit.storages, &new))?;
            packs.push(PackEntry {
                name: format!("{}.safetensors", random_name()?),
                length: planned.length,
                header_digest: planned.header_digest,
            });
            layout = Some(planned);
        }
        let entry = |(index, source): (usize, &std::result::Result<(u32, u64), usize>)| {
            let (pack, offset) = source.unwrap_or_else(|position| {
                let layout = layout
                    .as_ref()
                    .expect("a storage that is not on disk goes into the new pack");
                (packs.len() as u32 - 1, layout.offsets[position])
            });
            StorageEntry {
                digest: digests[index],
                length: commit.storages[index].len() as u64,
                pack,
                offset,
            }
        };
        let storages = sources.iter().enumerate().map(entry).collect();
        Ok(Plan {
            storages,
            packs,
            new: layout.map(|layout| (new, layout)),
        })
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

    /// Says how much space a full disk would have needed.
    fn with_space(&self, mut error: Error, needed: u64) -> Error {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        if let Error::Io {
            source,
            needed_bytes,
            free_bytes,
            ..
        } = &mut error
            && matches!(source.kind(), StorageFull | QuotaExceeded)
        {
            *needed_bytes = Some(needed);
            *free_bytes = self.directory.free_bytes().ok();
        }
        error
    }

    /// Removes what failed commits left; what cannot be removed now is tried again.
    fn remove_leftovers(&mut self) {
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

/// Writes regions one after the other: small ones together, large ones from where they are.
fn write_joined<'a>(file: &mut File, regions: impl Iterator<Item = &'a [u8]>) -> Result<()> {
    let mut buffer: Vec<u8> = Vec::new();
    for region in regions {
        if region.len() >= LARGE || buffer.len() + region.len() > BUFFER {
            file.write_all(&buffer)?;
            buffer.clear();
        }
        if region.len() >= LARGE {
            file.write_all(region)?;
        } else {
            buffer.extend_from_slice(region);
        }
    }
    file.write_all(&buffer)
}
