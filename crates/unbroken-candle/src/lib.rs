//! Exact resume for candle, as an example: variables by name, and an AdamW whose moments can be saved.
//!
//! Touches: nothing but what it holds. candle's own optimizer keeps its moments to itself, and its CPU generator cannot
//! be seeded: first weights and whatever else is random come from [`Draws`], never from candle.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use unbroken::train::{Bytes, Draws, StateReader, StateWriter, Stateful};
use unbroken::{Error, Result};

/// An error of candle as one of the run's.
pub fn failed(error: candle_core::Error) -> Error {
    Error::invalid(format!("candle: {error}"))
}

/// A variable, its name and its optimizer's moments.
struct Parameter {
    name: String,
    value: Var,
    first: Tensor,
    second: Tensor,
}

/// Variables and their AdamW: the arithmetic of `candle-nn`, its state in the open.
pub struct AdamW {
    /// Learning rate.
    pub rate: f64,
    /// Decay of weights, relative to the learning rate.
    pub decay: f64,
    parameters: Vec<Parameter>,
    step: u64,
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

impl AdamW {
    /// No variables yet.
    pub fn new(rate: f64, decay: f64) -> AdamW {
        AdamW {
            rate,
            decay,
            parameters: Vec::new(),
            step: 0,
        }
    }

    /// Makes a variable of uniform numbers within the bound.
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn variable(&mut self, name: &str, shape: &[usize], bound: f64, draws: &mut Draws) -> Result<Var> {
        let count = shape.iter().product();
        let numbers: Vec<f32> = (0..count)
            .map(|_| ((draws.uniform() * 2.0 - 1.0) * bound) as f32)
            .collect();
        let make = || {
            let value = Var::from_vec(numbers, shape, &Device::Cpu)?;
            let (first, second) = (value.zeros_like()?, value.zeros_like()?);
            self.parameters.push(Parameter {
                name: name.to_owned(),
                value: value.clone(),
                first,
                second,
            });
            Ok(value)
        };
        make().map_err(failed)
    }

    /// One update.
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn update(&mut self, gradients: &GradStore) -> Result<()> {
        self.try_update(gradients).map_err(failed)
    }

    fn try_update(&mut self, gradients: &GradStore) -> candle_core::Result<()> {
        self.step += 1;
        let first_scale = 1.0 / (1.0 - BETA1.powi(self.step as i32));
        let second_scale = 1.0 / (1.0 - BETA2.powi(self.step as i32));
        for parameter in &mut self.parameters {
            let Some(gradient) = gradients.get(&parameter.value) else {
                continue;
            };
            let first = ((&parameter.first * BETA1)? + (gradient * (1.0 - BETA1))?)?;
            let second = ((&parameter.second * BETA2)? + (gradient.sqr()? * (1.0 - BETA2))?)?;
            let kept = (parameter.value.as_tensor() * (1.0 - self.rate * self.decay))?;
            let change = ((&first * first_scale)? / ((&second * second_scale)?.sqrt()? + EPSILON)?)?;
            parameter.value.set(&(kept - (change * self.rate)?)?)?;
            // Moments must not remember the graph that they came from.
            (parameter.first, parameter.second) = (first.detach(), second.detach());
        }
        Ok(())
    }
}

fn write(name: &str, tensor: &Tensor, out: &mut StateWriter<'_>) -> Result<()> {
    let shape: Vec<u64> = tensor.dims().iter().map(|size| *size as u64).collect();
    let numbers: Vec<f32> = tensor
        .flatten_all()
        .and_then(|flat| flat.to_vec1())
        .map_err(failed)?;
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    out.tensor_with(name, "float32", 4, &shape, || Bytes::owned(bytes))
}

fn read(name: &str, like: &Tensor, from: &mut StateReader<'_>) -> Result<Tensor> {
    let shape: Vec<u64> = like.dims().iter().map(|size| *size as u64).collect();
    let mut numbers = vec![0.0f32; like.elem_count()];
    from.tensor_into(name, &shape, &mut numbers)?;
    Tensor::from_vec(numbers, like.dims(), &Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(DType::F32))
        .map_err(failed)
}

impl Stateful for AdamW {
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        let parameters = &self.parameters;
        out.scope("model", |out| {
            parameters
                .iter()
                .try_for_each(|p| write(&p.name, p.value.as_tensor(), out))
        })?;
        let numbers: usize = parameters.iter().map(|p| p.first.elem_count()).sum();
        out.costly(
            "optimizer",
            || 2 * 4 * numbers as u64,
            |out| {
                parameters.iter().try_for_each(|p| {
                    write(&format!("{}.first", p.name), &p.first, out)?;
                    write(&format!("{}.second", p.name), &p.second, out)
                })
            },
        )?;
        out.value("step", self.step)
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
        from.scope("model", |from| {
            self.parameters.iter().try_for_each(|p| {
                let value = read(&p.name, p.value.as_tensor(), from)?;
                p.value.set(&value).map_err(failed)
            })
        })?;
        from.scope("optimizer", |from| {
            self.parameters.iter_mut().try_for_each(|p| {
                p.first = read(&format!("{}.first", p.name), &p.first, from)?;
                p.second = read(&format!("{}.second", p.name), &p.second, from)?;
                Ok(())
            })
        })?;
        self.step = from.int("step")?.unsigned_abs();
        Ok(())
    }
}
