//! The loop: epochs and steps handed out, each boundary recorded and compared, checkpoints committed, stops obeyed.
//!
//! Touches: the run directory through [`Run`]; the environment variables `UNBROKEN_JOURNAL` and `UNBROKEN_ALLOW`, and
//! those of a proof; the registered generators, before each step and at each epoch's end.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::draws::Draws;
use super::full::{FullDisk, OnFull, Then};
use super::loader::{Batch, Loader};
use super::policy::Policy;
use super::proving::Instructions;
use super::source::Reseed;
use super::state::{Contents, Digests, Sizes, StateReader, StateWriter, Stateful, Wanted};
use super::stop::Stop;
use crate::digest::{Digest, Fingerprint};
use crate::error::{Error, Result};
use crate::format::journal::Component;
use crate::journal::Boundary;
use crate::key;
use crate::run::{self, Difference, Run};
use crate::state::Value;
use crate::storage::Directory;
use crate::storage::disk::DiskStorage;
use crate::store::{Checkpoint, Commit, Compression, Retention, Tuning};

const IN_EPOCH: u8 = 0;
const BETWEEN_EPOCHS: u8 = 1;
const FINISHED: u8 = 2;

/// So many records are kept at most that a full disk does not take.
const MOST_UNWRITTEN: usize = 10_000;

/// The largest program that is digested, in bytes: reading it must not be felt.
const MAX_PROGRAM: u64 = 256 << 20;

/// Exit code after a stop request: EX_TEMPFAIL, "try again later", which requeueing launchers can be told to act on.
pub const REQUEUE_CODE: u8 = 75;

/// How much of the state each step's record digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// A rotating window of each part.
    Sampled,
    /// All of it.
    Full,
}

/// How a training is to go, until it starts.
pub struct Options {
    path: PathBuf,
    seed: Option<u64>,
    epochs: u64,
    policy: Policy,
    keep: Retention,
    compression: Compression,
    level: Level,
    identity: Vec<(String, Value)>,
    allow: Vec<String>,
    generators: Vec<(String, Box<dyn Reseed>)>,
    strict: bool,
    on_full: OnFull,
    go_on_after_divergence: bool,
    obey_signals: bool,
}

impl Training {
    /// A training in this run directory, made if missing.
    pub fn at(path: impl Into<PathBuf>) -> Options {
        Options {
            path: path.into(),
            seed: None,
            epochs: 1,
            policy: Policy::default(),
            keep: Retention {
                last: Some(3),
                ..Retention::default()
            },
            compression: Compression::None,
            level: Level::Sampled,
            identity: Vec::new(),
            allow: Vec::new(),
            generators: Vec::new(),
            strict: false,
            on_full: OnFull::Stop,
            go_on_after_divergence: false,
            obey_signals: true,
        }
    }
}

impl Options {
    /// Seed of the run, from which every order and key comes. Drawn and recorded if not given.
    pub fn seed(self, seed: u64) -> Options {
        Options {
            seed: Some(seed),
            ..self
        }
    }

    /// How many epochs the whole run has, over all lives; 1 if not given.
    pub fn epochs(self, epochs: u64) -> Options {
        Options { epochs, ..self }
    }

    /// When to save; by default once a minute and at epoch ends.
    pub fn policy(self, policy: Policy) -> Options {
        Options { policy, ..self }
    }

    /// What to keep; by default the newest three steps.
    pub fn keep(self, keep: Retention) -> Options {
        Options { keep, ..self }
    }

    /// Whether checkpoints are compressed; by default they are not. Each life may do otherwise.
    pub fn compress(self, compression: Compression) -> Options {
        Options { compression, ..self }
    }

    /// How much of the state each record digests; by default a sample. `UNBROKEN_JOURNAL` overrides it.
    pub fn journal(self, level: Level) -> Options {
        Options { level, ..self }
    }

    /// Something that may not change between lives: a width, a learning rate, a fingerprint of the data.
    pub fn identity(mut self, name: &str, value: impl Into<Value>) -> Options {
        self.identity.push((format!("user.{name}"), value.into()));
        self
    }

    /// Goes on in spite of a difference of this name; the journal records it.
    pub fn allow(mut self, name: &str) -> Options {
        self.allow.push(name.to_owned());
        self
    }

    /// A generator that can only be seeded: it is set before every step and at each epoch's end.
    pub fn generator(mut self, name: &str, generator: impl Reseed + 'static) -> Options {
        self.generators.push((name.to_owned(), Box::new(generator)));
        self
    }

    /// Refuses a damaged newest checkpoint instead of falling back to the next older one.
    pub fn strict(self) -> Options {
        Options { strict: true, ..self }
    }

    /// What a full disk means; by default the training ends with the error.
    pub fn on_full(self, on_full: OnFull) -> Options {
        Options { on_full, ..self }
    }

    /// Marks the run instead of ending it when a step executed again differs from the journal.
    pub fn go_on_after_divergence(self) -> Options {
        Options {
            go_on_after_divergence: true,
            ..self
        }
    }

    /// Leaves SIGTERM, SIGINT and SIGUSR1 to the program.
    pub fn leave_signals_alone(self) -> Options {
        Options {
            obey_signals: false,
            ..self
        }
    }

