//! The event behind each checkpoint: how long it took, and the digest of each of its leaves.
//!
//! Touches: nothing. The event stays in the journal when retention deletes the checkpoint. Paths are written once a
//! segment and again only where they change; each checkpoint adds 16 bytes a leaf.

use std::sync::Arc;

use crate::digest::{Digest, Hasher, hex};
use crate::format::Flaw;
use crate::format::journal::MAX_RECORD;
use crate::format::record::{self, Fields};
use crate::state::Value;

/// Kind of the event.
pub const SAVED: &str = "saved";

/// Bytes that an event may have for its nodes and digests: a quarter is left for everything else.
const MAX_OUTLINE: usize = MAX_RECORD / 4 * 3;

/// Bytes that a node counts for besides its texts: in memory it takes more than on disk.
const NODE: usize = 64;

const KEYS: [&str; 8] = [
    "checkpoint",
    "phase",
    "durable_us",
    "commit_us",
    "size_bytes",
    "new_bytes",
    "nodes",
    "contents",
];

/// What the event says besides the checkpoint's leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The checkpoint's name.
    pub checkpoint: String,
    /// Its phase; its step is the event's.
    pub phase: u8,
    /// Microseconds from its boundary's record until it would survive a power cut.
    pub durable_us: u64,
    /// Microseconds of that in which it was written.
    pub commit_us: u64,
    /// Bytes of all storages that it refers to.
    pub size_bytes: u64,
    /// Bytes that it added to the disk, its manifest excluded.
    pub new_bytes: u64,
}

/// Digest of a leaf's content: the first half of a BLAKE3 digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Content(pub [u8; Content::LENGTH]);

impl Content {
    /// Its length in bytes.
    pub const LENGTH: usize = 16;

    pub(crate) fn cut(digest: &Digest) -> Content {
        Content(*digest.0.first_chunk().expect("32 bytes have a first half"))
    }

    /// The first 12 hexadecimal digits, for people.
    pub fn short(&self) -> String {
        hex(&self.0[..6])
    }
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Content({})", self.short())
    }
}

/// One node of a state: a leaf, or what holds others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Keys, indices and field names from the root, parts separated by `/`.
    pub path: String,
    /// What it is: a tensor's dtype, shape, device and attributes, or a value's type.
    pub what: String,
    /// How a tensor lies in memory: empty where it is row-major from the first byte of memory of its own.
    pub layout: String,
    /// Whether it has content of its own.
    pub leaf: bool,
}

/// A state's nodes in its own order, and what is known of their content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outline {
    /// The nodes, each before those that it holds. States of one program share them.
    pub nodes: Arc<Vec<Node>>,
    /// For each leaf, in the order of the nodes, its content's digest, where that can be told.
    pub contents: Vec<Option<Content>>,
}

impl Outline {
    /// How many leaves it has.
    pub fn leaves(&self) -> usize {
        self.contents.len()
    }

    /// One digest of everything: of two states with equal ones, every leaf is equal. `None` where a leaf's content
    /// cannot be told.
    pub fn root(&self) -> Option<Digest> {
        let mut hasher = Hasher::new();
        for node in &*self.nodes {
            for text in [&node.path, &node.what, &node.layout] {
                hasher
                    .update(&(text.len() as u64).to_le_bytes())
                    .update(text.as_bytes());
            }
            hasher.update(&[u8::from(node.leaf)]);
        }
        for content in &self.contents {
            hasher.update(&(*content)?.0);
        }
        Some(hasher.finish())
    }

    /// Takes the digests of leaves that it cannot tell from a record of the same state.
    pub fn complete(&mut self, recorded: &Outline) {
        if self.nodes != recorded.nodes {
            return;
        }
        for (content, known) in self.contents.iter_mut().zip(&recorded.contents) {
            *content = content.or(*known);
        }
    }
}

/// Returns the event's fields.
///
/// `written` are the nodes that the segment's last such event left standing; the same ones are not written again. An
/// outline that is not known in full, or too large for a record, is left out.
///
/// # Errors
///
/// [`Flaw::Limit`] where a number is too large.
pub fn lower(
    saved: &Saved,
    outline: &Outline,
    written: Option<&Arc<Vec<Node>>>,
) -> Result<Vec<(String, Value)>, Flaw> {
    let contents: Option<Vec<u8>> = outline
        .contents
        .iter()
        .map(|content| content.map(|content| content.0))
        .collect::<Option<Vec<_>>>()
        .map(|contents| contents.concat());
    let known = written.is_some_and(|written| {
        Arc::ptr_eq(written, &outline.nodes) || **written == *outline.nodes // Looked at only where they are not shared.
    });
    let size = |node: &Node| node.path.len() + node.what.len() + node.layout.len() + NODE;
    let nodes: usize = if known {
        0
    } else {
        outline.nodes.iter().map(size).sum()
    };
    let contents = contents.filter(|contents| contents.len() + nodes <= MAX_OUTLINE);
    let text = |text: &String| Value::Str(text.clone());
    let node = |node: &Node| {
        let parts = vec![
            text(&node.path),
            text(&node.what),
            text(&node.layout),
            Value::Bool(node.leaf),
        ];
        Value::List(parts)
    };
    let values = [
        text(&saved.checkpoint),
        Value::Int(i64::from(saved.phase)),
        record::count("a time", saved.durable_us)?,
        record::count("a time", saved.commit_us)?,
        record::count("a size", saved.size_bytes)?,
        record::count("a size", saved.new_bytes)?,
        match &contents {
            Some(_) if !known => Value::List(outline.nodes.iter().map(node).collect()),
            _ => Value::None,
        },
        contents.map_or(Value::None, Value::Bytes),
    ];
    Ok(KEYS.iter().map(|key| (*key).to_owned()).zip(values).collect())
}

