//! The storages of one capture, and the leaves of tensors that are nothing but their storage, as nearly all are.
//!
//! Touches: reads live tensors, each one anew at each capture: nothing is remembered that a program could change.
//! Training stands still meanwhile, and a model has thousands of tensors: what takes twenty lines of Python for each
//! takes one call here.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyCapsule, PyDict, PyList, PyString, PyType};
use unbroken::Value;
use unbroken::saver::{Region, WORTH_RESTING};
use unbroken::state;
use unbroken::store::contiguous;

use crate::dlpack::{Exchange, View};
use crate::leaf::Tensor;
use crate::memory::check_region;
use crate::value::fields_from_python;

/// How tensors are read: torch's classes, told once.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct TensorReader {
    tensor: Py<PyType>,
    /// With its name in leaves.
    parameter: (Py<PyType>, String),
    /// None where the framework has no table of a known version: every tensor is read on the long way then.
    exchange: Option<Exchange>,
}

#[pymethods]
impl TensorReader {
    #[new]
    #[pyo3(signature = (*, tensor, parameter, exchange))]
    fn new(
        tensor: Py<PyType>,
        parameter: (Py<PyType>, String),
        exchange: Option<&Bound<'_, PyCapsule>>,
    ) -> PyResult<Self> {
        Ok(TensorReader {
            tensor,
            parameter,
            exchange: exchange.map(Exchange::of).transpose()?.flatten(),
        })
    }

    /// Return (tensor, address, length in bytes) of each tensor whose storage on the CPU has at least so many bytes.
    fn large<'py>(
        &self,
        tensors: Vec<Bound<'py, PyAny>>,
        least_bytes: u64,
    ) -> PyResult<Vec<(Bound<'py, PyAny>, usize, usize)>> {
        self.find_large(tensors, least_bytes, None)
    }

    /// Read the version counters of those among the tensors that `large` would return and that have one.
    fn versions(
        &self,
        tensors: Vec<Bound<'_, PyAny>>,
        least_bytes: u64,
        regions: PyRef<'_, Regions>,
    ) -> PyResult<Versions> {
        Versions::of(self.find_large(tensors, least_bytes, Some(&regions))?)
    }
}

impl TensorReader {
    /// A tensor that is all of a storage in `regions` is not asked for its storage again.
    fn find_large<'py>(
        &self,
        tensors: Vec<Bound<'py, PyAny>>,
        least_bytes: u64,
        regions: Option<&Regions>,
    ) -> PyResult<Vec<(Bound<'py, PyAny>, usize, usize)>> {
        let mut found = Vec::new();
        for tensor in tensors {
            let Some(view) = self.view(&tensor) else {
                continue;
            };
            let known = view.dense_bytes().map(|length| (view.address, length));
            if let Some((address, length)) = known
                && regions
                    .as_ref()
                    .is_some_and(|regions| regions.find(address, length).is_some())
            {
                if length as u64 >= least_bytes {
                    found.push((tensor, address, length));
                }
                continue;
            }
            let storage = tensor.call_method0(intern!(tensor.py(), "untyped_storage"))?;
            let length = length_of(&storage)?;
            if length as u64 >= least_bytes {
                found.push((tensor, address_of(&storage)?, length));
            }
        }
        Ok(found)
    }

    fn view<'a>(&self, tensor: &'a Bound<'_, PyAny>) -> Option<View<'a>> {
        self.exchange.as_ref()?.view(tensor)
    }
}

impl TensorReader {
    fn is_parameter(&self, tensor: &Bound<'_, PyAny>) -> bool {
        tensor.get_type().is(&self.parameter.0)
    }

    fn is_known(&self, tensor: &Bound<'_, PyAny>) -> bool {
        tensor.get_type().is(&self.tensor) || self.is_parameter(tensor)
    }
}

/// Tensors' version counters: whether anybody was seen to write to them since.
#[pyclass(frozen, module = "unbroken._core")]
#[derive(Default)]
pub(crate) struct Versions {
    tensors: Vec<(Py<PyAny>, i64, Key)>,
    storages: HashSet<Key, Scatter>,
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
    fn add(&mut self, tensor: Bound<'_, PyAny>, key: Key) -> PyResult<()> {
        if !flag(tensor.call_method0(intern!(tensor.py(), "is_inference"))?) {
            let version = version_of(&tensor)?;
            self.tensors.push((tensor.unbind(), version, key));
            self.storages.insert(key);
        }
        Ok(())
    }

