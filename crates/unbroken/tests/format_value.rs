//! Values and their canonical bytes, through the public API only.

use proptest::prelude::*;
use unbroken::digest::{hex, unhex};
use unbroken::format::Flaw;
use unbroken::format::value::{MAX_DEPTH, decode, digest_value, encode};
use unbroken::state::{Object, Tensor, Value};

fn text(text: &str) -> Value {
    Value::Str(text.to_owned())
}

fn tensor() -> Tensor {
    Tensor {
        dtype: "float32".into(),
        shape: vec![2, 3],
        strides: vec![3, 1],
        offset: 0,
        storage: 7,
        device: "cuda:0".into(),
        attrs: vec![
            ("grad".into(), Value::None),
            ("requires_grad".into(), Value::Bool(true)),
        ],
    }
}

fn nested(depth: usize) -> Value {
    (1..depth).fold(Value::None, |inner, _| Value::List(vec![inner]))
}

/// Any canonical value.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::None),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        (-30i64..300).prop_map(Value::Int),
        (any::<bool>(), prop::collection::vec(any::<u8>(), 0..20))
            .prop_map(|(sign, bytes)| Value::integer(sign, &bytes)),
        any::<u64>().prop_map(Value::Float),
        any::<(u64, u64)>().prop_map(|(real, imaginary)| Value::Complex(real, imaginary)),
        any::<String>().prop_map(Value::Str),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Bytes),
        any::<(u64, u32, i64)>().prop_map(|(size, storage, stride)| {
            Value::from(Tensor {
                shape: vec![size, 1],
                strides: vec![stride, -1],
                storage,
                offset: size,
                ..tensor()
            })
        }),
    ];
    leaf.prop_recursive(5, 60, 6, |inner| {
        let items = prop::collection::vec(inner.clone(), 0..6);
        let pairs = prop::collection::vec((inner.clone(), inner.clone()), 0..6);
        let named =
            prop::collection::btree_map("[a-zé]{0,6}", inner, 0..5).prop_map(|map| map.into_iter().collect());
        let named = named.prop_map(|fields: Vec<(String, Value)>| fields);
        prop_oneof![
            items.clone().prop_map(Value::List),
            items.clone().prop_map(Value::Tuple),
            items.clone().prop_map(|items| Value::Set(sorted(items))),
            items.prop_map(|items| Value::FrozenSet(sorted(items))),
            pairs.prop_map(|pairs| Value::dict(distinct(pairs))),
            (any::<String>(), named.clone()).prop_map(|(name, mut fields)| {
                fields.reverse(); // The order of fields is kept, whichever it is.
                Value::from(Object {
                    kind: "dataclass".into(),
                    name,
                    fields,
                })
            }),
            named.prop_map(|attrs| Value::from(Tensor { attrs, ..tensor() })),
        ]
    })
}

fn sorted(items: Vec<Value>) -> Vec<Value> {
    let mut keyed: Vec<_> = items
        .into_iter()
        .map(|item| (encode(&item).unwrap(), item))
        .collect();
    keyed.sort_by(|a, b| a.0.cmp(&b.0));
    keyed.dedup_by(|a, b| a.0 == b.0);
    keyed.into_iter().map(|(_, item)| item).collect()
}

