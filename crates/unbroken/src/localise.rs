//! Where two runs part: the first boundary, its first component in causal order, and the leaves of two checkpoints.
//!
//! Touches: two checkpoints' packs, read only and verified, in [`compare_states`]; nothing else.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};

use crate::cause::{Change, Components, Leaf, Window};
use crate::digest::{Digest, hex};
use crate::elements::{self, row_major};
use crate::error::Result;
use crate::format::journal::Component;
use crate::format::saved::{Node, Outline};
use crate::journal::Boundary;
use crate::outline::{Leaves, float_words, outline, value_words, view_bytes};
use crate::state::Value;
use crate::store::Checkpoint;

/// What comparing two journals came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    /// Boundaries that are equal, counted up to the first difference.
    pub equal: usize,
    /// (step, phase) of the last of them.
    pub last_equal: Option<(u64, u8)>,
    /// What comes behind them.
    pub outcome: Outcome,
}

/// What comes behind the boundaries in which two journals are equal.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Nothing: every boundary that was expected was found, bit for bit.
    Same,
    /// They differ at a boundary that both recorded.
    Parts(Box<Parting>),
    /// All that was found is as expected, and it ends before what was expected does.
    EndsEarly {
        /// (step, phase) of the first boundary that is missing.
        missing: (u64, u8),
    },
    /// A boundary was recorded that was not expected, or is missing although later ones are there.
    OtherBoundaries {
        /// (step, phase) expected next; `None` after the end.
        expected: Option<(u64, u8)>,
        /// (step, phase) found there.
        found: (u64, u8),
    },
}

/// The first boundary at which two journals differ.
#[derive(Clone, Debug, PartialEq)]
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
    /// (step, phase) of the boundary before it, if there is one.
    pub last_equal: Option<(u64, u8)>,
    /// The newest life that recorded what was found.
    pub life: u32,
    /// What both recorded at the boundary of the same phase before.
    before: Option<Boundary>,
    /// What each recorded here, and at the boundary of the same phase behind: expected and found.
    at: [Boundary; 2],
    after: [Option<Boundary>; 2],
}

impl Parting {
    /// What was expected around it.
    pub fn expected_window(&self) -> Window<'_> {
        self.window(0)
    }

    /// What was found around it.
    pub fn found_window(&self) -> Window<'_> {
        self.window(1)
    }

    fn window(&self, side: usize) -> Window<'_> {
        Window {
            before: self.before.as_ref().map(components),
            at: components(&self.at[side]),
            after: self.after[side].as_ref().map(components),
        }
    }
}

fn components(boundary: &Boundary) -> &Components {
    &boundary.components
}

/// Compares what was found with what was expected, boundary by boundary, in one pass over both.
///
/// # Errors
///
/// Those of reading them.
pub fn compare_journals(
    expected: impl IntoIterator<Item = Result<Boundary>>,
    found: impl IntoIterator<Item = Result<Boundary>>,
) -> Result<Compared> {
    let (mut expected, mut found) = (expected.into_iter(), found.into_iter());
    let (mut equal, mut last_equal) = (0, None);
    // The last boundary of each phase: those of both sides are equal.
    let mut before: [Option<Boundary>; 3] = Default::default();
    let outcome = loop {
        let (old, new) = match (expected.next().transpose()?, found.next().transpose()?) {
            (None, None) => break Outcome::Same,
            (Some(old), None) => break Outcome::EndsEarly { missing: old.place() },
            (None, Some(new)) => {
                let (expected, found) = (None, new.place());
                break Outcome::OtherBoundaries { expected, found };
            }
            (Some(old), Some(new)) if old.place() != new.place() => {
                let (expected, found) = (Some(old.place()), new.place());
                break Outcome::OtherBoundaries { expected, found };
            }
            (Some(old), Some(new)) => (old, new),
        };
        let differing = differing(&old, &new);
        if let Some((component, was, is)) = differing.first().cloned() {
            let phase = old.phase;
            let same = |boundary: &Result<Boundary>| !matches!(boundary, Ok(other) if other.phase != phase);
            break Outcome::Parts(Box::new(Parting {
                step: old.step,
                phase,
                epoch: old.epoch,
                component,
                expected: was,
                found: is,
                differing: differing.into_iter().map(|(name, _, _)| name).collect(),
                last_equal,
                life: new.lives.last().copied().unwrap_or(0),
                before: before[usize::from(phase)].take(),
                after: [expected.find(same).transpose()?, found.find(same).transpose()?],
                at: [old, new],
            }));
        }
        (equal, last_equal) = (equal + 1, Some(old.place()));
        let phase = usize::from(old.phase);
        before[phase] = Some(old);
    };
    Ok(Compared {
        equal,
        last_equal,
        outcome,
    })
}

