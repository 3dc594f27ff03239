//! What a pickle may name, and what becomes of it: torch's tensors, numpy's arrays, plain containers. Nothing else.
//!
//! Touches: the nodes and the storages' table. "Calling" a name here makes a node of its arguments; no code of any
//! pickle, of torch or of Python is run.

use std::collections::HashMap;

use unbroken::format::manifest::element_size;
use unbroken::state::Value;
use unbroken::{Error, Result};

use crate::machine::Arena;
use crate::node::{ArrayNode, DtypeNode, Id, Node, StorageUse, TensorNode, What};
use crate::{flawed, refused};

/// A storage that tensors name, before its bytes are found.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Its name in the file.
    pub(crate) key: String,
    pub(crate) bytes: u64,
    /// Bytes of one element, as the old format counts.
    pub(crate) element_bytes: u64,
}

/// The storages of a file, in the order in which they are first named.
#[derive(Debug, Default)]
pub(crate) struct Storages {
    pub(crate) wanted: Vec<Wanted>,
    indices: HashMap<String, u32>,
    /// Attributes of mappings that were left behind, such as a state dict's `_metadata`.
    pub(crate) attributes_dropped: usize,
}

const FACTORIES: [&str; 8] = ["bool", "complex", "dict", "float", "int", "list", "str", "tuple"];

/// Returns what a name stands for.
///
/// # Errors
///
/// The refusal of every name that is not listed, by that name.
pub(crate) fn global(module: &str, name: &str) -> Result<Node> {
    if (module, name) == ("builtins", "Ellipsis") || (module, name) == ("__builtin__", "Ellipsis") {
        return Ok(Node::Object("constant", "Ellipsis".to_owned(), Vec::new()));
    }
    let what = match (module, name) {
        ("collections", "OrderedDict") => What::OrderedDict,
        ("collections", "Counter") => What::Counter,
        ("collections", "defaultdict") => What::DefaultDict,
        ("collections", "deque") => What::Deque,
        ("builtins" | "__builtin__", builtin) => match builtin {
            "set" => What::Set,
            "frozenset" => What::FrozenSet,
            "bytearray" => What::ByteArray,
            "bytes" => What::Bytes,
            "complex" => What::Complex,
            "slice" => What::Slice,
            "range" | "xrange" => What::Range,
            other => match FACTORIES.iter().find(|known| **known == other) {
                Some(known) => What::Factory(known),
                None => return Err(stranger(module, name)),
            },
        },
        ("_codecs", "encode") => What::Encode,
        ("argparse", "Namespace") => What::Namespace("argparse.Namespace"),
        ("types", "SimpleNamespace") => What::Namespace("types.SimpleNamespace"),
        ("pathlib" | "pathlib._local", "PosixPath") => What::Path("pathlib.PosixPath"),
        ("pathlib" | "pathlib._local", "PurePosixPath") => What::Path("pathlib.PurePosixPath"),
        ("torch._utils", "_rebuild_tensor") => What::TensorV1,
        ("torch._utils", "_rebuild_tensor_v2") => What::TensorV2,
        ("torch._utils", "_rebuild_tensor_v3") => What::TensorV3,
        ("torch._utils", "_rebuild_parameter") => What::Parameter,
        ("torch", "Size") => What::Size,
        ("torch", "device") => What::Device,
        ("torch.serialization", "_get_layout") => What::Layout,
        ("torch.storage" | "torch", "UntypedStorage") => What::StorageType(None),
        ("torch" | "torch.cuda", known) => match torch_name(known) {
            Some(TorchName::What(what)) => what,
            Some(TorchName::Constant(text)) => {
                return Ok(Node::Object("torch_constant", text.to_owned(), Vec::new()));
            }
            None => return Err(stranger(module, name)),
        },
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => What::NumpyReconstruct,
        ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => What::NumpyScalar,
        ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => What::NumpyFromBuffer,
        ("numpy", "ndarray") => What::NumpyArray,
        ("numpy", "dtype") => What::NumpyDtype,
        _ => return Err(stranger(module, name)),
    };
    Ok(Node::Global(what))
}

