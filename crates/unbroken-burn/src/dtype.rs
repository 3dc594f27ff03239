//! Burn's element types by the names that checkpoints use, and tensors between the two.
//!
//! Touches: nothing.

use burn::tensor::{BoolStore, Bytes, DType, TensorData};
use unbroken::train::TensorView;
use unbroken::{Error, Result};

const NAMES: [(DType, &str); 16] = [
    (DType::F64, "float64"),
    (DType::F32, "float32"),
    (DType::Flex32, "flex32"),
    (DType::F16, "float16"),
    (DType::BF16, "bfloat16"),
    (DType::I64, "int64"),
    (DType::I32, "int32"),
    (DType::I16, "int16"),
    (DType::I8, "int8"),
    (DType::U64, "uint64"),
    (DType::U32, "uint32"),
    (DType::U16, "uint16"),
    (DType::U8, "uint8"),
    (DType::Bool(BoolStore::Native), "bool"),
    (DType::Bool(BoolStore::U8), "bool_u8"),
    (DType::Bool(BoolStore::U32), "bool_u32"),
];

/// Name of an element type.
pub(crate) fn name(dtype: DType, of: &str) -> Result<&'static str> {
    let found = NAMES.iter().find(|(known, _)| *known == dtype);
    found.map(|(_, name)| *name).ok_or_else(|| Error::Unsupported {
        what: format!("the type {dtype:?} of `{of}`"),
    })
}

/// A shape as checkpoints have it.
pub(crate) fn sizes(shape: &[usize]) -> Vec<u64> {
    shape.iter().map(|size| *size as u64).collect()
}

/// The element type of a name.
pub(crate) fn of(name: &str, tensor: &str) -> Result<DType> {
    let found = NAMES.iter().find(|(_, known)| *known == name);
    let missing = || Error::Unsupported {
        what: format!("the type {name} of `{tensor}`"),
    };
    found.map(|(dtype, _)| *dtype).ok_or_else(missing)
}

/// A tensor of a checkpoint as Burn's data.
pub(crate) fn data(tensor: TensorView, name: &str) -> Result<TensorData> {
    let dtype = of(&tensor.dtype, name)?;
    let shape: Vec<usize> = tensor.shape.iter().map(|size| *size as usize).collect();
    Ok(TensorData::from_bytes(
        Bytes::from_bytes_vec(tensor.bytes),
        shape,
        dtype,
    ))
}

/// Burn's buffer as bytes to be written.
pub(crate) struct Raw(pub Bytes);

impl AsRef<[u8]> for Raw {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
