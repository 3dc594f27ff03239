//! `unbroken list`: a run's checkpoints, whole and damaged.
//!
//! Touches: a run directory, read only, without its lock.

use serde_json::{Value as Json, json};
use unbroken::run::Overview;
use unbroken::store::CheckpointInfo;

use crate::answer::{Answer, Streams, Verdict};
use crate::arguments::List;
use crate::target;
use crate::words::{count, fields_json, float_json, line, size, table};

pub(crate) fn run(command: &List, streams: &mut Streams) -> Answer {
    let run = target::open_run(&command.run)?;
    if command.json {
        let checkpoints: Vec<Json> = run
            .checkpoints
            .iter()
            .map(|checkpoint| info_json(checkpoint.info()))
            .collect();
        let rejected: Vec<Json> = run
            .rejected
            .iter()
            .map(|(name, why)| json!({ "name": name, "why": why.to_string() }))
            .collect();
        let foreign: Vec<&str> = foreign_names(&run);
        streams.json(&json!({
            "run": command.run.display().to_string(),
            "id": run.id,
            "seed": run.seed,
            "created": run.created,
            "checkpoints": checkpoints,
            "rejected": rejected,
            "foreign": foreign,
        }))?;
        return Ok(Verdict::Yes);
    }
    let mut rows = vec![
        ["step", "boundary", "created", "size", "added", "name", "notes"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for checkpoint in run.checkpoints.iter() {
        let info = checkpoint.info();
        rows.push(vec![
            info.step.to_string(),
            phase_words(info.phase).to_owned(),
            line(&info.created),
            size(info.size_bytes),
            size(info.new_bytes),
            info.name.clone(),
            notes(info),
        ]);
    }
    if rows.len() > 1 {
        streams.print(&table(&rows))?;
    } else {
        streams.note(
            "note",
            &format!("{} holds no whole checkpoint", command.run.display()),
        );
    }
    for (name, why) in &run.rejected {
        streams.note("damaged", &format!("{name}: {why}"));
    }
    if !run.foreign.is_empty() {
        let what = count(run.foreign.len(), "checkpoint");
        streams.note(
            "note",
            &format!(
                "{what} of another run in the same directory: {}",
                foreign_names(&run).join(", ")
            ),
        );
    }
    Ok(Verdict::Yes)
}

fn foreign_names(run: &Overview) -> Vec<&str> {
    run.foreign
        .iter()
        .map(|checkpoint| checkpoint.info().name.as_str())
        .collect()
}

/// Where in the run a boundary is.
pub(crate) fn phase_words(phase: u8) -> &'static str {
    match phase {
        0 => "step",
        1 => "epoch end",
        2 => "finished",
        _ => "unknown",
    }
}

fn notes(info: &CheckpointInfo) -> String {
    let mut notes: Vec<String> = info
        .metrics
        .iter()
        .map(|(name, number)| format!("{}={number:?}", line(name)))
        .collect();
    if info.pinned {
        notes.push("pinned".to_owned());
    }
    notes.join(" ")
}

/// What a manifest says, in JSON.
pub(crate) fn info_json(info: &CheckpointInfo) -> Json {
    let metrics: serde_json::Map<String, Json> = info
        .metrics
        .iter()
        .map(|(name, number)| (name.clone(), float_json(number.to_bits())))
        .collect();
    json!({
        "name": info.name,
        "step": info.step,
        "phase": info.phase,
        "run_id": info.run_id,
        "life": info.life,
        "created": info.created,
        "size_bytes": info.size_bytes,
        "new_bytes": info.new_bytes,
        "pinned": info.pinned,
        "metrics": metrics,
        "identity": fields_json(&info.identity),
        "environment": fields_json(&info.environment),
    })
}
