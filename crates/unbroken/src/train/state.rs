//! State of a Rust program on its way to a checkpoint and back: named values, and tensors by their bytes.
//!
//! Touches: the program's memory, read only on the way out. Nothing is copied that the program does not copy: a
//! tensor's bytes are borrowed until the checkpoint is written, and in a sampled journal only those are asked for that
//! the step's window covers.

use std::cell::{OnceCell, RefCell};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use crate::digest::Fingerprint;
use crate::error::{Error, Result};
use crate::format::value;
use crate::state::{Tensor, Value};
use crate::store::Checkpoint;

/// Something that takes part in a training and has to come back as it was.
pub trait Stateful {
    /// Writes everything that can influence what comes later. The same names in the same order at every boundary,
    /// as far as the state itself is the same.
    ///
    /// # Errors
    ///
    /// A name written twice; whatever keeps the state from being read.
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()>;

    /// Takes back what [`Stateful::state`] wrote. What is written and not taken is an error, and so is the reverse.
    ///
    /// # Errors
    ///
    /// Names, shapes or types that are not those of this program; damage, found before bytes are handed out.
    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()>;
}

/// Bytes of a tensor, borrowed from the program or kept alive for it.
#[derive(Clone)]
pub enum Bytes<'a> {
    /// Memory of the program.
    Borrowed(&'a [u8]),
    /// Memory that several tensors may share, and the part of it that is meant.
    Shared(Arc<dyn AsRef<[u8]> + 'a>, Range<usize>),
}

impl Bytes<'_> {
    /// All the bytes of a buffer.
    pub fn owned<'a>(buffer: impl AsRef<[u8]> + 'a) -> Bytes<'a> {
        let length = buffer.as_ref().len();
        Bytes::Shared(Arc::new(buffer), 0..length)
    }

    fn narrow(self, range: Range<usize>) -> Self {
        match self {
            Bytes::Borrowed(bytes) => Bytes::Borrowed(&bytes[range]),
            Bytes::Shared(buffer, part) => {
                Bytes::Shared(buffer, part.start + range.start..part.start + range.end)
            }
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Borrowed(bytes) => bytes,
            Bytes::Shared(buffer, range) => &(**buffer).as_ref()[range.clone()],
        }
    }
}

/// Bytes that are fetched when somebody asks for them.
struct Lazy<'a> {
    length: usize,
    bytes: OnceCell<Bytes<'a>>,
    fetch: Fetch<'a>,
}

type FetchAll<'a> = Box<dyn FnOnce() -> Bytes<'a> + 'a>;
type FetchSome<'a> = Box<dyn Fn(Range<usize>) -> Bytes<'a> + 'a>;

/// How bytes are fetched.
enum Fetch<'a> {
    /// All of them.
    Whole(RefCell<Option<FetchAll<'a>>>),
    /// Those of some elements, of this size each.
    Parts(FetchSome<'a>, usize),
}

impl Lazy<'_> {
    fn get(&self) -> Result<&[u8]> {
        let bytes = self.bytes.get_or_init(|| match &self.fetch {
            Fetch::Whole(fetch) => {
                let fetch = fetch.borrow_mut().take();
                fetch.expect("bytes that are not there yet have a way to be fetched")()
            }
            Fetch::Parts(fetch, size) => fetch(0..self.length / size),
        });
        check_length(self.length, bytes.as_slice())?;
        Ok(bytes.as_slice())
    }

    /// Some of the bytes; the others are fetched only if there is no other way.
    fn part(&self, range: Range<usize>) -> Result<Bytes<'_>> {
        if let (Fetch::Parts(fetch, size), None) = (&self.fetch, self.bytes.get()) {
            let elements = range.start / size..range.end.div_ceil(*size);
            let (first, length) = (elements.start * size, elements.len() * size);
            let bytes = fetch(elements);
            check_length(length, bytes.as_slice())?;
            return Ok(bytes.narrow(range.start - first..range.end - first));
        }
        Ok(Bytes::Borrowed(&self.get()?[range]))
    }
}

fn check_length(expected: usize, bytes: &[u8]) -> Result<()> {
    if bytes.len() == expected {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "a tensor of {expected} bytes by its shape has {}",
        bytes.len()
    )))
}

