//! Where two runs part: the first boundary, its first component in causal order, and the leaves of two checkpoints.
//!
//! Touches: two checkpoints' packs, read only and verified, in [`compare_states`]; nothing else.

use std::collections::{BTreeMap, HashMap};

use crate::cause::{Change, Components, Leaf, Window};
use crate::digest::{Digest, hex};
use crate::elements;
use crate::error::Result;
use crate::format::journal::Component;
use crate::format::manifest::element_size;
use crate::journal::Boundary;
use crate::state::{Tensor, Value};
use crate::store::Checkpoint;

/// What comparing two journals came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every boundary that was expected was found, bit for bit.
    Same {
        /// How many.
        boundaries: usize,
    },
    /// They differ at a boundary that both recorded.
    Parts(Parting),
    /// All that was found is as expected, and it ends before what was expected does.
    EndsEarly {
        /// (step, phase) of the first boundary that is missing.
        missing: (u64, u8),
    },
    /// A boundary was recorded that was not expected, or is missing although later ones are there.
    OtherBoundaries {
        /// (step, phase) expected next; `None` after the end.
        expected: Option<(u64, u8)>,
        /// (step, phase) found there; `None` where only later ones are.
        found: Option<(u64, u8)>,
    },
}

/// The first boundary at which two journals differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parting {
    /// Optimizer updates so far.
    pub step: u64,
    /// 0: after a step inside an epoch. 1: an epoch's after-work is done. 2: the run is finished.
    pub phase: u8,
    /// Epoch counted from 0.
    pub epoch: u64,
    /// The first component that differs, in causal order.
    pub component: String,
    /// Its value as expected, in words; empty where there is none.
    pub expected: String,
    /// Its value as found, in words; empty where there is none.
    pub found: String,
    /// All components that differ at this boundary, in causal order.
    pub differing: Vec<String>,
    /// Position of the boundary among those expected.
    pub index: usize,
    /// The newest life that recorded what was found.
    pub life: u32,
}

/// Compares what was found with what was expected, boundary by boundary.
pub fn compare_journals(expected: &[Boundary], found: &[Boundary]) -> Outcome {
    let place = |boundary: &Boundary| (boundary.step, boundary.phase);
    for (index, old) in expected.iter().enumerate() {
        let Some(new) = found.get(index) else {
            return Outcome::EndsEarly { missing: place(old) };
        };
        if place(old) != place(new) {
            return Outcome::OtherBoundaries {
                expected: Some(place(old)),
                found: Some(place(new)),
            };
        }
        let mut differing = differing(&old.components, &new.components);
        for (name, old, new) in [
            ("epoch", old.epoch, new.epoch),
            ("position", old.position, new.position),
        ] {
            if old != new {
                differing.insert(0, (name.to_owned(), old.to_string(), new.to_string()));
            }
        }
        if let Some((component, was, is)) = differing.first().cloned() {
            return Outcome::Parts(Parting {
                step: old.step,
                phase: old.phase,
                epoch: old.epoch,
                component,
                expected: was,
                found: is,
                differing: differing.into_iter().map(|(name, _, _)| name).collect(),
                index,
                life: new.lives.last().copied().unwrap_or(0),
            });
        }
    }
    match found.get(expected.len()) {
        Some(extra) => Outcome::OtherBoundaries {
            expected: None,
            found: Some(place(extra)),
        },
        None => Outcome::Same {
            boundaries: expected.len(),
        },
    }
}

/// The components that differ, in causal order: name, expected and found in words.
fn differing(expected: &Components, found: &Components) -> Vec<(String, String, String)> {
    let mut all = Vec::new();
    // Equal lists are the rule, and a run has many boundaries.
    if expected == found {
        return all;
    }
    let new: HashMap<&str, &Component> = found.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let old: HashMap<&str, &Component> = expected
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .collect();
    let extra = found.iter().filter(|(name, _)| !old.contains_key(name.as_str()));
    for (name, _) in expected.iter().chain(extra) {
        let (old, new) = (old.get(name.as_str()).copied(), new.get(name.as_str()).copied());
        if old != new {
            let words = |value: Option<&Component>| value.map(component_words).unwrap_or_default();
            all.push((name.clone(), words(old), words(new)));
        }
    }
    all.sort_by_key(|(name, _, _)| causal_rank(name));
    all
}

/// What comes first in one step: data, generators, learning rate, what forward and backward give, the optimizer's
/// state, then what it updates. The sort is stable: within a rank the recorder's order counts.
fn causal_rank(name: &str) -> u8 {
    match name
        .split_once('/')
        .map_or((name, ""), |(head, rest)| (head, rest))
    {
        ("data", "indices") => 0,
        ("data", _) => 1,
        ("rng", _) => 2,
        ("lr", _) => 3,
        ("log", _) => 4,
        ("state", part) if part.to_lowercase().contains("optim") || part.starts_with("opt") => 5,
        _ => 6,
    }
}

