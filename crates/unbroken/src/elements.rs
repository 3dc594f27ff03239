//! Elements of tensors: a view's in its own order, and two arrays' differences: how many, how far apart, and in which
//! tell-tale way.
//!
//! Touches: the bytes it is given, read only. Knows the dtypes whose elements are whole bytes; bytes of any other dtype
//! are compared byte by byte.

use std::borrow::Cow;

use crate::format::manifest::element_size;
use crate::state::Tensor;

/// What a comparison found. Distances count representable numbers between two (units in the last place).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elements {
    /// Elements of the array.
    pub total: u64,
    /// Elements whose bits differ.
    pub differing: u64,
    /// Position of the first that differs, in elements.
    pub first: u64,
    /// The largest distance, in units in the last place; 0 where no pair of differing elements has one.
    pub max_ulps: u64,
    /// Differing elements of which at least one is not a number.
    pub not_numbers: u64,
    /// In which tell-tale way they differ, if in one.
    pub pattern: Option<Pattern>,
}

/// A tell-tale way in which an array differs from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Every element found is zero.
    Zeros,
    /// Every element found is one.
    Ones,
    /// What was found is what was expected, rounded to bfloat16.
    RoundedToBfloat16,
    /// What was found is what was expected, rounded to float16.
    RoundedToFloat16,
    /// What was found is what was expected, rounded to float32.
    RoundedToFloat32,
}

#[derive(Clone, Copy)]
enum Kind {
    /// Sign and magnitude, as every IEEE format has them: bits without the sign, and the smallest magnitude that is
    /// not a number.
    Float {
        magnitude: u32,
        not_a_number: u64,
    },
    Signed,
    Unsigned,
}

fn kind(dtype: &str) -> Kind {
    let float = |magnitude, not_a_number| Kind::Float {
        magnitude,
        not_a_number,
    };
    match dtype {
        "float64" | "complex128" => float(63, 0x7ff0_0000_0000_0001),
        "float32" | "complex64" => float(31, 0x7f80_0001),
        "float16" | "complex32" => float(15, 0x7c01),
        "bfloat16" => float(15, 0x7f81),
        "float8_e4m3fn" => float(7, 0x7f),
        "float8_e5m2" => float(7, 0x7d),
        "int8" | "int16" | "int32" | "int64" | "qint8" | "qint32" => Kind::Signed,
        _ => Kind::Unsigned,
    }
}

/// The bytes of one comparable number: a complex element is two of them.
fn width(dtype: &str) -> usize {
    match dtype {
        "complex32" => 2,
        "complex64" => 4,
        "complex128" => 8,
        _ => element_size(dtype).unwrap_or(1) as usize,
    }
}

/// Compares two arrays; `None` where they are equal bit for bit.
///
/// Arrays of different lengths are compared as far as both reach, and what is left of the longer one counts as
/// differing.
pub fn compare(dtype: &str, expected: &[u8], found: &[u8]) -> Option<Elements> {
    if expected == found {
        return None;
    }
    let (kind, width) = (kind(dtype), width(dtype));
    let per_element = (element_size(dtype).unwrap_or(1) as usize) / width;
    let mut result = Elements {
        total: (expected.len().max(found.len()) / (width * per_element)) as u64,
        differing: 0,
        first: 0,
        max_ulps: 0,
        not_numbers: 0,
        pattern: pattern(dtype, expected, found),
    };
    let size = width * per_element;
    for (index, (old, new)) in expected
        .chunks_exact(size)
        .zip(found.chunks_exact(size))
        .enumerate()
    {
        if old == new {
            continue;
        }
        if result.differing == 0 {
            result.first = index as u64;
        }
        result.differing += 1;
        let mut number = true;
        for (old, new) in old.chunks_exact(width).zip(new.chunks_exact(width)) {
            match distance(kind, word(old), word(new), width) {
                Some(ulps) => result.max_ulps = result.max_ulps.max(ulps),
                None => number = false,
            }
        }
        result.not_numbers += u64::from(!number);
    }
    let shorter = (expected.len().min(found.len()) / size) as u64;
    if shorter < result.total {
        if result.differing == 0 {
            result.first = shorter;
        }
        result.differing += result.total - shorter;
    }
    Some(result)
}

