//! Errors across the border: the same class names and the same fields as in `unbroken.errors`.
//!
//! Touches: imports `unbroken.errors` when there is something to raise, and not before.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use unbroken::Error;
use unbroken::error::FieldValue;

/// The Python exception of a core error.
pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let build = || {
        let fields = PyDict::new(py);
        for (name, value) in error.fields() {
            fields.set_item(name, field_to_python(py, value)?)?;
        }
        fields.set_item("hint", error.hint())?;
        instance(py, error.kind(), (error.to_string(),), &fields)
    };
    build().unwrap_or_else(|failure| failure)
}

/// `UnsupportedState`: a value that a checkpoint cannot hold.
pub(crate) fn unsupported_state(py: Python<'_>, path: &str, type_name: &str, why: Option<&str>) -> PyErr {
    let build = || {
        let fields = PyDict::new(py);
        fields.set_item("why", why)?;
        instance(py, "UnsupportedState", (path, type_name), &fields)
    };
    build().unwrap_or_else(|failure| failure)
}

/// `FormatError` for bytes in memory.
pub(crate) fn format_error(py: Python<'_>, what: &str) -> PyErr {
    raise(
        py,
        &Error::Format {
            path: None,
            what: what.to_owned(),
        },
    )
}

/// `InvalidArgument`.
pub(crate) fn invalid(py: Python<'_>, what: impl Into<String>) -> PyErr {
    raise(py, &Error::invalid(what))
}

fn instance<'py>(
    py: Python<'py>,
    class: &str,
    args: impl IntoPyObject<'py, Target = PyTuple, Output = Bound<'py, PyTuple>, Error = PyErr>,
    fields: &Bound<'py, PyDict>,
) -> PyResult<PyErr> {
    let module = py.import("unbroken.errors")?;
    let args = args.into_pyobject(py)?;
    match module.getattr(class) {
        Ok(class) => Ok(PyErr::from_value(class.call(args, Some(fields))?)),
        // A core newer than the Python beside it: the message matters more than the class.
        Err(_) => Ok(PyRuntimeError::new_err(args.unbind())),
    }
}

fn field_to_python(py: Python<'_>, value: FieldValue) -> PyResult<Bound<'_, PyAny>> {
    Ok(match value {
        FieldValue::Text(text) => text.into_pyobject(py)?.into_any(),
        FieldValue::Path(path) => path.into_pyobject(py)?,
        FieldValue::Number(number) => number.into_pyobject(py)?,
        FieldValue::Rows(rows) => {
            let rows: Vec<_> = rows
                .into_iter()
                .map(|row| PyTuple::new(py, row))
                .collect::<PyResult<_>>()?;
            rows.into_pyobject(py)?
        }
    })
}
