//! The storages of one capture, and the leaves of tensors that are nothing but their storage, as nearly all are.
//!
//! Touches: reads live tensors, each one anew at each capture. Of the capture before, leaves are remembered, to be shared
//! where they come out the same: most do. Training stands still meanwhile, and a model has thousands of tensors: what takes
//! twenty lines of Python for each takes one call here.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyCapsule, PyDict, PyList, PyString, PyType};
use unbroken::Value;
use unbroken::saver::{Region, WORTH_RESTING};
use unbroken::state;
use unbroken::store::contiguous;

use crate::dlpack::{Exchange, View};
use crate::entries::{Entries, is_plain_throughout};
use crate::leaf::Tensor;
use crate::memory::check_region;
use crate::method::Method;
use crate::names::Names;
use crate::notes::{Notes, REQUIRES_GRAD};
use crate::scatter::{Key, Scatter};
use crate::states::{NameList, States};
use crate::value::{fields_from_python, from_python};
use crate::versions::Versions;

/// How tensors are read: torch's classes, told once.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct TensorReader {
    tensor: Py<PyType>,
    /// With its name in leaves.
    parameter: (Py<PyType>, String),
    /// None where the framework has no table of a known version: every tensor is read on the long way then.
    exchange: Option<Exchange>,
    /// The leaves of the last capture, in their order: most are the same in the next one.
    last: Mutex<Arc<Leaves>>,
}

