//! Canonical CBOR of values: one value, one byte string, on every machine and in every release.
//!
//! Touches: nothing. No recursion deeper than [`MAX_DEPTH`], no allocation that the bytes at hand do not pay for. The
//! same rules bind both directions: what [`encode`] writes [`decode`] reads, and nothing else.

use std::collections::HashSet;

use minicbor::data::Tag;
use minicbor::{Decoder, Encoder};

use crate::digest::Digest;
use crate::format::Flaw;
use crate::state::{Object, Tensor, Value};

/// How deep values may be nested; a value without parts has depth 1.
pub const MAX_DEPTH: usize = 128;
/// How many values one encoding may hold, keys and parts included.
pub const MAX_VALUES: usize = 1 << 24;
/// How long one encoding may be, in bytes.
pub const MAX_ENCODED: usize = 1 << 30;
/// How much memory one decoded value may take, in bytes, counted as [`VALUE_BYTES`] and [`DIMENSION_BYTES`] say.
pub const MAX_MEMORY: usize = 1 << 30;
/// What each value counts for in [`MAX_MEMORY`]; each byte of a text, a name or a byte string counts for one more.
pub const VALUE_BYTES: usize = 192;
// What is allocated for a tensor, two counts beside it, or an object comes on top.
const _: () = assert!(size_of::<Value>() + 2 * size_of::<usize>() + size_of::<Tensor>() <= VALUE_BYTES);
const _: () = assert!(size_of::<Value>() + size_of::<Object>() <= VALUE_BYTES);
/// What each dimension of a tensor counts for in [`MAX_MEMORY`].
pub const DIMENSION_BYTES: usize = 16;
/// How many dimensions a tensor may have.
pub const MAX_DIMENSIONS: usize = 64;
/// How long a dtype, a device or an object's kind may be, in bytes.
pub const MAX_WORD: usize = 255;
/// How long a type's name, a field's or an attribute's may be, in bytes.
pub const MAX_NAME: usize = 4096;

// Tags of our own: "UNB" and a number, in the range that IANA hands out first come, first served.
const TAG_TUPLE: u64 = 0x554E_4201;
const TAG_SET: u64 = 0x554E_4202;
const TAG_FROZENSET: u64 = 0x554E_4203;
const TAG_COMPLEX: u64 = 0x554E_4204;
const TAG_OBJECT: u64 = 0x554E_4205;
const TAG_TENSOR: u64 = 0x554E_4206;
// Tags of RFC 8949, section 3.4.3.
const TAG_BIG_POSITIVE: u64 = 2;
const TAG_BIG_NEGATIVE: u64 = 3;

/// Returns the canonical bytes of a value.
///
/// Sets and tensor attributes may come in any order and are written in the canonical one.
///
/// # Errors
///
/// [`Flaw::Limit`] where it is nested too deep, too large or a name is too long; [`Flaw::Malformed`] where it breaks a
/// rule of its type: a big integer that is not canonical, a key twice.
pub fn encode(value: &Value) -> Result<Vec<u8>, Flaw> {
    let mut writer = Writer::behind(Vec::new(), MAX_MEMORY)?;
    writer.value(value, MAX_DEPTH)?;
    Ok(writer.finish())
}

/// Returns the value of canonical bytes.
///
/// # Errors
///
/// [`Flaw::Malformed`] where the bytes are not exactly what [`encode`] writes for any value; [`Flaw::Limit`].
pub fn decode(bytes: &[u8]) -> Result<Value, Flaw> {
    decode_nested(bytes, MAX_DEPTH, MAX_MEMORY)
}

/// Returns the digest of a value's canonical bytes.
///
/// # Errors
///
/// Those of [`encode`].
pub fn digest_value(value: &Value) -> Result<Digest, Flaw> {
    encode(value).map(|bytes| Digest::of(&bytes))
}