/// The bytes of a view's elements in row-major order; `None` for dtypes that only a front knows.
///
/// The view lies inside `storage`: readers of manifests check that. Where its elements follow each other already,
/// nothing is copied.
pub fn row_major<'a>(tensor: &Tensor, storage: &'a [u8]) -> Option<Cow<'a, [u8]>> {
    let width = usize::try_from(element_size(&tensor.dtype)?).expect("an element is a few bytes");
    let count: u64 = tensor.shape.iter().product();
    if count == 0 {
        return Some(Cow::Borrowed(&[]));
    }
    let length = usize::try_from(count).expect("a view lies in memory") * width;
    let start = usize::try_from(tensor.offset).expect("a view lies in its storage") * width;
    let mut dimensions = merged(tensor);
    let (inner, stride) = dimensions.pop().unwrap_or((1, 1));
    if dimensions.is_empty() && stride == 1 {
        return Some(Cow::Borrowed(&storage[start..start + length]));
    }
    let mut out = Vec::with_capacity(length);
    let mut index = vec![0u64; dimensions.len()];
    let mut position = i64::try_from(tensor.offset).expect("a view lies in its storage");
    loop {
        gather(&mut out, storage, width, position, inner, stride);
        let mut dimension = dimensions.len();
        loop {
            if dimension == 0 {
                return Some(Cow::Owned(out));
            }
            dimension -= 1;
            let (size, stride) = dimensions[dimension];
            index[dimension] += 1;
            position += stride;
            if index[dimension] < size {
                break;
            }
            position -= stride * i64::try_from(size).expect("a view lies in its storage");
            index[dimension] = 0;
        }
    }
}

/// (size, stride) of a view's dimensions without those of size 1, neighbours that are one run of elements joined.
fn merged(tensor: &Tensor) -> Vec<(u64, i64)> {
    let mut out: Vec<(u64, i64)> = Vec::with_capacity(tensor.shape.len());
    for (&size, &stride) in tensor.shape.iter().zip(&tensor.strides) {
        if size == 1 {
            continue;
        }
        match out.last_mut() {
            Some((outer, step))
                if i64::try_from(size).ok().and_then(|size| stride.checked_mul(size)) == Some(*step) =>
            {
                (*outer, *step) = (*outer * size, stride);
            }
            _ => out.push((size, stride)),
        }
    }
    out
}

/// Appends `count` elements from `position` on, `stride` elements apart.
fn gather(out: &mut Vec<u8>, storage: &[u8], width: usize, position: i64, count: u64, stride: i64) {
    let at = |position: i64| usize::try_from(position).expect("a view lies in its storage") * width;
    let count = usize::try_from(count).expect("a view lies in its storage");
    if stride == 1 {
        out.extend_from_slice(&storage[at(position)..at(position) + count * width]);
        return;
    }
    match width {
        2 => spread::<2>(out, storage, position, count, stride),
        4 => spread::<4>(out, storage, position, count, stride),
        8 => spread::<8>(out, storage, position, count, stride),
        _ => (0..count as i64).for_each(|index| {
            let start = at(position + index * stride);
            out.extend_from_slice(&storage[start..start + width]);
        }),
    }
}

/// [`gather`] for one width, which the compiler then knows.
fn spread<const WIDTH: usize>(out: &mut Vec<u8>, storage: &[u8], position: i64, count: usize, stride: i64) {
    let (elements, _) = storage.as_chunks::<WIDTH>();
    out.extend((0..count as i64).flat_map(|index| elements[(position + index * stride) as usize]));
}

/// Up to eight little-endian bytes as a number.
fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// How many representable numbers lie between two, plus one; `None` where one of them is not a number.
fn distance(kind: Kind, expected: u64, found: u64, width: usize) -> Option<u64> {
    let bits = 8 * width as u32;
    let ordered = |word: u64| -> Option<i128> {
        match kind {
            Kind::Float {
                magnitude,
                not_a_number,
            } => {
                let size = word & ((1 << magnitude) - 1);
                let sign = if word >> magnitude & 1 == 1 { -1 } else { 1 };
                (size < not_a_number).then_some(sign * i128::from(size))
            }
            Kind::Signed => Some(i128::from((word << (64 - bits)) as i64 >> (64 - bits))),
            Kind::Unsigned => Some(i128::from(word)),
        }
    };
    let apart = (ordered(expected)? - ordered(found)?).unsigned_abs();
    Some(u64::try_from(apart).unwrap_or(u64::MAX))
}

