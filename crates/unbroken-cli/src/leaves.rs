//! A tree as a list of leaves with paths, and the bytes of a tensor leaf in its own order.
//!
//! Touches: nothing.

use std::borrow::Cow;

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
            for (key, item) in entries {
                descend(item, below(&key_text(key)), out);
            }
        }
        Value::Object { fields, .. } if !fields.is_empty() => {
            for (name, item) in fields {
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

/// A tensor's elements in row-major order, taken from its storage's bytes. The manifest's reader checked the bounds.
pub(crate) fn elements<'a>(tensor: &Tensor, storage: &'a [u8], element_bytes: u64) -> Cow<'a, [u8]> {
    let width = usize::try_from(element_bytes).expect("an element is a few bytes");
    let count: u64 = tensor.shape.iter().product();
    let at = |position: i64| {
        let start = usize::try_from(position).expect("a view lies in its storage") * width;
        &storage[start..start + width]
    };
    let offset = i64::try_from(tensor.offset).expect("a view lies in its storage");
    if count == 0 {
        return Cow::Borrowed(&[]);
    }
    if is_row_major(tensor) {
        let start = usize::try_from(tensor.offset).expect("a view lies in its storage") * width;
        let length = usize::try_from(count).expect("a view lies in its storage") * width;
        return Cow::Borrowed(&storage[start..start + length]);
    }
    let mut out = Vec::with_capacity(
        usize::try_from(count)
            .unwrap_or(0)
            .saturating_mul(width)
            .min(storage.len()),
    );
    let mut index = vec![0u64; tensor.shape.len()];
    let mut position = offset;
    for _ in 0..count {
        out.extend_from_slice(at(position));
        for dimension in (0..index.len()).rev() {
            index[dimension] += 1;
            position += tensor.strides[dimension];
            if index[dimension] < tensor.shape[dimension] {
                break;
            }
            position -= tensor.strides[dimension] * tensor.shape[dimension] as i64;
            index[dimension] = 0;
        }
    }
    Cow::Owned(out)
}

/// Whether elements follow each other in row-major order without gaps.
fn is_row_major(tensor: &Tensor) -> bool {
    let mut expected = 1u64;
    for (&size, &stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
        if size != 1 && u64::try_from(stride) != Ok(expected) {
            return false;
        }
        expected = expected.saturating_mul(size);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(shape: &[u64], strides: &[i64], offset: u64) -> Tensor {
        Tensor {
            dtype: "uint8".into(),
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            offset,
            storage: 0,
            device: "cpu".into(),
            attrs: Vec::new(),
        }
    }

    #[test]
    fn views_give_their_elements_in_row_major_order() {
        let storage: Vec<u8> = (0..12).collect();
        for (tensor, expected) in [
            (view(&[2, 3], &[3, 1], 0), vec![0, 1, 2, 3, 4, 5]),
            (view(&[2, 3], &[1, 2], 1), vec![1, 3, 5, 2, 4, 6]),
            (view(&[3], &[-2], 11), vec![11, 9, 7]),
            (view(&[2, 2], &[0, 1], 4), vec![4, 5, 4, 5]),
            (view(&[], &[], 7), vec![7]),
            (view(&[0, 5], &[5, 1], 0), vec![]),
            (view(&[1, 4], &[99, 1], 8), vec![8, 9, 10, 11]),
        ] {
            assert_eq!(
                elements(&tensor, &storage, 1).as_ref(),
                expected.as_slice(),
                "{tensor:?}"
            );
        }
    }

    #[test]
    fn a_leaf_is_what_has_no_parts_with_paths_of_their_own() {
        let tree = Value::Dict(vec![
            (
                Value::Str("a".into()),
                Value::List(vec![Value::Int(1), Value::Tuple(Vec::new())]),
            ),
            (Value::Int(3), Value::Set(vec![Value::Int(1)])),
            (
                Value::Str("o".into()),
                Value::Object {
                    kind: "dataclass".into(),
                    name: "m.P".into(),
                    fields: vec![("x".into(), Value::None)],
                },
            ),
        ]);
        let paths: Vec<String> = leaves(&tree).into_iter().map(|leaf| leaf.path).collect();
        assert_eq!(paths, ["a/0", "a/1", "3", "o/x"]);
    }
}
