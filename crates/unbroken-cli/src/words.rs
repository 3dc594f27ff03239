//! How values, sizes and names are put into words, and into JSON.
//!
//! Touches: nothing. Names and texts come from files that a stranger may have made: whatever could steer a terminal is
//! escaped.

use std::fmt::Write;

use serde_json::{Map, Value as Json, json};
use unbroken::Value;
use unbroken::digest::hex;
use unbroken::state::Tensor;

/// Text on one line, controls escaped.
pub(crate) fn line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            out.extend(character.escape_default())
        } else {
            out.push(character)
        }
    }
    out
}

/// A size for people: `17 B`, `4.2 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut number = bytes as f64 / 1024.0;
    let mut unit = 0;
    while number >= 1023.95 && unit + 1 < UNITS.len() {
        number /= 1024.0;
        unit += 1;
    }
    format!("{number:.1} {}", UNITS[unit])
}

/// A duration for people: `830 us`, `12.4 ms`, `3.1 s`.
pub(crate) fn duration(micros: u64) -> String {
    let number = micros as f64;
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..1_000_000 => format!("{:.1} ms", number / 1e3),
        _ => format!("{:.1} s", number / 1e6),
    }
}

/// `1 checkpoint`, `3 checkpoints`.
pub(crate) fn count(number: usize, what: &str) -> String {
    if number == 1 {
        format!("1 {what}")
    } else {
        format!("{number} {what}s")
    }
}

/// A shape as people write it: `[2, 3]`.
pub(crate) fn shape(sizes: &[u64]) -> String {
    format!("{sizes:?}")
}

/// A float, shortest form that reads back to the same bits; its bits as well where text does not tell them.
pub(crate) fn float(bits: u64) -> String {
    let number = f64::from_bits(bits);
    if number.is_nan() {
        format!("nan ({bits:016x})")
    } else {
        format!("{number:?}")
    }
}

/// A float in JSON, which has no NaN and no infinity: those as text.
pub(crate) fn float_json(bits: u64) -> Json {
    let number = f64::from_bits(bits);
    if number.is_finite() {
        json!(number)
    } else {
        json!(float(bits))
    }
}

/// An integer of any size as digits.
fn big_integer(negative: bool, magnitude: &[u8]) -> String {
    format!(
        "{}0x{}",
        if negative { "-" } else { "" },
        hex(magnitude).trim_start_matches('0')
    )
}

/// A value in words, on one line.
pub(crate) fn value(value: &Value) -> String {
    let mut out = String::new();
    write_value(&mut out, value);
    out
}

fn write_value(out: &mut String, value: &Value) {
    match value {
        Value::None => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Int(number) => write!(out, "{number}").expect("text takes any text"),
        Value::BigInt { negative, magnitude } => out.push_str(&big_integer(*negative, magnitude)),
        Value::Float(bits) => out.push_str(&float(*bits)),
        Value::Complex(real, imaginary) => {
            write!(out, "complex({}, {})", float(*real), float(*imaginary)).expect("text takes any text");
        }
        Value::Str(text) => write!(out, "{:?}", line(text)).expect("text takes any text"),
        Value::Bytes(bytes) if bytes.len() <= 16 => {
            write!(out, "bytes({})", hex(bytes)).expect("text takes any text");
        }
        Value::Bytes(bytes) => {
            write!(out, "bytes({}... {})", hex(&bytes[..8]), size(bytes.len() as u64))
                .expect("text takes any text");
        }
        Value::List(items) => write_items(out, "[", items, "]"),
        Value::Tuple(items) if items.len() == 1 => write_items(out, "(", items, ",)"),
        Value::Tuple(items) => write_items(out, "(", items, ")"),
        Value::Set(items) if items.is_empty() => out.push_str("set()"),
        Value::Set(items) => write_items(out, "{", items, "}"),
        Value::FrozenSet(items) => write_items(out, "frozenset({", items, "})"),
        Value::Dict(entries) => {
            out.push('{');
            for (index, (key, item)) in entries.iter().enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                write_value(out, key);
                out.push_str(": ");
                write_value(out, item);
            }
            out.push('}');
        }
        Value::Object(object) => {
            out.push_str(&line(&object.name));
            write_fields(out, &object.fields);
        }
        Value::Tensor(tensor) => {
            write!(out, "tensor({} {})", line(&tensor.dtype), shape(&tensor.shape))
                .expect("text takes any text");
        }
    }
}