fn pattern(dtype: &str, expected: &[u8], found: &[u8]) -> Option<Pattern> {
    if found.is_empty() || expected.len() != found.len() {
        return None;
    }
    if found.iter().all(|byte| *byte == 0) {
        return Some(Pattern::Zeros);
    }
    let width = width(dtype);
    if let Some(one) = one(dtype)
        && found.chunks_exact(width).all(|chunk| word(chunk) == one)
    {
        return Some(Pattern::Ones);
    }
    let all = |narrow: fn(u64) -> u64| {
        expected
            .chunks_exact(width)
            .zip(found.chunks_exact(width))
            .all(|(old, new)| narrow(word(old)) == word(new))
    };
    match dtype {
        "float32" | "complex64" if all(|bits| f32_to_bfloat16(bits as u32).into()) => {
            Some(Pattern::RoundedToBfloat16)
        }
        "float32" | "complex64" if all(|bits| f32_to_float16(bits as u32).into()) => {
            Some(Pattern::RoundedToFloat16)
        }
        "float64" | "complex128" if all(|bits| f64::from(f64::from_bits(bits) as f32).to_bits()) => {
            Some(Pattern::RoundedToFloat32)
        }
        _ => None,
    }
}

/// The bits of the number one.
fn one(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "float64" => 1f64.to_bits(),
        "float32" => 1f32.to_bits().into(),
        "float16" => 0x3c00,
        "bfloat16" => 0x3f80,
        "int8" | "int16" | "int32" | "int64" | "uint8" | "uint16" | "uint32" | "uint64" | "bool" => 1,
        _ => return None,
    })
}

/// A float32's bits after a trip through bfloat16: to nearest, ties to even.
fn f32_to_bfloat16(bits: u32) -> u32 {
    if f32::from_bits(bits).is_nan() {
        return bits;
    }
    let rounding = 0x7fff + (bits >> 16 & 1);
    bits.wrapping_add(rounding) & 0xffff_0000
}

