//! `Tensor` and `Object`: the two members of the algebra that Python has no type of its own for.
//!
//! Touches: nothing. Both are immutable and hold core values; their parts are converted when asked for.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};
use unbroken::Value;
use unbroken::format::value;
use unbroken::state;

use crate::value::{fields_from_python, fields_to_python};

/// Levels of nesting of a value: 1 without parts, one more than the deepest part with parts.
pub(crate) fn depth_of(value: &Value) -> usize {
    match value {
        Value::List(items) | Value::Tuple(items) | Value::Set(items) | Value::FrozenSet(items) => {
            1 + items.iter().map(depth_of).max().unwrap_or(0)
        }
        Value::Dict(entries) => {
            1 + entries
                .iter()
                .map(|(key, value)| depth_of(key).max(depth_of(value)))
                .max()
                .unwrap_or(0)
        }
        Value::Object(object) => 1 + depth_of_fields(&object.fields),
        Value::Tensor(leaf) => 1 + depth_of_fields(&leaf.attrs),
        _ => 1,
    }
}

fn depth_of_fields(fields: &[(String, Value)]) -> usize {
    fields.iter().map(|(_, value)| depth_of(value)).max().unwrap_or(0)
}

/// Equal values have equal canonical bytes, so those are what is hashed.
fn hash_value<H: Hasher>(value: &Value, state: &mut H) {
    match value::encode(value) {
        Ok(bytes) => bytes.hash(state),
        Err(_) => 0u8.hash(state),
    }
}

/// A leaf that views the bytes of one storage. Immutable.
#[pyclass(frozen, eq, hash, module = "unbroken._core")]
#[derive(PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) leaf: Arc<state::Tensor>,
    pub(crate) depth: usize,
}

impl Tensor {
    pub(crate) fn of(leaf: Arc<state::Tensor>) -> Self {
        let depth = 1 + depth_of_fields(&leaf.attrs);
        Tensor { leaf, depth }
    }
}

impl Hash for Tensor {
    fn hash<H: Hasher>(&self, state: &mut H) {
        hash_value(&Value::Tensor(Arc::clone(&self.leaf)), state);
    }
}

#[pymethods]
impl Tensor {
    #[new]
    #[pyo3(signature = (*, dtype, shape, strides, offset, storage, device = "cpu", attrs = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        dtype: String,
        shape: Vec<u64>,
        strides: Vec<i64>,
        offset: u64,
        storage: u32,
        device: &str,
        attrs: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let mut attrs = attrs.map(fields_from_python).transpose()?.unwrap_or_default();
        attrs.sort_by(|left, right| left.0.cmp(&right.0));
        let device = device.to_owned();
        Ok(Tensor::of(Arc::new(state::Tensor {
            dtype,
            shape,
            strides,
            offset,
            storage,
            device,
            attrs,
        })))
    }

    #[getter]
    fn dtype(&self) -> &str {
        &self.leaf.dtype
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.leaf.shape)
    }

    #[getter]
    fn strides<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.leaf.strides)
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.leaf.offset
    }

    #[getter]
    fn storage(&self) -> u32 {
        self.leaf.storage
    }

    #[getter]
    fn device(&self) -> &str {
        &self.leaf.device
    }

    #[getter]
    fn attrs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        fields_to_python(py, &self.leaf.attrs)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let leaf = &self.leaf;
        Ok(format!(
            "Tensor(dtype={}, shape={}, strides={}, offset={}, storage={}, device={}, attrs={})",
            PyString::new(py, &leaf.dtype).repr()?,
            self.shape(py)?.repr()?,
            self.strides(py)?.repr()?,
            leaf.offset,
            leaf.storage,
            PyString::new(py, &leaf.device).repr()?,
            self.attrs(py)?.repr()?,
        ))
    }
}

/// A typed value that the core does not interpret. Immutable.
#[pyclass(frozen, eq, hash, module = "unbroken._core")]
#[derive(PartialEq, Eq)]
pub(crate) struct Object {
    /// Always `Value::Object`, whole, so that it is put into a tree as it is.
    pub(crate) value: Value,
    pub(crate) depth: usize,
}

impl Object {
    /// Wraps a `Value::Object`.
    pub(crate) fn of(value: Value) -> Self {
        let depth = depth_of(&value);
        Object { value, depth }
    }

    fn parts(&self) -> (&str, &str, &[(String, Value)]) {
        match &self.value {
            Value::Object(object) => (&object.kind, &object.name, &object.fields),
            _ => unreachable!("an `Object` holds a `Value::Object`"),
        }
    }
}

impl Hash for Object {
    fn hash<H: Hasher>(&self, state: &mut H) {
        hash_value(&self.value, state);
    }
}

#[pymethods]
impl Object {
    #[new]
    fn new(kind: String, name: String, fields: &Bound<'_, PyAny>) -> PyResult<Self> {
        let fields = fields_from_python(fields)?;
        Ok(Object::of(Value::from(state::Object { kind, name, fields })))
    }

    #[getter]
    fn kind(&self) -> &str {
        self.parts().0
    }

    #[getter]
    fn name(&self) -> &str {
        self.parts().1
    }

    #[getter]
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        fields_to_python(py, self.parts().2)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!(
            "Object({}, {}, {})",
            PyString::new(py, self.kind()).repr()?,
            PyString::new(py, self.name()).repr()?,
            self.fields(py)?.repr()?,
        ))
    }
}