fn write_items(out: &mut String, open: &str, items: &[Value], close: &str) {
    out.push_str(open);
    for (index, item) in items.iter().enumerate() {
        out.push_str(if index == 0 { "" } else { ", " });
        write_value(out, item);
    }
    out.push_str(close);
}

fn write_fields(out: &mut String, fields: &[(String, Value)]) {
    out.push('(');
    for (index, (name, item)) in fields.iter().enumerate() {
        out.push_str(if index == 0 { "" } else { ", " });
        out.push_str(&line(name));
        out.push('=');
        write_value(out, item);
    }
    out.push(')');
}

/// A value in JSON, for programs that want to look at it; types that JSON lacks become the nearest it has.
pub(crate) fn value_json(value: &Value) -> Json {
    match value {
        Value::None => Json::Null,
        Value::Bool(flag) => json!(flag),
        Value::Int(number) => json!(number),
        Value::BigInt { negative, magnitude } => json!(big_integer(*negative, magnitude)),
        Value::Float(bits) => float_json(*bits),
        Value::Complex(real, imaginary) => json!([float_json(*real), float_json(*imaginary)]),
        Value::Str(text) => json!(text),
        Value::Bytes(bytes) => json!({ "bytes": hex(bytes) }),
        Value::List(items) | Value::Tuple(items) | Value::Set(items) | Value::FrozenSet(items) => {
            items.iter().map(value_json).collect()
        }
        Value::Dict(entries) => {
            let names: Option<Map<String, Json>> = entries
                .iter()
                .map(|(key, item)| match key {
                    Value::Str(name) => Some((name.clone(), value_json(item))),
                    _ => None,
                })
                .collect();
            names.map_or_else(
                || {
                    entries
                        .iter()
                        .map(|(key, item)| json!([value_json(key), value_json(item)]))
                        .collect()
                },
                Json::Object,
            )
        }
        Value::Object(object) => {
            json!({ "kind": object.kind, "name": object.name, "fields": fields_json(&object.fields) })
        }
        Value::Tensor(tensor) => tensor_json(tensor),
    }
}

/// Named values in JSON.
pub(crate) fn fields_json(fields: &[(String, Value)]) -> Json {
    Json::Object(
        fields
            .iter()
            .map(|(name, item)| (name.clone(), value_json(item)))
            .collect(),
    )
}

/// A tensor's look in JSON.
pub(crate) fn tensor_json(tensor: &Tensor) -> Json {
    json!({
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "strides": tensor.strides,
        "offset": tensor.offset,
        "storage": tensor.storage,
        "device": tensor.device,
        "attrs": fields_json(&tensor.attrs),
    })
}

/// Rows as columns, padded; the last column is not.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (index, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            if index == widths.len() {
                widths.push(width);
            }
            widths[index] = widths[index].max(width);
        }
    }
    let mut out = String::new();
    for row in rows {
        let mut text = String::new();
        for (index, cell) in row.iter().enumerate() {
            text.push_str(if index == 0 { "" } else { "  " });
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', widths[index] - cell.chars().count()));
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use unbroken::state::Object;

    use super::*;

    #[test]
    fn sizes_keep_to_one_decimal_and_never_say_1024() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (5 << 30, "5.0 GiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn text_from_a_file_cannot_steer_a_terminal() {
        let evil = Value::dict(vec![(
            Value::Str("a\x1b[2J\n".into()),
            Value::from(Object {
                kind: "x".into(),
                name: "m.\x07T".into(),
                fields: vec![("f\r".into(), Value::Str("\u{9b}31m".into()))],
            }),
        )]);
        assert!(!value(&evil).chars().any(char::is_control), "{:?}", value(&evil));
    }

    #[test]
    fn values_read_like_the_python_that_made_them() {
        let tree = Value::dict(vec![
            (Value::Int(1), Value::Tuple(vec![Value::None])),
            (Value::Str("lr".into()), Value::Float(0.1f64.to_bits())),
            (
                Value::Str("big".into()),
                Value::BigInt {
                    negative: true,
                    magnitude: vec![1, 0, 0, 0, 0, 0, 0, 0, 0],
                },
            ),
        ]);
        assert_eq!(
            value(&tree),
            r#"{1: (None,), "lr": 0.1, "big": -0x10000000000000000}"#
        );
    }

    #[test]
    fn numbers_that_json_lacks_become_text() {
        assert_eq!(float_json(f64::NAN.to_bits()), json!("nan (7ff8000000000000)"));
        assert_eq!(float_json(f64::INFINITY.to_bits()), json!("inf"));
        assert_eq!(float_json((-0.0f64).to_bits()).to_string(), "-0.0");
    }
}
