//! Memory that Python owns, given as (address, length in bytes) and looked at as slices; digests over it. Memory that
//! Python is given, for bytes on their way to a live tensor.
//!
//! Touches: the memory it is told of, and mappings of its own. Python keeps what it owns alive and unchanged until the call
//! returns (`_core.pyi`).

use std::ptr;
use std::slice;

use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use unbroken::Fingerprint;
use unbroken::arena::{self, Arena};

use crate::error;

/// Digests of more bytes than this release the GIL; fewer take less time than giving it back and waiting for it.
const DETACH_ABOVE_BYTES: usize = 32 * 1024;

/// Reads (address, length in bytes) pairs, and refuses what cannot be memory.
pub(crate) fn regions_from_python(regions: &Bound<'_, PyAny>) -> PyResult<Vec<(usize, usize)>> {
    let pairs: Vec<(usize, usize)> = match regions.cast_exact::<PyList>() {
        Ok(list) => list
            .iter()
            .map(|region| region.extract())
            .collect::<PyResult<_>>()?,
        Err(_) => regions.extract()?,
    };
    for &(address, length) in &pairs {
        check_region(regions.py(), address, length)?;
    }
    Ok(pairs)
}

/// Refuses a null address with a length, and a region that leaves the address space.
pub(crate) fn check_region(py: Python<'_>, address: usize, length: usize) -> PyResult<()> {
    let fits = isize::try_from(length).is_ok() && address.checked_add(length).is_some();
    if length == 0 || (address != 0 && fits) {
        return Ok(());
    }
    Err(error::invalid(
        py,
        format!("{length} bytes at address {address:#x} cannot be a memory region"),
    ))
}

/// Looks at memory that Python owns.
///
/// # Safety
///
/// `length` bytes at `address` are readable and unchanged for as long as the slice is used.
pub(crate) unsafe fn look_at<'a>(address: usize, length: usize) -> &'a [u8] {
    if length == 0 {
        return &[];
    }
    // SAFETY: the caller keeps the memory alive and unchanged; `check_region` has seen that it is no null pointer.
    unsafe { slice::from_raw_parts(ptr::with_exposed_provenance(address), length) }
}

/// Looks at memory that Python owns and wants filled.
///
/// # Safety
///
/// `length` bytes at `address` are writable, and nothing else reads or writes them while the slice is used.
pub(crate) unsafe fn write_to<'a>(address: usize, length: usize) -> &'a mut [u8] {
    if length == 0 {
        return &mut [];
    }
    // SAFETY: the caller lends the memory exclusively; `check_region` has seen that it is no null pointer.
    unsafe { slice::from_raw_parts_mut(ptr::with_exposed_provenance_mut(address), length) }
}

/// Calls `work` on the regions as slices, without the GIL if they are large.
fn over_regions<T: Send>(regions: &Bound<'_, PyAny>, work: impl FnOnce(&[&[u8]]) -> T + Send) -> PyResult<T> {
    let pairs = regions_from_python(regions)?;
    // SAFETY: the caller of the Python function keeps the memory alive and unchanged (`_core.pyi`).
    let slices: Vec<&[u8]> = pairs
        .iter()
        .map(|&(address, length)| unsafe { look_at(address, length) })
        .collect();
    let total = pairs
        .iter()
        .fold(0usize, |sum, &(_, length)| sum.saturating_add(length));
    if total > DETACH_ABOVE_BYTES {
        Ok(regions.py().detach(|| work(&slices)))
    } else {
        Ok(work(&slices))
    }
}

/// Return one xxh3-128 digest (16 bytes) over memory regions (address, length in bytes), GIL released.
#[pyfunction]
pub(crate) fn digest_memory<'py>(regions: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    let digest = over_regions(regions, Fingerprint::of_regions)?;
    Ok(PyBytes::new(regions.py(), &digest.0))
}

/// Copy memory (from address, to address, length in bytes) on several threads, GIL released.
#[pyfunction]
pub(crate) fn copy_memory(py: Python<'_>, copies: &Bound<'_, PyAny>) -> PyResult<()> {
    let copies: Vec<(usize, usize, usize)> = copies.extract()?;
    let mut spans = Vec::with_capacity(copies.len());
    for &(from, to, length) in &copies {
        check_region(py, from, length)?;
        check_region(py, to, length)?;
        spans.push((to, length));
    }
    spans.sort_unstable();
    if spans.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        return Err(error::invalid(py, "two copies go to the same memory"));
    }
    // SAFETY: the caller of the Python function keeps all of it alive and untouched (`_core.pyi`), and no two copies go
    // to the same memory.
    let pairs = copies
        .iter()
        .map(|&(from, to, length)| unsafe { (look_at(from, length), write_to(to, length)) })
        .collect();
    py.detach(|| arena::copy_all(pairs));
    Ok(())
}

/// Memory for bytes that are copied to where they belong. Given back in the background.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct Memory(Option<Arena>);

#[pymethods]
impl Memory {
    #[new]
    fn new(length: usize) -> PyResult<Self> {
        let refused = |error| PyMemoryError::new_err(format!("{length} bytes: {error}"));
        Ok(Memory(Some(Arena::ordinary(length).map_err(refused)?)))
    }

    #[getter]
    fn address(&self) -> usize {
        self.0
            .as_ref()
            .map_or(0, |arena| arena.address().expose_provenance())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(arena) = self.0.take() {
            arena.give_back();
        }
    }
}

/// Return one xxh3-128 digest (16 bytes) over byte strings, each preceded by its length.
#[pyfunction]
#[pyo3(signature = (*parts))]
pub(crate) fn digest_bytes<'py>(parts: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyBytes>> {
    let py = parts.py();
    let parts: Vec<Bound<'py, PyBytes>> = parts
        .iter()
        .map(|part| part.cast_into())
        .collect::<Result<_, _>>()
        .map_err(PyErr::from)?;
    let slices: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
    Ok(PyBytes::new(py, &Fingerprint::of_regions(&slices).0))
}
