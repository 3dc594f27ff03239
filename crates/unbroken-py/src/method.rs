//! Methods of C classes that take no arguments, called without making a bound method each time.
//!
//! Touches: whatever the method does. Of each it is found out once what CPython calls; where that is not a plain C
//! function of the object alone, the usual way is taken.

use std::sync::OnceLock;

use pyo3::ffi;
use pyo3::prelude::*;

/// One method, of instances of one class and of classes that inherit it.
pub(crate) struct Method {
    name: &'static str,
    function: OnceLock<Option<ffi::PyCFunction>>,
}

impl Method {
    pub(crate) const fn new(name: &'static str) -> Self {
        Method {
            name,
            function: OnceLock::new(),
        }
    }

    /// Calls it. Every instance that this is ever called with has the method of the first one.
    pub(crate) fn call<'py>(&self, instance: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let function = match self.function.get() {
            Some(function) => *function,
            None => {
                let function = function_of(&instance.getattr(self.name)?, instance);
                *self.function.get_or_init(|| function)
            }
        };
        let Some(function) = function else {
            return instance.call_method0(self.name);
        };
        // SAFETY: it is what CPython calls for a method without arguments: with the instance and null, the GIL held. It
        // returns a new reference, or null with an error set.
        unsafe {
            Bound::from_owned_ptr_or_err(instance.py(), function(instance.as_ptr(), std::ptr::null_mut()))
        }
    }
}

/// The C function that a bound method is; None where it is anything else than one of its object alone.
fn function_of(method: &Bound<'_, PyAny>, instance: &Bound<'_, PyAny>) -> Option<ffi::PyCFunction> {
    // SAFETY: the object is asked for what it is only once it is seen to be a C function; the GIL is held.
    unsafe {
        let method = method.as_ptr();
        if ffi::PyCFunction_CheckExact(method) == 0
            || ffi::PyCFunction_GetFlags(method) != ffi::METH_NOARGS
            || ffi::PyCFunction_GetSelf(method) != instance.as_ptr()
        {
            return None;
        }
        ffi::PyCFunction_GetFunction(method)
    }
}