/// The components that differ, in causal order: name, expected and found in words.
fn differing(expected: &Boundary, found: &Boundary) -> Vec<(String, String, String)> {
    let mut all = Vec::new();
    let numbers = [
        ("position", expected.position, found.position),
        ("epoch", expected.epoch, found.epoch),
    ];
    let (expected, found) = (&expected.components, &found.components);
    // Equal ones are the rule, and a run has many boundaries.
    if numbers.iter().all(|(_, old, new)| old == new) && expected == found {
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
    for (name, old, new) in numbers {
        if old != new {
            all.insert(0, (name.to_owned(), old.to_string(), new.to_string()));
        }
    }
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

/// A state to compare: a checkpoint, or what the journal has recorded of one.
#[derive(Debug)]
pub struct State<'a> {
    name: String,
    outline: Outline,
    /// The leaves' values, and where the bytes of tensors are, where there is a checkpoint.
    held: Option<(Vec<&'a Value>, &'a Checkpoint)>,
}

impl<'a> State<'a> {
    /// The state that a checkpoint holds. What the journal has recorded of it spares reading it.
    pub fn held(checkpoint: &'a Checkpoint, recorded: Option<&Outline>) -> State<'a> {
        let mut outline = outline(checkpoint.tree(), &checkpoint.storages(), &[]);
        if let Some(recorded) = recorded {
            outline.complete(recorded);
        }
        let values = Leaves::of(checkpoint.tree()).values;
        State {
            name: checkpoint.info().name.clone(),
            outline,
            held: Some((values, checkpoint)),
        }
    }

    /// The state of a checkpoint that is no longer there, as the journal has recorded it.
    pub fn recorded(name: &str, outline: Outline) -> State<'static> {
        State {
            name: name.to_owned(),
            outline,
            held: None,
        }
    }

    /// The checkpoint's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many leaves it has.
    pub fn leaves(&self) -> usize {
        self.outline.leaves()
    }

    fn value(&self, leaf: usize) -> Option<&'a Value> {
        self.held.as_ref().map(|(values, _)| values[leaf])
    }

    /// A tensor's elements in row-major order; `None` where they are not at hand, are no whole bytes, or repeat.
    fn elements(&self, leaf: usize) -> Result<Option<Vec<u8>>> {
        let Some((values, checkpoint)) = &self.held else {
            return Ok(None);
        };
        let Value::Tensor(tensor) = values[leaf] else {
            return Ok(None);
        };
        let length = checkpoint.manifest().storages[tensor.storage as usize].length;
        if view_bytes(tensor).is_none_or(|bytes| bytes > length) {
            return Ok(None);
        }
        let bytes = checkpoint.read(tensor.storage as usize)?;
        Ok(row_major(tensor, &bytes).map(Cow::into_owned))
    }

    /// What a tensor views: equal ones have equal content.
    fn view(&self, leaf: usize) -> Option<(Digest, u64, &'a [i64], u64)> {
        let (values, checkpoint) = self.held.as_ref()?;
        let Value::Tensor(tensor) = values[leaf] else {
            return None;
        };
        let storage = &checkpoint.manifest().storages[tensor.storage as usize];
        Some((storage.digest, storage.length, &tensor.strides, tensor.offset))
    }
}

/// Compares two states leaf by leaf: data order and generators first, then the rest in the tree's order.
///
/// Digests decide whether a leaf differs; bytes are read to say how far, and where there is no digest to decide by.
///
/// # Errors
///
/// [`crate::Error::Damaged`] and errors of the storage, where bytes without which a leaf cannot be judged cannot be read
/// whole.
pub fn compare_states(expected: &State, found: &State) -> Result<Vec<Leaf>> {
    let mut comparison = Comparison {
        expected,
        found,
        leaves: Vec::new(),
    };
    comparison.nodes()?;
    comparison.leaves.sort_by_key(|leaf| state_rank(&leaf.path));
    Ok(comparison.leaves)
}

/// What comes first in one step, like [`causal_rank`] for the leaves of a state.
fn state_rank(path: &str) -> u8 {
    match path.split('/').next() {
        Some("loaders") => 0,
        Some("generators") => 1,
        Some("objects") if path.to_lowercase().contains("/state/") => 2,
        Some("objects") => 3,
        _ => 4,
    }
}

struct Comparison<'a> {
    expected: &'a State<'a>,
    found: &'a State<'a>,
    leaves: Vec<Leaf>,
}

