//! Committing a checkpoint: first a plan of what is new, then the writes in the order that makes them safe.
//!
//! Touches: `tmp/`, `objects/` and `checkpoints/`, only ever making names that were not there; and the file of a deleted
//! pack in `tmp/`, which is written over.
//!
//! Bytes are read once where that is enough: a storage that changed up to the last commit, and of which a sample shows
//! that it changed since, is taken for new and digested while it is written. Others are digested first, so that what is on
//! disk already is not written again; of a large one that changed in few places, only those are.
//! Where that was asked for, what is new and changes all over is compressed before it is written. What describes thousands
//! of storages is made on other threads while the disk is busy.

use std::cell::LazyCell;
use std::collections::hash_map::Entry as Slot;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::compression::{Against, Bases, Candidate, Compressed, Made, compress, memory_for, widths};
use super::form::{Form, Packed, pack_as_before};
use super::parallel::both;
use super::read::{digest_all, is_there, open_pack};
use super::renewal::{Chunks, Renewal, chunk_size, digests_of, settle};
use super::{
    CHANGED, CHECKPOINTS, COMPRESSED, Checkpoint, Compression, Habit, Known, OBJECTS, Sample, Store,
};
use super::{is_damage, leaf_of, pack_writer, random_name, sample, temporary_name};
use crate::arena::Arena;
use crate::digest::{self, Assembly, Digest, GROUP, Scattered, WINDOWS};
use crate::error::{Error, Result};
use crate::format::manifest::{self, Draft, Manifest, PackEntry, Place, StorageEntry};
use crate::format::pack::PackLayout;
use crate::lending::Bytes;
use crate::state::Value;
use crate::storage::{File, already_exists};

/// What a checkpoint is made of. `B` is what has the bytes of a storage.
#[derive(Clone, Debug)]
pub struct Commit<B> {
    /// Optimizer updates so far.
    pub step: u64,
    /// 0: after a step inside an epoch. 1: an epoch's after-work is done. 2: the run is finished.
    pub phase: u8,
    /// The state.
    pub tree: Value,
    /// The storages that its tensors view, by index.
    pub storages: Vec<B>,
    /// What may not change.
    pub identity: Vec<(String, Value)>,
    /// What the bits may depend on.
    pub environment: Vec<(String, Value)>,
    /// Logged numbers by name.
    pub metrics: Vec<(String, f64)>,
    /// Whether retention must keep it.
    pub pinned: bool,
}

impl<B> Commit<B> {
    /// The same of other bytes.
    pub(crate) fn with_storages<C>(self, bytes: impl FnMut(B) -> C) -> Commit<C> {
        Commit {
            step: self.step,
            phase: self.phase,
            tree: self.tree,
            storages: self.storages.into_iter().map(bytes).collect(),
            identity: self.identity,
            environment: self.environment,
            metrics: self.metrics,
            pinned: self.pinned,
        }
    }
}

/// What more than their bytes is known of a commit's storages.
#[derive(Default)]
pub(crate) struct Beside<'a> {
    /// Storages that were digested already.
    pub known: Vec<(usize, Digested)>,
    /// Whether what was read is what was to be saved. Asked when all of it was read, before a manifest names it.
    pub is_sound: Option<&'a dyn Fn() -> bool>,
    /// What is to be done with the checkpoint while the disk is waited for, which may still fail.
    pub meanwhile: Option<&'a (dyn Fn(&Checkpoint) + Sync)>,
}

/// What digesting a storage has told.
#[derive(Debug)]
pub(crate) struct Digested {
    /// Of all of it.
    pub digest: Digest,
    /// Of a large one.
    chunks: Option<Chunks>,
}

/// So many storages take milliseconds to be described, which pays for a thread.
const MANY: usize = 1000;

/// What becomes of a storage.
enum Fate {
    /// It is on disk already.
    There(Known),
    /// It is what another one is.
    Same(usize),
    /// It is written, all of it or in parts.
    New,
}

/// Where a storage's bytes are or go.
#[derive(Clone)]
enum Origin {
    /// Where that is known.
    At(Place),
    /// All of it into a new pack: index among those, and among what goes there.
    New(usize, usize),
}

/// What goes into a new pack.
struct Addition {
    storage: usize,
    content: Content,
    /// The digests of what is written, part by part, where it was digested first.
    digests: Option<Vec<Digest>>,
    /// Bytes that are digested at a time while they are written.
    grain: usize,
}

/// What is written of a storage.
enum Content {
    /// All of it, as it is.
    Whole,
    /// The parts that changed; the rest is where it was.
    Changed(Box<(Renewal, Vec<Range<usize>>)>),
    /// All of it, coded.
    Coded(Box<Compressed>),
}

