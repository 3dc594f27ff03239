//! What a state is made of, and a digest for each of its leaves: enough to compare two states without their bytes.
//!
//! Touches: nothing. An outline is taken of a tree whose views were checked against their storages, when a checkpoint
//! is written or from its manifest. The journal keeps one for each checkpoint (format/saved.rs), also of those that
//! retention has deleted.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::digest::{Digest, Hasher};
use crate::elements::row_major;
use crate::format::manifest::element_size;
use crate::format::saved::{Content, Node, Outline};
use crate::format::value;
use crate::state::{Tensor, UNTOUCHED, Value};
use crate::store::{contiguous, key_text};

/// Returns the outline of a tree.
///
/// `storages` has length and digest of each storage. `bytes` has their bytes, or of some or all nothing: without them, the
/// content of a tensor that is not its storage's bytes in order cannot be told.
pub fn outline(tree: &Value, storages: &[(u64, Digest)], bytes: &[Option<&[u8]>]) -> Outline {
    outline_with(nodes_of(tree), tree, storages, bytes)
}

/// The nodes of a tree's outline.
pub(crate) fn nodes_of(tree: &Value) -> Arc<Vec<Node>> {
    Arc::new(Leaves::of(tree).nodes)
}

/// [`outline`] of a tree whose nodes are known.
pub(crate) fn outline_with(
    nodes: Arc<Vec<Node>>,
    tree: &Value,
    storages: &[(u64, Digest)],
    bytes: &[Option<&[u8]>],
) -> Outline {
    let mut contents = Vec::with_capacity(nodes.len());
    // Of thousands of parameters, each has no gradient.
    let mut last: Option<(&Value, Option<Content>)> = None;
    each_leaf(tree, true, &mut |leaf| {
        contents.push(match leaf {
            Value::Tensor(tensor) => {
                let index = tensor.storage as usize;
                let bytes = bytes.get(index).copied().flatten();
                storages
                    .get(index)
                    .and_then(|storage| content(tensor, *storage, bytes))
            }
            plain => match &last {
                Some((before, content)) if *before == plain => *content,
                _ => {
                    let content = value::digest_value(plain)
                        .ok()
                        .map(|digest| Content::cut(&digest));
                    last = Some((plain, content));
                    content
                }
            },
        });
    });
    Outline { nodes, contents }
}

/// The storages, of such lengths, whose bytes an outline needs.
pub(crate) fn gathered(tree: &Value, lengths: &[u64]) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    each_leaf(tree, true, &mut |leaf| {
        let Value::Tensor(tensor) = leaf else { return };
        let index = tensor.storage as usize;
        if lengths
            .get(index)
            .is_some_and(|&length| view_of(tensor, length) == View::Gathered)
        {
            found.insert(index);
        }
    });
    found
}

/// Calls `visit` for each leaf below a value, in the order of its nodes. `at_top`: its path is empty.
fn each_leaf<'t>(value: &'t Value, at_top: bool, visit: &mut dyn FnMut(&'t Value)) {
    if is_leaf(value, at_top) {
        visit(value);
    }
    each_part(value, at_top, |part, item| {
        each_leaf(item, at_top && part.text().is_empty(), visit);
    });
}

/// What the path of a part ends with.
enum Part<'t> {
    Key(&'t Value),
    Name(&'t str),
    Index(usize),
}

impl<'t> Part<'t> {
    fn text(&self) -> Cow<'t, str> {
        match *self {
            Part::Key(key) => key_text(key),
            Part::Name(name) => Cow::Borrowed(name),
            Part::Index(index) => Cow::Owned(index.to_string()),
        }
    }
}

