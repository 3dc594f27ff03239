//! Lives of the program that is put to the proof: started, stopped from outside or by themselves, waited for.
//!
//! Touches: child processes that it starts itself, the trial's directory, one log file a life; while an [`Interrupt`]
//! is alive, the handlers of SIGINT, SIGTERM and SIGHUP.
//!
//! Each life is a process group of its own, so that a kill reaches the training through whatever starts it: a shell
//! script, `cargo run`, a launcher. A terminal's signals no longer reach it by themselves for the same reason.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{SigId, flag, low_level};

use crate::prove::plan::Stop;

/// How a life ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// With exit code 0.
    Finished,
    /// By SIGKILL, as planned.
    Killed,
    /// With another exit code, after a stop that it was asked for.
    Stopped(i32),
    /// With another exit code or signal, of its own accord.
    Failed(String),
    /// It took longer than it was given, and was killed for that.
    TimedOut,
}

/// The program, and what all its lives have in common.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) command: Vec<String>,
    /// Seed for runs that name none.
    pub(crate) seed: u64,
    pub(crate) steps: Option<u64>,
    /// It stops after this much training, in seconds, whatever step that is.
    pub(crate) seconds: Option<f64>,
    /// Whether the program chooses its journal's level itself.
    pub(crate) own_journal: bool,
    /// Added to this process's own environment.
    pub(crate) variables: Vec<(String, String)>,
    pub(crate) timeout: Option<Duration>,
    /// How much the uninterrupted run wrote to its journals, in bytes.
    pub(crate) journal_bytes: u64,
    /// How long one of its steps took, on average.
    pub(crate) step: Duration,
    pub(crate) interrupt: Interrupt,
}

/// Whether a person or a system wants this program itself to end: its lives end with it.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt(Arc<Watched>);

#[derive(Debug)]
struct Watched {
    came: Arc<AtomicBool>,
    handlers: Vec<SigId>,
}

impl Interrupt {
    /// From here on, and as long as a copy lives, the signals raise a flag.
    pub(crate) fn watch() -> io::Result<Interrupt> {
        let came = Arc::new(AtomicBool::new(false));
        let mut watched = Watched {
            came: Arc::clone(&came),
            handlers: Vec::new(),
        };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            watched.handlers.push(flag::register(signal, Arc::clone(&came))?);
        }
        Ok(Interrupt(Arc::new(watched)))
    }

    fn came(&self) -> bool {
        self.0.came.load(Ordering::Relaxed)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.handlers.iter().for_each(|handler| {
            low_level::unregister(*handler);
        });
    }
}

/// One life: how it ended, and how long it trained.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    pub(crate) end: End,
    pub(crate) trained: Duration,
    pub(crate) log: PathBuf,
}

/// What the journals of a trial hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// Segments: one more means that a life has begun to train.
    segments: usize,
    pub(crate) bytes: u64,
}

impl Written {
    /// Looks at the files' sizes; what cannot be looked at is not there yet.
    pub(crate) fn in_runs(runs: &Path) -> Written {
        let mut written = Written::default();
        let Ok(entries) = fs::read_dir(runs) else {
            return written;
        };
        for journal in entries
            .flatten()
            .filter_map(|run| fs::read_dir(run.path().join("journal")).ok())
        {
            for segment in journal.flatten() {
                written.segments += 1;
                written.bytes += segment.metadata().map_or(0, |metadata| metadata.len());
            }
        }
        written
    }
}

/// Exit code of a run that stopped because it was asked to, unless the program chose another.
const REQUEUE: i32 = 75;
/// What a shell ends with when the program it waited for was killed.
const KILLED_IN_A_SHELL: i32 = 128 + 9;