/// [`encode`] of a mapping with text keys that was never put together, behind these bytes, with another budget.
pub(super) fn encode_mapping<V>(
    bytes: Vec<u8>,
    items: &[(&str, V)],
    memory: usize,
    write_value: impl FnMut(&mut Writer, &V) -> Result<(), Flaw>,
) -> Result<Vec<u8>, Flaw> {
    let start = bytes.len();
    let mut writer = Writer::behind(bytes, memory)?;
    writer.mapping(items, |writer, key| writer.text(key), write_value)?;
    check_length(writer.bytes().len() - start)?;
    Ok(writer.finish())
}

/// [`decode`] with room for the layers that a manifest or a record puts around user values, and another budget.
pub(super) fn decode_nested(bytes: &[u8], depth: usize, memory: usize) -> Result<Value, Flaw> {
    check_length(bytes.len())?;
    let mut reader = Reader {
        input: Decoder::new(bytes),
        budget: Budget::of(memory)?,
    };
    let value = reader.value(depth)?;
    match reader.remaining() {
        0 => Ok(value),
        left => Err(reader.malformed(format!("{left} bytes follow the value"))),
    }
}

/// What one encoding has used of what it may hold. Charged before anything is allocated for it.
#[derive(Clone, Copy)]
struct Budget {
    values: usize,
    memory: usize,
    most: usize,
}

impl Budget {
    /// A budget from which the outermost value is taken.
    fn of(most: usize) -> Result<Budget, Flaw> {
        let mut budget = Budget {
            values: 0,
            memory: 0,
            most,
        };
        budget.values(1)?;
        Ok(budget)
    }

    fn values(&mut self, count: usize) -> Result<(), Flaw> {
        self.values = self.values.saturating_add(count);
        check_values(self.values)?;
        self.bytes(count.saturating_mul(VALUE_BYTES))
    }

    fn bytes(&mut self, count: usize) -> Result<(), Flaw> {
        self.memory = self.memory.saturating_add(count);
        if self.memory > self.most {
            return Err(Flaw::limit(format!(
                "values that take more than {} bytes of memory; keep long sequences as tensors or bytes",
                self.most
            )));
        }
        Ok(())
    }
}

fn check_length(length: usize) -> Result<(), Flaw> {
    if length > MAX_ENCODED {
        return Err(Flaw::limit(format!(
            "{length} bytes of encoded value, at most {MAX_ENCODED} are allowed"
        )));
    }
    Ok(())
}

fn check_values(values: usize) -> Result<(), Flaw> {
    if values > MAX_VALUES {
        return Err(Flaw::limit(format!(
            "more than {MAX_VALUES} values; keep long sequences as tensors or bytes"
        )));
    }
    Ok(())
}

fn check_name(what: &str, name: &str, most: usize) -> Result<(), Flaw> {
    if name.len() > most {
        return Err(Flaw::limit(format!(
            "{what} of {} bytes, at most {most} are allowed",
            name.len()
        )));
    }
    Ok(())
}

fn check_dimensions(count: usize) -> Result<(), Flaw> {
    if count > MAX_DIMENSIONS {
        return Err(Flaw::limit(format!(
            "a tensor of {count} dimensions, at most {MAX_DIMENSIONS} are allowed"
        )));
    }
    Ok(())
}

fn check_big(negative: bool, magnitude: &[u8]) -> Result<(), Flaw> {
    match Value::integer(negative, magnitude) {
        Value::BigInt {
            magnitude: canonical, ..
        } if canonical.len() == magnitude.len() => Ok(()),
        _ => Err(Flaw::malformed("a big integer that has a shorter form")),
    }
}

fn too_deep() -> Flaw {
    Flaw::limit(format!("values are nested deeper than {MAX_DEPTH}"))
}

/// Finds a string that occurs twice.
fn repeated<'b>(mut parts: impl ExactSizeIterator<Item = &'b [u8]> + Clone) -> Option<&'b [u8]> {
    if parts.len() <= FEW {
        let all = parts.clone();
        let mut numbered = parts.enumerate();
        return numbered.find_map(|(at, part)| all.clone().take(at).find(|before| *before == part));
    }
    let mut seen = HashSet::with_capacity(parts.len());
    parts.find(|part| !seen.insert(*part))
}

