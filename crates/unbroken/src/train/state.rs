//! State of a Rust program on its way to a checkpoint and back: named values, and tensors by their bytes.
//!
//! Touches: the program's memory, read only on the way out. Nothing is copied that the program does not copy: a
//! tensor's bytes are borrowed until the checkpoint is written, and in a sampled journal only those are asked for that
//! the step's window covers. Where a window lies is known before the state is written, from the boundary before; where
//! that turns out wrong, the state is asked for once more.

use std::cell::{OnceCell, RefCell};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use crate::digest::Fingerprint;
use crate::error::{Error, Result};
use crate::format::value;
use crate::run::Memory;
use crate::state::{Tensor, Value};
use crate::storage::zeros;
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
    /// Not at all: no window was expected here.
    Passed,
}

impl<'a> Lazy<'a> {
    fn new(length: usize, fetch: Fetch<'a>) -> Lazy<'a> {
        Lazy {
            length,
            bytes: OnceCell::new(),
            fetch,
        }
    }

    fn get(&self) -> Result<&[u8]> {
        let bytes = self.bytes.get_or_init(|| match &self.fetch {
            Fetch::Whole(fetch) => {
                let fetch = fetch.borrow_mut().take();
                fetch.expect("bytes that are not there yet have a way to be fetched")()
            }
            Fetch::Parts(fetch, size) => fetch(0..self.length / size),
            Fetch::Passed => unreachable!("where all bytes are wanted, no tensor is passed over"),
        });
        check_length(self.length, bytes.as_slice())?;
        Ok(bytes.as_slice())
    }

    /// Some of the bytes; the others are fetched only if there is no other way. `None` where they were passed over.
    fn part(&self, range: Range<usize>) -> Result<Option<Bytes<'_>>> {
        match (&self.fetch, self.bytes.get()) {
            (Fetch::Passed, _) => Ok(None),
            (Fetch::Parts(fetch, size), None) => {
                let elements = range.start / size..range.end.div_ceil(*size);
                let (first, length) = (elements.start * size, elements.len() * size);
                let bytes = fetch(elements);
                check_length(length, bytes.as_slice())?;
                Ok(Some(bytes.narrow(range.start - first..range.end - first)))
            }
            _ => Ok(Some(Bytes::Borrowed(&self.get()?[range]))),
        }
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

/// Digests of a state, by component.
pub(super) type Digests = Vec<(String, Fingerprint)>;

/// How many bytes each part of the state had at an earlier boundary, by its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sizes(Vec<(String, u64)>);

impl Sizes {
    fn of(&self, name: &str) -> Option<u64> {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map(|(_, bytes)| *bytes)
    }

    fn put(&mut self, name: &str, bytes: u64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => *known = bytes,
            None => self.0.push((name.to_owned(), bytes)),
        }
    }
}

/// The bytes that a step's record digests of a part of `total` bytes: up to its end, and from its start on.
fn window(step: u64, total: u64) -> [Range<u64>; 2] {
    let length = WINDOW.min(total);
    let start = step.wrapping_mul(WINDOW).checked_rem(total).unwrap_or(0);
    let tail = length.min(total - start);
    [start..start + tail, 0..length - tail]
}

/// Takes down a program's state.
pub struct StateWriter<'a> {
    wanted: Wanted,
    /// What the parts are expected to have.
    sizes: Sizes,
    /// Scopes that are open, innermost last; the first is the root.
    scopes: Vec<Scope>,
    storages: Vec<Lazy<'a>>,
    /// Parts of the root, in order.
    parts: Vec<Part>,
    is_void: bool,
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
    /// Bytes of its tensors so far.
    written: u64,
    /// The bytes that will be asked for, if only some will be and it is known which.
    window: Option<[Range<u64>; 2]>,
}

