//! What a loop of one's own trains: module, optimizer, scheduler and accumulated gradients, as one piece of state.
//!
//! Touches: nothing but what it holds.

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::Gradients;
use unbroken::Result;
use unbroken::train::{StateReader, StateWriter, Stateful};

use crate::{accumulator, module, optimizer, scheduler};

/// A module with everything that its training needs.
pub struct Trained<M: Module> {
    /// The module.
    pub model: M,
    /// Its optimizer.
    pub optimizer: ModuleOptimizer,
    /// Its learning rate.
    pub scheduler: ModuleLrScheduler,
    accumulator: GradientsAccumulator<M>,
    accumulated: u64,
    accumulation: u64,
    /// Whether the module lies in memory as a resume would lay it.
    laid_out: bool,
}

impl<M: Module> Trained<M> {
    /// Trains a module; a plain number is a constant learning rate.
    pub fn new(model: M, optimizer: ModuleOptimizer, scheduler: impl Into<ModuleLrScheduler>) -> Trained<M> {
        Trained {
            model,
            optimizer,
            scheduler: scheduler.into(),
            accumulator: GradientsAccumulator::new(),
            accumulated: 0,
            accumulation: 1,
            laid_out: false,
        }
    }

    /// Sums the gradients of this many steps for each update.
    pub fn accumulating(self, steps: u64) -> Trained<M> {
        Trained {
            accumulation: steps.max(1),
            ..self
        }
    }

    /// Takes a step's gradients; every so many steps, updates the module. Returns the learning rate of the update.
    pub fn step(&mut self, gradients: Gradients) -> Option<f64> {
        let mut gradients = GradientsParams::from_grads(gradients, &self.model);
        if self.accumulation > 1 {
            self.accumulator.accumulate(&self.model, gradients);
            self.accumulated += 1;
            if self.accumulated < self.accumulation {
                return None;
            }
            self.accumulated = 0;
            gradients = self.accumulator.grads();
        }
        let rate = self.scheduler.step();
        let base = rate.base();
        self.model = self.optimizer.step(rate, self.model.clone(), gradients);
        Some(base)
    }
}

impl<M: Module> Stateful for Trained<M> {
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        if !std::mem::replace(&mut self.laid_out, true) {
            self.model = module::lay_out(self.model.clone());
        }
        module::settle(&self.model);
        out.scope("model", |out| module::write(&self.model, out))?;
        out.costly(
            "optimizer",
            2 * module::sizes(&self.model).iter().sum::<u64>(),
            |out| optimizer::write(&self.optimizer, &self.model, out),
        )?;
        out.costly("scheduler", 0, |out| scheduler::write(&self.scheduler, out))?;
        out.scope("gradients", |out| match self.accumulated {
            0 => Ok(()),
            _ => accumulator::write(&mut self.accumulator, &self.model, out),
        })?;
        out.value("accumulated", self.accumulated)
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
        self.model = from.scope("model", |from| module::read(self.model.clone(), from))?;
        self.laid_out = true;
        self.optimizer = from.scope("optimizer", |from| {
            optimizer::read(self.optimizer.clone(), &self.model, from)
        })?;
        self.scheduler = from.scope("scheduler", |from| scheduler::read(self.scheduler.clone(), from))?;
        self.accumulator = GradientsAccumulator::new();
        from.scope("gradients", |from| {
            accumulator::read(&mut self.accumulator, &self.model, from)
        })?;
        self.accumulated = from.int("accumulated")?.unsigned_abs();
        Ok(())
    }
}
