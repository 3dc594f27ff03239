//! `unbroken prove`: runs a program uninterrupted and killed in many ways, and says whether it makes a difference.
//!
//! Touches: child processes that it starts itself; a directory of its own, removed afterwards unless something
//! differs. The program is not changed: instructions travel in environment variables (python/unbroken/proving.py).

pub(crate) mod judge;
pub(crate) mod life;
mod plan;

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value as Json, json};
use unbroken::localise::change_words;
use unbroken::store::Checkpoint;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::words::{count, line, table};
use judge::{Difference, Recorded, boundary_words};
use life::{End, Interrupt, Life, Program, Written, last_words};
use plan::{Course, Point, Stop, Trial};

#[derive(Debug, Args)]
#[command(after_help = "\
The program must use unbroken.Run; it is run as it is. Its runs are written to directories of the
trials' own, other files that it writes are its own matter: with --jobs 1 no two of its processes
run at once. If it makes several runs, trials aim at each in turn.")]
pub(crate) struct Prove {
    /// Prove this many steps; by default five seconds' worth, or to an epoch's end
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<u64>,
    /// Prove all steps, however long it takes
    #[arg(long, conflicts_with = "steps")]
    pub(crate) all: bool,
    /// Stop the program this often in all
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) kills: usize,
    /// Which steps and instants
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Trials at the same time; by default one for each processor
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// Keep everything in this directory, which must not exist
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The program and its arguments, after --
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// One trial, done.
struct Done {
    words: String,
    directory: PathBuf,
    lives: usize,
    resumed_at: Vec<u64>,
    executed_again: usize,
    result: Judged,
    /// Stops that came when the program had already finished.
    too_late: usize,
}

enum Judged {
    Identical,
    Differs(Box<Difference>),
    /// A resumed life did not get to the end.
    Broke(String),
}

pub(crate) fn run(command: &Prove, streams: &mut Streams) -> Answer {
    let directory = make_directory(command.dir.as_deref())?;
    let mut proof = Proof {
        program: Program {
            command: command.command.clone(),
            seed: command.seed,
            steps: command.steps,
            seconds: None,
            timeout: None,
            own_journal: false,
            variables: Vec::new(),
            journal_bytes: 0,
            step: Duration::ZERO,
            interrupt: Interrupt::watch()
                .map_err(|error| io_failure("watch signals for", &directory, &error))?,
        },
        directory: directory.clone(),
        jobs: command
            .jobs
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
            .max(1),
        progress: Progress::new(),
    };
    let limit = (command.steps.is_none() && !command.all).then_some(SECONDS);
    let report = proof.make(limit, command.kills, command.seed).inspect_err(|_| {
        if command.dir.is_none() {
            // Only where it is empty: what a failed proof has recorded may say why.
            let _ = fs::remove_dir(&directory);
        }
    })?;
    proof.progress.clear();
    let exact = report.exact();
    let keep = command.dir.is_some() || !exact;
    if !keep {
        // Left-overs in the temporary directory are no reason to take a proof back.
        let _ = fs::remove_dir_all(&directory);
    }
    let kept = keep.then_some(directory.as_path());
    if command.json {
        streams.json(&report.json(kept))?
    } else {
        report.tell(kept, streams)?
    }
    Ok(Verdict::yes_if(exact))
}

pub(crate) fn make_directory(wanted: Option<&Path>) -> Result<PathBuf, Failure> {
    let path = match wanted {
        Some(path) => path.to_path_buf(),
        None => {
            let since = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or_default();
            std::env::temp_dir().join(format!(
                "unbroken-prove-{}-{}",
                std::process::id(),
                since.as_micros()
            ))
        }
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|error| io_failure("make", parent, &error))?;
    }
    fs::create_dir(&path).map_err(|error| io_failure("make", &path, &error))?;
    // Children may change their working directory.
    path.canonicalize()
        .map_err(|error| io_failure("find", &path, &error))
}

pub(crate) fn io_failure(doing: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("cannot {doing} \"{}\": {error}", path.display()))
}

/// A line about what is being done, on a terminal only.
struct Progress {
    on: bool,
    last: Mutex<usize>,
}

impl Progress {
    fn new() -> Progress {
        Progress {
            on: io::stderr().is_terminal(),
            last: Mutex::new(0),
        }
    }

