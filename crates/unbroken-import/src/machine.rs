//! The pickle machine: opcodes to nodes. It has a stack, a memo and an arena, and calls nothing.
//!
//! Touches: the bytes it is given. Each opcode makes at most one node; what it copies is paid from a budget that grows
//! with the input, so that no input costs more than a multiple of its length.

use std::collections::HashMap;

use unbroken::{Result, Value};

use crate::meaning::{self, Storages};
use crate::node::{Id, Node};
use crate::{flawed, refused};

/// Most nodes of one file; a checkpoint of a large model has some tens of thousands.
const MAX_NODES: usize = 1 << 22;
/// Longest integer, in bytes.
const MAX_INTEGER: usize = 4096;
/// Longest name of a global or digits of a number as text.
const MAX_LINE: usize = 4096;

/// Nodes of one or several pickles.
#[derive(Debug)]
pub(crate) struct Arena {
    nodes: Vec<Node>,
    /// Bytes and parts that may still be copied.
    budget: usize,
}

impl Arena {
    pub(crate) fn new(input_bytes: usize) -> Arena {
        Arena {
            nodes: Vec::new(),
            budget: input_bytes.saturating_mul(4).saturating_add(1 << 16),
        }
    }

    pub(crate) fn get(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    pub(crate) fn add(&mut self, node: Node) -> Result<Id> {
        if self.nodes.len() >= MAX_NODES {
            return Err(refused(format!("more than {MAX_NODES} objects in one file")));
        }
        self.nodes.push(node);
        Ok(Id::try_from(self.nodes.len() - 1).expect("the limit fits in an index"))
    }

    /// Pays for copying something.
    pub(crate) fn spend(&mut self, amount: usize) -> Result<()> {
        let left = self.budget.checked_sub(amount);
        self.budget =
            left.ok_or_else(|| refused("a file whose content is many times larger than the file"))?;
        Ok(())
    }
}

/// Runs the pickle that starts at `at`, which is moved behind it; returns what it leaves.
pub(crate) fn run(arena: &mut Arena, storages: &mut Storages, bytes: &[u8], at: &mut usize) -> Result<Id> {
    let mut machine = Machine {
        arena,
        storages,
        bytes,
        at: *at,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    let result = machine.run();
    *at = machine.at;
    result
}

struct Machine<'a> {
    arena: &'a mut Arena,
    storages: &'a mut Storages,
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Id>,
    /// Heights of the stack at which marks lie.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Id> {
        loop {
            let place = self.at;
            let opcode = self.take(1)?[0];
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode, place)?;
            // Each of these is pushed by an opcode of at least one byte; together they are bounded like nodes.
            if self.stack.len() > MAX_NODES || self.marks.len() > MAX_NODES || self.memo.len() > MAX_NODES {
                return Err(refused(format!(
                    "a pickle with more than {MAX_NODES} objects at once"
                )));
            }
        }
    }

    fn step(&mut self, opcode: u8, place: usize) -> Result<()> {
        match opcode {
            0x80 => {
                let version = self.take(1)?[0];
                if version > 5 {
                    return Err(refused(format!("pickle protocol {version}")));
                }
            }
            0x95 => drop(self.take(8)?), // A frame: a hint for readers that read piece by piece.
            b'N' => self.plain(Value::None)?,
            0x88 => self.plain(Value::Bool(true))?,
            0x89 => self.plain(Value::Bool(false))?,
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.plain(Value::Int(i64::from(number)))?;
            }
            b'K' => {
                let number = self.take(1)?[0];
                self.plain(Value::Int(i64::from(number)))?;
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.plain(Value::Int(i64::from(number)))?;
            }
            0x8a => {
                let length = usize::from(self.take(1)?[0]);
                self.long(length)?;
            }
            0x8b => {
                let length = u32::from_le_bytes(self.array()?) as usize;
                self.long(length)?;
            }
            b'I' | b'L' => {
                let line = self.line()?.to_owned();
                let value = integer_text(opcode, &line).ok_or_else(|| self.damaged(place))?;
                self.plain(value)?;
            }
            b'G' => {
                let bits = u64::from_be_bytes(self.array()?);
                self.plain(Value::Float(bits))?;
            }
            b'F' => {
                let number: Option<f64> = self.line()?.parse().ok();
                let number = number.ok_or_else(|| self.damaged(place))?;
                self.plain(Value::Float(number.to_bits()))?;
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array()?) as u64;
                self.text(length)?;
            }
            0x8c => {
                let length = u64::from(self.take(1)?[0]);
                self.text(length)?;
            }
            0x8d => {
                let length = u64::from_le_bytes(self.array()?);
                self.text(length)?;
            }
            // What Python 2 called a string: text if it is ASCII.
            b'T' | b'U' => {
                let length = match opcode {
                    b'T' => u64::from(u32::from_le_bytes(self.array()?)),
                    _ => u64::from(self.take(1)?[0]),
                };
                let bytes = self.take_long(length)?.to_vec();
                self.plain(match String::from_utf8(bytes) {
                    Ok(text) if text.is_ascii() => Value::Str(text),
                    Ok(text) => Value::Bytes(text.into_bytes()),
                    Err(error) => Value::Bytes(error.into_bytes()),
                })?;
            }
            b'B' | b'C' | 0x8e => {
                let length = match opcode {
                    b'B' => u64::from(u32::from_le_bytes(self.array()?)),
                    b'C' => u64::from(self.take(1)?[0]),
                    _ => u64::from_le_bytes(self.array()?),
                };
                let bytes = self.take_long(length)?.to_vec();
                self.plain(Value::Bytes(bytes))?;
            }
            0x96 => {
                let length = u64::from_le_bytes(self.array()?);
                let bytes = self.take_long(length)?.to_vec();
                self.push(Node::ByteArray(bytes))?;
            }
            b']' => self.push(Node::List(Vec::new()))?,
            b'}' => self.push(Node::Dict(Vec::new()))?,
            b')' => self.push(Node::Tuple(Vec::new()))?,
            0x8f => self.push(Node::Set(Vec::new()))?,
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                // Where a mark is on top, that is what goes.
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            b'1' => drop(self.above_mark()?),
            b'2' => {
                let top = self.pop()?;
                self.stack.push(top);
                self.stack.push(top);
            }
            b't' => {
                let parts = self.above_mark()?;
                self.push(Node::Tuple(parts))?;
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let parts = self.pop_many(count)?;
                self.push(Node::Tuple(parts))?;
            }
            b'l' => {
                let parts = self.above_mark()?;
                self.push(Node::List(parts))?;
            }
            b'd' => {
                let parts = pairs(&self.above_mark()?).ok_or_else(|| self.damaged(place))?;
                self.push(Node::Dict(parts))?;
            }
            0x91 => {
                let parts = self.above_mark()?;
                self.push(Node::FrozenSet(parts))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(&[item], place)?;
            }
            b'e' => {
                let items = self.above_mark()?;
                self.extend(&items, place)?;
            }
            0x90 => {
                let items = self.above_mark()?;
                let target = self.top()?;
                match self.arena.get_mut(target) {
                    Node::Set(parts) => parts.extend(items),
                    _ => return Err(self.damaged(place)),
                }
            }
            b's' => {
                let item = self.pop_many(2)?;
                self.set_items(&item, place)?;
            }
            b'u' => {
                let items = self.above_mark()?;
                self.set_items(&items, place)?;
            }
            b'p' | b'q' | b'r' | 0x94 => {
                let index = match opcode {
                    b'p' => self.index_text(place)?,
                    b'q' => u32::from(self.take(1)?[0]),
                    b'r' => u32::from_le_bytes(self.array()?),
                    _ => u32::try_from(self.memo.len()).expect("the memo is bounded"),
                };
                let top = self.top()?;
                self.memo.insert(index, top);
            }
            b'g' | b'h' | b'j' => {
                let index = match opcode {
                    b'g' => self.index_text(place)?,
                    b'h' => u32::from(self.take(1)?[0]),
                    _ => u32::from_le_bytes(self.array()?),
                };
                let found = self.memo.get(&index).copied();
                let found = found.ok_or_else(|| self.damaged(place))?;
                self.stack.push(found);
            }
            b'c' => {
                let module = self.line()?.to_owned();
                let name = self.line()?.to_owned();
                self.global(&module, &name)?;
            }
            0x93 => {
                let parts = self.pop_many(2)?;
                let text = |id: Id| match self.arena.get(id) {
                    Node::Plain(Value::Str(text)) => Some(text.clone()),
                    _ => None,
                };
                let names = text(parts[0]).zip(text(parts[1]));
                let (module, name) = names.ok_or_else(|| self.damaged(place))?;
                self.global(&module, &name)?;
            }
            b'R' | 0x81 => {
                let parts = self.pop_many(2)?;
                let node = meaning::call(self.arena, self.storages, parts[0], parts[1], opcode == 0x81)?;
                self.push(node)?;
            }
            b'b' => {
                let parts = self.pop_many(2)?;
                meaning::build(self.arena, self.storages, parts[0], parts[1])?;
                self.stack.push(parts[0]);
            }
            b'Q' => {
                let name = self.pop()?;
                let node = meaning::persistent(self.arena, self.storages, name)?;
                self.push(node)?;
            }
            other => {
                return Err(refused(format!(
                    "pickle opcode {other:#04x} at byte {place}, which no checkpoint of torch needs"
                )));
            }
        }
        Ok(())
    }

    fn damaged(&self, place: usize) -> unbroken::Error {
        flawed(format!("the pickle is damaged at byte {place}"))
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let taken = self.bytes.get(self.at..self.at.saturating_add(count));
        let taken = taken.ok_or_else(|| flawed("the pickle ends early"))?;
        self.at += count;
        Ok(taken)
    }

    fn take_long(&mut self, count: u64) -> Result<&[u8]> {
        self.take(usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many bytes as were taken"))
    }

    /// Text up to a line's end.
    fn line(&mut self) -> Result<&str> {
        let rest = &self.bytes[self.at.min(self.bytes.len())..];
        let end = rest.iter().take(MAX_LINE).position(|byte| *byte == b'\n');
        let end = end.ok_or_else(|| flawed("the pickle ends early, or has a line that is too long"))?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| flawed("a name in the pickle is not UTF-8"))
    }

    fn index_text(&mut self, place: usize) -> Result<u32> {
        let index = self.line()?.parse().ok();
        index.ok_or_else(|| self.damaged(place))
    }

    fn text(&mut self, length: u64) -> Result<()> {
        let bytes = self.take_long(length)?.to_vec();
        match String::from_utf8(bytes) {
            Ok(text) => self.plain(Value::Str(text)),
            // Half of a surrogate pair, which Python writes as if it were a character.
            Err(error) => {
                let fields = vec![("utf8".to_owned(), Value::Bytes(error.into_bytes()))];
                self.push(Node::Object("str", "surrogates".to_owned(), fields))
            }
        }
    }

    /// An integer in two's complement, least significant byte first.
    fn long(&mut self, length: usize) -> Result<()> {
        if length > MAX_INTEGER {
            return Err(refused(format!("an integer of {length} bytes")));
        }
        let mut bytes = self.take(length)?.to_vec();
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        if negative {
            let mut carry = true;
            for byte in &mut bytes {
                let (flipped, over) = (!*byte).overflowing_add(u8::from(carry));
                *byte = flipped;
                carry = over;
            }
        }
        bytes.reverse();
        self.plain(Value::integer(negative, &bytes))
    }

    fn plain(&mut self, value: Value) -> Result<()> {
        self.push(Node::Plain(value))
    }

    fn push(&mut self, node: Node) -> Result<()> {
        let id = self.arena.add(node)?;
        self.stack.push(id);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<()> {
        let node = meaning::global(module, name)?;
        self.push(node)
    }

    /// The lowest place that may be taken from: nothing reaches below a mark.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>> {
        let start = self
            .stack
            .len()
            .checked_sub(count)
            .filter(|start| *start >= self.floor());
        let start = start.ok_or_else(|| flawed("the pickle takes more from its stack than there is"))?;
        Ok(self.stack.split_off(start))
    }

    fn pop(&mut self) -> Result<Id> {
        Ok(self.pop_many(1)?[0])
    }

    fn top(&mut self) -> Result<Id> {
        let top = self.pop()?;
        self.stack.push(top);
        Ok(top)
    }

    fn above_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self
            .marks
            .pop()
            .ok_or_else(|| flawed("the pickle has no mark where it needs one"))?;
        Ok(self.stack.split_off(mark))
    }

    fn extend(&mut self, items: &[Id], place: usize) -> Result<()> {
        let target = self.top()?;
        match self.arena.get_mut(target) {
            Node::List(parts) | Node::Deque(parts, _) => parts.extend(items),
            _ => return Err(self.damaged(place)),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id], place: usize) -> Result<()> {
        let target = self.top()?;
        let items = pairs(items).ok_or_else(|| self.damaged(place))?;
        match self.arena.get_mut(target) {
            Node::Dict(parts) | Node::Mapping(_, parts) | Node::Default(_, parts) => parts.extend(items),
            _ => return Err(self.damaged(place)),
        }
        Ok(())
    }
}

fn pairs(items: &[Id]) -> Option<Vec<(Id, Id)>> {
    items
        .len()
        .is_multiple_of(2)
        .then(|| items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

/// An integer in decimal digits, or a truth value of the oldest protocol.
fn integer_text(opcode: u8, line: &str) -> Option<Value> {
    match (opcode, line) {
        (b'I', "00") => Some(Value::Bool(false)),
        (b'I', "01") => Some(Value::Bool(true)),
        (b'I', digits) => digits.parse().ok().map(Value::Int),
        (_, digits) => digits
            .strip_suffix('L')
            .unwrap_or(digits)
            .parse()
            .ok()
            .map(Value::Int),
    }
}