/// One component's value for people.
pub fn component_words(component: &Component) -> String {
    match component {
        Component::Digest(bytes) => hex(&bytes[..bytes.len().min(6)]),
        Component::Int(number) => number.to_string(),
        Component::Float(bits) => float_words(*bits),
        Component::Text(text) => format!("{text:?}"),
    }
}

fn float_words(bits: u64) -> String {
    let number = f64::from_bits(bits);
    if number.is_nan() {
        format!("nan ({bits:016x})")
    } else {
        format!("{number:?}")
    }
}

/// What was recorded around the boundary at `index`; neighbours are the boundaries of the same phase before and after.
pub fn window(boundaries: &[Boundary], index: usize) -> Window<'_> {
    let Some(at) = boundaries.get(index) else {
        return Window::default();
    };
    let same = |boundary: &&Boundary| boundary.phase == at.phase;
    Window {
        before: boundaries[..index]
            .iter()
            .rev()
            .find(same)
            .map(|boundary| boundary.components.as_slice()),
        at: &at.components,
        after: boundaries[index + 1..]
            .iter()
            .find(same)
            .map(|boundary| boundary.components.as_slice()),
    }
}

/// Compares two checkpoints leaf by leaf: data order and generators first, then the rest in the tree's order.
///
/// # Errors
///
/// [`crate::Error::Damaged`] and errors of the storage, where bytes that have to be looked at cannot be read whole.
pub fn compare_states(expected: &Checkpoint, found: &Checkpoint) -> Result<Vec<Leaf>> {
    let mut walk = Walk {
        expected: Side {
            checkpoint: expected,
            storages: expected.storages(),
            read: BTreeMap::new(),
        },
        found: Side {
            checkpoint: found,
            storages: found.storages(),
            read: BTreeMap::new(),
        },
        leaves: Vec::new(),
    };
    walk.value("", &expected.tree().compared(), &found.tree().compared())?;
    let rank = |leaf: &Leaf| match leaf.path.split('/').next() {
        Some("loaders") => 0,
        Some("generators") => 1,
        Some("objects") if leaf.path.to_lowercase().contains("/state/") => 2,
        Some("objects") => 3,
        _ => 4,
    };
    walk.leaves.sort_by_key(rank);
    Ok(walk.leaves)
}

struct Side<'a> {
    checkpoint: &'a Checkpoint,
    storages: Vec<(u64, Digest)>,
    /// Bytes of storages read so far: several leaves may view one.
    read: BTreeMap<u32, Vec<u8>>,
}

impl Side<'_> {
    /// A tensor's elements, one after the other in its own order.
    fn elements(&mut self, tensor: &Tensor) -> Result<Vec<u8>> {
        if !self.read.contains_key(&tensor.storage) {
            let bytes = self.checkpoint.read(tensor.storage as usize)?;
            self.read.insert(tensor.storage, bytes);
        }
        Ok(gather(&self.read[&tensor.storage], tensor))
    }
}

/// Lays a view's elements end to end. A dtype of unknown width is taken as its whole storage.
fn gather(bytes: &[u8], tensor: &Tensor) -> Vec<u8> {
    let Some(size) = element_size(&tensor.dtype) else {
        return bytes.to_vec();
    };
    let count: u64 = tensor.shape.iter().product();
    let mut out = Vec::with_capacity((count * size) as usize);
    let mut index = vec![0u64; tensor.shape.len()];
    for _ in 0..count {
        let reach: i64 = index
            .iter()
            .zip(&tensor.strides)
            .map(|(at, stride)| *at as i64 * stride)
            .sum();
        // The manifest's check has shown that every view stays inside its storage.
        let start = ((tensor.offset as i64 + reach) as u64 * size) as usize;
        out.extend_from_slice(&bytes[start..start + size as usize]);
        for dimension in (0..index.len()).rev() {
            index[dimension] += 1;
            if index[dimension] < tensor.shape[dimension] {
                break;
            }
            index[dimension] = 0;
        }
    }
    out
}

struct Walk<'a> {
    expected: Side<'a>,
    found: Side<'a>,
    leaves: Vec<Leaf>,
}