    fn silent() -> Progress {
        Progress {
            on: false,
            last: Mutex::new(0),
        }
    }

    fn say(&self, text: &str) {
        if self.on {
            let mut last = self.last.lock().expect("nothing panics while it holds this");
            let text: String = line(text).chars().take(100).collect();
            let _ = write!(io::stderr(), "\r{text:<width$}", width = *last);
            let _ = io::stderr().flush();
            *last = text.chars().count();
        }
    }

    fn clear(&self) {
        self.say("");
        if self.on {
            let _ = write!(io::stderr(), "\r");
        }
    }
}

struct Proof {
    program: Program,
    directory: PathBuf,
    jobs: usize,
    progress: Progress,
}

/// How long the uninterrupted run trains unless more is asked for, in seconds. With eight stops the whole proof takes
/// about ten times as long on two processors, and as long again to start a Python program seventeen times.
const SECONDS: f64 = 5.0;

struct Report {
    /// Boundaries of the uninterrupted run, over all runs that the program makes.
    boundaries: usize,
    /// How far was looked, where the program would have gone on.
    cut: Option<Cut>,
    /// Whether the two uninterrupted runs agree.
    deterministic: bool,
    trials: Vec<Done>,
    /// The first difference, looked at closely, and of which trial.
    difference: Option<(String, Difference)>,
    elapsed: Duration,
}

/// The part of a program that was looked at.
struct Cut {
    /// Its last step.
    step: u64,
    /// How many epochs ended in it.
    epochs: usize,
    /// How many checkpoints were saved in it, between the first and the last.
    saves: usize,
}

impl Cut {
    /// For people: `up to step 115, with 2 ends of epochs and 6 saves on the way`.
    fn words(&self) -> String {
        let of = |number: usize, one: &str, more: &str| match number {
            0 => format!("no {one}"),
            1 => format!("1 {one}"),
            _ => format!("{number} {more}"),
        };
        format!(
            "up to step {}, with {} and {} on the way",
            self.step,
            of(self.epochs, "end of an epoch", "ends of epochs"),
            of(self.saves, "save", "saves")
        )
    }
}

impl Proof {
    fn make(&mut self, limit: Option<f64>, kills: usize, seed: u64) -> Result<Report, Failure> {
        let started = Instant::now();
        self.progress
            .say("starting the program, for the state that all trials begin with");
        self.make_start()?;
        self.progress.say("running the program uninterrupted");
        let (outcome, reference) = self.uninterrupted(limit)?;
        let boundaries: usize = reference.iter().map(|run| run.totals.boundaries).sum();
        if boundaries == 0 {
            return Err(self.no_steps());
        }
        let trained: Duration = outcome.lives.iter().map(|life| life.trained).sum();
        self.program.step = trained / u32::try_from(boundaries).unwrap_or(u32::MAX);
        self.program.journal_bytes = Written::in_runs(&outcome.directory.join("runs")).bytes;
        self.program.timeout = Some(started.elapsed() * 20 + Duration::from_secs(60));
        let courses: Vec<Course> = reference.iter().map(|run| course(run, reference.len())).collect();
        let trials = plan::plan(&courses, kills, seed);
        let mut report = Report {
            boundaries,
            cut: limit.and(self.program.steps).map(|step| Cut {
                step,
                epochs: courses.iter().map(|course| course.epochs.len()).sum(),
                saves: courses.iter().map(|course| course.saves.len()).sum(),
            }),
            deterministic: true,
            trials: Vec::new(),
            difference: None,
            elapsed: Duration::ZERO,
        };
        let (done, again) = self.try_all(&trials, &reference)?;
        if let Some(difference) = again {
            report.deterministic = false;
            let closer = self.look_closer(&difference, &Trial { stops: Vec::new() })?;
            report.difference = Some(("uninterrupted, twice".to_owned(), closer));
            report.elapsed = started.elapsed();
            return Ok(report);
        }
        report.trials = done;
        let differs = report
            .trials
            .iter()
            .zip(&trials)
            .find_map(|(done, trial)| match &done.result {
                Judged::Differs(difference) => Some((done, trial, difference)),
                _ => None,
            });
        if let Some((done, trial, difference)) = differs {
            let repeat = Trial {
                stops: self.repeatable(&done.directory, trial, &difference.run, reference.len())?,
            };
            let closer = self.look_closer(difference, &repeat)?;
            report.difference = Some((done.words.clone(), closer));
        }
        report.elapsed = started.elapsed();
        Ok(report)
    }

