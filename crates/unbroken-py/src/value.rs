//! Python values to and from the core's algebra: exact builtin types, `Tensor` and `Object`; nothing else.
//!
//! Touches: Python objects, read only. A value is walked once; what cannot be held is refused with the path to it.

use std::sync::Arc;

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{
    PyBool, PyBytes, PyComplex, PyDict, PyFloat, PyFrozenSet, PyInt, PyList, PyMapping, PySet, PyString,
    PyTuple, PyType,
};
use unbroken::Value;
use unbroken::format::value::{MAX_DEPTH, encode};

use crate::entries::Entries;
use crate::error;
use crate::leaf::{Object, Tensor};
use crate::states::NameList;

/// Path parts shown at either end of a path that is too deep to print whole.
const PATH_PARTS_SHOWN: usize = 6;

/// A value that cannot be held: why, and the parts of the path to it, innermost first.
struct Refused {
    parts: Vec<String>,
    reason: Reason,
}

enum Reason {
    /// Its type is none of ours.
    Type(String),
    /// Text with a code point that UTF-8 cannot carry.
    LoneSurrogate,
    /// A set with two members of the same bytes: NaNs, which Python tells apart by identity.
    EqualMembers,
    /// Nested deeper than a file may be.
    Depth(String),
    /// Python failed on the way, such as for lack of memory.
    Python(PyErr),
}

impl Refused {
    fn new(reason: Reason) -> Self {
        Refused {
            parts: Vec::new(),
            reason,
        }
    }

    fn within(mut self, part: impl FnOnce() -> String) -> Self {
        self.parts.push(part());
        self
    }

    fn into_error(self, py: Python<'_>) -> PyErr {
        let parts: Vec<&str> = self.parts.iter().rev().map(String::as_str).collect();
        let path = if parts.is_empty() {
            ".".to_owned()
        } else if parts.len() > 2 * PATH_PARTS_SHOWN {
            let (head, tail) = (
                &parts[..PATH_PARTS_SHOWN],
                &parts[parts.len() - PATH_PARTS_SHOWN..],
            );
            format!("{}/.../{}", head.join("/"), tail.join("/"))
        } else {
            parts.join("/")
        };
        match self.reason {
            Reason::Type(name) => error::unsupported_state(py, &path, &name, None),
            Reason::LoneSurrogate => error::unsupported_state(
                py,
                &path,
                "str",
                Some("it holds a lone surrogate, which UTF-8 cannot carry"),
            ),
            Reason::EqualMembers => {
                let why = "two of its members are equal bit for bit (NaN), which a file cannot tell apart";
                error::unsupported_state(py, &path, "set", Some(why))
            }
            Reason::Depth(name) => {
                let why = format!("nested deeper than {MAX_DEPTH} levels, or inside itself");
                error::unsupported_state(py, &path, &name, Some(&why))
            }
            Reason::Python(error) => error,
        }
    }
}

impl From<PyErr> for Refused {
    fn from(error: PyErr) -> Self {
        Refused::new(Reason::Python(error))
    }
}

/// Converts a Python value.
///
/// # Errors
///
/// `UnsupportedState`, a `TypeError`, with the path of what cannot be held.
pub(crate) fn from_python(value: &Bound<'_, PyAny>) -> PyResult<Value> {
    lower(value, 0).map_err(|refused| refused.into_error(value.py()))
}

/// Converts an entry of a dict that is at `path`.
///
/// # Errors
///
/// Those of [`from_python`].
pub(crate) fn entry_from_python(
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    path: &str,
) -> PyResult<(Value, Value)> {
    lower_entry(key, value, 1).map_err(|refused| {
        let refused = if path.is_empty() {
            refused
        } else {
            refused.within(|| path.to_owned())
        };
        refused.into_error(key.py())
    })
}

/// Converts the named parts of an object or the attributes of a leaf; names must be text.
pub(crate) fn fields_from_python(fields: &Bound<'_, PyAny>) -> PyResult<Vec<(String, Value)>> {
    let py = fields.py();
    let pairs = match fields.cast_exact::<PyDict>() {
        Ok(dict) => dict.iter().collect(),
        Err(_) => fields
            .cast::<PyMapping>()?
            .items()?
            .extract::<Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>>()?,
    };
    let mut out = Vec::with_capacity(pairs.len());
    for (key, value) in pairs {
        let name = match lower(&key, 0).map_err(|refused| refused.into_error(py))? {
            Value::Str(name) => name,
            _ => {
                return Err(error::unsupported_state(
                    py,
                    &part_of(&key),
                    &type_name(&key),
                    Some("a name must be text"),
                ));
            }
        };
        let value = lower(&value, 1).map_err(|refused| refused.within(|| name.clone()).into_error(py))?;
        out.push((name, value));
    }
    Ok(out)
}

