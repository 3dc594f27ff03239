//! Forks: a new run that starts at another run's checkpoint and shares its packs, so that no tensor is written.
//!
//! Touches: the source run, read only and without its lock; the new run's directory, which appears whole or not at all.
//! Packs are shared by hard links: either run may prune, move or delete its own names, the bytes stay for the other.

use std::path::Path;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::format::manifest::{self, Manifest};
use crate::format::saved::{Outline, Saved};
use crate::journal::{JOURNAL, Story};
use crate::outline::{Leaves, outline};
use crate::run::{self, LOCK, Options, Run};
use crate::state::Value;
use crate::storage::Directory;
use crate::storage::disk::Staging;
use crate::store::{self, CHECKPOINTS, Checkpoint, CheckpointInfo, Commit, OBJECTS};

/// Kind of the event that a fork's journal begins with.
///
/// Its fields: `run` and `checkpoint` (where it starts), `path` (the source's directory, as it was called then),
/// `ancestors` (a list of [run, checkpoint], the nearest first: what the source itself was forked from).
pub const FORKED: &str = "forked";

/// How a fork comes by the packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// By a second name for the same bytes.
    Links,
    /// By bytes of its own.
    Copies,
}

/// What a fork came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forked {
    /// Id of the new run.
    pub run_id: String,
    /// Name of its first checkpoint.
    pub checkpoint: String,
    /// Bytes of the packs that it shares with the source.
    pub shared_bytes: u64,
    /// Bytes of tensors that were written.
    pub written_bytes: u64,
    /// Boundaries of the source's journal that it begins with.
    pub boundaries: usize,
    /// What the source's journal could not tell.
    pub warnings: Vec<String>,
}

/// Makes a new run at `place` that starts at a checkpoint of another one.
///
/// It has the source's seed and settings, an id of its own, and a journal that begins with what the source recorded up
/// to the checkpoint. The source may be in training meanwhile.
///
/// # Durability
///
/// On return the new run survives a power cut.
///
/// # Errors
///
/// `place` is then as it was. `Unsupported` where the file system cannot link the packs; damage of the checkpoint, every
/// byte of which is read through its new names; `Invalid` where `place` is anything but empty.
pub fn fork(source: &Checkpoint, place: &Path, sharing: Sharing) -> Result<Forked> {
    let begun = Instant::now();
    let from = source.directory();
    let config = run::require_config(from)?;
    if config.id != source.info().run_id {
        let (name, other) = (&source.info().name, &source.info().run_id);
        return Err(Error::invalid(format!(
            "checkpoint `{name}` is of run {other}, not of the run whose directory it lies in"
        )));
    }
    let history = Story::open(from, &config.id)?;
    let staging = stage(place)?;
    let options = Options {
        seed: Some(config.seed),
        settings: config.settings,
        strict: true,
        ..Options::default()
    };
    let new = Run::open(staging.path(), &options)?;
    new.begin()?;
    let mut forked = Forked {
        run_id: new.id().to_owned(),
        checkpoint: String::new(),
        shared_bytes: 0,
        written_bytes: 0,
        boundaries: 0,
        warnings: history.warnings.clone(),
    };
    for pack in &source.manifest().packs {
        let name = format!("{OBJECTS}/{}", pack.name);
        match sharing {
            Sharing::Links => {
                link(from, new.directory(), &name, place)?;
                forked.shared_bytes += pack.length;
            }
            Sharing::Copies => {
                copy(from, new.directory(), &name, &name)?;
                forked.written_bytes += pack.length;
            }
        }
    }
    new.directory().sync_dir(OBJECTS)?;
    forked.boundaries = record_history(&new, source, &history)?;
    forked.checkpoint = publish(&new, source, forked.written_bytes)?;
    // Through the new names: what is handed over is what is there.
    let checkpoint = Checkpoint::open_in(new.directory(), &forked.checkpoint)?;
    checkpoint.verify()?;
    record_saved(
        &new,
        &checkpoint,
        known_outline(&checkpoint, source, &history)?,
        begun,
    )?;
    new.directory().sync_dir(JOURNAL)?;
    new.directory().sync_dir("")?;
    publish_place(staging, place)?;
    new.close()?;
    Ok(forked)
}

/// Makes a new run at `place` that begins with one event and one checkpoint.
///
/// # Durability
///
/// On return the new run survives a power cut.
///
/// # Errors
///
/// `place` is then as it was.
pub fn plant(
    place: &Path,
    options: &Options,
    event: (&str, Vec<(String, Value)>),
    commit: Commit<&[u8]>,
) -> Result<CheckpointInfo> {
    let staging = stage(place)?;
    let new = Run::open(staging.path(), options)?;
    new.begin()?;
    new.event(event.0, commit.step, event.1)?;
    let info = new.commit(commit)?;
    new.checkpoint(&info.name)?.verify()?;
    publish_place(staging, place)?;
    new.close()?;
    Ok(CheckpointInfo {
        path: place.join(CHECKPOINTS).join(&info.name),
        ..info
    })
}

fn publish_place(staging: Staging, place: &Path) -> Result<()> {
    staging
        .publish()
        .map_err(|error| Error::io("rename into place", place, error))
}

/// Makes a directory beside `place` that takes its place when it is whole.
fn stage(place: &Path) -> Result<Staging> {
    match Staging::begin(place, &store::random_name()?, LOCK) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(Error::invalid(format!(
            "`{}` is there already, and not empty",
            place.display()
        ))),
        staged => staged.map_err(|error| Error::io("make a directory beside", place, error)),
    }
}