    /// Runs the program to the end, or until it has trained for so many seconds: how far it comes then is how far
    /// everything else goes.
    fn uninterrupted(&mut self, limit: Option<f64>) -> Result<(Performed, Vec<Recorded>), Failure> {
        let perform = |proof: &Proof, name: &str| -> Result<Performed, Failure> {
            let outcome = proof
                .perform(name, &Trial { stops: Vec::new() }, "")
                .map_err(|error| io_failure("run the program in", &proof.directory, &error))?;
            match &outcome.broke {
                Some(why) => Err(proof.broken(why)),
                None => Ok(outcome),
            }
        };
        self.program.seconds = limit;
        let outcome = perform(self, UNINTERRUPTED);
        self.program.seconds = None;
        let mut outcome = outcome?;
        if self.make_further_starts()? {
            let stale = self.directory.join(UNINTERRUPTED);
            fs::remove_dir_all(&stale).map_err(|error| io_failure("remove", &stale, &error))?;
            outcome = perform(self, UNINTERRUPTED)?;
        }
        let reference = self.read(&outcome.directory)?;
        let cut = outcome
            .lives
            .last()
            .is_some_and(|life| matches!(life.end, End::Stopped(_)));
        if limit.is_none() || !cut {
            return Ok((outcome, reference));
        }
        if let [run] = reference.as_slice() {
            self.program.steps = Some(run.totals.last);
            let reference = self.read(&outcome.directory)?;
            return Ok((outcome, reference));
        }
        // A number of steps would cut each of several runs, and the first ones were not.
        let outcome = perform(self, "uninterrupted-whole")?;
        let reference = self.read(&outcome.directory)?;
        Ok((outcome, reference))
    }

    /// Runs the program uninterrupted once more, and all trials, as many at a time as there are jobs. If the program turns
    /// out not to be deterministic, trials that have not begun say nothing, and are left out.
    fn try_all(
        &self,
        trials: &[Trial],
        reference: &[Recorded],
    ) -> Result<(Vec<Done>, Option<Difference>), Failure> {
        let mut order: Vec<usize> = (0..trials.len()).collect();
        // What takes longest first, so that no processor is idle at the end.
        order.sort_by_key(|index| std::cmp::Reverse(trials[*index].stops.len()));
        let tasks: Vec<Option<usize>> = std::iter::once(None).chain(order.into_iter().map(Some)).collect();
        let again: Mutex<Option<Difference>> = Mutex::new(None);
        let done = self.each(&tasks, |task| match task {
            None => {
                let difference = self.repeat(reference)?;
                *again.lock().expect("no holder panics") = difference;
                Ok(None)
            }
            Some(_) if again.lock().expect("no holder panics").is_some() => Ok(None),
            Some(index) => {
                let done = self.try_one(*index, &trials[*index], trials.len(), reference)?;
                Ok(Some((*index, done)))
            }
        });
        let done: Vec<Option<(usize, Done)>> = done.into_iter().collect::<Result<_, Failure>>()?;
        let mut done: Vec<(usize, Done)> = done.into_iter().flatten().collect();
        done.sort_by_key(|(index, _)| *index);
        let again = again.into_inner().expect("no holder panics");
        Ok((done.into_iter().map(|(_, done)| done).collect(), again))
    }

    fn repeat(&self, reference: &[Recorded]) -> Result<Option<Difference>, Failure> {
        let outcome = self
            .perform("uninterrupted-again", &Trial { stops: Vec::new() }, "")
            .map_err(|error| io_failure("run the program in", &self.directory, &error))?;
        match &outcome.broke {
            Some(why) => Err(self.broken(why)),
            None => Ok(judge::compare(reference, &self.read(&outcome.directory)?)?),
        }
    }

    /// Makes the program's first run, up to its checkpoint of step 0. Every trial goes on from a copy of it: what the
    /// program left unseeded is the same for all of them then, as it is for all lives of one run.
    fn make_start(&self) -> Result<(), Failure> {
        if self.live_to_next_start(&self.directory.join(START), 1)? {
            return Ok(());
        }
        Err(self.no_steps())
    }