/// Kills a life: everything in its process group.
fn kill(child: &Child) {
    // It fails where all of them have ended, and then there is nothing to do.
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

impl Program {
    /// Runs one life in a trial's directory to its end.
    pub(crate) fn live(
        &self,
        directory: &Path,
        number: usize,
        stop: Option<&Stop>,
        save: &str,
    ) -> io::Result<Life> {
        let runs = directory.join("runs");
        fs::create_dir_all(&runs)?;
        let log = directory.join(format!("life-{number}.log"));
        let output = File::create(&log)?;
        let mut command = Command::new(&self.command[0]);
        command
            .args(&self.command[1..])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .env_remove("UNBROKEN_CRASH_AT")
            .env_remove("UNBROKEN_STOP_AT")
            .env_remove("UNBROKEN_PROVE_STEPS")
            .env_remove("UNBROKEN_PROVE_SECONDS")
            .env_remove("UNBROKEN_TRACE")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .env("UNBROKEN_PROVE_DIR", &runs)
            .env("UNBROKEN_PROVE_SAVE", save)
            .env("UNBROKEN_PROVE_SEED", (self.seed >> 1).to_string());
        command.env(
            "UNBROKEN_PROVE_JOURNAL",
            if self.own_journal { "own" } else { "" },
        );
        if let Some(steps) = self.steps {
            command.env("UNBROKEN_PROVE_STEPS", steps.to_string());
        }
        if let Some(seconds) = self.seconds {
            command.env("UNBROKEN_PROVE_SECONDS", seconds.to_string());
        }
        match stop {
            Some(Stop::KillAt { at, delay_ms }) if *delay_ms > 0.0 => {
                command.env("UNBROKEN_CRASH_AT", at.variable(&format!(":{delay_ms:.3}")));
            }
            Some(Stop::KillAt { at, .. }) => {
                command.env("UNBROKEN_CRASH_AT", at.variable(""));
            }
            Some(Stop::TermAt { at }) => {
                command.env("UNBROKEN_STOP_AT", at.variable(""));
            }
            Some(Stop::KillAfter { .. }) | None => {}
        }
        let before = Written::in_runs(&runs);
        let child = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("`{}`: {error}", self.command[0])))?;
        self.watch(child, stop, &runs, before, log)
    }

    fn watch(
        &self,
        mut child: Child,
        stop: Option<&Stop>,
        runs: &Path,
        before: Written,
        log: PathBuf,
    ) -> io::Result<Life> {
        let started = Instant::now();
        let mut began: Option<Instant> = None;
        let mut kill_at: Option<Instant> = None;
        loop {
            if let Some(status) = child.try_wait()? {
                let trained = began.map_or(Duration::ZERO, |began| began.elapsed());
                let kills = matches!(stop, Some(Stop::KillAt { .. } | Stop::KillAfter { .. }));
                let end = match (status.code(), status.signal()) {
                    (Some(0), _) => End::Finished,
                    (Some(KILLED_IN_A_SHELL), _) | (_, Some(9)) if kills => End::Killed,
                    (Some(code), _) if matches!(stop, Some(Stop::TermAt { .. })) => End::Stopped(code),
                    (Some(REQUEUE), _) if self.steps.is_some() || self.seconds.is_some() => {
                        End::Stopped(REQUEUE)
                    }
                    (Some(code), _) => End::Failed(format!("exit code {code}")),
                    (None, signal) => End::Failed(format!("signal {}", signal.unwrap_or(0))),
                };
                return Ok(Life { end, trained, log });
            }
            let now = Written::in_runs(runs);
            if began.is_none() && now.segments > before.segments {
                began = Some(Instant::now());
            }
            if let (Some(Stop::KillAfter { fraction, jitter }), Some(_), None) = (stop, began, kill_at)
                && now.bytes as f64 >= self.journal_bytes as f64 * fraction
            {
                kill_at = Some(Instant::now() + self.step.mul_f64(*jitter));
            }
            if kill_at.is_some_and(|instant| Instant::now() >= instant) {
                kill(&child);
            }
            if self.interrupt.came() {
                kill(&child);
                child.wait()?;
                return Err(io::Error::new(io::ErrorKind::Interrupted, "asked to end"));
            }
            if self.timeout.is_some_and(|timeout| started.elapsed() > timeout) {
                kill(&child);
                child.wait()?;
                return Ok(Life {
                    end: End::TimedOut,
                    trained: Duration::ZERO,
                    log,
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The last words of a life that failed: the end of what it printed, without what is not an error.
pub(crate) fn last_words(log: &Path) -> String {
    let text = fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let last = text
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with("hint:"));
    last.unwrap_or("it printed nothing").to_owned()
}