/// The field with the nodes.
pub(crate) fn nodes_field(fields: &[(String, Value)]) -> Option<&Value> {
    fields
        .iter()
        .find(|(name, _)| name == "nodes")
        .map(|(_, value)| value)
}

/// Reads the event's fields: what it says, and its leaves.
///
/// `standing` are the nodes that stand in the segment, and become those that stand behind this event.
///
/// # Errors
///
/// [`Flaw::Malformed`] where it is not as [`lower`] writes it.
pub fn raise(
    fields: &[(String, Value)],
    standing: &mut Option<Arc<Vec<Node>>>,
) -> Result<(Saved, Option<Outline>), Flaw> {
    let dict = record::named(fields);
    let mut fields = Fields::of_dict("a saved event", dict, &KEYS)?;
    let saved = Saved {
        checkpoint: fields.text()?,
        phase: fields.small()?,
        durable_us: fields.count()?,
        commit_us: fields.count()?,
        size_bytes: fields.count()?,
        new_bytes: fields.count()?,
    };
    record::check_phase(saved.phase)?;
    match fields.value()? {
        Value::None => {}
        Value::List(rows) => {
            let nodes = rows.into_iter().map(raise_node).collect::<Result<Vec<_>, _>>()?;
            *standing = Some(Arc::new(nodes));
        }
        _ => return Err(Flaw::malformed("the nodes of a saved event are no list")),
    }
    let contents = match fields.value()? {
        Value::None => return Ok((saved, None)),
        Value::Bytes(bytes) => bytes,
        _ => return Err(Flaw::malformed("the digests of a saved event are no bytes")),
    };
    let Some(nodes) = standing else {
        return Err(Flaw::malformed(
            "a saved event has digests, and no event before it has nodes",
        ));
    };
    let leaves = nodes.iter().filter(|node| node.leaf).count();
    let (contents, rest) = contents.as_chunks::<{ Content::LENGTH }>();
    if contents.len() != leaves || !rest.is_empty() {
        return Err(Flaw::malformed(format!(
            "a saved event has {} digests for {leaves} leaves",
            contents.len()
        )));
    }
    let outline = Outline {
        nodes: Arc::clone(nodes),
        contents: contents.iter().map(|content| Some(Content(*content))).collect(),
    };
    Ok((saved, Some(outline)))
}

fn raise_node(value: Value) -> Result<Node, Flaw> {
    let mut parts = Fields::of_list("a node of a saved event", value, 4)?;
    Ok(Node {
        path: parts.text()?,
        what: parts.text()?,
        layout: parts.text()?,
        leaf: parts.bool()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Saved {
        Saved {
            checkpoint: "000000002-0-90185f13fcab361d".to_owned(),
            phase: 0,
            durable_us: 1500,
            commit_us: 1200,
            size_bytes: 64,
            new_bytes: 128,
        }
    }

    fn outline(leaves: u8) -> Outline {
        let node = |index| Node {
            path: format!("w/{index}"),
            what: "float32 [2] on cpu".to_owned(),
            layout: String::new(),
            leaf: true,
        };
        Outline {
            nodes: Arc::new((0..leaves).map(node).collect()),
            contents: (0..leaves).map(|index| Some(Content([index; 16]))).collect(),
        }
    }

    #[test]
    fn nodes_are_written_once_and_stand_until_others_do() {
        let (mut standing, mut written) = (None, None);
        for (leaves, has_nodes) in [(3, true), (3, false), (2, true), (2, false)] {
            let outline = outline(leaves);
            let fields = lower(&saved(), &outline, written.as_ref()).unwrap();
            assert_eq!(matches!(fields[6].1, Value::List(_)), has_nodes);
            written = Some(Arc::clone(&outline.nodes));
            assert_eq!(raise(&fields, &mut standing).unwrap(), (saved(), Some(outline)));
        }
    }

    #[test]
    fn what_is_unknown_or_too_large_is_left_out_and_the_rest_stays() {
        let mut unknown = outline(3);
        unknown.contents[1] = None;
        let mut large = outline(1);
        Arc::make_mut(&mut large.nodes)[0].path = "p".repeat(MAX_OUTLINE);
        for outline in [unknown, large] {
            let fields = lower(&saved(), &outline, None).unwrap();
            assert_eq!(raise(&fields, &mut None).unwrap(), (saved(), None));
        }
    }

    #[test]
    fn digests_that_do_not_fit_the_nodes_are_refused() {
        let mut fields = lower(&saved(), &outline(3), None).unwrap();
        let Value::Bytes(bytes) = &mut fields[7].1 else {
            panic!("they are bytes")
        };
        bytes.pop();
        assert!(raise(&fields, &mut None).is_err());
        fields[6].1 = Value::None;
        assert!(raise(&fields, &mut None).is_err());
        assert!(raise(&fields[..7], &mut None).is_err());
    }
}
