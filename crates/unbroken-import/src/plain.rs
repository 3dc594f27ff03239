//! From nodes to the core's values: shared parts are written out, cycles and bombs are refused.
//!
//! Touches: nothing. Large numpy arrays become storages of their own.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use unbroken::Result;
use unbroken::format::value;
use unbroken::state::{Object, Tensor, Value};

use crate::machine::Arena;
use crate::node::{ArrayNode, Id, Node, TensorNode};
use crate::{flawed, refused};

/// Deepest nesting. One level here takes up to two of the levels that docs/format.md bounds.
const MAX_DEPTH: usize = 50;
/// Most values that are written out.
const MAX_VALUES: u64 = 1 << 22;
/// Most bytes of texts and bytes that are written out.
const MAX_BYTES: u64 = 1 << 29;
/// Numpy arrays from this size on are not kept in the manifest.
const INLINE_BYTES: usize = 4096;

/// Writes out a node as a value. `owned` receives the bytes of storages that were not in the file as such; `first_owned`
/// is the index that the first of them has among all.
pub(crate) fn value(arena: &Arena, root: Id, first_owned: usize, owned: &mut Vec<Vec<u8>>) -> Result<Value> {
    // Measured before anything is written: what would be refused costs nothing.
    let mut known = HashMap::new();
    let cost = measure(arena, root, 0, &mut known)?;
    if cost.values > MAX_VALUES {
        return Err(refused(format!(
            "more than {MAX_VALUES} values, counting shared ones each time"
        )));
    }
    if cost.bytes > MAX_BYTES {
        return Err(refused(format!(
            "more than {MAX_BYTES} bytes of texts and numpy arrays, counting shared ones each time"
        )));
    }
    let mut writer = Writer {
        arena,
        first_owned,
        owned,
    };
    writer.write(root)
}

/// What a node costs, written out with everything below it.
#[derive(Clone, Copy)]
struct Cost {
    values: u64,
    bytes: u64,
    height: usize,
}

/// Measures a node; each container once, however often it is shared. `known` has `None` for those that are open.
fn measure(arena: &Arena, id: Id, depth: usize, known: &mut HashMap<Id, Option<Cost>>) -> Result<Cost> {
    let too_deep = || {
        refused(format!(
            "an object that is nested more than {MAX_DEPTH} levels deep, or contains itself"
        ))
    };
    let node = arena.get(id);
    let Some(parts) = parts_of(node) else {
        return Ok(Cost {
            values: 1,
            bytes: bytes_of(node),
            height: 0,
        });
    };
    let cost = match known.get(&id) {
        Some(Some(cost)) => *cost,
        Some(None) => return Err(too_deep()),
        None if depth > MAX_DEPTH => return Err(too_deep()),
        None => {
            known.insert(id, None);
            let mut cost = Cost {
                values: 2, // A container with a name of its own is an object around another one.
                bytes: 0,
                height: 0,
            };
            for part in parts {
                let below = measure(arena, part, depth + 1, known)?;
                cost.values = cost.values.saturating_add(below.values);
                cost.bytes = cost.bytes.saturating_add(below.bytes);
                cost.height = cost.height.max(below.height + 1);
            }
            known.insert(id, Some(cost));
            cost
        }
    };
    if depth + cost.height > MAX_DEPTH {
        return Err(too_deep());
    }
    Ok(cost)
}

/// The parts of a container; `None` of what is none.
fn parts_of(node: &Node) -> Option<Vec<Id>> {
    match node {
        Node::List(items)
        | Node::Tuple(items)
        | Node::Set(items)
        | Node::FrozenSet(items)
        | Node::Deque(items, _) => Some(items.clone()),
        Node::Dict(items) | Node::Mapping(_, items) | Node::Default(_, items) | Node::Namespace(_, items) => {
            Some(items.iter().flat_map(|(key, item)| [*key, *item]).collect())
        }
        _ => None,
    }
}

