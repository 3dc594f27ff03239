//! The extension module `unbroken._core`: values, runs and errors converted between Python and the core, and what runs
//! once a step. Decisions are the core's; Python holds what must touch live objects.
//!
//! Touches: Python objects, and memory that Python lends it as (address, length in bytes). Readers keep to live
//! generators, batches and state what Python told them once, so that a step's record is made without Python code
//! ([`step`], [`generators`], [`batch`], [`watched`]). What each name promises is in `python/unbroken/_core.pyi`.

mod batch;
mod checkpoint;
mod dlpack;
mod entries;
mod error;
mod generators;
mod indices;
mod key;
mod leaf;
mod memory;
mod method;
mod names;
mod notes;
mod run;
mod scatter;
mod states;
mod step;
mod storages;
mod value;
mod versions;
mod watched;

/// The border between Python and the Rust core.
#[pyo3::pymodule(name = "_core")]
mod module {
    use std::ffi::OsString;
    use std::io;

    use pyo3::prelude::*;
    use pyo3::types::{PyBytes, PyDict};
    use unbroken::format;

    use crate::error;
    use crate::value::{from_python, to_python};

    #[pymodule_export]
    use crate::batch::BatchReader;
    #[pymodule_export]
    use crate::checkpoint::{Checkpoint, CheckpointInfo};
    #[pymodule_export]
    use crate::entries::Entries;
    #[pymodule_export]
    use crate::generators::GeneratorReader;
    #[pymodule_export]
    use crate::indices::IndexLog;
    #[pymodule_export]
    use crate::key::{Order, derive_key};
    #[pymodule_export]
    use crate::leaf::{Object, Tensor};
    #[pymodule_export]
    use crate::memory::{Memory, copy_memory, digest_bytes, digest_memory};
    #[pymodule_export]
    use crate::names::Names;
    #[pymodule_export]
    use crate::run::{Difference, Run, open_checkpoint, read_checkpoint, read_journal};
    #[pymodule_export]
    use crate::states::{NameList, States};
    #[pymodule_export]
    use crate::step::Recorder;
    #[pymodule_export]
    use crate::storages::{Lent, Regions, TensorReader};
    #[pymodule_export]
    use crate::versions::Versions;
    #[pymodule_export]
    use crate::watched::WatchedMemory;

    /// Return the canonical bytes of a value.
    #[pyfunction]
    fn encode<'py>(value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let py = value.py();
        let bytes = format::value::encode(&from_python(value)?)
            .map_err(|flaw| error::invalid(py, flaw.to_string()))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Return the value of canonical bytes.
    #[pyfunction]
    fn decode<'py>(data: &Bound<'py, PyBytes>) -> PyResult<Bound<'py, PyAny>> {
        let py = data.py();
        let value = format::value::decode(data.as_bytes()).map_err(|flaw| error::raise(py, &flaw.into()))?;
        to_python(py, &value)
    }

    /// Return the BLAKE3 digest (32 bytes) of a value's canonical bytes.
    #[pyfunction]
    fn digest_value<'py>(value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let py = value.py();
        let digest = format::value::digest_value(&from_python(value)?)
            .map_err(|flaw| error::invalid(py, flaw.to_string()))?;
        Ok(PyBytes::new(py, &digest.0))
    }

    /// Run the command-line program on arguments (without its own name); return its exit code.
    #[pyfunction]
    fn main(py: Python<'_>, mut arguments: Vec<OsString>) -> i32 {
        arguments.insert(0, "unbroken".into());
        py.detach(|| unbroken_cli::run(&arguments, &mut io::stdout().lock(), &mut io::stderr()))
    }

    /// Return what this extension module was built from and for.
    #[pyfunction]
    fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
        let info = PyDict::new(py);
        info.set_item("version", env!("CARGO_PKG_VERSION"))?;
        info.set_item("format", format::FORMAT_VERSION.to_string())?;
        info.set_item(
            "profile",
            if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
        )?;
        info.set_item(
            "target",
            format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        )?;
        Ok(info)
    }
}