    /// Makes the same of every further run that the program makes; says whether there are any.
    ///
    /// The program goes on in a directory of its own, killed whenever another run has saved its step 0: those before it
    /// are complete then, and it is copied as it is.
    fn make_further_starts(&self) -> Result<bool, Failure> {
        let starts = self.directory.join(START).join("runs");
        let failed = |error: io::Error| io_failure("copy a run to", &starts, &error);
        let known = run_names(&starts).map_err(failed)?;
        let made = run_names(&self.directory.join(UNINTERRUPTED).join("runs")).map_err(failed)?;
        if made.is_subset(&known) {
            return Ok(false);
        }
        self.progress.say("starting the program's further runs");
        let scratch = self.directory.join("starts");
        copy_tree(&starts, &scratch.join("runs")).map_err(failed)?;
        let mut life = 1;
        while self.live_to_next_start(&scratch, life)? {
            let here = scratch.join("runs");
            let new = run_names(&here).map_err(failed)?;
            let old = run_names(&starts).map_err(failed)?;
            if new.is_subset(&old) {
                break;
            }
            for name in new.difference(&old) {
                copy_tree(&here.join(name), &starts.join(name)).map_err(failed)?;
            }
            life += 1;
        }
        fs::remove_dir_all(&scratch).map_err(|error| io_failure("remove", &scratch, &error))?;
        Ok(true)
    }

    /// Runs the program until a run has saved its step 0; says whether one did.
    fn live_to_next_start(&self, directory: &Path, number: usize) -> Result<bool, Failure> {
        let stop = Stop::kill_at(Point::new("saved", 0, None));
        let life = self
            .program
            .live(directory, number, Some(&stop), "")
            .map_err(|error| io_failure("run the program in", &self.directory, &error))?;
        match &life.end {
            End::Killed => Ok(true),
            End::Failed(how) => Err(self.broken(&format!("it ended with {how}: {}", last_words(&life.log)))),
            End::Finished | End::Stopped(_) | End::TimedOut => Ok(false),
        }
    }

    fn broken(&self, why: &str) -> Failure {
        Failure::new(format!(
            "the program does not run to its end uninterrupted: {why}"
        ))
        .hint(format!("what it printed is in {}", self.directory.display()))
    }

    fn no_steps(&self) -> Failure {
        Failure::new("the program recorded no step of an unbroken.Run").hint(format!(
            "prove watches programs whose loop goes through unbroken.Run; what it printed is in {}",
            self.directory.display()
        ))
    }