impl From<i64> for Value {
    fn from(number: i64) -> Value {
        Value::Int(number)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Value {
        Value::integer(false, &number.to_be_bytes())
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Value {
        Value::Float(number.to_bits())
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Value {
        Value::Bool(flag)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Str(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Str(text)
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A number type whose slices can be a tensor's bytes as they lie in memory.
pub trait Element: sealed::Sealed + Copy + 'static {
    /// Its name in checkpoints.
    const DTYPE: &'static str;
}

macro_rules! elements {
    ($($type:ty => $name:literal),*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: &'static str = $name;
        }
    )*};
}

elements!(
    f32 => "float32", f64 => "float64",
    i8 => "int8", i16 => "int16", i32 => "int32", i64 => "int64",
    u8 => "uint8", u16 => "uint16", u32 => "uint32", u64 => "uint64"
);

/// The bytes of a slice of numbers.
fn bytes_of<T: Element>(numbers: &[T]) -> &[u8] {
    // SAFETY: `Element` is sealed over primitive numbers, which have no padding; the length in bytes is the slice's own.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), std::mem::size_of_val(numbers)) }
}

/// The bytes of a slice of numbers, to be written.
fn bytes_of_mut<T: Element>(numbers: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; every bit pattern is a value of a primitive number.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), std::mem::size_of_val(numbers)) }
}

/// Which bytes the journal wants of one boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All: a checkpoint, or a journal of the full level.
    All,
    /// The windows of this step.
    Windows(u64),
}

/// Bytes of each part that a sampled step digests: steps in sequence cover all of it.
const WINDOW: u64 = 64 << 10;

/// How many steps pass until everything that is no tensor's bytes is digested again, in a sampled journal.
const PLAIN_TURN: u64 = 16;

/// How many steps at least pass until a costly part is digested again, in a sampled journal.
const COSTLY_TURN: u64 = 16;

/// Takes down a program's state.
pub struct StateWriter<'a> {
    wanted: Wanted,
    /// Scopes that are open, innermost last; the first is the root.
    scopes: Vec<Scope>,
    storages: Vec<Lazy<'a>>,
    /// Parts of the root, in order.
    parts: Vec<Part>,
}

/// Values under names, none twice.
#[derive(Default)]
struct Scope {
    items: Vec<(Value, Value)>,
    names: HashSet<String>,
}

/// What a journal digests by itself.
struct Part {
    name: String,
    /// Its first storage.
    first: usize,
    /// Whether reading some of it costs as much as reading all of it.
    costly: bool,
}

