//! Burn's own training loop, exact in mid-epoch: a learning strategy for `SupervisedTraining`.
//!
//! Touches: the run directory; Burn's metric files of the current epoch, which Burn writes anew when the metrics of an
//! interrupted epoch are fed again.
//!
//! Steps, updates and events are those of Burn's strategy for one device, in its order. Burn's Learner shows neither its
//! optimizer nor its scheduler, so it is made here ([`Exact::learner`]) and both are kept. A metric's state cannot be
//! read, so what the metrics were given in this epoch is state, and is given to them again.

use std::sync::{Arc, Mutex, MutexGuard};

use burn::data::dataloader::Progress;
use burn::data::dataset::DatasetError;
use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Int, Tensor};
use burn::train::{
    ClassificationOutput, EventProcessorTraining, InferenceStep, Learner, LearnerEvent, LearnerModel,
    RegressionOutput, SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainStep,
    TrainingComponents, TrainingItem, TrainingStrategy, ValidLoader,
};
use unbroken::train::{Bytes, Loader, Options, StateReader, StateWriter, Stateful};
use unbroken::{Error, Result};

use crate::dtype::{self, Raw};
use crate::{DeviceGenerator, Trained};

/// What a step's output is taken to cost when the state is read.
const PAGE: u64 = 4096;

/// What a training step gives to the metrics, kept until its epoch is over.
pub trait Output: Sized {
    /// The same without what belongs to the backward pass.
    fn kept(&self) -> Self;

    /// Numbers of the step for the journal, such as its loss: the first that differs between two runs is named.
    fn numbers(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }

