//! Where two runs part: the first boundary and component of their journals, the leaves of their checkpoints.
//!
//! Touches: the packs of checkpoints that are compared, read only, and only where digests do not settle it.

use std::collections::HashMap;

use crate::error::Result;
use crate::journal::{self, Boundary, Difference, Journal};
use crate::state::{Tensor, Value};
use crate::store::{self, Checkpoint};

/// What two journals have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Boundaries that are equal, counted up to the first difference.
    pub equal: usize,
    /// (step, phase) of the last of them.
    pub last_equal: Option<(u64, u8)>,
    /// The first difference; a boundary that only one journal has differs in the component `boundary`.
    pub difference: Option<Difference>,
}

/// Compares two journals, boundary by boundary and component by component, both in causal order.
pub fn compare_journals(expected: &Journal, found: &Journal) -> Comparison {
    let (mut old, mut new) = (
        expected.boundaries.iter().peekable(),
        found.boundaries.iter().peekable(),
    );
    let key = |boundary: &Boundary| (boundary.step, boundary.phase);
    let mut comparison = Comparison {
        equal: 0,
        last_equal: None,
        difference: None,
    };
    let only = |boundary: &Boundary, expected: &str, found: &str| Difference {
        step: boundary.step,
        phase: boundary.phase,
        component: "boundary".to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
    };
    loop {
        comparison.difference = match (old.peek(), new.peek()) {
            (None, None) => return comparison,
            (Some(a), Some(b)) if key(a) == key(b) => {
                journal::first_difference(a, b).map(|(component, expected, found)| Difference {
                    step: a.step,
                    phase: a.phase,
                    component,
                    expected,
                    found,
                })
            }
            (Some(a), Some(b)) if key(a) > key(b) => Some(only(b, "no record", "a record")),
            (Some(a), _) => Some(only(a, "a record", "no record")),
            (None, Some(b)) => Some(only(b, "no record", "a record")),
        };
        if comparison.difference.is_some() {
            return comparison;
        }
        comparison.equal += 1;
        comparison.last_equal = old.next().map(key);
        new.next();
    }
}

/// The first boundary and component in which two journals differ.
pub fn first_difference(expected: &Journal, found: &Journal) -> Option<Difference> {
    compare_journals(expected, found).difference
}

/// A leaf in which two checkpoints differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafDifference {
    /// Its path, parts separated by `/`.
    pub path: String,
    /// What the first checkpoint has.
    pub expected: String,
    /// What the second one has.
    pub found: String,
    /// How far tensors of one shape and dtype are apart, where that was asked for.
    pub elements: Option<Elements>,
}

/// How far two tensors of one shape and dtype are apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elements {
    /// How many elements they have.
    pub count: u64,
    /// How many have different bytes.
    pub differing: u64,
    /// Position of the first one, counted in elements in row-major order.
    pub first: u64,
    /// Largest distance in units in the last place over pairs of numbers; `None` where the dtype is no float or
    /// only NaNs differ.
    pub max_ulp: Option<u64>,
}

/// Compares two checkpoints leaf by leaf, in the tree's order.
///
/// Tensors are read only where their storages differ and only a part of them is looked at, or with `detail`.
///
/// # Errors
///
/// Damage of a tensor that had to be read.
pub fn compare_checkpoints(
    expected: &Checkpoint,
    found: &Checkpoint,
    detail: bool,
) -> Result<Vec<LeafDifference>> {
    let owners = |checkpoint: &Checkpoint| {
        let mut owners = HashMap::new();
        store::walk(checkpoint.tree(), &mut |path, tensor| {
            owners.entry(tensor.storage).or_insert_with(|| path.to_owned());
        });
        owners
    };
    let owners = (owners(expected), owners(found));
    let mut comparer = Comparer {
        expected,
        found,
        detail,
        owners,
        path: String::new(),
        leaves: Vec::new(),
    };
    comparer.compare(&expected.tree().compared(), &found.tree().compared())?;
    Ok(comparer.leaves)
}