    /// Does something for each item, as many at a time as there are jobs; results come in the items' order.
    fn each<I: Sync, R: Send>(&self, items: &[I], work: impl Fn(&I) -> R + Sync) -> Vec<R> {
        let queue: Mutex<VecDeque<usize>> = Mutex::new((0..items.len()).collect());
        let results: Vec<Mutex<Option<R>>> = items.iter().map(|_| Mutex::new(None)).collect();
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.min(items.len()) {
                scope.spawn(|| {
                    while let Some(index) = { queue.lock().expect("no holder panics").pop_front() } {
                        *results[index].lock().expect("no holder panics") = Some(work(&items[index]));
                    }
                });
            }
        });
        let taken = results
            .into_iter()
            .map(|result| result.into_inner().expect("no holder panics"));
        taken
            .map(|result| result.expect("every item was worked on"))
            .collect()
    }

    fn read(&self, directory: &Path) -> Result<Vec<Recorded>, Failure> {
        Ok(Recorded::all(&directory.join("runs"), self.program.steps)?)
    }

    /// Runs the program with its stops and then to its end.
    fn perform(&self, name: &str, trial: &Trial, save: &str) -> io::Result<Performed> {
        let directory = self.directory.join(name);
        copy_tree(&self.directory.join(START).join("runs"), &directory.join("runs"))?;
        let mut performed = Performed {
            directory,
            lives: Vec::new(),
            too_late: 0,
            broke: None,
        };
        for stop in &trial.stops {
            let life =
                self.program
                    .live(&performed.directory, performed.lives.len() + 1, Some(stop), save)?;
            let end = life.end.clone();
            performed.lives.push(life);
            let asked = matches!(stop, Stop::TermAt { .. });
            match end {
                End::Killed => {}
                End::Stopped(_) if asked => {}
                End::Finished | End::Stopped(_) => {
                    performed.too_late += 1;
                    return Ok(performed);
                }
                End::Failed(_) | End::TimedOut => return Ok(performed.broken()),
            }
        }
        let life = self
            .program
            .live(&performed.directory, performed.lives.len() + 1, None, save)?;
        let end = life.end.clone();
        performed.lives.push(life);
        Ok(match end {
            End::Finished | End::Stopped(_) => performed,
            End::Killed | End::Failed(_) | End::TimedOut => performed.broken(),
        })
    }

    fn try_one(
        &self,
        index: usize,
        trial: &Trial,
        all: usize,
        reference: &[Recorded],
    ) -> Result<Done, Failure> {
        self.progress
            .say(&format!("trial {} of {all}: {}", index + 1, trial.words()));
        let name = format!("trial-{}", index + 1);
        let performed = self.perform(&name, trial, "");
        let performed =
            performed.map_err(|error| io_failure("run the program in", &self.directory, &error))?;
        let found = self.read(&performed.directory)?;
        let result = match (&performed.broke, judge::compare(reference, &found)?) {
            // A life that broke leaves too few boundaries; a difference in what it did record says more.
            (Some(why), None) => Judged::Broke(why.clone()),
            (Some(why), Some(difference)) if difference.parting.is_none() => Judged::Broke(why.clone()),
            (_, Some(difference)) => Judged::Differs(Box::new(difference)),
            (None, None) => Judged::Identical,
        };
        Ok(Done {
            words: trial.words(),
            directory: performed.directory,
            lives: performed.lives.len(),
            resumed_at: found.iter().flat_map(Recorded::resumed_at).collect(),
            executed_again: found.iter().map(|run| run.totals.again).sum(),
            result,
            too_late: performed.too_late,
        })
    }

    /// Stops that lead to the same resumes as those of a trial did, without chance.
    fn repeatable(
        &self,
        directory: &Path,
        trial: &Trial,
        run: &str,
        runs: usize,
    ) -> Result<Vec<Stop>, Failure> {
        if trial.stops.iter().all(|stop| matches!(stop, Stop::TermAt { .. })) {
            return Ok(trial.stops.clone());
        }
        let found = Recorded::open(
            &directory.join("runs").join(run),
            run.to_owned(),
            self.program.steps,
        )?;
        let mut stops = Vec::new();
        let lives = || found.story.lives.iter().filter(|life| life.life > 1);
        for (life, next) in lives().zip(lives().skip(1)) {
            let last = found
                .totals
                .lives
                .get(&life.life)
                .map_or(life.step, |(last, _)| *last);
            // A life dies at a step before it saves it: the next one starts from what was saved before.
            let step = if last > next.step { last } else { next.step + 1 };
            let of_run = (runs > 1).then(|| run.to_owned());
            stops.push(Stop::kill_at(Point::new("step", step, of_run)));
        }
        Ok(stops)
    }

    /// Repeats both sides of a difference with their states saved where they part, and compares those.
    fn look_closer(&self, difference: &Difference, trial: &Trial) -> Result<Difference, Failure> {
        let Some(parting) = &difference.parting else {
            return Ok(difference.clone());
        };
        self.progress.say(&format!(
            "looking closer at {}",
            boundary_words(parting.step, parting.phase)
        ));
        let steps = parting.step + u64::from(parting.phase > 0);
        let program = Program {
            steps: Some(self.program.steps.map_or(steps, |most| most.min(steps))),
            ..self.program.clone()
        };
        let closer = Proof {
            program,
            directory: self.directory.clone(),
            jobs: self.jobs,
            progress: Progress::silent(),
        };
        let save = format!("restored,{}-{}", parting.step, parting.phase);
        let none = Trial { stops: Vec::new() };
        let sides = [("closer-expected", &none), ("closer-found", trial)];
        let performed = closer.each(&sides, |(name, trial)| closer.perform(name, trial, &save));
        let mut directories = Vec::new();
        for side in performed {
            let side = side.map_err(|error| io_failure("run the program in", &self.directory, &error))?;
            if let Some(why) = side.broke {
                let note = format!("a closer look was not possible: {why}");
                return Ok(Difference {
                    note: Some(note),
                    ..difference.clone()
                });
            }
            directories.push(side.directory.join("runs"));
        }
        Ok(judge::look_closer(difference, &directories[0], &directories[1])?)
    }
}

