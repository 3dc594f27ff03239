//! Modules to and from state, by path: `conv1.weight`, `norm1.running_mean`.
//!
//! Touches: the module's tensors, read only on the way out.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId, Parameter};
use burn::tensor::kind::Basic;
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

/// Where a traversal is: the names of the modules that were entered, `.` between them.
#[derive(Default)]
struct Path {
    text: String,
    /// How long the text was before each name.
    lengths: Vec<usize>,
}

impl Path {
    fn enter(&mut self, name: &str) {
        self.lengths.push(self.text.len());
        if !self.text.is_empty() {
            self.text.push('.');
        }
        self.text.push_str(name);
    }

    fn leave(&mut self) {
        let length = self.lengths.pop().expect("what is left was entered");
        self.text.truncate(length);
    }

    fn text(&self) -> String {
        self.text.clone()
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
    write_asked(module, &[], out).map(drop)
}

/// What a module's tensors were when it was last written whole: from then on only those are touched that a step's record
/// digests.
#[derive(Debug, Default)]
pub struct Known(Vec<Size>);

/// One tensor.
#[derive(Debug)]
struct Size {
    id: ParamId,
    /// As the module holds it.
    dtype: DType,
    elements: usize,
    trained: bool,
    /// As it is written.
    bytes: u64,
}

impl Known {
    /// Writes a module like [`write`], [settled](settle) as far as that can be seen in what is written.
    ///
    /// # Errors
    ///
    /// As [`write`].
    pub fn write<M: Module>(&mut self, module: &M, out: &mut StateWriter<'_>) -> Result<()> {
        if out.asks_for_values() || self.0.is_empty() {
            settle(module);
            self.0 = write_asked(module, &[], out)?.0;
            return Ok(());
        }
        let mut before = 0;
        let is_stale = self.0.iter().any(|size| {
            let skipped = before;
            before += size.bytes;
            !size.trained && out.asks_for(skipped, size.bytes)
        });
        if is_stale {
            settle(module);
        }
        let (_, fits) = write_asked(module, &self.0, out)?;
        if !fits {
            self.0.clear();
            out.start_over();
        }
        Ok(())
    }
}

impl Size {
    fn of(id: ParamId, dtype: DType, shape: Shape, trained: bool) -> Size {
        Size {
            id,
            dtype,
            elements: shape.num_elements(),
            trained,
            bytes: 0,
        }
    }

    /// Whether a tensor is the one that was seen before.
    fn fits<const D: usize, K: Basic>(&self, param: &Param<Tensor<D, K>>) -> bool
    where
        Tensor<D, K>: Parameter,
    {
        self.id == param.id
            && param.is_initialized()
            && self.dtype == param.dtype()
            && self.elements == param.shape().num_elements()
    }
}

/// Writes what a boundary asks for of a module whose tensors are known, or all of it where none is; returns what was
/// found of those that were written, and whether the others are what they are known to be.
fn write_asked<M: Module>(
    module: &M,
    known: &[Size],
    out: &mut StateWriter<'_>,
) -> Result<(Vec<Size>, bool)> {
    let mut writer = Writer {
        path: Path::default(),
        known: (!known.is_empty()).then(|| known.iter()),
        fits: true,
        out,
        found: Vec::new(),
        trained: Vec::new(),
        flags: Vec::new(),
        result: Ok(()),
    };
    module.visit(&mut writer);
    let Writer {
        known,
        fits,
        out,
        found,
        trained,
        flags,
        result,
        ..
    } = writer;
    result?;
    out.value("trained", Value::List(trained))?;
    out.value("flags", Value::dict(flags))?;
    Ok((found, fits && known.is_none_or(|mut left| left.next().is_none())))
}

struct Writer<'w, 'a> {
    path: Path,
    /// The tensors that are known and still to come.
    known: Option<std::slice::Iter<'w, Size>>,
    fits: bool,
    out: &'w mut StateWriter<'a>,
    found: Vec<Size>,
    trained: Vec<Value>,
    flags: Vec<(Value, Value)>,
    result: Result<()>,
}

impl Writer<'_, '_> {
    /// Whether there is nothing to write of the next tensor.
    fn passes<const D: usize, K: Basic>(&mut self, param: &Param<Tensor<D, K>>) -> bool
    where
        Tensor<D, K>: Parameter,
    {
        if self.result.is_err() || !self.fits {
            return true;
        }
        let Some(known) = &mut self.known else {
            return false;
        };
        match known.next().filter(|size| size.fits(param)) {
            Some(size) => self.out.passes(size.bytes),
            None => {
                self.fits = false;
                true
            }
        }
    }

    /// `fetch` gives the elements in a range of the tensor laid flat.
    fn tensor(
        &mut self,
        (dtype, shape): (DType, Shape),
        found: Size,
        fetch: impl Fn(Range<usize>) -> TensorData + 'static,
    ) {
        let path = &self.path.text;
        self.result = dtype::name(dtype, path).and_then(|name| {
            let sizes = dtype::sizes(&shape.to_vec());
            let fetch = move |range| Bytes::owned(Raw(fetch(range).into_parts().0));
            self.out.tensor_in_parts(path, name, dtype.size(), &sizes, fetch)
        });
        let bytes = (shape.num_elements() * dtype.size()) as u64;
        self.found.push(Size { bytes, ..found });
    }
}

/// Elements of a tensor in a range of it laid flat.
fn elements<const D: usize, K: Basic>(tensor: &Tensor<D, K>, range: Range<usize>) -> TensorData {
    let count = tensor.shape().num_elements();
    if range.len() == count {
        return tensor.to_data();
    }
    tensor.clone().reshape([count]).slice([range]).into_data()
}

impl ModuleVisitor for Writer<'_, '_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.leave();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.passes(param) {
            return;
        }
        let trained = param.is_require_grad();
        if trained && self.out.asks_for_values() {
            self.trained.push(Value::Str(self.path.text()));
        }
        let found = Size::of(param.id, param.dtype(), param.shape(), trained);
        let tensor = param.transform_for_save().val().without_autodiff();
        self.tensor((tensor.dtype(), tensor.shape()), found, move |range| {
            elements(&tensor, range)
        });
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        if self.passes(param) {
            return;
        }
        let found = Size::of(param.id, param.dtype(), param.shape(), false);
        let tensor = param.transform_for_save().val();
        self.tensor((tensor.dtype(), tensor.shape()), found, move |range| {
            elements(&tensor, range)
        });
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        if self.passes(param) {
            return;
        }
        let found = Size::of(param.id, param.dtype(), param.shape(), false);
        let tensor = param.transform_for_save().val();
        self.tensor((tensor.dtype(), tensor.shape()), found, move |range| {
            elements(&tensor, range)
        });
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        if self.out.asks_for_values() {
            self.flags
                .push((Value::Str(self.path.text()), Value::Bool(flag.is_enabled())));
        }
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
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.leave();
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
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.leave();
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
            self.0.enter(name);
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.0.leave();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push((param.id, self.0.text()));
        }
    }
    let mut paths = Paths(Path::default(), Vec::new());
    module.visit(&mut paths);
    paths.1
}
