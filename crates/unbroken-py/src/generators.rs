//! The global generators, digested where they lie, without running any Python code for it.
//!
//! Touches: memory that Python tells it of and keeps alive (`_core.pyi`). A few thousand bytes are read in about a
//! microsecond; the interpreter's own way there costs tens of them when its caches are cold, as they are after a
//! training step.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};
use unbroken::Fingerprint;

use crate::memory::{check_region, look_at};

/// Where one generator's bytes are found.
enum Place {
    /// At a fixed address, as long as all guards hold.
    Memory {
        address: usize,
        length: usize,
        guards: Vec<Guard>,
    },
    /// In the tensor that this call returns.
    State(Py<PyAny>),
    /// In what the slow call returns for its name.
    Slow,
}

/// What must hold for the bytes in memory to be the whole state.
enum Guard {
    /// An attribute of an object is None.
    Unset(Py<PyAny>, Py<PyString>),
    /// A call returns this very object.
    Same(Py<PyAny>, Py<PyAny>),
    /// The 32-bit word at an address is zero.
    Zero(usize),
}

impl Guard {
    fn holds(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(match self {
            Guard::Unset(owner, name) => owner.getattr(py, name)?.is_none(py),
            Guard::Same(call, expected) => call.call0(py)?.is(expected),
            // SAFETY: `GeneratorReader.add_memory` is told that the word stays readable.
            Guard::Zero(address) => [0; 4] == unsafe { look_at(*address, 4) },
        })
    }
}

struct Source {
    name: Py<PyString>,
    rank: u32,
    place: Place,
}

/// Generators that may come into being later: when a dict has a true value under a key, a call adds them.
struct Awaited {
    space: Py<PyDict>,
    key: Py<PyString>,
    arrived: Py<PyAny>,
}

/// Reads digests of the global generators; none is advanced.
#[pyclass(module = "unbroken._core")]
pub(crate) struct GeneratorReader {
    slow: Py<PyAny>,
    sources: Vec<Source>,
    awaited: Vec<Awaited>,
}

#[pymethods]
impl GeneratorReader {
    #[new]
    fn new(slow: Py<PyAny>) -> Self {
        GeneratorReader {
            slow,
            sources: Vec::new(),
            awaited: Vec::new(),
        }
    }

    #[pyo3(signature = (name, rank, address, length, *, unset = None, same = None, zero = None))]
    #[allow(clippy::too_many_arguments)]
    fn add_memory(
        &mut self,
        py: Python<'_>,
        name: Py<PyString>,
        rank: u32,
        address: usize,
        length: usize,
        unset: Option<(Py<PyAny>, Py<PyString>)>,
        same: Option<(Py<PyAny>, Py<PyAny>)>,
        zero: Option<usize>,
    ) -> PyResult<()> {
        check_region(py, address, length)?;
        let unset = unset.map(|(owner, name)| Guard::Unset(owner, name));
        let same = same.map(|(call, expected)| Guard::Same(call, expected));
        let guards = [unset, same, zero.map(Guard::Zero)];
        let place = Place::Memory {
            address,
            length,
            guards: guards.into_iter().flatten().collect(),
        };
        self.add(Source { name, rank, place });
        Ok(())
    }

    fn add_state(&mut self, name: Py<PyString>, rank: u32, get_state: Py<PyAny>) {
        let place = Place::State(get_state);
        self.add(Source { name, rank, place });
    }

    fn add_slow(&mut self, name: Py<PyString>, rank: u32) {
        let place = Place::Slow;
        self.add(Source { name, rank, place });
    }

    fn when(&mut self, space: Py<PyDict>, key: Py<PyString>, arrived: Py<PyAny>) {
        self.awaited.push(Awaited { space, key, arrived });
    }

    fn digests<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        let py = slf.py();
        let found = Self::read(slf)?;
        let pairs = found
            .iter()
            .map(|(name, digest)| (name, PyBytes::new(py, digest)));
        PyList::new(py, pairs.collect::<Vec<_>>())
    }
}

impl GeneratorReader {
    fn add(&mut self, source: Source) {
        let at = self.sources.partition_point(|other| other.rank <= source.rank);
        self.sources.insert(at, source);
    }

    /// Digests of all generators there are by now, in the order of their ranks.
    pub(crate) fn read<'py>(slf: &Bound<'py, Self>) -> PyResult<Vec<(Bound<'py, PyString>, [u8; 16])>> {
        Self::welcome(slf)?;
        let py = slf.py();
        let this = slf.borrow();
        this.sources
            .iter()
            .map(|source| Ok((source.name.bind(py).clone(), this.digest(py, source)?)))
            .collect()
    }

    /// Lets those in that have come into being since the last time.
    fn welcome(slf: &Bound<'_, Self>) -> PyResult<()> {
        let py = slf.py();
        let mut index = 0;
        loop {
            // Not held across the call: what arrives adds its generators here.
            let arrived = {
                let this = slf.borrow();
                let Some(awaited) = this.awaited.get(index) else {
                    return Ok(());
                };
                let value = awaited.space.bind(py).get_item(&awaited.key)?;
                match value {
                    Some(value) if value.is_truthy()? => awaited.arrived.clone_ref(py),
                    _ => {
                        index += 1;
                        continue;
                    }
                }
            };
            slf.borrow_mut().awaited.remove(index);
            arrived.call0(py)?;
        }
    }

    fn digest(&self, py: Python<'_>, source: &Source) -> PyResult<[u8; 16]> {
        match &source.place {
            Place::Slow => self.digest_slowly(py, source),
            Place::Memory {
                address,
                length,
                guards,
            } => {
                for guard in guards {
                    if !guard.holds(py)? {
                        return self.digest_slowly(py, source);
                    }
                }
                // SAFETY: `add_memory` was told that the bytes stay readable; the GIL keeps their owner from writing.
                Ok(Fingerprint::of(unsafe { look_at(*address, *length) }).0)
            }
            Place::State(get_state) => {
                let state = get_state.bind(py).call0()?;
                let address: usize = state.call_method0(pyo3::intern!(py, "data_ptr"))?.extract()?;
                let length: usize = state.getattr(pyo3::intern!(py, "nbytes"))?.extract()?;
                check_region(py, address, length)?;
                // SAFETY: a tensor of bytes that is ours alone and lives until the end of this block.
                Ok(Fingerprint::of(unsafe { look_at(address, length) }).0)
            }
        }
    }

    fn digest_slowly(&self, py: Python<'_>, source: &Source) -> PyResult<[u8; 16]> {
        let data = self.slow.bind(py).call1((&source.name,))?;
        let data = data.cast::<PyBytes>()?;
        Ok(Fingerprint::of_regions(&[data.as_bytes()]).0)
    }
}
