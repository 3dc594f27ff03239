//! A step's record, gathered from live objects and appended: the part of every step that all of training waits for.
//!
//! Touches: the run's journal; live generators and optimizers, read only. It runs once a step, after the step's own work
//! has emptied the processor's caches, where a line of Python costs a microsecond and a line here next to nothing.

use std::collections::{HashMap, VecDeque};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyType};
use unbroken::Error;
use unbroken::format::journal::Component;
use unbroken::journal::Boundary;

use crate::batch::BatchReader;
use crate::error;
use crate::generators::GeneratorReader;
use crate::run::{Difference, Run, component_from_python};

/// What a generator is called that stands where it stood before the first step.
const UNTOUCHED: &str = "untouched";

/// Gathers what belongs to the step that is under way, and appends its record.
#[pyclass(module = "unbroken._core")]
pub(crate) struct Recorder {
    run: Py<Run>,
    generators: Py<GeneratorReader>,
    batches: Py<BatchReader>,
    full: bool,
    tensor: Py<PyType>,
    /// Digest of each generator before the first step.
    origins: HashMap<String, Vec<u8>>,
    optimizers: Vec<Optimizer>,
    /// What was handed out for the step; None between steps.
    handed_out: Option<Vec<(String, Component)>>,
    logged: Vec<(String, Component)>,
    /// Records that could not be appended, in order.
    unwritten: VecDeque<Boundary>,
}

struct Optimizer {
    name: String,
    live: Py<PyAny>,
    /// Component names of its groups' learning rates, as many as were needed so far.
    rates: Vec<String>,
}

#[pymethods]
impl Recorder {
    #[new]
    #[pyo3(signature = (run, *, generators, batches, full, tensor))]
    fn new(
        run: Py<Run>,
        generators: Py<GeneratorReader>,
        batches: Py<BatchReader>,
        full: bool,
        tensor: Py<PyType>,
    ) -> Self {
        Recorder {
            run,
            generators,
            batches,
            full,
            tensor,
            origins: HashMap::new(),
            optimizers: Vec::new(),
            handed_out: None,
            logged: Vec::new(),
            unwritten: VecDeque::new(),
        }
    }

    fn set_origins(&mut self, origins: HashMap<String, Vec<u8>>) {
        self.origins = origins;
    }

    fn set_optimizers(&mut self, optimizers: Vec<(String, Py<PyAny>)>) {
        let entries = optimizers.into_iter().map(|(name, live)| Optimizer {
            name,
            live,
            rates: Vec::new(),
        });
        self.optimizers = entries.collect();
    }

    #[getter]
    fn in_step(&self) -> bool {
        self.handed_out.is_some()
    }

    fn begin_step(
        &mut self,
        indices: Option<&Bound<'_, PyBytes>>,
        batch: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let digest = self.batches.borrow_mut(batch.py()).read(batch, self.full)?;
        if let Some(digest) = &digest {
            self.hand_out(indices, digest);
        }
        Ok(digest.is_some())
    }

    fn begin_digested_step(&mut self, indices: Option<&Bound<'_, PyBytes>>, batch: &[u8]) {
        self.hand_out(indices, batch);
    }