/// A state's nodes with, for each leaf, its place among the leaves.
fn numbered(outline: &Outline) -> Vec<(&Node, usize)> {
    let mut leaf = 0;
    let place = |node: &'_ Node| {
        let here = leaf;
        leaf += usize::from(node.leaf);
        here
    };
    let places: Vec<usize> = outline.nodes.iter().map(place).collect();
    outline.nodes.iter().zip(places).collect()
}

/// Whether a node lies below another one.
fn below(path: &str, above: &str) -> bool {
    above.is_empty() || path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'))
}

impl Comparison<'_> {
    fn push(&mut self, path: &str, change: Change) {
        self.leaves.push(Leaf {
            path: path.to_owned(),
            change,
        });
    }

    fn nodes(&mut self) -> Result<()> {
        let (old, new) = (numbered(&self.expected.outline), numbered(&self.found.outline));
        // Two keys of one mapping may read alike (1 and "1"): the first goes with the first.
        let mut places: HashMap<&str, VecDeque<usize>> = HashMap::new();
        for (place, (node, _)) in new.iter().enumerate() {
            places.entry(&node.path).or_default().push_back(place);
        }
        let mut paired = vec![false; new.len()];
        // What a node holds is not looked at where the node itself is another one.
        let mut settled: Option<&str> = None;
        let mut order = Vec::new();
        for (node, leaf) in old {
            if settled.is_some_and(|above| below(&node.path, above)) {
                continue;
            }
            settled = None;
            let Some(place) = places.get_mut(node.path.as_str()).and_then(VecDeque::pop_front) else {
                self.push(&node.path, Change::Missing);
                settled = Some(&node.path);
                continue;
            };
            let (other, other_leaf) = new[place];
            paired[place] = true;
            order.push((node, place));
            // Of a mapping that is empty on one side, what the other side holds is named below.
            let is_mapping = !matches!(node.what.as_str(), "list" | "tuple");
            if node.what != other.what || (node.leaf != other.leaf && !is_mapping) {
                let words = |state: &State, node: &Node, leaf| match state.value(leaf) {
                    Some(value) if node.leaf => value_words(value),
                    _ => node.what.clone(),
                };
                let (expected, found) = (
                    words(self.expected, node, leaf),
                    words(self.found, other, other_leaf),
                );
                self.push(&node.path, Change::Value { expected, found });
                settled = Some(&node.path);
            } else {
                if node.leaf && other.leaf {
                    self.content(node, leaf, other_leaf)?;
                }
                if node.layout != other.layout {
                    let (expected, found) = (layout_words(&node.layout), layout_words(&other.layout));
                    self.push(&node.path, Change::Layout { expected, found });
                }
            }
        }
        let mut extra: Option<&str> = None;
        for (place, (node, _)) in new.iter().enumerate() {
            let known = |above: Option<&str>| above.is_some_and(|above| below(&node.path, above));
            let elsewhere = self
                .leaves
                .iter()
                .any(|leaf| matches!(leaf.change, Change::Value { .. }) && known(Some(&leaf.path)));
            if !paired[place] && !known(extra) && !elsewhere {
                self.push(&node.path, Change::Extra);
                extra = Some(&node.path);
            }
        }
        self.order(&order);
        Ok(())
    }

    /// The order of a mapping's keys is state. `order` has each node that both have with its place in what was found.
    fn order(&mut self, order: &[(&Node, usize)]) {
        // Each node above the one in hand, and the part of it that came last: its path, and its place in what was found.
        let mut above: Vec<(&Node, &str, usize)> = Vec::new();
        for &(node, place) in order {
            while above
                .last()
                .is_some_and(|(parent, ..)| !below(&node.path, &parent.path))
            {
                above.pop();
            }
            if let Some((parent, before, last)) = above.last_mut() {
                if place < *last && parent.what == "dict" {
                    let expected = format!("`{}` behind `{before}`", node.path);
                    let found = "its keys in another order".to_owned();
                    self.push(&parent.path, Change::Value { expected, found });
                }
                (*before, *last) = (&node.path, place);
            }
            above.push((node, "", 0));
        }
    }

    fn content(&mut self, node: &Node, old: usize, new: usize) -> Result<()> {
        let contents = (
            self.expected.outline.contents[old],
            self.found.outline.contents[new],
        );
        let same_view = || {
            let view = self.expected.view(old);
            view.is_some() && view == self.found.view(new)
        };
        let differs = match contents {
            (Some(expected), Some(found)) => expected != found,
            _ => !same_view(),
        };
        if !differs {
            return Ok(());
        }
        if let (Some(expected), Some(found)) = (self.expected.value(old), self.found.value(new))
            && !matches!(expected, Value::Tensor(_))
        {
            self.plain(&node.path, expected, found);
            return Ok(());
        }
        let told = match contents {
            (Some(expected), Some(found)) => Some(Change::Content {
                expected: expected.short(),
                found: found.short(),
            }),
            _ => None,
        };
        let read = self
            .expected
            .elements(old)
            .and_then(|expected| Ok(expected.zip(self.found.elements(new)?)));
        let change = match (read, told) {
            (Ok(Some((expected, found))), _) => {
                let dtype = node.what.split(' ').next().unwrap_or_default().to_owned();
                elements::compare(&dtype, &expected, &found)
                    .map(|elements| Change::Elements { dtype, elements })
            }
            // That it differs is known without the bytes, and how far cannot be said.
            (_, Some(told)) => Some(told),
            (Ok(None), None) => Some(Change::Unknown),
            (Err(error), None) => return Err(error),
        };
        if let Some(change) = change {
            self.push(&node.path, change);
        }
        Ok(())
    }

    /// Plain values that differ: of two sequences the items that do.
    fn plain(&mut self, path: &str, expected: &Value, found: &Value) {
        match (expected, found) {
            (Value::List(old), Value::List(new)) | (Value::Tuple(old), Value::Tuple(new))
                if !old.is_empty() && !new.is_empty() =>
            {
                for index in 0..old.len().max(new.len()) {
                    let path = format!("{path}/{index}");
                    match (old.get(index), new.get(index)) {
                        (Some(old), Some(new)) if old == new => {}
                        (Some(old), Some(new)) => self.plain(&path, old, new),
                        (Some(_), None) => self.push(&path, Change::Missing),
                        (None, _) => self.push(&path, Change::Extra),
                    }
                }
            }
            _ => self.push(
                path,
                Change::Value {
                    expected: value_words(expected),
                    found: value_words(found),
                },
            ),
        }
    }
}