/// The directory in which the runs are made that all trials go on from.
const START: &str = "start";
/// The directory of what all trials are compared with.
const UNINTERRUPTED: &str = "uninterrupted";

/// What an uninterrupted run did, as far as plans need it.
fn course(run: &Recorded, runs: usize) -> Course {
    let infos = run.overview.checkpoints.iter().map(Checkpoint::info);
    let saves = infos.filter(|info| info.phase == 0).map(|info| info.step);
    Course::new(
        (runs > 1).then(|| run.name.clone()),
        run.totals.last,
        run.totals.epochs.clone(),
        saves,
    )
}

/// Names of the runs in a directory.
fn run_names(runs: &Path) -> io::Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(runs)? {
        let entry = entry?;
        if entry.path().join("run.toml").is_file() {
            names.insert(entry.file_name());
        }
    }
    Ok(names)
}

/// Copies a directory of runs. Nothing writes to it meanwhile.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// What running the program, stops and all, came to.
struct Performed {
    directory: PathBuf,
    lives: Vec<Life>,
    too_late: usize,
    /// Why it did not get to its end.
    broke: Option<String>,
}

impl Performed {
    fn broken(mut self) -> Performed {
        let number = self.lives.len();
        if let Some(life) = self.lives.last() {
            let how = match &life.end {
                End::TimedOut => "took much longer than the uninterrupted run".to_owned(),
                End::Killed => "was killed by somebody else".to_owned(),
                End::Failed(how) => format!("ended with {how}: {}", last_words(&life.log)),
                End::Finished | End::Stopped(_) => "ended".to_owned(),
            };
            self.broke = Some(format!("life {number} {how}"));
        }
        self
    }
}

impl Report {
    fn exact(&self) -> bool {
        self.deterministic
            && self
                .trials
                .iter()
                .all(|done| matches!(done.result, Judged::Identical))
    }

    fn stops(&self) -> usize {
        self.trials.iter().map(|done| done.lives - 1).sum()
    }

    fn verdict(&self) -> String {
        if !self.deterministic {
            return "not deterministic: two uninterrupted runs of the program differ".to_owned();
        }
        if !self.exact() {
            let wrong = self
                .trials
                .iter()
                .filter(|done| !matches!(done.result, Judged::Identical))
                .count();
            return format!(
                "not exact: {wrong} of {} trials went another way",
                self.trials.len()
            );
        }
        let course = match &self.cut {
            Some(cut) => format!(" {} (`--all` goes on to the end)", cut.words()),
            None => String::new(),
        };
        format!(
            "exact: {} in {}, and each of {} and the final state are those of the uninterrupted run{course}",
            count(self.stops(), "stop"),
            count(self.trials.len(), "trial"),
            if self.boundaries == 1 {
                "1 boundary".to_owned()
            } else {
                format!("{} boundaries", self.boundaries)
            },
        )
    }

    fn tell(&self, kept: Option<&Path>, streams: &mut Streams) -> Result<(), Failure> {
        let mut rows = vec![
            ["trial", "lives", "resumed at", "again", "result"]
                .map(str::to_owned)
                .to_vec(),
        ];
        let second = if self.deterministic {
            "identical"
        } else {
            "differs"
        };
        for (name, result) in [("uninterrupted", "recorded"), ("uninterrupted again", second)] {
            rows.push(vec![
                name.to_owned(),
                "1".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                result.to_owned(),
            ]);
        }
        for done in &self.trials {
            let places: Vec<String> = done.resumed_at.iter().map(u64::to_string).collect();
            rows.push(vec![
                done.words.clone(),
                done.lives.to_string(),
                if places.is_empty() {
                    "-".to_owned()
                } else {
                    places.join(" ")
                },
                done.executed_again.to_string(),
                done.result_words(),
            ]);
        }
        streams.print(&table(&rows))?;
        streams.say("")?;
        if let Some((trial, difference)) = &self.difference {
            for text in difference_lines(trial, difference) {
                streams.say(text)?;
            }
        }
        streams.say(format!(
            "{} ({:.0} s)",
            self.verdict(),
            self.elapsed.as_secs_f64()
        ))?;
        if let Some(path) = kept {
            streams.note("note", &format!("everything is kept in {}", path.display()));
        }
        Ok(())
    }

