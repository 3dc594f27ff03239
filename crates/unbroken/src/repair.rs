//! Repair: what of a run is whole stays where it is, the rest is put aside, and whole copies of it are put in its place.
//!
//! Touches: one run directory, under its lock, except to plan; copies of it, read only. Nothing that was committed is
//! changed or deleted: what is damaged or cannot be read goes to `quarantine/`, under its own name, with the reason in a
//! file beside it. Only left-overs go for good, as at every opening: unfinished files, and packs that no manifest can
//! need.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fork;
use crate::format::journal::Ending;
use crate::format::manifest::{Manifest, PackEntry};
use crate::journal::{self, JOURNAL, Story};
use crate::run::{self, CONFIG};
use crate::storage::disk::DiskStorage;
use crate::storage::{Directory, Storage, already_exists, not_found};
use crate::store::{self, CHECKPOINTS, Checkpoint, Claim, OBJECTS, Survey, TMP};

/// Directory of what was put aside.
const QUARANTINE: &str = "quarantine";

/// One thing that a repair does, to one file. Names are relative to the run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Puts a whole copy in the place of a file that is damaged or missing; the damaged one is put aside first.
    Restore {
        /// Which file.
        name: String,
        /// The run directory that has it whole.
        copy: PathBuf,
    },
    /// Moves a file to `quarantine/`.
    SetAside {
        /// Which file.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// Removes a left-over of a commit that was cut short.
    Remove {
        /// Which file.
        name: String,
    },
}

/// What a run needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to do, in an order that leaves the run no worse wherever it is cut short.
    pub actions: Vec<Action>,
    /// Names of the checkpoints that are whole, restored ones included, oldest first.
    pub whole: Vec<String>,
    /// (name, why) of checkpoints that are lost, newest first. They stay where they are if none is whole.
    pub lost: Vec<(String, String)>,
    /// Why a checkpoint should be here, where not even a lost one is.
    pub missing: Option<String>,
    /// What a repair leaves as it is and cannot make right: damage of the journal.
    pub beyond: Vec<String>,
    /// What it leaves alone because it is not its own.
    pub left_alone: Vec<String>,
}

impl Plan {
    /// Whether everything is as it was committed.
    pub fn is_whole(&self) -> bool {
        self.lost.is_empty() && self.missing.is_none() && self.beyond.is_empty()
    }
}

/// Says what a repair would do, reading everything and changing nothing. Needs no lock.
///
/// `copies` are run directories that may hold whole files of this run: backups, forks.
pub fn plan(path: &Path, copies: &[PathBuf]) -> Result<Plan> {
    let storage = DiskStorage::open(path).map_err(|error| Error::io("open directory", path, error))?;
    let directory = Directory::new(Arc::new(storage));
    let copies = open_copies(copies)?;
    let (run_id, first) = identify(&directory, &copies)?;
    examine(&directory, &run_id, &copies, first)
}

/// Carries out what [`plan`] says, and returns that; whether it helped, another [`plan`] tells.
///
/// # Durability
///
/// On return it survives a power cut. Cut short anywhere, it can be done again.
///
/// # Errors
///
/// `Locked` while the run is trained.
pub fn repair(path: &Path, copies: &[PathBuf]) -> Result<Plan> {
    let storage = DiskStorage::open(path).map_err(|error| Error::io("open directory", path, error))?;
    repair_on(Arc::new(storage), copies)
}

/// Repairs a run on any storage. See [`repair`].
pub fn repair_on(storage: Arc<dyn Storage>, copies: &[PathBuf]) -> Result<Plan> {
    let directory = Directory::new(storage);
    let copies = open_copies(copies)?;
    identify(&directory, &copies)?; // A directory that is no run's stays as it is: no lock's file is made in it.
    let lock = run::take_lock(&directory)?;
    let (run_id, first) = identify(&directory, &copies)?;
    let plan = examine(&directory, &run_id, &copies, first)?;
    if !plan.actions.is_empty() {
        directory.create_dir(TMP)?;
        carry_out(&directory, &copies, &plan.actions)?;
    }
    drop(lock);
    Ok(plan)
}

