//! A dict on its way into a tree, held as the core holds it: of a model's thousands of leaves, none becomes a Python
//! object that is made only to be read again.
//!
//! Touches: nothing. What is put in is converted at once, and stays as it was then.

use pyo3::prelude::*;
use unbroken::Value;

use crate::leaf::depth_of;
use crate::value::from_python;

/// A dict of a tree, which only grows; wherever a value may stand it stands for that dict.
#[pyclass(module = "unbroken._core")]
#[derive(Default)]
pub(crate) struct Entries {
    entries: Vec<(Value, Value)>,
    /// Of the deepest key or value.
    depth: usize,
}

#[pymethods]
impl Entries {
    #[new]
    fn new() -> Self {
        Entries::default()
    }

    fn __len__(&self) -> usize {
        self.entries.len()
    }

    fn __setitem__(&mut self, key: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        self.push(from_python(key)?, from_python(value)?);
        Ok(())
    }
}

impl Entries {
    /// Adds an entry, whose key is none that is there: the format refuses a key that is there twice.
    pub(crate) fn push(&mut self, key: Value, value: Value) {
        self.depth = self.depth.max(depth_of(&key)).max(depth_of(&value));
        self.entries.push((key, value));
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Takes back all but the first `count`.
    pub(crate) fn truncate(&mut self, count: usize) {
        self.entries.truncate(count);
    }

    /// Levels of nesting of the dict.
    pub(crate) fn depth(&self) -> usize {
        1 + self.depth
    }

    /// The dict. Leaves are shared and not copied.
    pub(crate) fn to_value(&self) -> Value {
        Value::Dict(self.entries.clone())
    }
}