fn distinct(mut pairs: Vec<(Value, Value)>) -> Vec<(Value, Value)> {
    let mut seen = std::collections::HashSet::new();
    pairs.retain(|(key, _)| seen.insert(encode(key).unwrap()));
    pairs
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn reading_back_what_was_written_gives_the_same_value_and_bytes(value in any_value()) {
        let bytes = encode(&value).unwrap();
        let back = decode(&bytes).unwrap();
        prop_assert_eq!(&back, &value);
        prop_assert_eq!(encode(&back).unwrap(), bytes);
        prop_assert_eq!(digest_value(&back).unwrap(), digest_value(&value).unwrap());
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_canonical(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(value) = decode(&bytes) {
            prop_assert_eq!(encode(&value).unwrap(), bytes);
        }
    }

    #[test]
    fn bytes_changed_anywhere_are_refused_or_another_value(value in any_value(), at: usize, flip in 1u8..) {
        let mut bytes = encode(&value).unwrap();
        let at = at % bytes.len();
        bytes[at] ^= flip;
        if let Ok(other) = decode(&bytes) {
            prop_assert_ne!(&other, &value);
            prop_assert_eq!(encode(&other).unwrap(), bytes);
        }
    }

    #[test]
    fn no_prefix_of_a_value_is_a_value(value in any_value(), at: usize) {
        let bytes = encode(&value).unwrap();
        prop_assert!(decode(&bytes[..at % bytes.len()]).is_err());
    }
}

#[test]
fn the_bytes_are_those_of_the_specification() {
    let cases = [
        (Value::None, "f6"),
        (Value::Bool(true), "f5"),
        (Value::Int(-1), "20"),
        (Value::Int(1000), "1903e8"),
        (Value::Int(i64::MIN), "3b7fffffffffffffff"),
        (
            Value::integer(false, &[0x80, 0, 0, 0, 0, 0, 0, 0]),
            "c2488000000000000000",
        ),
        (
            Value::integer(true, &[1, 0, 0, 0, 0, 0, 0, 0, 0]),
            "c348ffffffffffffffff",
        ),
        (Value::Float(1.5f64.to_bits()), "fb3ff8000000000000"),
        (Value::Float(0xfff0_0000_0000_0001), "fbfff0000000000001"),
        (
            Value::Complex(0, 1 << 63),
            "da554e420482fb0000000000000000fb8000000000000000",
        ),
        (text("é"), "62c3a9"),
        (Value::Bytes(vec![1, 2]), "420102"),
        (Value::List(vec![Value::Int(1)]), "8101"),
        (Value::Tuple(vec![]), "da554e420180"),
        (Value::Set(vec![text("a"), Value::Int(2)]), "da554e420282026161"),
        (Value::FrozenSet(vec![]), "da554e420380"),
        (
            Value::dict(vec![(text("b"), Value::Int(1)), (Value::Int(0), Value::None)]),
            "a261620100f6",
        ),
        (
            Value::from(Object {
                kind: "enum".into(),
                name: "T".into(),
                fields: vec![("name".into(), text("A"))],
            }),
            "da554e42058364656e756d6154a1646e616d656141",
        ),
        (
            Value::from(tensor()),
            "da554e42068767666c6f61743332820203820301000766637564613a30a26467726164f66d72657175697265735f67726164f5",
        ),
    ];
    for (value, expected) in cases {
        assert_eq!(hex(&encode(&value).unwrap()), expected, "{value:?}");
    }
}

#[test]
fn every_other_spelling_of_a_value_is_refused() {
    let cases: [(&str, &[u8]); 18] = [
        ("a long head", &[0x18, 0x01]),
        ("a half float", &[0xf9, 0x3c, 0x00]),
        ("a single float", &[0xfa, 0x3f, 0x80, 0, 0]),
        ("undefined", &[0xf7]),
        ("another simple value", &[0xe0]),
        (
            "an integer beyond 64 bits signed",
            &[0x1b, 0xff, 0, 0, 0, 0, 0, 0, 0],
        ),
        ("an array without a length", &[0x9f, 0xff]),
        ("text without a length", &[0x7f, 0xff]),
        ("bytes that follow", &[0x01, 0x01]),
        (
            "a count larger than what follows",
            &[0x9b, 0, 0, 1, 0, 0, 0, 0, 0, 1],
        ),
        (
            "a length larger than what follows",
            &[0x5b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ),
        ("text that is not UTF-8", &[0x61, 0xff]),
        ("a key twice", &[0xa2, 1, 1, 1, 2]),
        ("a foreign tag", &[0xc0, 0x61, 0x61]),
        ("a set out of order", &[0xda, 0x55, 0x4e, 0x42, 0x02, 0x82, 2, 1]),
        (
            "a set with an element twice",
            &[0xda, 0x55, 0x4e, 0x42, 0x02, 0x82, 1, 1],
        ),
        ("a big integer that is small", &[0xc2, 0x41, 5]),
        ("nothing", &[]),
    ];
    for (what, bytes) in cases {
        assert!(decode(bytes).is_err(), "{what}");
    }
    // A leading zero whose carry would give a number of the right length.
    let swallowed = unhex::<11>("c349007fffffffffffffff").unwrap();
    assert!(decode(&swallowed).is_err());
}

#[test]
fn nesting_is_limited_in_both_directions() {
    let deepest = nested(MAX_DEPTH);
    assert_eq!(decode(&encode(&deepest).unwrap()).unwrap(), deepest);
    assert!(matches!(encode(&nested(MAX_DEPTH + 1)), Err(Flaw::Limit { .. })));
    let mut bytes = vec![0x81; 100_000];
    bytes.push(0xf6);
    assert!(matches!(decode(&bytes), Err(Flaw::Limit { .. })));
}

#[test]
fn what_breaks_a_rule_is_not_written() {
    let twice = || vec![(text("lr"), Value::None), (text("lr"), Value::Bool(true))];
    let flaw = encode(&Value::dict(twice())).unwrap_err();
    assert!(flaw.to_string().contains("\"lr\" twice"), "{flaw}");
    let field = ("a".to_owned(), Value::None);
    let object = Value::from(Object {
        kind: String::new(),
        name: String::new(),
        fields: vec![field.clone(), field],
    });
    assert!(encode(&object).is_err());
    assert!(encode(&Value::Set(vec![Value::None, Value::None])).is_err());
    assert!(
        encode(&Value::BigInt {
            negative: false,
            magnitude: vec![1]
        })
        .is_err()
    );
    assert!(
        encode(&Value::BigInt {
            negative: false,
            magnitude: vec![0, 128, 0, 0, 0, 0, 0, 0, 0]
        })
        .is_err()
    );
    assert!(
        encode(&Value::from(Tensor {
            strides: vec![1],
            ..tensor()
        }))
        .is_err()
    );
    assert!(
        encode(&Value::from(Tensor {
            dtype: "x".repeat(300),
            ..tensor()
        }))
        .is_err()
    );
}

#[test]
fn sets_and_attributes_are_written_in_their_canonical_order() {
    let backwards = Value::Set(vec![text("b"), text("a")]);
    assert_eq!(
        decode(&encode(&backwards).unwrap()).unwrap(),
        Value::Set(vec![text("a"), text("b")])
    );
    let attrs = tensor().attrs.into_iter().rev().collect();
    let backwards = Value::from(Tensor { attrs, ..tensor() });
    assert_eq!(
        decode(&encode(&backwards).unwrap()).unwrap(),
        Value::from(tensor())
    );
}
