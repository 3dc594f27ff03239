//! A run on disk as Python holds it, and what can be read of one without holding it.
//!
//! Touches: the run directory; memory that Python lends for the length of a commit, or until the fence of a save.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple};
use unbroken::Digest;
use unbroken::format::journal::Component;
use unbroken::journal::{self, Boundary};
use unbroken::run::{self, Options};
use unbroken::saver::{Outcome, Region, Save, Saver, Terms};
use unbroken::state::Value;
use unbroken::store::{Best, Commit, Compression, Order, Retention, Tuning};

use crate::checkpoint::{Checkpoint, CheckpointInfo, opened_into, pairs};
use crate::error;
use crate::memory::{check_region, look_at, regions_from_python};
use crate::storages::Lent;
use crate::value::{fields_from_python, from_python};

/// The first component in which a step executed again differs from the journal.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct Difference {
    difference: journal::Difference,
}

#[pymethods]
impl Difference {
    #[getter]
    fn step(&self) -> u64 {
        self.difference.step
    }

    #[getter]
    fn phase(&self) -> u8 {
        self.difference.phase
    }

    #[getter]
    fn component(&self) -> &str {
        &self.difference.component
    }

    #[getter]
    fn expected(&self) -> &str {
        &self.difference.expected
    }

    #[getter]
    fn found(&self) -> &str {
        &self.difference.found
    }

    fn __repr__(&self) -> String {
        let found = &self.difference;
        format!(
            "Difference(step={}, phase={}, component={:?}, expected={:?}, found={:?})",
            found.step, found.phase, found.component, found.expected, found.found
        )
    }
}

/// A boundary: step and phase.
type Place = (u64, u8);

/// A run on disk, held by one writer: directory, lock, journal and store.
#[pyclass(frozen, module = "unbroken._core")]
pub(crate) struct Run {
    run: Arc<run::Run>,
    saver: Saver,
}

