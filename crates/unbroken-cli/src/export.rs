//! `unbroken export`: a checkpoint's tensors as one plain .safetensors file, for other programs.
//!
//! Touches: a checkpoint's packs, read only and verified; the file it is told to write, which appears whole or not at
//! all.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};
use unbroken::elements::row_major;
use unbroken::format::manifest::element_size;
use unbroken::format::pack::safetensors_dtype;
use unbroken::state::Tensor;
use unbroken::storage::Directory;
use unbroken::storage::disk::DiskStorage;
use unbroken::store::Checkpoint;
use unbroken::{Error, Value};

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::arguments::Export;
use crate::leaves::leaves;
use crate::target;
use crate::words::{count, size};

/// One tensor of the file to be.
#[derive(Debug)]
struct Item<'a> {
    name: String,
    dtype: &'static str,
    element_bytes: u64,
    length: u64,
    tensor: &'a Tensor,
}

pub(crate) fn run(command: &Export, streams: &mut Streams) -> Answer {
    check_name(&command.file)?;
    let checkpoint = target::open_checkpoint(&command.checkpoint, streams)?;
    let items = plan(&checkpoint, &command.prefix, &command.only)?;
    let header = header(&items, &checkpoint);
    let bytes = write(command, &checkpoint, &items, &header)?;
    let name = &checkpoint.info().name;
    if command.json {
        let names: Vec<&str> = items.iter().map(|item| item.name.as_str()).collect();
        streams.json(&json!({
            "file": command.file.display().to_string(),
            "checkpoint": name,
            "bytes": bytes,
            "tensors": names,
        }))?;
    } else {
        let what = count(items.len(), "tensor");
        streams.say(format!(
            "{}: {what}, {} of checkpoint {name}",
            command.file.display(),
            size(bytes)
        ))?;
    }
    Ok(Verdict::Yes)
}

fn check_name(file: &Path) -> Result<(), Failure> {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors") => Ok(()),
        Some("pt" | "pth") => Err(
            Failure::new("this program has no torch, and .pt files are torch's own").hint(
                "run it from Python, `python -m unbroken export RUN FILE.pt`, or export to .safetensors",
            ),
        ),
        _ => Err(
            Failure::new(format!("cannot tell from `{}` what to write", file.display()))
                .hint("let the file's name end in .safetensors"),
        ),
    }
}

/// Decides what goes into the file, and in which order: wide elements first, so that each tensor is aligned.
fn plan<'a>(checkpoint: &'a Checkpoint, prefix: &str, only: &[String]) -> Result<Vec<Item<'a>>, Failure> {
    let mut items = Vec::new();
    let mut strange = Vec::new();
    let mut unmatched: Vec<&String> = only.iter().collect();
    for leaf in leaves(checkpoint.tree()) {
        let (Value::Tensor(tensor), Some(name)) = (leaf.value, leaf.path.strip_prefix(prefix)) else {
            continue;
        };
        if !only.is_empty() && !only.iter().any(|pattern| matches(pattern, &leaf.path)) {
            continue;
        }
        unmatched.retain(|pattern| !matches(pattern, &leaf.path));
        let name = if name.is_empty() { &leaf.path } else { name };
        match (safetensors_dtype(&tensor.dtype), element_size(&tensor.dtype)) {
            (Some(dtype), Some(element_bytes)) => {
                let length = tensor.shape.iter().product::<u64>() * element_bytes;
                items.push(Item {
                    name: name.to_owned(),
                    dtype,
                    element_bytes,
                    length,
                    tensor,
                });
            }
            _ => strange.push((leaf.path, &tensor.dtype)),
        }
    }
    if let Some(pattern) = unmatched.first() {
        let name = &checkpoint.info().name;
        return Err(
            Failure::new(format!("no tensor in checkpoint {name} is called `{pattern}`"))
                .hint("`unbroken show` lists the names"),
        );
    }
    if let Some((path, dtype)) = strange.first() {
        let others = strange.len() - 1;
        let more = if others == 0 {
            String::new()
        } else {
            format!(" (and {})", count(others, "other"))
        };
        return Err(Failure::new(format!(
            "`{path}`{more} is of dtype {dtype}, which .safetensors does not have"
        ))
        .hint("choose other leaves with --prefix or --only, or export to .pt from Python"));
    }
    if items.is_empty() {
        let name = &checkpoint.info().name;
        return Err(Failure::new(format!(
            "no tensor's name in checkpoint {name} starts with `{prefix}`"
        ))
        .hint("`unbroken show` lists the names"));
    }
    items.sort_by(|a, b| {
        b.element_bytes
            .cmp(&a.element_bytes)
            .then_with(|| a.name.cmp(&b.name))
    });
    if let Some(twice) = {
        let mut names: Vec<&str> = items.iter().map(|item| item.name.as_str()).collect();
        names.sort_unstable();
        names
            .windows(2)
            .find(|pair| pair[0] == pair[1])
            .map(|pair| pair[0].to_owned())
    } {
        return Err(Failure::new(format!("two tensors would be called `{twice}`"))
            .hint("choose one of them with --prefix or --only"));
    }
    Ok(items)
}

