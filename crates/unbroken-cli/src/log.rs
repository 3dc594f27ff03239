//! `unbroken log`: the journal, a line for each boundary, events where they happened.
//!
//! Touches: a run's journal, read only, without the run's lock.

use serde_json::{Value as Json, json};
use unbroken::digest::hex;
use unbroken::format::journal::Component;
use unbroken::journal::{Boundary, Event};

use crate::answer::{Answer, Streams, Verdict};
use crate::arguments::{Log, Steps};
use crate::list::phase_words;
use crate::target;
use crate::words::{count, fields_json, float, float_json, line, value};

pub(crate) fn run(command: &Log, streams: &mut Streams) -> Answer {
    let journal = target::open_journal(&command.run)?;
    let steps = command.steps.unwrap_or(Steps {
        first: 0,
        last: u64::MAX,
    });
    let wanted = |step: u64| (steps.first..=steps.last).contains(&step);
    let mut events: Vec<&Event> = journal.events.iter().filter(|event| wanted(event.step)).collect();
    events.sort_by_key(|event| event.step);
    let mut events = events.into_iter().peekable();
    let mut shown = 0usize;
    for boundary in journal.boundaries.iter().filter(|boundary| wanted(boundary.step)) {
        while let Some(event) = events.next_if(|event| event.step < boundary.step) {
            print_event(command, event, streams)?;
        }
        if command.json {
            streams.json(&boundary_json(boundary))?;
        } else {
            streams.say(boundary_words(boundary, command.components))?;
        }
        shown += 1;
    }
    for event in events {
        print_event(command, event, streams)?;
    }
    for warning in &journal.warnings {
        streams.note("warning", warning);
    }
    if shown == 0 && journal.warnings.is_empty() {
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

fn count_boundaries(number: usize) -> String {
    count(number, "boundary").replace("boundarys", "boundaries")
}

fn print_event(command: &Log, event: &Event, streams: &mut Streams) -> Result<(), crate::answer::Failure> {
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