enum TorchName {
    What(What),
    Constant(&'static str),
}

/// Names of torch's own: storages of one dtype, dtypes, memory formats.
fn torch_name(name: &str) -> Option<TorchName> {
    const STORAGES: [(&str, &str); 12] = [
        ("DoubleStorage", "float64"),
        ("FloatStorage", "float32"),
        ("HalfStorage", "float16"),
        ("BFloat16Storage", "bfloat16"),
        ("LongStorage", "int64"),
        ("IntStorage", "int32"),
        ("ShortStorage", "int16"),
        ("CharStorage", "int8"),
        ("ByteStorage", "uint8"),
        ("BoolStorage", "bool"),
        ("ComplexDoubleStorage", "complex128"),
        ("ComplexFloatStorage", "complex64"),
    ];
    const DTYPES: [&str; 22] = [
        "bfloat16",
        "bool",
        "complex128",
        "complex32",
        "complex64",
        "float16",
        "float32",
        "float64",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "int16",
        "int32",
        "int64",
        "int8",
        "uint16",
        "uint32",
        "uint64",
        "uint8",
        "half",
    ];
    const CONSTANTS: [&str; 5] = [
        "torch.contiguous_format",
        "torch.channels_last",
        "torch.channels_last_3d",
        "torch.preserve_format",
        "torch.strided",
    ];
    if let Some((_, dtype)) = STORAGES.iter().find(|(storage, _)| *storage == name) {
        return Some(TorchName::What(What::StorageType(Some(dtype))));
    }
    if let Some(dtype) = DTYPES.iter().find(|dtype| **dtype == name) {
        let dtype = if *dtype == "half" { "float16" } else { dtype };
        return Some(TorchName::What(What::Dtype(dtype)));
    }
    let constant = CONSTANTS
        .iter()
        .find(|constant| constant.strip_prefix("torch.") == Some(name));
    constant.map(|constant| TorchName::Constant(constant))
}

fn stranger(module: &str, name: &str) -> Error {
    let full: String = format!("{module}.{name}").chars().take(200).collect();
    refused(format!(
        "a pickle that names `{full}`: only tensors, numbers, texts and plain containers are read, and no code is run"
    ))
}

/// Makes what a name makes of its arguments. `bare` tells that it was made without its constructor (NEWOBJ).
pub(crate) fn call(
    arena: &mut Arena,
    storages: &mut Storages,
    callable: Id,
    arguments: Id,
    bare: bool,
) -> Result<Node> {
    let Node::Global(what) = arena.get(callable) else {
        return Err(flawed("the pickle calls something that is not a name"));
    };
    let what = *what;
    let Node::Tuple(arguments) = arena.get(arguments) else {
        return Err(flawed("the pickle calls a name without arguments"));
    };
    let arguments = arguments.clone();
    arena.spend(arguments.len())?;
    let wrong = || {
        flawed(format!(
            "the pickle calls `{what:?}` with arguments that it does not take"
        ))
    };
    if bare && !matches!(what, What::Namespace(_) | What::OrderedDict | What::Set) {
        return Err(wrong());
    }
    match (what, arguments.as_slice()) {
        (What::OrderedDict, given @ ([] | [_])) => {
            let items = given.first().map_or(Ok(Vec::new()), |id| pairs_of(arena, *id))?;
            Ok(Node::Mapping("collections.OrderedDict", items))
        }
        (What::Counter, given @ ([] | [_])) => {
            let items = given.first().map_or(Ok(Vec::new()), |id| pairs_of(arena, *id))?;
            Ok(Node::Mapping("collections.Counter", items))
        }
        (What::DefaultDict, []) => Ok(Node::Default(None, Vec::new())),
        (What::DefaultDict, [factory]) => match arena.get(*factory) {
            Node::Plain(Value::None) => Ok(Node::Default(None, Vec::new())),
            Node::Global(known) => Ok(Node::Default(
                Some(factory_name(*known).ok_or_else(wrong)?),
                Vec::new(),
            )),
            _ => Err(wrong()),
        },
        (What::Deque, []) => Ok(Node::Deque(Vec::new(), None)),
        (What::Deque, [items]) => Ok(Node::Deque(items_of(arena, *items)?, None)),
        (What::Deque, [items, limit]) => {
            let limit = match arena.get(*limit) {
                Node::Plain(Value::None) => None,
                _ => Some(int(arena, *limit).ok_or_else(wrong)?),
            };
            Ok(Node::Deque(items_of(arena, *items)?, limit))
        }
        (What::Set, []) => Ok(Node::Set(Vec::new())),
        (What::Set, [items]) => Ok(Node::Set(items_of(arena, *items)?)),
        (What::FrozenSet, []) => Ok(Node::FrozenSet(Vec::new())),
        (What::FrozenSet, [items]) => Ok(Node::FrozenSet(items_of(arena, *items)?)),
        (What::Bytes, []) => Ok(Node::Plain(Value::Bytes(Vec::new()))),
        (What::ByteArray, []) => Ok(Node::ByteArray(Vec::new())),
        (What::ByteArray, [bytes]) => Ok(Node::ByteArray(bytes_of(arena, *bytes)?)),
        (What::Encode, [text, codec]) => encode(arena, *text, *codec),
        (What::Complex, [real, imaginary]) => {
            let part = |id: Id| match arena.get(id) {
                Node::Plain(Value::Float(bits)) => Some(*bits),
                _ => None,
            };
            let (real, imaginary) = part(*real).zip(part(*imaginary)).ok_or_else(wrong)?;
            Ok(Node::Plain(Value::Complex(real, imaginary)))
        }
        (What::Slice | What::Range, [first, last, step]) => {
            let part = |id: Id| match arena.get(id) {
                Node::Plain(value @ (Value::None | Value::Int(_))) => Some(value.clone()),
                _ => None,
            };
            let parts: Option<Vec<Value>> = [*first, *last, *step].into_iter().map(part).collect();
            let parts = Value::Tuple(parts.ok_or_else(wrong)?);
            let kind = if what == What::Slice { "slice" } else { "range" };
            Ok(Node::Object(
                kind,
                kind.to_owned(),
                vec![("parts".to_owned(), parts)],
            ))
        }
        (What::Namespace(name), []) => Ok(Node::Namespace(name, Vec::new())),
        (What::Path(name), parts) => {
            let parts: Option<Vec<&str>> = parts.iter().map(|id| text(arena, *id)).collect();
            let joined = join_path(&parts.ok_or_else(wrong)?);
            arena.spend(joined.len())?;
            let fields = vec![("text".to_owned(), Value::Str(joined))];
            Ok(Node::Object("path", name.to_owned(), fields))
        }
        (What::Size, [sizes]) => {
            let sizes = sizes_of(arena, *sizes)?;
            let sizes = sizes
                .into_iter()
                .map(|size| Value::integer(false, &size.to_be_bytes()))
                .collect();
            let fields = vec![("sizes".to_owned(), Value::Tuple(sizes))];
            Ok(Node::Object("torch_size", "torch.Size".to_owned(), fields))
        }
        (What::Device, [kind]) => device(text(arena, *kind).ok_or_else(wrong)?, None),
        (What::Device, [kind, index]) => {
            let index = int(arena, *index).ok_or_else(wrong)?;
            device(text(arena, *kind).ok_or_else(wrong)?, Some(index))
        }
        (What::Layout, [name]) if text(arena, *name) == Some("torch.strided") => Ok(Node::Object(
            "torch_constant",
            "torch.strided".to_owned(),
            Vec::new(),
        )),
        (What::TensorV1, [storage, offset, sizes, strides]) => {
            tensor(arena, storages, [*storage, *offset, *sizes, *strides], None)
        }
        (What::TensorV2, [storage, offset, sizes, strides, grad, _hooks, more @ ..]) if more.len() <= 1 => {
            let node = tensor(arena, storages, [*storage, *offset, *sizes, *strides], None)?;
            with_flags(arena, node, *grad, more.first())
        }
        (What::TensorV3, [storage, offset, sizes, strides, grad, _hooks, dtype, more @ ..])
            if more.len() <= 1 =>
        {
            let Node::Global(What::Dtype(dtype)) = arena.get(*dtype) else {
                return Err(wrong());
            };
            let dtype = *dtype;
            let node = tensor(
                arena,
                storages,
                [*storage, *offset, *sizes, *strides],
                Some(dtype),
            )?;
            with_flags(arena, node, *grad, more.first())
        }
        (What::Parameter, [data, grad, _hooks]) => match (arena.get(*data), arena.get(*grad)) {
            (Node::Tensor(tensor), Node::Plain(Value::Bool(grad))) => {
                let cost = tensor.shape.len();
                let node = TensorNode {
                    parameter: true,
                    requires_grad: *grad,
                    ..tensor.clone()
                };
                arena.spend(cost)?;
                Ok(Node::Tensor(node))
            }
            _ => Err(wrong()),
        },
        (What::NumpyReconstruct, [class, _, _]) => match arena.get(*class) {
            Node::Global(What::NumpyArray) => Ok(Node::NumpyArray(None)),
            _ => Err(refused("a subclass of numpy.ndarray")),
        },
        (What::NumpyDtype, [code, ..]) => {
            let code = text(arena, *code).ok_or_else(wrong)?;
            let node = DtypeNode::parse(code);
            node.map(Node::NumpyDtype)
                .ok_or_else(|| refused(format!("numpy arrays of `{code}`")))
        }
        (What::NumpyScalar, [dtype, data]) => {
            let dtype = dtype_of(arena, *dtype).ok_or_else(wrong)?;
            let data = bytes_of(arena, *data)?;
            if data.len() as u64 != dtype.item_bytes {
                return Err(flawed("a numpy number has another length than its dtype"));
            }
            Ok(Node::NumpyScalar(dtype, data))
        }
        (What::NumpyFromBuffer, [data, dtype, shape, order]) => {
            let dtype = dtype_of(arena, *dtype).ok_or_else(wrong)?;
            let fortran = text(arena, *order) == Some("F");
            let shape = sizes_of(arena, *shape)?;
            let data = bytes_of(arena, *data)?;
            array(dtype, shape, fortran, data)
        }
        _ => Err(wrong()),
    }
}

/// Gives an object its state: a numpy dtype or array, attributes of a namespace or of a mapping.
pub(crate) fn build(arena: &mut Arena, storages: &mut Storages, target: Id, state: Id) -> Result<()> {
    let wrong = |what: &str| flawed(format!("the pickle gives a state to {what}"));
    let made = match arena.get(target) {
        Node::NumpyDtype(dtype) => {
            let mut dtype = dtype.clone();
            let Node::Tuple(parts) = arena.get(state) else {
                return Err(wrong("a numpy dtype that is not one"));
            };
            let none = |at: usize| {
                parts
                    .get(at)
                    .is_some_and(|id| matches!(arena.get(*id), Node::Plain(Value::None)))
            };
            if !(8..=9).contains(&parts.len())
                || !none(2)
                || !none(3)
                || !none(4)
                || parts.len() == 9 && !none(8)
            {
                return Err(refused("numpy arrays of records"));
            }
            dtype.big_endian = match text(arena, parts[1]) {
                Some(">") => true,
                Some("<" | "|" | "=") => false,
                _ => return Err(wrong("a numpy dtype without a byte order")),
            };
            Node::NumpyDtype(dtype)
        }
        Node::NumpyArray(None) => {
            let Node::Tuple(parts) = arena.get(state) else {
                return Err(wrong("a numpy array that is not one"));
            };
            let [_, shape, dtype, fortran, data] = parts[..] else {
                return Err(wrong("a numpy array that is not one"));
            };
            let Node::Plain(Value::Bool(fortran)) = arena.get(fortran) else {
                return Err(wrong("a numpy array without an order"));
            };
            let fortran = *fortran;
            let dtype = dtype_of(arena, dtype).ok_or_else(|| wrong("a numpy array without a dtype"))?;
            let shape = sizes_of(arena, shape)?;
            let data = bytes_of(arena, data)?;
            array(dtype, shape, fortran, data)?
        }
        Node::Namespace(name, _) => {
            let name = *name;
            Node::Namespace(name, pairs_of(arena, state)?)
        }
        // A module's state dict carries the versions of its modules; a plain mapping has no place for them.
        Node::Mapping(..) => {
            storages.attributes_dropped += 1;
            return Ok(());
        }
        _ => return Err(refused("a pickle that gives an object a state of its own")),
    };
    *arena.get_mut(target) = made;
    Ok(())
}

/// Returns the storage that a persistent name stands for: ("storage", type, key, device, number of elements).
pub(crate) fn persistent(arena: &mut Arena, storages: &mut Storages, name: Id) -> Result<Node> {
    let wrong = || flawed("the pickle names a storage that is not one");
    let Node::Tuple(parts) = arena.get(name) else {
        return Err(wrong());
    };
    let (kind, class, key, device, count) = match parts[..] {
        [kind, class, key, device, count] => (kind, class, key, device, count),
        // The old format's sixth part: which stretch of the storage this is. Nothing has written one since 2017.
        [kind, class, key, device, count, view] if matches!(arena.get(view), Node::Plain(Value::None)) => {
            (kind, class, key, device, count)
        }
        _ => return Err(wrong()),
    };
    let Node::Global(What::StorageType(dtype)) = arena.get(class) else {
        return Err(wrong());
    };
    let dtype = *dtype;
    let (key, device) = text(arena, key).zip(text(arena, device)).ok_or_else(wrong)?;
    let count = int(arena, count)
        .and_then(|count| u64::try_from(count).ok())
        .ok_or_else(wrong)?;
    if text(arena, kind) != Some("storage") || device.len() > 64 || key.len() > 255 {
        return Err(wrong());
    }
    let element_bytes = dtype.and_then(element_size).unwrap_or(1);
    let bytes = count.checked_mul(element_bytes).ok_or_else(wrong)?;
    let index = storages.find_or_add(key, bytes, element_bytes)?;
    Ok(Node::Storage(StorageUse {
        index,
        dtype,
        device: device.to_owned(),
    }))
}

impl Storages {
    /// The position of a storage that tensors name.
    pub(crate) fn index(&self, key: &str) -> Option<usize> {
        self.indices.get(key).map(|index| *index as usize)
    }

