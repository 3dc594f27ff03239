//! `unbroken explain`: where two runs part, in which leaves if both saved that boundary, and the likely cause.
//!
//! Touches: two run directories, read only, without their locks.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::prove::judge::{self, Recorded};
use crate::prove::{difference_json, difference_lines};

#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// Run directory with what is expected
    pub(crate) expected: PathBuf,
    /// Run directory with what was found
    pub(crate) found: PathBuf,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(command: &Explain, streams: &mut Streams) -> Answer {
    let open = |path: &Path| -> Result<Recorded, Failure> {
        Ok(Recorded::open(path, path.display().to_string(), None)?)
    };
    let (expected, found) = (open(&command.expected)?, open(&command.found)?);
    let difference = match judge::compare_runs(&expected, &found)? {
        Some(difference) => Some(judge::leaves_of(&difference, &expected, &found)?),
        None => None,
    };
    let boundaries = expected.totals.boundaries;
    if command.json {
        let trial = found.name.as_str();
        streams.json(&json!({
            "same": difference.is_none(),
            "boundaries": boundaries,
            "difference": difference.as_ref().map(|difference| difference_json(trial, difference)),
        }))?;
    } else if let Some(difference) = &difference {
        for text in difference_lines(&found.name, difference) {
            streams.say(text)?;
        }
    } else {
        streams.say(format!("the same: {boundaries} boundaries and the final state"))?;
    }
    Ok(Verdict::yes_if(difference.is_none()))
}
