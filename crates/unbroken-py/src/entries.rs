//! A dict on its way into a tree, held as the core holds it: of a model's thousands of leaves, none becomes a Python
//! object that is made only to be read again.
//!
//! Touches: nothing. What is put in is converted at once, and stays as it was then.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};
use unbroken::Value;

use crate::leaf::depth_of;
use crate::value::{entry_from_python, from_python, is_plain};

/// A dict of a tree, which only grows; wherever a value may stand it stands for that dict.
#[pyclass(module = "unbroken._core")]
#[derive(Default)]
pub(crate) struct Entries {
    entries: Arc<Vec<(Value, Value)>>,
    /// Where it is in the tree, for errors.
    path: String,
    /// Of the deepest key or value.
    depth: usize,
}

#[pymethods]
impl Entries {
    #[new]
    #[pyo3(signature = (path = None))]
    fn new(path: Option<&Bound<'_, PyString>>) -> Self {
        Entries {
            path: path.map_or_else(String::new, |path| path.to_string_lossy().into_owned()),
            ..Entries::default()
        }
    }

    fn __len__(&self) -> usize {
        self.entries.len()
    }

    fn __setitem__(&mut self, key: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let (key, value) = entry_from_python(key, value, &self.path)?;
        self.push(key, value);
        Ok(())
    }

    /// Add the entries of a dict, from number `first` on, up to one whose key or value is not plain: None, a bool, a
    /// number, a text that UTF-8 can carry, bytes, or a tuple of such without text. Returns its number, or how many there
    /// are.
    fn take_plain(&mut self, found: &Bound<'_, PyDict>, first: usize) -> PyResult<usize> {
        for (at, (key, value)) in found.iter().enumerate().skip(first) {
            if !is_plain_throughout(&key) || !is_plain_throughout(&value) {
                return Ok(at);
            }
            self.push(from_python(&key)?, from_python(&value)?);
        }
        Ok(found.len())
    }
}

impl Entries {
    /// Adds an entry, whose key is none that is there: the format refuses a key that is there twice.
    pub(crate) fn push(&mut self, key: Value, value: Value) {
        self.depth = self.depth.max(depth_of(&key)).max(depth_of(&value));
        Arc::make_mut(&mut self.entries).push((key, value));
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Takes back all but the first `count`.
    pub(crate) fn truncate(&mut self, count: usize) {
        Arc::make_mut(&mut self.entries).truncate(count);
    }

    /// Levels of nesting of the dict.
    pub(crate) fn depth(&self) -> usize {
        1 + self.depth
    }

    /// The dict, shared and not copied.
    pub(crate) fn to_value(&self) -> Value {
        Value::Dict(Arc::clone(&self.entries))
    }
}

/// Whether a value is lowered to itself, whoever lowers it.
pub(crate) fn is_plain_throughout(value: &Bound<'_, PyAny>) -> bool {
    if let Ok(text) = value.cast_exact::<PyString>() {
        return text.to_str().is_ok();
    }
    is_plain(value)
        || value.cast_exact::<PyTuple>().is_ok_and(|parts| {
            let mut parts = parts.iter();
            parts.all(|part| is_plain(&part) && !part.is_instance_of::<PyString>())
        })
}