impl Part {
    /// Whether some of the `length` bytes behind the next `skipped` ones are asked for, as far as is known.
    fn asks(&self, skipped: u64, length: u64) -> bool {
        let first = self.written + skipped;
        let next = first..first + length;
        match &self.window {
            None => true,
            Some(pieces) => pieces
                .iter()
                .any(|piece| piece.start < next.end && next.start < piece.end),
        }
    }
}

impl<'a> StateWriter<'a> {
    pub(super) fn new(wanted: Wanted, sizes: Sizes) -> StateWriter<'a> {
        StateWriter {
            wanted,
            sizes,
            scopes: vec![Scope::default()],
            storages: Vec::new(),
            parts: Vec::new(),
            is_void: false,
        }
    }

    /// Whether this boundary asks for anything but tensors' bytes. Where it does not, nothing is kept of names, plain
    /// values, shapes and types, and a program may leave out what costs it time, tensors apart.
    ///
    /// A sampled journal asks in one step of 16, a checkpoint always.
    pub fn asks_for_values(&self) -> bool {
        !matches!(self.wanted, Wanted::Windows(step) if !step.is_multiple_of(PLAIN_TURN))
    }

    /// Whether this boundary asks for some of `bytes` bytes of tensors, of those that are to be written next in this
    /// scope and behind their first `skipped` ones.
    pub fn asks_for(&self, skipped: u64, bytes: u64) -> bool {
        let part = self.parts.last().filter(|_| self.scopes.len() > 1);
        self.asks_for_values() || part.is_none_or(|part| part.asks(skipped, bytes))
    }

    /// Passes over the next tensor, of this many bytes, where this boundary does not ask for any of it; returns whether
    /// it did. Otherwise the tensor is to be written.
    ///
    /// For tensors of which it costs more to write that they are there than to know how large they are.
    pub fn passes(&mut self, bytes: u64) -> bool {
        match usize::try_from(bytes) {
            Ok(length) if !self.asks_for(0, bytes) => {
                self.keep(length, Fetch::Passed);
                true
            }
            _ => false,
        }
    }

    /// Has the whole state written once more, with every tensor asked for: what was passed over was not what it was
    /// taken for.
    pub fn start_over(&mut self) {
        self.is_void = true;
    }

    /// Begins a part of the root.
    fn begin(&mut self, name: &str, costly: bool) {
        let window = match self.wanted {
            Wanted::Windows(step) if !costly => self.sizes.of(name).map(|total| window(step, total)),
            _ => None,
        };
        self.parts.push(Part {
            name: name.to_owned(),
            first: self.storages.len(),
            costly,
            written: 0,
            window,
        });
    }

    fn keep(&mut self, length: usize, fetch: Fetch<'a>) {
        self.storages.push(Lazy::new(length, fetch));
        let part = self.parts.last_mut().expect("a tensor is in a part");
        part.written += length as u64;
    }

    fn insert(&mut self, name: &str, value: Value) -> Result<()> {
        let scope = self.scopes.last_mut().expect("the root scope is always open");
        if !scope.names.insert(name.to_owned()) {
            return Err(Error::invalid(format!("the state has two parts named `{name}`")));
        }
        scope.items.push((Value::Str(name.to_owned()), value));
        Ok(())
    }

    /// Writes a plain value.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the name was written before.
    pub fn value(&mut self, name: &str, value: impl Into<Value>) -> Result<()> {
        if !self.asks_for_values() {
            return Ok(());
        }
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
        let fetch = || Fetch::Whole(RefCell::new(Some(Box::new(fetch))));
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
        let fetch = || Fetch::Parts(Box::new(fetch), element_size.max(1));
        self.lazy(name, dtype, element_size, shape, fetch)
    }

    fn lazy(
        &mut self,
        name: &str,
        dtype: &str,
        element_size: usize,
        shape: &[u64],
        fetch: impl FnOnce() -> Fetch<'a>,
    ) -> Result<()> {
        let count = shape
            .iter()
            .try_fold(1u64, |count, size| count.checked_mul(*size));
        let length = count.and_then(|count| usize::try_from(count).ok()?.checked_mul(element_size));
        let length =
            length.ok_or_else(|| Error::invalid(format!("`{name}` of shape {shape:?} is too large")))?;
        let storage = u32::try_from(self.storages.len()).map_err(|_| Error::invalid("too many tensors"))?;
        if self.asks_for_values() {
            self.insert(name, Value::from(contiguous(dtype, shape, storage)))?;
        }
        if self.scopes.len() == 1 {
            self.begin(name, false);
        }
        let asked = self.parts.last().is_none_or(|part| part.asks(0, length as u64));
        self.keep(length, if asked { fetch() } else { Fetch::Passed });
        Ok(())
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
        if self.scopes.len() == 1 {
            self.begin(name, costly);
        }
        self.scopes.push(Scope::default());
        let written = write(self);
        let inside = self.scopes.pop().expect("the scope that was pushed");
        written?;
        if self.asks_for_values() {
            self.insert(name, Value::dict(inside.items))?;
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
    /// `bytes` may be estimated, as a function of the state alone; it is asked for in one step of 16.
    ///
    /// # Errors
    ///
    /// As [`StateWriter::scope`].
    pub fn costly(
        &mut self,
        name: &str,
        bytes: impl FnOnce() -> u64,
        write: impl FnOnce(&mut StateWriter<'a>) -> Result<()>,
    ) -> Result<()> {
        match self.wanted {
            Wanted::Windows(step) if !is_turn(step, bytes) => Ok(()),
            _ => self.scope_of(name, true, write),
        }
    }

    /// The tree and the storages.
    pub(super) fn finish(&mut self) -> Result<(Value, Vec<&[u8]>)> {
        let tree = Value::dict(std::mem::take(&mut self.scopes[0].items));
        let storages = self.storages.iter().map(Lazy::get).collect::<Result<_>>()?;
        Ok((tree, storages))
    }

    /// Digests of the state, part by part, and one of everything that is no tensor's bytes when its turn has come; and
    /// the parts' sizes, for the next boundary.
    ///
    /// No digests where the sizes that were expected are not those found, or the program says so: then the state is to
    /// be written again, with no expectations.
    pub(super) fn digests(&mut self) -> Result<(Option<Digests>, Sizes)> {
        let mut sizes = std::mem::take(&mut self.sizes);
        let mut digests = Vec::with_capacity(self.parts.len() + 1);
        for (place, part) in self.parts.iter().enumerate() {
            let next = self.parts.get(place + 1);
            let end = next.map_or(self.storages.len(), |next| next.first);
            sizes.put(&part.name, part.written);
            if let Some(digest) = self.digest(part, &self.storages[part.first..end])? {
                digests.push((format!("state/{}", part.name), digest));
            }
        }
        if self.is_void || digests.len() < self.parts.len() {
            return Ok((None, sizes));
        }
        if self.asks_for_values() {
            let tree = Value::dict(std::mem::take(&mut self.scopes[0].items));
            let bytes = value::encode(&tree)?;
            digests.push(("state/plain".to_owned(), Fingerprint::of(&bytes)));
        }
        Ok((Some(digests), sizes))
    }

    fn digest(&self, part: &Part, storages: &[Lazy<'a>]) -> Result<Option<Fingerprint>> {
        let step = match self.wanted {
            Wanted::Windows(step) if !part.costly => step,
            _ => {
                let regions: Vec<&[u8]> = storages.iter().map(Lazy::get).collect::<Result<_>>()?;
                return Ok(Some(Fingerprint::of_regions(&regions)));
            }
        };
        let mut pieces = Vec::new();
        for range in window(step, part.written) {
            if !cut(storages, range, &mut pieces)? {
                return Ok(None);
            }
        }
        let pieces: Vec<&[u8]> = pieces.iter().map(Bytes::as_slice).collect();
        Ok(Some(Fingerprint::of_window(&pieces, 0, WINDOW)))
    }
}

/// Whether it is the turn of a costly part.
fn is_turn(step: u64, bytes: impl FnOnce() -> u64) -> bool {
    let turns = || bytes().div_ceil(WINDOW * COSTLY_TURN).max(1);
    step.is_multiple_of(COSTLY_TURN) && (step / COSTLY_TURN).is_multiple_of(turns())
}

/// A whole storage's elements in row-major order.
fn contiguous(dtype: &str, shape: &[u64], storage: u32) -> Tensor {
    let mut strides = vec![1i64; shape.len()];
    for place in (1..shape.len()).rev() {
        strides[place - 1] = strides[place].saturating_mul(i64::try_from(shape[place]).unwrap_or(i64::MAX));
    }
    Tensor {
        dtype: dtype.to_owned(),
        shape: shape.to_vec(),
        strides,
        offset: 0,
        storage,
        device: "cpu".to_owned(),
        attrs: Vec::new(),
    }
}

/// Collects a range of bytes of storages laid end to end; those outside are not fetched. Returns whether all of them
/// could be had.
fn cut<'s>(storages: &'s [Lazy<'_>], range: Range<u64>, pieces: &mut Vec<Bytes<'s>>) -> Result<bool> {
    let (mut skip, mut left) = (range.start, range.end - range.start);
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
        let Some(piece) = storage.part(skip as usize..(skip + taken) as usize)? else {
            return Ok(false);
        };
        pieces.push(piece);
        left -= taken;
        skip = 0;
    }
    Ok(true)
}

/// The storages of a checkpoint, read once while it was verified, each until somebody takes it.
#[derive(Default)]
pub(super) struct Contents {
    storages: RefCell<Vec<Option<Vec<u8>>>>,
}

impl Contents {
    fn take(&self, storage: usize) -> Option<Vec<u8>> {
        self.storages.borrow_mut().get_mut(storage)?.take()
    }
}

impl Memory for Contents {
    fn make(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.storages.take(); // Before there is more.
        let refused = |error| Error::io("take memory to read", &checkpoint.info().path, error);
        let storages = checkpoint.manifest().storages.iter();
        let made: Result<_> = storages
            .map(|entry| zeros(entry.length).map(Some).map_err(refused))
            .collect();
        self.storages = RefCell::new(made?);
        Ok(())
    }

    fn targets(&mut self) -> Vec<(usize, &mut [u8])> {
        let storages = self.storages.get_mut().iter_mut().enumerate();
        storages
            .filter_map(|(index, bytes)| Some((index, bytes.as_mut()?.as_mut_slice())))
            .collect()
    }
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
    contents: &'c Contents,
    path: String,
    items: &'c [(Value, Value)],
    taken: Vec<bool>,
}

impl<'c> StateReader<'c> {
    pub(super) fn new(
        checkpoint: &'c Checkpoint,
        contents: &'c Contents,
        path: &str,
        tree: &'c Value,
    ) -> Result<StateReader<'c>> {
        let Value::Dict(items) = tree else {
            return Err(Error::invalid(format!(
                "`{path}` of the checkpoint holds no named values"
            )));
        };
        Ok(StateReader {
            checkpoint,
            contents,
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
        let storage = tensor.storage as usize;
        let bytes = match self.contents.take(storage) {
            Some(bytes) => bytes,
            None => self.checkpoint.read(storage)?, // Taken before.
        };
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
        let mut inside = StateReader::new(self.checkpoint, self.contents, &self.full(name), value)?;
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

    fn found(out: &mut StateWriter<'_>) -> Digests {
        out.digests().unwrap().0.unwrap()
    }

    fn digests(wanted: Wanted, numbers: &[u8]) -> Digests {
        let mut out = StateWriter::new(wanted, Sizes::default());
        write(&mut out, numbers, 1000);
        found(&mut out)
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
            let mut out = StateWriter::new(Wanted::Windows(step), Sizes::default());
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

    /// Writes a part of `sizes` with these numbers, passing over what may be passed over, and says what was fetched.
    fn digests_expecting(
        step: u64,
        expected: Sizes,
        tensors: &[Vec<u8>],
    ) -> ((Option<Digests>, Sizes), Vec<usize>) {
        let asked = std::cell::RefCell::new(Vec::new());
        let mut out = StateWriter::new(Wanted::Windows(step), expected);
        out.scope("net", |out| {
            for (place, tensor) in tensors.iter().enumerate() {
                let asked = &asked;
                let bytes = tensor.len() as u64;
                if place % 2 == 0 || !out.passes(bytes) {
                    out.tensor_with(&place.to_string(), "uint8", 1, &[bytes], move || {
                        asked.borrow_mut().push(place);
                        Bytes::Borrowed(tensor)
                    })?;
                }
            }
            Ok(())
        })
        .unwrap();
        let found = out.digests().unwrap();
        drop(out);
        (found, asked.into_inner())
    }

    #[test]
    fn what_is_passed_over_changes_no_digest_and_is_not_fetched() {
        let tensors: Vec<Vec<u8>> = [70_000, 5, 0, 90_000, 41, 65_536]
            .iter()
            .enumerate()
            .map(|(place, length)| (0..*length).map(|i| (i * 7 + place) as u8).collect())
            .collect();
        let mut sizes = Sizes::default();
        for step in 1..40 {
            let ((whole, _), _) = digests_expecting(step, Sizes::default(), &tensors);
            let ((passed, found), asked) = digests_expecting(step, sizes, &tensors);
            assert_eq!(whole.unwrap(), passed.unwrap(), "step {step}");
            assert!(asked.len() < tensors.len(), "step {step}: {asked:?}");
            sizes = found;
        }
    }

    #[test]
    fn where_a_part_has_other_sizes_than_were_expected_the_state_is_asked_for_once_more() {
        let tensors = vec![vec![1; 200_000], vec![2; 200_000], vec![3; 300_000]];
        let ((_, sizes), _) = digests_expecting(3, Sizes::default(), &tensors);
        let grown = vec![vec![1; 200_000], vec![2; 500_000], vec![3; 300_000]];
        let ((found, sizes), _) = digests_expecting(11, sizes, &grown);
        assert_eq!(found, None);
        let ((expected, _), _) = digests_expecting(11, Sizes::default(), &grown);
        assert_eq!(digests_expecting(11, sizes, &grown).0.0, expected);
    }

    #[test]
    fn a_program_that_was_wrong_about_what_it_passed_over_starts_over() {
        let mut out = StateWriter::new(Wanted::Windows(3), Sizes::default());
        out.tensor("n", &[3], &[1u8, 2, 3]).unwrap();
        out.start_over();
        assert_eq!(out.digests().unwrap().0, None);
    }

    #[test]
    fn a_tensor_given_in_parts_has_the_digests_of_the_whole() {
        let numbers: Vec<u32> = (0..50_000).collect();
        let all = bytes_of(&numbers);
        for wanted in (0..7).map(Wanted::Windows).chain([Wanted::All]) {
            let (mut whole, mut parts) = (
                StateWriter::new(wanted, Sizes::default()),
                StateWriter::new(wanted, Sizes::default()),
            );
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
        let mut out = StateWriter::new(Wanted::All, Sizes::default());
        write(&mut out, &numbers, 1000);
        out.value("more", 1i64).unwrap();
        assert_ne!(found(&mut out)[2], digests[2]);
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
            let mut out = StateWriter::new(wanted, Sizes::default());
            out.costly("optimizer", || bytes, |out| out.value("time", 3i64))
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
            let mut out = StateWriter::new(Wanted::Windows(16), Sizes::default());
            out.costly(
                "optimizer",
                || 0,
                |out| out.tensor("m", &[numbers.len() as u64], numbers),
            )
            .unwrap();
            found(&mut out)
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
        let mut out = StateWriter::new(Wanted::All, Sizes::default());
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
