//! Pack headers, through the public API only.

use proptest::prelude::*;
use unbroken::format::Flaw;
use unbroken::format::pack::{
    PackTensor, PackedTensor, describe, header_length, parse, plan, safetensors_dtype,
};

fn tensor(name: &str, dtype: &str, shape: &[u64]) -> PackTensor {
    PackTensor {
        name: name.into(),
        dtype: dtype.into(),
        shape: shape.to_vec(),
    }
}

fn tensors() -> Vec<PackTensor> {
    vec![
        tensor("mask", "BOOL", &[3]),
        tensor("model/weight", "F32", &[2, 3]),
        tensor("empty", "F64", &[0, 5]),
        tensor("step", "I64", &[]),
        tensor("quote\"é\n", "BF16", &[1]),
    ]
}

#[test]
fn a_header_is_json_padded_so_that_the_tensors_are_aligned() {
    let layout = plan(&tensors()).unwrap();
    assert_eq!(layout.header.len() % 64, 0);
    let length = header_length(layout.header[..8].try_into().unwrap()).unwrap();
    assert_eq!(length, layout.header.len() as u64);
    let json: serde_json::Value = serde_json::from_slice(&layout.header[8..]).unwrap();
    assert_eq!(json["__metadata__"]["format"], "unbroken-pack/1");
    assert_eq!(json["model/weight"]["data_offsets"], serde_json::json!([8, 32]));
    assert_eq!(layout.order, [2, 3, 1, 4, 0]);
    let base = layout.header.len() as u64;
    assert_eq!(layout.offsets, [base + 34, base + 8, base, base, base + 32]);
    assert_eq!(layout.length, base + 37);
}

#[test]
fn reading_back_what_was_written_gives_the_same_tensors() {
    let layout = plan(&tensors()).unwrap();
    let mut found = parse(&layout.header, layout.length).unwrap();
    found.sort_by_key(|packed| tensors().iter().position(|tensor| *tensor == packed.tensor));
    let lengths = [3, 24, 0, 8, 2];
    let expected = tensors().into_iter().zip(layout.offsets).zip(lengths);
    let expected = expected.map(|((tensor, offset), length)| PackedTensor {
        tensor,
        offset,
        length,
    });
    assert_eq!(found, expected.collect::<Vec<_>>());
    assert!(matches!(
        parse(&layout.header, layout.length - 1),
        Err(Flaw::Damaged { .. })
    ));
    assert!(matches!(
        parse(&layout.header[..64], layout.length),
        Err(Flaw::Damaged { .. })
    ));
}

#[test]
fn no_flipped_bit_of_a_header_gives_the_same_tensors() {
    let layout = plan(&tensors()).unwrap();
    let expected = parse(&layout.header, layout.length).unwrap();
    for bit in 0..layout.header.len() * 8 {
        let mut flipped = layout.header.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert_ne!(
            parse(&flipped, layout.length).ok(),
            Some(expected.clone()),
            "bit {bit}"
        );
    }
}

#[test]
fn names_that_repeat_or_are_reserved_are_refused() {
    assert!(plan(&[tensor("a", "U8", &[1]), tensor("a", "U8", &[2])]).is_err());
    assert!(plan(&[tensor("__metadata__", "U8", &[1])]).is_err());
    assert!(plan(&[tensor("a", "F4", &[1])]).is_err());
    assert!(plan(&[tensor("a", "U8", &[u64::MAX, 2])]).is_err());
    assert!(plan(&[tensor("a", "U8", &[1 << 62]), tensor("b", "U8", &[1 << 62])]).is_err());
    assert!(plan(&[tensor(&"n".repeat(5000), "U8", &[1])]).is_err());
}

#[test]
fn a_storage_is_shown_as_itself_only_where_safetensors_can_say_what_it_is() {
    let shown = |contiguous| describe("w".into(), 24, contiguous);
    assert_eq!(shown(Some(("float32", &[2, 3]))), tensor("w", "F32", &[2, 3]));
    assert_eq!(shown(Some(("float32", &[2, 2]))), tensor("w", "U8", &[24]));
    assert_eq!(shown(Some(("complex64", &[3]))), tensor("w", "U8", &[24]));
    assert_eq!(shown(None), tensor("w", "U8", &[24]));
    assert_eq!(safetensors_dtype("bfloat16"), Some("BF16"));
    assert_eq!(safetensors_dtype("qint8"), None);
}

#[test]
fn foreign_and_oversized_headers_are_refused() {
    assert!(header_length([0xff; 8]).is_err());
    assert!(header_length(65u64.to_le_bytes()).is_err());
    let mut foreign = 56u64.to_le_bytes().to_vec();
    foreign.extend(b"{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}  ");
    foreign.resize(64, b' ');
    assert!(matches!(parse(&foreign, 64), Err(Flaw::NotOurs { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_header_is_read_as_it_was_written(
        named in prop::collection::btree_map(any::<String>(), (0usize..4, prop::collection::vec(0u64..5, 0..4)), 0..8),
    ) {
        let dtypes = ["U8", "F16", "F32", "F64"];
        let tensors: Vec<PackTensor> =
            named.iter().map(|(name, (dtype, shape))| tensor(name, dtypes[*dtype], shape)).collect();
        let layout = plan(&tensors).unwrap();
        let mut found: Vec<PackTensor> =
            parse(&layout.header, layout.length).unwrap().into_iter().map(|packed| packed.tensor).collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        prop_assert_eq!(&found, &tensors);
        let size = |index: usize| [1, 2, 4, 8][dtypes.iter().position(|name| *name == tensors[index].dtype).unwrap()];
        prop_assert!(layout.order.iter().all(|&index| layout.offsets[index].is_multiple_of(size(index))));
    }

    #[test]
    fn arbitrary_headers_never_panic(json in prop::collection::vec(any::<u8>(), 56..=56)) {
        let mut header = 56u64.to_le_bytes().to_vec();
        header.extend(json);
        prop_assert!(parse(&header, 64).is_err());
    }
}
