//! The `unbroken` program as a library: arguments, words and exit codes.
//!
//! Touches: the run directories that its arguments name, and the two streams it is given. Only `prune`, `fork`,
//! `repair`, `import` and `export` write to disk; `doctor` does for a moment.

mod answer;
mod arguments;
mod certify;
mod diff;
mod doctor;
mod explain;
mod export;
mod fork;
mod import;
mod leaves;
mod list;
mod log;
mod prove;
mod prune;
mod repair;
mod replay;
mod report;
mod show;
mod target;
mod trace;
mod verify;
mod watch;
mod words;

use std::ffi::OsString;
use std::io::Write;

use clap::Parser;

use crate::answer::{Failure, Streams, Verdict};
use crate::arguments::{Arguments, Command};

/// Exit code of an answer that is yes.
pub const YES: i32 = 0;
/// Exit code of an honest no: differs, damaged.
pub const NO: i32 = 1;
/// Exit code where the question could not be answered.
pub const UNANSWERED: i32 = 2;

/// Runs the program on its arguments (its own name first) and returns its exit code.
///
/// Data goes to `out`, messages and hints to `err`. A closed `out` is no error.
pub fn run(arguments: &[OsString], out: &mut dyn Write, err: &mut dyn Write) -> i32 {
    let mut streams = Streams { out, err };
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            let stream = if error.use_stderr() {
                &mut streams.err
            } else {
                &mut streams.out
            };
            let _ = write!(stream, "{}", error.render());
            return if error.use_stderr() { UNANSWERED } else { YES };
        }
    };
    let answer = match &arguments.command {
        Command::List(command) => list::run(command, &mut streams),
        Command::Show(command) => show::run(command, &mut streams),
        Command::Log(command) => log::run(command, &mut streams),
        Command::Diff(command) => diff::run(command, &mut streams),
        Command::Verify(command) => verify::run(command, &mut streams),
        Command::Report(command) => report::run(command, &mut streams),
        Command::Watch(command) => watch::run(command, &mut streams),
        Command::Replay(command) => replay::run(command, &mut streams),
        Command::Trace(command) => trace::run(command, &mut streams),
        Command::Certify(command) => certify::issue(command, &mut streams),
        Command::Check(command) => certify::check(command, &mut streams),
        Command::Explain(command) => explain::run(command, &mut streams),
        Command::Export(command) => export::run(command, &mut streams),
        Command::Fork(command) => fork::run(command, &mut streams),
        Command::Import(command) => import::run(command, &mut streams),
        Command::Doctor(command) => doctor::run(command, &mut streams),
        Command::Repair(command) => repair::run(command, &mut streams),
        Command::Prune(command) => prune::run(command, &mut streams),
        Command::Prove(command) => prove::run(command, &mut streams),
    };
    let answer = answer.and_then(|verdict| streams.out.flush().map(|()| verdict).map_err(Failure::from));
    match answer {
        Ok(Verdict::Yes) | Err(Failure::Closed) => YES,
        Ok(Verdict::No) => NO,
        Err(Failure::Words { message, hint }) => {
            streams.note("error", &message);
            if let Some(hint) = hint {
                streams.note("hint", &hint);
            }
            UNANSWERED
        }
    }
}