    fn find_or_add(&mut self, key: &str, bytes: u64, element_bytes: u64) -> Result<u32> {
        if let Some(&index) = self.indices.get(key) {
            if self.wanted[index as usize].bytes != bytes {
                return Err(flawed(format!("the pickle gives storage `{key}` two lengths")));
            }
            return Ok(index);
        }
        let index = u32::try_from(self.wanted.len()).expect("fewer storages than nodes");
        self.indices.insert(key.to_owned(), index);
        self.wanted.push(Wanted {
            key: key.to_owned(),
            bytes,
            element_bytes,
        });
        Ok(index)
    }
}

/// Makes a tensor of its storage, offset, sizes and strides, all of it inside the storage.
fn tensor(
    arena: &mut Arena,
    storages: &Storages,
    parts: [Id; 4],
    dtype: Option<&'static str>,
) -> Result<Node> {
    let [storage, offset, sizes, strides] = parts;
    let wrong = || flawed("the pickle has a tensor that is not one");
    let Node::Storage(storage) = arena.get(storage) else {
        return Err(wrong());
    };
    let storage = storage.clone();
    let dtype = dtype.or(storage.dtype).ok_or_else(wrong)?;
    let offset = int(arena, offset)
        .and_then(|offset| u64::try_from(offset).ok())
        .ok_or_else(wrong)?;
    let (shape, strides) = (sizes_of(arena, sizes)?, sizes_of(arena, strides)?);
    if shape.len() != strides.len() || shape.len() > 64 {
        return Err(wrong());
    }
    let room = storages.wanted[storage.index as usize].bytes / element_size(dtype).ok_or_else(wrong)?;
    // The last element's position; a tensor without elements reaches none.
    let last = shape
        .iter()
        .zip(&strides)
        .try_fold(offset, |last, (&size, &stride)| {
            last.checked_add(size.checked_sub(1)?.checked_mul(stride)?)
        });
    if !shape.contains(&0) && last.is_none_or(|last| last >= room) {
        return Err(flawed("the pickle has a tensor that reaches beyond its storage"));
    }
    let strides: Option<Vec<i64>> = strides
        .into_iter()
        .map(|stride| i64::try_from(stride).ok())
        .collect();
    Ok(Node::Tensor(TensorNode {
        storage: storage.index,
        dtype,
        device: storage.device,
        offset,
        shape,
        strides: strides.ok_or_else(wrong)?,
        requires_grad: false,
        parameter: false,
        conj: false,
        neg: false,
    }))
}

fn with_flags(arena: &Arena, node: Node, grad: Id, metadata: Option<&Id>) -> Result<Node> {
    let wrong = || flawed("the pickle has a tensor with flags that it does not know");
    let (Node::Tensor(mut tensor), Node::Plain(Value::Bool(grad))) = (node, arena.get(grad)) else {
        return Err(wrong());
    };
    tensor.requires_grad = *grad;
    let entries = match metadata.map(|id| arena.get(*id)) {
        None | Some(Node::Plain(Value::None)) => &[],
        Some(Node::Dict(entries)) => entries.as_slice(),
        Some(_) => return Err(wrong()),
    };
    for (name, value) in entries {
        let Node::Plain(Value::Bool(flag)) = arena.get(*value) else {
            return Err(wrong());
        };
        match text(arena, *name) {
            Some("conj") => tensor.conj = *flag,
            Some("neg") => tensor.neg = *flag,
            _ => return Err(wrong()),
        }
    }
    Ok(Node::Tensor(tensor))
}

fn array(dtype: DtypeNode, shape: Vec<u64>, fortran: bool, data: Vec<u8>) -> Result<Node> {
    let length = shape
        .iter()
        .try_fold(dtype.item_bytes, |bytes, size| bytes.checked_mul(*size));
    if length != Some(data.len() as u64) || shape.len() > 64 {
        return Err(flawed("a numpy array has another length than its shape"));
    }
    Ok(Node::NumpyArray(Some(ArrayNode {
        dtype,
        shape,
        fortran,
        data,
    })))
}

fn device(kind: &str, index: Option<i64>) -> Result<Node> {
    if kind.len() > 64 {
        return Err(flawed("the pickle names a device that is not one"));
    }
    let fields = vec![
        ("type".to_owned(), Value::Str(kind.to_owned())),
        ("index".to_owned(), index.map_or(Value::None, Value::Int)),
    ];
    Ok(Node::Object("torch_device", "torch.device".to_owned(), fields))
}

/// Bytes as Python 2's protocols write them: text of which each character is a byte.
fn encode(arena: &mut Arena, given: Id, codec: Id) -> Result<Node> {
    let wrong = || flawed("the pickle has bytes that are not bytes");
    if !matches!(text(arena, codec), Some("latin1" | "latin-1")) {
        return Err(wrong());
    }
    let length = text(arena, given).ok_or_else(wrong)?.len();
    arena.spend(length)?;
    let text = text(arena, given).ok_or_else(wrong)?;
    let bytes: Option<Vec<u8>> = text
        .chars()
        .map(|character| u8::try_from(u32::from(character)).ok())
        .collect();
    Ok(Node::Plain(Value::Bytes(bytes.ok_or_else(wrong)?)))
}

fn join_path(parts: &[&str]) -> String {
    let mut joined = String::new();
    for part in parts {
        if part.starts_with('/') {
            joined.clear();
        } else if !joined.is_empty() && !joined.ends_with('/') {
            joined.push('/');
        }
        joined.push_str(part);
    }
    if joined.is_empty() { ".".to_owned() } else { joined }
}

fn factory_name(what: What) -> Option<&'static str> {
    match what {
        What::Factory(name) => Some(name),
        What::Set => Some("set"),
        What::FrozenSet => Some("frozenset"),
        What::Bytes => Some("bytes"),
        What::OrderedDict => Some("collections.OrderedDict"),
        What::Counter => Some("collections.Counter"),
        What::Deque => Some("collections.deque"),
        _ => None,
    }
}

