//! One batch's digest, for the batches that nearly all loaders give: tensors and plain values in lists, tuples, dicts.
//!
//! Touches: reads the batch's tensors while Python holds them; calls a few of their C methods and no Python code.

use std::collections::HashMap;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple, PyType};
use unbroken::Fingerprint;
use unbroken::format;

use crate::memory::{check_region, look_at};
use crate::value::{from_python, is_plain};

/// Shapes whose descriptions are kept; a training with more of them describes some anew.
const HEADS: usize = 256;
/// In how many evenly spread windows a tensor above the budget is read.
const WINDOWS: usize = 64;

/// A tensor's dtype, by identity, and its shape.
type Head = (usize, Vec<usize>);

/// Reads digests of batches.
#[pyclass(module = "unbroken._core")]
pub(crate) struct BatchReader {
    tensor: Py<PyType>,
    strided: Py<PyAny>,
    describe: Py<PyAny>,
    budget: usize,
    heads: HashMap<Head, Vec<u8>>,
}

/// What has been read of a batch.
#[derive(Default)]
struct Reading {
    parts: Vec<Vec<u8>>,
    regions: Vec<(usize, usize)>,
}

#[pymethods]
impl BatchReader {
    #[new]
    #[pyo3(signature = (*, tensor, strided, describe, budget))]
    fn new(tensor: Py<PyType>, strided: Py<PyAny>, describe: Py<PyAny>, budget: usize) -> Self {
        BatchReader {
            tensor,
            strided,
            describe,
            budget,
            heads: HashMap::new(),
        }
    }

    #[pyo3(signature = (batch, *, full))]
    fn digest<'py>(
        &mut self,
        batch: &Bound<'py, PyAny>,
        full: bool,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let found = self.read(batch, full)?;
        Ok(found.map(|digest| PyBytes::new(batch.py(), &digest)))
    }
}

impl BatchReader {
    /// A batch's digest; None if there is anything in it that this does not know.
    pub(crate) fn read(&mut self, batch: &Bound<'_, PyAny>, full: bool) -> PyResult<Option<[u8; 16]>> {
        let py = batch.py();
        let mut reading = Reading::default();
        if !self.walk(batch, full, &mut reading)? {
            return Ok(None);
        }
        let Reading { mut parts, regions } = reading;
        if !regions.is_empty() {
            // SAFETY: `walk` checked the regions; the batch's tensors own them, and the caller holds the batch.
            let slices: Vec<&[u8]> = regions
                .iter()
                .map(|&(address, length)| unsafe { look_at(address, length) })
                .collect();
            let large = regions.iter().map(|region| region.1).sum::<usize>() > 32 * 1024;
            let digest = if large {
                py.detach(|| Fingerprint::of_regions(&slices))
            } else {
                Fingerprint::of_regions(&slices)
            };
            parts.push(digest.0.to_vec());
        }
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        Ok(Some(Fingerprint::of_regions(&parts).0))
    }

    /// Reads an item; false if it holds something that this does not know.
    fn walk(&mut self, item: &Bound<'_, PyAny>, full: bool, reading: &mut Reading) -> PyResult<bool> {
        if item.get_type().is(&self.tensor) {
            return self.tensor(item, full, reading);
        }
        if let Ok(list) = item.cast_exact::<PyList>() {
            reading.parts.push(format!("list {}", list.len()).into_bytes());
            return self.all(list.iter(), full, reading);
        }
        if let Ok(tuple) = item.cast_exact::<PyTuple>() {
            reading.parts.push(format!("tuple {}", tuple.len()).into_bytes());
            return self.all(tuple.iter(), full, reading);
        }
        if let Ok(dict) = item.cast_exact::<PyDict>() {
            reading.parts.push(format!("dict {}", dict.len()).into_bytes());
            return self.all(dict.iter().flat_map(|(key, value)| [key, value]), full, reading);
        }
        if is_plain(item) {
            let Ok(bytes) = format::value::encode(&from_python(item)?) else {
                return Ok(false);
            };
            reading.parts.push(bytes);
            return Ok(true);
        }
        Ok(false)
    }

    fn all<'py>(
        &mut self,
        items: impl Iterator<Item = Bound<'py, PyAny>>,
        full: bool,
        reading: &mut Reading,
    ) -> PyResult<bool> {
        for item in items {
            if !self.walk(&item, full, reading)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn tensor(&mut self, item: &Bound<'_, PyAny>, full: bool, reading: &mut Reading) -> PyResult<bool> {
        let py = item.py();
        let readable = item.getattr(intern!(py, "layout"))?.is(&self.strided)
            && item.getattr(intern!(py, "is_cpu"))?.is_truthy()?
            && item.call_method0(intern!(py, "is_contiguous"))?.is_truthy()?
            && !item.call_method0(intern!(py, "is_conj"))?.is_truthy()?
            && !item.call_method0(intern!(py, "is_neg"))?.is_truthy()?;
        if !readable {
            return Ok(false);
        }
        let head = self.head(item)?;
        reading.parts.push(head);
        let address: usize = item.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let length: usize = item.getattr(intern!(py, "nbytes"))?.extract()?;
        check_region(py, address, length)?;
        if full || length <= self.budget {
            reading.regions.push((address, length));
        } else {
            let size = self.budget / WINDOWS;
            let stride = (length - size) / (WINDOWS - 1);
            reading
                .regions
                .extend((0..WINDOWS).map(|window| (address + window * stride, size)));
        }
        Ok(true)
    }

    fn head(&mut self, item: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let py = item.py();
        let dtype = item.getattr(intern!(py, "dtype"))?;
        let shape = item.getattr(intern!(py, "shape"))?;
        let sizes: Vec<usize> = shape
            .cast::<PyTuple>()?
            .iter()
            .map(|size| size.extract())
            .collect::<PyResult<_>>()?;
        // Dtypes are singletons that live as long as torch does.
        let key = (dtype.as_ptr() as usize, sizes);
        if let Some(head) = self.heads.get(&key) {
            return Ok(head.clone());
        }
        let described = self.describe.bind(py).call1((&dtype, &shape))?;
        let head = described.cast::<PyBytes>()?.as_bytes().to_vec();
        if self.heads.len() >= HEADS {
            self.heads.clear();
        }
        self.heads.insert(key, head.clone());
        Ok(head)
    }
}
