//! `unbroken log`: the journal, a line for each boundary, events where they happened.
//!
//! Touches: a run's journal, read only, without the run's lock.

use serde_json::{Value as Json, json};
use unbroken::digest::hex;
use unbroken::format::journal::Component;
use unbroken::format::saved::SAVED;
use unbroken::journal::{Boundary, Event, Save};

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::arguments::{Log, Steps};
use crate::list::phase_words;
use crate::target;
use crate::words::{count, duration, fields_json, float, float_json, line, size, value};

pub(crate) fn run(command: &Log, streams: &mut Streams) -> Answer {
    let story = target::open_story(&command.run)?;
    let steps = command.steps.unwrap_or(Steps {
        first: 0,
        last: u64::MAX,
    });
    let wanted = |step: u64| (steps.first..=steps.last).contains(&step);
    let told = story
        .events
        .iter()
        .map(Told::Event)
        .chain(story.saves.iter().map(Told::Save));
    let mut told: Vec<Told> = told.filter(|told| wanted(told.step())).collect();
    told.sort_by_key(Told::place);
    let mut told = told.into_iter().peekable();
    let mut shown = 0usize;
    let mut boundaries = story.boundaries();
    for boundary in boundaries.by_ref() {
        let boundary = boundary?;
        if boundary.step > steps.last {
            break;
        }
        if !wanted(boundary.step) {
            continue;
        }
        while let Some(told) = told.next_if(|told| told.place() < (boundary.step, boundary.phase)) {
            told.print(command, streams)?;
        }
        if command.json {
            streams.json(&boundary_json(&boundary))?;
        } else {
            streams.say(boundary_words(&boundary, command.components))?;
        }
        shown += 1;
    }
    for told in told {
        told.print(command, streams)?;
    }
    for warning in story.warnings.iter().chain(&boundaries.conflict_words()) {
        streams.note("warning", warning);
    }
    if shown == 0 && story.warnings.is_empty() {
        streams.note(
            "note",
            &format!("no boundary recorded in {}", command.run.display()),
        );
    } else if !command.json && !command.components {
        streams.note(
            "note",
            &format!("{}; --components shows the digests too", count_boundaries(shown)),
        );
    }
    Ok(Verdict::Yes)
}

/// What stands between boundaries.
enum Told<'a> {
    Event(&'a Event),
    Save(&'a Save),
}

impl Told<'_> {
    fn step(&self) -> u64 {
        match self {
            Told::Event(event) => event.step,
            Told::Save(save) => save.step,
        }
    }

    /// The boundary that it stands behind: events do not say which of a step's.
    fn place(&self) -> (u64, u8) {
        match self {
            Told::Event(event) => (event.step, u8::MAX),
            Told::Save(save) => (save.step, save.saved.phase),
        }
    }

    fn print(&self, command: &Log, streams: &mut Streams) -> Result<(), Failure> {
        match self {
            Told::Event(event) => print_event(command, event, streams),
            Told::Save(save) => print_save(command, save, streams),
        }
    }
}

fn print_save(command: &Log, save: &Save, streams: &mut Streams) -> Result<(), Failure> {
    let saved = &save.saved;
    if command.json {
        return streams.json(&json!({
            "event": SAVED,
            "step": save.step,
            "life": save.life,
            "time": save.time,
            "fields": {
                "checkpoint": saved.checkpoint,
                "phase": saved.phase,
                "durable_us": saved.durable_us,
                "commit_us": saved.commit_us,
                "size_bytes": saved.size_bytes,
                "new_bytes": saved.new_bytes,
            },
        }));
    }
    streams.say(format!(
        "step {}  * {SAVED} (life {}) {}: {}, {} new, durable after {}",
        save.step,
        save.life,
        line(&saved.checkpoint),
        size(saved.size_bytes),
        size(saved.new_bytes),
        duration(saved.durable_us),
    ))
}

fn count_boundaries(number: usize) -> String {
    count(number, "boundary").replace("boundarys", "boundaries")
}

fn print_event(command: &Log, event: &Event, streams: &mut Streams) -> Result<(), Failure> {
    if command.json {
        return streams.json(&json!({
            "event": event.kind,
            "step": event.step,
            "life": event.life,
            "time": event.time,
            "fields": fields_json(&event.fields),
        }));
    }
    let fields: Vec<String> = event
        .fields
        .iter()
        .map(|(name, item)| format!("{}={}", line(name), value(item)))
        .collect();
    streams.say(
        format!(
            "step {}  * {} (life {}) {}",
            event.step,
            line(&event.kind),
            event.life,
            fields.join(" ")
        )
        .trim_end(),
    )
}

fn boundary_words(boundary: &Boundary, all: bool) -> String {
    let mut words = format!(
        "step {}  epoch {} position {}",
        boundary.step, boundary.epoch, boundary.position
    );
    if boundary.phase != 0 {
        words.push_str(&format!("  {}", phase_words(boundary.phase)));
    }
    for (name, component) in &boundary.components {
        if all || !matches!(component, Component::Digest(_)) {
            words.push_str(&format!("  {}={}", line(name), component_words(component)));
        }
    }
    if boundary.lives.len() > 1 {
        words.push_str(&format!("  ({} times)", boundary.lives.len()));
    }
    words
}

/// A component in words.
pub(crate) fn component_words(component: &Component) -> String {
    match component {
        Component::Digest(digest) => hex(digest),
        Component::Int(number) => number.to_string(),
        Component::Float(bits) => float(*bits),
        Component::Text(text) => format!("{:?}", line(text)),
    }
}

/// A component in JSON: its kind, its value, and a float's bits.
pub(crate) fn component_json(component: &Component) -> Json {
    match component {
        Component::Digest(digest) => json!({ "digest": hex(digest) }),
        Component::Int(number) => json!({ "int": number }),
        Component::Float(bits) => json!({ "float": float_json(*bits), "bits": format!("{bits:016x}") }),
        Component::Text(text) => json!({ "text": text }),
    }
}

fn boundary_json(boundary: &Boundary) -> Json {
    let components: serde_json::Map<String, Json> = boundary
        .components
        .iter()
        .map(|(name, component)| (name.clone(), component_json(component)))
        .collect();
    json!({
        "step": boundary.step,
        "phase": boundary.phase,
        "epoch": boundary.epoch,
        "position": boundary.position,
        "lives": boundary.lives,
        "components": components,
    })
}