/// Lowers a value that stands inside `outer` others. As in the core, a value without parts has depth 1.
fn lower(value: &Bound<'_, PyAny>, outer: usize) -> Result<Value, Refused> {
    within_depth(value, outer + 1)?;
    if let Ok(text) = value.cast_exact::<PyString>() {
        return lower_str(text);
    }
    if let Ok(int) = value.cast_exact::<PyInt>() {
        return lower_int(int);
    }
    if let Ok(float) = value.cast_exact::<PyFloat>() {
        return Ok(Value::Float(float.value().to_bits()));
    }
    if let Ok(tensor) = value.cast_exact::<Tensor>() {
        let tensor = tensor.get();
        return within_depth(value, outer + tensor.depth).map(|()| Value::Tensor(Arc::clone(&tensor.leaf)));
    }
    if value.is_none() {
        return Ok(Value::None);
    }
    if let Ok(flag) = value.cast_exact::<PyBool>() {
        return Ok(Value::Bool(flag.is_true()));
    }
    if let Ok(bytes) = value.cast_exact::<PyBytes>() {
        return Ok(Value::Bytes(bytes.as_bytes().to_vec()));
    }
    if let Ok(complex) = value.cast_exact::<PyComplex>() {
        return Ok(Value::Complex(complex.real().to_bits(), complex.imag().to_bits()));
    }
    if let Ok(object) = value.cast_exact::<Object>() {
        let object = object.get();
        return within_depth(value, outer + object.depth).map(|()| object.value.clone());
    }
    if let Ok(entries) = value.cast_exact::<Entries>() {
        let entries = entries.borrow();
        return within_depth(value, outer + entries.depth()).map(|()| entries.to_value());
    }
    if let Ok(names) = value.cast_exact::<NameList>() {
        return within_depth(value, outer + 2).map(|()| names.get().to_value());
    }
    if let Ok(dict) = value.cast_exact::<PyDict>() {
        return lower_dict(dict, outer + 1);
    }
    if let Ok(list) = value.cast_exact::<PyList>() {
        return lower_items(list.iter(), outer + 1).map(Value::List);
    }
    if let Ok(tuple) = value.cast_exact::<PyTuple>() {
        return lower_items(tuple.iter(), outer + 1).map(Value::Tuple);
    }
    if let Ok(set) = value.cast_exact::<PySet>() {
        return lower_members(set.iter(), outer + 1).map(Value::Set);
    }
    if let Ok(set) = value.cast_exact::<PyFrozenSet>() {
        return lower_members(set.iter(), outer + 1).map(Value::FrozenSet);
    }
    Err(Refused::new(Reason::Type(type_name(value))))
}

fn within_depth(value: &Bound<'_, PyAny>, depth: usize) -> Result<(), Refused> {
    if depth > MAX_DEPTH {
        Err(Refused::new(Reason::Depth(type_name(value))))
    } else {
        Ok(())
    }
}

fn lower_str(text: &Bound<'_, PyString>) -> Result<Value, Refused> {
    match text.to_str() {
        Ok(text) => Ok(Value::Str(text.to_owned())),
        Err(_) => Err(Refused::new(Reason::LoneSurrogate)),
    }
}

fn lower_int(int: &Bound<'_, PyInt>) -> Result<Value, Refused> {
    if let Ok(small) = int.extract::<i64>() {
        return Ok(Value::Int(small));
    }
    let py = int.py();
    let negative = int.lt(0)?;
    let magnitude = int.call_method0("__abs__")?;
    let bits: usize = magnitude.call_method0("bit_length")?.extract()?;
    let bytes = magnitude.call_method1("to_bytes", (bits.div_ceil(8), pyo3::intern!(py, "big")))?;
    let bytes = bytes.cast_into::<PyBytes>().map_err(PyErr::from)?;
    Ok(Value::BigInt {
        negative,
        magnitude: bytes.as_bytes().to_vec(),
    })
}

fn lower_items<'py>(
    items: impl ExactSizeIterator<Item = Bound<'py, PyAny>>,
    outer: usize,
) -> Result<Vec<Value>, Refused> {
    let mut out = Vec::with_capacity(items.len());
    for (index, item) in items.enumerate() {
        out.push(lower(&item, outer).map_err(|refused| refused.within(|| index.to_string()))?);
    }
    Ok(out)
}

fn lower_members<'py>(
    members: impl ExactSizeIterator<Item = Bound<'py, PyAny>>,
    outer: usize,
) -> Result<Vec<Value>, Refused> {
    let mut keyed = Vec::with_capacity(members.len());
    for member in members {
        let lowered = lower(&member, outer).map_err(|refused| refused.within(|| part_of(&member)))?;
        // A member is hashable, so nothing in it can fail to encode but its outer, which the whole tree is told.
        let key = encode(&lowered).map_err(|_| Refused::new(Reason::Depth(type_name(&member))))?;
        keyed.push((key, lowered));
    }
    keyed.sort_by(|left, right| left.0.cmp(&right.0));
    if keyed.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(Refused::new(Reason::EqualMembers));
    }
    Ok(keyed.into_iter().map(|(_, member)| member).collect())
}