/// So many strings are compared with each other sooner than put into a set.
const FEW: usize = 8;

/// Writes a value, or the parts of one that was never put together.
pub(super) struct Writer {
    out: Encoder<Vec<u8>>,
    budget: Budget,
}

/// Writing to memory cannot fail.
fn written<T>(result: Result<T, minicbor::encode::Error<std::convert::Infallible>>) {
    if result.is_err() {
        unreachable!("writing to a vector failed");
    }
}

impl Writer {
    /// Writes behind these bytes a value that may take so much memory.
    pub(super) fn behind(bytes: Vec<u8>, memory: usize) -> Result<Writer, Flaw> {
        Ok(Writer {
            out: Encoder::new(bytes),
            budget: Budget::of(memory)?,
        })
    }

    /// The bytes, when the value is complete.
    pub(super) fn finish(self) -> Vec<u8> {
        self.out.into_writer()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.out.writer()
    }

    /// Begins a list of this many values.
    pub(super) fn list(&mut self, count: usize) -> Result<(), Flaw> {
        self.budget.values(count)?;
        self.array(count);
        Ok(())
    }

    pub(super) fn int(&mut self, value: i64) {
        written(self.out.i64(value));
    }

    pub(super) fn text(&mut self, text: &str) -> Result<(), Flaw> {
        self.budget.bytes(text.len())?;
        written(self.out.str(text));
        Ok(())
    }

    pub(super) fn byte_string(&mut self, bytes: &[u8]) -> Result<(), Flaw> {
        self.budget.bytes(bytes.len())?;
        written(self.out.bytes(bytes));
        Ok(())
    }

    /// Writes a mapping, in its order.
    pub(super) fn mapping<K, V>(
        &mut self,
        items: &[(K, V)],
        mut write_key: impl FnMut(&mut Writer, &K) -> Result<(), Flaw>,
        mut write_value: impl FnMut(&mut Writer, &V) -> Result<(), Flaw>,
    ) -> Result<(), Flaw> {
        self.budget.values(items.len().saturating_mul(2))?;
        written(self.out.map(items.len() as u64));
        let mut keys = Vec::with_capacity(items.len());
        for (key, value) in items {
            let start = self.bytes().len();
            write_key(self, key)?;
            keys.push(start..self.bytes().len());
            write_value(self, value)?;
        }
        match repeated(keys.iter().map(|range| &self.bytes()[range.clone()])) {
            Some(key) => Err(Flaw::malformed(format!(
                "a mapping with the key {} twice",
                shown(key)
            ))),
            None => Ok(()),
        }
    }

    fn tag(&mut self, tag: u64) {
        written(self.out.tag(Tag::new(tag)));
    }

    fn array(&mut self, count: usize) {
        written(self.out.array(count as u64));
    }

    pub(super) fn float(&mut self, bits: u64) {
        // By hand: a float in a register may lose the payload of a signalling NaN on some machines.
        let out = self.out.writer_mut();
        out.push(0xfb);
        out.extend_from_slice(&bits.to_be_bytes());
    }

    /// Writes one value that may be nested `depth` deep.
    pub(super) fn value(&mut self, value: &Value, depth: usize) -> Result<(), Flaw> {
        let inner = depth.checked_sub(1).ok_or_else(too_deep)?;
        check_length(self.bytes().len())?;
        match value {
            Value::None => written(self.out.null()),
            Value::Bool(value) => written(self.out.bool(*value)),
            Value::Int(value) => self.int(*value),
            Value::BigInt { negative, magnitude } => self.big(*negative, magnitude)?,
            Value::Float(bits) => self.float(*bits),
            Value::Complex(real, imaginary) => {
                self.tag(TAG_COMPLEX);
                self.array(2);
                self.float(*real);
                self.float(*imaginary);
            }
            Value::Str(text) => self.text(text)?,
            Value::Bytes(bytes) => self.byte_string(bytes)?,
            Value::List(items) => self.items(items, inner)?,
            Value::Tuple(items) => {
                self.tag(TAG_TUPLE);
                self.items(items, inner)?;
            }
            Value::Dict(items) => self.dict(items, inner)?,
            Value::Set(items) => {
                self.tag(TAG_SET);
                self.set(items, inner)?;
            }
            Value::FrozenSet(items) => {
                self.tag(TAG_FROZENSET);
                self.set(items, inner)?;
            }
            Value::Object(object) => {
                check_name("an object's kind", &object.kind, MAX_WORD)?;
                check_name("a type's name", &object.name, MAX_NAME)?;
                self.tag(TAG_OBJECT);
                self.array(3);
                self.text(&object.kind)?;
                self.text(&object.name)?;
                self.fields(object.fields.iter(), inner)?;
            }
            Value::Tensor(tensor) => self.tensor(tensor, inner)?,
        }
        check_length(self.bytes().len())
    }