#[pymethods]
impl Run {
    #[staticmethod]
    #[pyo3(signature = (path, *, seed, settings, strict = false, compress = None, memory = None))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        seed: Option<u64>,
        settings: &Bound<'_, PyAny>,
        strict: bool,
        compress: Option<&str>,
        memory: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let options = Options {
            seed,
            settings: fields_from_python(settings)?,
            strict,
            tuning: Tuning {
                compression: compression(py, compress)?,
                ..Tuning::default()
            },
        };
        let run = opened_into(py, memory, |lend| run::Run::open_into(&path, &options, lend))?;
        let run = Arc::new(run);
        Ok(Run {
            saver: Saver::new(Arc::clone(&run)),
            run,
        })
    }

    #[pyo3(signature = (compress))]
    fn set_compression(&self, py: Python<'_>, compress: Option<&str>) -> PyResult<()> {
        let compression = compression(py, compress)?;
        py.detach(|| self.run.set_compression(compression));
        Ok(())
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.run.path().to_owned()
    }

    #[getter]
    fn id(&self) -> &str {
        self.run.id()
    }

    #[getter]
    fn seed(&self) -> u64 {
        self.run.seed()
    }

    #[getter]
    fn life(&self) -> u32 {
        self.run.life()
    }

    #[getter]
    fn resumed_from(&self) -> Option<Checkpoint> {
        self.run.resumed_from().cloned().map(Checkpoint::of)
    }

    #[getter]
    fn rejected<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        pairs(py, self.run.rejected())
    }

    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.run.warnings().to_vec()
    }

    fn take_notices(&self) -> Vec<String> {
        self.run.take_notices()
    }

    #[pyo3(signature = (*, least, most, memory = None))]
    fn put_on_trial(
        &self,
        py: Python<'_>,
        least: u64,
        most: u64,
        memory: Option<Py<PyAny>>,
    ) -> PyResult<Option<(Place, Place)>> {
        let extent = run::Extent { least, most };
        let trial = opened_into(py, memory, |lend| self.run.put_on_trial_into(extent, lend))?;
        Ok(trial.map(|trial| (trial.from, trial.until)))
    }

    fn begin(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.run.begin())
            .map_err(|failure| error::raise(py, &failure))
    }

    // Keeps the GIL: a record takes a few microseconds, and giving the GIL back may cost a switch interval.
    fn record(
        &self,
        py: Python<'_>,
        step: u64,
        phase: u8,
        epoch: u64,
        position: u64,
        components: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Difference>> {
        let components = components_from_python(components)?;
        self.append(&Boundary::new(step, phase, epoch, position, components))
            .map_err(|failure| error::raise(py, &failure))
    }

    fn event(&self, py: Python<'_>, kind: &str, step: u64, fields: &Bound<'_, PyAny>) -> PyResult<()> {
        let fields = fields_from_python(fields)?;
        self.run
            .event(kind, step, fields)
            .map_err(|failure| error::raise(py, &failure))
    }

    #[getter]
    fn recorded_until(&self) -> u64 {
        self.run.recorded_until()
    }

    #[pyo3(signature = (*, storages, **boundary))]
    fn commit(
        &self,
        py: Python<'_>,
        storages: &Bound<'_, PyAny>,
        boundary: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<CheckpointInfo> {
        let regions = match storages.cast::<Lent>() {
            Ok(lent) => lent
                .get()
                .regions
                .iter()
                .map(|region| (region.address, region.length))
                .collect(),
            Err(_) => regions_from_python(storages)?,
        };
        let described = Described::from_keywords(boundary)?;
        let commit = Commit {
            step: described.step,
            phase: described.phase,
            tree: described.tree,
            // SAFETY: the caller of the Python function keeps the memory alive and unchanged until it returns.
            storages: regions
                .iter()
                .map(|&(address, length)| unsafe { look_at(address, length) })
                .collect(),
            identity: described.identity,
            environment: described.environment,
            metrics: described.metrics,
            pinned: described.pinned,
        };
        let info = py
            .detach(|| self.saver.commit(commit))
            .map_err(|failure| error::raise(py, &failure))?;
        Ok(CheckpointInfo::of(info))
    }

    #[pyo3(signature = (*, storages, keep = None, full = false, lent_for_s = None, confirm = None, **boundary))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn save(
        &self,
        py: Python<'_>,
        storages: &Bound<'_, PyAny>,
        keep: Option<Keep>,
        full: bool,
        lent_for_s: Option<f64>,
        confirm: Option<Py<PyAny>>,
        boundary: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let regions = lendable_from_python(storages)?;
        let described = Described::from_keywords(boundary)?;
        let save = Save {
            step: described.step,
            phase: described.phase,
            tree: described.tree,
            identity: described.identity,
            environment: described.environment,
            metrics: described.metrics,
            pinned: described.pinned,
            keep: keep.map(|keep| retention(py, keep)).transpose()?,
        };
        let confirm = confirm.map(|asked| -> Box<dyn FnOnce() -> bool + Send> {
            Box::new(move || Python::attach(|py| confirmed(py, asked)))
        });
        let terms = Terms {
            full,
            lent_for: lent_for_s.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
            confirm,
        };
        // SAFETY: the caller of the Python function keeps the memory until the fence (`_core.pyi`); what is not lent is
        // copied before this returns.
        py.detach(|| unsafe { self.saver.start(save, &regions, terms) })
            .map_err(|failure| error::raise(py, &failure))
    }

    fn know(&self, storages: Vec<(usize, usize, [u8; 32])>) {
        let known = storages.into_iter();
        self.saver
            .know(known.map(|(address, length, digest)| ((address, length), Digest(digest))));
    }

    fn fence(&self, py: Python<'_>) {
        py.detach(|| self.saver.fence());
    }

    #[pyo3(signature = (*, wait))]
    fn outcome<'py>(
        &self,
        py: Python<'py>,
        wait: bool,
    ) -> PyResult<Option<(&'static str, Bound<'py, PyAny>)>> {
        let outcome = if wait {
            py.detach(|| self.saver.wait())
        } else {
            self.saver.outcome()
        };
        match outcome {
            None => Ok(None),
            Some(Outcome::Saved(info)) => {
                let info = CheckpointInfo::of(info).into_bound_py_any(py)?;
                Ok(Some(("saved", info)))
            }
            Some(Outcome::Torn { step }) => Ok(Some(("torn", step.into_bound_py_any(py)?))),
            Some(Outcome::Stirred { step }) => Ok(Some(("stirred", step.into_bound_py_any(py)?))),
            Some(Outcome::Failed { error, .. }) => Err(error::raise(py, &error)),
        }
    }

    #[pyo3(signature = (*, last, every, best, dry_run = false))]
    fn prune(
        &self,
        py: Python<'_>,
        last: Option<usize>,
        every: Option<u64>,
        best: Option<(String, String, usize)>,
        dry_run: bool,
    ) -> PyResult<Vec<String>> {
        let policy = retention(py, (last, every, best))?;
        py.detach(|| self.run.prune(&policy, dry_run))
            .map_err(|failure| error::raise(py, &failure))
    }

    fn checkpoints(&self) -> Vec<CheckpointInfo> {
        self.run
            .checkpoints()
            .into_iter()
            .map(CheckpointInfo::of)
            .collect()
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            self.saver.wait();
            self.run.close()
        })
        .map_err(|failure| error::raise(py, &failure))
    }

    fn __repr__(&self) -> String {
        format!(
            "Run('{}', id='{}', life={})",
            self.run.path().display(),
            self.run.id(),
            self.run.life()
        )
    }
}