    fn log<'py>(
        &mut self,
        name: &Bound<'py, PyString>,
        value: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let number = self.number(value)?;
        if let Some(number) = &number {
            self.put(name, number)?;
        }
        Ok(number)
    }

    fn log_component(&mut self, name: &Bound<'_, PyString>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        self.put(name, value)
    }

    fn forget_logged(&mut self) {
        self.logged.clear();
    }

    fn record(
        &mut self,
        py: Python<'_>,
        step: u64,
        phase: u8,
        epoch: u64,
        position: u64,
        state: &Bound<'_, PyList>,
    ) -> PyResult<Option<Difference>> {
        let mut components = self.handed_out.take().unwrap_or_default();
        self.add_generators(py, &mut components)?;
        self.add_rates(py, &mut components)?;
        components.append(&mut self.logged);
        for pair in state.iter() {
            let (name, value): (String, Bound<'_, PyAny>) = pair.extract()?;
            let component = component_from_python(&name, &value)?;
            components.push((name, component));
        }
        let boundary = Boundary::new(step, phase, epoch, position, components);
        self.unwritten.push_back(boundary);
        self.write(py)
    }

    #[getter]
    fn unwritten(&self) -> usize {
        self.unwritten.len()
    }

    /// Appends what is unwritten, up to and including the first record that differs from an earlier life's.
    fn write(&mut self, py: Python<'_>) -> PyResult<Option<Difference>> {
        while let Some(boundary) = self.unwritten.front() {
            let outcome = self.run.get().append(boundary);
            // What the disk did not take it may take later; what is wrong stays wrong.
            if !matches!(outcome, Err(Error::Io { .. })) {
                self.unwritten.pop_front();
            }
            match outcome.map_err(|failure| error::raise(py, &failure))? {
                None => {}
                difference => return Ok(difference),
            }
        }
        Ok(None)
    }
}

impl Recorder {
    fn hand_out(&mut self, indices: Option<&Bound<'_, PyBytes>>, batch: &[u8]) {
        let part = |name: &str, digest: &[u8]| (name.to_owned(), Component::Digest(digest.to_vec()));
        let mut handed_out = Vec::with_capacity(16);
        handed_out.extend(indices.map(|digest| part("data/indices", digest.as_bytes())));
        handed_out.push(part("data/batch", batch));
        self.handed_out = Some(handed_out);
    }

    /// A value as the number that a journal holds, if it is one.
    fn number<'py>(&self, value: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = value.py();
        let value = if value.get_type().is(&self.tensor) {
            let numel: u64 = value.call_method0(intern!(py, "numel"))?.extract()?;
            if numel != 1 {
                return Ok(None);
            }
            value.call_method0(intern!(py, "item"))?
        } else {
            value.clone()
        };
        if value.is_exact_instance_of::<PyBool>() {
            let number = i64::from(value.is_truthy()?);
            return Ok(Some(number.into_pyobject(py)?.into_any()));
        }
        let known = value.is_exact_instance_of::<PyFloat>() || value.is_exact_instance_of::<PyInt>();
        Ok(known.then_some(value))
    }

    fn put(&mut self, name: &Bound<'_, PyString>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let name = format!("log/{}", name.to_str()?);
        let component = component_from_python(&name, value)?;
        self.logged.push((name, component));
        Ok(())
    }

    fn add_generators(&self, py: Python<'_>, components: &mut Vec<(String, Component)>) -> PyResult<()> {
        for (name, digest) in GeneratorReader::read(self.generators.bind(py))? {
            let name = name.to_str()?.to_owned();
            // A generator that nobody seeded and nobody draws from differs from run to run, and means nothing.
            let untouched = self.origins.get(&name).is_some_and(|origin| *origin == digest);
            let component = if untouched {
                Component::Text(UNTOUCHED.to_owned())
            } else {
                Component::Digest(digest.to_vec())
            };
            components.push((name, component));
        }
        Ok(())
    }

    fn add_rates(&mut self, py: Python<'_>, components: &mut Vec<(String, Component)>) -> PyResult<()> {
        for optimizer in &mut self.optimizers {
            let groups = optimizer.live.bind(py).getattr(intern!(py, "param_groups"))?;
            for (index, group) in groups.try_iter()?.enumerate() {
                if optimizer.rates.len() == index {
                    optimizer.rates.push(format!("lr/{}/{index}", optimizer.name));
                }
                let group = group?;
                let Some(rate) = group.cast::<PyDict>()?.get_item(intern!(py, "lr"))? else {
                    continue;
                };
                if rate.is_none() {
                    continue;
                }
                // A rate may be a tensor: what counts is its number.
                let rate: f64 = match rate.cast::<PyFloat>() {
                    Ok(rate) => rate.value(),
                    Err(_) => rate.call_method0(intern!(py, "__float__"))?.extract()?,
                };
                components.push((optimizer.rates[index].clone(), Component::Float(rate.to_bits())));
            }
        }
        Ok(())
    }
}
