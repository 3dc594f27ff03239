//! What a tensor is, asked of its framework through DLPack's table of C functions: no Python objects in between.
//!
//! Touches: the tensor that it is asked about, which is only read. The layout of these structs is DLPack's, version 1
//! (dmlc/dlpack, `dlpack.h`); a table of another version is left alone.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::slice;

use pyo3::prelude::*;
use pyo3::types::PyCapsule;

const VERSION: u32 = 1;
const CPU: i32 = 1;

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    dimensions: i32,
    dtype: Dtype,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct Dtype {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct Table {
    major: u32,
    minor: u32,
    older: *const Table,
    allocate: *const c_void,
    managed_from_object: *const c_void,
    managed_to_object: *const c_void,
    tensor_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int>,
    current_stream: *const c_void,
}

/// Asks one framework about its tensors.
pub(crate) struct Exchange {
    ask: unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int,
}

/// A dense or strided tensor on the CPU, of a usual dtype; valid while nobody changes the tensor.
pub(crate) struct View<'a> {
    pub(crate) address: usize,
    pub(crate) dtype: &'static str,
    pub(crate) element_bytes: u64,
    pub(crate) shape: &'a [i64],
    pub(crate) strides: &'a [i64],
}

impl Exchange {
    /// Reads a tensor class's `__dlpack_c_exchange_api__`; None where neither it nor an older table behind it is of the
    /// version that is known here.
    pub(crate) fn of(capsule: &Bound<'_, PyCapsule>) -> PyResult<Option<Self>> {
        let table = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?;
        let mut table: *const Table = table.cast().as_ptr();
        // SAFETY: a capsule of that name holds such a table, which lives as long as the process. Its first fields, up to
        // the older table, are the same in every version; the others are read in a table of the known one only.
        while let Some(found) = unsafe { table.as_ref() } {
            if found.major == VERSION {
                return Ok(found.tensor_from_object.map(|ask| Exchange { ask }));
            }
            table = found.older;
        }
        Ok(None)
    }

    /// Looks at an instance of the class; None for what is elsewhere than on the CPU, has no strides, or another dtype.
    pub(crate) fn view<'a>(&self, tensor: &'a Bound<'_, PyAny>) -> Option<View<'a>> {
        let mut found = MaybeUninit::<Tensor>::uninit();
        // SAFETY: the function is the tensor's own framework's, and is called with the GIL held, as it must be.
        if unsafe { (self.ask)(tensor.as_ptr().cast(), found.as_mut_ptr()) } != 0 {
            PyErr::take(tensor.py()); // Whoever reads such tensors on the long way says what is wrong with them.
            return None;
        }
        // SAFETY: on success it has been filled.
        let found = unsafe { found.assume_init() };
        if found.device_type != CPU || found.dtype.lanes != 1 {
            return None;
        }
        let dtype = match (found.dtype.code, found.dtype.bits) {
            (0, 8) => "int8",
            (0, 16) => "int16",
            (0, 32) => "int32",
            (0, 64) => "int64",
            (1, 8) => "uint8",
            (2, 16) => "float16",
            (2, 32) => "float32",
            (2, 64) => "float64",
            (4, 16) => "bfloat16",
            (5, 64) => "complex64",
            (5, 128) => "complex128",
            (6, 8) => "bool",
            _ => return None,
        };
        let dimensions = usize::try_from(found.dimensions).ok()?;
        let numbers = |at: *const i64| {
            if dimensions == 0 {
                return Some(&[][..]);
            }
            // SAFETY: there are as many numbers as dimensions, in the tensor itself.
            (!at.is_null()).then(|| unsafe { slice::from_raw_parts(at, dimensions) })
        };
        Some(View {
            address: (found.data as usize).checked_add(usize::try_from(found.byte_offset).ok()?)?,
            dtype,
            element_bytes: u64::from(found.dtype.bits / 8),
            shape: numbers(found.shape)?,
            strides: numbers(found.strides)?,
        })
    }
}

impl View<'_> {
    /// Whether there is more to its elements than DLPack says: complex ones may be conjugated when they are read, and
    /// integers of a few bits pass for those of 8.
    pub(crate) fn is_ambiguous(&self) -> bool {
        matches!(self.dtype, "complex64" | "complex128" | "int8" | "uint8")
    }

    /// How many bytes its elements are, where they lie one after the other. The stride of a single element is never
    /// used and may be anything.
    pub(crate) fn dense_bytes(&self) -> Option<usize> {
        let mut expected = 1i64;
        for (&extent, &stride) in self.shape.iter().zip(self.strides).rev() {
            if extent != 1 && stride != expected {
                return None;
            }
            expected = expected.checked_mul(extent)?;
        }
        usize::try_from(expected)
            .ok()?
            .checked_mul(usize::try_from(self.element_bytes).ok()?)
    }
}
