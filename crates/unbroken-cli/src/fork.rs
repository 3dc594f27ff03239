//! `unbroken fork`: a new run that starts at another run's checkpoint.
//!
//! Touches: the source run, read only and without its lock; the new run's directory, which appears whole or not at all.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use unbroken::Error;
use unbroken::fork::{self, Sharing};
use unbroken::store::Checkpoint;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::list::phase_words;
use crate::target::{self, Target};
use crate::words::{count, size};

#[derive(Debug, Args)]
#[command(after_help = "\
The fork has the source's seed and settings, an id of its own, and the source's journal up to there.
The same command that trains RUN goes on in NEW from there, when it is given NEW.")]
pub(crate) struct Fork {
    /// RUN, RUN@STEP, or a file in RUN/checkpoints
    pub(crate) checkpoint: String,
    /// Directory of the new run; it must not be there yet, or be empty
    pub(crate) new: PathBuf,
    /// Copy the tensors, where hard links are not possible or not wanted
    #[arg(long)]
    pub(crate) copy: bool,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(command: &Fork, streams: &mut Streams) -> Answer {
    let checkpoint = target::open_checkpoint(&command.checkpoint, streams)?;
    tell_of_others(command, &checkpoint, streams)?;
    let sharing = if command.copy {
        Sharing::Copies
    } else {
        Sharing::Links
    };
    let forked = fork::fork(&checkpoint, &command.new, sharing)
        .map_err(|error| explain(error, command, &checkpoint))?;
    for warning in &forked.warnings {
        streams.note("warning", warning);
    }
    let info = checkpoint.info();
    if command.json {
        streams.json(&json!({
            "run": forked.run_id,
            "path": command.new.display().to_string(),
            "checkpoint": forked.checkpoint,
            "source": { "run": info.run_id, "checkpoint": info.name, "path": info.path.display().to_string() },
            "step": info.step,
            "phase": info.phase,
            "shared_bytes": forked.shared_bytes,
            "written_bytes": forked.written_bytes,
            "boundaries": forked.boundaries,
        }))?;
        return Ok(Verdict::Yes);
    }
    streams.say(format!(
        "{}: run {} at step {} ({})",
        command.new.display(),
        forked.run_id,
        info.step,
        phase_words(info.phase)
    ))?;
    let bytes = if command.copy {
        format!("{} copied", size(forked.written_bytes))
    } else {
        format!("{} shared, no tensor written", size(forked.shared_bytes))
    };
    streams.note(
        "summary",
        &format!(
            "{bytes}; {} of the journal",
            count(forked.boundaries, "boundary").replace("boundarys", "boundaries")
        ),
    );
    if info.phase == 2 {
        streams.note(
            "hint",
            "the run is finished there: what it was asked to do trains nothing more",
        );
    }
    Ok(Verdict::Yes)
}

/// A step can have several checkpoints: in the epoch, after its end. Says which one was taken.
fn tell_of_others(command: &Fork, chosen: &Checkpoint, streams: &mut Streams) -> Result<(), Failure> {
    let target = Target::parse(&command.checkpoint);
    let Some(step) = target.step else {
        return Ok(());
    };
    let info = chosen.info();
    for other in target::open_run(&target.path)?.checkpoints {
        let other = other.info();
        if other.step == step && other.name != info.name {
            streams.note(
                "note",
                &format!(
                    "step {step} has another checkpoint, {} ({}); this is the one {}",
                    other.path.display(),
                    phase_words(other.phase),
                    phase_words(info.phase)
                ),
            );
        }
    }
    Ok(())
}

fn explain(error: Error, command: &Fork, checkpoint: &Checkpoint) -> Failure {
    let bytes: u64 = checkpoint.manifest().packs.iter().map(|pack| pack.length).sum();
    match &error {
        Error::Unsupported { .. } if !command.copy => {
            Failure::from(error).hint(format!("--copy writes {} instead", size(bytes)))
        }
        Error::Io { .. } if !checkpoint.info().path.exists() => Failure::new(format!(
            "checkpoint {} went away while it was forked",
            checkpoint.info().name
        ))
        .hint("a training that is running prunes its older checkpoints: fork a newer one"),
        _ => Failure::from(error),
    }
}