    /// Opens the run; a new one saves its first state, an older one is put back where it was.
    ///
    /// # Errors
    ///
    /// [`Error::Identity`] where the program is not the one of the checkpoint; those of opening a run.
    pub fn start(mut self, state: &mut dyn Stateful) -> Result<Training> {
        if cfg!(target_endian = "big") {
            return Err(Error::Unsupported {
                what: "training on a big-endian machine".to_owned(),
            });
        }
        match std::env::var("UNBROKEN_JOURNAL").as_deref() {
            Ok("full") => self.level = Level::Full,
            Ok("sampled") => self.level = Level::Sampled,
            Ok(other) => {
                return Err(Error::invalid(format!(
                    "UNBROKEN_JOURNAL is `{other}`, not `sampled` or `full`"
                )));
            }
            Err(_) => {}
        }
        if let Ok(names) = std::env::var("UNBROKEN_ALLOW") {
            self.allow.extend(
                names
                    .split(',')
                    .filter(|name| !name.is_empty())
                    .map(str::to_owned),
            );
        }
        let proof = Instructions::read(&self.path, |name| std::env::var(name).ok())?;
        if proof.directory.is_some() {
            // What is compared needs every byte and every checkpoint, and goes on at a difference to show its extent.
            if !proof.own_journal {
                self.level = Level::Full;
            }
            self.keep = Retention::default();
            self.go_on_after_divergence = true;
            self.seed = self.seed.or(proof.seed);
            self.path = proof.place(&self.path);
        }
        self.start_in(proof, state, Run::open_filling)
    }

    /// Starts in the run that `open` opens, reading its newest checkpoint once.
    fn start_in(
        self,
        proof: Instructions,
        state: &mut dyn Stateful,
        open: impl FnOnce(&Path, &run::Options, &mut dyn run::Memory) -> Result<Run>,
    ) -> Result<Training> {
        let options = run::Options {
            seed: self.seed,
            settings: vec![("front".to_owned(), Value::from("rust"))],
            strict: self.strict,
            tuning: Tuning {
                compression: self.compression,
                ..Tuning::default()
            },
        };
        let mut contents = Contents::default();
        let run = open(&self.path, &options, &mut contents)?;
        let mut training = Training::new(self, run, proof);
        training.begin(state, contents)?;
        Ok(training)
    }
}

/// Where a training is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    step: u64,
    epoch: u64,
    /// Batches handed out in this epoch.
    position: u64,
    finished: bool,
}

impl Place {
    fn lowered(&self) -> Value {
        let entry = |name: &str, value: Value| (Value::Str(name.to_owned()), value);
        Value::dict(vec![
            entry("step", self.step.into()),
            entry("epoch", self.epoch.into()),
            entry("position", self.position.into()),
            entry("finished", self.finished.into()),
        ])
    }

    fn raised(checkpoint: &Checkpoint) -> Result<Place> {
        let tree = checkpoint.tree();
        let place = tree.get("run");
        let count = |name| match place.and_then(|place| place.get(name)) {
            Some(Value::Int(number)) if *number >= 0 => Some(number.unsigned_abs()),
            _ => None,
        };
        let finished = matches!(
            place.and_then(|place| place.get("finished")),
            Some(Value::Bool(true))
        );
        match (count("step"), count("epoch"), count("position")) {
            (Some(step), Some(epoch), Some(position)) => Ok(Place {
                step,
                epoch,
                position,
                finished,
            }),
            _ => Err(Error::Format {
                path: Some(checkpoint.info().path.clone()),
                what: "it does not say where in the training it was taken".to_owned(),
            }),
        }
    }
}

/// What the loop is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Now {
    /// Before the first `next_epoch`, or at a boundary between epochs.
    BetweenEpochs,
    /// Between two steps.
    InEpoch,
    /// A step is handed out.
    InStep,
    /// The last step is done, and the user's work after it is being done.
    AfterSteps,
}

/// One training over any number of process lives.
pub struct Training {
    run: Run,
    options: Options,
    place: Place,
    now: Now,
    /// Whether the run is being completed before its planned end.
    finishing: bool,
    /// Whether the current epoch was begun by an earlier life and is to be handed out again.
    resumed_in_epoch: bool,
    log: Vec<(String, Component)>,
    metrics: BTreeMap<String, f64>,
    identity: Vec<(String, Value)>,
    recorded_identity: Vec<(String, Value)>,
    environment: Vec<(String, Value)>,
    notes: Vec<String>,
    stop: Stop,
    last_commit: Instant,
    proof: Instructions,
    pin_next: bool,
    replayed: u64,
    full: FullDisk,
    /// Records that a full disk did not take, in their order.
    unwritten: VecDeque<Boundary>,
    /// What the state's parts had at the last boundary: it tells where a window will lie.
    sizes: Sizes,
}

impl Training {
    fn new(options: Options, run: Run, proof: Instructions) -> Training {
        let mut notes: Vec<String> = run.warnings().to_vec();
        notes.extend(
            run.rejected()
                .iter()
                .map(|(name, why)| format!("checkpoint {name} is not whole and was passed over: {why}")),
        );
        let mut identity = vec![("plan.epochs".to_owned(), Value::from(options.epochs))];
        identity.extend(
            options
                .generators
                .iter()
                .map(|(name, _)| (format!("rng.{name}"), Value::from("derived"))),
        );
        identity.extend(options.identity.iter().cloned());
        Training {
            full: FullDisk::new(options.on_full),
            unwritten: VecDeque::new(),
            options,
            run,
            place: Place::default(),
            now: Now::BetweenEpochs,
            finishing: false,
            resumed_in_epoch: false,
            log: Vec::new(),
            metrics: BTreeMap::new(),
            identity,
            recorded_identity: Vec::new(),
            environment: environment(),
            notes,
            stop: Stop::default(),
            last_commit: Instant::now(),
            proof,
            pin_next: false,
            replayed: 0,
            sizes: Sizes::default(),
        }
    }