impl Walk<'_> {
    fn push(&mut self, path: &str, change: Change) {
        self.leaves.push(Leaf {
            path: path.to_owned(),
            change,
        });
    }

    fn value(&mut self, path: &str, expected: &Value, found: &Value) -> Result<()> {
        match (expected, found) {
            (Value::List(old), Value::List(new)) | (Value::Tuple(old), Value::Tuple(new)) => {
                for index in 0..old.len().max(new.len()) {
                    self.pair(&join(path, &index.to_string()), old.get(index), new.get(index))?;
                }
                Ok(())
            }
            (Value::Dict(old), Value::Dict(new)) => {
                for (key, value) in old {
                    let other = new.iter().find(|(other, _)| other == key).map(|(_, value)| value);
                    self.pair(&join(path, &key_words(key)), Some(value), other)?;
                }
                for (key, value) in new
                    .iter()
                    .filter(|(key, _)| old.iter().all(|(other, _)| other != key))
                {
                    self.pair(&join(path, &key_words(key)), None, Some(value))?;
                }
                Ok(())
            }
            (
                Value::Object {
                    kind,
                    name,
                    fields: old,
                },
                Value::Object {
                    kind: other_kind,
                    name: other_name,
                    fields: new,
                },
            ) if kind == other_kind && name == other_name => {
                for (field, value) in old {
                    let other = new
                        .iter()
                        .find(|(other, _)| other == field)
                        .map(|(_, value)| value);
                    self.pair(&join(path, field), Some(value), other)?;
                }
                for (field, value) in new
                    .iter()
                    .filter(|(field, _)| old.iter().all(|(other, _)| other != field))
                {
                    self.pair(&join(path, field), None, Some(value))?;
                }
                Ok(())
            }
            (Value::Tensor(old), Value::Tensor(new)) => self.tensor(path, old, new),
            _ if expected == found => Ok(()),
            _ => {
                self.push(
                    path,
                    Change::Value {
                        expected: words(expected),
                        found: words(found),
                    },
                );
                Ok(())
            }
        }
    }

    fn pair(&mut self, path: &str, expected: Option<&Value>, found: Option<&Value>) -> Result<()> {
        match (expected, found) {
            (Some(expected), Some(found)) => self.value(path, expected, found),
            (Some(_), None) => {
                self.push(path, Change::Missing);
                Ok(())
            }
            (None, Some(_)) => {
                self.push(path, Change::Extra);
                Ok(())
            }
            (None, None) => Ok(()),
        }
    }

    fn tensor(&mut self, path: &str, expected: &Tensor, found: &Tensor) -> Result<()> {
        let (old, new) = (tensor_words(expected), tensor_words(found));
        if old != new {
            self.push(
                path,
                Change::Value {
                    expected: old,
                    found: new,
                },
            );
            return Ok(());
        }
        let same_view = expected.strides == found.strides && expected.offset == found.offset;
        let digest = |side: &Side, tensor: &Tensor| side.storages.get(tensor.storage as usize).copied();
        if same_view && digest(&self.expected, expected) == digest(&self.found, found) {
            return Ok(());
        }
        let (old, new) = (self.expected.elements(expected)?, self.found.elements(found)?);
        if let Some(elements) = elements::compare(&expected.dtype, &old, &new) {
            self.push(
                path,
                Change::Elements {
                    dtype: expected.dtype.clone(),
                    elements,
                },
            );
        }
        Ok(())
    }
}

fn join(path: &str, part: &str) -> String {
    if path.is_empty() {
        part.to_owned()
    } else {
        format!("{path}/{part}")
    }
}

fn key_words(key: &Value) -> String {
    match key {
        Value::Str(text) => text.clone(),
        other => words(other),
    }
}

fn tensor_words(tensor: &Tensor) -> String {
    format!("{} {:?} on {}", tensor.dtype, tensor.shape, tensor.device)
}

/// A plain value for people; long ones by digest.
pub(crate) fn words(value: &Value) -> String {
    match value {
        Value::None => "None".to_owned(),
        Value::Bool(value) => if *value { "True" } else { "False" }.to_owned(),
        Value::Int(number) => number.to_string(),
        Value::Float(bits) => float_words(*bits),
        Value::Str(text) if text.len() <= 60 => format!("{text:?}"),
        Value::Bytes(bytes) => format!("{} bytes {}", bytes.len(), &Digest::of(bytes).short()[..12]),
        Value::Tensor(tensor) => tensor_words(tensor),
        other => match crate::format::value::encode(other) {
            Ok(bytes) => format!("{} {}", kind(other), &Digest::of(&bytes).short()[..12]),
            Err(_) => kind(other).to_owned(),
        },
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::List(_) => "list",
        Value::Tuple(_) => "tuple",
        Value::Dict(_) => "dict",
        Value::Set(_) | Value::FrozenSet(_) => "set",
        Value::Object { .. } => "object",
        Value::Str(_) => "text",
        _ => "value",
    }
}

