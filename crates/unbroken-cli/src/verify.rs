//! `unbroken verify`: whether checkpoints and journal are whole.
//!
//! Touches: a run directory, read only, without its lock.

use std::path::Path;

use serde_json::{Value as Json, json};
use unbroken::Digest;
use unbroken::journal::Story;
use unbroken::run::{Overview, read_run, read_story_with};
use unbroken::store::Checkpoint;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::arguments::Verify;
use crate::target::{self, Target};
use crate::words::{count, line};

/// A run's description.
const CONFIG: &str = "run.toml";

pub(crate) fn run(command: &Verify, streams: &mut Streams) -> Answer {
    let target = Target::parse(&command.checkpoint);
    let mut report = Report {
        command,
        single: target.step.is_some() || target.path.is_file(),
        whole: Vec::new(),
        damaged: Vec::new(),
    };
    if report.single {
        let checkpoint = target::open_checkpoint(&command.checkpoint, streams)?;
        report.check(&checkpoint, streams)?;
        return report.close(None, streams);
    }
    let run = match read_run(&target.path) {
        Ok(run) => run,
        Err(error) if is_of_config(&target.path, &error) => {
            // It says whose the checkpoints and the journal are: nothing can be said of them without it.
            report.damaged(CONFIG, error.to_string(), streams)?;
            return report.close(None, streams);
        }
        Err(error) => return Err(error.into()),
    };
    for checkpoint in &run.checkpoints {
        report.check(checkpoint, streams)?;
    }
    for (name, why) in &run.rejected {
        report.damaged(name, why.to_string(), streams)?;
    }
    let (story, flaws) = look_at_journal(&target.path, &run)?;
    if story.has_begun() && run.checkpoints.is_empty() && run.rejected.is_empty() {
        let why = "no checkpoint of this run is there, though its journal is".to_owned();
        report.damaged("checkpoints", why, streams)?;
    }
    if !command.json {
        for warning in &flaws {
            streams.say(format!("damaged  journal: {}", line(warning)))?;
        }
    }
    report.close(Some(flaws), streams)
}

/// What is wrong with the journal: damage, segments and records that are missing, lives that wrote at the same time.
fn look_at_journal(path: &Path, run: &Overview) -> Result<(Story, Vec<String>), Failure> {
    let infos = run.checkpoints.iter().map(Checkpoint::info);
    let heads: Vec<(String, Digest)> = infos.map(|info| (info.name.clone(), info.journal_head)).collect();
    let wanted: Vec<Digest> = heads.iter().map(|(_, head)| *head).collect();
    let story = read_story_with(path, &wanted)?;
    let flaws = story.flaws(&heads)?;
    Ok((story, flaws))
}

struct Report<'a> {
    command: &'a Verify,
    /// Whether one checkpoint was asked for, and not the run.
    single: bool,
    whole: Vec<String>,
    damaged: Vec<(String, String)>,
}

impl Report<'_> {
    /// Reads one checkpoint, all of it unless a quick look was asked for: its manifest and packs were looked at when
    /// the run was.
    fn check(&mut self, checkpoint: &Checkpoint, streams: &mut Streams) -> Result<(), Failure> {
        let name = &checkpoint.info().name;
        let verified = if self.command.quick {
            checkpoint.check_packs()
        } else {
            checkpoint.verify()
        };
        match verified {
            Ok(()) => {
                if !self.command.json {
                    streams.say(format!("whole    {name}"))?;
                }
                self.whole.push(name.clone());
                Ok(())
            }
            Err(error) if is_damage(&error) => self.damaged(name, error.to_string(), streams),
            Err(error) => Err(error.into()),
        }
    }

    fn damaged(&mut self, name: &str, why: String, streams: &mut Streams) -> Result<(), Failure> {
        if !self.command.json {
            streams.say(format!("damaged  {}: {}", line(name), line(&why)))?;
        }
        self.damaged.push((name.to_owned(), why));
        Ok(())
    }

    /// Sums up. `journal` has what is damaged in the journal, if that was looked at.
    fn close(self, journal: Option<Vec<String>>, streams: &mut Streams) -> Answer {
        let whole = self.damaged.is_empty() && journal.as_ref().is_none_or(Vec::is_empty);
        if self.command.json {
            let damaged: Vec<Json> = self
                .damaged
                .iter()
                .map(|(name, why)| json!({ "name": name, "why": why }))
                .collect();
            streams.json(&json!({
                "whole": whole,
                "deep": !self.command.quick,
                "checkpoints": self.whole,
                "damaged": damaged,
                "journal": journal,
            }))?;
            return Ok(Verdict::yes_if(whole));
        }
        let mut summary = format!("{} whole", count(self.whole.len(), "checkpoint"));
        if !self.damaged.is_empty() {
            summary.push_str(&format!(", {} damaged", self.damaged.len()));
        }
        if let Some(journal) = &journal {
            summary.push_str(if journal.is_empty() {
                "; journal whole"
            } else {
                "; journal damaged"
            });
        }
        if self.command.quick {
            summary.push_str(" (quick: no tensor was read)");
        }
        streams.note("summary", &summary);
        if !whole {
            let hint = match self.whole.is_empty() && !self.single {
                true => "`unbroken repair --from COPY` takes whole files from a copy of the run",
                false => "starting the training's command again continues from the newest whole checkpoint",
            };
            streams.note("hint", hint);
        }
        Ok(Verdict::yes_if(whole))
    }
}

/// Whether what is wrong with a run directory is that its description is not what it was.
fn is_of_config(path: &Path, error: &unbroken::Error) -> bool {
    match error {
        unbroken::Error::Damaged { path: file, .. } => *file == path.join(CONFIG),
        unbroken::Error::Format { path: Some(file), .. } => {
            *file == path.join(CONFIG) || (file == path && path.join("checkpoints").is_dir())
        }
        _ => false,
    }
}

/// Whether an error is the answer (bytes are not what they should be), not a reason why there is none.
fn is_damage(error: &unbroken::Error) -> bool {
    use std::io::ErrorKind::{InvalidInput, NotFound, UnexpectedEof};
    match error {
        unbroken::Error::Damaged { .. } | unbroken::Error::Format { .. } => true,
        unbroken::Error::Io { source, .. } => {
            matches!(source.kind(), NotFound | UnexpectedEof | InvalidInput)
        }
        _ => false,
    }
}
