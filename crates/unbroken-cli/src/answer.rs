//! Where answers go: data to one stream, messages and hints to the other, and what the exit code says.
//!
//! Touches: the two streams it is given. Uses no colour, so that `NO_COLOR` has nothing to turn off.

use std::io::{self, Write};

use crate::words::line;

/// What the exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The answer is yes, or was given.
    Yes,
    /// An honest no: differs, damaged.
    No,
}

impl Verdict {
    pub(crate) fn yes_if(flag: bool) -> Self {
        if flag { Verdict::Yes } else { Verdict::No }
    }
}

/// Why a question could not be answered.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What happened and where, and what to do next.
    Words { message: String, hint: Option<String> },
    /// Nobody reads what we write any more: no error, and nothing left to do.
    Closed,
}

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Failure::Words {
            message: message.into(),
            hint: None,
        }
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        match self {
            Failure::Words { message, .. } => Failure::Words {
                message,
                hint: Some(hint.into()),
            },
            Failure::Closed => Failure::Closed,
        }
    }
}

impl From<unbroken::Error> for Failure {
    fn from(error: unbroken::Error) -> Self {
        Failure::Words {
            message: error.to_string(),
            hint: error.hint(),
        }
    }
}

impl From<io::Error> for Failure {
    /// Only ever from writing an answer: files are read and written through the core.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::Closed,
            _ => Failure::new(format!("cannot write the answer: {error}")),
        }
    }
}

pub(crate) type Answer = Result<Verdict, Failure>;

/// The two streams of a program.
pub(crate) struct Streams<'a> {
    pub(crate) out: &'a mut dyn Write,
    pub(crate) err: &'a mut dyn Write,
}

impl Streams<'_> {
    /// Writes one line of data.
    pub(crate) fn say(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        writeln!(self.out, "{}", text.as_ref())?;
        Ok(())
    }

    /// Writes lines of data that end by themselves.
    pub(crate) fn print(&mut self, text: &str) -> Result<(), Failure> {
        self.out.write_all(text.as_bytes())?;
        Ok(())
    }

    /// Writes an answer in JSON, on one line.
    pub(crate) fn json(&mut self, value: &serde_json::Value) -> Result<(), Failure> {
        writeln!(self.out, "{value}")?;
        Ok(())
    }

    /// Tells a person something that is not the answer. A closed stream for messages is no reason to stop.
    pub(crate) fn note(&mut self, kind: &str, text: &str) {
        let _ = writeln!(self.err, "{kind}: {}", line(text));
    }
}