/// Bytes of what has no parts.
fn bytes_of(node: &Node) -> u64 {
    let plain = |value: &Value| match value {
        Value::Str(text) => text.len(),
        Value::Bytes(bytes) => bytes.len(),
        Value::BigInt { magnitude, .. } => magnitude.len(),
        _ => 0,
    };
    let length = match node {
        Node::Plain(value) => plain(value),
        Node::ByteArray(bytes) | Node::NumpyScalar(_, bytes) => bytes.len(),
        Node::NumpyArray(Some(array)) => array.data.len(),
        Node::Tensor(tensor) => tensor.shape.len() * 16,
        Node::Object(_, _, fields) => fields.iter().map(|(_, value)| plain(value)).sum(),
        _ => 0,
    };
    length as u64
}

struct Writer<'a> {
    arena: &'a Arena,
    first_owned: usize,
    owned: &'a mut Vec<Vec<u8>>,
}

impl Writer<'_> {
    fn write(&mut self, id: Id) -> Result<Value> {
        match self.arena.get(id) {
            Node::Plain(value) => Ok(value.clone()),
            Node::ByteArray(bytes) => {
                let data = Value::Bytes(bytes.clone());
                Ok(object("bytearray", "bytearray", vec![("data", data)]))
            }
            Node::List(items) => Ok(Value::List(self.all(items)?)),
            Node::Tuple(items) => Ok(Value::Tuple(self.all(items)?)),
            Node::Set(items) => Ok(Value::Set(self.members(items)?)),
            Node::FrozenSet(items) => Ok(Value::FrozenSet(self.members(items)?)),
            Node::Dict(items) => self.dict(items),
            Node::Mapping(name, items) => {
                let items = self.dict(items)?;
                Ok(object("mapping", name, vec![("items", items)]))
            }
            Node::Default(factory, items) => {
                let items = self.dict(items)?;
                let factory = factory.map_or(Value::None, |name| Value::Str(name.to_owned()));
                let fields = vec![("factory", factory), ("items", items)];
                Ok(object("defaultdict", "collections.defaultdict", fields))
            }
            Node::Deque(items, limit) => {
                let items = Value::List(self.all(items)?);
                let limit = limit.map_or(Value::None, Value::Int);
                Ok(object(
                    "deque",
                    "collections.deque",
                    vec![("items", items), ("maxlen", limit)],
                ))
            }
            Node::Namespace(name, items) => {
                let items = self.dict(items)?;
                Ok(object("namespace", name, vec![("items", items)]))
            }
            Node::Object(kind, name, fields) => Ok(Value::from(Object {
                kind: (*kind).to_owned(),
                name: name.clone(),
                fields: fields.clone(),
            })),
            Node::Tensor(tensor) => Ok(tensor_value(tensor)),
            Node::NumpyArray(Some(array)) => self.array(array),
            Node::NumpyScalar(dtype, data) => {
                let data = Value::Bytes(data.clone());
                let fields = vec![("dtype", Value::Str(dtype.text())), ("data", data)];
                Ok(object("numpy_scalar", "numpy.generic", fields))
            }
            Node::NumpyDtype(dtype) => {
                let fields = vec![("dtype", Value::Str(dtype.text()))];
                Ok(object("numpy_dtype", "numpy.dtype", fields))
            }
            Node::Global(crate::node::What::Dtype(name)) => {
                Ok(object("torch_constant", &format!("torch.{name}"), Vec::new()))
            }
            Node::NumpyArray(None) => Err(flawed("the pickle has a numpy array without a content")),
            Node::Global(what) => Err(refused(format!("a pickle that keeps the name `{what:?}` itself"))),
            Node::Storage(_) => Err(refused("a storage that is kept without a tensor")),
        }
    }

    fn all(&mut self, items: &[Id]) -> Result<Vec<Value>> {
        items.iter().map(|id| self.write(*id)).collect()
    }

    /// A set's members in the order that the format gives them, each once.
    fn members(&mut self, items: &[Id]) -> Result<Vec<Value>> {
        let mut members = Vec::with_capacity(items.len());
        for item in self.all(items)? {
            let item = hashable(item)?;
            members.push((value::encode(&item)?, item));
        }
        members.sort_by(|(a, _), (b, _)| a.cmp(b));
        members.dedup_by(|(a, _), (b, _)| a == b);
        Ok(members.into_iter().map(|(_, item)| item).collect())
    }

    /// A dict's entries; of equal keys the last value counts, at the first one's place.
    fn dict(&mut self, items: &[(Id, Id)]) -> Result<Value> {
        let mut entries: Vec<(Value, Value)> = Vec::with_capacity(items.len());
        let mut places: HashMap<Vec<u8>, usize> = HashMap::with_capacity(items.len());
        for (key, item) in items {
            let key = hashable(self.write(*key)?)?;
            let item = self.write(*item)?;
            match places.entry(value::encode(&key)?) {
                Slot::Occupied(slot) => entries[*slot.get()].1 = item,
                Slot::Vacant(slot) => {
                    slot.insert(entries.len());
                    entries.push((key, item));
                }
            }
        }
        Ok(Value::dict(entries))
    }

    fn array(&mut self, array: &ArrayNode) -> Result<Value> {
        let data = if array.data.len() <= INLINE_BYTES {
            Value::Bytes(array.data.clone())
        } else {
            self.own(&array.data)?
        };
        let shape = array
            .shape
            .iter()
            .map(|size| Value::integer(false, &size.to_be_bytes()));
        let order = if array.fortran { "F" } else { "C" };
        let fields = vec![
            ("dtype", Value::Str(array.dtype.text())),
            ("shape", Value::Tuple(shape.collect())),
            ("order", Value::Str(order.to_owned())),
            ("writeable", Value::Bool(true)),
            ("data", data),
        ];
        Ok(object("ndarray", "numpy.ndarray", fields))
    }

    /// Makes bytes a storage of their own.
    fn own(&mut self, bytes: &[u8]) -> Result<Value> {
        let index = self.first_owned + self.owned.len();
        self.owned.push(bytes.to_vec());
        Ok(Value::from(Tensor {
            dtype: "uint8".to_owned(),
            shape: vec![bytes.len() as u64],
            strides: vec![1],
            offset: 0,
            storage: u32::try_from(index).map_err(|_| refused("more than 2^32 storages"))?,
            device: "cpu".to_owned(),
            attrs: Vec::new(),
        }))
    }
}