/// Calls `visit` for the parts of a value that have paths of their own, without what comparisons leave out.
fn each_part<'t>(value: &'t Value, at_top: bool, mut visit: impl FnMut(Part<'t>, &'t Value)) {
    match value {
        Value::Dict(items) => items
            .iter()
            .filter(|(key, _)| is_compared(key, at_top))
            .for_each(|(key, item)| visit(Part::Key(key), item)),
        Value::Object(object) => {
            let fields = object.fields.iter();
            fields.for_each(|(name, item)| visit(Part::Name(name), item));
        }
        Value::List(items) | Value::Tuple(items) if items.iter().any(branches) => {
            let numbered = items.iter().enumerate();
            numbered.for_each(|(index, item)| visit(Part::Index(index), item));
        }
        Value::Tensor(tensor) => {
            let nested = tensor.attrs.iter().filter(|(_, value)| branches(value));
            nested.for_each(|(name, item)| visit(Part::Name(name), item));
        }
        _ => {}
    }
}

/// Whether comparisons look at a mapping's entry.
fn is_compared(key: &Value, at_top: bool) -> bool {
    !at_top || !matches!(key, Value::Str(name) if name == UNTOUCHED)
}

/// Whether a value has content of its own: it is a tensor, or no part of it has a path.
fn is_leaf(value: &Value, at_top: bool) -> bool {
    match value {
        Value::Dict(items) => !items.iter().any(|(key, _)| is_compared(key, at_top)),
        Value::Object(object) => object.fields.is_empty(),
        Value::List(items) | Value::Tuple(items) => !items.iter().any(branches),
        _ => true,
    }
}

/// A tree's nodes, and its leaves' values in the same order.
#[derive(Debug, Default)]
pub(crate) struct Leaves<'t> {
    pub nodes: Vec<Node>,
    pub values: Vec<&'t Value>,
    /// For each storage the first leaf that views it, by its node's number.
    owners: HashMap<u32, usize>,
}

