//! Names of the live objects that others refer to: parameters and buffers, modules, and whatever is tracked.
//!
//! Touches: keeps what it is given alive. A capture asks for the name of everything that it meets, and a model has
//! thousands of parameters.

use std::collections::HashMap;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};
use unbroken::Value;
use unbroken::state;

use crate::leaf::Object;
use crate::scatter::Scatter;
use crate::states::NameList;

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
    /// That of thousands.
    kind: Arc<str>,
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
        (*named.kind == *kind).then_some(&named.name)
    }

    /// Return the name of each parameter of an optimizer's group; of one that has none, the group's number and its own.
    fn of_group(&self, parameters: &Bound<'_, PyList>, group: usize) -> NameList {
        let name = |(at, parameter): (usize, Bound<'_, PyAny>)| {
            let name = self.name(&parameter, "tensor").filter(|name| !name.is_empty());
            name.map_or_else(|| format!("group{group}.{at}"), str::to_owned)
        };
        NameList::of(parameters.iter().enumerate().map(name).collect())
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
            name: named.kind.to_string(),
            fields: vec![("to".to_owned(), Value::Str(named.name.clone()))],
        })))
    }

    /// Return the object of that name, or `missing`.
    fn find(&mut self, py: Python<'_>, kind: String, name: String, missing: Py<PyAny>) -> Py<PyAny> {
        for (at, named) in self.named.iter().enumerate().skip(self.searched) {
            let key = (named.kind.to_string(), named.name.clone());
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
        let last = self.named.last().map(|last| &last.kind);
        let shared = last.filter(|last| &***last == kind).cloned();
        self.named.push(Named {
            kind: shared.unwrap_or_else(|| kind.into()),
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