impl Addition {
    /// Adds what is written, part by part, and returns how many parts that is.
    fn add_parts<'a>(&'a self, storages: &[Bytes<'a>], regions: &mut Vec<(Bytes<'a>, usize)>) -> usize {
        let bytes = storages[self.storage];
        let before = regions.len();
        match &self.content {
            Content::Whole => regions.push((bytes, self.grain)),
            Content::Changed(changed) => {
                let parts = changed.1.iter().map(|part| bytes.part(part.clone()));
                regions.extend(parts.map(|part| (part, self.grain)));
            }
            Content::Coded(coded) => {
                let frames = coded.frames.iter().map(|frame| Bytes::Here(frame));
                regions.extend(frames.map(|frame| (frame, self.grain)));
            }
        }
        regions.len() - before
    }

    /// How a pack shows it: what else than the storage's bytes it is, and how many bytes.
    fn shown(&self) -> Option<(&'static str, u64)> {
        match &self.content {
            Content::Whole => None,
            Content::Changed(changed) => {
                Some((CHANGED, changed.1.iter().map(|part| part.len() as u64).sum()))
            }
            Content::Coded(coded) => Some((COMPRESSED, coded.length())),
        }
    }
}

/// A pack to write.
struct NewPack {
    /// Index among the manifest's packs.
    number: u32,
    packed: Packed,
    additions: Vec<Addition>,
}

impl NewPack {
    fn layout(&self) -> &PackLayout {
        &self.packed.layout
    }
}

/// A file that is written, and waits for its name.
struct Unnamed {
    file: File,
    temporary: String,
    name: String,
}

/// What a commit will do.
struct Plan {
    samples: Vec<Sample>,
    found: Vec<Option<Digested>>,
    origins: Vec<Origin>,
    packs: Vec<PackEntry>,
    new: Vec<NewPack>,
    /// What of it was coded, but for the frames, which are in the packs.
    made: Made,
}

/// What bytes there are, here and on disk, as far as samples tell.
#[derive(Default)]
struct Others {
    /// How many there are by length and sample.
    sampled: HashMap<(u64, Sample), usize>,
    /// The lengths of those on disk that were never sampled.
    unknown: HashSet<u64>,
}

impl Others {
    /// Whether all others are other bytes than these, which are among them once.
    fn are_unlike(&self, length: u64, sample: Sample) -> bool {
        self.sampled[&(length, sample)] == 1 && !self.unknown.contains(&length)
    }
}

/// The packs that a manifest will name.
#[derive(Default)]
struct Packs {
    entries: Vec<PackEntry>,
    numbers: HashMap<String, u32>,
}

impl Packs {
    /// The number of a pack, which it may get now.
    fn number(&mut self, pack: &PackEntry) -> u32 {
        match self.numbers.entry(pack.name.clone()) {
            Slot::Occupied(slot) => *slot.get(),
            Slot::Vacant(slot) => {
                self.entries.push(pack.clone());
                *slot.insert(self.entries.len() as u32 - 1)
            }
        }
    }
}

impl Plan {
    fn new_bytes(&self) -> u64 {
        self.new.iter().map(|pack| pack.layout().length).sum()
    }

    /// What the manifest says of the storages, but for digests that are not known before what is new is written.
    fn entries(&self, storages: &[Bytes]) -> Vec<StorageEntry> {
        let describe = |(index, origin): (usize, &Origin)| {
            let digest = self.found[index].as_ref().map(|found| found.digest);
            let (digest, place) = match origin {
                Origin::At(place) => (digest, place.clone()),
                Origin::New(pack, position) => {
                    let (number, layout) = (self.new[*pack].number, self.new[*pack].layout());
                    let offset = layout.offsets[*position];
                    (
                        Some(digest.unwrap_or(Digest([0; 32]))),
                        Place::Whole { pack: number, offset },
                    )
                }
            };
            StorageEntry {
                digest: digest.expect("what is not written whole was digested first"),
                length: storages[index].len() as u64,
                place,
            }
        };
        self.origins.iter().enumerate().map(describe).collect()
    }