struct Comparer<'a> {
    expected: &'a Checkpoint,
    found: &'a Checkpoint,
    detail: bool,
    /// For each storage of either checkpoint the first leaf that views it.
    owners: (HashMap<u32, String>, HashMap<u32, String>),
    path: String,
    leaves: Vec<LeafDifference>,
}

impl Comparer<'_> {
    fn report(&mut self, expected: String, found: String, elements: Option<Elements>) {
        self.leaves.push(LeafDifference {
            path: self.path.clone(),
            expected,
            found,
            elements,
        });
    }

    /// Does `work` with one more part at the end of the path.
    fn below(&mut self, part: &str, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let length = self.path.len();
        if length > 0 {
            self.path.push('/');
        }
        self.path.push_str(part);
        let done = work(self);
        self.path.truncate(length);
        done
    }

    fn compare(&mut self, old: &Value, new: &Value) -> Result<()> {
        match (old, new) {
            (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
                let pairs =
                    (0..a.len().max(b.len())).map(|index| (index.to_string(), a.get(index), b.get(index)));
                self.compare_pairs(pairs.collect())
            }
            (Value::Dict(a), Value::Dict(b)) => {
                let keyed =
                    |items: &[(Value, Value)]| items.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>();
                let (old_keys, new_keys) = (keyed(a), keyed(b));
                let get =
                    |items: &'_ [(Value, Value)], key: &Value| items.iter().position(|(name, _)| name == key);
                let mut pairs: Vec<_> = a
                    .iter()
                    .map(|(key, value)| {
                        (
                            store::key_text(key),
                            Some(value),
                            get(b, key).map(|index| &b[index].1),
                        )
                    })
                    .collect();
                let added = b.iter().filter(|(key, _)| get(a, key).is_none());
                pairs.extend(added.map(|(key, value)| (store::key_text(key), None, Some(value))));
                self.compare_pairs(pairs)?;
                let same_keys =
                    old_keys.len() == new_keys.len() && old_keys.iter().all(|key| new_keys.contains(key));
                if same_keys && old_keys != new_keys {
                    let order = |keys: &[Value]| {
                        format!(
                            "keys in the order {}",
                            keys.iter().map(store::key_text).collect::<Vec<_>>().join(", ")
                        )
                    };
                    self.report(order(&old_keys), order(&new_keys), None);
                }
                Ok(())
            }
            (
                Value::Object {
                    kind: kind_a,
                    name: name_a,
                    fields: a,
                },
                Value::Object {
                    kind: kind_b,
                    name: name_b,
                    fields: b,
                },
            ) if (kind_a, name_a) == (kind_b, name_b) => self.compare_fields(a, b),
            (Value::Tensor(a), Value::Tensor(b)) => self.compare_tensors(a, b),
            (a, b) if a == b => Ok(()),
            (a, b) => {
                self.report(show(a), show(b), None);
                Ok(())
            }
        }
    }

    fn compare_fields(&mut self, a: &[(String, Value)], b: &[(String, Value)]) -> Result<()> {
        let get = |items: &'_ [(String, Value)], key: &str| items.iter().position(|(name, _)| name == key);
        let mut pairs: Vec<_> = a
            .iter()
            .map(|(name, value)| (name.clone(), Some(value), get(b, name).map(|index| &b[index].1)))
            .collect();
        let added = b.iter().filter(|(name, _)| get(a, name).is_none());
        pairs.extend(added.map(|(name, value)| (name.clone(), None, Some(value))));
        self.compare_pairs(pairs)
    }

    fn compare_pairs(&mut self, pairs: Vec<(String, Option<&Value>, Option<&Value>)>) -> Result<()> {
        for (part, old, new) in pairs {
            self.below(&part, |comparer| match (old, new) {
                (Some(old), Some(new)) => comparer.compare(old, new),
                (old, new) => {
                    let text = |value: Option<&Value>| value.map_or("nothing".to_owned(), show);
                    comparer.report(text(old), text(new), None);
                    Ok(())
                }
            })?;
        }
        Ok(())
    }

    fn compare_tensors(&mut self, a: &Tensor, b: &Tensor) -> Result<()> {
        let look = |tensor: &Tensor| (tensor.dtype.clone(), tensor.shape.clone());
        if look(a) != look(b) {
            self.report(show_tensor(a), show_tensor(b), None);
        } else {
            self.compare_bytes(a, b)?;
            let layout = |tensor: &Tensor| {
                format!(
                    "strides {:?} from element {} on {}",
                    tensor.strides, tensor.offset, tensor.device
                )
            };
            if layout(a) != layout(b) {
                self.report(layout(a), layout(b), None);
            }
            let (old, new) = (&self.owners.0[&a.storage], &self.owners.1[&b.storage]);
            if old != new {
                let text = |owner: &String, path: &String| {
                    if owner == path {
                        "memory of its own".to_owned()
                    } else {
                        format!("memory shared with `{owner}`")
                    }
                };
                let (old, new) = (text(old, &self.path), text(new, &self.path));
                self.report(old, new, None);
            }
        }
        self.compare_fields(&a.attrs, &b.attrs)
    }

    fn compare_bytes(&mut self, a: &Tensor, b: &Tensor) -> Result<()> {
        let old = self.expected.manifest().storages[a.storage as usize];
        let new = self.found.manifest().storages[b.storage as usize];
        let same_view = (&a.strides, a.offset) == (&b.strides, b.offset);
        let same_bytes = (old.digest, old.length) == (new.digest, new.length);
        if same_view && same_bytes {
            return Ok(());
        }
        let differing = || {
            (
                format!("bytes {}", old.digest.short()),
                format!("bytes {}", new.digest.short()),
            )
        };
        let Some(size) = element_size(&a.dtype) else {
            if !same_bytes {
                let (old, new) = differing();
                self.report(old, new, None);
            }
            return Ok(());
        };
        let whole = |tensor: &Tensor, length: u64| {
            let count = tensor
                .shape
                .iter()
                .try_fold(size as u64, |count, size| count.checked_mul(*size));
            store::contiguous(tensor) && count == Some(length)
        };
        let settled = whole(a, old.length) && whole(b, new.length);
        if settled && same_bytes {
            return Ok(()); // Strides of dimensions of size 1 may differ and mean nothing.
        }
        if settled && !self.detail {
            let (old, new) = differing();
            self.report(old, new, None);
            return Ok(());
        }
        let (old_bytes, new_bytes) = (
            self.expected.read(a.storage as usize)?,
            self.found.read(b.storage as usize)?,
        );
        let elements = compare_elements(a, &old_bytes, b, &new_bytes, size);
        if elements.differing > 0 {
            let (old, new) = differing();
            self.report(old, new, self.detail.then_some(elements));
        }
        Ok(())
    }
}

