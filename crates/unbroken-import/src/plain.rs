//! From nodes to the core's values: shared parts are written out, cycles and bombs are refused.
//!
//! Touches: nothing. Large numpy arrays become storages of their own.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;

use unbroken::Result;
use unbroken::format::value;
use unbroken::state::{Tensor, Value};

use crate::machine::Arena;
use crate::node::{ArrayNode, Id, Node, TensorNode};
use crate::{flawed, refused};

/// Deepest nesting; the format has room for a little more around it.
const MAX_DEPTH: usize = 100;
/// Most values that are written out.
const MAX_VALUES: usize = 1 << 23;
/// Most bytes of texts and bytes that are written out.
const MAX_BYTES: usize = 1 << 29;
/// Numpy arrays from this size on are not kept in the manifest.
const INLINE_BYTES: usize = 4096;

/// Writes out a node as a value. `owned` receives the bytes of storages that were not in the file as such; `first_owned`
/// is the index that the first of them has among all.
pub(crate) fn value(arena: &Arena, root: Id, first_owned: usize, owned: &mut Vec<Vec<u8>>) -> Result<Value> {
    let mut writer = Writer {
        arena,
        first_owned,
        owned,
        values_left: MAX_VALUES,
        bytes_left: MAX_BYTES,
    };
    writer.write(root, 0)
}

struct Writer<'a> {
    arena: &'a Arena,
    first_owned: usize,
    owned: &'a mut Vec<Vec<u8>>,
    values_left: usize,
    bytes_left: usize,
}

impl Writer<'_> {
    fn write(&mut self, id: Id, depth: usize) -> Result<Value> {
        if depth > MAX_DEPTH {
            return Err(refused(format!(
                "an object that is nested more than {MAX_DEPTH} levels deep, or contains itself"
            )));
        }
        self.values_left = self.values_left.checked_sub(1).ok_or_else(|| {
            refused(format!(
                "more than {MAX_VALUES} values, counting shared ones each time"
            ))
        })?;
        match self.arena.get(id) {
            Node::Plain(value) => self.plain(value),
            Node::ByteArray(bytes) => {
                let data = self.plain(&Value::Bytes(bytes.clone()))?;
                Ok(object("bytearray", "bytearray", vec![("data", data)]))
            }
            Node::List(items) => Ok(Value::List(self.all(items, depth)?)),
            Node::Tuple(items) => Ok(Value::Tuple(self.all(items, depth)?)),
            Node::Set(items) => Ok(Value::Set(self.members(items, depth)?)),
            Node::FrozenSet(items) => Ok(Value::FrozenSet(self.members(items, depth)?)),
            Node::Dict(items) => self.dict(items, depth),
            Node::Mapping(name, items) => {
                let items = self.dict(items, depth + 1)?;
                Ok(object("mapping", name, vec![("items", items)]))
            }
            Node::Default(factory, items) => {
                let items = self.dict(items, depth + 1)?;
                let factory = factory.map_or(Value::None, |name| Value::Str(name.to_owned()));
                let fields = vec![("factory", factory), ("items", items)];
                Ok(object("defaultdict", "collections.defaultdict", fields))
            }
            Node::Deque(items, limit) => {
                let items = Value::List(self.all(items, depth + 1)?);
                let limit = limit.map_or(Value::None, Value::Int);
                Ok(object(
                    "deque",
                    "collections.deque",
                    vec![("items", items), ("maxlen", limit)],
                ))
            }
            Node::Namespace(name, items) => {
                let items = self.dict(items, depth + 1)?;
                Ok(object("namespace", name, vec![("items", items)]))
            }
            Node::Object(kind, name, fields) => {
                let mut parts = Vec::with_capacity(fields.len());
                for (name, value) in fields {
                    parts.push((name.clone(), self.plain(value)?));
                }
                Ok(Value::Object {
                    kind: (*kind).to_owned(),
                    name: name.clone(),
                    fields: parts,
                })
            }
            Node::Tensor(tensor) => Ok(tensor_value(tensor)),
            Node::NumpyArray(Some(array)) => self.array(array),
            Node::NumpyScalar(dtype, data) => {
                let data = self.plain(&Value::Bytes(data.clone()))?;
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

    fn plain(&mut self, value: &Value) -> Result<Value> {
        let bytes = match value {
            Value::Str(text) => text.len(),
            Value::Bytes(bytes) => bytes.len(),
            Value::BigInt { magnitude, .. } => magnitude.len(),
            _ => 0,
        };
        self.bytes_left = self.bytes_left.checked_sub(bytes).ok_or_else(|| {
            refused(format!(
                "more than {MAX_BYTES} bytes of text, counting shared ones each time"
            ))
        })?;
        Ok(value.clone())
    }

    fn all(&mut self, items: &[Id], depth: usize) -> Result<Vec<Value>> {
        items.iter().map(|id| self.write(*id, depth + 1)).collect()
    }

    /// A set's members in the order that the format gives them, each once.
    fn members(&mut self, items: &[Id], depth: usize) -> Result<Vec<Value>> {
        let mut members = Vec::with_capacity(items.len());
        for item in self.all(items, depth)? {
            let item = hashable(item)?;
            members.push((value::encode(&item)?, item));
        }
        members.sort_by(|(a, _), (b, _)| a.cmp(b));
        members.dedup_by(|(a, _), (b, _)| a == b);
        Ok(members.into_iter().map(|(_, item)| item).collect())
    }

    /// A dict's entries; of equal keys the last value counts, at the first one's place.
    fn dict(&mut self, items: &[(Id, Id)], depth: usize) -> Result<Value> {
        let mut entries: Vec<(Value, Value)> = Vec::with_capacity(items.len());
        let mut places: HashMap<Vec<u8>, usize> = HashMap::with_capacity(items.len());
        for (key, item) in items {
            let key = hashable(self.write(*key, depth + 1)?)?;
            let item = self.write(*item, depth + 1)?;
            match places.entry(value::encode(&key)?) {
                Slot::Occupied(slot) => entries[*slot.get()].1 = item,
                Slot::Vacant(slot) => {
                    slot.insert(entries.len());
                    entries.push((key, item));
                }
            }
        }
        Ok(Value::Dict(entries))
    }

    fn array(&mut self, array: &ArrayNode) -> Result<Value> {
        let data = if array.data.len() <= INLINE_BYTES {
            self.plain(&Value::Bytes(array.data.clone()))?
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
        self.bytes_left = self
            .bytes_left
            .checked_sub(bytes.len())
            .ok_or_else(|| refused(format!("more than {MAX_BYTES} bytes of numpy arrays")))?;
        let index = self.first_owned + self.owned.len();
        self.owned.push(bytes.to_vec());
        Ok(Value::Tensor(Tensor {
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
            Value::Object { kind, .. } => !matches!(
                kind.as_str(),
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
    Value::Object {
        kind: kind.to_owned(),
        name: name.to_owned(),
        fields: fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    }
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
    Value::Tensor(Tensor {
        dtype: node.dtype.to_owned(),
        shape: node.shape.clone(),
        strides: node.strides.clone(),
        offset: node.offset,
        storage: node.storage,
        device: node.device.clone(),
        attrs,
    })
}