    fn big(&mut self, negative: bool, magnitude: &[u8]) -> Result<(), Flaw> {
        check_big(negative, magnitude)?;
        self.budget.bytes(magnitude.len())?;
        if negative {
            // CBOR counts negative numbers from -1 down: it stores -1 - n.
            let below = minus_one(magnitude);
            self.tag(TAG_BIG_NEGATIVE);
            written(self.out.bytes(&below));
        } else {
            self.tag(TAG_BIG_POSITIVE);
            written(self.out.bytes(magnitude));
        }
        Ok(())
    }

    fn items(&mut self, items: &[Value], depth: usize) -> Result<(), Flaw> {
        self.list(items.len())?;
        items.iter().try_for_each(|item| self.value(item, depth))
    }

    fn dict(&mut self, items: &[(Value, Value)], depth: usize) -> Result<(), Flaw> {
        let write = |writer: &mut Writer, value: &Value| writer.value(value, depth);
        self.mapping(items, write, write)
    }

    fn set(&mut self, items: &[Value], depth: usize) -> Result<(), Flaw> {
        self.budget.values(items.len())?;
        let mut encoded = Vec::with_capacity(items.len());
        for item in items {
            let mut writer = Writer {
                out: Encoder::new(Vec::new()),
                budget: self.budget,
            };
            writer.value(item, depth)?;
            self.budget = writer.budget;
            encoded.push(writer.out.into_writer());
        }
        encoded.sort_unstable();
        if let Some(pair) = encoded.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Flaw::malformed(format!(
                "a set with the element {} twice",
                shown(&pair[0])
            )));
        }
        self.array(items.len());
        for item in encoded {
            self.out.writer_mut().extend_from_slice(&item);
        }
        Ok(())
    }

    fn fields<'v>(
        &mut self,
        fields: impl ExactSizeIterator<Item = &'v (String, Value)> + Clone,
        depth: usize,
    ) -> Result<(), Flaw> {
        if let Some(name) = repeated(fields.clone().map(|(name, _)| name.as_bytes())) {
            let name = String::from_utf8_lossy(name).into_owned();
            return Err(Flaw::malformed(format!("a field named {name:?} twice")));
        }
        self.budget.values(fields.len())?;
        written(self.out.map(fields.len() as u64));
        for (name, value) in fields {
            check_name("a field's name", name, MAX_NAME)?;
            self.text(name)?;
            self.value(value, depth)?;
        }
        Ok(())
    }

    fn tensor(&mut self, tensor: &Tensor, depth: usize) -> Result<(), Flaw> {
        check_name("a dtype", &tensor.dtype, MAX_WORD)?;
        check_name("a device", &tensor.device, MAX_WORD)?;
        check_dimensions(tensor.shape.len())?;
        if tensor.shape.len() != tensor.strides.len() {
            let (shape, strides) = (tensor.shape.len(), tensor.strides.len());
            return Err(Flaw::malformed(format!(
                "a tensor of {shape} dimensions with {strides} strides"
            )));
        }
        self.tag(TAG_TENSOR);
        self.array(7);
        self.text(&tensor.dtype)?;
        self.budget.bytes(tensor.shape.len() * DIMENSION_BYTES)?;
        self.array(tensor.shape.len());
        tensor.shape.iter().for_each(|size| written(self.out.u64(*size)));
        self.array(tensor.strides.len());
        tensor
            .strides
            .iter()
            .for_each(|stride| written(self.out.i64(*stride)));
        written(self.out.u64(tensor.offset));
        written(self.out.u32(tensor.storage));
        self.text(&tensor.device)?;
        if tensor.attrs.is_sorted_by(|one, other| one.0 <= other.0) {
            return self.fields(tensor.attrs.iter(), depth);
        }
        let mut attrs: Vec<_> = tensor.attrs.iter().collect();
        attrs.sort_by_key(|(name, _)| name);
        self.fields(attrs.into_iter(), depth)
    }
}

