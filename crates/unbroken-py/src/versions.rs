//! Tensors' version counters, which torch moves with every write that it sees.
//!
//! Touches: reads live tensors, and keeps them alive.

use std::collections::{HashMap, HashSet};

use pyo3::intern;
use pyo3::prelude::*;

use crate::scatter::{Key, Scatter};
use crate::storages::flag;

/// Tensors' version counters: whether anybody was seen to write to them since.
#[pyclass(frozen, module = "unbroken._core")]
#[derive(Default)]
pub(crate) struct Versions {
    tensors: Vec<(Py<PyAny>, i64, Key)>,
    pub(crate) storages: HashSet<Key, Scatter>,
}

#[pymethods]
impl Versions {
    /// (address, length in bytes) of their storages.
    #[getter]
    fn storages(&self) -> HashSet<Key> {
        self.storages.iter().copied().collect()
    }

    /// Return the storages, as `storages` does, whose counters all were the same before.
    fn unmoved_since(&self, before: &Versions) -> HashSet<Key> {
        let known: HashMap<Key, i64> = before
            .tensors
            .iter()
            .map(|(_, version, key)| (*key, *version))
            .collect();
        let mut unmoved: HashSet<Key> = self.storages.iter().copied().collect();
        for (_, version, key) in &self.tensors {
            if known.get(key) != Some(version) {
                unmoved.remove(key);
            }
        }
        unmoved
    }

    /// Tell whether no counter has moved; given storages, none of theirs.
    #[pyo3(signature = (among = None))]
    fn unchanged(&self, py: Python<'_>, among: Option<HashSet<Key>>) -> PyResult<bool> {
        let among = among.as_ref();
        for (tensor, version, key) in &self.tensors {
            if among.is_none_or(|among| among.contains(key)) && version_of(tensor.bind(py))? != *version {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Versions {
    /// Reads a tensor's counter. One that was made in inference mode has none and is left out.
    pub(crate) fn add(&mut self, tensor: Bound<'_, PyAny>, key: Key) -> PyResult<()> {
        if !flag(tensor.call_method0(intern!(tensor.py(), "is_inference"))?) {
            let version = version_of(&tensor)?;
            self.tensors.push((tensor.unbind(), version, key));
            self.storages.insert(key);
        }
        Ok(())
    }

    /// Reads the counters of (tensor, address, length in bytes) each.
    pub(crate) fn of(found: Vec<(Bound<'_, PyAny>, usize, usize)>) -> PyResult<Self> {
        let mut versions = Versions {
            tensors: Vec::with_capacity(found.len()),
            storages: HashSet::with_capacity_and_hasher(found.len(), Scatter),
        };
        for (tensor, address, length) in found {
            versions.add(tensor, (address, length))?;
        }
        Ok(versions)
    }
}

fn version_of(tensor: &Bound<'_, PyAny>) -> PyResult<i64> {
    tensor.getattr(intern!(tensor.py(), "_version"))?.extract()
}
