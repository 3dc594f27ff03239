//! The memory of one part of the state: found once, seen to be still the same at each look, digested in windows. A part
//! is given as spaces: dicts whose values are its members, and members by themselves.
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
    /// Nothing was looked at yet, or a container among the members holds tensors: what it holds can change without a
    /// trace in it.
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

    fn changed(&mut self, spaces: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.look(spaces)
    }

    fn regions(&mut self, spaces: &Bound<'_, PyAny>) -> PyResult<Vec<(usize, usize)>> {
        self.look(spaces)?;
        Ok(self.regions.clone())
    }

    fn window<'py>(
        &mut self,
        spaces: &Bound<'py, PyAny>,
        turn: u64,
        length: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        self.look(spaces)?;
        // SAFETY: the tensors that own the regions are members, which the caller holds; the GIL keeps Python from
        // writing meanwhile.
        let slices: Vec<&[u8]> = self
            .regions
            .iter()
            .map(|&(address, length)| unsafe { look_at(address, length) })
            .collect();
        let digest = Fingerprint::of_window(&slices, turn.wrapping_mul(length), length);
        Ok(PyBytes::new(spaces.py(), &digest.0))
    }
}

impl WatchedMemory {
    /// Finds the regions anew if anything is not as it was, and tells whether that was so.
    fn look(&mut self, spaces: &Bound<'_, PyAny>) -> PyResult<bool> {
        if !self.nested && self.is_same(spaces)? {
            return Ok(false);
        }
        let py = spaces.py();
        let mut found = Vec::with_capacity(self.seen.len());
        each_member(spaces, |member| {
            found.push(member);
            Ok(true)
        })?;
        let members = PyList::new(py, found)?;
        let gathered = self.gather.bind(py).call1((&members,))?;
        let (regions, nested): (Bound<'_, PyAny>, bool) = gathered.extract()?;
        self.regions = regions_from_python(&regions)?;
        self.nested = nested;
        self.seen = members
            .iter()
            .map(|member| self.see(&member))
            .collect::<PyResult<_>>()?;
        self.held = Some(members.unbind());
        Ok(true)
    }

    fn is_same(&self, spaces: &Bound<'_, PyAny>) -> PyResult<bool> {
        let mut left = self.seen.iter();
        let all = each_member(spaces, |member| {
            let Some(seen) = left.next() else {
                return Ok(false);
            };
            Ok(match seen {
                Seen::Tensor(address) => self.address(&member)? == Some(*address),
                Seen::Plain(kind) => kind_of(&member) == *kind,
                Seen::Container(identity, length) => {
                    identity_of(&member) == *identity && member.len()? == *length
                }
                Seen::Other(identity, kind) => identity_of(&member) == *identity && kind_of(&member) == *kind,
            })
        })?;
        Ok(all && left.next().is_none())
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

/// Calls on the members of some spaces in turn, for as long as it answers yes; tells whether it always did. A dict's
/// members are its values; what is no dict is a member itself.
fn each_member<'py>(
    spaces: &Bound<'py, PyAny>,
    mut call: impl FnMut(Bound<'py, PyAny>) -> PyResult<bool>,
) -> PyResult<bool> {
    for space in spaces.try_iter()? {
        let space = space?;
        let Ok(dict) = space.cast::<PyDict>() else {
            if !call(space)? {
                return Ok(false);
            }
            continue;
        };
        for (_, member) in dict.iter() {
            if !call(member)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
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
