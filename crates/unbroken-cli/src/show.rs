//! `unbroken show`: what a checkpoint holds, leaf by leaf.
//!
//! Touches: one manifest, read only.

use serde_json::{Value as Json, json};
use unbroken::Value;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::arguments::Show;
use crate::leaves::{Leaf, byte_length, leaves};
use crate::list::{info_json, phase_words};
use crate::target;
use crate::words::{count, line, shape, size, table, tensor_json, value, value_json};

pub(crate) fn run(command: &Show, streams: &mut Streams) -> Answer {
    let checkpoint = target::open_checkpoint(&command.checkpoint, streams)?;
    let info = checkpoint.info();
    let storages = checkpoint.storages();
    let digest_of = |leaf: &Leaf| match leaf.value {
        Value::Tensor(tensor) => storages
            .get(tensor.storage as usize)
            .map(|(_, digest)| digest.to_hex()),
        _ => None,
    };
    let leaves = leaves(checkpoint.tree());
    if command.json {
        let leaves: Vec<Json> = leaves
            .iter()
            .map(|leaf| match leaf.value {
                Value::Tensor(tensor) => json!({
                    "path": leaf.path,
                    "tensor": tensor_json(tensor),
                    "bytes": byte_length(tensor),
                    "storage_digest": digest_of(leaf),
                }),
                other => json!({ "path": leaf.path, "value": value_json(other) }),
            })
            .collect();
        let mut answer = info_json(info);
        answer["leaves"] = leaves.into();
        streams.json(&answer)?;
        return Ok(Verdict::Yes);
    }
    let metrics: Vec<String> = info
        .metrics
        .iter()
        .map(|(name, number)| format!("{}={number:?}", line(name)))
        .collect();
    let mut head = vec![
        vec!["checkpoint".to_owned(), info.name.clone()],
        vec![
            "step".to_owned(),
            format!("{} ({})", info.step, phase_words(info.phase)),
        ],
        vec![
            "run".to_owned(),
            format!("{}, life {}", line(&info.run_id), info.life),
        ],
        vec!["created".to_owned(), line(&info.created)],
        vec![
            "size".to_owned(),
            format!(
                "{} in {}, {} of it written by this checkpoint",
                size(info.size_bytes),
                count(storages.len(), "storage"),
                size(info.new_bytes)
            ),
        ],
    ];
    if !metrics.is_empty() {
        head.push(vec!["metrics".to_owned(), metrics.join(" ")]);
    }
    if info.pinned {
        head.push(vec!["pinned".to_owned(), "yes".to_owned()]);
    }
    streams.print(&table(&head))?;
    section(streams, "identity", &info.identity)?;
    section(streams, "environment", &info.environment)?;
    streams.say(format!(
        "\n{}",
        count(leaves.len(), "leaf").replace("leafs", "leaves")
    ))?;
    let rows: Vec<Vec<String>> = leaves
        .iter()
        .map(|leaf| {
            let path = format!("  {}", line(&leaf.path));
            match leaf.value {
                Value::Tensor(tensor) => vec![
                    path,
                    format!("{} {}", line(&tensor.dtype), shape(&tensor.shape)),
                    byte_length(tensor).map_or_else(String::new, size),
                    digest_of(leaf).map_or_else(String::new, |digest| digest[..16].to_owned()),
                ],
                other => vec![path, value(other)],
            }
        })
        .collect();
    // Tensors in columns; values may be long and would push every column to the right.
    let (tensors, values): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row.len() == 4);
    streams.print(&table(&tensors))?;
    streams.print(&table(&values))?;
    Ok(Verdict::Yes)
}

fn section(streams: &mut Streams, title: &str, fields: &[(String, Value)]) -> Result<(), Failure> {
    if fields.is_empty() {
        return Ok(());
    }
    let rows: Vec<Vec<String>> = fields
        .iter()
        .map(|(name, item)| vec![format!("  {}", line(name)), value(item)])
        .collect();
    streams.say(format!("\n{title}"))?;
    streams.print(&table(&rows))
}
