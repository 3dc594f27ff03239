//! Digests of what a sampler issued and of what was handed out, batch by batch.
//!
//! Touches: nothing but the lists of integers it is given.

use std::collections::VecDeque;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PyList};
use unbroken::Fingerprint;

/// Payloads issued and not yet handed out, by digest; and one digest of all that were issued.
#[pyclass(module = "unbroken._core")]
#[derive(Default)]
pub(crate) struct IndexLog {
    /// Digest of all payloads so far, each with the digest before it.
    rolling: [u8; 16],
    /// Digest of the last payload.
    last: [u8; 16],
    issued: VecDeque<[u8; 16]>,
}

#[pymethods]
impl IndexLog {
    #[new]
    fn new() -> Self {
        IndexLog::default()
    }

    fn note(&mut self, payload: &Bound<'_, PyAny>) -> bool {
        let Some(bytes) = bytes_of(payload) else {
            return false;
        };
        self.note_bytes(&bytes);
        true
    }

    fn note_bytes(&mut self, data: &[u8]) {
        self.rolling = Fingerprint::of_regions(&[&self.rolling, data]).0;
        self.last = Fingerprint::of_regions(&[data]).0;
        self.issued.push_back(self.last);
    }

    fn hand_out<'py>(&mut self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.issued.pop_front().map(|digest| PyBytes::new(py, &digest))
    }

    #[getter]
    fn rolling<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.rolling)
    }

    #[setter]
    fn set_rolling(&mut self, digest: [u8; 16]) {
        self.rolling = digest;
    }

    #[getter]
    fn last<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.last)
    }
}

/// An index, or a list of indices, as little-endian integers of 64 bits; None for anything else.
fn bytes_of(payload: &Bound<'_, PyAny>) -> Option<Vec<u8>> {
    let index = |item: &Bound<'_, PyAny>| {
        let number: Option<i64> = item
            .is_exact_instance_of::<PyInt>()
            .then(|| item.extract().ok())?;
        number.map(i64::to_le_bytes)
    };
    let Ok(list) = payload.cast_exact::<PyList>() else {
        return index(payload).map(|bytes| bytes.to_vec());
    };
    let mut bytes = Vec::with_capacity(list.len() * 8);
    for item in list.iter() {
        bytes.extend_from_slice(&index(&item)?);
    }
    Some(bytes)
}
