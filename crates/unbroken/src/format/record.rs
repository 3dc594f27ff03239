//! What manifests and journal records share: their parts as values, taken out again with a check each.
//!
//! Touches: nothing.

use std::sync::Arc;

use crate::digest::Digest;
use crate::format::Flaw;
use crate::state::Value;

/// The largest step, length or offset: it fits in a signed integer of 64 bits.
pub(super) const MAX_COUNT: u64 = i64::MAX as u64;
/// The largest phase: a finished run.
pub(super) const MAX_PHASE: u8 = 2;

/// A count as a value.
pub(super) fn count(what: &str, count: u64) -> Result<Value, Flaw> {
    number(what, count).map(Value::Int)
}

/// A count as a signed integer.
pub(super) fn number(what: &str, number: u64) -> Result<i64, Flaw> {
    let fits = i64::try_from(number);
    fits.map_err(|_| Flaw::limit(format!("{what} of {number}, at most {MAX_COUNT} is allowed")))
}

/// A digest as a value.
pub(super) fn digest(digest: &Digest) -> Value {
    Value::Bytes(digest.0.to_vec())
}

/// Named values as one value.
pub(super) fn named(fields: &[(String, Value)]) -> Value {
    Value::dict(
        fields
            .iter()
            .map(|(name, value)| (Value::Str(name.clone()), value.clone()))
            .collect(),
    )
}

pub(super) fn check_run_id(id: &str) -> Result<(), Flaw> {
    if (1..=64).contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    {
        return Ok(());
    }
    Err(Flaw::malformed(format!(
        "the run id {id:?} is not 1 to 64 letters, digits and hyphens"
    )))
}

pub(super) fn check_phase(phase: u8) -> Result<(), Flaw> {
    if phase <= MAX_PHASE {
        Ok(())
    } else {
        Err(Flaw::malformed(format!("phase {phase}; phases are 0 to 2")))
    }
}

pub(super) fn check_time(time: &str) -> Result<(), Flaw> {
    // The longest: nanoseconds and an offset.
    if time.len() <= 40 && time.parse::<jiff::Timestamp>().is_ok() {
        return Ok(());
    }
    Err(Flaw::malformed(format!(
        "the time {time:?} is not an RFC 3339 timestamp"
    )))
}

/// The parts of a list or of a mapping with fixed keys, taken one after the other.
pub(super) struct Fields {
    what: &'static str,
    names: &'static [&'static str],
    taken: usize,
    values: std::vec::IntoIter<Value>,
}

impl Fields {
    /// The values of a mapping that has exactly these keys in this order.
    pub(super) fn of_dict(
        what: &'static str,
        value: Value,
        names: &'static [&'static str],
    ) -> Result<Fields, Flaw> {
        let Value::Dict(items) = value else {
            return Err(Flaw::malformed(format!("{what} is not a mapping")));
        };
        let has_names = items.len() == names.len()
            && items
                .iter()
                .zip(names)
                .all(|((key, _), name)| matches!(key, Value::Str(key) if key == name));
        if !has_names {
            return Err(Flaw::malformed(format!(
                "{what} does not have exactly the keys {}",
                names.join(", ")
            )));
        }
        let items = Arc::unwrap_or_clone(items).into_iter();
        let values: Vec<Value> = items.map(|(_, value)| value).collect();
        Ok(Fields {
            what,
            names,
            taken: 0,
            values: values.into_iter(),
        })
    }

    /// The values of a list of exactly `count` parts.
    pub(super) fn of_list(what: &'static str, value: Value, count: usize) -> Result<Fields, Flaw> {
        match value {
            Value::List(items) if items.len() == count => Ok(Fields {
                what,
                names: &[],
                taken: 0,
                values: items.into_iter(),
            }),
            _ => Err(Flaw::malformed(format!("{what} is not a list of {count} parts"))),
        }
    }

    fn wrong(&self, expected: &str) -> Flaw {
        match self.names.get(self.taken - 1) {
            Some(name) => Flaw::malformed(format!("\"{name}\" of {} is not {expected}", self.what)),
            None => Flaw::malformed(format!("part {} of {} is not {expected}", self.taken, self.what)),
        }
    }

    pub(super) fn value(&mut self) -> Result<Value, Flaw> {
        self.taken += 1;
        self.values.next().ok_or_else(|| self.wrong("there"))
    }

    pub(super) fn text(&mut self) -> Result<String, Flaw> {
        match self.value()? {
            Value::Str(text) => Ok(text),
            _ => Err(self.wrong("text")),
        }
    }

    pub(super) fn optional_text(&mut self) -> Result<Option<String>, Flaw> {
        match self.value()? {
            Value::None => Ok(None),
            Value::Str(text) => Ok(Some(text)),
            _ => Err(self.wrong("text or nothing")),
        }
    }

    pub(super) fn count(&mut self) -> Result<u64, Flaw> {
        self.small()
    }

    /// An integer that fits in `T`.
    pub(super) fn small<T: TryFrom<i64>>(&mut self) -> Result<T, Flaw> {
        match self.value()? {
            Value::Int(number) => T::try_from(number).map_err(|_| self.wrong("in its range")),
            _ => Err(self.wrong("an integer")),
        }
    }

    pub(super) fn bool(&mut self) -> Result<bool, Flaw> {
        match self.value()? {
            Value::Bool(value) => Ok(value),
            _ => Err(self.wrong("true or false")),
        }
    }

    pub(super) fn digest(&mut self) -> Result<Digest, Flaw> {
        match self.value()? {
            Value::Bytes(bytes) => bytes
                .as_slice()
                .try_into()
                .map(Digest)
                .map_err(|_| self.wrong("a digest of 32 bytes")),
            _ => Err(self.wrong("a digest")),
        }
    }

    pub(super) fn list(&mut self) -> Result<Vec<Value>, Flaw> {
        match self.value()? {
            Value::List(items) => Ok(items),
            _ => Err(self.wrong("a list")),
        }
    }

    pub(super) fn named(&mut self) -> Result<Vec<(String, Value)>, Flaw> {
        let Value::Dict(items) = self.value()? else {
            return Err(self.wrong("a mapping"));
        };
        let mut named = Vec::with_capacity(items.len());
        for (key, value) in Arc::unwrap_or_clone(items) {
            match key {
                Value::Str(key) => named.push((key, value)),
                _ => return Err(self.wrong("a mapping with text keys")),
            }
        }
        Ok(named)
    }
}