impl<'a> StateWriter<'a> {
    pub(super) fn new(wanted: Wanted) -> StateWriter<'a> {
        StateWriter {
            wanted,
            scopes: vec![Scope::default()],
            storages: Vec::new(),
            parts: Vec::new(),
        }
    }

    fn insert(&mut self, name: &str, value: Value) -> Result<()> {
        let root = self.scopes.len() == 1;
        let scope = self.scopes.last_mut().expect("the root scope is always open");
        if !scope.names.insert(name.to_owned()) {
            return Err(Error::invalid(format!("the state has two parts named `{name}`")));
        }
        let is_tensor = matches!(value, Value::Tensor(_));
        scope.items.push((Value::Str(name.to_owned()), value));
        if root && is_tensor {
            self.parts.push(Part {
                name: name.to_owned(),
                first: self.storages.len() - 1,
                costly: false,
            });
        }
        Ok(())
    }

    /// Writes a plain value.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the name was written before.
    pub fn value(&mut self, name: &str, value: impl Into<Value>) -> Result<()> {
        self.insert(name, value.into())
    }

    /// Writes a tensor of numbers, its last dimension contiguous, and borrows it until the checkpoint is written.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the name was written before, or the shape does not hold as many numbers.
    pub fn tensor<T: Element>(&mut self, name: &str, shape: &[u64], numbers: &'a [T]) -> Result<()> {
        let bytes = bytes_of(numbers);
        if shape.iter().product::<u64>() != numbers.len() as u64 {
            return Err(Error::invalid(format!(
                "`{name}` of shape {shape:?} holds {} numbers",
                numbers.len()
            )));
        }
        self.tensor_with(name, T::DTYPE, size_of::<T>(), shape, move || {
            Bytes::Borrowed(bytes)
        })
    }

    /// Writes a tensor whose bytes are fetched only if they are wanted.
    ///
    /// `fetch` gives the elements in row-major order, `element_size` bytes each, little-endian.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the name was written before.
    pub fn tensor_with(
        &mut self,
        name: &str,
        dtype: &str,
        element_size: usize,
        shape: &[u64],
        fetch: impl FnOnce() -> Bytes<'a> + 'a,
    ) -> Result<()> {
        let fetch = Fetch::Whole(RefCell::new(Some(Box::new(fetch))));
        self.lazy(name, dtype, element_size, shape, fetch)
    }

    /// Like [`StateWriter::tensor_with`], for tensors of which some elements can be had for less than all of them:
    /// `fetch` is given their range in row-major order.
    ///
    /// # Errors
    ///
    /// As [`StateWriter::tensor_with`].
    pub fn tensor_in_parts(
        &mut self,
        name: &str,
        dtype: &str,
        element_size: usize,
        shape: &[u64],
        fetch: impl Fn(Range<usize>) -> Bytes<'a> + 'a,
    ) -> Result<()> {
        self.lazy(
            name,
            dtype,
            element_size,
            shape,
            Fetch::Parts(Box::new(fetch), element_size.max(1)),
        )
    }

    fn lazy(
        &mut self,
        name: &str,
        dtype: &str,
        element_size: usize,
        shape: &[u64],
        fetch: Fetch<'a>,
    ) -> Result<()> {
        let count = shape
            .iter()
            .try_fold(1u64, |count, size| count.checked_mul(*size));
        let length = count.and_then(|count| usize::try_from(count).ok()?.checked_mul(element_size));
        let length =
            length.ok_or_else(|| Error::invalid(format!("`{name}` of shape {shape:?} is too large")))?;
        let storage = u32::try_from(self.storages.len()).map_err(|_| Error::invalid("too many tensors"))?;
        self.storages.push(Lazy {
            length,
            bytes: OnceCell::new(),
            fetch,
        });
        let mut strides = vec![1i64; shape.len()];
        for place in (1..shape.len()).rev() {
            strides[place - 1] =
                strides[place].saturating_mul(i64::try_from(shape[place]).unwrap_or(i64::MAX));
        }
        let tensor = Tensor {
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
            strides,
            offset: 0,
            storage,
            device: "cpu".to_owned(),
            attrs: Vec::new(),
        };
        self.insert(name, Value::Tensor(tensor))
    }

    /// Writes what `write` writes under one name.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the name was written before; whatever `write` returns.
    pub fn scope(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<()> {
        self.scope_of(name, false, write)
    }

    fn scope_of(
        &mut self,
        name: &str,
        costly: bool,
        write: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<()> {
        let first = self.storages.len();
        self.scopes.push(Scope::default());
        let written = write(self);
        let inside = self.scopes.pop().expect("the scope that was pushed");
        written?;
        self.insert(name, Value::Dict(inside.items))?;
        if self.scopes.len() == 1 {
            self.parts.push(Part {
                name: name.to_owned(),
                first,
                costly,
            });
        }
        Ok(())
    }

    /// Writes another object's state under one name.
    ///
    /// # Errors
    ///
    /// As [`StateWriter::scope`].
    pub fn part(&mut self, name: &str, part: &'a mut (impl Stateful + ?Sized)) -> Result<()> {
        self.scope(name, |out| part.state(out))
    }

    /// Like [`StateWriter::scope`], for state of which some costs as much to read as all of it, about `bytes`: a sampled
    /// journal asks for it so seldom that it reads no more of it in a step than of other parts, on average, and at most
    /// once in 16 steps. Checkpoints have it always.
    ///
    /// `bytes` may be estimated, as a function of the state alone.
    ///
    /// # Errors
    ///
    /// As [`StateWriter::scope`].
    pub fn costly(
        &mut self,
        name: &str,
        bytes: u64,
        write: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<()> {
        match self.wanted {
            Wanted::Windows(step) if !step.is_multiple_of(COSTLY_TURN.max(bytes / WINDOW)) => Ok(()),
            _ => self.scope_of(name, true, write),
        }
    }

    /// The tree and the storages.
    pub(super) fn finish(&mut self) -> Result<(Value, Vec<&[u8]>)> {
        let tree = Value::Dict(std::mem::take(&mut self.scopes[0].items));
        let storages = self.storages.iter().map(Lazy::get).collect::<Result<_>>()?;
        Ok((tree, storages))
    }

    /// Digests of the state, part by part, and one of everything that is no tensor's bytes when its turn has come.
    pub(super) fn digests(&mut self) -> Result<Vec<(String, Fingerprint)>> {
        let mut digests = Vec::with_capacity(self.parts.len() + 1);
        for (place, part) in self.parts.iter().enumerate() {
            let next = self.parts.get(place + 1);
            let end = next.map_or(self.storages.len(), |next| next.first);
            let storages = &self.storages[part.first..end];
            digests.push((
                format!("state/{}", part.name),
                self.digest(storages, part.costly)?,
            ));
        }
        if !matches!(self.wanted, Wanted::Windows(step) if !step.is_multiple_of(PLAIN_TURN)) {
            let tree = Value::Dict(std::mem::take(&mut self.scopes[0].items));
            let bytes = value::encode(&tree)?;
            digests.push(("state/plain".to_owned(), Fingerprint::of(&bytes)));
        }
        Ok(digests)
    }

    fn digest(&self, storages: &[Lazy<'a>], whole: bool) -> Result<Fingerprint> {
        let step = match self.wanted {
            Wanted::Windows(step) if !whole => step,
            _ => {
                let regions: Vec<&[u8]> = storages.iter().map(Lazy::get).collect::<Result<_>>()?;
                return Ok(Fingerprint::of_regions(&regions));
            }
        };
        let total: u64 = storages.iter().map(|storage| storage.length as u64).sum();
        let length = WINDOW.min(total);
        let start = step.wrapping_mul(WINDOW).checked_rem(total).unwrap_or(0);
        let tail = length.min(total - start);
        let mut pieces = Vec::new();
        cut(storages, start, tail, &mut pieces)?;
        cut(storages, 0, length - tail, &mut pieces)?;
        let pieces: Vec<&[u8]> = pieces.iter().map(Bytes::as_slice).collect();
        Ok(Fingerprint::of_window(&pieces, 0, length))
    }
}

/// Collects bytes `[start, start + length)` of storages laid end to end; those outside are not fetched.
fn cut<'s>(storages: &'s [Lazy<'_>], start: u64, length: u64, pieces: &mut Vec<Bytes<'s>>) -> Result<()> {
    let (mut skip, mut left) = (start, length);
    for storage in storages {
        let size = storage.length as u64;
        if left == 0 {
            break;
        }
        if skip >= size {
            skip -= size;
            continue;
        }
        let taken = left.min(size - skip);
        pieces.push(storage.part(skip as usize..(skip + taken) as usize)?);
        left -= taken;
        skip = 0;
    }
    Ok(())
}

/// One tensor of a checkpoint, its bytes verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorView {
    /// Element type by its name.
    pub dtype: String,
    /// Size of each dimension.
    pub shape: Vec<u64>,
    /// The elements in row-major order, little-endian.
    pub bytes: Vec<u8>,
}

/// Gives a program's state back.
pub struct StateReader<'c> {
    checkpoint: &'c Checkpoint,
    path: String,
    items: &'c [(Value, Value)],
    taken: Vec<bool>,
}

impl<'c> StateReader<'c> {
    pub(super) fn new(checkpoint: &'c Checkpoint, path: &str, tree: &'c Value) -> Result<StateReader<'c>> {
        let Value::Dict(items) = tree else {
            return Err(Error::invalid(format!(
                "`{path}` of the checkpoint holds no named values"
            )));
        };
        Ok(StateReader {
            checkpoint,
            path: path.to_owned(),
            items,
            taken: vec![false; items.len()],
        })
    }

    fn full(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}/{name}", self.path)
        }
    }

    fn wrong(&self, name: &str, expected: &str) -> Error {
        Error::invalid(format!(
            "`{}` of the checkpoint is not {expected}",
            self.full(name)
        ))
    }

    /// Names that are there and not taken yet, in order.
    pub fn names(&self) -> Vec<&'c str> {
        let left = self.items.iter().zip(&self.taken).filter(|(_, taken)| !**taken);
        left.filter_map(|((key, _), _)| {
            if let Value::Str(key) = key {
                Some(key.as_str())
            } else {
                None
            }
        })
        .collect()
    }

    /// Takes a value.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the checkpoint has none of this name.
    pub fn value(&mut self, name: &str) -> Result<&'c Value> {
        let place = self
            .items
            .iter()
            .position(|(key, _)| matches!(key, Value::Str(key) if key == name));
        let place = place.ok_or_else(|| {
            let there = if self.path.is_empty() {
                "the checkpoint"
            } else {
                &self.path
            };
            Error::invalid(format!(
                "`{}` is not in {there}; it has {}",
                self.full(name),
                self.names().join(", ")
            ))
        })?;
        self.taken[place] = true;
        Ok(&self.items[place].1)
    }

    /// Takes an integer.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where there is none of this name.
    pub fn int(&mut self, name: &str) -> Result<i64> {
        match self.value(name)? {
            Value::Int(number) => Ok(*number),
            _ => Err(self.wrong(name, "an integer")),
        }
    }

    /// Takes a float, by its bits.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where there is none of this name.
    pub fn float(&mut self, name: &str) -> Result<f64> {
        match self.value(name)? {
            Value::Float(bits) => Ok(f64::from_bits(*bits)),
            _ => Err(self.wrong(name, "a float")),
        }
    }

    /// Takes text.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where there is none of this name.
    pub fn text(&mut self, name: &str) -> Result<&'c str> {
        match self.value(name)? {
            Value::Str(text) => Ok(text),
            _ => Err(self.wrong(name, "text")),
        }
    }

    /// Takes a tensor of any type and shape.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where there is none of this name; [`Error::Damaged`].
    pub fn tensor(&mut self, name: &str) -> Result<TensorView> {
        let Value::Tensor(tensor) = self.value(name)? else {
            return Err(self.wrong(name, "a tensor"));
        };
        let bytes = self.checkpoint.read(tensor.storage as usize)?;
        Ok(TensorView {
            dtype: tensor.dtype.clone(),
            shape: tensor.shape.clone(),
            bytes,
        })
    }

    /// Takes a tensor of numbers into memory that is there.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where there is none of this name, type and shape, and nothing was changed;
    /// [`Error::Damaged`].
    pub fn tensor_into<T: Element>(&mut self, name: &str, shape: &[u64], into: &mut [T]) -> Result<()> {
        let tensor = self.tensor(name)?;
        let into = bytes_of_mut(into);
        if tensor.dtype != T::DTYPE || tensor.shape != shape || tensor.bytes.len() != into.len() {
            let found = format!("{} {:?}", tensor.dtype, tensor.shape);
            let expected = format!("{} {shape:?}", T::DTYPE);
            return Err(Error::invalid(format!(
                "`{}` is {found} in the checkpoint and {expected} in the program",
                self.full(name)
            )));
        }
        into.copy_from_slice(&tensor.bytes);
        Ok(())
    }

    /// Takes what was written with [`StateWriter::scope`]. Everything in it has to be taken.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where there is none of this name, or something in it was not taken; what `read` returns.
    pub fn scope<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&mut StateReader<'c>) -> Result<T>,
    ) -> Result<T> {
        let value = self.value(name)?;
        let mut inside = StateReader::new(self.checkpoint, &self.full(name), value)?;
        let result = read(&mut inside)?;
        inside.finish()?;
        Ok(result)
    }

    /// Takes what was written with [`StateWriter::part`].
    ///
    /// # Errors
    ///
    /// As [`StateReader::scope`].
    pub fn part(&mut self, name: &str, part: &mut (impl Stateful + ?Sized)) -> Result<()> {
        self.scope(name, |from| part.restore(from))
    }

    pub(super) fn finish(&self) -> Result<()> {
        match self.names().as_slice() {
            [] => Ok(()),
            names => {
                let names: Vec<String> = names.iter().map(|name| self.full(name)).collect();
                Err(Error::invalid(format!(
                    "the program did not take `{}` from the checkpoint",
                    names.join("`, `")
                )))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part of `first` numbers, then one of the rest.
    fn write<'a>(out: &mut StateWriter<'a>, numbers: &'a [u8], first: usize) {
        let (head, rest) = numbers.split_at(first);
        out.scope("net", |out| {
            out.tensor("head", &[head.len() as u64], head)?;
            out.tensor("rest", &[rest.len() as u64], rest)
        })
        .unwrap();
        out.tensor("alone", &[3], &numbers[..3]).unwrap();
        out.value("count", 7i64).unwrap();
    }

    fn digests(wanted: Wanted, numbers: &[u8]) -> Vec<(String, Fingerprint)> {
        let mut out = StateWriter::new(wanted);
        write(&mut out, numbers, 1000);
        out.digests().unwrap()
    }

    #[test]
    fn windows_of_steps_in_sequence_see_every_byte() {
        let numbers: Vec<u8> = (0..150_001u32).map(|i| (i * 31) as u8).collect();
        for place in [0, 999, 1000, 65_535, 65_536, 131_071, 131_072, 150_000] {
            let mut changed = numbers.clone();
            changed[place] ^= 1;
            let seen = (0..3).filter(|step| {
                let (before, after) = (
                    digests(Wanted::Windows(*step), &numbers),
                    digests(Wanted::Windows(*step), &changed),
                );
                before[0] != after[0]
            });
            assert!((1..=2).contains(&seen.count()), "byte {place}");
            assert_ne!(
                digests(Wanted::All, &numbers)[0],
                digests(Wanted::All, &changed)[0]
            );
        }
    }

    #[test]
    fn a_window_asks_only_for_the_tensors_that_it_touches() {
        let asked = std::cell::RefCell::new(Vec::new());
        let digest = |step| {
            let mut out = StateWriter::new(Wanted::Windows(step));
            out.scope("net", |out| {
                for name in ["a", "b", "c"] {
                    let asked = &asked;
                    out.tensor_with(name, "uint8", 1, &[65_536], move || {
                        asked.borrow_mut().push(name);
                        Bytes::owned(vec![0; 65_536])
                    })?;
                }
                Ok(())
            })
            .unwrap();
            out.digests().unwrap();
        };
        digest(1);
        digest(5);
        digest(6);
        assert_eq!(*asked.borrow(), ["b", "c", "a"]);
    }

    #[test]
    fn a_tensor_given_in_parts_has_the_digests_of_the_whole() {
        let numbers: Vec<u32> = (0..50_000).collect();
        let all = bytes_of(&numbers);
        for wanted in (0..7).map(Wanted::Windows).chain([Wanted::All]) {
            let (mut whole, mut parts) = (StateWriter::new(wanted), StateWriter::new(wanted));
            whole.tensor("n", &[50_000], &numbers).unwrap();
            let fetch = |range: Range<usize>| Bytes::Borrowed(&all[range.start * 4..range.end * 4]);
            parts.tensor_in_parts("n", "uint32", 4, &[50_000], fetch).unwrap();
            assert_eq!(whole.digests().unwrap(), parts.digests().unwrap(), "{wanted:?}");
            assert_eq!(parts.finish().unwrap().1, [all]);
        }
    }

    #[test]
    fn parts_are_named_and_plain_values_count() {
        let numbers = vec![1; 2000];
        let digests = digests(Wanted::All, &numbers);
        let names: Vec<&str> = digests.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["state/net", "state/alone", "state/plain"]);
        let mut out = StateWriter::new(Wanted::All);
        write(&mut out, &numbers, 1000);
        out.value("more", 1i64).unwrap();
        assert_ne!(out.digests().unwrap()[2], digests[2]);
    }

    #[test]
    fn costly_parts_are_in_every_checkpoint_and_in_the_journal_as_seldom_as_their_size_asks() {
        let megabyte = 1 << 20;
        for (wanted, bytes, there) in [
            (Wanted::All, megabyte, true),
            (Wanted::Windows(32), 0, true),
            (Wanted::Windows(33), 0, false),
            (Wanted::Windows(32), 4 * megabyte, false),
            (Wanted::Windows(64), 4 * megabyte, true),
        ] {
            let mut out = StateWriter::new(wanted);
            out.costly("optimizer", bytes, |out| out.value("time", 3i64))
                .unwrap();
            assert_eq!(
                out.finish().unwrap().0.get("optimizer").is_some(),
                there,
                "{wanted:?}, {bytes} bytes"
            );
        }
    }

    #[test]
    fn a_costly_part_is_digested_whole_when_its_turn_comes() {
        let digests = |numbers: &[u8]| {
            let mut out = StateWriter::new(Wanted::Windows(16));
            out.costly("optimizer", 0, |out| {
                out.tensor("m", &[numbers.len() as u64], numbers)
            })
            .unwrap();
            out.digests().unwrap()
        };
        let mut numbers = vec![0; 300_000];
        let before = digests(&numbers);
        for place in [0, 150_000, 299_999] {
            numbers[place] = 1;
            assert_ne!(digests(&numbers)[0], before[0], "byte {place}");
            numbers[place] = 0;
        }
    }

    #[test]
    fn a_name_twice_and_a_shape_that_does_not_fit_are_refused() {
        let numbers = [1.0f32; 6];
        let mut out = StateWriter::new(Wanted::All);
        out.tensor("w", &[2, 3], &numbers).unwrap();
        assert!(
            out.tensor("w", &[2, 3], &numbers)
                .unwrap_err()
                .to_string()
                .contains("two parts named `w`")
        );
        assert!(out.tensor("v", &[2, 4], &numbers).is_err());
        out.tensor_with("lazy", "float32", 4, &[2], || Bytes::owned(vec![0; 7]))
            .unwrap();
        assert!(out.finish().unwrap_err().to_string().contains("8 bytes"));
    }
}