/// Returns the run's id; that of a copy, and what brings its `run.toml` here, where this one is damaged or gone and the
/// checkpoints here are the copy's run's.
fn identify(directory: &Directory, copies: &[Directory]) -> Result<(String, Option<Action>)> {
    let error = match run::require_config(directory) {
        Ok(config) => return Ok((config.id, None)),
        Err(error) if store::is_damage(&error) => error,
        Err(error) => return Err(error),
    };
    for copy in copies {
        let Ok(config) = run::require_config(copy) else {
            continue;
        };
        if !store::survey(directory, &config.id)?.whole.is_empty() {
            let restore = Action::Restore {
                name: CONFIG.to_owned(),
                copy: copy.location().to_path_buf(),
            };
            return Ok((config.id, Some(restore)));
        }
    }
    Err(error)
}

fn open_copies(paths: &[PathBuf]) -> Result<Vec<Directory>> {
    let open = |path: &PathBuf| {
        let storage = DiskStorage::open(path).map_err(|error| Error::io("open directory", path, error))?;
        Ok(Directory::new(Arc::new(storage)))
    };
    paths.iter().map(open).collect()
}

/// Reads everything and decides.
fn examine(directory: &Directory, run_id: &str, copies: &[Directory], first: Option<Action>) -> Result<Plan> {
    let mut findings = Findings::gather(directory, run_id, copies, None)?;
    let mut segments = findings.check_journal(directory, run_id, copies)?;
    if !findings.has_whole()
        && let Some(found) = findings.find_whole(copies, run_id, &segments.heads)?
    {
        findings = Findings::gather(directory, run_id, copies, Some(found))?;
        segments = findings.check_journal(directory, run_id, copies)?;
    }
    let (beyond, begun) = findings.journal_flaws(directory, run_id, &segments)?;
    findings.restores.extend(segments.restores);
    let mut plan = Plan {
        actions: first
            .into_iter()
            .chain(std::mem::take(&mut findings.restores))
            .collect(),
        beyond,
        left_alone: findings.left_alone.clone(),
        ..Plan::default()
    };
    for readable in &findings.manifests {
        let name = readable.name.clone();
        match findings.losses.get(&name) {
            None => plan.whole.push(name),
            Some(why) => plan.lost.push((name, why.clone())),
        }
    }
    plan.lost.extend(findings.unreadable.clone());
    plan.whole.sort();
    plan.lost.sort_by(|a, b| b.cmp(a));
    if begun && plan.whole.is_empty() && plan.lost.is_empty() {
        plan.missing = Some("no checkpoint of this run is there, though its journal is".to_owned());
    }
    // With nothing whole left, the directory is evidence, and nothing in it moves.
    if !plan.whole.is_empty() {
        findings.put_aside(directory, &mut plan)?;
        findings.sweep(directory, &mut plan)?;
    }
    Ok(plan)
}

/// A manifest that can be read, here or in a copy.
#[derive(Debug)]
struct Readable {
    name: String,
    manifest: Arc<Manifest>,
}

impl Readable {
    /// Why what it needs of one of its packs is not all there, if it is not.
    fn loss_in(&self, directory: &Directory, pack: usize) -> Result<Option<String>> {
        let storages = self.manifest.storages.iter().enumerate();
        let (indices, needed): (Vec<usize>, Vec<Claim>) = storages
            .flat_map(|(index, storage)| Claim::of(storage).into_iter().map(move |claim| (index, claim)))
            .filter(|(_, (number, _))| *number as usize == pack)
            .map(|(index, (_, claim))| (index, claim))
            .unzip();
        let mut error = damage_of(directory, &self.manifest.packs[pack], &needed)?;
        if let Some(Error::Damaged { part, .. }) = &mut error {
            // Among the parts alone, a storage has its number there for a name.
            let number = part
                .strip_prefix("storage ")
                .and_then(|number| number.parse().ok());
            if let Some(&index) = number.and_then(|number: usize| indices.get(number)) {
                *part = store::leaf_of(&self.manifest.tree, index);
            }
        }
        Ok(error.map(|error| error.to_string()))
    }
}

