//! The pack header: packs are valid `.safetensors` files, and this lays them out.
//!
//! Touches: nothing. A header is fully determined by the tensors it lists, so reading one means writing it again and
//! comparing: what another program wrote, or changed, is not taken for ours.

use std::io::{self, Write};

use serde_json::Value as Json;

use crate::digest::Digest;
use crate::format::Flaw;

// | length of the JSON u64 | JSON, padded with spaces | tensors in order, no gaps |
//   The tensors start at a multiple of 64.
const LENGTH: usize = 8;
const ALIGNMENT: usize = 64;
const METADATA: &str = "__metadata__";
const FORMAT: &str = "unbroken-pack/1";

/// The largest header in bytes; safetensors itself refuses more than 100,000,000.
pub const MAX_HEADER: u64 = 64 << 20;
/// How long a tensor's name may be, in bytes.
pub const MAX_NAME: usize = 4096;

/// (torch name, safetensors name, bytes an element): what a pack shows as itself. Every other dtype is shown as bytes.
///
/// Source: `safetensors` 0.8.0, the types its Python package turns into torch tensors.
const DTYPES: [(&str, &str, u64); 15] = [
    ("bool", "BOOL", 1),
    ("uint8", "U8", 1),
    ("int8", "I8", 1),
    ("float8_e5m2", "F8_E5M2", 1),
    ("float8_e4m3fn", "F8_E4M3", 1),
    ("int16", "I16", 2),
    ("uint16", "U16", 2),
    ("float16", "F16", 2),
    ("bfloat16", "BF16", 2),
    ("int32", "I32", 4),
    ("uint32", "U32", 4),
    ("float32", "F32", 4),
    ("float64", "F64", 8),
    ("int64", "I64", 8),
    ("uint64", "U64", 8),
];

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

/// Lays a pack out: largest elements first, then by name, so that every tensor is aligned for its element type.
///
/// # Errors
///
/// [`Flaw::Malformed`] where names repeat or are reserved, a dtype is unknown or a size does not fit; [`Flaw::Limit`].
pub fn plan(tensors: &[PackTensor]) -> Result<PackLayout, Flaw> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    let sizes = tensors
        .iter()
        .map(sizes_of)
        .collect::<Result<Vec<(u64, u64)>, Flaw>>()?;
    order.sort_by(|&a, &b| {
        sizes[b]
            .0
            .cmp(&sizes[a].0)
            .then_with(|| tensors[a].name.cmp(&tensors[b].name))
    });
    // From where they are nearly in order: by name within each element size.
    let mut names: Vec<&str> = order.iter().map(|&index| tensors[index].name.as_str()).collect();
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Flaw::malformed(format!(
            "the tensor {:?} twice in one pack",
            pair[0]
        )));
    }

    let mut json = format!("{{\"{METADATA}\":{{\"format\":\"{FORMAT}\"}}").into_bytes();
    let mut offsets = vec![0; tensors.len()];
    let mut end = 0u64;
    for &index in &order {
        let tensor = &tensors[index];
        let start = end;
        // Below 2^63, so that every reader's signed offsets hold it, header included.
        end = start
            .checked_add(sizes[index].1)
            .filter(|end| *end <= i64::MAX as u64 - MAX_HEADER)
            .ok_or_else(too_long)?;
        offsets[index] = start;
        write_entry(&mut json, tensor, start, end).expect("memory takes all of it");
    }
    json.push(b'}');
    let data = (LENGTH + json.len()).next_multiple_of(ALIGNMENT);
    if data as u64 > MAX_HEADER {
        return Err(Flaw::limit(format!(
            "a pack header of {data} bytes, at most {MAX_HEADER} are allowed"
        )));
    }
    let mut header = Vec::with_capacity(data);
    header.extend_from_slice(&((data - LENGTH) as u64).to_le_bytes());
    header.extend_from_slice(&json);
    header.resize(data, b' ');
    offsets.iter_mut().for_each(|offset| *offset += data as u64);
    Ok(PackLayout {
        header_digest: Digest::of(&header),
        header,
        offsets,
        order,
        length: data as u64 + end,
    })
}

/// Writes what a header says of one tensor, behind what it says of those before.
fn write_entry(json: &mut Vec<u8>, tensor: &PackTensor, start: u64, end: u64) -> io::Result<()> {
    json.push(b',');
    serde_json::to_writer(&mut *json, &tensor.name)?;
    write!(json, ":{{\"dtype\":\"{}\",\"shape\":", tensor.dtype)?;
    serde_json::to_writer(&mut *json, &tensor.shape)?;
    write!(json, ",\"data_offsets\":[{start},{end}]}}")
}

/// How a storage of `length` bytes appears in a pack.
///
/// As a tensor of its own dtype and shape where the storage is exactly that one contiguous tensor (torch dtype, shape)
/// and safetensors has its dtype; else as `length` bytes.
pub fn describe(name: String, length: u64, contiguous: Option<(&str, &[u64])>) -> PackTensor {
    if let Some((dtype, shape)) = contiguous
        && let Some(dtype) = safetensors_dtype(dtype)
    {
        let tensor = PackTensor {
            name,
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
        };
        return match sizes_of(&tensor) {
            Ok((_, size)) if size == length => tensor,
            _ => PackTensor {
                dtype: "U8".to_owned(),
                shape: vec![length],
                ..tensor
            },
        };
    }
    PackTensor {
        name,
        dtype: "U8".to_owned(),
        shape: vec![length],
    }
}