/// Compares two views of one shape and dtype, element by element. The manifest's reader checked their bounds.
fn compare_elements(a: &Tensor, old: &[u8], b: &Tensor, new: &[u8], size: usize) -> Elements {
    let mut elements = Elements {
        count: 0,
        differing: 0,
        first: 0,
        max_ulp: None,
    };
    for (x, y) in positions(a).zip(positions(b)) {
        let (x, y) = (&old[x * size..][..size], &new[y * size..][..size]);
        if x != y {
            if elements.differing == 0 {
                elements.first = elements.count;
            }
            elements.differing += 1;
            elements.max_ulp = elements.max_ulp.max(ulp_distance(&a.dtype, x, y));
        }
        elements.count += 1;
    }
    elements
}

/// Positions of a view's elements in its storage, in row-major order.
fn positions(tensor: &Tensor) -> impl Iterator<Item = usize> {
    let count: u64 = tensor.shape.iter().product();
    let mut index = vec![0u64; tensor.shape.len()];
    let mut position = tensor.offset as i64;
    let (shape, strides) = (tensor.shape.clone(), tensor.strides.clone());
    (0..count).map(move |_| {
        let here = usize::try_from(position).expect("a view lies in its storage");
        for dimension in (0..shape.len()).rev() {
            index[dimension] += 1;
            position += strides[dimension];
            if index[dimension] < shape[dimension] {
                break;
            }
            position -= strides[dimension] * shape[dimension] as i64;
            index[dimension] = 0;
        }
        here
    })
}

