//! Modules to and from state, by path: `conv1.weight`, `norm1.running_mean`.
//!
//! Touches: the module's tensors, read only on the way out.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, Bytes as BurnBytes, DType, Int, Shape, Tensor, TensorData};
use unbroken::train::{Bytes, StateReader, StateWriter};
use unbroken::{Error, Result, Value};

use crate::dtype::{self, Raw};

/// Brings running statistics up to date: Burn keeps the newest update aside until the next forward pass, and records
/// what was before it. Changes no number of the training.
pub fn settle<M: Module>(module: &M) {
    /// Whether there is a tensor that is not trained: all running statistics are of that kind.
    struct Untrained(bool);
    impl ModuleVisitor for Untrained {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 |= param.is_initialized() && !param.is_require_grad();
        }
    }
    let mut untrained = Untrained(false);
    module.visit(&mut untrained);
    if untrained.0 {
        // Making the validation form of a module takes over what is pending, in the module itself.
        let _ = module.valid();
    }
}

/// Returns the module with every matrix laid out in memory as a resume lays it out.
///
/// Burn begins a linear layer whose layout is by columns with a transposed view, and an optimizer's first update makes it
/// a plain matrix: another order of the same numbers, from which a kernel's sums come out otherwise in their last bits. To
/// be called once, before a new run's first step; changes no number, and nothing at all where there are no such layers.
pub fn lay_out<M: Module>(module: M) -> M {
    module.map(&mut LayOut)
}

struct LayOut;

impl ModuleMapper for LayOut {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !is_turned(&param) {
            return param;
        }
        let data = param.val().into_data();
        with_data(param, data)
    }
}

/// Returns the parameter with these elements, in the order of the layer's own computation.
fn with_data<const D: usize>(param: Param<Tensor<D>>, data: TensorData) -> Param<Tensor<D>> {
    param.map(|tensor| {
        let dtype = data.dtype();
        let found = Tensor::from_data(data, (&tensor.device(), dtype));
        found.set_require_grad(tensor.is_require_grad())
    })
}

/// A matrix with its dimensions in the other order.
pub(crate) fn turn(data: TensorData) -> TensorData {
    let (bytes, shape, kind) = data.into_parts();
    let (rows, columns, size) = (shape.to_vec()[0], shape.to_vec()[1], kind.size());
    let mut turned = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            turned.extend_from_slice(&bytes[(row * columns + column) * size..][..size]);
        }
    }
    TensorData::from_bytes(BurnBytes::from_bytes_vec(turned), vec![columns, rows], kind)
}

/// Path of the first matrix that lies by columns.
#[cfg(feature = "learner")]
pub(crate) fn first_by_columns<M: Module>(module: &M) -> Option<String> {
    struct First(Path, Option<String>);
    impl ModuleVisitor for First {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.0.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.0.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if self.1.is_none() && is_turned(param) {
                self.1 = Some(self.0.text());
            }
        }
    }
    let mut first = First(Path::default(), None);
    module.visit(&mut first);
    first.1
}

/// About how many bytes each of a module's float tensors has, in the order of [`paths`].
pub(crate) fn sizes<M: Module>(module: &M) -> Vec<u64> {
    struct Sizes(Vec<u64>);
    impl ModuleVisitor for Sizes {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.lazy_shape().num_elements() as u64 * 4);
        }
    }
    let mut sizes = Sizes(Vec::new());
    module.visit(&mut sizes);
    sizes.0
}

/// Where a traversal is.
#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn text(&self) -> String {
        self.0.join(".")
    }
}

/// Writes a module's tensors by path, its flags and which tensors are trained.
///
/// The module should be [settled](settle) first.
///
/// # Errors
///
/// A tensor of a quantized type; two tensors under one path.
pub fn write<M: Module>(module: &M, out: &mut StateWriter<'_>) -> Result<()> {
    let mut writer = Writer {
        path: Path::default(),
        out,
        trained: Vec::new(),
        flags: Vec::new(),
        result: Ok(()),
    };
    module.visit(&mut writer);
    let Writer {
        out,
        trained,
        flags,
        result,
        ..
    } = writer;
    result?;
    out.value("trained", Value::List(trained))?;
    out.value("flags", Value::Dict(flags))
}

