//! `unbroken certify` and `unbroken check`: a small file about a run, and whether the run is still what it says.
//!
//! Touches: a run directory, read only, without its lock; the certificate's file, which is never replaced.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;
use serde_json::json;
use unbroken::certificate::{Certificate, certify};

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::words::{count, line};

#[derive(Debug, Args)]
pub(crate) struct Certify {
    /// Run directory
    pub(crate) run: PathBuf,
    /// File to write; by default the certificate is printed
    pub(crate) file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Certificate that `unbroken certify` wrote
    pub(crate) file: PathBuf,
    /// Run directory
    pub(crate) run: PathBuf,
    /// Look at manifests and journal only; read no tensor
    #[arg(long)]
    pub(crate) quick: bool,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A certificate holds at most 64 marks a life: this is thousands of lives and checkpoints.
const LARGEST: u64 = 64 << 20;

pub(crate) fn issue(command: &Certify, streams: &mut Streams) -> Answer {
    let certificate = certify(
        &command.run,
        &unbroken::certificate::time_words(SystemTime::now()),
    )?;
    let text = certificate.to_text();
    let Some(file) = &command.file else {
        streams.print(&text)?;
        return Ok(Verdict::Yes);
    };
    let failed =
        |error: std::io::Error| Failure::new(format!("cannot write \"{}\": {error}", file.display()));
    let mut output = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(file)
        .map_err(failed)?;
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.sync_all())
        .map_err(failed)?;
    streams.say(format!(
        "{}: {} and {} of run {}",
        line(&file.display().to_string()),
        count(certificate.lives.len(), "life").replace("lifes", "lives"),
        count(certificate.checkpoints.len(), "checkpoint"),
        certificate.run_id
    ))?;
    say_divergences(&certificate, streams)?;
    Ok(Verdict::Yes)
}

pub(crate) fn check(command: &Check, streams: &mut Streams) -> Answer {
    let shown = command.file.display();
    let failed = |error: std::io::Error| Failure::new(format!("cannot read \"{shown}\": {error}"));
    if fs::metadata(&command.file).map_err(failed)?.len() > LARGEST {
        return Err(Failure::new(format!(
            "\"{shown}\" is too large to be a certificate"
        )));
    }
    let text = fs::read_to_string(&command.file).map_err(failed)?;
    let certificate = Certificate::parse(&text, &command.file)?;
    let findings = certificate.check(&command.run, !command.quick)?;
    let good = findings.wrong.is_empty();
    if command.json {
        streams.json(&json!({
            "as_certified": good,
            "wrong": findings.wrong,
            "records": findings.records,
            "records_since": findings.records_since,
            "checkpoints": findings.checkpoints,
            "deep": !command.quick,
            "issued": certificate.issued,
            "divergences": certificate.divergences.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }))?;
        return Ok(Verdict::yes_if(good));
    }
    for wrong in &findings.wrong {
        streams.say(format!("changed  {}", line(wrong)))?;
    }
    let whole = format!(
        "{} and {} are as certified on {}",
        count(usize::try_from(findings.records).unwrap_or(usize::MAX), "record"),
        count(
            usize::try_from(findings.checkpoints).unwrap_or(usize::MAX),
            "checkpoint"
        ),
        line(&certificate.issued)
    );
    let since = match findings.records_since {
        0 => String::new(),
        more => format!("; the run has gone on for {more} records since"),
    };
    streams.say(if good {
        format!("{whole}{since}")
    } else {
        format!("not as certified; {whole}{since}")
    })?;
    say_divergences(&certificate, streams)?;
    Ok(Verdict::yes_if(good))
}

/// A certificate says that a run is what it was; whether it was exact, the run itself noticed.
fn say_divergences(certificate: &Certificate, streams: &mut Streams) -> Result<(), Failure> {
    for divergence in &certificate.divergences {
        streams.say(format!("not exact: {}", line(&divergence.to_string())))?;
    }
    Ok(())
}