/// Bytes an element; `None` for dtypes that only a front knows.
fn element_size(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "bool" | "uint8" | "int8" | "quint8" | "qint8" => 1,
        name if name.starts_with("float8_") => 1,
        "float16" | "bfloat16" | "int16" | "uint16" => 2,
        "float32" | "int32" | "uint32" | "complex32" | "qint32" => 4,
        "float64" | "int64" | "uint64" | "complex64" => 8,
        "complex128" => 16,
        _ => return None,
    })
}

/// Distance of two elements in units in the last place; the larger part's of complex ones.
fn ulp_distance(dtype: &str, x: &[u8], y: &[u8]) -> Option<u64> {
    // (bytes, bits of the significand behind the point) of one real number.
    let (width, fraction) = match dtype {
        "float16" | "complex32" => (2, 10),
        "bfloat16" => (2, 7),
        "float32" | "complex64" => (4, 23),
        "float64" | "complex128" => (8, 52),
        _ => return None,
    };
    let ordered = |bytes: &[u8]| {
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(wide);
        let sign = 1u64 << (8 * width - 1);
        let magnitude = bits & (sign - 1);
        let exponent_bits = 8 * width - 1 - fraction;
        let infinity = ((1u64 << exponent_bits) - 1) << fraction;
        // Both zeros are 0; numbers below zero count downwards. NaN has no place in the order.
        let place = if bits & sign == 0 {
            i128::from(magnitude)
        } else {
            -i128::from(magnitude)
        };
        (magnitude <= infinity).then_some(place)
    };
    let parts = x.chunks_exact(width).zip(y.chunks_exact(width));
    parts
        .filter_map(|(x, y)| Some(ordered(x)?.abs_diff(ordered(y)?) as u64))
        .max()
}

fn show_tensor(tensor: &Tensor) -> String {
    format!("tensor {} {:?}", tensor.dtype, tensor.shape)
}

/// Shows a value to people, short.
fn show(value: &Value) -> String {
    const MOST: usize = 60;
    let cut = |text: String| match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    };
    match value {
        Value::None => "None".to_owned(),
        Value::Bool(flag) => if *flag { "True" } else { "False" }.to_owned(),
        Value::Int(number) => number.to_string(),
        Value::BigInt { negative, magnitude } => {
            let digits: String = magnitude.iter().map(|byte| format!("{byte:02x}")).collect();
            cut(format!("{}0x{digits}", if *negative { "-" } else { "" }))
        }
        Value::Float(bits) => format!("{} (bits {bits:016x})", f64::from_bits(*bits)),
        Value::Complex(real, imaginary) => {
            format!(
                "{} + {}j (bits {real:016x}, {imaginary:016x})",
                f64::from_bits(*real),
                f64::from_bits(*imaginary)
            )
        }
        Value::Str(text) => cut(format!("{text:?}")),
        Value::Bytes(bytes) => format!(
            "{} bytes, {}",
            bytes.len(),
            crate::digest::Digest::of(bytes).short()
        ),
        Value::List(items) => format!("list of {}", items.len()),
        Value::Tuple(items) => format!("tuple of {}", items.len()),
        Value::Dict(items) => format!("dict of {}", items.len()),
        Value::Set(items) => format!("set of {}: {}", items.len(), show_items(items)),
        Value::FrozenSet(items) => format!("frozen set of {}: {}", items.len(), show_items(items)),
        Value::Object { kind, name, .. } => format!("{kind} {name}"),
        Value::Tensor(tensor) => show_tensor(tensor),
    }
}

fn show_items(items: &[Value]) -> String {
    let shown: Vec<String> = items.iter().take(5).map(show).collect();
    format!(
        "{}{}",
        shown.join(", "),
        if items.len() > 5 { ", ..." } else { "" }
    )
}
