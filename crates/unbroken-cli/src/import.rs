//! `unbroken import`: a file that `torch.save` wrote becomes a run with one checkpoint, and nothing in it is executed.
//!
//! Touches: the file, read only; the new run's directory, which appears whole or not at all.

use std::io::ErrorKind;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use unbroken::{Error, run};

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::leaves::leaves;
use crate::words::{count, size};

#[derive(Debug, Args)]
#[command(after_help = "\
Read are tensors, numbers, texts, numpy arrays and plain containers; a file that names anything else
is refused by that name. The new run is for `show`, `export` and `unbroken.load`, not for training.")]
pub(crate) struct Import {
    /// File that torch.save wrote: .pt, .pth, .ckpt, .bin
    pub(crate) file: PathBuf,
    /// Directory of the new run; it must not be there yet, or be empty
    pub(crate) new: PathBuf,
    /// Step that the checkpoint is of
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) step: u64,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(command: &Import, streams: &mut Streams) -> Answer {
    let imported = unbroken_import::import(&command.file, &command.new, command.step).map_err(|error| {
        match hint(&error) {
            Some(hint) => Failure::from(error).hint(format!("nothing was written; {hint}")),
            None => Failure::from(error),
        }
    })?;
    let info = &imported.checkpoint;
    let checkpoint = run::read_checkpoint(&info.path)?;
    let leaves = leaves(checkpoint.tree()).len();
    if command.json {
        streams.json(&json!({
            "run": info.run_id,
            "path": command.new.display().to_string(),
            "checkpoint": info.name,
            "step": info.step,
            "bytes": info.size_bytes,
            "storages": imported.storages,
            "leaves": leaves,
            "attributes_dropped": imported.attributes_dropped,
        }))?;
        return Ok(Verdict::Yes);
    }
    streams.say(format!(
        "{}: {} in {}, {} of tensors",
        command.new.display(),
        count(leaves, "leaf").replace("leafs", "leaves"),
        count(imported.storages, "storage"),
        size(info.size_bytes)
    ))?;
    if imported.attributes_dropped > 0 {
        streams.note(
            "note",
            &format!(
                "{} had attributes (a state dict's versions of its modules), which are left behind",
                count(imported.attributes_dropped, "mapping")
            ),
        );
    }
    Ok(Verdict::Yes)
}

/// What to do about an error for which the core knows nothing better.
fn hint(error: &Error) -> Option<&'static str> {
    match error {
        Error::Unsupported { .. } => {
            Some("where you trust the file, load it with torch and save what it cannot hold as plain values")
        }
        Error::Invalid { .. } => Some("give a file and a directory that is not there yet"),
        Error::Io { source, .. } if source.kind() == ErrorKind::InvalidInput => {
            Some("give the file itself that torch.save wrote")
        }
        _ => None,
    }
}
