//! Keys and random-access orders.
//!
//! Touches: nothing.

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use unbroken::key;

use crate::error;

/// Return 32 bytes, a pure function of the arguments.
#[pyfunction]
pub(crate) fn derive_key<'py>(
    py: Python<'py>,
    seed: u64,
    purpose: &str,
    epoch: u64,
    position: u64,
) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &key::derive_key(seed, purpose, epoch, position))
}

/// A random-access permutation of range(length) for one epoch. Constant memory.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct Order {
    order: key::Order,
    seed: u64,
    epoch: u64,
}

#[pymethods]
impl Order {
    #[new]
    fn new(py: Python<'_>, seed: u64, epoch: u64, length: u64) -> PyResult<Self> {
        let order = key::Order::new(seed, epoch, length).map_err(|failure| error::raise(py, &failure))?;
        Ok(Order { order, seed, epoch })
    }

    fn __len__(&self) -> usize {
        usize::try_from(self.order.len()).unwrap_or(usize::MAX)
    }

    fn at(&self, position: u64) -> PyResult<u64> {
        self.order
            .at(position)
            .map_err(|failure| PyIndexError::new_err(failure.to_string()))
    }

    fn slice(&self, start: u64, stop: u64) -> PyResult<Vec<u64>> {
        let elements = self
            .order
            .slice(start, stop)
            .map_err(|failure| PyIndexError::new_err(failure.to_string()))?;
        Ok(elements.collect())
    }

    fn __repr__(&self) -> String {
        format!(
            "Order(seed={}, epoch={}, length={})",
            self.seed,
            self.epoch,
            self.order.len()
        )
    }
}
