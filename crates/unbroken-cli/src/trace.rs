//! `unbroken trace`: executes one step twice from the same state, and names the first operator that gave something else.
//!
//! Touches: the run directory, read only; a directory of its own beside the system's temporary files, removed afterwards
//! unless something differs; the program that it starts.

mod parting;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::json;
use unbroken::journal::Boundary;
use unbroken::localise::Parting;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::prove::judge::{self, Recorded};
use crate::prove::life::{End, Interrupt, Life, Program, last_words};
use crate::prove::{io_failure, make_directory};
use crate::replay::{choose, copy_run};
use crate::words::line;
use parting::{Line, Outcome, Unreadable};

#[derive(Debug, Args)]
#[command(after_help = "\
The step begins in both executions with the state of the newest checkpoint before it; the steps
between are executed without a recorder.")]
pub(crate) struct Trace {
    /// Run directory with the history
    pub(crate) run: PathBuf,
    /// The step; by default the last that came out differently when repeated
    #[arg(long, value_name = "STEP")]
    pub(crate) step: Option<u64>,
    /// Set this in the second execution, such as OMP_NUM_THREADS=2
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub(crate) variables: Vec<(String, String)>,
    /// Execute one after the other
    #[arg(long)]
    pub(crate) in_turn: bool,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The program and its arguments, after --
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not NAME=VALUE")),
    }
}

/// Settings that a variable may change; what that does to the numbers is the question here, so they do not refuse.
const SETTINGS: &str = "threads.*,torch.*,env.*,cuda.*,cudnn.*";
const SIDES: [&str; 2] = ["first", "second"];
const RECORD: &str = "operators.jsonl";

/// One execution of the step.
struct Side {
    recorded: Recorded,
    record: PathBuf,
}

