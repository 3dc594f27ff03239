//! A certificate: a small file that says what a run was, so that nobody can change the run afterwards unnoticed.
//!
//! Touches: a run directory, read only, without its lock. It holds chain hashes of the journal, digests of manifests
//! and the environment; a manifest's digest covers every byte of its checkpoint. It is not signed: whoever needs to
//! know who issued it signs the file, or keeps its digest where others cannot write.

use std::fmt;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::manifest;
use crate::journal::{self, DIVERGED, Event, Segment};
use crate::outline::value_words as words;
use crate::run;
use crate::state::Value;
use crate::store::{Checkpoint, is_damage};

const KIND: &str = "unbroken certificate";
/// 2 tells of differences that the run itself noticed; 1 is still read.
const VERSION: u64 = 2;

/// Chain hashes kept for each life, evenly spread: what changes later is located between two of them.
const MARKS: usize = 64;

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The run's id.
    pub run_id: String,
    /// When it was issued, as the issuer says.
    pub issued: String,
    /// Each life's part of the journal.
    pub lives: Vec<Life>,
    /// Each checkpoint that was there, oldest first.
    pub checkpoints: Vec<Sealed>,
    /// Steps that gave something else when they were executed again. Empty: none, or a certificate of version 1.
    pub divergences: Vec<Divergence>,
    /// What the bits may depend on, of the newest checkpoint: name and value in words.
    pub environment: Vec<(String, String)>,
}

/// One life's part of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// Process life, counted from 1.
    pub life: u32,
    /// Step that it started from.
    pub step: u64,
    /// Chain hash of its header.
    pub start: Digest,
    /// Chain hashes along it, the last one of its last record.
    pub marks: Vec<Mark>,
}

/// One place in a life's chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Records up to it.
    pub records: u64,
    /// Step of its record.
    pub step: u64,
    /// Chain hash up to and including it.
    pub chain: Digest,
}

/// One checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Its name.
    pub name: String,
    /// Digest of its manifest.
    pub digest: Digest,
}

/// One step that gave something else when it was executed again, as the life that noticed it recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// Process life that noticed it.
    pub life: u32,
    /// The step.
    pub step: u64,
    /// The first component that differed.
    pub component: String,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "life {} executed step {} again and got another {}",
            self.life, self.step, self.component
        )
    }
}

/// What checking a run against a certificate came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What is not as certified, each in words. Empty: the run is the one that was certified.
    pub wrong: Vec<String>,
    /// Records that came after those certified.
    pub records_since: u64,
    /// Records that are as certified.
    pub records: u64,
    /// Checkpoints that are as certified.
    pub checkpoints: u64,
}

/// Describes a run as it is now.
///
/// # Errors
///
/// [`Error::Damaged`] where the run is not whole, so that nobody certifies damage; errors of reading it.
pub fn certify(path: &Path, issued: &str) -> Result<Certificate> {
    let (directory, config) = run::open_to_read(path)?;
    let (segments, unreadable) = journal::segments(&directory)?;
    let overview = run::read_run(path)?;
    let damaged = |part: &str, found: String| Error::Damaged {
        path: path.to_owned(),
        part: part.to_owned(),
        expected: "whole".to_owned(),
        found,
    };
    if let Some(what) = unreadable.into_iter().next() {
        return Err(damaged("journal", what));
    }
    if let Some((name, error)) = overview.rejected.first() {
        return Err(damaged(name, error.to_string()));
    }
    let mut lives = Vec::new();
    for segment in &segments {
        if let Some(damage) = &segment.damage {
            return Err(damaged(
                "journal",
                format!("life {} {damage}", segment.header.life),
            ));
        }
        lives.push(seal_life(segment));
    }
    let mut checkpoints = Vec::new();
    for checkpoint in &overview.checkpoints {
        checkpoints.push(Sealed {
            name: checkpoint.info().name.clone(),
            digest: digest_of(checkpoint)?,
        });
    }
    let story = run::read_story(path)?;
    let environment = overview.checkpoints.last().map(|newest| {
        let info = newest.info();
        info.environment
            .iter()
            .chain(&info.identity)
            .map(|(name, value)| (name.clone(), words(value)))
            .collect()
    });
    Ok(Certificate {
        run_id: config.id,
        issued: issued.to_owned(),
        lives,
        checkpoints,
        divergences: story.events.iter().filter_map(divergence).collect(),
        environment: environment.unwrap_or_default(),
    })
}

fn divergence(event: &Event) -> Option<Divergence> {
    let component = event.fields.iter().find_map(|(name, value)| match value {
        Value::Str(text) if name == "component" => Some(text.clone()),
        _ => None,
    });
    (event.kind == DIVERGED).then(|| Divergence {
        life: event.life,
        step: event.step,
        component: component.unwrap_or_else(|| "result".to_owned()),
    })
}