/// Whether a name is what a pattern describes: `*` stands for any text, `?` for one character.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut place) = (0, 0);
    let mut star = None; // The last star, and the place behind what it stands for so far.
    while place < name.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, place));
                at += 1;
            }
            Some(&wanted) if wanted == '?' || wanted == name[place] => {
                at += 1;
                place += 1;
            }
            _ => match &mut star {
                Some((star, behind)) => {
                    *behind += 1;
                    (at, place) = (*star + 1, *behind);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|&rest| rest == '*')
}

/// The file's header: its length as u64, then JSON padded with spaces to a multiple of 8.
fn header(items: &[Item], checkpoint: &Checkpoint) -> Vec<u8> {
    let info = checkpoint.info();
    let mut entries = Map::new();
    // Readers of the Hugging Face world refuse files that do not name one of the formats they know.
    entries.insert(
        "__metadata__".to_owned(),
        json!({ "format": "pt", "unbroken.checkpoint": info.name, "unbroken.run": info.run_id }),
    );
    let mut start = 0;
    for item in items {
        let end = start + item.length;
        entries.insert(
            item.name.clone(),
            json!({ "dtype": item.dtype, "shape": item.tensor.shape, "data_offsets": [start, end] }),
        );
        start = end;
    }
    let mut json = Json::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}

/// Writes the file under another name, makes it durable and gives it its own; returns its length.
fn write(command: &Export, checkpoint: &Checkpoint, items: &[Item], header: &[u8]) -> Result<u64, Failure> {
    let parent = command
        .file
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let name = command
        .file
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| {
            Failure::new(format!(
                "`{}` is not a file name that can be written",
                command.file.display()
            ))
        })?;
    let storage =
        DiskStorage::open(parent).map_err(|error| Error::io("open the directory", parent, error))?;
    let directory = Directory::new(Arc::new(storage));
    if !command.force && directory.list("")?.iter().any(|other| other == name) {
        return Err(
            Failure::new(format!("`{}` is there already", command.file.display()))
                .hint("choose another name, or replace it with --force"),
        );
    }
    let partial = format!(".{name}.{}.partial", std::process::id());
    let written = fill(&directory, &partial, checkpoint, items, header).and_then(|bytes| {
        if command.force {
            directory.remove(name)?;
        }
        directory.rename_new(&partial, name)?;
        directory.sync_dir("")?;
        Ok(bytes)
    });
    if written.is_err() {
        // The first error is the one to tell; a left-over says by its name that it is one.
        let _ = directory.remove(&partial);
    }
    Ok(written?)
}

fn fill(
    directory: &Directory,
    partial: &str,
    checkpoint: &Checkpoint,
    items: &[Item],
    header: &[u8],
) -> Result<u64, Error> {
    let mut file = directory.create_new(partial)?;
    file.write_all(header)?;
    let mut last: Option<(u32, Vec<u8>)> = None;
    for item in items {
        let storage = item.tensor.storage;
        if last.as_ref().is_none_or(|(index, _)| *index != storage) {
            last = Some((storage, checkpoint.read(storage as usize)?));
        }
        let (_, bytes) = last.as_ref().expect("a storage was just read");
        let elements = row_major(item.tensor, bytes);
        file.write_all(&elements.expect("only dtypes of known width are exported"))?;
    }
    file.sync()?;
    Ok(file.written())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text_and_a_question_mark_for_one_character() {
        let name = "objects/model/parameters/layers.0.weight";
        for pattern in [name, "*", "objects/*.weight", "*layers.?.w*", "*/*/*/*"] {
            assert!(matches(pattern, name), "{pattern}");
        }
        for pattern in ["", "objects", "layers*", "*layers.?weight", "*.weight?", "?"] {
            assert!(!matches(pattern, name), "{pattern}");
        }
    }
}
