//! The memory of one part of the state: found once, seen to be still the same at each look, digested in windows.
//!
//! Touches: reads live tensors' memory; calls one C method of each tensor, and Python code only when something changed.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PySet, PyTuple, PyType};
use unbroken::Fingerprint;

use crate::memory::{look_at, regions_from_python};
use crate::value::is_plain;

/// What a member was at the last look.
enum Seen {
    /// A tensor, by its address: it is held, so that no other tensor can have the same.
    Tensor(usize),
    /// A plain value, which cannot turn into memory without becoming of another type.
    Plain(usize),
    /// A container that holds no tensor, by identity and length.
    Container(usize, usize),
    /// Anything else, by identity and type: a lazy parameter becomes a plain one in place.
    Other(usize, usize),
}

/// The tensors among some members, and where their bytes lie.
#[pyclass(module = "unbroken._core")]
pub(crate) struct WatchedMemory {
    gather: Py<PyAny>,
    tensors: Vec<Py<PyType>>,
    data_ptr: Py<PyAny>,
    seen: Vec<Seen>,
    /// Keeps what was seen alive, so that identities and addresses stay theirs.
    held: Option<Py<PyList>>,
    /// A container among the members holds tensors: what it holds can change without a trace in it.
    nested: bool,
    regions: Vec<(usize, usize)>,
}

#[pymethods]
impl WatchedMemory {
    #[new]
    #[pyo3(signature = (*, gather, tensors, data_ptr))]
    fn new(gather: Py<PyAny>, tensors: Vec<Py<PyType>>, data_ptr: Py<PyAny>) -> Self {
        WatchedMemory {
            gather,
            tensors,
            data_ptr,
            seen: Vec::new(),
            held: None,
            nested: true,
            regions: Vec::new(),
        }
    }

    fn regions(&mut self, members: &Bound<'_, PyList>) -> PyResult<Vec<(usize, usize)>> {
        self.look(members)?;
        Ok(self.regions.clone())
    }

    fn window<'py>(
        &mut self,
        members: &Bound<'py, PyList>,
        turn: u64,
        length: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        self.look(members)?;
        // SAFETY: the tensors that own the regions are members, which the caller holds; the GIL keeps Python from
        // writing meanwhile.
        let slices: Vec<&[u8]> = self
            .regions
            .iter()
            .map(|&(address, length)| unsafe { look_at(address, length) })
            .collect();
        let digest = Fingerprint::of_window(&slices, turn.wrapping_mul(length), length);
        Ok(PyBytes::new(members.py(), &digest.0))
    }
}

impl WatchedMemory {
    /// Finds the regions anew if anything is not as it was.
    fn look(&mut self, members: &Bound<'_, PyList>) -> PyResult<()> {
        if !self.nested && self.seen.len() == members.len() && self.is_same(members)? {
            return Ok(());
        }
        let py = members.py();
        let gathered = self.gather.bind(py).call1((members,))?;
        let (regions, nested): (Bound<'_, PyAny>, bool) = gathered.extract()?;
        self.regions = regions_from_python(&regions)?;
        self.nested = nested;
        self.seen = members
            .iter()
            .map(|member| self.see(&member))
            .collect::<PyResult<_>>()?;
        self.held = Some(PyList::new(py, members.iter())?.unbind());
        Ok(())
    }

    fn is_same(&self, members: &Bound<'_, PyList>) -> PyResult<bool> {
        for (member, seen) in members.iter().zip(&self.seen) {
            let same = match seen {
                Seen::Tensor(address) => self.address(&member)? == Some(*address),
                Seen::Plain(kind) => kind_of(&member) == *kind,
                Seen::Container(identity, length) => {
                    identity_of(&member) == *identity && member.len()? == *length
                }
                Seen::Other(identity, kind) => identity_of(&member) == *identity && kind_of(&member) == *kind,
            };
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn see(&self, member: &Bound<'_, PyAny>) -> PyResult<Seen> {
        if let Some(address) = self.address(member)? {
            return Ok(Seen::Tensor(address));
        }
        if is_plain(member) {
            return Ok(Seen::Plain(kind_of(member)));
        }
        if is_container(member) {
            return Ok(Seen::Container(identity_of(member), member.len()?));
        }
        Ok(Seen::Other(identity_of(member), kind_of(member)))
    }

    /// Where a tensor's data begin; None for what is no tensor, and for tensors without one place for their data.
    fn address(&self, member: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
        let py = member.py();
        let kind = kind_of(member);
        let known = self.tensors.iter().any(|known| known.as_ptr() as usize == kind);
        if !known && !self.is_tensor(member)? {
            return Ok(None);
        }
        match self.data_ptr.bind(py).call1((member,)) {
            Ok(address) => address.extract().map(Some),
            Err(error) if error.is_instance_of::<PyRuntimeError>(py) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn is_tensor(&self, member: &Bound<'_, PyAny>) -> PyResult<bool> {
        match self.tensors.first() {
            Some(base) if !is_plain(member) => member.is_instance(base.bind(member.py())),
            _ => Ok(false),
        }
    }
}

fn identity_of(member: &Bound<'_, PyAny>) -> usize {
    member.as_ptr() as usize
}

fn kind_of(member: &Bound<'_, PyAny>) -> usize {
    member.get_type_ptr() as usize
}

fn is_container(member: &Bound<'_, PyAny>) -> bool {
    member.is_instance_of::<PyList>()
        || member.is_instance_of::<PyDict>()
        || member.is_instance_of::<PyTuple>()
        || member.is_instance_of::<PySet>()
}
