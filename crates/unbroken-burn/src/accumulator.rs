//! Gradients that wait for the next update, to and from state by parameter path.
//!
//! Touches: the accumulator, which is emptied and filled again with the same tensors.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;
use unbroken::train::{Bytes, StateReader, StateWriter};
use unbroken::{Error, Result};

use crate::dtype::{self, Raw};

/// Writes what has been accumulated for this module.
///
/// # Errors
///
/// A gradient of a type that checkpoints do not have.
pub fn write<M: Module>(
    accumulator: &mut GradientsAccumulator<M>,
    module: &M,
    out: &mut StateWriter<'_>,
) -> Result<()> {
    // An accumulator gives its gradients away only whole; an empty one takes them back as they are.
    let gradients = accumulator.grads();
    let mut writer = Writer {
        path: Vec::new(),
        gradients: &gradients,
        out,
        result: Ok(()),
    };
    module.visit(&mut writer);
    let result = writer.result;
    accumulator.accumulate(module, gradients);
    result
}

struct Writer<'w, 'a> {
    path: Vec<String>,
    gradients: &'w GradientsParams,
    out: &'w mut StateWriter<'a>,
    result: Result<()>,
}

impl ModuleVisitor for Writer<'_, '_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.result.is_err() {
            return;
        }
        let Some(gradient) = self.gradients.get::<D>(param.id) else {
            return;
        };
        let path = self.path.join(".");
        let (kind, sizes) = (gradient.dtype(), dtype::sizes(&gradient.shape().to_vec()));
        self.result = dtype::name(kind, &path).and_then(|name| {
            let fetch = move || Bytes::owned(Raw(gradient.into_data().into_parts().0));
            self.out.tensor_with(&path, name, kind.size(), &sizes, fetch)
        });
    }
}

/// Puts back what [`write`] wrote into an accumulator that is empty.
///
/// # Errors
///
/// A gradient of a parameter that the module does not have.
pub fn read<M: Module>(
    accumulator: &mut GradientsAccumulator<M>,
    module: &M,
    from: &mut StateReader<'_>,
) -> Result<()> {
    let mut reader = Reader {
        path: Vec::new(),
        gradients: GradientsParams::new(),
        from,
        result: Ok(()),
    };
    module.visit(&mut reader);
    let Reader {
        gradients, result, ..
    } = reader;
    result?;
    accumulator.accumulate(module, gradients);
    Ok(())
}

struct Reader<'w, 'c> {
    path: Vec<String>,
    gradients: GradientsParams,
    from: &'w mut StateReader<'c>,
    result: Result<()>,
}

impl Reader<'_, '_> {
    fn gradient<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Result<()> {
        let path = self.path.join(".");
        if !self.from.names().contains(&path.as_str()) {
            return Ok(());
        }
        let data = dtype::data(self.from.tensor(&path)?, &path)?;
        if data.shape().to_vec() != param.lazy_shape().to_vec() {
            return Err(Error::invalid(format!(
                "the gradient of `{path}` has another shape in the checkpoint"
            )));
        }
        let dtype = data.dtype();
        let gradient = Tensor::<D>::from_data(data, (&param.lazy_device().inner(), dtype));
        self.gradients.register(param.id, gradient);
        Ok(())
    }
}

impl ModuleVisitor for Reader<'_, '_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.result.is_ok() {
            self.result = self.gradient(param);
        }
    }
}
