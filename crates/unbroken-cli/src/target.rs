//! What the words RUN and RUN@STEP stand for.
//!
//! Touches: run directories, read only, without their locks.

use std::path::{Path, PathBuf};

use unbroken::journal::Story;
use unbroken::run::{self, Overview};
use unbroken::store::Checkpoint;

use crate::answer::{Failure, Streams};
use crate::words::count;

/// A run directory, and a step if one was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    pub(crate) step: Option<u64>,
}

impl Target {
    /// Reads RUN or RUN@STEP; a directory whose own name ends like a step is taken as it is.
    pub(crate) fn parse(text: &str) -> Target {
        let whole = Target {
            path: PathBuf::from(text),
            step: None,
        };
        if whole.path.exists() {
            return whole;
        }
        match text.rsplit_once('@').map(|(run, step)| (run, step.parse())) {
            Some((run, Ok(step))) if !run.is_empty() => Target {
                path: PathBuf::from(run),
                step: Some(step),
            },
            _ => whole,
        }
    }
}

/// Looks at a run directory.
pub(crate) fn open_run(path: &Path) -> Result<Overview, Failure> {
    Ok(run::read_run(path)?)
}

/// Opens a run's journal.
pub(crate) fn open_story(path: &Path) -> Result<Story, Failure> {
    Ok(run::read_story(path)?)
}

/// Opens the checkpoint that RUN or RUN@STEP names, or a manifest's own path. Its tensors are verified as they are
/// read.
pub(crate) fn open_checkpoint(text: &str, streams: &mut Streams) -> Result<Checkpoint, Failure> {
    let target = Target::parse(text);
    if target.step.is_none() && target.path.is_file() {
        return Ok(run::read_checkpoint(&target.path)?);
    }
    let overview = open_run(&target.path)?;
    choose(&target, overview, streams)
}

/// Chooses a run's newest whole checkpoint, or the one after the step that was named.
pub(crate) fn choose(
    target: &Target,
    overview: Overview,
    streams: &mut Streams,
) -> Result<Checkpoint, Failure> {
    let Some(step) = target.step else {
        let (path, rejected) = (target.path.display(), overview.rejected);
        let Some(checkpoint) = overview.checkpoints.into_iter().next_back() else {
            let failure = Failure::new(format!("{path} holds no whole checkpoint"));
            return Err(match rejected.first() {
                Some((name, why)) => failure.hint(format!("the newest, {name}, is damaged: {why}")),
                None => failure,
            });
        };
        for (name, why) in rejected.iter().filter(|(name, _)| *name > checkpoint.info().name) {
            streams.note("warning", &format!("passed over {name}, which is newer: {why}"));
        }
        return Ok(checkpoint);
    };
    let found = overview
        .checkpoints
        .iter()
        .rfind(|checkpoint| checkpoint.info().step == step)
        .cloned();
    found.ok_or_else(|| missing(target, step, &overview))
}

/// Says that there is no whole checkpoint of a step, and which ones there are.
pub(crate) fn missing(target: &Target, step: u64, overview: &Overview) -> Failure {
    let path = target.path.display();
    let of_step = |(name, _): &&(String, unbroken::Error)| name.starts_with(&format!("{step:09}-"));
    if let Some((_, why)) = overview.rejected.iter().find(of_step) {
        return Failure::new(format!(
            "the checkpoint of step {step} in {path} is damaged: {why}"
        ));
    }
    let infos = overview.checkpoints.iter().map(Checkpoint::info);
    let steps: Vec<u64> = infos.map(|info| info.step).collect();
    Failure::new(format!("{path} has no checkpoint of step {step}")).hint(near(step, &steps))
}

/// Says which steps there are instead.
fn near(step: u64, steps: &[u64]) -> String {
    let before = steps.iter().rev().find(|&&other| other < step);
    let after = steps.iter().find(|&&other| other > step);
    match (before, after) {
        (Some(before), Some(after)) => format!("the nearest are those of steps {before} and {after}"),
        (Some(only), None) | (None, Some(only)) => {
            format!(
                "the nearest is that of step {only}, among {}",
                count(steps.len(), "checkpoint")
            )
        }
        (None, None) => "there is no whole checkpoint in it".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_what_follows_the_last_at_sign() {
        let target = |path: &str, step| Target {
            path: path.into(),
            step,
        };
        assert_eq!(Target::parse("no/such"), target("no/such", None));
        assert_eq!(Target::parse("no/such@12"), target("no/such", Some(12)));
        assert_eq!(Target::parse("no@such@12"), target("no@such", Some(12)));
        assert_eq!(Target::parse("no@such"), target("no@such", None));
        assert_eq!(Target::parse("@12"), target("@12", None));
    }

    #[test]
    fn a_directory_whose_name_ends_like_a_step_is_taken_as_it_is() {
        let parent = tempfile::tempdir().unwrap();
        let run = parent.path().join("run@3");
        std::fs::create_dir(&run).unwrap();
        assert_eq!(
            Target::parse(run.to_str().unwrap()),
            Target {
                path: run,
                step: None
            }
        );
    }
}
