//! Names of the live objects that others refer to: parameters and buffers, modules, and whatever is tracked.
//!
//! Touches: keeps what it is given alive. A capture asks for the name of everything that it meets, and a model has
//! thousands of parameters.

use std::collections::HashMap;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};
use unbroken::Value;
use unbroken::state;

use crate::leaf::Object;
use crate::scatter::Scatter;

/// Objects by name, names by object.
#[pyclass(module = "unbroken._core")]
#[derive(Default)]
pub(crate) struct Names {
    named: Vec<Named>,
    /// An object's first name: which one of all it is, by the object's `id`.
    first: HashMap<usize, usize, Scatter>,
    /// The same by kind and name, for as many as somebody has looked for so far.
    found: HashMap<(String, String), usize>,
    searched: usize,
}

struct Named {
    kind: String,
    name: String,
    item: Py<PyAny>,
}

#[pymethods]
impl Names {
    #[new]
    fn new() -> Self {
        Names::default()
    }

    /// Name an object; the first name that it gets is its name, and all of them find it.
    fn add(&mut self, kind: &str, name: &Bound<'_, PyString>, item: Bound<'_, PyAny>) {
        self.push(kind, name.to_string_lossy().into_owned(), item);
    }

    /// Add objects, None left out, under their names behind a prefix.
    fn add_members(
        &mut self,
        kind: &str,
        prefix: &Bound<'_, PyString>,
        members: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let prefix = prefix.to_string_lossy();
        let pairs: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)> = match members.cast::<PyDict>() {
            Ok(members) => members.iter().collect(),
            Err(_) => members.call_method0("items")?.extract()?, // Such as those of a scripted module.
        };
        for (key, item) in pairs.into_iter().filter(|(_, item)| !item.is_none()) {
            self.push(kind, [&*prefix, &key.str()?.to_string_lossy()].concat(), item);
        }
        Ok(())
    }

    /// Return an object's name, or None.
    fn name(&self, item: &Bound<'_, PyAny>, kind: &str) -> Option<&str> {
        let named = self.first_of(item.as_ptr() as usize)?;
        (named.kind == kind).then_some(&named.name)
    }

    /// Return each object's name, or None.
    fn names<'py>(&self, items: &Bound<'py, PyList>, kind: &str) -> PyResult<Bound<'py, PyList>> {
        let name =
            |item: Bound<'py, PyAny>| self.name(&item, kind).map(|name| PyString::new(item.py(), name));
        PyList::new(items.py(), items.iter().map(name))
    }

    /// Return the first name of the object with that `id`, or None.
    fn name_of_id(&self, id: usize) -> Option<&str> {
        self.first_of(id).map(|named| &*named.name)
    }

    /// Return what stands for a named object in a tree, or None.
    fn reference(&self, item: &Bound<'_, PyAny>) -> Option<Object> {
        let named = self.first_of(item.as_ptr() as usize)?;
        Some(Object::of(Value::from(state::Object {
            kind: "reference".to_owned(),
            name: named.kind.clone(),
            fields: vec![("to".to_owned(), Value::Str(named.name.clone()))],
        })))
    }

    /// Return the object of that name, or `missing`.
    fn find(&mut self, py: Python<'_>, kind: String, name: String, missing: Py<PyAny>) -> Py<PyAny> {
        for (at, named) in self.named.iter().enumerate().skip(self.searched) {
            let key = (named.kind.clone(), named.name.clone());
            self.found.entry(key).or_insert(at);
        }
        self.searched = self.named.len();
        match self.found.get(&(kind, name)) {
            Some(&at) => self.named[at].item.clone_ref(py),
            None => missing,
        }
    }
}

impl Names {
    fn push(&mut self, kind: &str, name: String, item: Bound<'_, PyAny>) {
        self.first
            .entry(item.as_ptr() as usize)
            .or_insert(self.named.len());
        self.named.push(Named {
            kind: kind.to_owned(),
            name,
            item: item.unbind(),
        });
    }

    fn first_of(&self, id: usize) -> Option<&Named> {
        self.first.get(&id).map(|&at| &self.named[at])
    }

    /// Whether an object has a name.
    pub(crate) fn has(&self, item: &Bound<'_, PyAny>) -> bool {
        self.first.contains_key(&(item.as_ptr() as usize))
    }
}
