//! What follows from the form of a tree alone, found once for all commits of one form: a program's state has the same
//! names and looks from step to step.
//!
//! Touches: nothing. A form is a tree's without its plain values; whether another tree has it is decided by comparing
//! all of it, each time.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::pack_tensors;
use crate::format::manifest::Manifest;
use crate::format::pack::{self, PackLayout};
use crate::format::saved::Node;
use crate::format::{Flaw, value};
use crate::lending::Bytes;
use crate::state::Value;

/// What a pack shows of a storage: its index, and what else than its bytes, and how many, where it is that.
pub(super) type Shown = (usize, Option<(&'static str, u64)>);

/// The form that checkpoints have in common.
#[derive(Debug)]
pub(crate) struct Form {
    /// The first checkpoint that had it.
    first: Arc<Manifest>,
    /// The nodes of its outline, once somebody needed them.
    pub(crate) nodes: OnceLock<Arc<Vec<Node>>>,
    /// What the last commit wrote.
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    packs: Vec<Packed>,
    manifest_bytes: u64,
}

/// A pack's layout, and what else than the form it follows from.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    shown: Vec<Shown>,
    lengths: Vec<u64>,
    pub(super) layout: Arc<PackLayout>,
}

impl Form {
    pub(super) fn of(first: Arc<Manifest>) -> Arc<Form> {
        Arc::new(Form {
            first,
            nodes: OnceLock::new(),
            last: Mutex::default(),
        })
    }

    /// Whether a tree has this form.
    pub(super) fn is_of(&self, tree: &Value) -> bool {
        alike(&self.first.tree, tree, value::MAX_DEPTH)
    }

    /// Takes note of what a commit packed, and how long its manifest was.
    pub(super) fn note(&self, packs: Vec<Packed>, manifest_bytes: u64) {
        *self.last() = Last {
            packs,
            manifest_bytes,
        };
    }

    /// How long the last commit's manifest was; 0 where there was none.
    pub(super) fn manifest_bytes(&self) -> u64 {
        self.last().manifest_bytes
    }

    fn packed(&self, shown: &[Shown], lengths: &[u64]) -> Option<Packed> {
        let last = self.last();
        let as_then = |packed: &&Packed| packed.shown == shown && packed.lengths == lengths;
        last.packs.iter().find(as_then).cloned()
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().expect("nothing panics with it")
    }
}

/// Lays out a pack of storages that a tree views; as the last commit did, where that packed the same in the same form.
pub(super) fn pack_as_before(
    form: Option<&Form>,
    tree: &Value,
    storages: &[Bytes],
    shown: Vec<Shown>,
) -> Result<Packed, Flaw> {
    let length = |(index, _): &Shown| storages[*index].len() as u64;
    let lengths: Vec<u64> = shown.iter().map(length).collect();
    if let Some(packed) = form.and_then(|form| form.packed(&shown, &lengths)) {
        return Ok(packed);
    }
    let layout = Arc::new(pack::plan(&pack_tensors(tree, storages, &shown))?);
    Ok(Packed {
        shown,
        lengths,
        layout,
    })
}

/// Whether two values differ in nothing but plain ones, each of which is of the same type in both.
fn alike(one: &Value, other: &Value, depth: usize) -> bool {
    // What is nested deeper is refused when it is encoded.
    let Some(depth) = depth.checked_sub(1) else {
        return false;
    };
    let same = |one: &[Value], other: &[Value]| {
        one.len() == other.len() && one.iter().zip(other).all(|(one, other)| alike(one, other, depth))
    };
    match (one, other) {
        (Value::Dict(one), Value::Dict(other)) => {
            let mut entries = one.iter().zip(&**other);
            one.len() == other.len()
                && entries
                    .all(|((key, one), (other_key, other))| key == other_key && alike(one, other, depth))
        }
        (Value::List(one), Value::List(other)) | (Value::Tuple(one), Value::Tuple(other)) => same(one, other),
        (Value::Object(one), Value::Object(other)) => {
            let looks_alike =
                (&one.kind, &one.name, one.fields.len()) == (&other.kind, &other.name, other.fields.len());
            let mut pairs = one.fields.iter().zip(&other.fields);
            looks_alike
                && pairs
                    .all(|((name, one), (other_name, other))| name == other_name && alike(one, other, depth))
        }
        // Their members have no names but their place in the order of their bytes.
        (Value::Set(one), Value::Set(other)) | (Value::FrozenSet(one), Value::FrozenSet(other)) => {
            one == other
        }
        (Value::Tensor(one), Value::Tensor(other)) => one == other,
        (one, other) => std::mem::discriminant(one) == std::mem::discriminant(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::outline::nodes_of;
    use crate::state::{Object, Tensor};

    fn text(text: &str) -> Value {
        Value::Str(text.to_owned())
    }

    fn tensor(change: impl FnOnce(&mut Tensor)) -> Value {
        let mut tensor = Tensor {
            dtype: "float32".to_owned(),
            shape: vec![2, 3],
            strides: vec![3, 1],
            offset: 0,
            storage: 0,
            device: "cpu".to_owned(),
            attrs: vec![("requires_grad".to_owned(), Value::Bool(true))],
        };
        change(&mut tensor);
        Value::from(tensor)
    }

    fn object(kind: &str, field: &str, value: Value) -> Value {
        Value::from(Object {
            kind: kind.to_owned(),
            name: "Score".to_owned(),
            fields: vec![(field.to_owned(), value)],
        })
    }

    fn tree(key: Value, parts: [Value; 4]) -> Value {
        let [weight, list, object, set] = parts;
        Value::dict(vec![
            (key, weight),
            (text("list"), list),
            (text("object"), object),
            (text("set"), set),
        ])
    }

    /// A tree, changed in one place.
    fn with(change: impl FnOnce(&mut Value, &mut [Value; 4])) -> Value {
        let mut key = text("weight");
        let mut parts = [
            tensor(|_| ()),
            Value::List(vec![Value::Int(1), tensor(|tensor| tensor.storage = 1)]),
            object("dataclass", "best", Value::Float(0)),
            Value::Set(vec![Value::Int(1)]),
        ];
        change(&mut key, &mut parts);
        tree(key, parts)
    }

    fn is_alike(other: &Value) -> bool {
        alike(&with(|_, _| ()), other, value::MAX_DEPTH)
    }

    #[test]
    fn trees_that_differ_in_plain_values_alone_have_one_form_and_one_outline() {
        let later = with(|_, parts| {
            parts[1] = Value::List(vec![Value::Int(7), tensor(|tensor| tensor.storage = 1)]);
            parts[2] = object("dataclass", "best", Value::Float(1));
        });
        assert!(is_alike(&later));
        assert_eq!(nodes_of(&with(|_, _| ())), nodes_of(&later));
    }

    #[test]
    fn whatever_else_differs_is_another_form() {
        let looks: [fn(&mut Tensor); 7] = [
            |tensor| tensor.dtype = "int32".to_owned(),
            |tensor| tensor.shape = vec![3, 2],
            |tensor| tensor.strides = vec![1, 2],
            |tensor| tensor.offset = 1,
            |tensor| tensor.storage = 1,
            |tensor| tensor.device = "cuda:0".to_owned(),
            |tensor| tensor.attrs[0].1 = Value::Bool(false),
        ];
        let mut others: Vec<Value> = looks.map(|look| with(|_, parts| parts[0] = tensor(look))).into();
        others.push(with(|key, _| *key = text("bias")));
        others.push(with(|_, parts| parts[0] = Value::None));
        others.push(with(|_, parts| parts[1] = Value::List(vec![Value::Int(1)])));
        others.push(with(|_, parts| parts[1] = Value::Tuple(vec![])));
        others.push(with(|_, parts| {
            parts[2] = object("enum", "best", Value::Float(0))
        }));
        others.push(with(|_, parts| {
            parts[2] = object("dataclass", "last", Value::Float(0))
        }));
        others.push(with(|_, parts| {
            parts[2] = object("dataclass", "best", Value::Int(0))
        }));
        others.push(with(|_, parts| parts[3] = Value::Set(vec![Value::Int(2)])));
        if let Value::Dict(mut items) = with(|_, _| ()) {
            Arc::make_mut(&mut items).swap(0, 1);
            others.push(Value::Dict(items));
        }
        for other in &others {
            assert!(!is_alike(other), "{other:?}");
        }
    }

    fn manifest_of(tree: Value) -> Manifest {
        Manifest {
            run_id: "0f3c9a2e77d14b60".to_owned(),
            step: 0,
            phase: 0,
            parent: None,
            life: 1,
            created: "2026-11-23T10:00:00Z".to_owned(),
            tree,
            storages: Vec::new(),
            packs: Vec::new(),
            identity: Vec::new(),
            environment: Vec::new(),
            metrics: Vec::new(),
            pinned: false,
            journal_head: Digest([0; 32]),
            new_bytes: 0,
        }
    }

    #[test]
    fn a_pack_of_other_storages_or_other_lengths_is_laid_out_anew() {
        let tree = with(|_, _| ());
        let form = Form::of(Arc::new(manifest_of(tree.clone())));
        let (long, short) = (Bytes::Here(&[0; 24]), Bytes::Here(&[0; 8]));
        let pack = |form: Option<&Form>, storages: [Bytes; 2], shown: &[Shown]| {
            pack_as_before(form, &tree, &storages, shown.to_vec()).unwrap()
        };
        let both: [Shown; 2] = [(0, None), (1, None)];
        form.note(vec![pack(None, [long, long], &both)], 0);
        let again = pack(Some(&*form), [long, long], &both);
        assert!(Arc::ptr_eq(
            &again.layout,
            &form.packed(&both, &[24, 24]).unwrap().layout
        ));
        for (storages, shown) in [
            ([long, short], &both[..]),
            ([long, long], &both[..1]),
            ([long, long], &[(0, None), (1, Some((" (compressed)", 24)))]),
        ] {
            let found = pack(Some(&*form), storages, shown);
            assert_eq!(found.layout, pack(None, storages, shown).layout);
            assert_ne!(found.layout, again.layout);
        }
    }
}