/// One leaf's change for people, such as `1 of 288 elements, at most 1 ulp`.
pub fn change_words(change: &Change) -> String {
    match change {
        Change::Elements { dtype, elements } => {
            let apart = if dtype.contains("float") || dtype.contains("complex") {
                match (elements.max_ulps, elements.not_numbers) {
                    (0, 0) => ", signs of zeros only".to_owned(),
                    (0, count) => format!(", {count} not a number"),
                    (ulps, 0) => format!(", at most {}", crate::cause::ulps(ulps)),
                    (ulps, count) => format!(", at most {}, {count} not a number", crate::cause::ulps(ulps)),
                }
            } else {
                format!(", at most {} apart", elements.max_ulps)
            };
            format!("{} of {} elements{apart}", elements.differing, elements.total)
        }
        Change::Value { expected, found } => format!("expected {expected}, found {found}"),
        Change::Missing => "missing".to_owned(),
        Change::Extra => "not expected".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boundary(step: u64, phase: u8, components: &[(&str, i64)]) -> Boundary {
        let components = components
            .iter()
            .map(|(name, value)| ((*name).to_owned(), Component::Int(*value)))
            .collect();
        Boundary {
            step,
            phase,
            epoch: 0,
            position: step,
            components,
            lives: vec![2],
        }
    }

    #[test]
    fn equal_journals_are_the_same() {
        let run = [boundary(1, 0, &[("log/loss", 3)]), boundary(1, 1, &[])];
        assert_eq!(compare_journals(&run, &run), Outcome::Same { boundaries: 2 });
        assert_eq!(compare_journals(&[], &[]), Outcome::Same { boundaries: 0 });
    }

    #[test]
    fn the_first_component_is_the_first_in_causal_order_not_in_the_record() {
        let order = [
            "state/model",
            "state/optimizer",
            "log/loss",
            "lr/optimizer/0",
            "rng/numpy",
            "data/batch",
        ];
        let row = |from: usize, value| {
            boundary(
                4,
                0,
                &order[..from]
                    .iter()
                    .map(|name| (*name, value))
                    .collect::<Vec<_>>(),
            )
        };
        for (count, name) in [
            (1, "state/model"),
            (2, "state/optimizer"),
            (3, "log/loss"),
            (6, "data/batch"),
        ] {
            let Outcome::Parts(parting) = compare_journals(&[row(count, 1)], &[row(count, 2)]) else {
                panic!("they differ in {count} components");
            };
            assert_eq!(
                (parting.component.as_str(), parting.differing.len(), parting.life),
                (name, count, 2)
            );
        }
    }

    #[test]
    fn a_component_that_only_one_has_differs() {
        let (old, new) = (
            boundary(1, 0, &[("rng/torch", 1)]),
            boundary(1, 0, &[("rng/torch", 1), ("rng/numpy", 2)]),
        );
        let Outcome::Parts(parting) = compare_journals(&[old], &[new]) else {
            panic!("one is extra")
        };
        assert_eq!(
            (parting.component.as_str(), parting.expected.as_str()),
            ("rng/numpy", "")
        );
    }

    #[test]
    fn missing_and_extra_boundaries_are_told_apart_from_an_early_end() {
        let run: Vec<Boundary> = (1..=3).map(|step| boundary(step, 0, &[])).collect();
        assert_eq!(
            compare_journals(&run, &run[..2]),
            Outcome::EndsEarly { missing: (3, 0) }
        );
        let gap = [run[0].clone(), run[2].clone()];
        let expected = Outcome::OtherBoundaries {
            expected: Some((2, 0)),
            found: Some((3, 0)),
        };
        assert_eq!(compare_journals(&run, &gap), expected);
        let expected = Outcome::OtherBoundaries {
            expected: None,
            found: Some((3, 0)),
        };
        assert_eq!(compare_journals(&run[..2], &run), expected);
    }

    #[test]
    fn a_window_looks_at_neighbours_of_the_same_phase() {
        let run = [
            boundary(1, 0, &[("a", 1)]),
            boundary(1, 1, &[("a", 9)]),
            boundary(2, 0, &[("a", 2)]),
        ];
        let window = window(&run, 2);
        assert_eq!(window.before, Some(run[0].components.as_slice()));
        assert!(window.after.is_none());
    }

    #[test]
    fn a_view_is_gathered_in_its_own_order() {
        let bytes: Vec<u8> = (0..6).collect();
        let tensor = Tensor {
            dtype: "uint8".into(),
            shape: vec![3, 2],
            strides: vec![1, 3],
            offset: 0,
            storage: 0,
            device: "cpu".into(),
            attrs: vec![],
        };
        assert_eq!(gather(&bytes, &tensor), [0, 3, 1, 4, 2, 5]);
    }

    #[test]
    fn a_change_is_told_in_one_line() {
        let elements =
            elements::compare("float32", &1f32.to_le_bytes(), &1.0000001f32.to_le_bytes()).unwrap();
        let change = Change::Elements {
            dtype: "float32".into(),
            elements,
        };
        assert_eq!(change_words(&change), "1 of 1 elements, at most 1 ulp");
    }
}