    fn begin(&mut self, state: &mut dyn Stateful, contents: Contents) -> Result<()> {
        let Some(checkpoint) = self.run.resumed_from().cloned() else {
            self.run.begin()?;
            self.obey_signals()?;
            // What makes its first numbers when they are first read makes the same ones in every run of this seed.
            self.reseed("start")?;
            self.commit(IN_EPOCH, state, true)?;
            self.proof.reached("saved", 0);
            return Ok(());
        };
        self.place = Place::raised(&checkpoint)?;
        self.metrics = checkpoint.info().metrics.iter().cloned().collect();
        self.recorded_identity = checkpoint.info().identity.clone();
        let allowed = self.check_identity(|name| !name.starts_with("loader."))?;
        self.restore(&checkpoint, &contents, state)?;
        drop(contents); // What the program did not take is not needed while it trains.
        for (name, recorded, current) in changed(&checkpoint.info().environment, &self.environment) {
            self.notes.push(format!(
                "the environment changed: {name} was {recorded}, is {current}; compare what the journal says"
            ));
        }
        if self.place.finished && allowed.is_empty() {
            return Ok(());
        }
        self.place.finished = false;
        self.resumed_in_epoch = checkpoint.info().phase == IN_EPOCH && self.place.step > 0;
        self.run.begin()?;
        self.obey_signals()?;
        self.note_overrides(allowed)?;
        if self.proof.saves_restored() {
            let phase = if self.resumed_in_epoch {
                IN_EPOCH
            } else {
                BETWEEN_EPOCHS
            };
            self.commit(phase, state, true)?;
        }
        Ok(())
    }

    fn obey_signals(&self) -> Result<()> {
        if self.options.obey_signals {
            self.stop.install()
        } else {
            Ok(())
        }
    }

    /// Returns the allowed differences; refuses the others, all of them by name.
    fn check_identity(&self, concerns: impl Fn(&str) -> bool) -> Result<Vec<(String, String, String)>> {
        let of = |identity: &[(String, Value)]| -> Vec<(String, Value)> {
            identity
                .iter()
                .filter(|(name, _)| concerns(name))
                .cloned()
                .collect()
        };
        let differences = changed(&of(&self.recorded_identity), &of(&self.identity));
        let (allowed, refused): (Vec<_>, Vec<_>) = differences
            .into_iter()
            .partition(|(name, ..)| self.options.allow.contains(name));
        if refused.is_empty() {
            return Ok(allowed);
        }
        Err(Error::Identity {
            path: self.options.path.clone(),
            differences: refused,
        })
    }

    fn note_overrides(&mut self, allowed: Vec<(String, String, String)>) -> Result<()> {
        for (name, recorded, current) in allowed {
            let fields = vec![
                ("name".to_owned(), Value::Str(name)),
                ("recorded".to_owned(), Value::Str(recorded)),
                ("current".to_owned(), Value::Str(current)),
            ];
            self.run.event("override", self.place.step, fields)?;
        }
        Ok(())
    }

    fn restore(&self, checkpoint: &Checkpoint, contents: &Contents, state: &mut dyn Stateful) -> Result<()> {
        let Some(objects) = checkpoint.tree().get("objects") else {
            let what = "it holds no `objects`".to_owned();
            return Err(Error::Format {
                path: Some(checkpoint.info().path.clone()),
                what,
            });
        };
        let mut reader = StateReader::new(checkpoint, contents, "", objects)?;
        state.restore(&mut reader)?;
        reader.finish()
    }

    /// The run's seed.
    pub fn seed(&self) -> u64 {
        self.run.seed()
    }

    /// Steps done, over all lives.
    pub fn step(&self) -> u64 {
        self.place.step
    }

    /// The current epoch, counted from 0.
    pub fn epoch(&self) -> u64 {
        self.place.epoch
    }

    /// Batches handed out in the current epoch.
    pub fn position(&self) -> u64 {
        self.place.position
    }

    /// Process lives of this run, this one included.
    pub fn life(&self) -> u32 {
        self.run.life()
    }

    /// Whether the run is complete.
    pub fn is_finished(&self) -> bool {
        self.place.finished
    }

    /// How many steps of this life an earlier life had done and recorded; all of them came out the same.
    pub fn steps_proven(&self) -> u64 {
        self.replayed
    }

    /// What a person may want to know: passed-over checkpoints, a changed environment; later on, what keeps the packs of
    /// deleted checkpoints from being deleted.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Begins the next epoch, or goes on with the one that was interrupted; ends the one before. `None` when all are
    /// done: the run is complete then, and saved.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`] after a stop request; [`Error::Diverged`]; those of the disk.
    pub fn next_epoch(&mut self, state: &mut dyn Stateful) -> Result<Option<u64>> {
        match self.now {
            Now::AfterSteps => self.end_epoch(state)?,
            Now::BetweenEpochs => {}
            Now::InEpoch | Now::InStep => {
                return Err(Error::invalid(format!(
                    "epoch {} has steps left: call `next_step` until it returns none, or `leave_epoch`",
                    self.place.epoch
                )));
            }
        }
        if self.place.finished {
            return Ok(None);
        }
        if self.place.epoch >= self.options.epochs {
            self.finish(state)?;
            return Ok(None);
        }
        if !std::mem::take(&mut self.resumed_in_epoch) {
            self.place.position = 0;
        }
        self.now = Now::InEpoch;
        Ok(Some(self.place.epoch))
    }

