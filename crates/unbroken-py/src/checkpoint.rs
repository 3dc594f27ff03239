//! Checkpoints as Python reads them.
//!
//! Touches: a checkpoint's packs, read only; memory that Python lends to be filled.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use unbroken::run::Lend;
use unbroken::store;

use crate::error;
use crate::memory::{check_region, write_to};
use crate::value::{fields_to_python, to_python};

/// What a manifest says of its checkpoint, without its tensors.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct CheckpointInfo {
    info: Arc<store::CheckpointInfo>,
}

impl CheckpointInfo {
    pub(crate) fn of(info: store::CheckpointInfo) -> Self {
        CheckpointInfo { info: Arc::new(info) }
    }
}

#[pymethods]
impl CheckpointInfo {
    #[getter]
    fn step(&self) -> u64 {
        self.info.step
    }

    #[getter]
    fn phase(&self) -> u8 {
        self.info.phase
    }

    #[getter]
    fn name(&self) -> &str {
        &self.info.name
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.info.path.clone()
    }

    #[getter]
    fn run_id(&self) -> &str {
        &self.info.run_id
    }

    #[getter]
    fn created(&self) -> &str {
        &self.info.created
    }

    #[getter]
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metrics = PyDict::new(py);
        for (name, number) in &self.info.metrics {
            metrics.set_item(name, number)?;
        }
        Ok(metrics)
    }

    #[getter]
    fn environment<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        fields_to_python(py, &self.info.environment)
    }

    #[getter]
    fn identity<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        fields_to_python(py, &self.info.identity)
    }

    #[getter]
    fn pinned(&self) -> bool {
        self.info.pinned
    }

    #[getter]
    fn size_bytes(&self) -> u64 {
        self.info.size_bytes
    }

    #[getter]
    fn new_bytes(&self) -> u64 {
        self.info.new_bytes
    }

    fn __repr__(&self) -> String {
        let info = &self.info;
        format!(
            "CheckpointInfo('{}', step={}, phase={}, bytes={})",
            info.name, info.step, info.phase, info.size_bytes
        )
    }
}

/// One committed checkpoint, its manifest verified.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct Checkpoint {
    checkpoint: store::Checkpoint,
}

impl Checkpoint {
    pub(crate) fn of(checkpoint: store::Checkpoint) -> Self {
        Checkpoint { checkpoint }
    }
}

#[pymethods]
impl Checkpoint {
    #[getter]
    fn info(&self) -> CheckpointInfo {
        CheckpointInfo::of(self.checkpoint.info().clone())
    }

    #[getter]
    fn tree<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, self.checkpoint.tree())
    }

    #[getter]
    fn storages<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let storages = self.checkpoint.storages();
        PyList::new(
            py,
            storages
                .iter()
                .map(|(length, digest)| (*length, PyBytes::new(py, &digest.0))),
        )
    }

    fn read<'py>(&self, py: Python<'py>, storage: usize) -> PyResult<Bound<'py, PyBytes>> {
        let Some(&(length, _)) = self.checkpoint.storages().get(storage) else {
            return Err(error::invalid(py, format!("there is no storage {storage}")));
        };
        let length =
            usize::try_from(length).map_err(|_| error::invalid(py, "the storage exceeds the memory"))?;
        PyBytes::new_with(py, length, |bytes| {
            py.detach(|| self.checkpoint.read_into(vec![(storage, bytes)]))
                .map_err(|failure| error::raise(py, &failure))
        })
    }

    fn read_into(&self, py: Python<'_>, targets: &Bound<'_, PyAny>) -> PyResult<()> {
        // SAFETY: the caller of the Python function lends the memory until it returns (`_core.pyi`).
        let targets = unsafe { targets_from_python(targets) }?;
        py.detach(|| self.checkpoint.read_into(targets))
            .map_err(|failure| error::raise(py, &failure))
    }

    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.checkpoint.verify())
            .map_err(|failure| error::raise(py, &failure))
    }

    fn __repr__(&self) -> String {
        let info = self.checkpoint.info();
        format!(
            "Checkpoint('{}', step={}, phase={})",
            info.path.display(),
            info.step,
            info.phase
        )
    }
}

/// Reads (storage, address, length in bytes) and looks at the memory, of which no two may overlap.
///
/// # Safety
///
/// The memory is writable, and nothing else reads or writes it while the slices are used.
unsafe fn targets_from_python<'m>(targets: &Bound<'_, PyAny>) -> PyResult<Vec<(usize, &'m mut [u8])>> {
    let py = targets.py();
    let targets: Vec<(usize, usize, usize)> = targets.extract()?;
    check_disjoint(py, &targets)?;
    let look_at = |(storage, address, length)| {
        check_region(py, address, length)?;
        // SAFETY: the caller lends the memory, and the regions do not overlap.
        Ok((storage, unsafe { write_to(address, length) }))
    };
    targets.into_iter().map(look_at).collect()
}

/// Calls `open` with what lends it memory: a Python function that is given each checkpoint about to be read.
pub(crate) fn opened_into<T: Send>(
    py: Python<'_>,
    memory: Option<Py<PyAny>>,
    open: impl FnOnce(Lend) -> unbroken::Result<T> + Send,
) -> PyResult<T> {
    let mut refused = None;
    let mut lend = |checkpoint: &store::Checkpoint| {
        let Some(memory) = &memory else {
            return Ok(Vec::new());
        };
        let asked = Python::attach(|py| {
            let targets = memory.bind(py).call1((Checkpoint::of(checkpoint.clone()),))?;
            // SAFETY: the function lends the memory until the run is open or it is asked again (`_core.pyi`).
            unsafe { targets_from_python(&targets) }
        });
        asked.map_err(|error| {
            refused = Some(error);
            unbroken::Error::invalid("no memory was lent for a checkpoint")
        })
    };
    let outcome = py.detach(|| open(&mut lend));
    match refused {
        Some(error) => Err(error),
        None => outcome.map_err(|failure| error::raise(py, &failure)),
    }
}

/// Refuses targets that overlap: each is filled by a thread that takes it for its own.
fn check_disjoint(py: Python<'_>, targets: &[(usize, usize, usize)]) -> PyResult<()> {
    let mut spans: Vec<(usize, usize)> = targets
        .iter()
        .filter(|target| target.2 > 0)
        .map(|&(_, address, length)| (address, length))
        .collect();
    spans.sort_unstable();
    if spans
        .windows(2)
        .any(|pair| pair[0].0.saturating_add(pair[0].1) > pair[1].0)
    {
        return Err(error::invalid(py, "two targets overlap in memory"));
    }
    Ok(())
}

/// What `rejected` and its like give to Python: pairs of text.
pub(crate) fn pairs<'py>(py: Python<'py>, rows: &[(String, String)]) -> PyResult<Bound<'py, PyList>> {
    let rows: Vec<Bound<'py, PyTuple>> = rows
        .iter()
        .map(|row| row.into_pyobject(py))
        .collect::<PyResult<_>>()?;
    PyList::new(py, rows)
}
