//! Weights between Burn and PyTorch by name: `conv1.weight` of one is `conv1.weight` of the other.
//!
//! Touches: nothing but what it is given. What differs between the two: Burn keeps a linear layer's weight the other way
//! round, calls a norm's weight and bias gamma and beta, does not count a batch norm's batches, and keeps each gate of a
//! recurrent layer and each projection of an attention apart, where PyTorch lays them on top of each other in one tensor.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Bytes, Int, Tensor, TensorData};
use unbroken::format::pack;
use unbroken::store::Checkpoint;
use unbroken::{Error, Result, Value};

use crate::{dtype, module};

/// What Burn calls otherwise: containers, and the names of one of their fields in Burn and in PyTorch.
const RENAMED: [(&[&str], &str, &str); 3] = [
    (&NORMS, "gamma", "weight"),
    (&NORMS, "beta", "bias"),
    (&["Struct:PRelu"], "alpha", "weight"),
];
const NORMS: [&str; 5] = [
    "Struct:BatchNorm",
    "Struct:LayerNorm",
    "Struct:GroupNorm",
    "Struct:InstanceNorm",
    "Struct:RmsNorm",
];
/// Recurrent layers: the fields that hold their gates, in PyTorch's order.
const RECURRENT: [(&str, &[&str]); 3] = [
    (
        "Struct:Lstm",
        &["input_gate", "forget_gate", "cell_gate", "output_gate"],
    ),
    ("Struct:Gru", &["reset_gate", "update_gate", "new_gate"]),
    ("Struct:Rnn", &["gate"]),
];
/// Recurrent layers that go both ways: PyTorch has one layer with two sets of weights.
const BOTH_WAYS: [&str; 3] = ["Struct:BiLstm", "Struct:BiGru", "Struct:BiRnn"];
const ATTENTION: &str = "Struct:MultiHeadAttention";
/// Projections of an attention that are one tensor in PyTorch, in its order.
const PROJECTIONS: [&str; 3] = ["query", "key", "value"];
/// What PyTorch's batch norm has and Burn's has not.
const UNKNOWN_TO_BURN: &str = ".num_batches_tracked";

/// Where one of Burn's tensors is in PyTorch.
struct Place {
    burn: String,
    torch: String,
    /// Which part of PyTorch's tensor it is, and of how many equal ones, along the first dimension.
    part: usize,
    of: usize,
    /// Whether its two dimensions change places.
    turned: bool,
}

/// Returns the module with the weights of a PyTorch run's tracked module, such as `model`.
///
/// # Errors
///
/// [`Error::Invalid`] where a tensor of the module is not in the checkpoint, or one of the checkpoint not in the module;
/// [`Error::Damaged`].
pub fn read<M: Module>(module: M, checkpoint: &Checkpoint, name: &str) -> Result<M> {
    let object = checkpoint
        .tree()
        .get("objects")
        .and_then(|objects| objects.get(name));
    let part = |part| object.and_then(|object| object.get(part));
    let (Some(Value::Dict(parameters)), Some(Value::Dict(buffers))) = (part("parameters"), part("buffers"))
    else {
        return Err(Error::invalid(format!(
            "the checkpoint has no PyTorch module named `{name}`"
        )));
    };
    let mut there: HashMap<&str, &unbroken::state::Tensor> = HashMap::new();
    for (key, value) in parameters.iter().chain(buffers.iter()) {
        if let (Value::Str(key), Value::Tensor(tensor)) = (key, value)
            && !key.ends_with(UNKNOWN_TO_BURN)
        {
            there.insert(key, tensor);
        }
    }
    let mut tensors = HashMap::new();
    let mut used: BTreeMap<String, (BTreeSet<usize>, usize)> = BTreeMap::new();
    for place in places(&module) {
        let tensor = there.get(place.torch.as_str()).ok_or_else(|| {
            Error::invalid(format!("`{}` is not in `{name}` of the checkpoint", place.torch))
        })?;
        let data = take(data(checkpoint, tensor, &place.torch)?, &place)?;
        tensors.insert(place.burn, if place.turned { module::turn(data) } else { data });
        let (parts, _) = used
            .entry(place.torch)
            .or_insert_with(|| (BTreeSet::new(), place.of));
        parts.insert(place.part);
    }
    there.retain(|key, _| used.get(*key).is_none_or(|(parts, of)| parts.len() < *of));
    if let Some(left) = there.keys().min() {
        return Err(Error::invalid(format!(
            "`{left}` of the checkpoint is not in the module, or not all of it"
        )));
    }
    module::replace(module, tensors, None)
}