    /// Hands out the next step of this epoch; `None` when there are no more.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] where the batch cannot be made; [`Error::Identity`] where the loader is not the one of the
    /// checkpoint; a generator's own.
    pub fn next_step<T: Send + 'static>(&mut self, loader: &mut Loader<T>) -> Result<Option<Step<'_, T>>> {
        if !self.begin_step()? {
            return Ok(None);
        }
        let batch = self.next_batch(loader)?;
        self.reseed("generator")?;
        let Some(batch) = batch else {
            self.now = Now::AfterSteps;
            self.proof.reached("work", self.place.epoch);
            return Ok(None);
        };
        self.now = Now::InStep;
        let mut components = Vec::with_capacity(16);
        components.push(("data/indices".to_owned(), indices_digest(&batch.indices)));
        components.extend(
            batch
                .digest
                .map(|digest| ("data/batch".to_owned(), of_fingerprint(digest))),
        );
        Ok(Some(Step {
            training: self,
            components,
            content: Some(batch),
        }))
    }

    /// Whether there may be a step now.
    fn begin_step(&self) -> Result<bool> {
        match self.now {
            Now::InEpoch => Ok(true),
            Now::AfterSteps => Ok(false),
            Now::InStep => Err(Error::invalid(format!(
                "step {} was not committed",
                self.place.step + 1
            ))),
            Now::BetweenEpochs => Err(Error::invalid("a step needs an epoch: call `next_epoch` first")),
        }
    }

