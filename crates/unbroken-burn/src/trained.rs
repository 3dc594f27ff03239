//! What a loop of one's own trains: module, optimizer, scheduler and accumulated gradients, as one piece of state.
//!
//! Touches: nothing but what it holds.

use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler};
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
    known: module::Known,
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
            known: module::Known::default(),
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
        let gradients = GradientsParams::from_grads(gradients, &self.model);
        let gradients = self.gather(gradients, false)?;
        let rate = self.update(gradients, |model, optimizer, rate, gradients| {
            optimizer.step(rate, model, gradients)
        });
        Some(rate)
    }

    /// Takes a step's gradients; every so many steps, and at the last one, returns what an update is made from.
    pub(crate) fn gather(&mut self, gradients: GradientsParams, last: bool) -> Option<GradientsParams> {
        if self.accumulation == 1 {
            return Some(gradients);
        }
        self.accumulator.accumulate(&self.model, gradients);
        self.accumulated += 1;
        if self.accumulated < self.accumulation && !last {
            return None;
        }
        self.accumulated = 0;
        Some(self.accumulator.grads())
    }

    /// Updates the module; returns the learning rate.
    pub(crate) fn update(
        &mut self,
        gradients: GradientsParams,
        optimize: impl FnOnce(M, &mut ModuleOptimizer, ModuleLearningRate, GradientsParams) -> M,
    ) -> f64 {
        let rate = self.scheduler.step();
        let base = rate.base();
        self.model = optimize(self.model.clone(), &mut self.optimizer, rate, gradients);
        base
    }

    /// Forgets the gradients that wait for the next update.
    #[cfg(feature = "learner")]
    pub(crate) fn forget_gradients(&mut self) {
        self.accumulator = GradientsAccumulator::new();
        self.accumulated = 0;
    }
}

impl<M: Module> Stateful for Trained<M> {
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        if !std::mem::replace(&mut self.laid_out, true) {
            self.model = module::lay_out(self.model.clone());
        }
        let Trained { model, known, .. } = &mut *self;
        out.scope("model", |out| known.write(model, out))?;
        out.costly(
            "optimizer",
            || 2 * module::sizes(&self.model).iter().sum::<u64>(),
            |out| optimizer::write(&self.optimizer, &self.model, out),
        )?;
        out.costly("scheduler", || 0, |out| scheduler::write(&self.scheduler, out))?;
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
