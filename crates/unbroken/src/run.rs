//! A run on disk: its lock, its newest whole checkpoint, and the proof that a step executed again is the same step.
//!
//! Touches: one [`Directory`] and everything in it, the clock, the system's randomness for a new run's id. Nothing is
//! changed before the directory is known to be this run's (or nobody's) and the lock is held.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::journal::{Component, Record, SegmentHeader};
use crate::format::saved::{Outline, Saved};
use crate::format::{FORMAT_VERSION, Flaw};
pub use crate::journal::Difference;
use crate::journal::{self, Boundary, JOURNAL, Journal, Story, Tail, Writer};
use crate::lending::Bytes;
use crate::outline::{gathered, nodes_of, outline_with};
use crate::state::Value;
use crate::storage::disk::DiskStorage;
use crate::storage::{Claim, Directory, Lock, Storage, not_found};
use crate::store::{
    self, Beside, CHECKPOINTS, Checkpoint, CheckpointInfo, Commit, Compression, Digested, OBJECTS, Retention,
    Store, TMP, Tuning,
};
use crate::trial;
pub use crate::trial::{Extent, Trial};

pub(crate) const CONFIG: &str = "run.toml";
pub(crate) const LOCK: &str = "lock";
/// How long a lock that is held is waited for. A killed process takes a moment to die, the longer the more memory it
/// had, and the same command is often started again within that moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// The largest run.toml that is read, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// The first line of run.toml.
const COMMENT: &str = "# Who this run is. Written once by unbroken; do not edit.";
/// What run.toml may hold.
const CONFIG_KEYS: [&str; 6] = ["check", "created", "format", "id", "seed", "settings"];
/// Its second line, with the digest of all others, begins with this.
const CHECK: &str = "check = \"";

/// How to open a run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Seed of a new run; `None` draws one. A run that is there must have the same.
    pub seed: Option<u64>,
    /// Recorded in `run.toml` at creation only: text, integers, floats and booleans by name.
    pub settings: Vec<(String, Value)>,
    /// Refuse a damaged newest checkpoint instead of falling back to the next older one.
    pub strict: bool,
    /// Sizes of the engine that writes checkpoints.
    pub tuning: Tuning,
}

/// Lends memory for what is about to be read of a checkpoint: (storage, memory of exactly its length), for any of its
/// storages. Asked again where the checkpoint turns out to be damaged and an older one takes its place.
pub type Lend<'a, 'm> = &'a mut dyn FnMut(&Checkpoint) -> Result<Vec<(usize, &'m mut [u8])>>;

/// Where a checkpoint's bytes go while they are verified.
pub(crate) trait Memory {
    /// Makes memory for a checkpoint about to be read, giving up what was for another one.
    fn make(&mut self, checkpoint: &Checkpoint) -> Result<()>;

    /// What was made: (storage, memory of exactly its length), for any of its storages.
    fn targets(&mut self) -> Vec<(usize, &mut [u8])>;
}

/// Memory that somebody else lends.
struct Lent<'a, 'm> {
    lend: Lend<'a, 'm>,
    targets: Vec<(usize, &'m mut [u8])>,
}

impl<'a, 'm> Lent<'a, 'm> {
    fn by(lend: Lend<'a, 'm>) -> Self {
        let targets = Vec::new();
        Lent { lend, targets }
    }
}

impl Memory for Lent<'_, '_> {
    fn make(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.targets = checkpoint.lent_by(|| (self.lend)(checkpoint))?;
        Ok(())
    }

    fn targets(&mut self) -> Vec<(usize, &mut [u8])> {
        std::mem::take(&mut self.targets)
    }
}

/// Who a run is, from its `run.toml`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) id: String,
    pub(crate) seed: u64,
    created: String,
    pub(crate) settings: Vec<(String, Value)>,
}

/// What a directory is before anything in it is changed.
enum Nature {
    /// Nothing, or what a creation that was cut short left.
    Fresh,
    Run(Config),
}

/// A run on disk, held by one writer. All methods take `&self`: one thread may commit while another records.
#[derive(Debug)]
pub struct Run {
    directory: Directory,
    config: Config,
    life: u32,
    newest: Option<Checkpoint>,
    /// An older one that the run has gone back to, and the highest step recorded behind it.
    back: OnceLock<(Checkpoint, u64)>,
    rejected: Vec<(String, String)>,
    warnings: Vec<String>,
    /// What was noticed since, until it is asked for.
    notices: Mutex<Vec<String>>,
    recorded_until: u64,
    /// What earlier lives recorded after `resumed_from` and this one has not reached yet.
    recorded: Mutex<HashMap<(u64, u8), Boundary>>,
    journal: Mutex<Pen>,
    store: Mutex<Store>,
    /// The store's checkpoints, for those who ask while it is busy.
    listed: Mutex<Vec<CheckpointInfo>>,
    lock: Mutex<Option<Box<dyn Lock>>>,
    /// The process that opened it: a fork of it must not write.
    pid: u32,
}