/// A moment as certificates write it: RFC 3339, in UTC.
pub fn time_words(time: std::time::SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "an unknown time".to_owned(), |time| time.to_string())
}

fn digest_of(checkpoint: &Checkpoint) -> Result<Digest> {
    Ok(manifest::encode(checkpoint.manifest())?.1)
}

fn seal_life(segment: &Segment) -> Life {
    let count = segment.records.len();
    let stride = count.div_ceil(MARKS).max(1);
    let places = (1..=count).filter(|place| place % stride == 0 || *place == count);
    let marks = places.map(|place| {
        let (step, chain) = segment.records[place - 1];
        Mark {
            records: place as u64,
            step,
            chain,
        }
    });
    Life {
        life: segment.header.life,
        step: segment.header.step,
        start: segment.start,
        marks: marks.collect(),
    }
}

impl Certificate {
    /// The certificate's text: JSON, with a digest of itself.
    pub fn to_text(&self) -> String {
        let content = self.content();
        let digest = digest_of_content(&content).to_hex();
        let mut object = content.as_object().cloned().unwrap_or_default();
        object.insert("digest".to_owned(), json!(digest));
        let mut text =
            serde_json::to_string_pretty(&Json::Object(object)).expect("text keys always serialize");
        text.push('\n');
        text
    }

    /// Everything but the digest. Keys are sorted, and there are no floats: one content has one text.
    fn content(&self) -> Json {
        let lives: Vec<Json> = self
            .lives
            .iter()
            .map(|life| {
                let marks: Vec<Json> = life
                    .marks
                    .iter()
                    .map(|mark| json!([mark.records, mark.step, mark.chain.to_hex()]))
                    .collect();
                json!({ "life": life.life, "step": life.step, "start": life.start.to_hex(), "marks": marks })
            })
            .collect();
        let checkpoints: Vec<Json> = self
            .checkpoints
            .iter()
            .map(|sealed| json!([sealed.name, sealed.digest.to_hex()]))
            .collect();
        let divergences: Vec<Json> = self
            .divergences
            .iter()
            .map(|one| json!([one.life, one.step, one.component]))
            .collect();
        let environment: Map<String, Json> = self
            .environment
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect();
        json!({
            "kind": KIND,
            "version": VERSION,
            "run": self.run_id,
            "issued": self.issued,
            "lives": lives,
            "checkpoints": checkpoints,
            "divergences": divergences,
            "environment": environment,
        })
    }

    /// Reads a certificate's text.
    ///
    /// # Errors
    ///
    /// [`Error::Format`] where it is none; [`Error::Damaged`] where it was edited.
    pub fn parse(text: &str, path: &Path) -> Result<Certificate> {
        let malformed = |what: &str| Error::Format {
            path: Some(path.to_owned()),
            what: format!("the certificate {what}"),
        };
        let mut json: Json =
            serde_json::from_str(text).map_err(|error| malformed(&format!("is not JSON: {error}")))?;
        if json["kind"] != KIND {
            return Err(malformed("is not one of unbroken"));
        }
        if !json["version"]
            .as_u64()
            .is_some_and(|version| (1..=VERSION).contains(&version))
        {
            return Err(malformed(&format!(
                "is of version {}; this release reads versions 1 to {VERSION}",
                json["version"]
            )));
        }
        let certificate =
            raise(&json).ok_or_else(|| malformed("lacks a part, or has one of another type"))?;
        let digest = json.as_object_mut().and_then(|object| object.remove("digest"));
        let (expected, found) = (
            digest.as_ref().and_then(Json::as_str).unwrap_or(""),
            digest_of_content(&json),
        );
        if expected != found.to_hex() {
            return Err(Error::Damaged {
                path: path.to_owned(),
                part: "certificate".to_owned(),
                expected: expected.chars().take(16).collect(),
                found: found.short(),
            });
        }
        Ok(certificate)
    }

    /// Compares a run with what was certified. `deep` reads every byte of every certified checkpoint.
    ///
    /// # Errors
    ///
    /// Where the run cannot be read for another reason than that it was changed.
    pub fn check(&self, path: &Path, deep: bool) -> Result<Findings> {
        let (directory, config) = run::open_to_read(path)?;
        let mut findings = Findings::default();
        if config.id != self.run_id {
            findings.wrong.push(format!(
                "it is run {}, and run {} was certified",
                config.id, self.run_id
            ));
            return Ok(findings);
        }
        let (segments, unreadable) = journal::segments(&directory)?;
        findings.wrong.extend(unreadable);
        for life in &self.lives {
            match segments.iter().find(|segment| segment.header.life == life.life) {
                Some(segment) => check_life(life, segment, &mut findings),
                None => findings
                    .wrong
                    .push(format!("the journal of life {} is missing", life.life)),
            }
        }
        let known = |segment: &&Segment| self.lives.iter().all(|life| life.life != segment.header.life);
        findings.records_since += segments
            .iter()
            .filter(known)
            .map(|segment| segment.records.len() as u64)
            .sum::<u64>();
        self.check_checkpoints(path, deep, &mut findings)?;
        Ok(findings)
    }