fn link(from: &Directory, to: &Directory, name: &str, place: &Path) -> Result<()> {
    match to.link_new(from, name, name) {
        Err(Error::Io { source, .. }) if source.kind() != std::io::ErrorKind::NotFound => {
            let (old, new) = (from.location().display(), place.display());
            Err(Error::Unsupported {
                what: format!("hard links from {old} to {new}: {source}"),
            })
        }
        linked => linked,
    }
}

/// Copies a file piece by piece, durably but for its name. Verifying what arrived is the caller's.
pub(crate) fn copy(from: &Directory, to: &Directory, name: &str, as_name: &str) -> Result<()> {
    const PIECE: u64 = 4 << 20;
    let source = from.open(name)?;
    let length = source.len()?;
    let mut file = to.create_new(as_name)?;
    let mut piece = vec![0; usize::try_from(length.min(PIECE)).expect("a piece fits in memory")];
    while file.written() < length {
        let count = usize::try_from((length - file.written()).min(PIECE)).expect("a piece fits in memory");
        source.read_exact_at(file.written(), &mut piece[..count])?;
        file.write_all(&piece[..count])?;
    }
    file.sync()
}

/// Begins the new journal with where it comes from and what the source recorded until there.
fn record_history(new: &Run, source: &Checkpoint, history: &Story) -> Result<usize> {
    let info = source.info();
    let text = |text: &str| Value::Str(text.to_owned());
    let fields = vec![
        ("run".to_owned(), text(&info.run_id)),
        ("checkpoint".to_owned(), text(&info.name)),
        (
            "path".to_owned(),
            text(&source.directory().location().to_string_lossy()),
        ),
        ("ancestors".to_owned(), Value::List(ancestors(history))),
    ];
    new.event(FORKED, info.step, fields)?;
    let until = (info.step, info.phase);
    let mut count = 0;
    for boundary in history.boundaries() {
        let boundary = boundary?;
        if (boundary.step, boundary.phase) > until {
            break;
        }
        new.record(
            boundary.step,
            boundary.phase,
            boundary.epoch,
            boundary.position,
            boundary.components,
        )?;
        count += 1;
    }
    Ok(count)
}

/// What the source was forked from, and that in turn, the nearest first.
fn ancestors(history: &Story) -> Vec<Value> {
    let Some(event) = history.events.iter().find(|event| event.kind == FORKED) else {
        return Vec::new();
    };
    let field = |name: &str| event.fields.iter().find(|(other, _)| other == name);
    let value = |name: &str| field(name).map_or(Value::None, |(_, value)| value.clone());
    let mut all = vec![Value::List(vec![value("run"), value("checkpoint")])];
    if let Value::List(older) = value("ancestors") {
        all.extend(older);
    }
    all
}

/// Writes the new run's first manifest, durably, and returns the checkpoint's name.
fn publish(new: &Run, source: &Checkpoint, new_bytes: u64) -> Result<String> {
    let info = source.info();
    let manifest = Manifest {
        run_id: new.id().to_owned(),
        parent: None,
        life: new.life(),
        created: new.created().to_owned(),
        pinned: false,
        journal_head: new.durable_head(info.step, info.phase)?,
        new_bytes,
        ..source.manifest().clone()
    };
    let (bytes, digest) = manifest::encode(&manifest)?;
    let name = manifest::checkpoint_name(manifest.step, manifest.phase, &digest);
    let directory = new.directory();
    let temporary = store::temporary_name()?;
    let mut file = directory.create_new(&temporary)?;
    file.write_all(&bytes)?;
    file.sync()?;
    directory.rename_new(&temporary, &format!("{CHECKPOINTS}/{name}"))?;
    directory.sync_dir(CHECKPOINTS)?;
    Ok(name)
}

/// Says of the first checkpoint what a run's journal says of each of its own, a digest for each leaf included.
fn record_saved(new: &Run, checkpoint: &Checkpoint, outline: Outline, begun: Instant) -> Result<()> {
    let info = checkpoint.info();
    let took_us = run::micros(begun.elapsed());
    let saved = Saved {
        checkpoint: info.name.clone(),
        phase: info.phase,
        durable_us: took_us,
        commit_us: took_us,
        size_bytes: info.size_bytes,
        new_bytes: info.new_bytes,
    };
    new.record_saved(info.step, &saved, &outline)
}

/// The outline of a checkpoint. Bytes are read only where neither storages' digests nor the source's journal tell it all.
fn known_outline(checkpoint: &Checkpoint, source: &Checkpoint, history: &Story) -> Result<Outline> {
    let (tree, storages) = (checkpoint.tree(), checkpoint.storages());
    let told = outline(tree, &storages, &[]);
    let mut found = told.clone();
    if let Some(save) = history.save_of(&source.info().name)
        && let Some(recorded) = history.outline(save)?
    {
        found.complete(&recorded);
    }
    if found.contents.iter().all(Option::is_some) {
        return Ok(found);
    }
    let mut bytes = vec![Vec::new(); storages.len()];
    for (leaf, content) in Leaves::of(tree).values.iter().zip(&told.contents) {
        if let (Value::Tensor(tensor), None) = (leaf, content) {
            let index = tensor.storage as usize;
            bytes[index] = checkpoint.read(index)?;
        }
    }
    let bytes: Vec<Option<&[u8]>> = bytes.iter().map(|bytes| Some(bytes.as_slice())).collect();
    Ok(outline(tree, &storages, &bytes))
}