/// One pack, and what manifests say of it.
#[derive(Debug)]
struct Pack {
    entry: PackEntry,
    claims: HashSet<Claim>,
    /// What is wrong with it here, unless a copy makes it whole.
    flaw: Option<String>,
}

#[derive(Debug, Default)]
struct Findings {
    /// This run's.
    manifests: Vec<Readable>,
    /// Others' are left alone, and so is what they need.
    foreign: Vec<Readable>,
    /// Why a manifest's tensors are not all there, by its name.
    losses: BTreeMap<String, String>,
    /// (name, why) of manifests that no copy has either.
    unreadable: Vec<(String, String)>,
    packs: BTreeMap<String, Pack>,
    restores: Vec<Action>,
    left_alone: Vec<String>,
    /// Whether there are files among the manifests that are none.
    strangers: bool,
    /// Whether manifests are gone, and one of them comes from a copy.
    bereft: bool,
}

impl Findings {
    /// Reads every manifest and what it needs. `brought` is one that is not here, and the copy that has it.
    fn gather(
        directory: &Directory,
        run_id: &str,
        copies: &[Directory],
        brought: Option<(&Directory, Checkpoint)>,
    ) -> Result<Findings> {
        let survey: Survey = store::survey(directory, run_id)?;
        let mut findings = Findings {
            strangers: !survey.unknown.is_empty(),
            bereft: brought.is_some(),
            ..Findings::default()
        };
        if let Some((copy, checkpoint)) = brought {
            findings.add(&checkpoint, true);
            findings.restore(&format!("{CHECKPOINTS}/{}", checkpoint.info().name), copy);
        }
        for name in &survey.unknown {
            let text = format!("`{CHECKPOINTS}/{name}` is no checkpoint");
            findings.left_alone.push(text);
        }
        for checkpoint in &survey.foreign {
            let info = checkpoint.info();
            let text = format!("checkpoint `{}` is of run {}", info.name, info.run_id);
            findings.left_alone.push(text);
            findings.add(checkpoint, false);
        }
        for checkpoint in &survey.whole {
            findings.add(checkpoint, true);
        }
        for (_, name, error) in &survey.rejected {
            // Rejected for its packs, or for itself?
            match Checkpoint::load(directory, name) {
                Ok(checkpoint) => findings.add(&checkpoint, true),
                Err(_) => match find_manifest(copies, name, run_id) {
                    Some((copy, checkpoint)) => {
                        findings.add(&checkpoint, true);
                        findings.restore(&format!("{CHECKPOINTS}/{name}"), copy);
                    }
                    None => findings.unreadable.push((name.clone(), error.to_string())),
                },
            }
        }
        findings.check_packs(directory, copies)?;
        Ok(findings)
    }

    /// Whether one of this run's checkpoints is whole, or will be.
    fn has_whole(&self) -> bool {
        let lost = |readable: &Readable| self.losses.contains_key(&readable.name);
        !self.manifests.iter().all(lost)
    }