fn lower_dict(dict: &Bound<'_, PyDict>, outer: usize) -> Result<Value, Refused> {
    let mut out = Vec::with_capacity(dict.len());
    for (key, value) in dict.iter() {
        out.push(lower_entry(&key, &value, outer)?);
    }
    Ok(Value::dict(out))
}

fn lower_entry(
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    outer: usize,
) -> Result<(Value, Value), Refused> {
    let entry = lower(key, outer).and_then(|lowered| Ok((lowered, lower(value, outer)?)));
    entry.map_err(|refused| refused.within(|| part_of(key)))
}

/// A key or member as one part of a path: text as it is, anything else as Python shows it.
fn part_of(key: &Bound<'_, PyAny>) -> String {
    match key.cast_exact::<PyString>() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => key
            .repr()
            .map_or_else(|_| type_name(key), |repr| repr.to_string_lossy().into_owned()),
    }
}

/// A value's type as `module.qualified.name`, builtins without their module.
fn type_name(value: &Bound<'_, PyAny>) -> String {
    let kind: Bound<'_, PyType> = value.get_type();
    let name = kind
        .qualname()
        .map_or_else(|_| "?".to_owned(), |name| name.to_string());
    match kind.module() {
        Ok(module) if module != "builtins" => format!("{module}.{name}"),
        _ => name,
    }
}

/// Converts a value to Python.
///
/// # Errors
///
/// `FormatError` where Python cannot tell two keys or members apart (1 and 1.0), or cannot hash one: such a value
/// did not come from Python.
pub(crate) fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::None => py.None().into_bound(py),
        Value::Bool(flag) => flag.into_bound_py_any(py)?,
        Value::Int(int) => int.into_bound_py_any(py)?,
        Value::BigInt { negative, magnitude } => {
            let bytes = PyBytes::new(py, magnitude);
            let number = py
                .get_type::<PyInt>()
                .call_method1("from_bytes", (bytes, pyo3::intern!(py, "big")))?;
            if *negative { number.neg()? } else { number }
        }
        Value::Float(bits) => PyFloat::new(py, f64::from_bits(*bits)).into_any(),
        Value::Complex(real, imaginary) => {
            PyComplex::from_doubles(py, f64::from_bits(*real), f64::from_bits(*imaginary)).into_any()
        }
        Value::Str(text) => PyString::new(py, text).into_any(),
        Value::Bytes(bytes) => PyBytes::new(py, bytes).into_any(),
        Value::List(items) => PyList::new(py, raise_items(py, items)?)?.into_any(),
        Value::Tuple(items) => PyTuple::new(py, raise_items(py, items)?)?.into_any(),
        Value::Dict(entries) => {
            let dict = PyDict::new(py);
            for (key, value) in &**entries {
                let value = to_python(py, value)?;
                dict.set_item(to_python(py, key)?, value)
                    .map_err(|error| unhashable(py, error))?;
            }
            told_apart(py, dict.len(), entries.len())?;
            dict.into_any()
        }
        Value::Set(members) => {
            let set = PySet::new(py, raise_items(py, members)?).map_err(|error| unhashable(py, error))?;
            told_apart(py, set.len(), members.len())?;
            set.into_any()
        }
        Value::FrozenSet(members) => {
            let set =
                PyFrozenSet::new(py, raise_items(py, members)?).map_err(|error| unhashable(py, error))?;
            told_apart(py, set.len(), members.len())?;
            set.into_any()
        }
        Value::Object(_) => Object::of(value.clone()).into_bound_py_any(py)?,
        Value::Tensor(leaf) => Tensor::of(Arc::clone(leaf)).into_bound_py_any(py)?,
    })
}

/// Converts named values to a dict, in their order.
pub(crate) fn fields_to_python<'py>(
    py: Python<'py>,
    fields: &[(String, Value)],
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in fields {
        dict.set_item(name, to_python(py, value)?)?;
    }
    Ok(dict)
}

fn raise_items<'py>(py: Python<'py>, items: &[Value]) -> PyResult<Vec<Bound<'py, PyAny>>> {
    items.iter().map(|item| to_python(py, item)).collect()
}

fn told_apart(py: Python<'_>, found: usize, expected: usize) -> PyResult<()> {
    if found == expected {
        return Ok(());
    }
    Err(error::format_error(
        py,
        "keys or members that are distinct in the file are equal in Python",
    ))
}

fn unhashable(py: Python<'_>, error: PyErr) -> PyErr {
    error::format_error(
        py,
        &format!("a key or member that Python cannot hash ({})", error.value(py)),
    )
}

/// Whether something is None or of a builtin type whose whole content is one value.
pub(crate) fn is_plain(item: &Bound<'_, PyAny>) -> bool {
    item.is_none()
        || item.is_exact_instance_of::<PyBool>()
        || item.is_exact_instance_of::<PyInt>()
        || item.is_exact_instance_of::<PyFloat>()
        || item.is_exact_instance_of::<PyComplex>()
        || item.is_exact_instance_of::<PyString>()
        || item.is_exact_instance_of::<PyBytes>()
}