impl Run {
    /// Appends one record, and compares it with what earlier lives recorded.
    pub(crate) fn append(&self, boundary: &Boundary) -> unbroken::Result<Option<Difference>> {
        let difference = self.run.record_boundary(boundary)?;
        Ok(difference.map(|difference| Difference { difference }))
    }
}

fn compression(py: Python<'_>, name: Option<&str>) -> PyResult<Compression> {
    match name {
        None => Ok(Compression::None),
        Some("alone") => Ok(Compression::Alone),
        Some("differences") => Ok(Compression::Differences),
        Some(other) => {
            let what = format!("compress must be None, 'alone' or 'differences', got '{other}'");
            Err(error::invalid(py, what))
        }
    }
}

/// Reads what a capture tells of its storages, or (address, length in bytes, lent) of each.
fn lendable_from_python<'a>(storages: &'a Bound<'_, PyAny>) -> PyResult<Cow<'a, [Region]>> {
    if let Ok(lent) = storages.cast::<Lent>() {
        return Ok(Cow::Borrowed(&lent.get().regions)); // Each was checked when it was added.
    }
    let regions: Vec<(usize, usize, bool)> = storages.extract()?;
    let regions = regions.into_iter().map(|(address, length, lent)| {
        check_region(storages.py(), address, length).map(|()| Region {
            address,
            length,
            lent,
            unmoved: false,
        })
    });
    regions.collect::<PyResult<Vec<Region>>>().map(Cow::Owned)
}

/// What is kept: the newest, every so many steps, the best of one metric.
type Keep = (Option<usize>, Option<u64>, Option<(String, String, usize)>);

fn retention(py: Python<'_>, (last, every, best): Keep) -> PyResult<Retention> {
    let best = match best {
        None => None,
        Some((metric, order, count)) => {
            let order = match order.as_str() {
                "min" => Order::Min,
                "max" => Order::Max,
                _ => {
                    return Err(error::invalid(
                        py,
                        format!("`{order}` is neither `min` nor `max`"),
                    ));
                }
            };
            Some(Best { metric, order, count })
        }
    };
    Ok(Retention { last, every, best })
}

/// Asks whether lent memory is known to have changed; no where asking fails.
fn confirmed(py: Python<'_>, asked: Py<PyAny>) -> bool {
    match asked.call0(py).and_then(|answer| answer.extract(py)) {
        Ok(answer) => answer,
        Err(error) => {
            error.write_unraisable(py, Some(asked.bind(py)));
            false
        }
    }
}

/// Open a checkpoint for reading, without a lock: a manifest's path, or a run directory (its newest whole one).
#[pyfunction]
#[pyo3(signature = (path, *, memory = None))]
pub(crate) fn read_checkpoint(
    py: Python<'_>,
    path: PathBuf,
    memory: Option<Py<PyAny>>,
) -> PyResult<Checkpoint> {
    let checkpoint = if memory.is_some() {
        opened_into(py, memory, |lend| run::read_checkpoint_into(&path, lend))?
    } else {
        py.detach(|| run::read_checkpoint(&path))
            .map_err(|failure| error::raise(py, &failure))?
    };
    Ok(Checkpoint::of(checkpoint))
}

/// Open a checkpoint for reading some of its tensors; none is read before it is asked for.
#[pyfunction]
pub(crate) fn open_checkpoint(py: Python<'_>, path: PathBuf) -> PyResult<Checkpoint> {
    let checkpoint = py
        .detach(|| run::open_checkpoint(&path))
        .map_err(|failure| error::raise(py, &failure))?;
    Ok(Checkpoint::of(checkpoint))
}