pub(crate) fn run(command: &Trace, streams: &mut Streams) -> Answer {
    let path = fs::canonicalize(&command.run).map_err(|error| io_failure("open", &command.run, &error))?;
    let history = Recorded::open(&path, name_of(&path), None)?;
    let mut step = match command.step {
        Some(step) => step,
        None => diverged(&history)?,
    };
    let directory = make_directory(None)?;
    let (from, sides) = loop {
        let (from, sides) = execute(command, &path, &history, step, &directory.join(step.to_string()))?;
        match earlier(&sides, from, step)? {
            Some(first) => {
                streams.note("note", &format!("the two part at step {first} already"));
                step = first;
            }
            None => break (from, sides),
        }
    };
    let unreadable = |Unreadable(why): Unreadable| {
        Failure::new(format!("step {step} was not recorded: {why}"))
            .hint(format!("what was recorded is in {}", directory.display()))
    };
    let [expected, found] = [&sides[0].record, &sides[1].record].map(|record| lines_of(record));
    let outcome = match (expected, found) {
        (Ok(expected), Ok(found)) => parting::compare(expected, found).map_err(unreadable)?,
        (Err(error), _) | (_, Err(error)) => return Err(unreadable(Unreadable(error.to_string()))),
    };
    let same = matches!(outcome, Outcome::Same { .. });
    let otherwise = recorded_otherwise(&history, &sides[0], step)?;
    if same {
        // Left-overs in the temporary directory are no reason to take the answer back.
        let _ = fs::remove_dir_all(&directory);
    }
    if command.json {
        let mut answer = outcome.json();
        answer["same"] = json!(same);
        answer["step"] = json!(step);
        answer["from"] = json!(from);
        answer["as_recorded"] = json!(otherwise.is_none());
        answer["directory"] = json!((!same).then(|| directory.display().to_string()));
        streams.json(&answer)?;
        return Ok(Verdict::yes_if(same));
    }
    streams.say(format!("step {step}, executed twice from step {from}:"))?;
    for text in outcome.lines() {
        streams.say(line(&text))?;
    }
    if let Some(component) = otherwise {
        let words = format!("the history has another `{component}` for step {step} than the first execution");
        streams.note("note", &words);
    }
    if !same {
        streams.note("note", &format!("everything is kept in {}", directory.display()));
    }
    Ok(Verdict::yes_if(same))
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The step of the newest divergence that the journal knows.
fn diverged(history: &Recorded) -> Result<u64, Failure> {
    let mut events = history.story.events.iter().rev();
    events
        .find(|event| event.kind == "diverged")
        .map(|event| event.step)
        .ok_or_else(|| {
            Failure::new("no step of this run came out differently when it was executed again")
                .hint("name the step to look at: --step STEP")
        })
}

/// Executes the step in two copies of the run, each in a process of its own, and returns where they started.
fn execute(
    command: &Trace,
    path: &Path,
    history: &Recorded,
    step: u64,
    directory: &Path,
) -> Result<(u64, Vec<Side>), Failure> {
    let last = history.totals.last;
    if step == 0 || step > last + 1 {
        return Err(Failure::new(format!(
            "the history has steps 1 to {last}, and no step {step}"
        )));
    }
    let start = choose(history, Some(step - 1), step)?;
    let name = name_of(path);
    let interrupt = Interrupt::watch().map_err(|error| io_failure("watch signals for", directory, &error))?;
    let perform = |index: usize| -> Result<Side, Failure> {
        let side = directory.join(SIDES[index]);
        let copied = side.join("runs").join(&name);
        copy_run(path, &copied, history, &start)
            .map_err(|error| io_failure("copy the run to", &copied, &error))?;
        let record = side.join(RECORD);
        let program = program(command, index, step, &record, interrupt.clone());
        let life = program
            .live(&side, 1, None, "")
            .map_err(|error| io_failure("run the program in", &side, &error))?;
        check(&life)?;
        let recorded = Recorded::open(&copied, name.clone(), Some(step))?;
        if recorded.story.last_life == history.story.last_life {
            return Err(
                Failure::new(format!("the program did not go on with a run named `{name}`"))
                    .hint(format!("what it printed is in {}", life.log.display())),
            );
        }
        Ok(Side { recorded, record })
    };
    let sides = if command.in_turn {
        [0, 1].map(perform)
    } else {
        std::thread::scope(|scope| {
            let second = scope.spawn(|| perform(1));
            [perform(0), second.join().expect("nothing panics in an execution")]
        })
    };
    Ok((start.info().step, sides.into_iter().collect::<Result<_, _>>()?))
}

fn program(command: &Trace, index: usize, step: u64, record: &Path, interrupt: Interrupt) -> Program {
    let mut variables = vec![(
        "UNBROKEN_TRACE".to_owned(),
        format!("{step}:{}", record.display()),
    )];
    if !command.variables.is_empty() {
        let given = std::env::var("UNBROKEN_ALLOW").unwrap_or_default();
        variables.push(("UNBROKEN_ALLOW".to_owned(), format!("{SETTINGS},{given}")));
    }
    if index == 1 {
        variables.extend(command.variables.iter().cloned());
    }
    Program {
        command: command.command.clone(),
        seed: 0,
        steps: Some(step),
        seconds: None,
        own_journal: true,
        variables,
        timeout: None,
        journal_bytes: 0,
        step: Duration::ZERO,
        interrupt,
    }
}

fn check(life: &Life) -> Result<(), Failure> {
    match &life.end {
        End::Finished | End::Stopped(_) => Ok(()),
        End::Failed(how) => {
            let words = last_words(&life.log);
            Err(Failure::new(format!("the program ended with {how}: {words}"))
                .hint(format!("what it printed is in {}", life.log.display())))
        }
        End::Killed | End::TimedOut => Err(Failure::new("the program was killed by somebody else")),
    }
}

/// A step before the one in question at which the two part already, as far as their journals show.
fn earlier(sides: &[Side], from: u64, step: u64) -> Result<Option<u64>, Failure> {
    let difference = judge::compare_journals(&sides[0].recorded, &sides[1].recorded)?;
    let parting = difference.and_then(|difference| difference.parting);
    let before = |parting: &Parting| parting.phase == 0 && from < parting.step && parting.step < step;
    Ok(parting.filter(before).map(|parting| parting.step))
}

/// The first component in which the history has something else for this step, if both have it.
fn recorded_otherwise(history: &Recorded, side: &Side, step: u64) -> Result<Option<String>, Failure> {
    let (Some(old), Some(new)) = (at(history, step)?, at(&side.recorded, step)?) else {
        return Ok(None);
    };
    Ok(unbroken::journal::first_difference(&old, &new).map(|(component, ..)| component))
}

fn at(recorded: &Recorded, step: u64) -> Result<Option<Boundary>, Failure> {
    for boundary in recorded.boundaries() {
        let boundary = boundary?;
        if (boundary.step, boundary.phase) == (step, 0) {
            return Ok(Some(boundary));
        }
    }
    Ok(None)
}

fn lines_of(path: &Path) -> io::Result<impl Iterator<Item = Result<Line, Unreadable>>> {
    let lines = BufReader::new(File::open(path)?).lines();
    Ok(lines.map(|line| {
        let line = line.map_err(|error| Unreadable(error.to_string()))?;
        parting::parse(&line)
    }))
}