struct Writer<'w, 'a> {
    path: Path,
    out: &'w mut StateWriter<'a>,
    trained: Vec<Value>,
    flags: Vec<(Value, Value)>,
    result: Result<()>,
}

impl Writer<'_, '_> {
    /// `fetch` gives the elements in a range of the tensor laid flat.
    fn tensor(&mut self, dtype: DType, shape: Shape, fetch: impl Fn(Range<usize>) -> TensorData + 'static) {
        if self.result.is_err() {
            return;
        }
        let path = self.path.text();
        self.result = dtype::name(dtype, &path).and_then(|name| {
            let sizes = dtype::sizes(&shape.to_vec());
            let fetch = move |range| Bytes::owned(Raw(fetch(range).into_parts().0));
            self.out.tensor_in_parts(&path, name, dtype.size(), &sizes, fetch)
        });
    }
}

impl ModuleVisitor for Writer<'_, '_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.0.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad() {
            self.trained.push(Value::Str(self.path.text()));
        }
        let tensor = param.transform_for_save().val();
        let (dtype, shape) = (tensor.dtype(), tensor.shape());
        let count = shape.num_elements();
        self.tensor(dtype, shape, move |range| {
            if range.len() == count {
                return tensor.to_data();
            }
            tensor.clone().reshape([count]).slice([range]).into_data()
        });
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.transform_for_save().val();
        let (dtype, shape) = (tensor.dtype(), tensor.shape());
        let count = shape.num_elements();
        self.tensor(dtype, shape, move |range| {
            if range.len() == count {
                return tensor.to_data();
            }
            tensor.clone().reshape([count]).slice([range]).into_data()
        });
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        let tensor = param.transform_for_save().val();
        let (dtype, shape) = (tensor.dtype(), tensor.shape());
        let count = shape.num_elements();
        self.tensor(dtype, shape, move |range| {
            if range.len() == count {
                return tensor.to_data();
            }
            tensor.clone().reshape([count]).slice([range]).into_data()
        });
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.flags
            .push((Value::Str(self.path.text()), Value::Bool(flag.is_enabled())));
    }
}

/// Returns the module with the tensors and flags that [`write`] wrote; parameter ids stay the module's own.
///
/// # Errors
///
/// Paths, shapes or types that are not the module's; all of them are compared before anything is replaced.
pub fn read<M: Module>(module: M, from: &mut StateReader<'_>) -> Result<M> {
    let trained = match from.value("trained")? {
        Value::List(paths) => paths.iter().filter_map(text).collect(),
        _ => BTreeSet::new(),
    };
    let flags = match from.value("flags")? {
        Value::Dict(flags) => flags
            .iter()
            .filter_map(|(path, flag)| Some((text(path)?, matches!(flag, Value::Bool(true)))))
            .collect(),
        _ => HashMap::new(),
    };
    let mut tensors = HashMap::new();
    for name in from.names() {
        tensors.insert(name.to_owned(), dtype::data(from.tensor(name)?, name)?);
    }
    replace(module, tensors, Some((trained, flags)))
}

fn text(value: &Value) -> Option<String> {
    if let Value::Str(text) = value {
        Some(text.clone())
    } else {
        None
    }
}

type Marks = (BTreeSet<String>, HashMap<String, bool>);

/// Returns the module with these tensors, by path: each of its own, and no other.
pub(crate) fn replace<M: Module>(
    module: M,
    tensors: HashMap<String, TensorData>,
    marks: Option<Marks>,
) -> Result<M> {
    // What is pending would be taken over after the statistics were replaced.
    settle(&module);
    let mut check = Check {
        path: Path::default(),
        tensors: &tensors,
        seen: BTreeSet::new(),
        wrong: Vec::new(),
    };
    module.visit(&mut check);
    let Check { seen, mut wrong, .. } = check;
    wrong.extend(
        tensors
            .keys()
            .filter(|path| !seen.contains(*path))
            .map(|path| format!("`{path}` is not in the program")),
    );
    if !wrong.is_empty() {
        wrong.sort();
        return Err(Error::invalid(format!(
            "the module is not the one of the checkpoint: {}",
            wrong.join("; ")
        )));
    }
    Ok(module.map(&mut Replace {
        path: Path::default(),
        tensors,
        marks,
    }))
}

