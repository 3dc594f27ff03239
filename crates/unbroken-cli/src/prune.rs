//! `unbroken prune`: delete the checkpoints that no rule keeps.
//!
//! Touches: a run directory, under its lock; with `--dry-run` only to read, and without it.

use std::collections::BTreeSet;

use serde_json::json;
use unbroken::run::{Options, Run};
use unbroken::store::{Best, CheckpointInfo, Order, Retention};

use crate::answer::{Answer, Failure, Streams, Verdict};
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
    if let Some(rule) = &command.best {
        check_metric(&rule.metric, &infos)?;
    }
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

/// Refuses a metric that no checkpoint has: a slip in its name would delete what it was to keep.
fn check_metric(metric: &str, infos: &[CheckpointInfo]) -> Result<(), Failure> {
    let metrics = infos.iter().flat_map(|info| &info.metrics);
    let known: BTreeSet<&str> = metrics.map(|(name, _)| name.as_str()).collect();
    if infos.is_empty() || known.contains(metric) {
        return Ok(());
    }
    let names: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
    let hint = match names.is_empty() {
        true => "none of them has a logged number; nothing was deleted".to_owned(),
        false => format!("they have {}; nothing was deleted", names.join(", ")),
    };
    Err(Failure::new(format!("no checkpoint has a logged number called `{metric}`")).hint(hint))
}