/// A float32's bits after a trip through float16: to nearest, ties to even.
fn f32_to_float16(bits: u32) -> u32 {
    let value = f32::from_bits(bits);
    if !value.is_finite() || value == 0.0 {
        return bits;
    }
    // The spacing of float16 at this size; below its smallest normal number, 2^-14, the spacing stays 2^-24.
    let exponent = ((bits >> 23 & 0xff) as i32 - 127).max(-14);
    let spacing = f64::powi(2.0, exponent - 10);
    let rounded = (f64::from(value) / spacing).round_ties_even() * spacing;
    if rounded.abs() > 65504.0 {
        return f32::INFINITY.copysign(value).to_bits();
    }
    (rounded as f32).copysign(value).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn next(value: f32) -> f32 {
        f32::from_bits(value.to_bits() + 1)
    }

    fn view(dtype: &str, shape: &[u64], strides: &[i64], offset: u64) -> Tensor {
        Tensor {
            dtype: dtype.into(),
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            offset,
            storage: 0,
            device: "cpu".into(),
            attrs: Vec::new(),
        }
    }

    #[test]
    fn views_give_their_elements_in_row_major_order() {
        for (shape, strides, offset, expected) in [
            (&[2, 3][..], &[3, 1][..], 0, vec![0, 1, 2, 3, 4, 5]),
            (&[2, 3], &[1, 2], 1, vec![1, 3, 5, 2, 4, 6]),
            (&[3], &[-2], 11, vec![11, 9, 7]),
            (&[2, 2], &[0, 1], 4, vec![4, 5, 4, 5]),
            (&[], &[], 7, vec![7]),
            (&[0, 5], &[5, 1], 0, vec![]),
            (&[1, 4], &[99, 1], 8, vec![8, 9, 10, 11]),
            (&[2, 2, 3], &[6, 3, 1], 0, (0..12).collect()),
            (
                &[2, 3, 2],
                &[1, 4, 2],
                0,
                vec![0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11],
            ),
        ] {
            for (dtype, width) in [
                ("uint8", 1),
                ("int16", 2),
                ("float32", 4),
                ("int64", 8),
                ("complex128", 16),
            ] {
                let spread = |elements: &[u8]| -> Vec<u8> {
                    elements
                        .iter()
                        .flat_map(|element| vec![*element; width])
                        .collect()
                };
                let storage = spread(&(0..12).collect::<Vec<u8>>());
                let found = row_major(&view(dtype, shape, strides, offset), &storage).unwrap();
                assert_eq!(found.as_ref(), spread(&expected), "{dtype} {shape:?} {strides:?}");
            }
        }
        assert_eq!(row_major(&view("int4", &[2], &[1], 0), &[0]), None);
    }

    #[test]
    fn elements_that_follow_each_other_are_not_copied() {
        let storage = [0u8; 24];
        for (shape, strides) in [
            (&[2, 3][..], &[3, 1][..]),
            (&[6, 1], &[1, 77]),
            (&[1, 1, 5], &[5, 5, 1]),
        ] {
            let found = row_major(&view("float32", shape, strides, 0), &storage);
            assert!(matches!(found, Some(Cow::Borrowed(_))), "{shape:?}");
        }
    }

    #[test]
    fn equal_bits_have_no_difference() {
        let nan = floats(&[f32::NAN, 1.0]);
        assert_eq!(compare("float32", &nan, &nan), None);
    }

    #[test]
    fn one_element_off_by_one_ulp_is_counted_and_found() {
        let found = compare(
            "float32",
            &floats(&[0.5, 1.5, 2.0]),
            &floats(&[0.5, next(1.5), 2.0]),
        )
        .unwrap();
        let expected = Elements {
            total: 3,
            differing: 1,
            first: 1,
            max_ulps: 1,
            not_numbers: 0,
            pattern: None,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn distances_cross_zero_and_signed_zeros_differ_without_one() {
        let tiny = f32::from_bits(3);
        assert_eq!(
            compare("float32", &floats(&[tiny]), &floats(&[-tiny]))
                .unwrap()
                .max_ulps,
            6
        );
        let zeros = compare("float32", &floats(&[0.0, 1.0]), &floats(&[-0.0, 1.0])).unwrap();
        assert_eq!((zeros.differing, zeros.max_ulps), (1, 0));
    }

    #[test]
    fn what_is_not_a_number_has_no_distance() {
        let found = compare("float32", &floats(&[1.0, 2.0]), &floats(&[f32::NAN, next(2.0)])).unwrap();
        assert_eq!((found.differing, found.not_numbers, found.max_ulps), (2, 1, 1));
        assert_eq!(compare("float8_e4m3fn", &[0x01], &[0x7f]).unwrap().not_numbers, 1);
    }

    #[test]
    fn integers_differ_by_their_difference() {
        let number = |value: i64| value.to_le_bytes();
        assert_eq!(compare("int64", &number(-3), &number(4)).unwrap().max_ulps, 7);
        assert_eq!(
            compare("int64", &number(i64::MIN), &number(i64::MAX))
                .unwrap()
                .max_ulps,
            u64::MAX
        );
        assert_eq!(compare("uint8", &[250], &[3]).unwrap().max_ulps, 247);
    }

    #[test]
    fn complex_elements_count_once_for_both_parts() {
        let found = compare(
            "complex64",
            &floats(&[1.0, 2.0]),
            &floats(&[next(1.0), next(2.0)]),
        )
        .unwrap();
        assert_eq!((found.total, found.differing, found.max_ulps), (1, 1, 1));
    }

    #[test]
    fn tell_tale_patterns_are_seen() {
        let values = floats(&[0.1, -3.7, 1e-6]);
        assert_eq!(
            compare("float32", &values, &floats(&[0.0; 3])).unwrap().pattern,
            Some(Pattern::Zeros)
        );
        assert_eq!(
            compare("float32", &values, &floats(&[1.0; 3])).unwrap().pattern,
            Some(Pattern::Ones)
        );
        let narrow: Vec<u8> = values
            .chunks_exact(4)
            .flat_map(|chunk| f32_to_bfloat16(word(chunk) as u32).to_le_bytes())
            .collect();
        assert_eq!(
            compare("float32", &values, &narrow).unwrap().pattern,
            Some(Pattern::RoundedToBfloat16)
        );
        let wide: Vec<u8> = [0.1f64, 1e-40]
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let cast: Vec<u8> = [0.1f32, 1e-40]
            .iter()
            .flat_map(|value| f64::from(*value).to_le_bytes())
            .collect();
        assert_eq!(
            compare("float64", &wide, &cast).unwrap().pattern,
            Some(Pattern::RoundedToFloat32)
        );
    }

    #[test]
    fn narrow_formats_round_to_nearest_even() {
        // Halves of the last place go to the even neighbour, and what is too large becomes infinite.
        assert_eq!(f32_to_bfloat16(0x3f80_8000), 0x3f80_0000);
        assert_eq!(f32_to_bfloat16(0x3f81_8000), 0x3f82_0000);
        assert_eq!(f32::from_bits(f32_to_float16(1.0004883f32.to_bits())), 1.0);
        assert_eq!(f32::from_bits(f32_to_float16(0.1f32.to_bits())), 0.099975586);
        assert_eq!(f32::from_bits(f32_to_float16(70000f32.to_bits())), f32::INFINITY);
        assert_eq!(
            f32::from_bits(f32_to_float16(5.9604645e-8f32.to_bits())),
            5.9604645e-8
        );
        assert_eq!(f32::from_bits(f32_to_float16(1e-9f32.to_bits())), 0.0);
    }

    #[test]
    fn a_longer_array_differs_in_what_is_left() {
        let found = compare("float32", &floats(&[1.0]), &floats(&[1.0, 2.0])).unwrap();
        assert_eq!((found.total, found.differing, found.first), (2, 1, 1));
    }
}