/// Returns the bytes of a `.safetensors` file that PyTorch's `load_state_dict` takes.
///
/// It has no count of batches for batch norms, which PyTorch wants only with `strict`.
///
/// # Errors
///
/// A tensor of a type that safetensors does not have.
pub fn safetensors<M: Module>(module: &M) -> Result<Vec<u8>> {
    module::settle(module);
    let mut data = Tensors::default();
    module.visit(&mut data);
    let mut whole: BTreeMap<String, (usize, BTreeMap<usize, TensorData>)> = BTreeMap::new();
    for (place, tensor) in places(module).into_iter().zip(data.0) {
        let tensor = if place.turned {
            module::turn(tensor)
        } else {
            tensor
        };
        let (_, parts) = whole.entry(place.torch).or_insert((place.of, BTreeMap::new()));
        parts.insert(place.part, tensor);
    }
    let mut entries = Vec::new();
    let mut bytes = Vec::new();
    for (name, (of, parts)) in whole {
        let (raw, shape, kind) = join(&name, of, parts)?.into_parts();
        let look = (dtype::name(kind, &name)?, dtype::sizes(&shape.to_vec()));
        entries.push(pack::describe(name, raw.len() as u64, Some((look.0, &look.1))));
        bytes.push(raw);
    }
    let failed =
        |flaw: unbroken::format::Flaw| Error::invalid(format!("the weights cannot be written: {flaw:?}"));
    let layout = pack::plan(&entries).map_err(failed)?;
    let mut file = layout.header.clone();
    layout
        .order
        .iter()
        .for_each(|index| file.extend_from_slice(&bytes[*index]));
    Ok(file)
}

/// Where each tensor is in PyTorch, in the module's order.
fn places<M: Module>(module: &M) -> Vec<Place> {
    struct Collect {
        path: Vec<(String, String)>,
        places: Vec<Place>,
    }
    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.push((name.to_owned(), container_type.to_owned()));
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let mut place = place(&self.path, D);
            // What records have the other way round already is as PyTorch has it.
            place.turned &= !module::is_turned(param);
            self.places.push(place);
        }
        fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
            self.places.push(place(&self.path, D));
        }
        fn visit_bool<const D: usize>(&mut self, _param: &Param<Tensor<D, Bool>>) {
            self.places.push(place(&self.path, D));
        }
    }
    let mut collect = Collect {
        path: Vec::new(),
        places: Vec::new(),
    };
    module.visit(&mut collect);
    collect.places
}

/// Where the tensor at a path is: fields, each with the container that it is a field of.
fn place(path: &[(String, String)], dimensions: usize) -> Place {
    let (last, container) = path.last().expect("a tensor is a field of something");
    let name = |parts: &[(String, String)], last: &str| {
        let names = parts.iter().map(|(name, _)| name.as_str());
        names.chain([last]).collect::<Vec<_>>().join(".")
    };
    let renamed = RENAMED
        .iter()
        .find(|(containers, burn, _)| containers.contains(&container.as_str()) && burn == last);
    let here = &path[..path.len() - 1];
    let (torch, part, of) = recurrent(path)
        .or_else(|| attention(path))
        .map(|(before, last, part, of)| (name(before, &last), part, of))
        .unwrap_or_else(|| (name(here, renamed.map_or(last, |(_, _, torch)| torch)), 0, 1));
    Place {
        burn: name(here, last),
        torch,
        part,
        of,
        turned: container == "Struct:Linear" && last == "weight" && dimensions == 2,
    }
}

/// The path before PyTorch's name, that name, which part it is and of how many.
type Found<'p> = Option<(&'p [(String, String)], String, usize, usize)>;

/// `lstm.forget_gate.input_transform.weight` is a part of `lstm.weight_ih_l0`.
fn recurrent(path: &[(String, String)]) -> Found<'_> {
    let [before @ .., (gate, layer), (side, _), (kind, _)] = path else {
        return None;
    };
    let (_, gates) = RECURRENT.iter().find(|(name, _)| name == layer)?;
    let part = gates.iter().position(|name| name == gate)?;
    let side = match side.as_str() {
        "input_transform" => "ih",
        "hidden_transform" => "hh",
        _ => return None,
    };
    let (before, way) = match before {
        [before @ .., (way, layer)] if BOTH_WAYS.contains(&layer.as_str()) => {
            (before, if way == "reverse" { "_reverse" } else { "" })
        }
        _ => (before, ""),
    };
    Some((before, format!("{kind}_{side}_l0{way}"), part, gates.len()))
}

