//! A tree as a list of leaves with paths.
//!
//! Touches: nothing.

use unbroken::Value;
use unbroken::format::manifest::element_size;
use unbroken::state::Tensor;
use unbroken::store::key_text;

/// One leaf: whatever has no parts that deserve a path of their own.
#[derive(Debug)]
pub(crate) struct Leaf<'a> {
    pub(crate) path: String,
    pub(crate) value: &'a Value,
}

/// The leaves of a tree, in its order.
///
/// A tensor, a number, a text is a leaf; so is an empty container, and so are a set and its members together.
pub(crate) fn leaves(tree: &Value) -> Vec<Leaf<'_>> {
    let mut out = Vec::new();
    descend(tree, String::new(), &mut out);
    out
}

fn descend<'a>(value: &'a Value, path: String, out: &mut Vec<Leaf<'a>>) {
    let below = |part: &str| {
        if path.is_empty() {
            part.to_owned()
        } else {
            format!("{path}/{part}")
        }
    };
    match value {
        Value::List(items) | Value::Tuple(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                descend(item, below(&index.to_string()), out);
            }
        }
        Value::Dict(entries) if !entries.is_empty() => {
            for (key, item) in &**entries {
                descend(item, below(&key_text(key)), out);
            }
        }
        Value::Object(object) if !object.fields.is_empty() => {
            for (name, item) in &object.fields {
                descend(item, below(name), out);
            }
        }
        _ => out.push(Leaf { path, value }),
    }
}

/// Bytes of a tensor's elements; `None` for dtypes that only a front knows.
pub(crate) fn byte_length(tensor: &Tensor) -> Option<u64> {
    let element = element_size(&tensor.dtype)?;
    tensor
        .shape
        .iter()
        .try_fold(element, |bytes, size| bytes.checked_mul(*size))
}

#[cfg(test)]
mod tests {
    use unbroken::state::Object;

    use super::*;

    #[test]
    fn a_leaf_is_what_has_no_parts_with_paths_of_their_own() {
        let tree = Value::dict(vec![
            (
                Value::Str("a".into()),
                Value::List(vec![Value::Int(1), Value::Tuple(Vec::new())]),
            ),
            (Value::Int(3), Value::Set(vec![Value::Int(1)])),
            (
                Value::Str("o".into()),
                Value::from(Object {
                    kind: "dataclass".into(),
                    name: "m.P".into(),
                    fields: vec![("x".into(), Value::None)],
                }),
            ),
        ]);
        let paths: Vec<String> = leaves(&tree).into_iter().map(|leaf| leaf.path).collect();
        assert_eq!(paths, ["a/0", "a/1", "3", "o/x"]);
    }
}