/// Whether Burn keeps this tensor with its dimensions in the other order in records, as it does for linear layers whose
/// layout is by columns.
pub(crate) fn is_turned<const D: usize>(param: &Param<Tensor<D>>) -> bool {
    if D != 2 {
        return false;
    }
    // A parameter does not show what it does on loading; it does it to any tensor.
    let probe = Tensor::zeros(Shape::from(vec![1, 2]), &param.lazy_device().inner());
    let loaded = param.clone().transform_for_load(probe, param.id).val();
    loaded.shape().to_vec() == [2, 1]
}

struct Check<'t> {
    path: Path,
    tensors: &'t HashMap<String, TensorData>,
    seen: BTreeSet<String>,
    wrong: Vec<String>,
}

impl Check<'_> {
    fn tensor(&mut self, shape: Shape) {
        let path = self.path.text();
        match self.tensors.get(&path) {
            None => self.wrong.push(format!("`{path}` is not in the checkpoint")),
            Some(data) if data.shape().to_vec() != shape.to_vec() => {
                let (found, expected) = (data.shape().to_vec(), shape.to_vec());
                self.wrong.push(format!(
                    "`{path}` is {found:?} in the checkpoint and {expected:?} in the program"
                ));
            }
            Some(_) => {}
        }
        self.seen.insert(path);
    }
}

impl ModuleVisitor for Check<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.0.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let mut shape = param.lazy_shape().to_vec();
        // Until it is first touched, such a tensor has the shape that records have.
        if param.is_initialized() && is_turned(param) {
            shape.reverse();
        }
        self.tensor(Shape::from(shape));
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.tensor(param.lazy_shape());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.tensor(param.lazy_shape());
    }
}

struct Replace {
    path: Path,
    tensors: HashMap<String, TensorData>,
    marks: Option<Marks>,
}

impl Replace {
    fn take(&mut self) -> TensorData {
        self.tensors
            .remove(&self.path.text())
            .expect("each of the module's tensors was looked up before")
    }
}

impl ModuleMapper for Replace {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.0.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (device, id, data) = (param.lazy_device(), param.id, self.take());
        let dtype = data.dtype();
        let param = if is_turned(&param) {
            with_data(param, turn(data))
        } else {
            param.transform_for_load(Tensor::from_data(data, (&device, dtype)), id)
        };
        match &self.marks {
            Some((trained, _)) if trained.contains(&self.path.text()) != param.is_require_grad() => {
                let wanted = !param.is_require_grad();
                param.set_require_grad(wanted)
            }
            _ => param,
        }
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let (device, id, data) = (param.lazy_device(), param.id, self.take());
        let dtype = data.dtype();
        param.transform_for_load(Tensor::from_data(data, (&device, dtype)), id)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let (device, id, data) = (param.lazy_device(), param.id, self.take());
        let dtype = data.dtype();
        param.transform_for_load(Tensor::from_data(data, (&device, dtype)), id)
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        let wanted = self
            .marks
            .as_ref()
            .and_then(|(_, flags)| flags.get(&self.path.text()))
            .copied();
        match wanted {
            Some(wanted) => flag.with_value(wanted),
            None => flag,
        }
    }
}

/// Path of each float parameter by its id, in the module's order.
pub(crate) fn paths<M: Module>(module: &M) -> Vec<(ParamId, String)> {
    struct Paths(Path, Vec<(ParamId, String)>);
    impl ModuleVisitor for Paths {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.0.0.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.0.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push((param.id, self.0.text()));
        }
    }
    let mut paths = Paths(Path::default(), Vec::new());
    module.visit(&mut paths);
    paths.1
}