type Leaves = Vec<Arc<state::Tensor>>;

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
            last: Mutex::default(),
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
    /// The leaves made so far, and those of the capture before.
    made: Leaves,
    before: Arc<Leaves>,
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
        let before = Arc::clone(&lock(&reader.get().last));
        let before_count = before.len();
        Regions {
            reader,
            made: Vec::with_capacity(before_count),
            before,
            regions: Vec::with_capacity(before_count),
            places: HashMap::with_capacity_and_hasher(before_count, Scatter),
            held: Vec::with_capacity(before_count),
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
        let reader = self.reader.clone_ref(tensor.py());
        let noted = match flags {
            None => usual_notes(reader.get(), tensor)?,
            Some(flags) => {
                let mut attrs = fields_from_python(flags.as_any())?;
                attrs.sort_by(|left, right| left.0.cmp(&right.0));
                Notes::These(attrs)
            }
        };
        Ok(self.known(reader.get(), tensor, noted)?.map(Tensor::of))
    }

    /// Return what `leaf` does without flags; None also for a tensor that holds a gradient.
    fn lone_leaf(&mut self, tensor: &Bound<'_, PyAny>) -> PyResult<Option<Tensor>> {
        let reader = self.reader.clone_ref(tensor.py());
        Ok(self.lone(reader.get(), tensor)?.map(Tensor::of))
    }

    /// Put the leaf of each of a module's parameters into `leaves`, by name, and that of its gradient, or None, into
    /// `gradients`; with requires_grad and nothing else noted. False, and none of them there, where they are no dict, one
    /// of them is none that `leaf` takes, or has a name that is no text.
    fn parameters(
        &mut self,
        parameters: &Bound<'_, PyAny>,
        prefix: &Bound<'_, PyString>,
        leaves: &mut Entries,
        gradients: &mut Entries,
    ) -> PyResult<bool> {
        let Ok(parameters) = parameters.cast::<PyDict>() else {
            return Ok(false);
        };
        let reader = self.reader.clone_ref(parameters.py());
        let counts = (leaves.len(), gradients.len());
        for (key, parameter) in parameters {
            if !parameter.is_none()
                && !self.parameter(reader.get(), (prefix, &key), &parameter, (leaves, gradients))?
            {
                leaves.truncate(counts.0);
                gradients.truncate(counts.1);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Take what an optimizer has for each of its parameters, and put it into `lowered` by their names, from number `first`
    /// on: dicts with what `lone_leaf` gives for each value. Some may have none.
    ///
    /// Returns the number of the first parameter whose state is anything else than a dict of such tensors and plain values:
    /// one is a tensor that has a name, or something else, or has a key that is no ASCII text. How many there are where all
    /// of them are usual. That one's is not taken.
    fn lone_states(
        &mut self,
        names: &NameList,
        parameters: &Bound<'_, PyList>,
        first: usize,
        states: &mut States,
        named: &Names,
        lowered: &mut Entries,
    ) -> PyResult<usize> {
        let reader = self.reader.clone_ref(parameters.py());
        for (at, parameter) in parameters.iter().enumerate().skip(first) {
            let Some((number, state)) = states.of(&parameter) else {
                continue;
            };
            let leaves = match state.cast_exact::<PyDict>() {
                Ok(values) => self.lone_leaves(reader.get(), values, named)?,
                Err(_) => None,
            };
            let Some(leaves) = leaves else {
                return Ok(at);
            };
            states.taken(number);
            lowered.push(Value::Str(names.name(at).to_owned()), leaves);
        }
        Ok(parameters.len())
    }

    /// Take note that all leaves were made.
    fn settled(&mut self) {
        *lock(&self.reader.get().last) = Arc::new(std::mem::take(&mut self.made));
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

    /// Return how many bytes they are.
    fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.length as u64).sum()
    }

    /// Tell whether one of at least so many bytes is live memory, and not the capture's own.
    fn have_live(&self, least_bytes: u64) -> bool {
        let is_one = |region: &Captured| !region.private && region.length as u64 >= least_bytes;
        self.regions.iter().any(is_one)
    }

    /// Return all of them for a save; what is the capture's own, or a storage of `owned`, stays as it is until an
    /// optimizer steps. To what is in `unmoved` nobody is known to have written since the last save.
    #[pyo3(signature = (owned = None, unmoved = HashSet::new()))]
    fn lent(&self, owned: Option<&Versions>, unmoved: HashSet<Key>) -> Lent {
        let lend = |region: &Captured| {
            let key = (region.address, region.length);
            Region {
                address: region.address,
                length: region.length,
                lent: region.private || owned.is_some_and(|owned| owned.storages.contains(&key)),
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

    /// Puts the leaf of a parameter and that of its gradient, or None, there; false where one of them is unusual.
    fn parameter(
        &mut self,
        reader: &TensorReader,
        (prefix, key): (&Bound<'_, PyString>, &Bound<'_, PyAny>),
        parameter: &Bound<'_, PyAny>,
        (leaves, gradients): (&mut Entries, &mut Entries),
    ) -> PyResult<bool> {
        let py = key.py();
        let (Ok(prefix), Ok(key)) = (prefix.to_str(), key.cast_exact::<PyString>()) else {
            return Ok(false);
        };
        let Ok(key) = key.to_str() else {
            return Ok(false);
        };
        let noted = Notes::Usual {
            class: None,
            requires_grad: Some(flag(parameter.getattr(intern!(py, "requires_grad"))?)),
        };
        let Some(leaf) = self.known(reader, parameter, noted)? else {
            return Ok(false);
        };
        let gradient = parameter.getattr(intern!(py, "grad"))?;
        let gradient = if gradient.is_none() {
            Value::None
        } else {
            match self.known(reader, &gradient, Notes::NOTHING)? {
                Some(leaf) => Value::Tensor(leaf),
                None => return Ok(false),
            }
        };
        let name = Value::Str([prefix, key].concat());
        leaves.push(name.clone(), Value::Tensor(leaf));
        gradients.push(name, gradient);
        Ok(true)
    }

    /// A dict with what `lone_leaf` gives for each tensor, by its key, and plain values as they are. None where it gives
    /// None for one, where one is a tensor that has a name or anything else, or its key is no ASCII text.
    fn lone_leaves(
        &mut self,
        reader: &TensorReader,
        values: &Bound<'_, PyDict>,
        named: &Names,
    ) -> PyResult<Option<Value>> {
        let mut leaves = Vec::with_capacity(values.len());
        for (key, value) in values {
            let key = match key.cast_exact::<PyString>().map(|key| key.to_str()) {
                Ok(Ok(key)) if key.is_ascii() => key,
                _ => return Ok(None),
            };
            if is_plain_throughout(&value) {
                leaves.push((Value::Str(key.to_owned()), from_python(&value)?)); // Such as a count of steps.
                continue;
            }
            if !value.get_type().is(&reader.tensor) || named.has(&value) {
                return Ok(None);
            }
            match self.lone(reader, &value)? {
                Some(leaf) => leaves.push((Value::Str(key.to_owned()), Value::Tensor(leaf))),
                None => return Ok(None),
            }
        }
        Ok(Some(Value::dict(leaves)))
    }

    fn lone(
        &mut self,
        reader: &TensorReader,
        tensor: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Arc<state::Tensor>>> {
        let py = tensor.py();
        if !reader.is_known(tensor) {
            return Ok(None);
        }
        let wanted = flag(tensor.getattr(intern!(py, "requires_grad"))?);
        let leaf = !wanted || flag(tensor.getattr(intern!(py, "is_leaf"))?);
        if leaf && !tensor.getattr(intern!(py, "grad"))?.is_none() {
            return Ok(None);
        }
        self.whole(reader, tensor, notes_of(reader, tensor, leaf && wanted))
    }

    fn known(
        &mut self,
        reader: &TensorReader,
        tensor: &Bound<'_, PyAny>,
        noted: Notes,
    ) -> PyResult<Option<Arc<state::Tensor>>> {
        if !reader.is_known(tensor) {
            return Ok(None);
        }
        let leaf = self.whole(reader, tensor, noted)?;
        if let Some(leaf) = &leaf
            && reader.is_parameter(tensor) // A buffer may be written to in any forward.
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
        noted: Notes,
    ) -> PyResult<Option<Arc<state::Tensor>>> {
        let py = tensor.py();
        let Some(view) = reader.view(tensor) else {
            return Ok(None);
        };
        // What is negated when it is read is noted on the long way.
        if view.is_ambiguous() || flag(IS_NEG.call(tensor)?) {
            return Ok(None);
        }
        let storage = UNTYPED_STORAGE.call(tensor)?;
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
        Ok(Some(self.leaf_of(&view, index, noted)))
    }

    /// The leaf of a tensor that is all of a storage: the one of the last capture if that was the same.
    fn leaf_of(&mut self, view: &View, storage: u32, noted: Notes) -> Arc<state::Tensor> {
        let before = self.before.get(self.made.len());
        let leaf = match before.filter(|before| is_leaf_of(before, view, storage, &noted)) {
            Some(before) => Arc::clone(before),
            None => Arc::new(state::Tensor {
                dtype: view.dtype.to_owned(),
                shape: view.shape.iter().map(|&extent| extent as u64).collect(),
                strides: view.strides.to_vec(),
                offset: 0,
                storage,
                device: CPU.to_owned(),
                attrs: noted.into_attrs(),
            }),
        };
        self.made.push(Arc::clone(&leaf));
        leaf
    }
}

const CPU: &str = "cpu";

static IS_NEG: Method = Method::new("is_neg");
static UNTYPED_STORAGE: Method = Method::new("untyped_storage");
static NBYTES: Method = Method::new("nbytes");

/// Whether a leaf is that of a tensor that is all of a storage.
fn is_leaf_of(leaf: &state::Tensor, view: &View, storage: u32, noted: &Notes) -> bool {
    leaf.storage == storage
        && leaf.dtype == view.dtype
        && leaf
            .shape
            .iter()
            .copied()
            .eq(view.shape.iter().map(|&extent| extent as u64))
        && leaf.strides == view.strides
        && leaf.offset == 0
        && leaf.device == CPU
        && noted.are(&leaf.attrs)
}

/// Whether a parameter's leaf says that it requires no gradient, and is its storage's bytes in order.
fn is_frozen(leaf: &state::Tensor) -> bool {
    let noted = |(name, value): &(String, Value)| name == REQUIRES_GRAD && *value == Value::Bool(false);
    leaf.attrs.iter().any(noted) && contiguous(leaf)
}

fn usual_notes<'r>(reader: &'r TensorReader, tensor: &Bound<'_, PyAny>) -> PyResult<Notes<'r>> {
    let py = tensor.py();
    let wanted = flag(tensor.getattr(intern!(py, "requires_grad"))?);
    let leaf = wanted && flag(tensor.getattr(intern!(py, "is_leaf"))?);
    Ok(notes_of(reader, tensor, leaf))
}

fn notes_of<'r>(reader: &'r TensorReader, tensor: &Bound<'_, PyAny>, requires_grad: bool) -> Notes<'r> {
    Notes::Usual {
        class: reader.is_parameter(tensor).then_some(&*reader.parameter.1),
        requires_grad: requires_grad.then_some(true),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

pub(crate) fn flag(value: Bound<'_, PyAny>) -> bool {
    value.cast_exact::<PyBool>().is_ok_and(|value| value.is_true())
}

fn length_of(storage: &Bound<'_, PyAny>) -> PyResult<usize> {
    NBYTES.call(storage)?.extract()
}

fn address_of(storage: &Bound<'_, PyAny>) -> PyResult<usize> {
    storage.call_method0(intern!(storage.py(), "data_ptr"))?.extract()
}