    /// Finds the newest whole checkpoint of this run in the copies that was made at one of these records: a copy may have
    /// gone on by itself, and what the journal here does not lead to is another training's.
    fn find_whole<'a>(
        &self,
        copies: &'a [Directory],
        run_id: &str,
        heads: &HashSet<Digest>,
    ) -> Result<Option<(&'a Directory, Checkpoint)>> {
        let is_here = |name: &str| self.manifests.iter().any(|readable| readable.name == name);
        let mut found = Vec::new();
        for copy in copies {
            let whole = store::survey(copy, run_id)?.whole.into_iter();
            let fits = |checkpoint: &Checkpoint| {
                heads.contains(&checkpoint.info().journal_head) && !is_here(&checkpoint.info().name)
            };
            found.extend(whole.filter(fits).map(|checkpoint| (copy, checkpoint)));
        }
        found.sort_by(|(_, a), (_, b)| b.info().age().cmp(&a.info().age())); // Stable: the first copy's of equals.
        for (copy, checkpoint) in found {
            match checkpoint.verify() {
                Ok(()) => return Ok(Some((copy, checkpoint))),
                Err(error) if store::is_damage(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn add(&mut self, checkpoint: &Checkpoint, own: bool) {
        let manifest = checkpoint.shared_manifest();
        for entry in &manifest.packs {
            self.packs.entry(entry.name.clone()).or_insert_with(|| Pack {
                entry: entry.clone(),
                claims: HashSet::new(),
                flaw: None,
            });
        }
        for (number, claim) in manifest.storages.iter().flat_map(Claim::of) {
            let name = &manifest.packs[number as usize].name;
            let pack = self.packs.get_mut(name).expect("every pack was just added");
            pack.claims.insert(claim);
        }
        let readable = Readable {
            name: checkpoint.info().name.clone(),
            manifest,
        };
        if own {
            self.manifests.push(readable);
        } else {
            self.foreign.push(readable);
        }
    }

    fn restore(&mut self, name: &str, copy: &Directory) {
        self.restores.push(Action::Restore {
            name: name.to_owned(),
            copy: copy.location().to_path_buf(),
        });
    }

    /// Reads each pack once, with everything that any manifest says of it; looks for a copy of those that are not whole.
    fn check_packs(&mut self, directory: &Directory, copies: &[Directory]) -> Result<()> {
        let mut restored = Vec::new();
        for (name, pack) in &mut self.packs {
            let claims: Vec<Claim> = pack.claims.iter().cloned().collect();
            let Some(error) = damage_of(directory, &pack.entry, &claims)? else {
                continue;
            };
            let whole = |copy: &&Directory| matches!(damage_of(copy, &pack.entry, &claims), Ok(None));
            match copies.iter().find(whole) {
                Some(copy) => restored.push((format!("{OBJECTS}/{name}"), copy)),
                None => pack.flaw = Some(error.to_string()),
            }
        }
        for (name, copy) in restored {
            self.restore(&name, copy);
        }
        // A pack may be damaged in a place that only some of its manifests need.
        for readable in &self.manifests {
            for (index, entry) in readable.manifest.packs.iter().enumerate() {
                if self.packs[&entry.name].flaw.is_none() {
                    continue;
                }
                let Some(why) = readable.loss_in(directory, index)? else {
                    continue;
                };
                let pack = self.packs.get_mut(&entry.name).expect("every pack was added");
                pack.flaw = Some(why.clone()); // Named by the leaf, not by a number.
                self.losses.insert(readable.name.clone(), why);
                break;
            }
        }
        Ok(())
    }

    /// Looks for whole copies of segments that are damaged, cut short or missing.
    fn check_journal(&self, directory: &Directory, run_id: &str, copies: &[Directory]) -> Result<Segments> {
        let own = read_segments(directory, run_id)?;
        let known: HashSet<Digest> = own
            .values()
            .flat_map(|segment| segment.chain.iter().copied())
            .collect();
        // What checkpoints and later lives name, and no readable record is.
        let heads = self
            .manifests
            .iter()
            .map(|readable| readable.manifest.journal_head);
        let previous = own.values().filter_map(|segment| segment.previous);
        let wanted: HashSet<Digest> = heads
            .chain(previous)
            .filter(|head| *head != Digest([0; 32]) && !known.contains(head))
            .collect();
        let mut segments = Segments {
            heads: known,
            ..Segments::default()
        };
        for copy in copies {
            for (name, other) in read_segments(copy, run_id)? {
                if !other.whole || segments.restored.contains(&name) {
                    continue;
                }
                let has_wanted = other.chain.iter().any(|head| wanted.contains(head));
                let fits = match own.get(&name) {
                    // Another life may have gone on from a copy: what can be read here must be there too.
                    Some(segment) if !segment.chain.is_empty() => {
                        // One that is cut short looks like one that a kill ended, unless something names what is gone.
                        other.chain.starts_with(&segment.chain) && (has_wanted || !segment.whole)
                    }
                    _ => has_wanted,
                };
                if fits {
                    segments.restores.push(Action::Restore {
                        name: format!("{JOURNAL}/{name}"),
                        copy: copy.location().to_path_buf(),
                    });
                    segments.heads.extend(other.chain);
                    segments.restored.push(name);
                }
            }
        }
        Ok(segments)
    }

    /// What is wrong with the journal and stays so when its segments have been restored; and whether it has begun.
    fn journal_flaws(
        &self,
        directory: &Directory,
        run_id: &str,
        segments: &Segments,
    ) -> Result<(Vec<String>, bool)> {
        let whole = self
            .manifests
            .iter()
            .filter(|readable| !self.losses.contains_key(&readable.name))
            .map(|readable| (readable.name.clone(), readable.manifest.journal_head));
        let whole: Vec<(String, Digest)> = whole.collect();
        let heads: Vec<Digest> = whole.iter().map(|(_, head)| *head).collect();
        let story = Story::open_with(directory, run_id, &heads)?;
        let restored = &segments.restored;
        let at_records: Vec<(String, Digest)> = whole
            .into_iter()
            .filter(|(_, head)| restored.is_empty() || !segments.heads.contains(head))
            .collect();
        let mut flaws = story.flaws(&at_records)?;
        if !restored.is_empty() {
            // What a whole segment makes right is not beyond repair, nor is what hangs on it.
            flaws.retain(|flaw| {
                !restored.iter().any(|name| flaw.contains(name.as_str()))
                    && !flaw.contains(journal::NO_EARLIER)
            });
        }
        Ok((flaws, story.has_begun()))
    }

    /// Plans to put aside what is lost: packs before manifests, so that a pack never lies there without one that names
    /// it, which would make it a left-over. For the same reason packs of manifests that are gone move before the first
    /// manifest comes back.
    fn put_aside(&self, directory: &Directory, plan: &mut Plan) -> Result<()> {
        if plan.lost.is_empty() && !self.bereft {
            return Ok(());
        }
        let mut nameless = Vec::new();
        let kept: BTreeSet<&str> = self
            .manifests
            .iter()
            .filter(|readable| !self.losses.contains_key(&readable.name))
            .chain(&self.foreign)
            .flat_map(|readable| readable.manifest.packs.iter().map(|pack| pack.name.as_str()))
            .collect();
        for name in directory.list_if_there(OBJECTS)? {
            if kept.contains(name.as_str()) || !store::is_pack_name(&name) {
                continue;
            }
            let file = format!("{OBJECTS}/{name}");
            let aside = |why: String| Action::SetAside { name: file, why };
            match self.packs.get(&name) {
                Some(Pack { flaw: Some(flaw), .. }) => plan.actions.push(aside(flaw.clone())),
                Some(_) => {
                    let why = "whole; only checkpoints that are lost name it";
                    plan.actions.push(aside(why.to_owned()));
                }
                None if self.is_all_known() => {}
                None => nameless.push(aside("no manifest that can be read names it".to_owned())),
            }
        }
        plan.actions.splice(0..0, nameless);
        for (name, why) in &plan.lost {
            let (name, why) = (format!("{CHECKPOINTS}/{name}"), why.clone());
            plan.actions.push(Action::SetAside { name, why });
        }
        Ok(())
    }

    /// Plans to remove left-overs, as every opening does.
    fn sweep(&self, directory: &Directory, plan: &mut Plan) -> Result<()> {
        for name in directory.list_if_there(TMP)? {
            if store::is_temporary_name(&name) {
                let name = format!("{TMP}/{name}");
                plan.actions.push(Action::Remove { name });
            }
        }
        if self.is_all_known() {
            for name in directory.list_if_there(OBJECTS)? {
                if store::is_pack_name(&name) && !self.packs.contains_key(&name) {
                    let name = format!("{OBJECTS}/{name}");
                    plan.actions.push(Action::Remove { name });
                }
            }
        }
        Ok(())
    }

    /// Whether every file among the manifests is there and could be read, so that a pack that none of them names is
    /// nobody's.
    fn is_all_known(&self) -> bool {
        !self.strangers && !self.bereft && self.unreadable.is_empty()
    }
}

/// What copies can do for the journal.
#[derive(Debug, Default)]
struct Segments {
    restores: Vec<Action>,
    /// Names of the segments that are restored.
    restored: Vec<String>,
    /// Chain hash of each record that is here, or will be.
    heads: HashSet<Digest>,
}

/// What of a journal segment can be read.
struct Segment {
    /// Chain hash of the header and of each whole record.
    chain: Vec<Digest>,
    /// Chain hash that its header goes on from.
    previous: Option<Digest>,
    /// Whether nothing in it is damaged; torn is whole.
    whole: bool,
}

fn read_segments(directory: &Directory, run_id: &str) -> Result<BTreeMap<String, Segment>> {
    let mut segments = BTreeMap::new();
    for name in directory.list_if_there(JOURNAL)? {
        let Some((life, _)) = journal::parse_segment_name(&name) else {
            continue;
        };
        let mut segment = Segment {
            chain: Vec::new(),
            previous: None,
            whole: false,
        };
        match read_chain(
            directory,
            &format!("{JOURNAL}/{name}"),
            run_id,
            life,
            &mut segment,
        ) {
            Err(error) if !store::is_damage(&error) => return Err(error),
            _ => {}
        }
        segments.insert(name, segment);
    }
    Ok(segments)
}

fn read_chain(
    directory: &Directory,
    name: &str,
    run_id: &str,
    life: u32,
    segment: &mut Segment,
) -> Result<()> {
    let mut reader = journal::reader(directory, name)?;
    let Some(header) = reader.header().cloned() else {
        segment.whole = true; // Torn before it said anything.
        return Ok(());
    };
    if header.run_id != run_id || header.life != life {
        return Ok(());
    }
    let told = |trouble| journal::told(trouble, directory, name);
    segment.previous = Some(header.previous);
    segment.chain.push(reader.head());
    while let Some(entry) = reader.read().map_err(told)? {
        segment.chain.push(entry.chain);
    }
    segment.whole = !matches!(reader.ending().map_err(told)?, Ending::Damaged { .. });
    Ok(())
}

/// Finds a manifest of this run in a copy.
fn find_manifest<'a>(
    copies: &'a [Directory],
    name: &str,
    run_id: &str,
) -> Option<(&'a Directory, Checkpoint)> {
    copies.iter().find_map(|copy| {
        let checkpoint = Checkpoint::load(copy, name).ok()?;
        (checkpoint.info().run_id == run_id).then_some((copy, checkpoint))
    })
}

/// What is wrong with a pack and these parts of it, if something is.
fn damage_of(directory: &Directory, entry: &PackEntry, claims: &[Claim]) -> Result<Option<Error>> {
    match store::verify_pack(directory, entry, claims) {
        Ok(()) => Ok(None),
        Err(error) if store::is_damage(&error) => Ok(Some(error)),
        Err(error) => Err(error),
    }
}

fn carry_out(directory: &Directory, copies: &[Directory], actions: &[Action]) -> Result<()> {
    let mut synced_manifests = false;
    for action in actions {
        match action {
            Action::Restore { name, copy } => {
                let copy = copies.iter().find(|other| other.location() == copy);
                restore(
                    directory,
                    copy.expect("a plan names copies that it was given"),
                    name,
                )?;
            }
            Action::SetAside { name, why } => set_aside(directory, name, why)?,
            Action::Remove { name } => {
                if !synced_manifests {
                    // A manifest that another life removed must not come back after a power cut without its pack.
                    directory.sync_dir(CHECKPOINTS)?;
                    synced_manifests = true;
                }
                directory.remove(name)?;
            }
        }
    }
    Ok(())
}

/// Brings a whole file from a copy under its name. What is under it now is put aside, and stays under it until then: a
/// manifest that was not there for a moment would leave its packs to the next sweep.
fn restore(directory: &Directory, copy: &Directory, name: &str) -> Result<()> {
    let temporary = store::temporary_name()?;
    fork::copy(copy, directory, name, &temporary)?;
    let why = format!(
        "damaged or cut short; restored from {}",
        copy.location().display()
    );
    match keep_aside(directory, name, &why) {
        Err(error) if not_found(&error) => {} // It was missing.
        Err(error) if store::is_damage(&error) => set_aside(directory, name, &why)?, // Neither links nor a readable file.
        done => done?,
    }
    let (parent, _) = split(name);
    if !parent.is_empty() {
        directory.create_dir(parent)?;
    }
    directory.rename_over(&temporary, name)?;
    directory.sync_dir(parent)
}

/// Gives a file a second name in `quarantine/`, for good; where the file system has no links, a copy.
fn keep_aside(directory: &Directory, name: &str, why: &str) -> Result<()> {
    directory.create_dir(QUARANTINE)?;
    directory.sync_dir("")?;
    let mut copied: Option<String> = None;
    for place in places_of(split(name).1) {
        let kept = match &copied {
            Some(copied) => directory.rename_new(copied, &place),
            None => match directory.link_new(directory, name, &place) {
                Err(error) if !already_exists(&error) && !not_found(&error) => {
                    let temporary = store::temporary_name()?;
                    fork::copy(directory, directory, name, &temporary)?;
                    let kept = directory.rename_new(&temporary, &place);
                    copied = Some(temporary);
                    kept
                }
                linked => linked,
            },
        };
        match kept {
            Err(error) if already_exists(&error) => {}
            Err(error) => return Err(error),
            Ok(()) => {
                note(directory, &place, why)?;
                return directory.sync_dir(QUARANTINE);
            }
        }
    }
    unreachable!("there is always another name")
}

/// Names in `quarantine/` for a file, to be tried one after the other.
fn places_of(base: &str) -> impl Iterator<Item = String> {
    (1u64..).map(move |number| match number {
        1 => format!("{QUARANTINE}/{base}"),
        number => format!("{QUARANTINE}/{base}.{number}"),
    })
}

/// A name's directory (`""` is the root) and its last part.
fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

/// Moves a file to `quarantine/`, never losing it: it has its second name for good before the first one goes.
fn set_aside(directory: &Directory, name: &str, why: &str) -> Result<()> {
    directory.create_dir(QUARANTINE)?;
    directory.sync_dir("")?;
    let (parent, base) = split(name);
    for place in places_of(base) {
        match directory.link_new(directory, name, &place) {
            Ok(()) => {
                note(directory, &place, why)?;
                directory.sync_dir(QUARANTINE)?;
                directory.remove(name)?;
                return directory.sync_dir(parent);
            }
            Err(error) if already_exists(&error) => {}
            Err(error) if not_found(&error) => return Err(error),
            // A file system without links: the move is one rename, durable at its new place first.
            Err(_) => match directory.rename_new(name, &place) {
                Ok(()) => {
                    note(directory, &place, why)?;
                    directory.sync_dir(QUARANTINE)?;
                    return directory.sync_dir(parent);
                }
                Err(error) if already_exists(&error) => {}
                Err(error) => return Err(error),
            },
        }
    }
    unreachable!("there is always another name")
}

/// Writes why a file is here beside it.
fn note(directory: &Directory, place: &str, why: &str) -> Result<()> {
    let mut file = match directory.create_new(&format!("{place}.why")) {
        Err(error) if already_exists(&error) => return Ok(()), // A repair that was cut short said it.
        created => created?,
    };
    file.write_all(format!("{why}\n").as_bytes())?;
    file.sync()
}