/// The number one smaller, without leading zero bytes. Only for numbers above zero.
fn minus_one(magnitude: &[u8]) -> Vec<u8> {
    let mut digits = magnitude.to_vec();
    for digit in digits.iter_mut().rev() {
        let (less, borrowed) = digit.overflowing_sub(1);
        *digit = less;
        if !borrowed {
            break;
        }
    }
    let leading = digits.iter().take_while(|digit| **digit == 0).count();
    digits.split_off(leading)
}

/// The number one larger.
fn plus_one(magnitude: &[u8]) -> Vec<u8> {
    let mut digits = magnitude.to_vec();
    for digit in digits.iter_mut().rev() {
        let (more, carried) = digit.overflowing_add(1);
        *digit = more;
        if !carried {
            return digits;
        }
    }
    digits.insert(0, 1);
    digits
}

/// An encoded key for people: its value where it is short, else how long it is.
fn shown(encoded: &[u8]) -> String {
    match decode(encoded) {
        Ok(Value::Str(text)) if text.len() <= 80 => format!("{text:?}"),
        Ok(Value::Int(number)) => number.to_string(),
        _ => format!("of {} encoded bytes", encoded.len()),
    }
}

struct Reader<'a> {
    input: Decoder<'a>,
    budget: Budget,
}

impl<'a> Reader<'a> {
    fn remaining(&self) -> usize {
        self.input.input().len() - self.input.position()
    }

    fn malformed(&self, what: impl std::fmt::Display) -> Flaw {
        Flaw::malformed(format!(
            "{what} (byte {} of the encoded value)",
            self.input.position()
        ))
    }

    /// Reads one item whose head carries a number, and checks that the head is the shortest.
    fn head<T>(
        &mut self,
        what: &str,
        read: impl FnOnce(&mut Decoder<'a>) -> Result<T, minicbor::decode::Error>,
        size: impl FnOnce(&T) -> usize,
    ) -> Result<T, Flaw> {
        let start = self.input.position();
        match read(&mut self.input) {
            Ok(item) if self.input.position() - start == size(&item) => Ok(item),
            Ok(_) => Err(self.malformed(format!("{what} with a longer head than it needs"))),
            Err(_) => {
                self.input.set_position(start);
                Err(self.malformed(format!("not {what}")))
            }
        }
    }

    fn int(&mut self) -> Result<i64, Flaw> {
        let size = |value: &i64| head_size(if *value < 0 { !*value as u64 } else { *value as u64 });
        self.head("an integer of 64 bits", |input| input.i64(), size)
    }

    fn unsigned(&mut self) -> Result<u64, Flaw> {
        self.head(
            "an unsigned integer",
            |input| input.u64(),
            |value| head_size(*value),
        )
    }

    fn text(&mut self) -> Result<&'a str, Flaw> {
        let text = self.head(
            "text",
            |input| input.str(),
            |text| head_size(text.len() as u64) + text.len(),
        )?;
        self.budget.bytes(text.len())?;
        Ok(text)
    }