impl<'t> Leaves<'t> {
    /// Walks a tree, leaving out what comparisons do ([`UNTOUCHED`]).
    pub fn of(tree: &'t Value) -> Leaves<'t> {
        let mut leaves = Leaves::default();
        leaves.node(String::new(), tree);
        leaves
    }

    fn node(&mut self, path: String, value: &'t Value) {
        let at_top = path.is_empty();
        let layout = match value {
            Value::Tensor(tensor) => self.layout(&path, tensor),
            _ => String::new(),
        };
        let leaf = is_leaf(value, at_top);
        if leaf {
            self.values.push(value);
        }
        let mut below: Vec<(String, &Value)> = Vec::new();
        each_part(value, at_top, |part, item| {
            below.push((join(&path, &part.text()), item))
        });
        self.nodes.push(Node {
            path,
            what: what(value),
            layout,
            leaf,
        });
        for (path, part) in below {
            self.node(path, part);
        }
    }

    fn layout(&mut self, path: &str, tensor: &Tensor) -> String {
        let owner = *self.owners.entry(tensor.storage).or_insert(self.nodes.len());
        let mut layout = String::new();
        if !tensor.shape.contains(&0) && !contiguous(tensor) {
            layout = format!(
                "strides {:?} from element {}",
                telling_strides(tensor),
                tensor.offset
            );
        }
        if let Some(Node { path: owner, .. }) = self.nodes.get(owner).filter(|owner| owner.path != path) {
            layout.push_str(if layout.is_empty() { "" } else { ", " });
            layout.push_str(&format!("memory shared with `{owner}`"));
        }
        layout
    }
}

fn join(path: &str, part: &str) -> String {
    if path.is_empty() {
        part.to_owned()
    } else {
        [path, "/", part].concat()
    }
}

/// Strides of a tensor, those of dimensions of size 1 as zero: they mean nothing.
fn telling_strides(tensor: &Tensor) -> Vec<i64> {
    let pairs = tensor.shape.iter().zip(&tensor.strides);
    pairs
        .map(|(size, stride)| if *size == 1 { 0 } else { *stride })
        .collect()
}

/// Whether a value holds something that deserves a path of its own.
fn branches(value: &Value) -> bool {
    match value {
        Value::Tensor(_) => true,
        Value::Dict(items) => !items.is_empty(),
        Value::Object(object) => !object.fields.is_empty(),
        Value::List(items) | Value::Tuple(items) => items.iter().any(branches),
        _ => false,
    }
}

fn what(value: &Value) -> String {
    match value {
        Value::Tensor(tensor) => tensor_words(tensor),
        Value::Object(object) => format!("{} {}", object.kind, object.name),
        other => kind(other).to_owned(),
    }
}

/// A tensor in words: dtype, shape, device and what its front says of it.
pub(crate) fn tensor_words(tensor: &Tensor) -> String {
    let mut words = format!("{} {:?} on {}", tensor.dtype, tensor.shape, tensor.device);
    for (name, value) in tensor.attrs.iter().filter(|(_, value)| !branches(value)) {
        words.push_str(&format!(", {name} {}", value_words(value)));
    }
    words
}

/// A plain value for people; long ones by digest.
pub(crate) fn value_words(value: &Value) -> String {
    match value {
        Value::None => "None".to_owned(),
        Value::Bool(value) => if *value { "True" } else { "False" }.to_owned(),
        Value::Int(number) => number.to_string(),
        Value::Float(bits) => float_words(*bits),
        Value::Str(text) if text.len() <= 60 => format!("{text:?}"),
        Value::Bytes(bytes) => format!("{} bytes {}", bytes.len(), &Digest::of(bytes).short()[..12]),
        Value::Tensor(tensor) => tensor_words(tensor),
        other => match value::digest_value(other) {
            Ok(digest) => format!("{} {}", kind(other), &digest.short()[..12]),
            Err(_) => kind(other).to_owned(),
        },
    }
}

/// A float for people; its bits as well where text does not tell them.
pub(crate) fn float_words(bits: u64) -> String {
    let number = f64::from_bits(bits);
    if number.is_nan() {
        format!("nan ({bits:016x})")
    } else {
        format!("{number:?}")
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::None => "None",
        Value::Bool(_) => "bool",
        Value::Int(_) | Value::BigInt { .. } => "int",
        Value::Float(_) => "float",
        Value::Complex(..) => "complex",
        Value::Str(_) => "text",
        Value::Bytes(_) => "bytes",
        Value::List(_) => "list",
        Value::Tuple(_) => "tuple",
        Value::Dict(_) => "dict",
        Value::Set(_) => "set",
        Value::FrozenSet(_) => "frozen set",
        Value::Object(_) => "object",
        Value::Tensor(_) => "tensor",
    }
}

/// Digest of a tensor's elements in row-major order. Its storage's digest is that already where the tensor is the whole
/// storage in that order; other views are gathered, if their bytes are at hand.
fn content(tensor: &Tensor, (length, digest): (u64, Digest), bytes: Option<&[u8]>) -> Option<Content> {
    match view_of(tensor, length) {
        View::Whole => Some(Content::cut(&digest)),
        View::Gathered => row_major(tensor, bytes?).map(|elements| Content::cut(&Digest::of(&elements))),
        // More elements than the storage has: some occur again and again, without end perhaps. And what the elements of
        // a dtype that only a front knows are cannot be told. What is known is the storage and the view.
        View::Opaque => {
            let mut hasher = Hasher::new();
            hasher.update(&digest.0).update(&tensor.offset.to_le_bytes());
            for stride in telling_strides(tensor) {
                hasher.update(&stride.to_le_bytes());
            }
            Some(Content::cut(&hasher.finish()))
        }
    }
}

/// What a tensor is of its storage.
#[derive(PartialEq, Eq)]
enum View {
    /// Its bytes in order.
    Whole,
    /// Some of its elements, or all in another order.
    Gathered,
    /// More than it has, or nobody knows.
    Opaque,
}

fn view_of(tensor: &Tensor, length: u64) -> View {
    match view_bytes(tensor) {
        Some(whole) if whole == length && contiguous(tensor) => View::Whole,
        Some(whole) if whole <= length => View::Gathered,
        _ => View::Opaque,
    }
}

/// Bytes of a tensor's elements laid end to end; `None` for dtypes that only a front knows.
pub(crate) fn view_bytes(tensor: &Tensor) -> Option<u64> {
    let size = element_size(&tensor.dtype)?;
    Some(
        tensor
            .shape
            .iter()
            .fold(size, |bytes, size| bytes.saturating_mul(*size)),
    )
}