fn text(arena: &Arena, id: Id) -> Option<&str> {
    match arena.get(id) {
        Node::Plain(Value::Str(text)) => Some(text),
        _ => None,
    }
}

fn int(arena: &Arena, id: Id) -> Option<i64> {
    match arena.get(id) {
        Node::Plain(Value::Int(number)) => Some(*number),
        _ => None,
    }
}

fn dtype_of(arena: &Arena, id: Id) -> Option<DtypeNode> {
    match arena.get(id) {
        Node::NumpyDtype(dtype) => Some(dtype.clone()),
        _ => None,
    }
}

/// A copy of bytes, paid for.
fn bytes_of(arena: &mut Arena, id: Id) -> Result<Vec<u8>> {
    let bytes = |arena: &Arena| match arena.get(id) {
        Node::Plain(Value::Bytes(bytes)) | Node::ByteArray(bytes) => Some(bytes.clone()),
        _ => None,
    };
    let length = match arena.get(id) {
        Node::Plain(Value::Bytes(bytes)) | Node::ByteArray(bytes) => bytes.len(),
        _ => 0,
    };
    arena.spend(length)?;
    bytes(arena).ok_or_else(|| flawed("the pickle has bytes that are not bytes"))
}

/// A copy of the items of a sequence, paid for.
fn items_of(arena: &mut Arena, id: Id) -> Result<Vec<Id>> {
    let items = match arena.get(id) {
        Node::List(items) | Node::Tuple(items) => items.clone(),
        _ => {
            return Err(flawed(
                "the pickle makes a container of something that is no sequence",
            ));
        }
    };
    arena.spend(items.len())?;
    Ok(items)
}