/// Return the joined journal of a run directory, one dict a boundary.
#[pyfunction]
pub(crate) fn read_journal(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyList>> {
    let journal = py
        .detach(|| run::read_journal(&path))
        .map_err(|failure| error::raise(py, &failure))?;
    let boundaries: Vec<Bound<'_, PyDict>> = journal
        .boundaries
        .iter()
        .map(|boundary| boundary_to_python(py, boundary))
        .collect::<PyResult<_>>()?;
    PyList::new(py, boundaries)
}

fn boundary_to_python<'py>(py: Python<'py>, boundary: &journal::Boundary) -> PyResult<Bound<'py, PyDict>> {
    let components = PyDict::new(py);
    for (name, component) in &boundary.components {
        match component {
            Component::Digest(digest) => components.set_item(name, PyBytes::new(py, digest))?,
            Component::Int(number) => components.set_item(name, number)?,
            Component::Float(bits) => components.set_item(name, f64::from_bits(*bits))?,
            Component::Text(text) => components.set_item(name, text)?,
        }
    }
    let out = PyDict::new(py);
    out.set_item("step", boundary.step)?;
    out.set_item("phase", boundary.phase)?;
    out.set_item("epoch", boundary.epoch)?;
    out.set_item("position", boundary.position)?;
    out.set_item("components", components)?;
    out.set_item("lives", &boundary.lives)?;
    Ok(out)
}

fn components_from_python(components: &Bound<'_, PyAny>) -> PyResult<Vec<(String, Component)>> {
    let components: Vec<Bound<'_, PyAny>> = match components.cast_exact::<PyList>() {
        Ok(list) => list.iter().collect(),
        Err(_) => components.try_iter()?.collect::<PyResult<_>>()?,
    };
    components
        .iter()
        .map(|pair| {
            let pair = pair.cast::<PyTuple>()?;
            let (name, value) = (pair.get_item(0)?, pair.get_item(1)?);
            let name = name.cast::<PyString>()?.to_str()?.to_owned();
            let component = component_from_python(&name, &value)?;
            Ok((name, component))
        })
        .collect()
}

/// Reads one component. Subclasses are welcome here (numpy's float64 is one of float): only their number counts.
pub(crate) fn component_from_python(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Component> {
    if let Ok(digest) = value.cast::<PyBytes>() {
        return Ok(Component::Digest(digest.as_bytes().to_vec()));
    }
    if let Ok(number) = value.cast::<PyFloat>() {
        return Ok(Component::Float(number.value().to_bits()));
    }
    if value.is_instance_of::<PyInt>() {
        let too_large = |_| {
            error::invalid(
                value.py(),
                format!("the component `{name}` does not fit in 64 bits"),
            )
        };
        return value.extract().map(Component::Int).map_err(too_large);
    }
    if let Ok(text) = value.cast::<PyString>() {
        return Ok(Component::Text(text.to_str()?.to_owned()));
    }
    let kind = value.get_type().qualname()?;
    Err(error::unsupported_state(
        value.py(),
        name,
        &kind.to_string(),
        Some("a component is bytes, an int, a float or a str"),
    ))
}

/// What a checkpoint holds besides its storages, as `commit` and `save` are both told it.
struct Described {
    step: u64,
    phase: u8,
    tree: Value,
    identity: Vec<(String, Value)>,
    environment: Vec<(String, Value)>,
    metrics: Vec<(String, f64)>,
    pinned: bool,
}

impl Described {
    /// Reads keyword arguments; one that is missing or not known is a TypeError that names it.
    fn from_keywords(keywords: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        const KNOWN: [&str; 7] = [
            "step",
            "phase",
            "tree",
            "identity",
            "environment",
            "metrics",
            "pinned",
        ];
        let missing = |name: &str| PyTypeError::new_err(format!("missing keyword argument {name:?}"));
        let Some(keywords) = keywords else {
            return Err(missing(KNOWN[0]));
        };
        for name in keywords.keys() {
            let name: String = name.extract()?;
            if !KNOWN.contains(&name.as_str()) {
                return Err(PyTypeError::new_err(format!(
                    "unexpected keyword argument {name:?}"
                )));
            }
        }
        let find = |name: &str| keywords.get_item(name)?.ok_or_else(|| missing(name));
        let pinned = keywords.get_item("pinned")?;
        Ok(Described {
            step: find("step")?.extract()?,
            phase: find("phase")?.extract()?,
            tree: from_python(&find("tree")?)?,
            identity: fields_from_python(&find("identity")?)?,
            environment: fields_from_python(&find("environment")?)?,
            metrics: metrics_from_python(&find("metrics")?)?,
            pinned: pinned.map_or(Ok(false), |pinned| pinned.extract())?,
        })
    }
}

fn metrics_from_python(metrics: &Bound<'_, PyAny>) -> PyResult<Vec<(String, f64)>> {
    metrics.cast::<PyMapping>()?.items()?.extract()
}
