//! What an optimizer keeps for its parameters, and their names in its groups: looked at once, without a line of Python for
//! each of thousands.
//!
//! Touches: keeps what it is given alive.

use std::collections::HashMap;

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use unbroken::Value;

use crate::scatter::Scatter;

/// A list of names, which stands for that list wherever a value may stand. Immutable.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct NameList {
    names: Vec<String>,
}

#[pymethods]
impl NameList {
    fn __len__(&self) -> usize {
        self.names.len()
    }

    fn __getitem__(&self, at: usize) -> PyResult<&str> {
        let name = self.names.get(at).map(String::as_str);
        name.ok_or_else(|| PyIndexError::new_err("there are fewer names"))
    }

    /// Return them as a list of Python's.
    fn to_list(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }
}

impl NameList {
    pub(crate) fn of(names: Vec<String>) -> Self {
        NameList { names }
    }

    pub(crate) fn name(&self, at: usize) -> &str {
        &self.names[at]
    }

    pub(crate) fn to_value(&self) -> Value {
        Value::List(self.names.iter().cloned().map(Value::Str).collect())
    }
}

/// What an optimizer keeps for each of its parameters and whatever else it has a key for, each taken once.
#[pyclass(module = "unbroken._core")]
pub(crate) struct States {
    states: Vec<State>,
    /// Which one is a key's, by the key's `id`: to hash a tensor is a call of Python.
    places: HashMap<usize, usize, Scatter>,
}

struct State {
    key: Py<PyAny>,
    value: Py<PyAny>,
    taken: bool,
}

#[pymethods]
impl States {
    #[new]
    fn new(states: &Bound<'_, PyAny>) -> PyResult<Self> {
        let pairs: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)> = match states.cast::<PyDict>() {
            Ok(states) => states.iter().collect(),
            Err(_) => states
                .call_method0("items")?
                .try_iter()?
                .map(|pair| pair?.extract())
                .collect::<PyResult<_>>()?,
        };
        let place = |(at, (key, _)): (usize, &(Bound<'_, PyAny>, _))| (key.as_ptr() as usize, at);
        let places = pairs.iter().enumerate().map(place).collect();
        let state = |(key, value): (Bound<'_, PyAny>, Bound<'_, PyAny>)| State {
            key: key.unbind(),
            value: value.unbind(),
            taken: false,
        };
        Ok(States {
            states: pairs.into_iter().map(state).collect(),
            places,
        })
    }

    /// Return what is kept for a key, or `missing` where that is nothing or was taken.
    fn take(&mut self, key: &Bound<'_, PyAny>, missing: Py<PyAny>) -> Py<PyAny> {
        let found = self.of(key).map(|(at, value)| (at, value.unbind()));
        found.map_or(missing, |(at, value)| {
            self.taken(at);
            value
        })
    }

    /// Return what was not taken, with the keys.
    fn rest<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let rest = self.states.iter().filter(|state| !state.taken);
        rest.map(|state| (state.key.bind(py).clone(), state.value.bind(py).clone()))
            .collect()
    }
}

impl States {
    /// What is kept for a key and was not taken, and its number.
    pub(crate) fn of<'py>(&self, key: &Bound<'py, PyAny>) -> Option<(usize, Bound<'py, PyAny>)> {
        let at = *self.places.get(&(key.as_ptr() as usize))?;
        let state = self.states.get(at).filter(|state| !state.taken)?;
        Some((at, state.value.bind(key.py()).clone()))
    }

    pub(crate) fn taken(&mut self, at: usize) {
        self.states[at].taken = true;
    }
}