/// Pairs of a dict, or of a list of pairs; paid for.
fn pairs_of(arena: &mut Arena, id: Id) -> Result<Vec<(Id, Id)>> {
    let wrong = || flawed("the pickle makes a mapping of something that is none");
    let items = match arena.get(id) {
        Node::Dict(items) => items.clone(),
        Node::List(items) => {
            let pair = |id: &Id| match arena.get(*id) {
                Node::Tuple(pair) | Node::List(pair) if pair.len() == 2 => Some((pair[0], pair[1])),
                _ => None,
            };
            items.iter().map(pair).collect::<Option<_>>().ok_or_else(wrong)?
        }
        _ => return Err(wrong()),
    };
    arena.spend(items.len() * 2)?;
    Ok(items)
}

/// Sizes, strides: a tuple of numbers that are not negative.
fn sizes_of(arena: &mut Arena, id: Id) -> Result<Vec<u64>> {
    let wrong = || flawed("the pickle has a shape that is none");
    if let Node::Object("torch_size", _, fields) = arena.get(id) {
        let Some((_, Value::Tuple(sizes))) = fields.first() else {
            return Err(wrong());
        };
        let size = |value: &Value| match value {
            Value::Int(size) => u64::try_from(*size).ok(),
            _ => None,
        };
        return sizes.iter().map(size).collect::<Option<_>>().ok_or_else(wrong);
    }
    let items = items_of(arena, id)?;
    let size = |id: &Id| int(arena, *id).and_then(|size| u64::try_from(size).ok());
    items.iter().map(size).collect::<Option<_>>().ok_or_else(wrong)
}
