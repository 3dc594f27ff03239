//! The pack header: packs are valid `.safetensors` files, and this lays them out.
//!
//! Touches: nothing.

use crate::digest::Digest;
use crate::format::Flaw;

/// One storage as a pack shows it to readers of `.safetensors`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackTensor {
    /// Its name in the pack, unique there; usually the path of the first leaf that views it.
    pub name: String,
    /// Element type by its safetensors name, such as `F32`.
    pub dtype: String,
    /// Size of each dimension, in elements.
    pub shape: Vec<u64>,
}

/// A pack's header and where each tensor goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackLayout {
    /// Header bytes: the file's first bytes, a multiple of 64.
    pub header: Vec<u8>,
    /// BLAKE3 of `header`.
    pub header_digest: Digest,
    /// First byte of each tensor counted from the start of the file, in the order the tensors were given.
    pub offsets: Vec<u64>,
    /// Indices of the tensors in the order in which their bytes follow the header, without gaps.
    pub order: Vec<usize>,
    /// Length of the whole file in bytes.
    pub length: u64,
}

/// A tensor found in a pack's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedTensor {
    /// What it is.
    pub tensor: PackTensor,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Lays a pack out: largest elements first, so that every tensor is aligned for its element type.
///
/// # Errors
///
/// [`Flaw::Malformed`] where names repeat, a dtype is unknown or a shape's size does not fit; [`Flaw::Limit`].
pub fn plan(tensors: &[PackTensor]) -> Result<PackLayout, Flaw> {
    let _ = tensors;
    unimplemented!()
}

/// How a storage of `length` bytes appears in a pack: as a tensor of its own dtype and shape where it is exactly one
/// contiguous tensor of a dtype that safetensors has, else as `length` bytes.
pub fn describe(name: String, length: u64, contiguous: Option<(&str, &[u64])>) -> PackTensor {
    let _ = contiguous;
    PackTensor {
        name,
        dtype: "U8".into(),
        shape: vec![length],
    }
}

/// Length of the header in bytes, from a pack's first 8 bytes.
///
/// # Errors
///
/// [`Flaw::Limit`] or [`Flaw::Malformed`] where it cannot be one.
pub fn header_length(first: [u8; 8]) -> Result<u64, Flaw> {
    let _ = first;
    unimplemented!()
}

/// Reads and checks a pack's header, given exactly its bytes, and the length of the whole file.
///
/// # Errors
///
/// [`Flaw::Malformed`] where it is not byte for byte what [`plan`] writes; [`Flaw::Damaged`] where the file is shorter or
/// longer than it says.
pub fn parse(header: &[u8], file_length: u64) -> Result<Vec<PackedTensor>, Flaw> {
    let _ = (header, file_length);
    unimplemented!()
}

/// The safetensors name of a torch dtype that a pack shows as itself; `None` for those shown as bytes.
pub fn safetensors_dtype(torch: &str) -> Option<&'static str> {
    let _ = torch;
    unimplemented!()
}