    fn bytes(&mut self) -> Result<&'a [u8], Flaw> {
        let bytes = self.head(
            "a byte string",
            |input| input.bytes(),
            |bytes| head_size(bytes.len() as u64) + bytes.len(),
        )?;
        self.budget.bytes(bytes.len())?;
        Ok(bytes)
    }

    fn tag(&mut self) -> Result<u64, Flaw> {
        self.head(
            "a tag",
            |input| input.tag().map(|tag| tag.as_u64()),
            |tag| head_size(*tag),
        )
    }

    /// Reads the count of an array or a map whose parts take at least `least` bytes each.
    fn count(&mut self, map: bool, least: usize) -> Result<usize, Flaw> {
        let what = if map {
            "a map of known length"
        } else {
            "an array of known length"
        };
        let read = |input: &mut Decoder<'a>| {
            let count = if map { input.map()? } else { input.array()? };
            count.ok_or_else(minicbor::decode::Error::end_of_input)
        };
        let count = self.head(what, read, |count| head_size(*count))?;
        let most = self.remaining() / least;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(self.malformed(format!(
                "{count} parts are promised and at most {most} can follow"
            ))),
        }
    }

    fn array_of(&mut self, what: &str, expected: usize) -> Result<(), Flaw> {
        match self.count(false, 1)? {
            count if count == expected => Ok(()),
            count => Err(self.malformed(format!("{what} of {count} parts, {expected} expected"))),
        }
    }

    fn float(&mut self) -> Result<u64, Flaw> {
        let start = self.input.position();
        match self.input.input()[start..] {
            [0xfb, a, b, c, d, e, f, g, h, ..] => {
                self.input.set_position(start + 9);
                Ok(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => Err(self.malformed("not a float of 64 bits")),
        }
    }

    /// Reads one value that may be nested `depth` deep.
    fn value(&mut self, depth: usize) -> Result<Value, Flaw> {
        let inner = depth.checked_sub(1).ok_or_else(too_deep)?;
        let Some(first) = self.input.input().get(self.input.position()).copied() else {
            return Err(self.malformed("the bytes end inside a value"));
        };
        match first >> 5 {
            0 | 1 => self.int().map(Value::Int),
            2 => self.bytes().map(|bytes| Value::Bytes(bytes.to_vec())),
            3 => self.text().map(|text| Value::Str(text.to_owned())),
            4 => self.items(inner).map(Value::List),
            5 => self.dict(inner).map(Value::dict),
            6 => self.tagged(inner),
            _ => self.simple(first),
        }
    }

    fn simple(&mut self, first: u8) -> Result<Value, Flaw> {
        let value = match first {
            0xf4 => Value::Bool(false),
            0xf5 => Value::Bool(true),
            0xf6 => Value::None,
            0xfb => return self.float().map(Value::Float),
            _ => return Err(self.malformed(format!("a simple item 0x{first:02x} that values do not use"))),
        };
        self.input.set_position(self.input.position() + 1);
        Ok(value)
    }

    fn tagged(&mut self, depth: usize) -> Result<Value, Flaw> {
        match self.tag()? {
            TAG_TUPLE => self.items(depth).map(Value::Tuple),
            TAG_SET => self.set(depth).map(Value::Set),
            TAG_FROZENSET => self.set(depth).map(Value::FrozenSet),
            TAG_COMPLEX => {
                self.array_of("a complex number", 2)?;
                Ok(Value::Complex(self.float()?, self.float()?))
            }
            TAG_OBJECT => self.object(depth),
            TAG_TENSOR => self.tensor(depth).map(Value::from),
            TAG_BIG_POSITIVE => self.big(false),
            TAG_BIG_NEGATIVE => self.big(true),
            tag => Err(self.malformed(format!("a tag {tag} that values do not use"))),
        }
    }

    fn big(&mut self, negative: bool) -> Result<Value, Flaw> {
        let bytes = self.bytes()?;
        // Before one is added: a leading zero could swallow the carry and pass for canonical.
        if bytes.first() == Some(&0) {
            return Err(self.malformed("a big integer with a leading zero"));
        }
        let magnitude = if negative { plus_one(bytes) } else { bytes.to_vec() };
        check_big(negative, &magnitude)?;
        Ok(Value::BigInt { negative, magnitude })
    }

    fn items(&mut self, depth: usize) -> Result<Vec<Value>, Flaw> {
        let count = self.count(false, 1)?;
        self.budget.values(count)?;
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.value(depth)?);
        }
        Ok(items)
    }

    fn dict(&mut self, depth: usize) -> Result<Vec<(Value, Value)>, Flaw> {
        let count = self.count(true, 2)?;
        self.budget.values(count.saturating_mul(2))?;
        let mut items = Vec::with_capacity(count);
        let mut keys = Vec::with_capacity(count);
        for _ in 0..count {
            let start = self.input.position();
            let key = self.value(depth)?;
            keys.push(&self.input.input()[start..self.input.position()]);
            items.push((key, self.value(depth)?));
        }
        match repeated(keys.into_iter()) {
            Some(key) => Err(self.malformed(format!("a mapping with the key {} twice", shown(key)))),
            None => Ok(items),
        }
    }

    fn set(&mut self, depth: usize) -> Result<Vec<Value>, Flaw> {
        let count = self.count(false, 1)?;
        self.budget.values(count)?;
        let mut items = Vec::with_capacity(count);
        let mut last: Option<&[u8]> = None;
        for _ in 0..count {
            let start = self.input.position();
            items.push(self.value(depth)?);
            let encoded = &self.input.input()[start..self.input.position()];
            if last.is_some_and(|last| last >= encoded) {
                return Err(self.malformed("a set that is not sorted, or has an element twice"));
            }
            last = Some(encoded);
        }
        Ok(items)
    }

    fn fields(&mut self, sorted: bool, depth: usize) -> Result<Vec<(String, Value)>, Flaw> {
        let count = self.count(true, 2)?;
        self.budget.values(count)?;
        let mut fields: Vec<(String, Value)> = Vec::with_capacity(count);
        for _ in 0..count {
            let name = self.text()?;
            check_name("a field's name", name, MAX_NAME)?;
            if sorted && fields.last().is_some_and(|(last, _)| last.as_str() >= name) {
                return Err(self.malformed(format!("the attribute {name:?} out of order")));
            }
            fields.push((name.to_owned(), self.value(depth)?));
        }
        match repeated(fields.iter().map(|(name, _)| name.as_bytes())) {
            Some(name) => {
                Err(self.malformed(format!("a field named {:?} twice", String::from_utf8_lossy(name))))
            }
            None => Ok(fields),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, Flaw> {
        self.array_of("an object", 3)?;
        let (kind, name) = (self.text()?, self.text()?);
        check_name("an object's kind", kind, MAX_WORD)?;
        check_name("a type's name", name, MAX_NAME)?;
        Ok(Value::from(Object {
            kind: kind.to_owned(),
            name: name.to_owned(),
            fields: self.fields(false, depth)?,
        }))
    }

    fn tensor(&mut self, depth: usize) -> Result<Tensor, Flaw> {
        self.array_of("a tensor", 7)?;
        let dtype = self.text()?;
        check_name("a dtype", dtype, MAX_WORD)?;
        let dimensions = self.count(false, 1)?;
        check_dimensions(dimensions)?;
        self.budget.bytes(dimensions * DIMENSION_BYTES)?;
        let shape = (0..dimensions)
            .map(|_| self.unsigned())
            .collect::<Result<_, _>>()?;
        self.array_of("a tensor's strides", dimensions)?;
        let strides = (0..dimensions).map(|_| self.int()).collect::<Result<_, _>>()?;
        let offset = self.unsigned()?;
        let storage = self.unsigned()?;
        let storage =
            u32::try_from(storage).map_err(|_| self.malformed(format!("a storage number {storage}")))?;
        let device = self.text()?;
        check_name("a device", device, MAX_WORD)?;
        let attrs = self.fields(true, depth)?;
        Ok(Tensor {
            dtype: dtype.to_owned(),
            shape,
            strides,
            offset,
            storage,
            device: device.to_owned(),
            attrs,
        })
    }
}

/// Bytes of the shortest CBOR head that carries a number.
fn head_size(argument: u64) -> usize {
    match argument {
        0..=23 => 1,
        24..=0xff => 2,
        0x100..=0xffff => 3,
        0x1_0000..=0xffff_ffff => 5,
        _ => 9,
    }
}