/// Passes on what may be a key or a member of a set, which no pickle of Python's own can break.
fn hashable(value: Value) -> Result<Value> {
    fn is_hashable(value: &Value) -> bool {
        match value {
            Value::List(_) | Value::Dict(_) | Value::Set(_) => false,
            Value::Tuple(parts) | Value::FrozenSet(parts) => parts.iter().all(is_hashable),
            Value::Object(object) => !matches!(
                object.kind.as_str(),
                "bytearray" | "defaultdict" | "deque" | "mapping" | "namespace" | "ndarray" | "slice"
            ),
            _ => true,
        }
    }
    if is_hashable(&value) {
        return Ok(value);
    }
    Err(flawed(
        "the pickle has a key, or a member of a set, that can change",
    ))
}

fn object(kind: &str, name: &str, fields: Vec<(&str, Value)>) -> Value {
    Value::from(Object {
        kind: kind.to_owned(),
        name: name.to_owned(),
        fields: fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    })
}

fn tensor_value(node: &TensorNode) -> Value {
    let mut attrs = Vec::new(); // Sorted by name.
    if node.parameter {
        let class = "torch.nn.parameter.Parameter".to_owned();
        attrs.push(("class".to_owned(), Value::Str(class)));
    }
    for (name, flag) in [
        ("conj", node.conj),
        ("neg", node.neg),
        ("requires_grad", node.requires_grad),
    ] {
        if flag {
            attrs.push((name.to_owned(), Value::Bool(true)));
        }
    }
    Value::from(Tensor {
        dtype: node.dtype.to_owned(),
        shape: node.shape.clone(),
        strides: node.strides.clone(),
        offset: node.offset,
        storage: node.storage,
        device: node.device.clone(),
        attrs,
    })
}
