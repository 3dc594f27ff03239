//! `unbroken repair`: put aside what is damaged, and put whole copies in its place.
//!
//! Touches: a run directory, under its lock; with `--dry-run` only to read, and without it. Copies, read only.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value as Json, json};
use unbroken::repair::{self, Action, Plan};

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::words::{count, line};

#[derive(Debug, Args)]
#[command(after_help = "\
Nothing that was committed is changed or deleted: what is damaged moves to RUN/quarantine.
Where no checkpoint is whole, nothing moves.
Exit code 0: the run is whole now (with --dry-run: as it is). 1: it is not.")]
pub(crate) struct Repair {
    /// Run directory
    pub(crate) run: PathBuf,
    /// A backup or a fork that may hold whole files of it; may be given again
    #[arg(long = "from", value_name = "COPY")]
    pub(crate) copies: Vec<PathBuf>,
    /// Show what would be done and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(command: &Repair, streams: &mut Streams) -> Answer {
    let plan = if command.dry_run {
        repair::plan(&command.run, &command.copies)?
    } else {
        repair::repair(&command.run, &command.copies)?
    };
    // What was done is not believed: the run is read again.
    let after = match command.dry_run || plan.actions.is_empty() {
        true => None,
        false => Some(repair::plan(&command.run, &[])?),
    };
    let whole = match &after {
        Some(after) => after.is_whole(),
        None => plan.is_whole() && plan.actions.is_empty(),
    };
    if command.json {
        streams.json(&answer_json(command, &plan, whole))?;
    } else {
        tell(command, &plan, whole, streams)?;
    }
    Ok(Verdict::yes_if(whole))
}

fn tell(command: &Repair, plan: &Plan, whole: bool, streams: &mut Streams) -> Result<(), Failure> {
    for action in &plan.actions {
        streams.say(match action {
            Action::Restore { name, copy } => format!("restore  {}: from {}", line(name), copy.display()),
            Action::SetAside { name, why } => format!("aside    {}: {}", line(name), line(why)),
            Action::Remove { name } => format!("remove   {}: left over", line(name)),
        })?;
    }
    if plan.whole.is_empty() {
        for (name, why) in &plan.lost {
            streams.say(format!("lost     {}: {}", line(name), line(why)))?;
        }
    }
    if let Some(why) = &plan.missing {
        streams.say(format!("missing  checkpoints: {}", line(why)))?;
    }
    for what in &plan.beyond {
        streams.say(format!("damaged  journal: {}", line(what)))?;
    }
    for what in &plan.left_alone {
        streams.note("left alone", what);
    }
    let done = match (plan.actions.len(), command.dry_run) {
        (0, _) => "nothing to do".to_owned(),
        (actions, true) => format!("{} to do", count(actions, "thing")),
        (actions, false) => format!("{} done", count(actions, "thing")),
    };
    let state = if whole {
        "the run is whole"
    } else {
        "the run is not whole"
    };
    let kept = count(plan.whole.len(), "whole checkpoint");
    streams.note(
        "summary",
        &format!("{done}; {kept}, {} lost; {state}", plan.lost.len()),
    );
    if plan.whole.is_empty() && (!plan.lost.is_empty() || plan.missing.is_some()) {
        streams.note(
            "hint",
            "nothing moves while no checkpoint is whole; --from COPY takes whole files from a copy of the run",
        );
    } else if !plan.beyond.is_empty() {
        streams.note(
            "hint",
            "the journal is never changed: what its damaged part recorded cannot be verified, training goes on; \
             --from COPY takes whole segments from a copy of the run",
        );
    }
    Ok(())
}

fn answer_json(command: &Repair, plan: &Plan, whole: bool) -> Json {
    let actions: Vec<Json> = plan
        .actions
        .iter()
        .map(|action| match action {
            Action::Restore { name, copy } => {
                json!({ "do": "restore", "file": name, "from": copy.display().to_string() })
            }
            Action::SetAside { name, why } => json!({ "do": "aside", "file": name, "why": why }),
            Action::Remove { name } => json!({ "do": "remove", "file": name }),
        })
        .collect();
    let lost: Vec<Json> = plan
        .lost
        .iter()
        .map(|(name, why)| json!({ "name": name, "why": why }))
        .collect();
    json!({
        "whole": whole,
        "dry_run": command.dry_run,
        "actions": actions,
        "checkpoints": plan.whole,
        "lost": lost,
        "missing": plan.missing,
        "journal": plan.beyond,
        "left_alone": plan.left_alone,
    })
}