/// `attention.key.weight` is a part of `attention.in_proj_weight`.
fn attention(path: &[(String, String)]) -> Found<'_> {
    let [before @ .., (field, layer), (kind, _)] = path else {
        return None;
    };
    if layer != ATTENTION {
        return None;
    }
    if field == "output" {
        return Some((before, format!("out_proj.{kind}"), 0, 1));
    }
    let part = PROJECTIONS.iter().position(|name| name == field)?;
    Some((before, format!("in_proj_{kind}"), part, PROJECTIONS.len()))
}

/// One of several equal parts of a tensor, along its first dimension.
fn take(data: TensorData, place: &Place) -> Result<TensorData> {
    if place.of == 1 {
        return Ok(data);
    }
    let (bytes, shape, kind) = data.into_parts();
    let mut shape = shape.to_vec();
    match shape.first_mut() {
        Some(rows) if rows.is_multiple_of(place.of) => *rows /= place.of,
        _ => {
            return Err(Error::invalid(format!(
                "`{}` of shape {shape:?} has no {} equal parts",
                place.torch, place.of
            )));
        }
    }
    let size = bytes.len() / place.of;
    let bytes = bytes[place.part * size..][..size].to_vec();
    Ok(TensorData::from_bytes(Bytes::from_bytes_vec(bytes), shape, kind))
}

/// Parts of a tensor laid on top of each other along its first dimension.
fn join(name: &str, of: usize, parts: BTreeMap<usize, TensorData>) -> Result<TensorData> {
    if parts.len() < of {
        return Err(Error::Unsupported {
            what: format!(
                "`{name}` in PyTorch, of whose {of} parts the module has {}",
                parts.len()
            ),
        });
    }
    let mut parts = parts.into_values();
    let (first, shape, kind) = parts.next().expect("a tensor has at least one part").into_parts();
    if of == 1 {
        return Ok(TensorData::from_bytes(first, shape, kind));
    }
    let mut shape = shape.to_vec();
    shape[0] *= of;
    let mut bytes = first.to_vec();
    parts.for_each(|part| bytes.extend_from_slice(&part.into_parts().0));
    Ok(TensorData::from_bytes(Bytes::from_bytes_vec(bytes), shape, kind))
}

/// The tensors, in the module's order.
#[derive(Default)]
struct Tensors(Vec<TensorData>);

impl ModuleVisitor for Tensors {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.transform_for_save().val().into_data());
    }
    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.0.push(param.transform_for_save().val().into_data());
    }
    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.0.push(param.transform_for_save().val().into_data());
    }
}

/// A tensor of a checkpoint, gathered from its storage in row-major order.
fn data(checkpoint: &Checkpoint, tensor: &unbroken::state::Tensor, name: &str) -> Result<TensorData> {
    let storage = checkpoint.read(tensor.storage as usize)?;
    let shape: Vec<usize> = tensor.shape.iter().map(|size| *size as usize).collect();
    let kind = dtype::of(&tensor.dtype, name)?;
    let (size, count) = (kind.size(), shape.iter().product::<usize>());
    let outside = || Error::invalid(format!("`{name}` views bytes outside its storage"));
    let mut bytes = Vec::with_capacity(count * size);
    let mut index = vec![0usize; shape.len()];
    for _ in 0..count {
        let steps = index
            .iter()
            .zip(&tensor.strides)
            .map(|(index, stride)| *index as i64 * stride);
        let first = tensor.offset as i64 + steps.sum::<i64>();
        let start = usize::try_from(first)
            .ok()
            .and_then(|first| first.checked_mul(size))
            .ok_or_else(outside)?;
        bytes.extend_from_slice(storage.get(start..start + size).ok_or_else(outside)?);
        for place in (0..shape.len()).rev() {
            index[place] += 1;
            if index[place] < shape[place] {
                break;
            }
            index[place] = 0;
        }
    }
    Ok(TensorData::from_bytes(Bytes::from_bytes_vec(bytes), shape, kind))
}
