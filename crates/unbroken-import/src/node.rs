//! What the pickle machine makes: nodes that name each other by index, so that sharing and cycles cost nothing.
//!
//! Touches: nothing.

use unbroken::Value;

/// Index of a node.
pub(crate) type Id = u32;

/// One object of the pickle.
#[derive(Clone, Debug)]
pub(crate) enum Node {
    /// A value without parts.
    Plain(Value),
    ByteArray(Vec<u8>),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Set(Vec<Id>),
    FrozenSet(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A dict with a name of its own: `collections.OrderedDict`, `collections.Counter`.
    Mapping(&'static str, Vec<(Id, Id)>),
    /// A `collections.defaultdict`, its factory by name.
    Default(Option<&'static str>, Vec<(Id, Id)>),
    Deque(Vec<Id>, Option<i64>),
    /// An object that is nothing but its attributes.
    Namespace(&'static str, Vec<(Id, Id)>),
    /// Something that the pickle names. It is data here: nothing is imported or called.
    Global(What),
    /// The bytes that tensors view, by their position among the storages.
    Storage(StorageUse),
    Tensor(TensorNode),
    NumpyDtype(DtypeNode),
    /// A numpy array; without a dtype until its state comes.
    NumpyArray(Option<ArrayNode>),
    NumpyScalar(DtypeNode, Vec<u8>),
    /// What the core calls an object: kind, name, parts that are plain.
    Object(&'static str, String, Vec<(String, Value)>),
}

/// What a pickle may name. Anything else is refused by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    OrderedDict,
    Counter,
    DefaultDict,
    Deque,
    Set,
    FrozenSet,
    ByteArray,
    Bytes,
    Complex,
    Slice,
    Range,
    /// A type that only stands as a default factory.
    Factory(&'static str),
    Encode,
    Namespace(&'static str),
    Path(&'static str),
    TensorV1,
    TensorV2,
    TensorV3,
    Parameter,
    Size,
    Device,
    Layout,
    Dtype(&'static str),
    /// A storage's type: of one dtype, or of bytes.
    StorageType(Option<&'static str>),
    NumpyReconstruct,
    NumpyFromBuffer,
    NumpyScalar,
    NumpyArray,
    NumpyDtype,
}

/// A storage as one place of the pickle names it.
#[derive(Clone, Debug)]
pub(crate) struct StorageUse {
    pub(crate) index: u32,
    pub(crate) dtype: Option<&'static str>,
    pub(crate) device: String,
}

#[derive(Clone, Debug)]
pub(crate) struct TensorNode {
    pub(crate) storage: u32,
    pub(crate) dtype: &'static str,
    pub(crate) device: String,
    pub(crate) offset: u64,
    pub(crate) shape: Vec<u64>,
    pub(crate) strides: Vec<i64>,
    pub(crate) requires_grad: bool,
    pub(crate) parameter: bool,
    pub(crate) conj: bool,
    pub(crate) neg: bool,
}

/// A numpy dtype without fields: `i8` and its byte order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DtypeNode {
    pub(crate) code: String,
    pub(crate) big_endian: bool,
    pub(crate) item_bytes: u64,
}

impl DtypeNode {
    /// Reads what numpy calls its short form, without a byte order.
    pub(crate) fn parse(code: &str) -> Option<DtypeNode> {
        let (kind, digits) = code.split_at_checked(1)?;
        let number: u64 = digits.parse().ok()?;
        let known = match kind {
            "b" => number == 1,
            "i" | "u" => matches!(number, 1 | 2 | 4 | 8),
            "f" => matches!(number, 2 | 4 | 8),
            "c" => matches!(number, 8 | 16),
            "S" | "U" => number <= 1 << 16,
            _ => false,
        };
        known.then(|| DtypeNode {
            code: code.to_owned(),
            big_endian: false,
            item_bytes: if kind == "U" { number * 4 } else { number },
        })
    }

    /// As numpy writes it: `<i8`, `|u1`.
    pub(crate) fn text(&self) -> String {
        let order = match (self.big_endian, self.item_bytes, &self.code[..1]) {
            (_, _, "S") | (_, 1, _) => '|',
            (true, ..) => '>',
            (false, ..) => '<',
        };
        format!("{order}{}", self.code)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct ArrayNode {
    pub(crate) dtype: DtypeNode,
    pub(crate) shape: Vec<u64>,
    pub(crate) fortran: bool,
    pub(crate) data: Vec<u8>,
}
