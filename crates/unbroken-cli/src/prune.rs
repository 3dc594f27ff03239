//! `unbroken prune`: delete the checkpoints that no rule keeps.
//!
//! Touches: a run directory, under its lock; with `--dry-run` only to read, and without it.

use serde_json::json;
use unbroken::run::{Options, Run};
use unbroken::store::{Best, CheckpointInfo, Order, Retention};

use crate::answer::{Answer, Streams, Verdict};
use crate::arguments::Prune;
use crate::target;
use crate::words::count;

pub(crate) fn run(command: &Prune, streams: &mut Streams) -> Answer {
    let policy = Retention {
        last: command.last,
        every: command.every,
        best: command.best.as_ref().map(|rule| Best {
            metric: rule.metric.clone(),
            order: if rule.lower_is_better {
                Order::Min
            } else {
                Order::Max
            },
            count: rule.count,
        }),
    };
    // Opening for writing would make the directory; a wrong path is an error here.
    let run = target::open_run(&command.run)?;
    let infos: Vec<CheckpointInfo> = run
        .checkpoints
        .iter()
        .map(|checkpoint| checkpoint.info().clone())
        .collect();
    let (names, warnings) = if command.dry_run {
        (policy.plan(&infos)?, Vec::new())
    } else {
        let held = Run::open(&command.run, &Options::default())?;
        let names = held.prune(&policy, false)?;
        let mut warnings = held.warnings().to_vec();
        warnings.extend(held.take_notices());
        held.close()?;
        (names, warnings)
    };
    for warning in &warnings {
        streams.note("warning", warning);
    }
    if command.json {
        let kept: Vec<&str> = infos
            .iter()
            .map(|info| info.name.as_str())
            .filter(|name| !names.iter().any(|gone| gone == name))
            .collect();
        streams.json(&json!({
            "dry_run": command.dry_run,
            "deleted": names,
            "kept": kept,
            "warnings": warnings,
        }))?;
        return Ok(Verdict::Yes);
    }
    for name in &names {
        streams.say(name)?;
    }
    let verb = if command.dry_run {
        "would be deleted"
    } else {
        "deleted"
    };
    let left = count(infos.len().saturating_sub(names.len()), "checkpoint");
    streams.note(
        "summary",
        &format!("{} {verb}, {left} kept", count(names.len(), "checkpoint")),
    );
    Ok(Verdict::Yes)
}