    /// Writes it.
    ///
    /// # Errors
    ///
    /// A name written twice.
    fn write(&self, out: &mut StateWriter<'_>) -> Result<()>;

    /// Takes back what [`Output::write`] wrote.
    ///
    /// # Errors
    ///
    /// What is not in the checkpoint.
    fn read(from: &mut StateReader<'_>, device: &Device) -> Result<Self>;
}

/// Writes a tensor of floats.
///
/// # Errors
///
/// A name written twice.
pub fn write_tensor<const D: usize>(name: &str, tensor: &Tensor<D>, out: &mut StateWriter<'_>) -> Result<()> {
    let (tensor, kind, sizes) = (
        tensor.clone(),
        tensor.dtype(),
        dtype::sizes(&tensor.shape().to_vec()),
    );
    let fetch = move || Bytes::owned(Raw(tensor.into_data().into_parts().0));
    out.tensor_with(name, dtype::name(kind, name)?, kind.size(), &sizes, fetch)
}

/// Takes back a tensor of floats.
///
/// # Errors
///
/// What is not in the checkpoint.
pub fn read_tensor<const D: usize>(
    name: &str,
    from: &mut StateReader<'_>,
    device: &Device,
) -> Result<Tensor<D>> {
    let data = dtype::data(from.tensor(name)?, name)?;
    let kind = data.dtype();
    Ok(Tensor::from_data(data, (device, kind)))
}

/// The loss of a step, whatever its type.
fn loss_of(loss: &Tensor<1>) -> Vec<(&'static str, f64)> {
    let number = loss.to_data().iter::<f64>().next();
    number.map(|number| ("loss", number)).into_iter().collect()
}

impl Output for ClassificationOutput {
    fn kept(&self) -> Self {
        ClassificationOutput::new(
            self.loss.clone().without_autodiff(),
            self.output.clone().without_autodiff(),
            self.targets.clone().without_autodiff(),
        )
    }

    fn numbers(&self) -> Vec<(&'static str, f64)> {
        loss_of(&self.loss)
    }

    fn write(&self, out: &mut StateWriter<'_>) -> Result<()> {
        write_tensor("loss", &self.loss, out)?;
        write_tensor("output", &self.output, out)?;
        let (targets, kind) = (self.targets.clone(), self.targets.dtype());
        let sizes = dtype::sizes(&targets.shape().to_vec());
        let fetch = move || Bytes::owned(Raw(targets.into_data().into_parts().0));
        out.tensor_with(
            "targets",
            dtype::name(kind, "targets")?,
            kind.size(),
            &sizes,
            fetch,
        )
    }

    fn read(from: &mut StateReader<'_>, device: &Device) -> Result<Self> {
        let (loss, output) = (
            read_tensor("loss", from, device)?,
            read_tensor("output", from, device)?,
        );
        let data = dtype::data(from.tensor("targets")?, "targets")?;
        let kind = data.dtype();
        Ok(ClassificationOutput::new(
            loss,
            output,
            Tensor::<1, Int>::from_data(data, (device, kind)),
        ))
    }
}

impl Output for RegressionOutput {
    fn kept(&self) -> Self {
        RegressionOutput::new(
            self.loss.clone().without_autodiff(),
            self.output.clone().without_autodiff(),
            self.targets.clone().without_autodiff(),
        )
    }

    fn numbers(&self) -> Vec<(&'static str, f64)> {
        loss_of(&self.loss)
    }

    fn write(&self, out: &mut StateWriter<'_>) -> Result<()> {
        write_tensor("loss", &self.loss, out)?;
        write_tensor("output", &self.output, out)?;
        write_tensor("targets", &self.targets, out)
    }

    fn read(from: &mut StateReader<'_>, device: &Device) -> Result<Self> {
        Ok(RegressionOutput::new(
            read_tensor("loss", from, device)?,
            read_tensor("output", from, device)?,
            read_tensor("targets", from, device)?,
        ))
    }
}

/// Burn's loop for one device, exact: `with_training_strategy(exact.strategy())`, then `launch(exact.learner(...))`.
///
/// The loader given here is the one that is trained on; the training loader that `SupervisedTraining::new` asks for is
/// not read. Burn's own checkpointers have nothing to do and should be left off.
pub struct Exact<M: LearnerModel> {
    shared: Arc<Shared<M>>,
}

struct Shared<M: LearnerModel> {
    device: Device,
    start: Mutex<Option<(Options, Loader<<M as TrainStep>::Input>)>>,
    /// What the Learner was made with, as new.
    kept: Mutex<Option<(ModuleOptimizer, ModuleLrScheduler)>>,
    result: Mutex<Result<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl<M: LearnerModel> Exact<M>
where
    <M as TrainStep>::Output: Output,
{
    /// A run with these options, on this device, over this loader. The number of epochs is `SupervisedTraining`'s.
    pub fn new(options: Options, device: &Device, loader: Loader<<M as TrainStep>::Input>) -> Exact<M> {
        let device = if device.is_autodiff() {
            device.clone()
        } else {
            device.clone().autodiff()
        };
        let options = options.generator("device", DeviceGenerator::new(&device));
        Exact {
            shared: Arc::new(Shared {
                device,
                start: Mutex::new(Some((options, loader))),
                kept: Mutex::new(None),
                result: Mutex::new(Ok(())),
            }),
        }
    }

    /// For `SupervisedTraining::with_training_strategy`.
    pub fn strategy(&self) -> TrainingStrategy<M> {
        TrainingStrategy::Custom(Arc::new(Strategy(Arc::clone(&self.shared))))
    }

    /// For `SupervisedTraining::launch`: what `Learner::new` makes, of an optimizer and a scheduler that the strategy
    /// trains with.
    pub fn learner(
        &self,
        model: M,
        optimizer: ModuleOptimizer,
        scheduler: impl Into<ModuleLrScheduler>,
    ) -> Learner<M> {
        let scheduler = scheduler.into();
        *lock(&self.shared.kept) = Some((optimizer.clone(), scheduler.clone()));
        Learner::new(model, optimizer, scheduler)
    }

    /// How the run ended, once `launch` has returned: [`Error::Stopped`] after a stop request, for one.
    ///
    /// # Errors
    ///
    /// Whatever ended the run.
    pub fn result(&self) -> Result<()> {
        std::mem::replace(&mut *lock(&self.shared.result), Ok(()))
    }
}

struct Strategy<M: LearnerModel>(Arc<Shared<M>>);

impl<M: LearnerModel> SupervisedLearningStrategy<M> for Strategy<M>
where
    <M as TrainStep>::Output: Output,
{
    fn fit(
        &self,
        mut components: TrainingComponents<M>,
        learner: Learner<M>,
        _loader: TrainLoader<M>,
        valid: ValidLoader<M>,
        _starting_epoch: usize,
    ) -> (M, SupervisedTrainingEventProcessor<M>) {
        let shared = &self.0;
        let model = learner.model().fork(&shared.device);
        drop(learner); // It would hold the first weights for as long as the training takes.
        let (model, result) = match shared.begin(&components) {
            Err(error) => (model, Err(error)),
            Ok(start) => {
                let accumulation = components.grad_accumulation.unwrap_or(1) as u64;
                let trained = Trained::new(model, start.optimizer, start.scheduler);
                let mut state = State {
                    trained: trained.accumulating(accumulation),
                    device: shared.device.clone(),
                    rate: 0.0,
                    outputs: Vec::new(),
                };
                let valid = valid.to_device(&shared.device.clone().inner());
                let result = fit(&mut components, &mut state, start.options, start.loader, &valid);
                (state.trained.model, result)
            }
        };
        match &result {
            Ok(()) => {}
            Err(Error::Stopped { reason, .. }) => components.interrupter.stop(Some(reason)),
            Err(error) => components
                .interrupter
                .fail(DatasetError::new(Error::invalid(error.to_string()))),
        }
        *lock(&shared.result) = result;
        (model, components.event_processor)
    }
}

/// What a launch begins with.
struct Start<M: LearnerModel> {
    options: Options,
    loader: Loader<<M as TrainStep>::Input>,
    optimizer: ModuleOptimizer,
    scheduler: ModuleLrScheduler,
}

impl<M: LearnerModel> Shared<M> {
    fn begin(&self, components: &TrainingComponents<M>) -> Result<Start<M>> {
        if components.checkpoint.is_some() {
            return Err(Error::Unsupported {
                what: "a start from one of Burn's own checkpoints".to_owned(),
            });
        }
        let (optimizer, scheduler) = lock(&self.kept).take().ok_or_else(|| {
            Error::invalid("the strategy knows no optimizer: launch with `exact.learner(...)`")
        })?;
        let (options, loader) = lock(&self.start)
            .take()
            .ok_or_else(|| Error::invalid("a strategy is launched once"))?;
        Ok(Start {
            options: options.epochs(components.num_epochs as u64),
            loader,
            optimizer,
            scheduler,
        })
    }
}

/// One life under Burn's Learner.
fn fit<M: LearnerModel>(
    components: &mut TrainingComponents<M>,
    state: &mut State<M>,
    options: Options,
    mut loader: Loader<<M as TrainStep>::Input>,
    valid: &ValidLoader<M>,
) -> Result<()>
where
    <M as TrainStep>::Output: Output,
{
    let interrupter = components.interrupter.clone();
    let (samples, batch) = (loader.samples() as usize, loader.batch_size() as usize);
    let progress =
        |done: usize| Progress::new((done * batch).min(samples), samples, Some("items".to_owned()));
    let mut training = options.start(state)?;
    if let Some(stopping) = &mut components.early_stopping {
        // Its memory is a function of the metrics' files, which are there for the epochs that are done.
        for epoch in 1..=training.epoch() as usize {
            stopping.should_stop(epoch, &components.event_store);
        }
    }
    while let Some(epoch) = training.next_epoch(state)? {
        let epoch = epoch as usize + 1;
        let processor = &mut components.event_processor;
        let start = LearnerEvent::StartSplit {
            epoch_number: epoch,
            total_items: samples,
        };
        interrupter.fail_on_error(processor.process_train(start));
        for (done, (output, rate)) in state.outputs.iter().enumerate() {
            let rate = Some(ModuleLearningRate::from(*rate));
            let item = TrainingItem::new(output.kept(), progress(done + 1), Some(done + 1), rate);
            interrupter.fail_on_error(processor.process_train(LearnerEvent::ProcessedItem(item)));
        }
        while let Some(mut step) = training.next_step(&mut loader)? {
            let output = TrainStep::step(&state.trained.model, step.take());
            let done = step.position() as usize + 1;
            let progress = progress(done);
            if let Some(gradients) = state.trained.gather(output.grads, progress.is_completed()) {
                state.update(gradients);
            }
            let kept = output.item.kept();
            let numbers = kept.numbers().into_iter().chain([("rate", state.rate)]);
            numbers.for_each(|(name, number)| step.log(name, number));
            state.outputs.push((kept, state.rate));
            step.commit(state)?;
            let rate = Some(ModuleLearningRate::from(state.rate));
            let item = TrainingItem::new(output.item, progress, Some(done), rate);
            interrupter.fail_on_error(processor.process_train(LearnerEvent::ProcessedItem(item)));
            if interrupter.should_stop() {
                // What is not saved is done again by the next life.
                return Ok(());
            }
        }
        interrupter.fail_on_error(processor.process_train(LearnerEvent::EndSplit(epoch)));
        state.outputs.clear();
        state.trained.forget_gradients();
        validate(&state.trained.model, processor, valid, epoch, &interrupter);
        interrupter.fail_on_error(processor.process_train(LearnerEvent::EndEpoch(epoch)));
        if interrupter.should_stop() {
            return Ok(());
        }
        if let Some(stopping) = &mut components.early_stopping {
            interrupter.fail_on_error(processor.flush());
            if stopping.should_stop(epoch, &components.event_store) {
                return training.finish(state);
            }
        }
    }
    Ok(())
}

fn validate<M: LearnerModel>(
    model: &M,
    processor: &mut SupervisedTrainingEventProcessor<M>,
    valid: &ValidLoader<M>,
    epoch: usize,
    interrupter: &burn::train::Interrupter,
) {
    let start = LearnerEvent::StartSplit {
        epoch_number: epoch,
        total_items: valid.num_items(),
    };
    interrupter.fail_on_error(processor.process_valid(start));
    let model = model.valid();
    let mut batches = valid.iter();
    let mut iteration = 0;
    while let Some(batch) = batches.next() {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => {
                interrupter.fail(error);
                break;
            }
        };
        iteration += 1;
        let item = TrainingItem::new(
            InferenceStep::step(&model, batch),
            batches.progress(),
            Some(iteration),
            None,
        );
        interrupter.fail_on_error(processor.process_valid(LearnerEvent::ProcessedItem(item)));
        if interrupter.should_stop() {
            break;
        }
    }
    interrupter.fail_on_error(processor.process_valid(LearnerEvent::EndSplit(epoch)));
}

/// Everything of a Learner's training that comes back.
struct State<M: LearnerModel> {
    trained: Trained<M>,
    device: Device,
    /// Learning rate of the last update.
    rate: f64,
    /// What the metrics were given in this epoch, and the learning rate that they were told.
    outputs: Vec<(<M as TrainStep>::Output, f64)>,
}

impl<M: LearnerModel> State<M> {
    fn update(&mut self, gradients: GradientsParams) {
        self.rate = self
            .trained
            .update(gradients, |model, optimizer, rate, gradients| {
                model.optimize(optimizer, rate, gradients)
            });
    }
}

impl<M: LearnerModel> Stateful for State<M>
where
    <M as TrainStep>::Output: Output,
{
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        let State {
            trained,
            outputs,
            rate,
            ..
        } = self;
        trained.state(out)?;
        out.costly(
            "metrics",
            || outputs.len() as u64 * PAGE,
            |out| {
                for (place, (output, rate)) in outputs.iter().enumerate() {
                    out.scope(&place.to_string(), |out| {
                        output.write(out)?;
                        out.value("rate", *rate)
                    })?;
                }
                Ok(())
            },
        )?;
        out.value("rate", *rate)
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
        self.trained.restore(from)?;
        let device = self.device.clone().inner();
        self.outputs = from.scope("metrics", |from| {
            let read = |name: &str, from: &mut StateReader<'_>| {
                from.scope(name, |from| {
                    Ok((Output::read(from, &device)?, from.float("rate")?))
                })
            };
            from.names()
                .into_iter()
                .map(|name| read(name, from))
                .collect::<Result<_>>()
        })?;
        self.rate = from.float("rate")?;
        Ok(())
    }
}