/// Length of the header in bytes, these 8 included, from a pack's first 8 bytes.
///
/// # Errors
///
/// [`Flaw::Limit`] or [`Flaw::NotOurs`] where it cannot be one.
pub fn header_length(first: [u8; 8]) -> Result<u64, Flaw> {
    let length = u64::from_le_bytes(first).saturating_add(LENGTH as u64);
    if length > MAX_HEADER {
        return Err(Flaw::limit(format!(
            "a pack header of {length} bytes, at most {MAX_HEADER} are allowed"
        )));
    }
    if !length.is_multiple_of(ALIGNMENT as u64) {
        return Err(Flaw::NotOurs { what: "a pack" });
    }
    Ok(length)
}

/// Reads and checks a pack's header, given exactly its bytes, and the length of the whole file.
///
/// # Errors
///
/// [`Flaw::NotOurs`] where it is no header of ours; [`Flaw::Malformed`] where it is not byte for byte what [`plan`]
/// writes; [`Flaw::Damaged`] where the file is shorter or longer than it says.
pub fn parse(header: &[u8], file_length: u64) -> Result<Vec<PackedTensor>, Flaw> {
    let Some((first, json)) = header.split_first_chunk::<LENGTH>() else {
        return Err(Flaw::ends_early(
            "pack header",
            LENGTH as u64,
            header.len() as u64,
        ));
    };
    let length = header_length(*first)?;
    if header.len() as u64 != length {
        return Err(Flaw::ends_early("pack header", length, header.len() as u64));
    }
    let tensors = tensors_of(json)?;
    let layout = plan(&tensors)?;
    if layout.header != header {
        return Err(Flaw::malformed(
            "the pack's header is not in the form that this version writes",
        ));
    }
    if layout.length != file_length {
        return Err(Flaw::ends_early("pack", layout.length, file_length));
    }
    let offsets = layout.offsets;
    let packed = tensors.into_iter().zip(offsets).map(|(tensor, offset)| {
        let (_, length) = sizes_of(&tensor)?;
        Ok(PackedTensor {
            tensor,
            offset,
            length,
        })
    });
    packed.collect()
}

/// The safetensors name of a torch dtype that a pack shows as itself; `None` for those shown as bytes.
pub fn safetensors_dtype(torch: &str) -> Option<&'static str> {
    DTYPES
        .iter()
        .find(|(name, ..)| *name == torch)
        .map(|(_, name, _)| *name)
}

/// The tensors that a header lists, as far as one can see without the layout.
fn tensors_of(json: &[u8]) -> Result<Vec<PackTensor>, Flaw> {
    let not_ours = || Flaw::NotOurs { what: "a pack" };
    let Ok(Json::Object(mut items)) = serde_json::from_slice::<Json>(json) else {
        return Err(not_ours());
    };
    let metadata = items.remove(METADATA).ok_or_else(not_ours)?;
    if metadata.get("format").and_then(Json::as_str) != Some(FORMAT) {
        return Err(not_ours());
    }
    let tensor = |(name, item): (String, Json)| {
        let dtype = item.get("dtype").and_then(Json::as_str);
        let shape = item.get("shape").and_then(Json::as_array);
        let shape = shape.and_then(|sizes| sizes.iter().map(Json::as_u64).collect::<Option<Vec<u64>>>());
        match (dtype, shape) {
            (Some(dtype), Some(shape)) => Ok(PackTensor {
                name,
                dtype: dtype.to_owned(),
                shape,
            }),
            _ => Err(Flaw::malformed(format!(
                "the tensor {name:?} of the pack has no dtype or no shape"
            ))),
        }
    };
    items.into_iter().map(tensor).collect()
}

/// (bytes an element, bytes in all) of a tensor, its name and dtype checked.
fn sizes_of(tensor: &PackTensor) -> Result<(u64, u64), Flaw> {
    if tensor.name == METADATA || tensor.name.len() > MAX_NAME {
        let most = MAX_NAME;
        return Err(Flaw::malformed(format!(
            "a tensor's name is {METADATA:?} or longer than {most} bytes"
        )));
    }
    let Some((.., element)) = DTYPES.iter().find(|(_, name, _)| *name == tensor.dtype) else {
        return Err(Flaw::malformed(format!(
            "the dtype {:?} of a packed tensor",
            tensor.dtype
        )));
    };
    // From the element on: a zero among the sizes must not hide an overflow before it, as safetensors sees it too.
    let size = tensor
        .shape
        .iter()
        .try_fold(*element, |size, dimension| size.checked_mul(*dimension));
    size.map(|size| (*element, size)).ok_or_else(too_long)
}

fn too_long() -> Flaw {
    Flaw::limit("a pack of more than 2^63 bytes")
}