    fn next_batch<T: Send + 'static>(&mut self, loader: &mut Loader<T>) -> Result<Option<Batch<T>>> {
        let here = (self.place.epoch, self.place.position);
        let at_hand = loader
            .open
            .as_ref()
            .is_some_and(|(epoch, pass)| (*epoch, pass.position()) == here);
        if !at_hand {
            self.meet(loader)?;
            let pass = loader.pass(self.loader_seed(), self.place.epoch, self.place.position)?;
            loader.open = Some((self.place.epoch, pass));
        }
        let (_, pass) = loader.open.as_mut().expect("the pass that was just opened");
        let batch = pass.next().transpose()?;
        if batch.is_none() {
            loader.open = None;
        }
        Ok(batch)
    }

    /// Compares the loader with the one of the checkpoint.
    fn meet<T: Send + 'static>(&mut self, loader: &Loader<T>) -> Result<()> {
        self.identity.retain(|(name, _)| !name.starts_with("loader."));
        self.identity.extend(
            loader
                .identity()
                .into_iter()
                .map(|(name, value)| (format!("loader.{name}"), value)),
        );
        if self
            .recorded_identity
            .iter()
            .any(|(name, _)| name.starts_with("loader."))
        {
            let allowed = self.check_identity(|name| name.starts_with("loader."))?;
            self.note_overrides(allowed)?;
        }
        // From here on the program's own loader counts.
        self.recorded_identity
            .retain(|(name, _)| !name.starts_with("loader."));
        Ok(())
    }

    /// Seed of the loader, as the Python front derives it for a loader of this name.
    fn loader_seed(&self) -> u64 {
        let key = key::derive_key(self.seed(), "loader/loader", 0, 0);
        u64::from_le_bytes(key[..8].try_into().expect("eight of 32 bytes"))
    }

    /// Key of this place for a purpose of the program's own.
    fn key(&self, purpose: &str) -> [u8; 32] {
        key::derive_key(
            self.seed(),
            &format!("step/{purpose}"),
            self.place.epoch,
            self.place.position,
        )
    }

    /// Sets every generator from a key of this place and this purpose.
    fn reseed(&mut self, purpose: &str) -> Result<()> {
        let (seed, place) = (self.run.seed(), self.place);
        for (name, generator) in &mut self.options.generators {
            let purpose = format!("{purpose}/{name}");
            generator.reseed(key::derive_key(seed, &purpose, place.epoch, place.position))?;
        }
        Ok(())
    }

    /// The keys of this place, for the journal: a generator that is keyed otherwise shows up by name.
    fn add_keys(&self, components: &mut Vec<(String, Component)>) {
        let component = |name: &str, key: [u8; 32]| (format!("rng/{name}"), Component::Digest(key.to_vec()));
        components.push(component("key", self.key("")));
        for (name, _) in &self.options.generators {
            let purpose = format!("generator/{name}");
            let key = key::derive_key(self.seed(), &purpose, self.place.epoch, self.place.position);
            components.push(component(name, key));
        }
    }

    /// Puts a number into the next record, by its bits; the last finite value is kept in the checkpoint as a metric.
    ///
    /// The last value under a name counts.
    pub fn log(&mut self, name: &str, value: f64) {
        let (name_of_component, component) = (format!("log/{name}"), Component::Float(value.to_bits()));
        self.log.retain(|(there, _)| *there != name_of_component);
        self.log.push((name_of_component, component));
        if !value.is_finite() {
            return;
        }
        match self.metrics.get_mut(name) {
            Some(there) => *there = value,
            None => drop(self.metrics.insert(name.to_owned(), value)),
        }
    }

    /// Saves the next boundary and keeps that checkpoint whatever the retention says.
    pub fn pin(&mut self) {
        self.pin_next = true;
    }

    /// Leaves the steps of this epoch that are left out.
    ///
    /// To be decided before [`Training::next_step`] from what comes back on a resume, such as [`Training::position`]: what
    /// is decided after a step's commit is not decided again by a life that goes on from there.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where a step is handed out and not committed.
    pub fn leave_epoch(&mut self) -> Result<()> {
        if self.begin_step()? {
            // After the epoch's work generators stand where they would after its last step.
            self.reseed("generator")?;
            self.now = Now::AfterSteps;
        }
        Ok(())
    }

    fn end_step(&mut self, mut components: Vec<(String, Component)>, state: &mut dyn Stateful) -> Result<()> {
        self.add_keys(&mut components);
        self.place.step += 1;
        self.place.position += 1;
        self.now = Now::InEpoch;
        self.boundary(IN_EPOCH, components, state)
    }

    fn end_epoch(&mut self, state: &mut dyn Stateful) -> Result<()> {
        self.place.epoch += 1;
        self.place.position = 0;
        self.now = Now::BetweenEpochs;
        self.boundary(BETWEEN_EPOCHS, Vec::new(), state)
    }

    fn boundary(
        &mut self,
        phase: u8,
        mut components: Vec<(String, Component)>,
        state: &mut dyn Stateful,
    ) -> Result<()> {
        components.append(&mut self.log);
        let digests = self.digests(state)?;
        components.extend(
            digests
                .into_iter()
                .map(|(name, digest)| (name, of_fingerprint(digest))),
        );
        let Place {
            step,
            epoch,
            position,
            ..
        } = self.place;
        self.unwritten
            .push_back(Boundary::new(step, phase, epoch, position, components));
        self.record()?;
        let in_epoch = phase == IN_EPOCH;
        if in_epoch {
            self.proof.reached("step", step);
        } else {
            self.proof.reached("epoch", epoch - 1);
        }
        if self.finishing {
            // A checkpoint from which a resume would train on must not be the newest for a moment.
            return Ok(());
        }
        let proven = in_epoch && self.proof.steps.is_some_and(|steps| step >= steps);
        let reason = self.stop.reason().or(proven.then_some("the last step to prove"));
        if reason.is_some() || self.is_due(phase) {
            self.commit(phase, state, reason.is_some())?;
            if in_epoch {
                self.proof.reached("saved", step);
            }
        }
        match reason {
            None => Ok(()),
            Some(reason) => {
                let fields = vec![("reason".to_owned(), Value::from(reason))];
                self.run.event("stopped", step, fields)?;
                Err(Error::Stopped {
                    path: self.options.path.clone(),
                    step,
                    reason: reason.to_owned(),
                })
            }
        }
    }

    /// Writes the records that there are, as far as a full disk takes them.
    fn record(&mut self) -> Result<()> {
        while let Err(error) = self.write_records() {
            let required = self.unwritten.len() > MOST_UNWRITTEN;
            match self.full.refused(error, required, &self.stop, &mut self.notes)? {
                Then::Again => {}
                Then::Without => return Ok(()),
            }
        }
        self.full.took(&mut self.notes);
        Ok(())
    }

    fn write_records(&mut self) -> Result<()> {
        while let Some(boundary) = self.unwritten.front() {
            let (step, phase) = (boundary.step, boundary.phase);
            let difference = self.run.record_boundary(boundary)?;
            self.unwritten.pop_front();
            if let Some(difference) = difference {
                self.diverged(difference)?;
            } else if phase == IN_EPOCH && step <= self.run.recorded_until() {
                self.replayed += 1;
            }
        }
        Ok(())
    }

    /// Digests of the state for this boundary's record.
    fn digests(&mut self, state: &mut dyn Stateful) -> Result<Digests> {
        let wanted = match self.options.level {
            Level::Full => Wanted::All,
            Level::Sampled => Wanted::Windows(self.place.step),
        };
        let mut attempt = |sizes| {
            let mut writer = StateWriter::new(wanted, sizes);
            state.state(&mut writer)?;
            writer.digests()
        };
        let (found, sizes) = attempt(std::mem::take(&mut self.sizes))?;
        let (found, sizes) = match found {
            Some(_) => (found, sizes),
            None => attempt(Sizes::default())?,
        };
        self.sizes = sizes;
        found.ok_or_else(|| Error::invalid("the state is to be written again, however often it is"))
    }

    fn is_due(&self, phase: u8) -> bool {
        let step = self.place.step;
        self.pin_next
            || self.proof.saves(step, phase)
            || self.options.policy.due(step, phase, self.last_commit.elapsed())
    }

    fn diverged(&mut self, difference: Difference) -> Result<()> {
        let Difference {
            step,
            component,
            expected,
            found,
            ..
        } = difference;
        let fields = vec![
            ("component".to_owned(), Value::Str(component.clone())),
            ("expected".to_owned(), Value::Str(expected.clone())),
            ("found".to_owned(), Value::Str(found.clone())),
        ];
        let told = self.run.event("diverged", step, fields);
        if self.options.go_on_after_divergence {
            return match told {
                Err(error) if error.is_full() => {
                    let what =
                        format!("step {step} differs in {component}: {expected} was recorded, {found} found");
                    self.notes
                        .push(format!("{what}; the journal had no room for it: {error}"));
                    Ok(())
                }
                told => told,
            };
        }
        // Whatever became of the word about it: a full disk must not hide it.
        Err(Error::Diverged {
            path: self.options.path.clone(),
            step,
            component,
            expected,
            found,
        })
    }

    /// Completes the run here, before its planned end: early stopping. Starting it again trains nothing.
    ///
    /// To be decided when an epoch's steps are done: a life that is killed before the completion is saved decides again.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where a step is handed out and not committed; those of [`Training::next_epoch`].
    pub fn finish(&mut self, state: &mut dyn Stateful) -> Result<()> {
        self.leave_epoch_if_open()?;
        if self.now == Now::AfterSteps {
            self.finishing = true;
            self.end_epoch(state)?;
        }
        if self.place.finished {
            return Ok(());
        }
        self.place.finished = true;
        self.commit(FINISHED, state, true)
    }

    fn leave_epoch_if_open(&mut self) -> Result<()> {
        if self.now == Now::BetweenEpochs {
            Ok(())
        } else {
            self.leave_epoch()
        }
    }

    /// Saves this boundary; one that is not required may be left out where the disk is full.
    fn commit(&mut self, phase: u8, state: &mut dyn Stateful, required: bool) -> Result<()> {
        self.proof.reached("saving", self.place.step);
        let saved = loop {
            match self.try_to_commit(phase, state) {
                Ok(()) => break true,
                Err(error) => match self.full.refused(error, required, &self.stop, &mut self.notes)? {
                    Then::Again => {}
                    Then::Without => break false,
                },
            }
        };
        self.last_commit = Instant::now();
        if saved {
            self.pin_next = false;
            self.full.took(&mut self.notes);
            self.run.prune(&self.options.keep, false)?;
            self.notes.extend(self.run.take_notices());
        }
        Ok(())
    }

    fn try_to_commit(&mut self, phase: u8, state: &mut dyn Stateful) -> Result<()> {
        self.write_records()?;
        let mut writer = StateWriter::new(Wanted::All, Sizes::default());
        state.state(&mut writer)?;
        let (objects, storages) = writer.finish()?;
        let entry = |name: &str, value: Value| (Value::Str(name.to_owned()), value);
        let tree = Value::dict(vec![
            entry("run", self.place.lowered()),
            entry("objects", objects),
        ]);
        // Until the loader is met again, what an earlier life recorded of it stays true.
        let unmet = self
            .recorded_identity
            .iter()
            .filter(|(name, _)| name.starts_with("loader."));
        let commit = Commit {
            step: self.place.step,
            phase,
            tree,
            storages,
            identity: self.identity.iter().chain(unmet).cloned().collect(),
            environment: self.environment.clone(),
            metrics: self
                .metrics
                .iter()
                .map(|(name, value)| (name.clone(), *value))
                .collect(),
            pinned: self.pin_next,
        };
        self.run.commit(commit).map(drop)
    }
}