/// The journal's state in this life.
#[derive(Debug)]
enum Pen {
    /// `begin` was not called.
    Idle,
    Writing {
        writer: Box<Writer>,
        /// The last boundary of this life; the one that it started from at first.
        last: Option<(u64, u8)>,
    },
    Closed,
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in our own code while it was held: what it guards is only ever replaced whole.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Run {
    /// Opens or creates a run directory and takes its lock.
    ///
    /// Every byte of the newest checkpoint is read before it becomes [`Run::resumed_from`]; a damaged one is passed
    /// over for the next older one.
    ///
    /// # Durability
    ///
    /// On return a new run's directory and `run.toml` survive a power cut.
    ///
    /// # Errors
    ///
    /// `Locked`; `Identity` for another seed; `Format` for a directory that is no run or of an unknown version;
    /// `NoWholeCheckpoint`; with `strict` the damage of the newest one. Nothing is changed then.
    pub fn open(path: &Path, options: &Options) -> Result<Run> {
        Run::open_into(path, options, &mut |_| Ok(Vec::new()))
    }

    /// Opens or creates a run like [`Run::open`]. While it reads every byte of the newest checkpoint it leaves them in
    /// memory that it is lent, so that nothing is read twice: verified, if the run is opened, and unspecified if not.
    pub fn open_into(path: &Path, options: &Options, lend: Lend) -> Result<Run> {
        Run::open_filling(path, options, &mut Lent::by(lend))
    }

    /// [`Run::open_into`] memory of any kind.
    pub(crate) fn open_filling(path: &Path, options: &Options, memory: &mut dyn Memory) -> Result<Run> {
        check_settings(&options.settings)?;
        let opened = match DiskStorage::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                DiskStorage::create(path).map_err(|error| Error::io("create directory", path, error))?
            }
            opened => opened.map_err(|error| Error::io("open directory", path, error))?,
        };
        Run::open_on_filling(Arc::new(opened), options, memory)
    }

    /// Opens or creates a run on any storage. See [`Run::open`].
    pub fn open_on(storage: Arc<dyn Storage>, options: &Options) -> Result<Run> {
        Run::open_on_into(storage, options, &mut |_| Ok(Vec::new()))
    }

    /// Opens or creates a run on any storage. See [`Run::open_into`].
    pub fn open_on_into(storage: Arc<dyn Storage>, options: &Options, lend: Lend) -> Result<Run> {
        Run::open_on_filling(storage, options, &mut Lent::by(lend))
    }

    /// [`Run::open_on_into`] memory of any kind.
    pub(crate) fn open_on_filling(
        storage: Arc<dyn Storage>,
        options: &Options,
        memory: &mut dyn Memory,
    ) -> Result<Run> {
        check_settings(&options.settings)?;
        let directory = Directory::new(storage);
        // Looked at before the lock's file is made: a directory that is not ours stays as it is.
        check_seed(&directory, &inspect(&directory)?, options)?;
        let lock = take_lock(&directory)?;
        let nature = inspect(&directory)?; // Somebody may have made it a run meanwhile.
        check_seed(&directory, &nature, options)?;
        let config = match nature {
            Nature::Run(config) => config,
            Nature::Fresh => create(&directory, options)?,
        };
        Run::resume(directory, config, lock, options, memory)
    }

    /// Finds the newest whole checkpoint and what the journal holds behind it.
    fn resume(
        directory: Directory,
        config: Config,
        lock: Box<dyn Lock>,
        options: &Options,
        memory: &mut dyn Memory,
    ) -> Result<Run> {
        let mut survey = store::survey(&directory, &config.id)?;
        let resumed_from = choose(&mut survey, memory)?;
        let boundary = resumed_from
            .as_ref()
            .map(|checkpoint| (checkpoint.info().step, checkpoint.info().phase));
        let (newer, older): (Vec<_>, Vec<_>) = std::mem::take(&mut survey.rejected)
            .into_iter()
            .partition(|(name, ..)| boundary.is_none_or(|boundary| (name.step, name.phase) >= boundary));
        let told = |(_, name, error): &(_, String, Error)| (name.clone(), error.to_string());
        let mut rejected: Vec<(String, String)> = newer.iter().map(told).collect();
        if options.strict
            && let Some((_, _, error)) = newer.into_iter().next()
        {
            return Err(error);
        }
        let tail = match &resumed_from {
            Some(checkpoint) => behind(&directory, &config.id, checkpoint.info())?,
            None => untrained(&directory, &config.id, &mut rejected)?,
        };

        let mut warnings = tail.warnings;
        let foreign = survey.foreign.iter().map(|checkpoint| checkpoint.info());
        warnings.extend(
            foreign.map(|info| format!("checkpoint `{}` is of run {}; left alone", info.name, info.run_id)),
        );
        warnings.extend(
            survey
                .unknown
                .iter()
                .map(|name| format!("`{CHECKPOINTS}/{name}` is no checkpoint; left alone")),
        );
        warnings.extend(
            older
                .iter()
                .map(|(_, name, error)| format!("the older checkpoint `{name}` is not whole: {error}")),
        );
        if let Some(checkpoint) = &resumed_from
            && !tail.has_head
        {
            let name = &checkpoint.info().name;
            warnings.push(format!(
                "the journal does not hold the record that checkpoint `{name}` was made at"
            ));
        }

        for name in [CHECKPOINTS, OBJECTS, JOURNAL, TMP] {
            directory.create_dir(name)?;
        }
        directory.sync_dir("")?;
        match store::sweep(&directory, &survey)? {
            0 => {}
            count => warnings.push(format!(
                "removed {count} left-over files of commits that were cut short"
            )),
        }
        let mut store = Store::new(
            directory.clone(),
            config.id.clone(),
            &survey.whole,
            options.tuning,
        );
        if let Some(checkpoint) = &resumed_from {
            store.trust(checkpoint);
        }
        let lives = survey.whole.iter().map(|checkpoint| checkpoint.info().life);
        let life = lives.max().unwrap_or(0).max(tail.last_life) + 1;
        let from = boundary.map_or(0, |(step, _)| step);
        let steps = tail.boundaries.values().map(|boundary| boundary.step);
        let recorded_until = steps.max().unwrap_or(from).max(from);
        Ok(Run {
            directory,
            config,
            life,
            newest: resumed_from,
            back: OnceLock::new(),
            rejected,
            warnings,
            notices: Mutex::default(),
            recorded_until,
            recorded: Mutex::new(tail.boundaries),
            journal: Mutex::new(Pen::Idle),
            listed: Mutex::new(store.checkpoints()),
            store: Mutex::new(store),
            lock: Mutex::new(Some(lock)),
            pid: std::process::id(),
        })
    }

    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.directory.location()
    }

    /// Its name, 32 hexadecimal digits, drawn at creation.
    pub fn id(&self) -> &str {
        &self.config.id
    }

    /// Its seed.
    pub fn seed(&self) -> u64 {
        self.config.seed
    }

    /// When it was created, as an RFC 3339 timestamp.
    pub fn created(&self) -> &str {
        &self.config.created
    }

    /// What was recorded at its creation.
    pub fn settings(&self) -> &[(String, Value)] {
        &self.config.settings
    }

    /// Process lives before this one plus one.
    pub fn life(&self) -> u32 {
        self.life
    }

    /// What this life starts from, every byte of it read: the newest whole checkpoint at open, unless the run has gone
    /// back for a trial; `None` for a new run.
    pub fn resumed_from(&self) -> Option<&Checkpoint> {
        self.back
            .get()
            .map(|(checkpoint, _)| checkpoint)
            .or(self.newest.as_ref())
    }

    /// (checkpoint name, why) of each newer one that was not whole, newest first.
    pub fn rejected(&self) -> &[(String, String)] {
        &self.rejected
    }

    /// What opening found and left alone, and how many left-overs it swept.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What was noticed since this was last asked: that a prune could not delete packs, and why. Each is said once.
    pub fn take_notices(&self) -> Vec<String> {
        std::mem::take(&mut *guard(&self.notices))
    }

    /// Highest step that earlier lives recorded after `resumed_from`; its own step if none.
    pub fn recorded_until(&self) -> u64 {
        self.back.get().map_or(self.recorded_until, |(_, until)| *until)
    }

    /// Chooses steps that the journal holds, to be executed again before anything new is trained, and goes back to the
    /// checkpoint before them. Legal before [`Run::begin`], once.
    ///
    /// Nothing on disk is changed: the newest checkpoint stays what the next life starts from, and until the trial has
    /// come to it again nothing can be committed.
    ///
    /// Returns `None` where nothing can be tried; the run has not gone back then.
    ///
    /// # Errors
    ///
    /// Where the journal or a checkpoint cannot be read for another reason than damage.
    pub fn put_on_trial(&self, extent: Extent) -> Result<Option<Trial>> {
        self.put_on_trial_into(extent, &mut |_| Ok(Vec::new()))
    }

    /// Goes back like [`Run::put_on_trial`]. While it reads every byte of the checkpoint that it goes back to it leaves
    /// them in memory that it is lent: verified, if it goes back there, and unspecified if not. Where the trial starts
    /// from the newest checkpoint nothing is read.
    pub fn put_on_trial_into(&self, extent: Extent, lend: Lend) -> Result<Option<Trial>> {
        if !matches!(&*guard(&self.journal), Pen::Idle) || self.back.get().is_some() {
            return Err(Error::invalid("a trial comes before the run has begun, and once"));
        }
        let Some(newest) = &self.newest else {
            return Ok(None);
        };
        let journal = journal::read(&self.directory, &self.config.id)?;
        let mut checkpoints = self.checkpoints();
        checkpoints.reverse();
        while let Some((index, trial)) = trial::plan(&checkpoints, &journal.boundaries, extent) {
            if checkpoints[index].name == newest.info().name {
                return Ok(Some(trial));
            }
            match self.go_back(&checkpoints[index].name, trial.until.0, lend) {
                Ok(()) => return Ok(Some(trial)),
                Err(error) if store::is_damage(&error) => drop(checkpoints.remove(index)),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn go_back(&self, name: &str, recorded_until: u64, lend: Lend) -> Result<()> {
        let checkpoint = self.checkpoint(name)?;
        checkpoint.verify_into(checkpoint.lent_by(|| lend(&checkpoint))?)?;
        let tail = behind(&self.directory, &self.config.id, checkpoint.info())?;
        guard(&self.store).trust(&checkpoint);
        *guard(&self.recorded) = tail.boundaries;
        let first = self.back.set((checkpoint, recorded_until));
        assert!(first.is_ok(), "a run goes back once, and that was looked at");
        Ok(())
    }

    /// Starts this life's journal segment at `resumed_from`. Nothing is written to the journal before.
    ///
    /// # Durability
    ///
    /// On return the segment's name and header survive a power cut.
    pub fn begin(&self) -> Result<()> {
        self.check_lock()?;
        let mut pen = guard(&self.journal);
        match &*pen {
            Pen::Idle => {}
            Pen::Writing { .. } => return Err(Error::invalid("the run has begun already")),
            Pen::Closed => return Err(closed()),
        }
        let from = self.resumed_from().map(Checkpoint::info);
        let header = SegmentHeader {
            run_id: self.config.id.clone(),
            life: self.life,
            step: from.map_or(0, |info| info.step),
            phase: from.map_or(0, |info| info.phase),
            previous: from.map_or(Digest([0; 32]), |info| info.journal_head),
            created: now(),
        };
        let writer = Box::new(Writer::begin(&self.directory, &header)?);
        *pen = Pen::Writing {
            writer,
            last: from.map(|info| (info.step, info.phase)),
        };
        Ok(())
    }

    /// Appends one boundary's record, and compares it with what earlier lives recorded for the same boundary.
    ///
    /// # Durability
    ///
    /// On return the operating system has it: it survives a kill, not a power cut. The next commit syncs it.
    ///
    /// # Errors
    ///
    /// `Invalid` where the boundary does not come after the last one. After an `Io` error the same record may be given
    /// again.
    pub fn record(
        &self,
        step: u64,
        phase: u8,
        epoch: u64,
        position: u64,
        components: Vec<(String, Component)>,
    ) -> Result<Option<Difference>> {
        self.record_boundary(&Boundary::new(step, phase, epoch, position, components))
    }

    /// [`Run::record`] of a boundary that the caller keeps, to give it again after an error.
    pub fn record_boundary(&self, found: &Boundary) -> Result<Option<Difference>> {
        let (step, phase) = (found.step, found.phase);
        {
            let mut pen = guard(&self.journal);
            let (writer, last) = self.writing(&mut pen)?;
            // A run's first boundary may be recorded; a boundary that a life starts from was recorded by another.
            if last.is_some_and(|last| (step, phase) <= last) {
                let (before, before_phase) = last.expect("just looked at");
                return Err(Error::invalid(format!(
                    "boundary ({step}, {phase}) does not come after ({before}, {before_phase})"
                )));
            }
            writer.append_boundary(found)?;
            *last = Some((step, phase));
        }
        let Some(recorded) = guard(&self.recorded).remove(&(step, phase)) else {
            return Ok(None);
        };
        Ok(
            journal::first_difference(&recorded, found).map(|(component, expected, found)| Difference {
                step,
                phase,
                component,
                expected,
                found,
            }),
        )
    }

    /// Appends what is not a step: an override, a signal, a resume, a mark. Same durability as [`Run::record`].
    pub fn event(&self, kind: &str, step: u64, fields: Vec<(String, Value)>) -> Result<()> {
        let mut pen = guard(&self.journal);
        let (writer, _) = self.writing(&mut pen)?;
        writer.append(&Record::Event {
            kind: kind.to_owned(),
            step,
            fields,
            time: now(),
        })
    }

    /// Writes one checkpoint. Legal from [`Run::begin`] on.
    ///
    /// # Durability
    ///
    /// On return the checkpoint and the journal up to its boundary survive a power cut.
    ///
    /// # Errors
    ///
    /// Nothing that was committed before is touched. A full disk's error has the bytes needed and free.
    pub fn commit(&self, commit: Commit<&[u8]>) -> Result<CheckpointInfo> {
        let commit = commit.with_storages(Bytes::Here);
        Ok(self.commit_with(commit, Beside::default())?.info().clone())
    }

    /// Digests storages as a commit does that has to know whether they are on disk already.
    pub(crate) fn digest(&self, storages: &[&[u8]]) -> Vec<Digested> {
        guard(&self.store).digest(storages)
    }

    /// [`Run::commit`] of storages of which more is known.
    pub(crate) fn commit_with(&self, commit: Commit<Bytes>, beside: Beside) -> Result<Checkpoint> {
        self.check_lock()?;
        let (step, phase) = (commit.step, commit.phase);
        let mut store = guard(&self.store);
        if let Some(newest) = store.newest_boundary()
            && (step, phase) < newest
        {
            let text = format!("boundary ({step}, {phase}) is before the newest checkpoint's, {newest:?}");
            return Err(Error::invalid(text));
        }
        let begun = Instant::now();
        // What is read while it is written is not there any more afterwards.
        let mut storages: Vec<Option<&[u8]>> = commit.storages.iter().map(|bytes| bytes.at_hand()).collect();
        if storages.contains(&None) {
            let lengths: Vec<u64> = commit.storages.iter().map(|bytes| bytes.len() as u64).collect();
            for index in gathered(&commit.tree, &lengths) {
                storages[index] = Some(commit.storages[index].all());
            }
        }
        for (index, _) in &beside.known {
            storages[*index] = None; // Nobody keeps it from changing once it is known to be on disk.
        }
        let recorded_at = match &mut *guard(&self.journal) {
            Pen::Writing { writer, .. } => writer.recorded_at(step, phase),
            _ => None,
        };
        let journal_head = self.durable_head(step, phase)?;
        let outline = OnceLock::new();
        let find_outline = |checkpoint: &Checkpoint| {
            let tree = checkpoint.tree();
            let nodes = checkpoint.form().nodes.get_or_init(|| nodes_of(tree));
            outline.get_or_init(|| outline_with(Arc::clone(nodes), tree, &checkpoint.storages(), &storages));
        };
        let beside = Beside {
            meanwhile: Some(&find_outline),
            ..beside
        };
        let checkpoint = store.commit(commit, self.life, now(), journal_head, beside)?;
        let outline = outline.into_inner().expect("it was found meanwhile");
        *guard(&self.listed) = store.checkpoints();
        let durable = Instant::now();
        let saved = Saved {
            checkpoint: checkpoint.info().name.clone(),
            phase,
            durable_us: micros(durable - recorded_at.unwrap_or(begun)),
            commit_us: micros(durable - begun),
            size_bytes: checkpoint.info().size_bytes,
            new_bytes: checkpoint.info().new_bytes,
        };
        if let Pen::Writing { writer, .. } = &mut *guard(&self.journal) {
            writer.forget_before(step, phase);
            // The checkpoint is there, whatever becomes of the word about it: a journal that cannot be written is an
            // error of the next record.
            let _ = writer.saved(step, &saved, &outline, now());
        }
        Ok(checkpoint)
    }

    /// Appends the event behind a checkpoint that was made without [`Run::commit`]. Same durability as [`Run::record`].
    pub(crate) fn record_saved(&self, step: u64, saved: &Saved, outline: &Outline) -> Result<()> {
        let mut pen = guard(&self.journal);
        let (writer, _) = self.writing(&mut pen)?;
        writer.saved(step, saved, outline, now())
    }

    /// Syncs the journal and returns its chain hash at a boundary: a manifest names it, so it is made durable first.
    /// Recording may go on meanwhile.
    pub(crate) fn durable_head(&self, step: u64, phase: u8) -> Result<Digest> {
        let (journal_head, syncer) = {
            let mut pen = guard(&self.journal);
            let (writer, _) = self.writing(&mut pen)?;
            let syncer = writer.syncer()?;
            (writer.head_at(step, phase), syncer)
        };
        if let Err(error) = syncer.sync() {
            if let Pen::Writing { writer, .. } = &mut *guard(&self.journal) {
                writer.doubt();
            }
            return Err(error);
        }
        Ok(journal_head)
    }

    /// Deletes checkpoints that the policy does not keep, and returns their names, oldest first.
    ///
    /// # Errors
    ///
    /// Nothing goes before one of the newest that stay was read back in full since it was written; damage of the newest
    /// is an error, and nothing goes.
    pub fn prune(&self, policy: &Retention, dry_run: bool) -> Result<Vec<String>> {
        self.check_lock()?;
        let mut store = guard(&self.store);
        let pruned = store.prune(policy, dry_run);
        *guard(&self.listed) = store.checkpoints();
        guard(&self.notices).extend(store.take_notices());
        pruned
    }

    /// Compresses later commits otherwise, or not.
    pub fn set_compression(&self, compression: Compression) {
        guard(&self.store).set_compression(compression);
    }

    /// This run's whole checkpoints, oldest first.
    pub fn checkpoints(&self) -> Vec<CheckpointInfo> {
        guard(&self.listed).clone()
    }

    /// Opens one of the checkpoints by name, its tensors not read yet.
    ///
    /// # Errors
    ///
    /// Damage of its manifest, or of a pack's length or header.
    pub fn checkpoint(&self, name: &str) -> Result<Checkpoint> {
        Checkpoint::open_in(&self.directory, name)
    }

    /// Closes the journal and gives the lock back. Idempotent.
    ///
    /// # Errors
    ///
    /// Where the journal cannot be synced; it is closed and the lock is given back all the same.
    pub fn close(&self) -> Result<()> {
        let mut pen = guard(&self.journal);
        let synced = match std::mem::replace(&mut *pen, Pen::Closed) {
            Pen::Writing { mut writer, .. } if self.pid == std::process::id() => {
                writer.syncer().and_then(|syncer| syncer.sync())
            }
            _ => Ok(()),
        };
        drop(pen);
        // A commit that is under way has the store; the lock must not go before it is done.
        let mut store = guard(&self.store);
        if guard(&self.lock).is_some() && self.pid == std::process::id() {
            store.close();
        }
        guard(&self.lock).take();
        synced
    }

    fn check_lock(&self) -> Result<()> {
        match &*guard(&self.lock) {
            Some(lock) => lock
                .check()
                .map_err(|error| Error::io("keep the lock", self.directory.path(LOCK), error)),
            None => Err(closed()),
        }
    }

    fn writing<'a>(&self, pen: &'a mut Pen) -> Result<(&'a mut Writer, &'a mut Option<(u64, u8)>)> {
        if self.pid != std::process::id() {
            return Err(Error::invalid(
                "this process is a fork of the one that opened the run; only that one writes",
            ));
        }
        match pen {
            Pen::Writing { writer, last } => Ok((writer, last)),
            Pen::Idle => Err(Error::invalid("the run has not begun: call begin first")),
            Pen::Closed => Err(closed()),
        }
    }
}

/// Takes the lock, waiting a little for a holder that may be dying.
pub(crate) fn take_lock(directory: &Directory) -> Result<Box<dyn Lock>> {
    let begun = Instant::now();
    loop {
        match directory.lock(LOCK)? {
            Claim::Held(lock) => return Ok(lock),
            // This process itself will not let go while it waits here.
            Claim::Refused(holder)
                if holder == Some(std::process::id()) || begun.elapsed() >= LOCK_PATIENCE =>
            {
                return Err(Error::Locked {
                    path: directory.path(LOCK),
                    holder,
                });
            }
            Claim::Refused(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn closed() -> Error {
    Error::invalid("the run is closed")
}

/// Takes the newest checkpoint of which every byte is as committed; those before it become rejected.
fn choose(survey: &mut store::Survey, memory: &mut dyn Memory) -> Result<Option<Checkpoint>> {
    let mut damaged = 0;
    for checkpoint in &survey.whole {
        memory.make(checkpoint)?;
        match checkpoint.verify_into(memory.targets()) {
            Ok(()) => break,
            Err(error) if store::is_damage(&error) => {
                let info = checkpoint.info();
                let name = crate::format::manifest::parse_checkpoint_name(&info.name);
                let name = name.expect("a surveyed checkpoint has a checkpoint's name");
                survey.rejected.push((name, info.name.clone(), error));
                damaged += 1;
            }
            Err(error) => return Err(error),
        }
    }
    survey.whole.drain(..damaged);
    survey.rejected.sort_by(|(a, ..), (b, ..)| b.cmp(a));
    Ok(survey.whole.first().cloned())
}

/// What the journal holds behind the checkpoint that this life starts from.
fn behind(directory: &Directory, run_id: &str, info: &CheckpointInfo) -> Result<Tail> {
    let from = journal::From {
        place: (info.step, info.phase),
        life: info.life,
        head: info.journal_head,
    };
    journal::resume(directory, run_id, from)
}

/// What the journal of a run without a whole checkpoint holds.
///
/// Only a run that never had one may start: anything else would be a silent fresh start.
fn untrained(directory: &Directory, run_id: &str, rejected: &mut Vec<(String, String)>) -> Result<Tail> {
    let story = Story::open(directory, run_id)?;
    if rejected.is_empty() {
        let why = match story.last {
            Some((step, _)) if step > 0 => Some(format!(
                "no manifest, though the journal has records up to step {step}"
            )),
            _ if story.unreadable => Some("no manifest, and a journal that cannot be read".to_owned()),
            _ if story.foreign => Some(format!(
                "no manifest, and a journal of another run than {CONFIG} names"
            )),
            _ => None,
        };
        rejected.extend(why.map(|why| (CHECKPOINTS.to_owned(), why)));
    }
    if !rejected.is_empty() {
        return Err(Error::NoWholeCheckpoint {
            path: directory.location().to_path_buf(),
            rejected: std::mem::take(rejected),
        });
    }
    let boundaries = story.boundaries().collect::<Result<Vec<_>>>()?;
    Ok(Tail {
        boundaries: boundaries
            .into_iter()
            .map(|boundary| (boundary.place(), boundary))
            .collect(),
        has_head: true,
        warnings: story.warnings,
        last_life: story.last_life,
    })
}

fn check_settings(settings: &[(String, Value)]) -> Result<()> {
    let plain = |value: &Value| {
        matches!(
            value,
            Value::Str(_) | Value::Int(_) | Value::Float(_) | Value::Bool(_)
        )
    };
    match settings.iter().find(|(_, value)| !plain(value)) {
        Some((name, _)) => Err(Error::invalid(format!(
            "setting `{name}` must be text, an integer, a float or a boolean"
        ))),
        None => Ok(()),
    }
}

fn check_seed(directory: &Directory, nature: &Nature, options: &Options) -> Result<()> {
    if let (Nature::Run(config), Some(seed)) = (nature, options.seed)
        && config.seed != seed
    {
        let differences = vec![("seed".to_owned(), config.seed.to_string(), seed.to_string())];
        return Err(Error::Identity {
            path: directory.location().to_path_buf(),
            differences,
        });
    }
    Ok(())
}

/// Says what a directory is, changing nothing.
fn inspect(directory: &Directory) -> Result<Nature> {
    if let Some(config) = read_config(directory)? {
        return Ok(Nature::Run(config));
    }
    for name in directory.list("")? {
        let leftover = match name.as_str() {
            LOCK | TMP => true,
            CHECKPOINTS | OBJECTS | JOURNAL => matches!(directory.list(&name), Ok(names) if names.is_empty()),
            _ => false,
        };
        if !leftover {
            let what = format!("not a run directory: it holds `{name}` and no {CONFIG}");
            return Err(Error::Format {
                path: Some(directory.location().to_path_buf()),
                what,
            });
        }
    }
    Ok(Nature::Fresh)
}

/// Makes an empty directory a run; `run.toml` last, because it is what makes it one.
fn create(directory: &Directory, options: &Options) -> Result<Config> {
    let seed = match options.seed {
        Some(seed) => seed,
        None => u64::from_str_radix(&store::random_name()?[..16], 16).expect("hexadecimal digits"),
    };
    let config = Config {
        id: store::random_name()?,
        seed,
        created: now(),
        settings: options.settings.clone(),
    };
    for name in [CHECKPOINTS, OBJECTS, JOURNAL, TMP] {
        directory.create_dir(name)?;
    }
    let temporary = store::temporary_name()?;
    let mut file = directory.create_new(&temporary)?;
    file.write_all(write_config(&config).as_bytes())?;
    file.sync()?;
    directory.rename_new(&temporary, CONFIG)?;
    directory.sync_dir("")?;
    Ok(config)
}

fn write_config(config: &Config) -> String {
    let settings = config.settings.iter().map(|(name, value)| {
        let value = match value {
            Value::Str(text) => toml::Value::String(text.clone()),
            Value::Int(number) => toml::Value::Integer(*number),
            Value::Float(bits) => toml::Value::Float(f64::from_bits(*bits)),
            Value::Bool(flag) => toml::Value::Boolean(*flag),
            other => unreachable!("settings were checked at open, and here is {other:?}"),
        };
        (name.clone(), value)
    });
    let mut table = toml::Table::new();
    table.insert(
        "format".to_owned(),
        toml::Value::Integer(i64::from(FORMAT_VERSION)),
    );
    table.insert("id".to_owned(), toml::Value::String(config.id.clone()));
    table.insert("seed".to_owned(), toml::Value::String(config.seed.to_string()));
    table.insert("created".to_owned(), toml::Value::String(config.created.clone()));
    table.insert("settings".to_owned(), toml::Value::Table(settings.collect()));
    let check = Digest::of(format!("{COMMENT}\n{table}").as_bytes());
    // In front: a table would take in what follows it, and a file that ends early still has it.
    format!("{COMMENT}\n{CHECK}{check}\"\n{table}")
}

/// Says whether a run.toml is as it was written. Those of the first releases have no check.
fn verify_config(text: &str, table: &toml::Table) -> std::result::Result<(), Flaw> {
    let known = |name: &String| CONFIG_KEYS.contains(&name.as_str());
    if let Some(name) = table.keys().find(|name| !known(name)) {
        return Err(Flaw::malformed(format!("its `{name}` is never written")));
    }
    // Without a check only what those wrote: a check that a flipped bit made a comment of is missed.
    if !table.contains_key("check") && text.starts_with(&format!("{COMMENT}\ncreated")) {
        return Ok(());
    }
    let is_check = |line: &&str| line.starts_with(CHECK);
    let line = text
        .split_inclusive('\n')
        .nth(1)
        .filter(is_check)
        .unwrap_or_default();
    let found = Digest::of(text.replacen(line, "", 1).as_bytes());
    if line == format!("{CHECK}{found}\"\n") {
        return Ok(());
    }
    let expected = line.trim_start_matches(CHECK).chars().take(16).collect();
    Err(Flaw::Damaged {
        part: CONFIG.to_owned(),
        expected,
        found: found.short(),
    })
}

/// Reads `run.toml`; `None` where there is none.
fn read_config(directory: &Directory) -> Result<Option<Config>> {
    let bytes = match directory.read_all(CONFIG, MAX_CONFIG) {
        Err(error) if not_found(&error) => return Ok(None),
        bytes => bytes?,
    };
    let flawed = |flaw: Flaw| flaw.at(directory.path(CONFIG));
    let malformed = |what: String| flawed(Flaw::Malformed { what });
    let text = String::from_utf8(bytes).map_err(|_| malformed("it is not UTF-8".to_owned()))?;
    let table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| malformed(error.message().to_owned()))?;
    match table.get("format").and_then(toml::Value::as_integer) {
        Some(version) if version == i64::from(FORMAT_VERSION) => {}
        Some(version) => {
            let what =
                format!("a run of format version {version}; this release reads version {FORMAT_VERSION}");
            return Err(malformed(what));
        }
        None => return Err(malformed("it has no integer `format`".to_owned())),
    }
    verify_config(&text, &table).map_err(flawed)?;
    let text_of = |name: &str| {
        let text = table.get(name).and_then(toml::Value::as_str).map(str::to_owned);
        text.ok_or_else(|| malformed(format!("it has no text `{name}`")))
    };
    let id = text_of("id")?;
    if !(1..=64).contains(&id.len())
        || !id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    {
        return Err(malformed(
            "its `id` is not 1 to 64 letters, digits and hyphens".to_owned(),
        ));
    }
    let seed = text_of("seed")?
        .parse()
        .map_err(|_| malformed("its `seed` is no number below 2^64".to_owned()))?;
    let mut settings = Vec::new();
    for (name, value) in table
        .get("settings")
        .and_then(toml::Value::as_table)
        .into_iter()
        .flatten()
    {
        let value = match value {
            toml::Value::String(text) => Value::Str(text.clone()),
            toml::Value::Integer(number) => Value::Int(*number),
            toml::Value::Float(number) => Value::Float(number.to_bits()),
            toml::Value::Boolean(flag) => Value::Bool(*flag),
            _ => {
                return Err(malformed(format!(
                    "its setting `{name}` is of a type that is never written"
                )));
            }
        };
        settings.push((name.clone(), value));
    }
    Ok(Some(Config {
        id,
        seed,
        created: text_of("created")?,
        settings,
    }))
}

/// Opens the directory of a run for reading, without a lock.
pub(crate) fn open_to_read(path: &Path) -> Result<(Directory, Config)> {
    let storage = DiskStorage::open(path).map_err(|error| Error::io("open directory", path, error))?;
    let directory = Directory::new(Arc::new(storage));
    let config = require_config(&directory)?;
    Ok((directory, config))
}

/// Reads `run.toml` of a directory that has to be a run's.
pub(crate) fn require_config(directory: &Directory) -> Result<Config> {
    read_config(directory)?.ok_or_else(|| Error::Format {
        path: Some(directory.location().to_path_buf()),
        what: format!("not a run directory: it has no {CONFIG}"),
    })
}

/// Opens a checkpoint for reading, without a lock: a manifest's path, or a run directory (its newest whole one).
///
/// # Errors
///
/// `NoWholeCheckpoint` for a run without one; for a manifest's path its damage. Given a run directory, every byte of
/// the checkpoint was read; given a manifest, its tensors are verified as they are read.
pub fn read_checkpoint(path: &Path) -> Result<Checkpoint> {
    if !path.is_dir() {
        return Checkpoint::open(path);
    }
    read_checkpoint_into(path, &mut |_| Ok(Vec::new()))
}

/// Opens a checkpoint like [`read_checkpoint`] and reads every byte of it, once, into memory that it is lent.
///
/// # Errors
///
/// Those of [`read_checkpoint`], and damage of a manifest's tensors. The memory's content is unspecified then.
pub fn read_checkpoint_into(path: &Path, lend: Lend) -> Result<Checkpoint> {
    if !path.is_dir() {
        let checkpoint = Checkpoint::open(path)?;
        checkpoint.verify_into(checkpoint.lent_by(|| lend(&checkpoint))?)?;
        return Ok(checkpoint);
    }
    newest_whole(path, |survey| choose(survey, &mut Lent::by(lend)))
}

/// Opens a checkpoint for reading some of its tensors: a manifest's path, or a run directory, of which it takes the
/// newest one whose manifest is whole and whose packs are there. None of its tensors is read before it is asked for.
///
/// # Errors
///
/// Those of [`read_checkpoint`].
pub fn open_checkpoint(path: &Path) -> Result<Checkpoint> {
    if !path.is_dir() {
        return Checkpoint::open(path);
    }
    newest_whole(path, |survey| Ok(survey.whole.first().cloned()))
}

fn newest_whole(
    path: &Path,
    choose: impl FnOnce(&mut store::Survey) -> Result<Option<Checkpoint>>,
) -> Result<Checkpoint> {
    let (directory, config) = open_to_read(path)?;
    let mut survey = store::survey(&directory, &config.id)?;
    if let Some(checkpoint) = choose(&mut survey)? {
        return Ok(checkpoint);
    }
    let rejected = survey
        .rejected
        .iter()
        .map(|(_, name, error)| (name.clone(), error.to_string()))
        .collect();
    Err(Error::NoWholeCheckpoint {
        path: path.to_path_buf(),
        rejected,
    })
}

/// What can be said of a run directory without its lock: its checkpoints, oldest first, and what is not whole.
#[derive(Debug)]
pub struct Overview {
    /// Its id.
    pub id: String,
    /// Its seed.
    pub seed: u64,
    /// When it was created, as an RFC 3339 timestamp.
    pub created: String,
    /// What was recorded at its creation.
    pub settings: Vec<(String, Value)>,
    /// Checkpoints with whole manifests and packs that are there, oldest first; their tensors were not read.
    pub checkpoints: Vec<Checkpoint>,
    /// (name, why) of those that are not whole, newest first.
    pub rejected: Vec<(String, Error)>,
    /// Checkpoints of other runs.
    pub foreign: Vec<Checkpoint>,
}

/// Looks at a run directory without its lock, changing nothing.
pub fn read_run(path: &Path) -> Result<Overview> {
    let (directory, config) = open_to_read(path)?;
    let mut survey = store::survey(&directory, &config.id)?;
    survey.whole.reverse();
    Ok(Overview {
        id: config.id,
        seed: config.seed,
        created: config.created,
        settings: config.settings,
        checkpoints: survey.whole,
        rejected: survey
            .rejected
            .into_iter()
            .map(|(_, name, error)| (name, error))
            .collect(),
        foreign: survey.foreign,
    })
}

/// Reads and joins the journal of a run directory, without a lock.
pub fn read_journal(path: &Path) -> Result<Journal> {
    let (directory, config) = open_to_read(path)?;
    journal::read(&directory, &config.id)
}

/// Opens the journal of a run directory to be read step by step, without a lock.
pub fn read_story(path: &Path) -> Result<Story> {
    read_story_with(path, &[])
}

/// Opens the journal like [`read_story`], looking for chain hashes on the way.
pub fn read_story_with(path: &Path, heads: &[Digest]) -> Result<Story> {
    let (directory, config) = open_to_read(path)?;
    Story::open_with(&directory, &config.id, heads)
}