    fn check_checkpoints(&self, path: &Path, deep: bool, findings: &mut Findings) -> Result<()> {
        let overview = run::read_run(path)?;
        for sealed in &self.checkpoints {
            let found = overview
                .checkpoints
                .iter()
                .find(|checkpoint| checkpoint.info().name == sealed.name);
            let Some(checkpoint) = found else {
                let why = overview.rejected.iter().find(|(name, _)| *name == sealed.name);
                findings.wrong.push(match why {
                    Some((name, error)) => format!("checkpoint {name} is not whole: {error}"),
                    None => format!("checkpoint {} is missing", sealed.name),
                });
                continue;
            };
            if digest_of(checkpoint)? != sealed.digest {
                findings.wrong.push(format!(
                    "checkpoint {} is another one of the same name",
                    sealed.name
                ));
                continue;
            }
            match if deep { checkpoint.verify() } else { Ok(()) } {
                Ok(()) => findings.checkpoints += 1,
                Err(error) if is_damage(&error) => {
                    findings
                        .wrong
                        .push(format!("checkpoint {} is not whole: {error}", sealed.name));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn check_life(life: &Life, segment: &Segment, findings: &mut Findings) {
    let number = life.life;
    if segment.start != life.start {
        findings
            .wrong
            .push(format!("the journal of life {number} is another one"));
        return;
    }
    let (mut good, mut step) = (0, life.step);
    for mark in &life.marks {
        match segment.records.get(mark.records as usize - 1) {
            Some((_, chain)) if *chain == mark.chain => (good, step) = (mark.records, mark.step),
            found => {
                let to = mark.step;
                findings.wrong.push(match (&segment.damage, found) {
                    (Some(damage), None) => format!("the journal of life {number} is {damage}"),
                    (None, None) => {
                        let last = segment.records.last().map_or(life.step, |(step, _)| *step);
                        let missing = life.marks.last().map_or(0, |last| last.records) - segment.records.len() as u64;
                        format!("the journal of life {number} ends after step {last}: {missing} records are missing")
                    }
                    (_, Some(_)) => format!(
                        "the journal of life {number} was edited after step {step}, at step {to} at the latest"
                    ),
                });
                findings.records += good;
                return;
            }
        }
    }
    findings.records += good;
    findings.records_since += segment.records.len() as u64 - good;
}

/// Everything but the digest itself is in it, whatever the version: keys are sorted.
fn digest_of_content(content: &Json) -> Digest {
    Digest::of(content.to_string().as_bytes())
}

fn raise(json: &Json) -> Option<Certificate> {
    let digest = |value: &Json| value.as_str()?.parse::<Digest>().ok();
    let mark = |value: &Json| {
        let records = value[0].as_u64().filter(|records| *records > 0)?;
        Some(Mark {
            records,
            step: value[1].as_u64()?,
            chain: digest(&value[2])?,
        })
    };
    let life = |value: &Json| {
        Some(Life {
            life: u32::try_from(value["life"].as_u64()?).ok()?,
            step: value["step"].as_u64()?,
            start: digest(&value["start"])?,
            marks: value["marks"]
                .as_array()?
                .iter()
                .map(mark)
                .collect::<Option<_>>()?,
        })
    };
    let sealed = |value: &Json| {
        Some(Sealed {
            name: value[0].as_str()?.to_owned(),
            digest: digest(&value[1])?,
        })
    };
    let divergence = |value: &Json| {
        Some(Divergence {
            life: u32::try_from(value[0].as_u64()?).ok()?,
            step: value[1].as_u64()?,
            component: value[2].as_str()?.to_owned(),
        })
    };
    let divergences = match &json["divergences"] {
        Json::Null if json["version"] == 1 => Vec::new(),
        found => found.as_array()?.iter().map(divergence).collect::<Option<_>>()?,
    };
    let environment = json["environment"].as_object()?.iter();
    Some(Certificate {
        run_id: json["run"].as_str()?.to_owned(),
        issued: json["issued"].as_str()?.to_owned(),
        lives: json["lives"]
            .as_array()?
            .iter()
            .map(life)
            .collect::<Option<_>>()?,
        checkpoints: json["checkpoints"]
            .as_array()?
            .iter()
            .map(sealed)
            .collect::<Option<_>>()?,
        divergences,
        environment: environment
            .map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())))
            .collect::<Option<_>>()?,
    })
}