/// One step: a batch to train on, then a boundary.
pub struct Step<'t, T> {
    training: &'t mut Training,
    components: Vec<(String, Component)>,
    content: Option<Batch<T>>,
}

impl<T> Step<'_, T> {
    /// Which step of the run it is, counted from 1.
    pub fn number(&self) -> u64 {
        self.training.place.step + 1
    }

    /// Epoch counted from 0.
    pub fn epoch(&self) -> u64 {
        self.training.place.epoch
    }

    /// Which batch of its epoch it is, counted from 0.
    pub fn position(&self) -> u64 {
        self.training.place.position
    }

    /// The batch's content.
    ///
    /// # Panics
    ///
    /// Where it was taken before.
    pub fn take(&mut self) -> T {
        self.content
            .take()
            .expect("the batch of a step is taken once")
            .content
    }

    /// Random numbers of this step, for a purpose such as `dropout`: the same in every life.
    pub fn draws(&self, purpose: &str) -> Draws {
        Draws::new(self.training.key(purpose))
    }

    /// Puts a number into this step's record, by its bits.
    pub fn log(&mut self, name: &str, value: f64) {
        self.training.log(name, value);
    }

    /// Ends the step: its record is written and compared, a checkpoint is saved if one is due, a stop is obeyed.
    ///
    /// The last thing in the loop's body: what a program does after it and before the next step is not done again
    /// on resume.
    ///
    /// # Durability
    ///
    /// On return the record survives a kill, and a checkpoint that was due survives a power cut.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`] after a stop request; [`Error::Diverged`]; those of the disk.
    pub fn commit(self, state: &mut dyn Stateful) -> Result<()> {
        self.training.end_step(self.components, state)
    }
}

/// The exit code that a result stands for: 0, 75 after a stop request ("start me again"), or 1.
pub fn exit_code(result: &Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Stopped { .. }) => ExitCode::from(REQUEUE_CODE),
        Err(_) => ExitCode::FAILURE,
    }
}

fn of_fingerprint(fingerprint: Fingerprint) -> Component {
    Component::Digest(fingerprint.0.to_vec())
}

fn indices_digest(indices: &[u64]) -> Component {
    let bytes: Vec<u8> = indices.iter().flat_map(|index| index.to_le_bytes()).collect();
    of_fingerprint(Fingerprint::of_regions(&[&bytes]))
}