    /// Fills in what was found of the storages that went into the new packs, in the order of their additions.
    fn tell_digests(&mut self, mut written: Vec<Vec<Option<Digested>>>, entries: &mut [StorageEntry]) {
        for ((origin, found), entry) in self.origins.iter().zip(&mut self.found).zip(entries) {
            if let (Origin::New(pack, position), None) = (origin, &found) {
                *found = written[*pack][*position].take();
                entry.digest = found.as_ref().expect("each is told once").digest;
            }
        }
    }
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
        commit: Commit<Bytes>,
        life: u32,
        created: String,
        journal_head: Digest,
        mut beside: Beside,
    ) -> Result<Checkpoint> {
        self.remove_leftovers();
        let form = self.form.take().filter(|form| form.is_of(&commit.tree));
        let known = std::mem::take(&mut beside.known);
        let mut plan = self.plan(&commit, known, form.as_deref())?;
        let manifest = Manifest {
            run_id: self.run_id.clone(),
            step: commit.step,
            phase: commit.phase,
            parent: self.newest().map(|entry| entry.info.name.clone()),
            life,
            created,
            tree: commit.tree,
            storages: plan.entries(&commit.storages),
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
        // What the format refuses costs no disk. Where it took the form before it refuses next to nothing, and is asked while
        // the disk is busy.
        let draft = match &form {
            Some(_) if commit.storages.len() >= MANY => None,
            _ => Some(Draft::of(&manifest)?),
        };
        let length = draft.as_ref().map(Draft::length);
        let last = || form.as_ref().map_or(0, |form| form.manifest_bytes());
        let needed = plan.new_bytes() + length.unwrap_or_else(last);
        self.check_space(needed)?;

        let mut made = Vec::new();
        let state = (manifest, draft, form);
        let (checkpoint, habits, length) =
            match self.put_down(state, &mut plan, &commit.storages, beside, &mut made) {
                Ok(committed) => committed,
                Err(error) => {
                    // Before measuring, so that the error tells the space there is and not the space there was.
                    self.leftovers.extend(made.into_iter().rev());
                    self.leftovers.extend(self.spare.take());
                    self.remove_leftovers();
                    return Err(self.with_space(error, needed));
                }
            };
        self.bases = plan
            .made
            .take_base(checkpoint.manifest())
            .or_else(|| self.bases.take());
        if let Some(bases) = &mut self.bases {
            bases.note(&plan.made);
        }
        self.habits = habits;
        self.forget_pieces();
        let form = checkpoint.form();
        form.note(plan.new.into_iter().map(|new| new.packed).collect(), length);
        self.form = Some(Arc::clone(form));
        self.admit(&checkpoint, true);
        Ok(checkpoint)
    }

    /// Puts packs and manifest in place. Returns the checkpoint, what is known of its storages for the next commit, and the
    /// manifest's length. `made` receives each name as it comes to be.
    fn put_down(
        &mut self,
        (mut manifest, draft, form): (Manifest, Option<Draft>, Option<Arc<Form>>),
        plan: &mut Plan,
        storages: &[Bytes],
        beside: Beside,
        made: &mut Vec<String>,
    ) -> Result<(Checkpoint, Vec<Habit>, u64)> {
        let many = storages.len() >= MANY;
        let (draft, packs) = both(
            many && draft.is_none(),
            || draft.map_or_else(|| Draft::of(&manifest), Ok),
            || self.write_packs(plan, storages, &manifest.tree, made),
        );
        let draft = draft?;
        let (packs, written): (Vec<Unnamed>, Vec<_>) = packs?.into_iter().unzip();
        if beside.is_sound.is_some_and(|is_sound| !is_sound()) {
            return Err(Error::invalid("what is saved changed while it was being saved"));
        }
        plan.tell_digests(written, &mut manifest.storages);
        let (bytes, digest) = draft.finish(&manifest.storages);
        let name = manifest::checkpoint_name(manifest.step, manifest.phase, &digest);
        let manifest = Arc::new(manifest);
        let form = form.unwrap_or_else(|| Form::of(Arc::clone(&manifest)));
        let checkpoint = Checkpoint::new(&self.directory, &name, manifest, form);
        let found = std::mem::take(&mut plan.found);
        let meanwhile = || {
            if let Some(meanwhile) = beside.meanwhile {
                meanwhile(&checkpoint);
            }
        };
        let habits = || self.habits_of(checkpoint.manifest(), storages, &plan.samples, found);
        let (((), habits), published) = both(
            many,
            || both(many, meanwhile, habits),
            || {
                for pack in packs {
                    self.publish(&pack, OBJECTS, made)?;
                }
                let (temporary, mut file) = self.create_temporary(made)?;
                file.write_all(&bytes)?;
                let name = format!("{CHECKPOINTS}/{name}");
                self.publish(
                    &Unnamed {
                        file,
                        temporary,
                        name,
                    },
                    CHECKPOINTS,
                    made,
                )
            },
        );
        published?;
        Ok((checkpoint, habits, bytes.len() as u64))
    }

    /// Writes all packs, and returns them with what was found of each addition of each that is written whole.
    fn write_packs(
        &mut self,
        plan: &Plan,
        storages: &[Bytes],
        tree: &Value,
        made: &mut Vec<String>,
    ) -> Result<Vec<(Unnamed, Vec<Option<Digested>>)>> {
        let mut packs = Vec::new();
        let largest = plan.new.iter().map(|new| new.layout().length).max();
        for new in &plan.new {
            let spare = self
                .spare
                .take_if(|_| largest == Some(new.layout().length) && largest >= Some(self.tuning.reuse_from));
            let (temporary, file) = self.open_temporary(spare, made)?;
            file.reserve(new.layout().length)?;
            let found = self.write_pack(&file, new, storages, tree)?;
            let name = format!("{OBJECTS}/{}", plan.packs[new.number as usize].name);
            let unnamed = Unnamed {
                file,
                temporary,
                name,
            };
            packs.push((unnamed, found));
        }
        Ok(packs)
    }

    /// Writes a pack, and returns what was found of each addition that is written whole.
    fn write_pack(
        &mut self,
        file: &File,
        new: &NewPack,
        storages: &[Bytes],
        tree: &Value,
    ) -> Result<Vec<Option<Digested>>> {
        let in_order = || new.layout().order.iter().map(|&at| (at, &new.additions[at]));
        let mut regions = Vec::with_capacity(new.additions.len());
        let counts: Vec<usize> = in_order()
            .map(|(_, addition)| addition.add_parts(storages, &mut regions))
            .collect();
        let header = &new.layout().header;
        let mut found = pack_writer::write(file, header, regions.into_iter(), &mut self.buffers)?.into_iter();
        let mut written: Vec<Option<Digested>> = new.additions.iter().map(|_| None).collect();
        for ((at, addition), parts) in in_order().zip(counts) {
            let mut of_parts = found.by_ref().take(parts);
            match &addition.digests {
                // Of what is written whole, and only of that, nothing may be known.
                None => written[at] = of_parts.next().map(|all| self.digested(all)),
                Some(known) => {
                    let digests: Vec<Digest> = of_parts.map(|part| part.finish()).collect();
                    if digests != *known {
                        return Err(changed(tree, addition.storage));
                    }
                }
            }
        }
        Ok(written)
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
        self.create_temporary(made)
    }

    fn create_temporary(&self, made: &mut Vec<String>) -> Result<(String, File)> {
        let temporary = temporary_name()?;
        made.push(temporary.clone());
        let file = self.directory.create_new(&temporary)?;
        Ok((temporary, file))
    }

    /// Gives a written file its name, each step durable before the next.
    fn publish(&self, written: &Unnamed, dir: &str, made: &mut Vec<String>) -> Result<()> {
        written.file.sync()?; // Bytes before name: a name must never outlive its bytes.
        let renamed = self.directory.rename_new(&written.temporary, &written.name);
        if !matches!(&renamed, Err(error) if already_exists(error)) {
            made.push(written.name.clone()); // Also after an error: some file systems rename and then fail.
        }
        renamed?;
        self.directory.sync_dir(dir) // The name is only a promise until its directory is synced.
    }

    /// Decides which storages are on disk already and lays out the rest.
    fn plan(
        &mut self,
        commit: &Commit<Bytes>,
        known: Vec<(usize, Digested)>,
        form: Option<&Form>,
    ) -> Result<Plan> {
        let storages = &commit.storages;
        let samples = digest::of_each(storages, |bytes| bytes.look(sample));
        let sparse: Vec<bool> = (0..storages.len())
            .map(|index| self.is_sparse(index, storages, &samples))
            .collect();
        let found = self.digest_doubtful(storages, &samples, known);
        let (fates, renewals) = self.decide(storages, &found)?;
        let mut used: HashMap<String, u64> = HashMap::new();
        for (fate, bytes) in fates.iter().zip(storages) {
            let Fate::There(known) = fate else { continue };
            for (pack, _, length) in known.place.pieces(bytes.len() as u64) {
                *used.entry(known.packs[pack as usize].name.clone()).or_default() += length;
            }
        }
        let renewals = settle(renewals, &used);
        let mut renewals: HashMap<usize, Renewal> = renewals
            .into_iter()
            .map(|renewal| (renewal.storage, renewal))
            .collect();

        // What stays for long is not among what is all new each time: its pack would stay, too. The latter comes last,
        // where a saver in the background looks for it.
        let mut found = found;
        let [mut lasting, mut dense]: [Vec<Addition>; 2] = Default::default();
        let mut candidates = Vec::new();
        for index in (0..storages.len()).filter(|&index| matches!(fates[index], Fate::New)) {
            let (content, digests) = match renewals.remove(&index) {
                Some(renewal) => {
                    let parts = renewal.written();
                    let digests = digests_of(&parts, storages[index].all());
                    (Content::Changed(Box::new((renewal, parts))), Some(digests))
                }
                None => (
                    Content::Whole,
                    found[index].as_ref().map(|found| vec![found.digest]),
                ),
            };
            let lasts = sparse[index] || matches!(content, Content::Changed(..));
            if !lasts {
                candidates.push(index);
            }
            // By chunks where the next commit may be compared with this one.
            let length = storages[index].len();
            let is_first = self
                .habit(index, storages)
                .is_none_or(|habit| habit.windows.is_none());
            let by_chunks = is_first && matches!(content, Content::Whole);
            let group = if lasts { &mut lasting } else { &mut dense };
            group.push(Addition {
                storage: index,
                content,
                digests,
                grain: if by_chunks { self.grain(length) } else { GROUP },
            });
        }
        let mut made = self.compress(commit, &candidates, &fates)?;
        let coded = take_coded(&mut made, &mut dense, &mut found, &commit.tree)?;
        lay_out(
            (commit, form),
            samples,
            found,
            &fates,
            [lasting, coded, dense],
            made,
        )
    }

    /// Codes those storages that are worth it, where that was asked for.
    fn compress(&mut self, commit: &Commit<Bytes>, among: &[usize], fates: &[Fate]) -> Result<Made> {
        if self.tuning.compression == Compression::None {
            return Ok(Made::default());
        }
        let widths = widths(&commit.tree, commit.storages.len());
        let candidate = |&storage: &usize| Candidate {
            storage,
            bytes: commit.storages[storage].all(),
            width: widths[storage],
        };
        let of = |fate: &Fate| match fate {
            Fate::There(known) => manifest::frame_count(&known.place),
            Fate::Same(_) | Fate::New => 0,
        };
        let mut frames: usize = fates.iter().map(of).sum();
        let mut candidates: Vec<Candidate> = among.iter().map(candidate).filter(Candidate::is_one).collect();
        candidates.retain(|candidate| {
            frames += 2 * candidate.frames(); // In two layers at most.
            frames <= manifest::MAX_FRAMES
        });
        let against = match self.tuning.compression {
            Compression::None | Compression::Alone => Against::Nothing,
            Compression::Differences if candidates.is_empty() => Against::Nothing,
            Compression::Differences => match self.sound_bases()? {
                Some(bases) => Against::Bases(bases),
                None => Against::Later(self.memory_for_bases(&candidates)?),
            },
        };
        compress(&candidates, against)
    }

    /// What differences can be to: it is known, still there, and not worn.
    fn sound_bases(&self) -> Result<Option<&Bases>> {
        let Some(bases) = self.bases.as_ref().filter(|bases| !bases.is_worn()) else {
            return Ok(None);
        };
        for pack in bases.packs() {
            match open_pack(&self.directory, pack) {
                Ok(_) => {}
                Err(error) if is_damage(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(bases))
    }

    /// Memory for what later commits are differences to: that of what they were to so far, where it is enough.
    fn memory_for_bases(&mut self, candidates: &[Candidate]) -> Result<Arena> {
        let needed = memory_for(candidates);
        let kept = self.bases.take().map(Bases::into_memory);
        match kept.filter(|memory| memory.len() >= needed) {
            Some(memory) => Ok(memory),
            None => Arena::new(needed)
                .map_err(|error| Error::io("take memory to compress", self.directory.path(OBJECTS), error)),
        }
    }

    /// Decides storage by storage, as if each were alone.
    fn decide(
        &mut self,
        storages: &[Bytes],
        found: &[Option<Digested>],
    ) -> Result<(Vec<Fate>, Vec<Renewal>)> {
        let mut first: HashMap<(Digest, u64), usize, Scattered> = HashMap::default();
        let mut usable: HashMap<String, bool> = HashMap::new();
        let (mut fates, mut renewals) = (Vec::with_capacity(storages.len()), Vec::new());
        for (index, bytes) in storages.iter().enumerate() {
            let Some(found) = &found[index] else {
                fates.push(Fate::New);
                continue;
            };
            let key = (found.digest, bytes.len() as u64);
            if let Some(known) = self.reusable(&key, &mut usable)? {
                fates.push(Fate::There(known));
            } else if let Some(&same) = first.get(&key) {
                fates.push(Fate::Same(same));
            } else {
                first.insert(key, index);
                fates.push(Fate::New);
                renewals.extend(self.renewal(index, bytes.len(), found, &mut usable)?);
            }
        }
        Ok((fates, renewals))
    }

    /// Compares a storage with what the last commit had in its place, if that is known by chunks and still there.
    fn renewal(
        &mut self,
        index: usize,
        bytes: usize,
        found: &Digested,
        usable: &mut HashMap<String, bool>,
    ) -> Result<Option<Renewal>> {
        let Some(Habit {
            digest,
            length,
            chunks: Some(before),
            ..
        }) = self.habits.get(index).cloned()
        else {
            return Ok(None);
        };
        let Some(values) = found.chunks.as_ref().filter(|_| length == bytes as u64) else {
            return Ok(None);
        };
        let Some(known) = self.reusable(&(digest, length), usable)? else {
            return Ok(None);
        };
        Ok(Renewal::new(index, bytes, (known, &before), values))
    }

    /// What the last commit had in a storage's place, where it was as long.
    fn habit(&self, index: usize, storages: &[Bytes]) -> Option<&Habit> {
        let habit = self.habits.get(index)?;
        (self.habits.len() == storages.len() && habit.length == storages[index].len() as u64).then_some(habit)
    }

    /// How many of a storage's samples are others than at the last commit.
    fn changed_windows(&self, index: usize, storages: &[Bytes], samples: &[Sample]) -> Option<usize> {
        let before = self.habit(index, storages)?.windows?;
        Some(
            before
                .iter()
                .zip(&samples[index])
                .filter(|(before, now)| before != now)
                .count(),
        )
    }

    fn is_large(&self, length: usize) -> bool {
        length >= self.tuning.chunks_from
    }

    /// Whether a large storage seems to change in few places, if it changes.
    fn is_sparse(&self, index: usize, storages: &[Bytes], samples: &[Sample]) -> bool {
        let known = || {
            self.habit(index, storages)
                .is_some_and(|habit| habit.chunks.is_some())
        };
        self.is_large(storages[index].len())
            && self
                .changed_windows(index, storages, samples)
                .map_or_else(known, |changed| changed <= WINDOWS / 2)
    }

    /// Digests the storages that may be on disk already, or equal to each other, or have changed in few places. The
    /// others are taken for new: they were new at the last commit and have changed again since, or no other bytes of their
    /// length, here or on disk, are alike by sample.
    fn digest_doubtful(
        &self,
        storages: &[Bytes],
        samples: &[Sample],
        known: Vec<(usize, Digested)>,
    ) -> Vec<Option<Digested>> {
        let mut found: Vec<Option<Digested>> = storages.iter().map(|_| None).collect();
        for (index, digested) in known {
            found[index] = Some(digested);
        }
        // Where all storages do as before, nobody asks.
        let others = LazyCell::new(|| self.others(storages, samples));
        let is_new = |index: usize| {
            let changes = self.habit(index, storages).is_some_and(|habit| habit.changes);
            let differs = || {
                self.changed_windows(index, storages, samples)
                    .is_some_and(|changed| changed > 0)
            };
            let is_unlike_all = || others.are_unlike(storages[index].len() as u64, samples[index]);
            !self.is_sparse(index, storages, samples) && (changes && differs() || is_unlike_all())
        };
        let doubtful: Vec<usize> = (0..storages.len())
            .filter(|&index| found[index].is_none() && !is_new(index))
            .collect();
        let bytes: Vec<&[u8]> = doubtful.iter().map(|&index| storages[index].all()).collect();
        for (index, digested) in doubtful.into_iter().zip(self.digest(&bytes)) {
            found[index] = Some(digested);
        }
        found
    }

    /// All storages, here and on disk.
    fn others(&self, storages: &[Bytes], samples: &[Sample]) -> Others {
        let mut others = Others::default();
        for (storage, sample) in storages.iter().zip(samples) {
            *others.sampled.entry((storage.len() as u64, *sample)).or_default() += 1;
        }
        let mut known = HashSet::new();
        for habit in &self.habits {
            if let Some(windows) = habit.windows {
                known.insert((habit.digest, habit.length));
                *others.sampled.entry((habit.length, windows)).or_default() += 1;
            }
        }
        let unknown = self.places.keys().filter(|key| !known.contains(*key));
        others.unknown.extend(unknown.map(|(_, length)| *length));
        others
    }

    /// Digests storages, large ones by chunks.
    pub(crate) fn digest(&self, storages: &[&[u8]]) -> Vec<Digested> {
        let regions: Vec<(&[u8], usize)> = storages
            .iter()
            .map(|&bytes| (bytes, self.grain(bytes.len())))
            .collect();
        let digests = digest_all(&regions).into_iter();
        digests.map(|assembly| self.digested(assembly)).collect()
    }

    /// Bytes of what is digested at a time of a storage: a chunk of a large one.
    fn grain(&self, length: usize) -> usize {
        if self.is_large(length) {
            chunk_size(length)
        } else {
            GROUP
        }
    }

    fn digested(&self, assembly: Assembly) -> Digested {
        let length = assembly.len();
        let by_chunks = self.is_large(length) && assembly.grain() == chunk_size(length);
        Digested {
            digest: assembly.finish(),
            chunks: by_chunks.then(|| assembly.into_values().into()),
        }
    }

    /// Which storages change from one commit to the next, and how, and are equal to no other.
    fn habits_of(
        &self,
        manifest: &Manifest,
        bytes: &[Bytes],
        samples: &[Sample],
        found: Vec<Option<Digested>>,
    ) -> Vec<Habit> {
        let storages = &manifest.storages;
        let counts = counts(storages);
        let habit = |((index, storage), found): ((usize, &StorageEntry), Option<Digested>)| {
            let there = self.places.contains_key(&(storage.digest, storage.length));
            let old = self.habit(index, bytes);
            let unknown = old.is_none_or(|old| old.windows.is_none());
            let kept = unknown || self.is_sparse(index, bytes, samples);
            Habit {
                digest: storage.digest,
                length: storage.length,
                changes: counts[&storage.digest] == 1 && !there,
                windows: Some(samples[index]),
                chunks: found.and_then(|found| found.chunks).filter(|_| kept),
            }
        };
        storages.iter().enumerate().zip(found).map(habit).collect()
    }

    /// Forgets older commits' pieces.
    fn forget_pieces(&mut self) {
        // The same bytes may have come to be elsewhere since.
        for key in std::mem::take(&mut self.in_pieces) {
            if self
                .places
                .get(&key)
                .is_some_and(|known| matches!(known.place, Place::Pieces(_)))
            {
                self.places.remove(&key);
            }
        }
    }

    /// Where equal bytes are that can be relied on. What this process never read is read first.
    fn reusable(&mut self, key: &(Digest, u64), usable: &mut HashMap<String, bool>) -> Result<Option<Known>> {
        let Some(known) = self.places.get(key) else {
            return Ok(None);
        };
        let whole = |outcome: Result<bool>| match outcome {
            Err(error) if is_damage(&error) => Ok(false),
            outcome => outcome,
        };
        let mut sound = true;
        for pack in known.used_packs() {
            let there = match usable.get(&pack.name) {
                Some(there) => *there,
                None => whole(open_pack(&self.directory, pack).map(|_| true))?,
            };
            usable.insert(pack.name.clone(), there);
            sound = sound && there;
        }
        if sound && !known.verified {
            let entry = StorageEntry {
                digest: key.0,
                length: key.1,
                place: known.place.clone(),
            };
            sound = whole(is_there(&self.directory, &known.packs, &entry))?;
        }
        if !sound {
            self.places.remove(key);
            return Ok(None);
        }
        let known = self
            .places
            .get_mut(key)
            .expect("the place was there a moment ago");
        known.verified = true;
        Ok(Some(known.clone()))
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
            return Err(self.with_space(Error::io("make room", self.directory.path(OBJECTS), full), needed));
        }
        Ok(())
    }

    /// Says how much space a full disk would have needed.
    fn with_space(&self, mut error: Error, needed: u64) -> Error {
        let is_full = error.is_full();
        if let Error::Io {
            needed_bytes,
            free_bytes,
            ..
        } = &mut error
            && is_full
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

/// How many storages have each digest.
pub(super) fn counts(storages: &[StorageEntry]) -> HashMap<&Digest, usize, Scattered> {
    let mut counts: HashMap<&Digest, usize, Scattered> =
        HashMap::with_capacity_and_hasher(storages.len(), Scattered);
    for storage in storages {
        *counts.entry(&storage.digest).or_default() += 1;
    }
    counts
}

/// Takes what was coded from among what would be written as it is.
fn take_coded(
    made: &mut Made,
    dense: &mut Vec<Addition>,
    found: &mut [Option<Digested>],
    tree: &Value,
) -> Result<Vec<Addition>> {
    let coded = std::mem::take(&mut made.compressed);
    let storages: HashSet<usize> = coded.iter().map(|coded| coded.storage).collect();
    dense.retain(|addition| !storages.contains(&addition.storage));
    let addition = |coded: Compressed| {
        let storage = coded.storage;
        match &found[storage] {
            Some(found) if found.digest != coded.digest => return Err(changed(tree, storage)),
            Some(_) => {}
            None => {
                found[storage] = Some(Digested {
                    digest: coded.digest,
                    chunks: None,
                });
            }
        }
        Ok(Addition {
            storage,
            digests: Some(coded.digests.clone()),
            content: Content::Coded(Box::new(coded)),
            grain: GROUP,
        })
    };
    coded.into_iter().map(addition).collect()
}

/// What a storage's bytes came out otherwise the second time is told as.
fn changed(tree: &Value, storage: usize) -> Error {
    let leaf = leaf_of(tree, storage);
    Error::invalid(format!("`{leaf}` changed while it was being saved"))
}

/// Lays the new packs out, and says where everything is then.
fn lay_out(
    (commit, form): (&Commit<Bytes>, Option<&Form>),
    samples: Vec<Sample>,
    found: Vec<Option<Digested>>,
    fates: &[Fate],
    additions: [Vec<Addition>; 3],
    made: Made,
) -> Result<Plan> {
    let mut packs = Packs::default();
    let mut origins: Vec<Option<Origin>> = fates
        .iter()
        .map(|fate| match fate {
            Fate::There(known) => {
                let number = |pack: u32| packs.number(&known.packs[pack as usize]);
                Some(Origin::At(known.place.with_packs(number)))
            }
            Fate::Same(_) | Fate::New => None,
        })
        .collect();
    let renewal = |addition: &Addition| match &addition.content {
        Content::Changed(changed) => changed.0.kept_in().cloned().collect(),
        Content::Whole | Content::Coded(_) => Vec::new(),
    };
    for pack in additions.iter().flatten().flat_map(renewal) {
        packs.number(&pack);
    }
    let mut new: Vec<NewPack> = Vec::new();
    for additions in additions.into_iter().filter(|additions| !additions.is_empty()) {
        let shown = additions
            .iter()
            .map(|addition| (addition.storage, addition.shown()));
        let packed = pack_as_before(form, &commit.tree, &commit.storages, shown.collect())?;
        let layout = &packed.layout;
        let number = packs.number(&PackEntry {
            name: format!("{}.safetensors", random_name()?),
            length: layout.length,
            header_digest: layout.header_digest,
        });
        for (position, addition) in additions.iter().enumerate() {
            let offset = layout.offsets[position];
            origins[addition.storage] = Some(match &addition.content {
                Content::Whole => Origin::New(new.len(), position),
                Content::Changed(changed) => {
                    Origin::At(changed.0.place(number, offset, |pack| packs.number(pack)))
                }
                Content::Coded(coded) => Origin::At(coded.place(number, offset, |pack| packs.number(pack))),
            });
        }
        new.push(NewPack {
            number,
            packed,
            additions,
        });
    }
    for (index, fate) in fates.iter().enumerate() {
        if let Fate::Same(other) = fate {
            origins[index] = origins[*other].clone();
        }
    }
    Ok(Plan {
        samples,
        found,
        origins: origins
            .into_iter()
            .map(|origin| origin.expect("every storage is somewhere"))
            .collect(),
        packs: packs.entries,
        new,
        made,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Tensor;
    use crate::storage::Directory;
    use crate::storage::memory::MemoryStorage;
    use crate::store::{TMP, Tuning};

    const BYTES: usize = 100_000;

    fn commit_to(store: &mut Store, step: u64, storages: &[Vec<u8>]) -> Checkpoint {
        let tensor = |storage: u32| {
            Value::from(Tensor {
                dtype: "uint8".to_owned(),
                shape: vec![BYTES as u64],
                strides: vec![1],
                offset: 0,
                storage,
                device: "cpu".to_owned(),
                attrs: Vec::new(),
            })
        };
        let commit = Commit {
            step,
            phase: 0,
            tree: Value::List((0..storages.len() as u32).map(tensor).collect()),
            storages: bytes_of(storages),
            identity: Vec::new(),
            environment: Vec::new(),
            metrics: Vec::new(),
            pinned: false,
        };
        let (created, head) = ("2026-11-29T12:00:00.000Z".to_owned(), Digest([0; 32]));
        store.commit(commit, 1, created, head, Beside::default()).unwrap()
    }

    fn bytes_of(storages: &[Vec<u8>]) -> Vec<Bytes<'_>> {
        storages.iter().map(|bytes| Bytes::Here(bytes)).collect()
    }

    /// The storages that the next commit would digest before it writes.
    fn doubtful(store: &Store, storages: &[Vec<u8>]) -> Vec<usize> {
        let samples: Vec<Sample> = storages.iter().map(|bytes| sample(bytes)).collect();
        let found = store.digest_doubtful(&bytes_of(storages), &samples, Vec::new());
        (0..found.len()).filter(|&index| found[index].is_some()).collect()
    }

    /// A store whose last checkpoint was written by another life, which has read it: into memory or not.
    fn next_life(directory: &Directory, last: &Checkpoint, into_memory: bool) -> Store {
        let info = last.info();
        let read = Checkpoint::load(directory, &info.name).unwrap();
        let mut memory = vec![vec![0; BYTES]; if into_memory { 4 } else { 0 }];
        let targets = memory.iter_mut().map(Vec::as_mut_slice).enumerate();
        read.verify_into(targets.collect()).unwrap();
        let whole = crate::store::survey(directory, &info.run_id).unwrap().whole;
        let mut store = Store::new(directory.clone(), info.run_id.clone(), &whole, Tuning::default());
        store.trust(&read);
        store
    }

    #[test]
    fn the_first_commit_behind_a_resume_digests_beforehand_what_may_be_on_disk_and_nothing_else() {
        let directory = Directory::new(Arc::new(MemoryStorage::new()));
        for name in [CHECKPOINTS, OBJECTS, TMP] {
            directory.create_dir(name).unwrap();
        }
        let mut store = Store::new(directory.clone(), "run".to_owned(), &[], Tuning::default());
        // The first is frozen, the others change; the last two are equal to each other.
        let mut storages = vec![vec![1; BYTES], vec![2; BYTES], vec![3; BYTES], vec![3; BYTES]];
        commit_to(&mut store, 1, &storages);
        storages[1].fill(4);
        storages[2].fill(5);
        storages[3].fill(5);
        let last = commit_to(&mut store, 2, &storages);
        storages[1].fill(6);
        storages[2].fill(7);
        storages[3].fill(7);
        assert_eq!(
            doubtful(&next_life(&directory, &last, true), &storages),
            [0, 2, 3]
        );
        // Bytes of the older checkpoint were never sampled, but what had changed by the last one is not held against them.
        storages[0].fill(8);
        assert_eq!(
            doubtful(&next_life(&directory, &last, true), &storages),
            [0, 2, 3]
        );
        assert_eq!(
            doubtful(&next_life(&directory, &last, false), &storages),
            [0, 1, 2, 3]
        );
        let store = &mut next_life(&directory, &last, true);
        let next = commit_to(store, 3, &storages);
        for (index, bytes) in storages.iter().enumerate() {
            assert!(next.read(index).unwrap() == *bytes, "storage {index}");
        }
    }
}
