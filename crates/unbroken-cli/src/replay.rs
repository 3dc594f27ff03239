//! `unbroken replay`: executes recorded steps again, under today's environment and code, and compares them.
//!
//! Touches: the run directory, read only; a directory of its own beside the system's temporary files, which holds links
//! to the run's immutable packs and is removed afterwards unless something differs; the program that it starts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::json;
use unbroken::cause::Cause;
use unbroken::store::Checkpoint;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::prove::judge::{self, Recorded};
use crate::prove::life::{End, Interrupt, Program, last_words};
use crate::prove::{difference_json, difference_lines, io_failure, make_directory};
use crate::words::value;

#[derive(Debug, Args)]
pub(crate) struct Replay {
    /// Run directory with the history
    pub(crate) run: PathBuf,
    /// Start from the newest checkpoint at or before this step; by default the oldest
    #[arg(long, value_name = "STEP")]
    pub(crate) from: Option<u64>,
    /// Execute up to this step; by default to the end of the history
    #[arg(long, value_name = "STEP")]
    pub(crate) to: Option<u64>,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The program and its arguments, after --
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

pub(crate) fn run(command: &Replay, streams: &mut Streams) -> Answer {
    let path = fs::canonicalize(&command.run).map_err(|error| io_failure("open", &command.run, &error))?;
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let history = Recorded::open(&path, name.clone(), None)?;
    let last = history.totals.last;
    let to = command.to.unwrap_or(last).min(last);
    let start = choose(&history, command.from, to)?;
    let (from, phase) = (start.info().step, start.info().phase);

    let directory = make_directory(None)?;
    let copied = directory.join("replay").join("runs").join(&name);
    copy_run(&path, &copied, &history, &start)
        .map_err(|error| io_failure("copy the run to", &copied, &error))?;
    let program = Program {
        command: command.command.clone(),
        seed: 0,
        steps: Some(to),
        seconds: None,
        own_journal: true,
        variables: Vec::new(),
        timeout: None,
        journal_bytes: 0,
        step: Duration::ZERO,
        interrupt: Interrupt::watch().map_err(|error| io_failure("watch signals for", &directory, &error))?,
    };
    let life = program
        .live(&directory.join("replay"), 1, None, "")
        .map_err(|error| io_failure("run the program in", &directory, &error))?;
    let printed = format!("what it printed is in {}", life.log.display());
    if let End::Failed(how) = &life.end {
        let words = last_words(&life.log);
        return Err(Failure::new(format!("the program ended with {how}: {words}")).hint(printed));
    }

    let found = Recorded::open(&copied, name.clone(), Some(to))?;
    let newest = found.story.last_life;
    if newest == history.story.last_life {
        return Err(
            Failure::new(format!("the program did not go on with a run named `{name}`")).hint(printed),
        );
    }
    let history = Recorded::open(&path, name.clone(), Some(to))?;
    let (mut again, mut expected) = (0, 0);
    for boundary in found.boundaries() {
        again += usize::from(boundary?.lives.contains(&newest));
    }
    for boundary in history.boundaries() {
        let at = boundary?;
        expected += usize::from((at.step, at.phase) > (from, phase));
    }
    let difference = match judge::compare_journals(&history, &found)? {
        Some(difference) => {
            let mut difference = judge::leaves_of(&difference, &history, &found)?;
            // What the catalogue knows are faults of a resume; here something was changed on purpose.
            difference.cause = Some(Cause {
                id: "changed",
                words: "the program's code, its data, or what it runs on is not what it was".to_owned(),
            });
            Some(difference)
        }
        None if again < expected => {
            let words = format!("the program executed {again} of {expected} recorded boundaries");
            return Err(Failure::new(words).hint(printed));
        }
        None => None,
    };
    let changes = environment_changes(&start, &found);
    let exact = difference.is_none();
    if exact {
        // Left-overs in the temporary directory are no reason to take the answer back.
        let _ = fs::remove_dir_all(&directory);
    }
    if command.json {
        let changes: Vec<_> = changes
            .iter()
            .map(|(name, old, new)| json!({ "name": name, "recorded": old, "today": new }))
            .collect();
        streams.json(&json!({
            "exact": exact,
            "from": from,
            "to": to,
            "boundaries": again,
            "environment": changes,
            "difference": difference.as_ref().map(|difference| difference_json("replay", difference)),
        }))?;
        return Ok(Verdict::yes_if(exact));
    }
    for (name, old, new) in &changes {
        streams.say(format!("{name} was {old}, is {new}"))?;
    }
    match &difference {
        None => streams.say(format!(
            "steps {from} to {to} executed again: identical in {again} boundaries"
        ))?,
        Some(difference) => {
            for text in difference_lines("replay", difference) {
                streams.say(text)?;
            }
            streams.note("note", &format!("everything is kept in {}", directory.display()));
        }
    }
    Ok(Verdict::yes_if(exact))
}

pub(crate) fn choose(history: &Recorded, from: Option<u64>, to: u64) -> Result<Checkpoint, Failure> {
    let all = history.overview.checkpoints.iter();
    let mut usable = all.filter(|checkpoint| checkpoint.info().step < to && checkpoint.info().phase < 2);
    let chosen = match from {
        Some(from) => usable.rfind(|checkpoint| checkpoint.info().step <= from),
        None => usable.next(),
    };
    chosen.cloned().ok_or_else(|| {
        Failure::new(format!(
            "no whole checkpoint lies before step {to} and at or before the step to start from"
        ))
        .hint("`unbroken list` shows those that are there")
    })
}

/// Makes a copy that ends with one checkpoint; packs are linked where that can be, since nothing ever writes to one.
pub(crate) fn copy_run(path: &Path, copied: &Path, history: &Recorded, start: &Checkpoint) -> io::Result<()> {
    for part in ["", "checkpoints", "objects", "journal"] {
        fs::create_dir_all(copied.join(part))?;
    }
    fs::copy(path.join("run.toml"), copied.join("run.toml"))?;
    for checkpoint in &history.overview.checkpoints {
        let info = checkpoint.info();
        if (info.step, info.phase, info.life) <= (start.info().step, start.info().phase, start.info().life) {
            fs::copy(&info.path, copied.join("checkpoints").join(&info.name))?;
        }
    }
    for (part, link) in [("objects", true), ("journal", false)] {
        for entry in fs::read_dir(path.join(part))? {
            let entry = entry?;
            // A link leads out of the run, and a pipe would be waited for.
            if !entry.file_type()?.is_file() {
                continue;
            }
            let target = copied.join(part).join(entry.file_name());
            if !link || fs::hard_link(entry.path(), &target).is_err() {
                fs::copy(entry.path(), &target)?;
            }
        }
    }
    Ok(())
}

/// What the replay ran on that differs from what the checkpoint says: name, then, now.
fn environment_changes(start: &Checkpoint, found: &Recorded) -> Vec<(String, String, String)> {
    let Some(newest) = found.overview.checkpoints.last() else {
        return Vec::new();
    };
    let now = &newest.info().environment;
    start
        .info()
        .environment
        .iter()
        .filter_map(|(name, old)| {
            let (_, new) = now.iter().find(|(other, _)| other == name)?;
            (old != new).then(|| (name.clone(), value(old), value(new)))
        })
        .collect()
}