    fn json(&self, kept: Option<&Path>) -> Json {
        let trials: Vec<Json> = self
            .trials
            .iter()
            .map(|done| {
                json!({
                    "trial": done.words,
                    "lives": done.lives,
                    "resumed_at": done.resumed_at,
                    "executed_again": done.executed_again,
                    "too_late": done.too_late,
                    "identical": matches!(done.result, Judged::Identical),
                    "result": done.result_words(),
                })
            })
            .collect();
        json!({
            "exact": self.exact(),
            "deterministic": self.deterministic,
            "verdict": self.verdict(),
            "boundaries": self.boundaries,
            "cut_at": self.cut.as_ref().map(|cut| cut.step),
            "stops": self.stops(),
            "trials": trials,
            "difference": self.difference.as_ref().map(|(trial, difference)| difference_json(trial, difference)),
            "seconds": self.elapsed.as_secs_f64(),
            "directory": kept.map(|path| path.display().to_string()),
        })
    }
}

impl Done {
    fn result_words(&self) -> String {
        match &self.result {
            Judged::Identical if self.too_late > 0 => "identical (a stop came too late)".to_owned(),
            Judged::Identical => "identical".to_owned(),
            Judged::Differs(difference) => difference.summary(),
            Judged::Broke(why) => why.clone(),
        }
    }
}

/// Leaves that are shown; a difference that spread shows everywhere, and the first ones say it all.
const SHOWN: usize = 3;

pub(crate) fn difference_lines(trial: &str, difference: &Difference) -> Vec<String> {
    let mut lines = vec![format!("first difference, {trial}:")];
    if let Some(parting) = &difference.parting {
        let after = match difference.resumed_at {
            Some(step) => format!(", resumed from step {step}"),
            None => String::new(),
        };
        lines.push(format!(
            "  {}{after}: `{}` should be {}, found {}",
            boundary_words(parting.step, parting.phase),
            parting.component,
            or_nothing(&parting.expected),
            or_nothing(&parting.found)
        ));
        if parting.differing.len() > 1 {
            lines.push(format!(
                "  differing with it: {}",
                parting.differing[1..].join(", ")
            ));
        }
    } else {
        lines.push(format!("  {}", difference.words));
    }
    for (what, leaves) in [
        ("right after the resume", &difference.restored),
        ("in the state there", &difference.leaves),
    ] {
        for leaf in leaves.iter().take(SHOWN) {
            lines.push(format!(
                "  {what}: `{}`: {}",
                leaf.path,
                change_words(&leaf.change)
            ));
        }
        if leaves.len() > SHOWN {
            lines.push(format!("  {what}: and {} more", leaves.len() - SHOWN));
        }
    }
    if let Some(note) = &difference.note {
        lines.push(format!("  {note}"));
    }
    if let Some(cause) = &difference.cause {
        lines.push(format!("  likely cause: {}", cause.words));
    }
    lines.push(String::new());
    lines.into_iter().map(|text| line(&text)).collect()
}

fn or_nothing(text: &str) -> &str {
    if text.is_empty() { "nothing" } else { text }
}

pub(crate) fn difference_json(trial: &str, difference: &Difference) -> Json {
    let leaves = |leaves: &[unbroken::cause::Leaf]| -> Vec<Json> {
        leaves
            .iter()
            .map(|leaf| json!({ "path": leaf.path, "change": change_words(&leaf.change) }))
            .collect()
    };
    json!({
        "trial": trial,
        "run": difference.run,
        "summary": difference.summary(),
        "step": difference.parting.as_ref().map(|parting| parting.step),
        "phase": difference.parting.as_ref().map(|parting| parting.phase),
        "component": difference.parting.as_ref().map(|parting| parting.component.clone()),
        "expected": difference.parting.as_ref().map(|parting| parting.expected.clone()),
        "found": difference.parting.as_ref().map(|parting| parting.found.clone()),
        "differing": difference.parting.as_ref().map(|parting| parting.differing.clone()),
        "resumed_at": difference.resumed_at,
        "restored": leaves(&difference.restored),
        "leaves": leaves(&difference.leaves),
        "cause": difference.cause.as_ref().map(|cause| json!({ "id": cause.id, "words": cause.words })),
        "note": difference.note,
    })
}
