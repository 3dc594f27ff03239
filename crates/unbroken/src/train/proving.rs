//! What `unbroken prove` asks of a run that it starts: where to write, where to die, where to stop, what to save.
//!
//! Touches: the process environment, read once; signals to this very process at the points that were asked for. Without
//! the variables nothing here does anything. The Python front reads the same ones (`unbroken/proving.py`).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use crate::error::{Error, Result};

/// The variables, parsed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Instructions {
    /// Run directories are made in here, by the last part of their path, whatever the program says.
    pub directory: Option<PathBuf>,
    /// A point: the process kills itself, as hard as anything else could.
    crash_at: String,
    /// After this long.
    crash_delay: Duration,
    /// A point: the process asks itself to stop, as a scheduler would.
    stop_at: String,
    /// The run stops after this step as on a signal.
    pub steps: Option<u64>,
    /// Boundaries to save whatever the policy says: STEP-PHASE, or `restored` for what a resume put back.
    save: BTreeSet<String>,
    /// Seed of runs that name none, so that several runs of one program can be compared.
    pub seed: Option<u64>,
    /// Whether the journal's level is the program's own: a replay is compared with what the program recorded.
    pub own_journal: bool,
}

impl Instructions {
    /// What the environment asks of a run, by the last part of its path; `variable` looks one up.
    ///
    /// Points: `step:K` after step K is recorded, `saved:K` after its checkpoint is durable, `saving:K` while it is
    /// written, `work:E` when epoch E's loop is over, `epoch:E` when its after-work is.
    pub(super) fn read(run: &Path, variable: impl Fn(&str) -> Option<String>) -> Result<Instructions> {
        let text = |name: &str| variable(name).unwrap_or_default();
        let number = |name: &str| {
            let text = text(name);
            let parsed = if text.is_empty() {
                Ok(None)
            } else {
                text.parse().map(Some)
            };
            parsed.map_err(|_| Error::invalid(format!("{name} is `{text}`, not a number")))
        };
        // POINT@RUN is meant for that run alone.
        let point = |name: &str| {
            let text = text(name);
            match text.split_once('@') {
                Some((_, meant)) if run.file_name() != Some(OsStr::new(meant)) => String::new(),
                Some((point, _)) => point.to_owned(),
                None => text,
            }
        };
        let mut crash_at = point("UNBROKEN_CRASH_AT");
        let mut crash_delay = Duration::ZERO;
        if let Some((point, milliseconds)) =
            crash_at.rsplit_once(':').filter(|(point, _)| point.contains(':'))
        {
            let seconds = milliseconds.parse::<f64>().unwrap_or(-1.0) / 1000.0;
            crash_delay = Duration::try_from_secs_f64(seconds).map_err(|_| {
                Error::invalid(format!(
                    "UNBROKEN_CRASH_AT is `{crash_at}`, not POINT or POINT:MS"
                ))
            })?;
            crash_at = point.to_owned();
        }
        let directory = text("UNBROKEN_PROVE_DIR");
        let save = text("UNBROKEN_PROVE_SAVE");
        Ok(Instructions {
            directory: (!directory.is_empty()).then(|| PathBuf::from(directory)),
            crash_at,
            crash_delay,
            stop_at: point("UNBROKEN_STOP_AT"),
            steps: number("UNBROKEN_PROVE_STEPS")?,
            save: save
                .split(',')
                .filter(|part| !part.is_empty())
                .map(str::to_owned)
                .collect(),
            seed: number("UNBROKEN_PROVE_SEED")?,
            own_journal: text("UNBROKEN_PROVE_JOURNAL") == "own",
        })
    }

    /// Where a run that the program wants at `path` goes.
    pub(super) fn place(&self, path: &Path) -> PathBuf {
        match (&self.directory, path.file_name()) {
            (Some(directory), Some(name)) => directory.join(name),
            _ => path.to_owned(),
        }
    }

    /// Whether a boundary is to be saved.
    pub(super) fn saves(&self, step: u64, phase: u8) -> bool {
        !self.save.is_empty() && self.save.contains(&format!("{step}-{phase}"))
    }

    /// Whether what a resume put back is to be saved again.
    pub(super) fn saves_restored(&self) -> bool {
        self.save.contains("restored")
    }

    /// Dies or asks to stop, if that was asked for at this point.
    pub(super) fn reached(&self, kind: &str, number: u64) {
        let here = |point: &str| {
            point
                .split_once(':')
                .is_some_and(|(name, place)| name == kind && place.parse() == Ok(number))
        };
        // Neither can fail: the process is there, and may signal itself.
        if here(&self.stop_at) {
            let _ = kill_process(getpid(), Signal::TERM);
        }
        if !here(&self.crash_at) {
            return;
        }
        let delay = self.crash_delay;
        if delay.is_zero() {
            let _ = kill_process(getpid(), Signal::KILL);
        } else {
            std::thread::spawn(move || {
                std::thread::sleep(delay);
                let _ = kill_process(getpid(), Signal::KILL);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Instructions> {
        let find = |name: &str| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        Instructions::read(Path::new("runs/a"), find)
    }

    #[test]
    fn nothing_is_asked_without_variables() {
        let none = read(&[]).unwrap();
        assert_eq!(none, Instructions::default());
        assert_eq!(none.place(Path::new("runs/a")), Path::new("runs/a"));
        none.reached("step", 0);
    }

    #[test]
    fn points_delays_and_boundaries_are_read() {
        let asked = read(&[
            ("UNBROKEN_PROVE_DIR", "/trials/3"),
            ("UNBROKEN_CRASH_AT", "saving:40:2.5"),
            ("UNBROKEN_PROVE_STEPS", "60"),
            ("UNBROKEN_PROVE_SAVE", "40-0,restored"),
        ])
        .unwrap();
        assert_eq!(asked.place(Path::new("runs/a")), Path::new("/trials/3/a"));
        assert_eq!(
            (asked.crash_at.as_str(), asked.crash_delay),
            ("saving:40", Duration::from_micros(2500))
        );
        assert_eq!(asked.steps, Some(60));
        assert!(asked.saves(40, 0) && !asked.saves(40, 1) && asked.saves_restored());
    }

    #[test]
    fn a_point_of_another_run_is_not_this_ones() {
        let of = |run: &str| {
            let (crash, stop) = (format!("step:7:0.5@{run}"), format!("step:9@{run}"));
            read(&[("UNBROKEN_CRASH_AT", &crash), ("UNBROKEN_STOP_AT", &stop)]).unwrap()
        };
        let (this, other) = (of("a"), of("b"));
        assert_eq!(
            (this.crash_at.as_str(), this.stop_at.as_str()),
            ("step:7", "step:9")
        );
        assert_eq!(other, Instructions::default());
    }

    #[test]
    fn a_variable_that_is_no_number_is_refused_by_name() {
        let error = read(&[("UNBROKEN_PROVE_SEED", "x")]).unwrap_err();
        assert!(error.to_string().contains("UNBROKEN_PROVE_SEED"), "{error}");
        assert!(read(&[("UNBROKEN_CRASH_AT", "step:4:soon")]).is_err());
    }
}