/// Names whose values differ, and both values in words.
fn changed(recorded: &[(String, Value)], current: &[(String, Value)]) -> Vec<(String, String, String)> {
    let find = |list: &[(String, Value)], name: &str| {
        list.iter()
            .find(|(key, _)| key == name)
            .map_or(Value::None, |(_, value)| value.clone())
    };
    let added = current
        .iter()
        .filter(|(name, _)| !recorded.iter().any(|(key, _)| key == name));
    recorded
        .iter()
        .chain(added)
        .map(|(name, _)| (name, find(recorded, name), find(current, name)))
        .filter(|(_, recorded, current)| recorded != current)
        .map(|(name, recorded, current)| (name.clone(), words(&recorded), words(&current)))
        .collect()
}

fn words(value: &Value) -> String {
    match value {
        Value::None => "not there".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Int(number) => number.to_string(),
        Value::Float(bits) => f64::from_bits(*bits).to_string(),
        Value::Str(text) => text.clone(),
        other => format!("{other:?}"),
    }
}

/// What the bits may depend on besides the program's arguments.
fn environment() -> Vec<(String, Value)> {
    let mut environment = vec![
        ("unbroken".to_owned(), Value::from(env!("CARGO_PKG_VERSION"))),
        (
            "platform".to_owned(),
            Value::from(format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)),
        ),
        ("cpu.features".to_owned(), Value::from(cpu_features())),
    ];
    // The program's own file: another build may round otherwise.
    static PROGRAM: OnceLock<Option<String>> = OnceLock::new();
    if let Some(digest) = PROGRAM.get_or_init(program_digest) {
        environment.push(("program".to_owned(), Value::from(digest.as_str())));
    }
    environment
}

/// Short digest of the running program's file, where it can be read.
fn program_digest() -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let directory = Directory::new(Arc::new(DiskStorage::open(program.parent()?).ok()?));
    let bytes = directory
        .read_all(program.file_name()?.to_str()?, MAX_PROGRAM)
        .ok()?;
    Some(Digest::of(&bytes).short())
}

/// Instruction sets that kernels choose among when they run.
#[cfg(target_arch = "x86_64")]
fn cpu_features() -> String {
    let features = [
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    let there: Vec<&str> = features
        .iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| *name)
        .collect();
    there.join(" ")
}