    /// Reads the counters of (tensor, address, length in bytes) each.
    fn of(found: Vec<(Bound<'_, PyAny>, usize, usize)>) -> PyResult<Self> {
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

/// Address and length in bytes.
type Key = (usize, usize);

/// Hashes addresses and lengths, which nobody chooses to be alike: a capture asks for thousands.
#[derive(Clone, Copy, Default)]
struct Scatter;

impl BuildHasher for Scatter {
    type Hasher = Scattered;

    fn build_hasher(&self) -> Scattered {
        Scattered(0)
    }
}

struct Scattered(u64);

impl Hasher for Scattered {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn write_u64(&mut self, number: u64) {
        // Odd, and of no pattern: 2^64 over the golden ratio. What is multiplied counts in the high bits, hence the turn.
        self.0 = (self.0 ^ number)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(32);
    }
}

/// Where a storage on the CPU went.
#[derive(Clone, Copy)]
enum Place {
    /// It is the region of that number.
    Whole(u32),
    /// A part of it was copied: who views all of it must be told.
    Part,
}

/// The storages of one capture: their memory, in the order of their numbers.
#[pyclass(module = "unbroken._core")]
pub(crate) struct Regions {
    reader: Py<TensorReader>,
    regions: Vec<Captured>,
    places: HashMap<Key, Place, Scatter>,
    /// Keeps alive what the leaves view.
    held: Vec<Py<PyAny>>,
    /// Large parameters that require no gradient.
    frozen: Versions,
}

struct Captured {
    address: usize,
    length: usize,
    /// It is nobody's but the capture's.
    private: bool,
}

/// The memory of a save, as it is told to `Run.save`.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct Lent {
    pub(crate) regions: Vec<Region>,
}

#[pymethods]
impl Lent {
    fn __len__(&self) -> usize {
        self.regions.len()
    }
}

#[pymethods]
impl Regions {
    #[new]
    fn new(reader: Py<TensorReader>) -> Self {
        Regions {
            reader,
            regions: Vec::new(),
            places: HashMap::default(),
            held: Vec::new(),
            frozen: Versions::default(),
        }
    }

    fn __len__(&self) -> usize {
        self.regions.len()
    }

    /// Add memory that the caller keeps alive, and return its number.
    #[pyo3(signature = (address, length, *, private))]
    fn add(&mut self, py: Python<'_>, address: usize, length: usize, private: bool) -> PyResult<u32> {
        check_region(py, address, length)?;
        Ok(self.push(address, length, private))
    }

    /// Return the number of the region that a storage on the CPU, by address and length, is saved as.
    fn find(&self, address: usize, length: usize) -> Option<u32> {
        match self.places.get(&(address, length)) {
            Some(Place::Whole(index)) => Some(*index),
            _ => None,
        }
    }

    /// Note which region a storage on the CPU is saved as; None: parts of it, as copies.
    #[pyo3(signature = (address, length, index))]
    fn note(&mut self, address: usize, length: usize, index: Option<u32>) {
        self.places
            .insert((address, length), index.map_or(Place::Part, Place::Whole));
    }

    /// Return the leaf of a tensor that is all of its storage, on the CPU, of a usual dtype, adding the storage if it is
    /// new; None, and nothing added, for any other. Without `flags`, class and requires_grad are noted; given, only they.
    #[pyo3(signature = (tensor, flags = None))]
    fn leaf(
        &mut self,
        tensor: &Bound<'_, PyAny>,
        flags: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Option<Tensor>> {
        let py = tensor.py();
        let attrs = match flags {
            None => usual_attrs(self.reader.clone_ref(py).get(), tensor)?,
            Some(flags) => {
                let mut attrs = fields_from_python(flags.as_any())?;
                attrs.sort_by(|left, right| left.0.cmp(&right.0));
                attrs
            }
        };
        self.known(tensor, attrs)
    }

    /// Return what `leaf` does without flags; None also for a tensor that holds a gradient.
    fn lone_leaf(&mut self, tensor: &Bound<'_, PyAny>) -> PyResult<Option<Tensor>> {
        let py = tensor.py();
        let reader = self.reader.clone_ref(py);
        let reader = reader.get();
        if !reader.is_known(tensor) {
            return Ok(None);
        }
        let wanted = flag(tensor.getattr(intern!(py, "requires_grad"))?);
        let leaf = !wanted || flag(tensor.getattr(intern!(py, "is_leaf"))?);
        if leaf && !tensor.getattr(intern!(py, "grad"))?.is_none() {
            return Ok(None);
        }
        let attrs = attrs_of(reader, tensor, leaf && wanted);
        self.whole(reader, tensor, attrs)
    }

    /// Put the leaf of each of a module's parameters into `leaves`, by name, and that of its gradient, or None, into
    /// `gradients`; with requires_grad and nothing else noted. False, and perhaps some of them there, where one of them is
    /// none that `leaf` takes, or has a name that is no text.
    fn parameters<'py>(
        &mut self,
        parameters: &Bound<'py, PyDict>,
        prefix: &Bound<'py, PyString>,
        leaves: &Bound<'py, PyDict>,
        gradients: &Bound<'py, PyDict>,
    ) -> PyResult<bool> {
        let py = parameters.py();
        for (key, parameter) in parameters {
            if parameter.is_none() {
                continue;
            }
            let Some(name) = key
                .cast_exact::<PyString>()
                .ok()
                .and_then(|key| name(prefix, key))
            else {
                return Ok(false);
            };
            let wanted = flag(parameter.getattr(intern!(py, "requires_grad"))?);
            let attrs = vec![("requires_grad".to_owned(), Value::Bool(wanted))];
            let Some(leaf) = self.known(&parameter, attrs)? else {
                return Ok(false);
            };
            leaves.set_item(&name, leaf)?;
            let gradient = parameter.getattr(intern!(py, "grad"))?;
            if gradient.is_none() {
                gradients.set_item(name, gradient)?;
                continue;
            }
            match self.known(&gradient, Vec::new())? {
                Some(leaf) => gradients.set_item(name, leaf)?,
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Put what an optimizer has for each of its parameters into `lowered`, by their names, from number `first` on: dicts
    /// with what `lone_leaf` gives for each value. `state` has it by the parameters' `id`; some may have none.
    ///
    /// Returns the number of the first parameter whose state is anything else than a dict of such tensors: one is a tensor
    /// whose `id` is in `named` or no plain tensor at all, or has a key that is no ASCII text. How many there are where
    /// all of them are usual.
    fn lone_states<'py>(
        &mut self,
        names: &Bound<'py, PyList>,
        parameters: &Bound<'py, PyList>,
        first: usize,
        state: &Bound<'py, PyDict>,
        named: &Bound<'py, PyAny>,
        lowered: &Bound<'py, PyDict>,
    ) -> PyResult<usize> {
        for at in first..parameters.len() {
            let Some(values) = state.get_item(parameters.get_item(at)?.as_ptr() as usize)? else {
                continue;
            };
            let leaves = match values.cast_exact::<PyDict>() {
                Ok(values) => self.lone_leaves(values, named)?,
                Err(_) => None,
            };
            match leaves {
                Some(leaves) => lowered.set_item(names.get_item(at)?, leaves)?,
                None => return Ok(at),
            }
        }
        Ok(parameters.len())
    }

    /// Return the version counters of the large parameters that require no gradient, once.
    fn take_frozen(&mut self) -> Versions {
        std::mem::take(&mut self.frozen)
    }

    /// Return (address, length in bytes) of each.
    fn spans(&self) -> Vec<(usize, usize)> {
        let span = |region: &Captured| (region.address, region.length);
        self.regions.iter().map(span).collect()
    }

    /// Tell whether one of at least so many bytes is live memory, and not the capture's own.
    fn have_live(&self, least_bytes: u64) -> bool {
        let is_one = |region: &Captured| !region.private && region.length as u64 >= least_bytes;
        self.regions.iter().any(is_one)
    }

    /// Return all of them for a save; what is the capture's own, or a storage of `owned`, stays as it is until an
    /// optimizer steps. To what is in `unmoved` nobody is known to have written since the last save.
    #[pyo3(signature = (owned, unmoved = HashSet::new()))]
    fn lent(&self, owned: &Versions, unmoved: HashSet<Key>) -> Lent {
        let lend = |region: &Captured| {
            let key = (region.address, region.length);
            Region {
                address: region.address,
                length: region.length,
                lent: region.private || owned.storages.contains(&key),
                unmoved: !region.private && unmoved.contains(&key),
            }
        };
        Lent {
            regions: self.regions.iter().map(lend).collect(),
        }
    }
}

impl Regions {
    fn push(&mut self, address: usize, length: usize, private: bool) -> u32 {
        self.regions.push(Captured {
            address,
            length,
            private,
        });
        u32::try_from(self.regions.len() - 1).expect("fewer storages than there are numbers")
    }

    /// What `lone_leaf` gives for each value, by its key. None where it gives None for one, where one is a tensor whose
    /// `id` is in `named` or no plain tensor at all, or its key is no ASCII text.
    fn lone_leaves<'py>(
        &mut self,
        values: &Bound<'py, PyDict>,
        named: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let leaves = PyDict::new(values.py());
        for (key, value) in values {
            let usual_key = key
                .cast_exact::<PyString>()
                .is_ok_and(|key| key.to_str().is_ok_and(str::is_ascii));
            if !usual_key
                || !value.get_type().is(&self.reader.get().tensor)
                || named.contains(value.as_ptr() as usize)?
            {
                return Ok(None);
            }
            match self.lone_leaf(&value)? {
                Some(leaf) => leaves.set_item(key, leaf)?,
                None => return Ok(None),
            }
        }
        Ok(Some(leaves))
    }

    fn known(&mut self, tensor: &Bound<'_, PyAny>, attrs: Vec<(String, Value)>) -> PyResult<Option<Tensor>> {
        let reader = self.reader.clone_ref(tensor.py());
        if !reader.get().is_known(tensor) {
            return Ok(None);
        }
        let leaf = self.whole(reader.get(), tensor, attrs)?;
        if let Some(Tensor { leaf, .. }) = &leaf
            && reader.get().is_parameter(tensor) // A buffer may be written to in any forward.
            && is_frozen(leaf)
        {
            let region = &self.regions[leaf.storage as usize];
            let key = (region.address, region.length);
            if region.length >= WORTH_RESTING {
                self.frozen.add(tensor.clone(), key)?;
            }
        }
        Ok(leaf)
    }

    fn whole(
        &mut self,
        reader: &TensorReader,
        tensor: &Bound<'_, PyAny>,
        attrs: Vec<(String, Value)>,
    ) -> PyResult<Option<Tensor>> {
        let py = tensor.py();
        let Some(view) = reader.view(tensor) else {
            return Ok(None);
        };
        // What is negated when it is read is noted on the long way.
        if view.is_ambiguous() || flag(tensor.call_method0(intern!(py, "is_neg"))?) {
            return Ok(None);
        }
        let storage = tensor.call_method0(intern!(py, "untyped_storage"))?;
        let (address, length) = (view.address, length_of(&storage)?);
        // As dense as it is, it begins where its storage does if it is as long.
        if length == 0 || view.dense_bytes() != Some(length) {
            return Ok(None);
        }
        let index = match self.places.get(&(address, length)) {
            Some(Place::Whole(index)) => *index,
            Some(Place::Part) => return Ok(None),
            None => {
                check_region(py, address, length)?;
                let index = self.push(address, length, false);
                self.places.insert((address, length), Place::Whole(index));
                self.held.push(storage.unbind());
                index
            }
        };
        Ok(Some(Tensor::of(state::Tensor {
            dtype: view.dtype.to_owned(),
            shape: view.shape.iter().map(|&extent| extent as u64).collect(),
            strides: view.strides.to_vec(),
            offset: 0,
            storage: index,
            device: "cpu".to_owned(),
            attrs,
        })))
    }
}

/// Whether a parameter's leaf says that it requires no gradient, and is its storage's bytes in order.
fn is_frozen(leaf: &state::Tensor) -> bool {
    let noted = |(name, value): &(String, Value)| name == "requires_grad" && *value == Value::Bool(false);
    leaf.attrs.iter().any(noted) && contiguous(leaf)
}

/// A parameter's name; None where a part of it is no text.
fn name<'py>(prefix: &Bound<'py, PyString>, key: &Bound<'py, PyString>) -> Option<Bound<'py, PyString>> {
    let (before, last) = (prefix.to_str().ok()?, key.to_str().ok()?);
    if before.is_empty() {
        return Some(key.clone());
    }
    Some(PyString::new(key.py(), &[before, last].concat()))
}

fn usual_attrs(reader: &TensorReader, tensor: &Bound<'_, PyAny>) -> PyResult<Vec<(String, Value)>> {
    let py = tensor.py();
    let wanted = flag(tensor.getattr(intern!(py, "requires_grad"))?);
    let leaf = wanted && flag(tensor.getattr(intern!(py, "is_leaf"))?);
    Ok(attrs_of(reader, tensor, leaf))
}

fn attrs_of(reader: &TensorReader, tensor: &Bound<'_, PyAny>, requires_grad: bool) -> Vec<(String, Value)> {
    let mut attrs = Vec::new();
    if reader.is_parameter(tensor) {
        attrs.push(("class".to_owned(), Value::Str(reader.parameter.1.clone())));
    }
    if requires_grad {
        attrs.push(("requires_grad".to_owned(), Value::Bool(true)));
    }
    attrs
}

fn flag(value: Bound<'_, PyAny>) -> bool {
    value.cast_exact::<PyBool>().is_ok_and(|value| value.is_true())
}

fn length_of(storage: &Bound<'_, PyAny>) -> PyResult<usize> {
    storage.call_method0(intern!(storage.py(), "nbytes"))?.extract()
}

fn address_of(storage: &Bound<'_, PyAny>) -> PyResult<usize> {
    storage.call_method0(intern!(storage.py(), "data_ptr"))?.extract()
}