fn layout_words(layout: &str) -> String {
    if layout.is_empty() {
        "row-major in memory of its own".to_owned()
    } else {
        layout.to_owned()
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
        Change::Content { expected, found } => format!("its bytes should hash to {expected}, found {found}"),
        Change::Layout { expected, found } => {
            format!("laid out otherwise: expected {expected}, found {found}")
        }
        Change::Value { expected, found } => format!("expected {expected}, found {found}"),
        Change::Unknown => "cannot be compared: its bytes are not there".to_owned(),
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

    fn compare(expected: &[Boundary], found: &[Boundary]) -> Compared {
        let all = |boundaries: &[Boundary]| boundaries.iter().cloned().map(Ok).collect::<Vec<_>>();
        compare_journals(all(expected), all(found)).unwrap()
    }

    #[test]
    fn equal_journals_are_the_same() {
        let run = [boundary(1, 0, &[("log/loss", 3)]), boundary(1, 1, &[])];
        let same = |equal, last_equal| Compared {
            equal,
            last_equal,
            outcome: Outcome::Same,
        };
        assert_eq!(compare(&run, &run), same(2, Some((1, 1))));
        assert_eq!(compare(&[], &[]), same(0, None));
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
            let Outcome::Parts(parting) = compare(&[row(count, 1)], &[row(count, 2)]).outcome else {
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
        let Outcome::Parts(parting) = compare(&[old], &[new]).outcome else {
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
            compare(&run, &run[..2]).outcome,
            Outcome::EndsEarly { missing: (3, 0) }
        );
        let gap = [run[0].clone(), run[2].clone()];
        let expected = Outcome::OtherBoundaries {
            expected: Some((2, 0)),
            found: (3, 0),
        };
        assert_eq!(compare(&run, &gap).outcome, expected);
        let expected = Outcome::OtherBoundaries {
            expected: None,
            found: (3, 0),
        };
        assert_eq!(compare(&run[..2], &run).outcome, expected);
    }

    #[test]
    fn a_window_looks_at_neighbours_of_the_same_phase() {
        let run = |last| {
            [
                boundary(1, 0, &[("a", 1)]),
                boundary(1, 1, &[("a", 9)]),
                boundary(2, 0, &[("a", last)]),
                boundary(2, 1, &[("a", 8)]),
                boundary(3, 0, &[("a", 3)]),
            ]
        };
        let (old, new) = (run(2), run(5));
        let Outcome::Parts(parting) = compare(&old, &new).outcome else {
            panic!("they differ at step 2")
        };
        for (window, run) in [(parting.expected_window(), &old), (parting.found_window(), &new)] {
            assert_eq!(window.before, Some(run[0].components.as_slice()));
            assert_eq!(window.at, run[2].components.as_slice());
            assert_eq!(window.after, Some(run[4].components.as_slice()));
        }
        assert_eq!(parting.last_equal, Some((1, 1)));
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
