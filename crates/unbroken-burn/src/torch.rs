//! Weights between Burn and PyTorch by name: `conv1.weight` of one is `conv1.weight` of the other.
//!
//! Touches: nothing but what it is given. Three things differ between the two: Burn keeps a linear layer's weight the
//! other way round, calls a norm's weight and bias gamma and beta, and does not count a batch norm's batches. Recurrent
//! layers and attention are laid out otherwise and are not translated: their names will not be found.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Bytes, Int, Tensor, TensorData};
use unbroken::format::pack;
use unbroken::store::Checkpoint;
use unbroken::{Error, Result, Value};

use crate::{dtype, module};

const NORMS: [&str; 5] = [
    "Struct:BatchNorm",
    "Struct:LayerNorm",
    "Struct:GroupNorm",
    "Struct:InstanceNorm",
    "Struct:RmsNorm",
];
/// What PyTorch's batch norm has and Burn's has not.
const UNKNOWN_TO_BURN: &str = ".num_batches_tracked";

/// One tensor's two names.
struct Names {
    burn: String,
    torch: String,
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
    for (key, value) in parameters.iter().chain(buffers) {
        if let (Value::Str(key), Value::Tensor(tensor)) = (key, value)
            && !key.ends_with(UNKNOWN_TO_BURN)
        {
            there.insert(key, tensor);
        }
    }
    let mut tensors = HashMap::new();
    for names in names(&module) {
        let tensor = there.remove(names.torch.as_str()).ok_or_else(|| {
            Error::invalid(format!("`{}` is not in `{name}` of the checkpoint", names.torch))
        })?;
        let data = data(checkpoint, tensor, &names.torch)?;
        tensors.insert(names.burn, if names.turned { turn(data) } else { data });
    }
    if let Some(left) = there.keys().min() {
        return Err(Error::invalid(format!(
            "`{left}` of the checkpoint is not in the module"
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
    let mut entries = Vec::new();
    let mut bytes = Vec::new();
    for (names, tensor) in names(module).into_iter().zip(data.0) {
        let tensor = if names.turned { turn(tensor) } else { tensor };
        let (raw, shape, kind) = tensor.into_parts();
        let look = (dtype::name(kind, &names.torch)?, dtype::sizes(&shape.to_vec()));
        entries.push(pack::describe(
            names.torch,
            raw.len() as u64,
            Some((look.0, &look.1)),
        ));
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

/// The names of each tensor, in the module's order.
fn names<M: Module>(module: &M) -> Vec<Names> {
    struct Collect {
        path: Vec<(String, String)>,
        names: Vec<Names>,
    }
    impl Collect {
        fn add(&mut self, dimensions: usize) {
            let join = |last: &str| {
                let before = self.path[..self.path.len() - 1]
                    .iter()
                    .map(|(name, _)| name.as_str());
                before.chain([last]).collect::<Vec<_>>().join(".")
            };
            let (name, container) = self.path.last().expect("a tensor is a field of something");
            let torch = match name.as_str() {
                "gamma" if NORMS.contains(&container.as_str()) => "weight",
                "beta" if NORMS.contains(&container.as_str()) => "bias",
                name => name,
            };
            let turned = container == "Struct:Linear" && name == "weight" && dimensions == 2;
            self.names.push(Names {
                burn: join(name),
                torch: join(torch),
                turned,
            });
        }
    }
    impl ModuleVisitor for Collect {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.push((name.to_owned(), container_type.to_owned()));
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
            self.add(D);
        }
        fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
            self.add(D);
        }
        fn visit_bool<const D: usize>(&mut self, _param: &Param<Tensor<D, Bool>>) {
            self.add(D);
        }
    }
    let mut collect = Collect {
        path: Vec::new(),
        names: Vec::new(),
    };
    module.visit(&mut collect);
    collect.names
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

/// A matrix with its dimensions in the other order.
fn turn(data: TensorData) -> TensorData {
    let (bytes, shape, kind) = data.into_parts();
    let (rows, columns, size) = (shape.to_vec()[0], shape.to_vec()[1], kind.size());
    let mut turned = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            turned.extend_from_slice(&bytes[(row * columns + column) * size..][..size]);
        }
    }
    TensorData::from_bytes(Bytes::from_bytes_vec(turned), vec![columns, rows], kind)
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
