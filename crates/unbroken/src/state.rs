//! State: a tree of named values as a training run sees it, framework-free.
//!
//! Touches: nothing. A [`Value`] is plain data; tensor bytes live outside the tree, in storages that leaves refer to
//! by index, so that tied weights and views are stored once and come back tied.

use std::fmt;
use std::sync::Arc;

/// Top-level entry of a checkpoint's tree for what a resume puts back though nothing has used it yet, such as a
/// generator that nobody seeded and nobody draws from: two runs may differ in it and be equal.
pub const UNTOUCHED: &str = "untouched";

/// One value of the tree. Types survive: a tuple comes back as a tuple, an integer key as an integer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Nothing.
    None,
    /// True or false.
    Bool(bool),
    /// An integer that fits in 64 bits, signed.
    Int(i64),
    /// Any other integer. Canonical: never a value that `Int` can hold, no leading zero byte.
    BigInt {
        /// Whether the number is below zero.
        negative: bool,
        /// Absolute value, most significant byte first.
        magnitude: Vec<u8>,
    },
    /// A float by its IEEE 754 bits: NaN payloads and signed zeros survive.
    Float(u64),
    /// A complex number: bits of the real and of the imaginary part.
    Complex(u64, u64),
    /// Text.
    Str(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A mutable sequence.
    List(Vec<Value>),
    /// An immutable sequence.
    Tuple(Vec<Value>),
    /// A mapping. The order is state and is kept. Shared: a capture's large ones are the checkpoint's, too.
    Dict(Arc<Vec<(Value, Value)>>),
    /// A mutable set. Canonical: sorted by encoded bytes, no duplicates.
    Set(Vec<Value>),
    /// An immutable set, canonical like `Set`.
    FrozenSet(Vec<Value>),
    /// A typed value that the core does not interpret: a front lowers and raises it (dataclass, enum, deque, path).
    Object(Box<Object>),
    /// A view of a storage. Shared: thousands of them are the same from one state to the next.
    Tensor(Arc<Tensor>),
}

impl From<Object> for Value {
    fn from(object: Object) -> Value {
        Value::Object(Box::new(object))
    }
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Value {
        Value::Tensor(Arc::new(tensor))
    }
}

impl Value {
    /// A mapping of these entries, in this order.
    pub fn dict(entries: Vec<(Value, Value)>) -> Value {
        Value::Dict(Arc::new(entries))
    }

    /// The integer with this sign and absolute value (most significant byte first), in its canonical form.
    pub fn integer(negative: bool, magnitude: &[u8]) -> Value {
        let leading = magnitude.iter().take_while(|byte| **byte == 0).count();
        let digits = &magnitude[leading..];
        if digits.len() <= 8 {
            let absolute = digits
                .iter()
                .fold(0i128, |value, byte| value << 8 | i128::from(*byte));
            if let Ok(small) = i64::try_from(if negative { -absolute } else { absolute }) {
                return Value::Int(small);
            }
        }
        Value::BigInt {
            negative,
            magnitude: digits.to_vec(),
        }
    }

    /// A checkpoint's tree as comparisons see it: without its entry [`UNTOUCHED`].
    pub fn compared(&self) -> Value {
        match self {
            Value::Dict(entries) => {
                let kept = entries
                    .iter()
                    .filter(|(key, _)| !matches!(key, Value::Str(name) if name == UNTOUCHED));
                Value::dict(kept.cloned().collect())
            }
            other => other.clone(),
        }
    }

    /// The value under a text key, where this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let Value::Dict(items) = self else { return None };
        items
            .iter()
            .find(|(name, _)| matches!(name, Value::Str(name) if name == key))
            .map(|(_, value)| value)
    }
}

/// A typed value that only a front can make something of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// What sort of thing it is, such as `dataclass`.
    pub kind: String,
    /// Its type's name, such as `__main__.Score`.
    pub name: String,
    /// Its parts, in order.
    pub fields: Vec<(String, Value)>,
}

/// A leaf that views the bytes of one storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Element type by its torch name without prefix (`float32`, `bfloat16`, ...) or a front's own name.
    pub dtype: String,
    /// Size of each dimension, in elements.
    pub shape: Vec<u64>,
    /// Step of each dimension, in elements; negative only for fronts that have such views (numpy).
    pub strides: Vec<i64>,
    /// First element, counted in elements from the start of the storage.
    pub offset: u64,
    /// Index into the checkpoint's storages.
    pub storage: u32,
    /// Where it lived, such as `cpu` or `cuda:0`.
    pub device: String,
    /// What else the front needs to rebuild it, such as `requires_grad` or quantizer parameters. Sorted by name.
    pub attrs: Vec<(String, Value)>,
}

/// Path of a leaf: keys, indices and field names from the root, for people and for pack entries.
///
/// Written with `/` between parts: `optimizer/state/conv1.weight/exp_avg`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeafPath(pub String);

impl fmt::Display for LeafPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_take_the_smallest_form_that_holds_them() {
        assert_eq!(Value::integer(true, &[]), Value::Int(0));
        assert_eq!(Value::integer(true, &[0, 0, 5]), Value::Int(-5));
        assert_eq!(
            Value::integer(true, &(1u64 << 63).to_be_bytes()),
            Value::Int(i64::MIN)
        );
        let beyond = Value::BigInt {
            negative: false,
            magnitude: (1u64 << 63).to_be_bytes().to_vec(),
        };
        assert_eq!(Value::integer(false, &(1u64 << 63).to_be_bytes()), beyond);
        assert_eq!(Value::integer(false, &[0, 128, 0, 0, 0, 0, 0, 0, 0]), beyond);
    }
}