/// Instruction sets that kernels choose among when they run.
#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> String {
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::faulty::{Fault, FaultyStorage};
    use crate::storage::memory::MemoryStorage;
    use crate::train::{Failure, Sample, Source};

    struct Numbers;

    impl Source for Numbers {
        type Item = f32;

        fn len(&self) -> u64 {
            40
        }

        fn at(&self, sample: &Sample) -> std::result::Result<f32, Failure> {
            Ok(sample.index as f32)
        }
    }

    /// A training with a save at each step, on a disk that can break.
    struct Trial {
        _place: tempfile::TempDir,
        path: PathBuf,
        disk: FaultyStorage,
    }

    impl Trial {
        fn new() -> Trial {
            let place = tempfile::tempdir().unwrap();
            let path = place.path().join("run");
            let disk = FaultyStorage::new(Arc::new(DiskStorage::create(&path).unwrap()));
            Trial {
                _place: place,
                path,
                disk,
            }
        }

        fn start(&self, on_full: OnFull, net: &mut Net) -> Training {
            let options = Training::at(&self.path)
                .seed(1)
                .on_full(on_full)
                .leave_signals_alone();
            let options = options.policy(Policy::every_steps(1)).keep(Retention::default());
            let open = |_: &Path, options: &run::Options, into: &mut dyn run::Memory| {
                Run::open_on_filling(Arc::new(self.disk.clone()), options, into)
            };
            options.start_in(Instructions::default(), net, open).unwrap()
        }

        /// Trains to the end; `before` is called before each step's commit.
        fn train(
            &self,
            on_full: OnFull,
            mut before: impl FnMut(&Trial, u64, &mut Training),
        ) -> Result<Vec<String>> {
            let mut net = net();
            let mut training = self.start(on_full, &mut net);
            let mut loader = Loader::new(Numbers, 4);
            while training.next_epoch(&mut net)?.is_some() {
                while let Some(mut step) = training.next_step(&mut loader)? {
                    for number in step.take() {
                        net.0[0] += number;
                    }
                    let number = step.number();
                    before(self, number, step.training);
                    step.commit(&mut net)?;
                }
            }
            Ok(training.notes().to_vec())
        }

        /// Boundaries with what was recorded of them, whichever life did, and the steps that were saved.
        fn found(&self) -> (Vec<Boundary>, Vec<u64>) {
            let mut boundaries = run::read_journal(&self.path).unwrap().boundaries;
            boundaries.iter_mut().for_each(|boundary| boundary.lives.clear());
            let saved = run::read_run(&self.path).unwrap().checkpoints;
            (boundaries, saved.iter().map(|saved| saved.info().step).collect())
        }
    }

    /// What is found of a training that nothing happened to.
    fn undisturbed() -> (Vec<Boundary>, Vec<u64>) {
        let trial = Trial::new();
        trial.train(OnFull::Stop, |_, _, _| ()).unwrap();
        trial.found()
    }

    #[test]
    fn a_training_ends_where_the_disk_is_full_unless_it_was_told_otherwise() {
        let trial = Trial::new();
        let fill = |trial: &Trial, number, _: &mut Training| {
            if number == 4 {
                trial.disk.fail_at(0, Fault::NoSpace);
            }
        };
        assert!(trial.train(OnFull::Stop, fill).unwrap_err().is_full());
        trial.disk.heal();
        trial.train(OnFull::Stop, |_, _, _| ()).unwrap();
        assert_eq!(trial.found().0, undisturbed().0);
    }

    #[test]
    fn a_training_that_goes_on_writes_what_a_full_disk_did_not_take_when_there_is_room() {
        let trial = Trial::new();
        let fill = |trial: &Trial, number, _: &mut Training| match number {
            3 => trial.disk.fail_at(0, Fault::NoSpace),
            6 => trial.disk.heal(),
            _ => {}
        };
        let notes = trial.train(OnFull::GoOn, fill).unwrap();
        assert_eq!(notes.len(), 2, "{notes:?}");
        assert!(notes[0].contains("training goes on") && notes[1] == "there is room on the disk again");
        let (boundaries, saved) = trial.found();
        assert_eq!(boundaries, undisturbed().0);
        assert!([3, 4, 5].iter().all(|step| !saved.contains(step)), "{saved:?}");
        assert!([2, 6, 10].iter().all(|step| saved.contains(step)), "{saved:?}");
    }

    #[test]
    fn a_training_that_goes_on_does_not_end_without_its_last_checkpoint() {
        let trial = Trial::new();
        let fill = |trial: &Trial, number, _: &mut Training| {
            if number == 5 {
                trial.disk.fail_at(0, Fault::NoSpace);
            }
        };
        assert!(trial.train(OnFull::GoOn, fill).unwrap_err().is_full());
        trial.disk.heal();
        trial.train(OnFull::GoOn, |_, _, _| ()).unwrap();
        assert_eq!(trial.found().0, undisturbed().0);
    }

    #[test]
    fn a_training_that_waits_goes_on_by_itself_when_there_is_room() {
        let trial = Trial::new();
        let fill = |trial: &Trial, number, _: &mut Training| {
            if number == 3 {
                trial.disk.fail_at(0, Fault::NoSpace);
                let disk = trial.disk.clone();
                std::thread::spawn(move || {
                    while disk.failed().is_empty() {
                        std::thread::yield_now();
                    }
                    disk.heal();
                });
            }
        };
        let notes = trial.train(OnFull::Wait, fill).unwrap();
        assert!(notes[0].contains("training waits for room"), "{notes:?}");
        assert_eq!(trial.found(), undisturbed());
    }

    #[test]
    fn a_stop_request_ends_the_wait_for_room() {
        let trial = Trial::new();
        let fill = |trial: &Trial, number, training: &mut Training| {
            if number == 3 {
                trial.disk.fail_at(0, Fault::NoSpace);
                training.stop.request(0);
            }
        };
        assert!(trial.train(OnFull::Wait, fill).unwrap_err().is_full());
    }

    #[test]
    fn a_full_disk_does_not_hide_that_a_step_differs() {
        let trial = Trial::new();
        let logging = |loss: f64| {
            move |trial: &Trial, number, training: &mut Training| {
                training.log("loss", loss);
                if number == 4 {
                    trial.disk.fail_at(1, Fault::NoSpace); // Its record is written, and nothing behind it.
                }
            }
        };
        assert!(trial.train(OnFull::Stop, logging(1.0)).unwrap_err().is_full());
        trial.disk.heal();
        let error = trial.train(OnFull::GoOn, logging(2.0)).unwrap_err();
        assert!(
            matches!(&error, Error::Diverged { step: 4, component, .. } if component == "log/loss"),
            "{error:?}"
        );
    }

    /// Two tensors and a number. The first is asked for twice.
    #[derive(Debug)]
    struct Net([f32; 5], Vec<i64>, i64);

    impl Stateful for Net {
        fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
            out.tensor("weights", &[5], &self.0)?;
            out.value("count", self.2)?;
            out.scope("inside", |out| out.tensor("numbers", &[900], &self.1))
        }

        fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
            assert_eq!(from.tensor("weights")?.shape, [5]);
            from.tensor_into("weights", &[5], &mut self.0)?;
            self.2 = from.int("count")?;
            from.scope("inside", |from| from.tensor_into("numbers", &[900], &mut self.1))
        }
    }

    fn net() -> Net {
        Net([1.5, -0.0, f32::NAN, 3.0, 4.0], (0..900).collect(), 7)
    }

    #[test]
    fn a_resume_reads_each_tensor_once() {
        let memory = Arc::new(FaultyStorage::new(Arc::new(MemoryStorage::new())));
        let start = |net: &mut Net| {
            let options = Training::at("memory:").leave_signals_alone();
            let open = |_: &Path, options: &run::Options, into: &mut dyn run::Memory| {
                Run::open_on_filling(Arc::clone(&memory) as _, options, into)
            };
            options.start_in(Instructions::default(), net, open).unwrap()
        };
        drop(start(&mut net()));
        let reads = || {
            let operations = memory.operations();
            memory.heal();
            operations
                .iter()
                .filter(|operation| **operation == "read")
                .count()
        };
        reads();
        drop(Run::open_on(Arc::clone(&memory) as _, &run::Options::default()).unwrap());
        let opened = reads();
        let mut resumed = Net([0.0; 5], vec![0; 900], 0);
        drop(start(&mut resumed));
        // Opening read everything; one tensor was asked for again.
        assert_eq!(reads(), opened + 1);
        assert_eq!(format!("{resumed:?}"), format!("{:?}", net()));
    }
}
