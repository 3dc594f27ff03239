//! Burn's own training loop, exact in mid-epoch: a learning strategy for `SupervisedTraining`.
//!
//! Touches: the run directory; Burn's metric files of the current epoch, which Burn writes anew when the metrics of an
//! interrupted epoch are fed again.
//!
//! Steps, updates and events are those of Burn's strategy for one device, in its order. Burn's Learner shows neither its
//! optimizer nor its scheduler; both are had through the checkpointing seam that it offers. A metric's state cannot be
//! read, so what the metrics were given in this epoch is state, and is given to them again.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::data::dataloader::Progress;
use burn::data::dataset::DatasetError;
use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::{GradientsAccumulator, OptimizerRecord};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Int, Tensor};
use burn::train::checkpoint::{
    AsyncCheckpointer, Checkpoint, Checkpointer, CheckpointerError, CheckpointingAction,
    CheckpointingStrategy,
};
use burn::train::metric::store::EventStoreClient;
use burn::train::{
    ClassificationOutput, EventProcessorTraining, InferenceStep, Learner, LearnerEvent, LearnerModel,
    LearningCheckpointer, RegressionOutput, SupervisedLearningStrategy, SupervisedTrainingEventProcessor,
    TrainLoader, TrainStep, TrainingComponents, TrainingItem, TrainingStrategy, ValidLoader,
};
use unbroken::train::{Bytes, Loader, Options, StateReader, StateWriter, Stateful};
use unbroken::{Error, Result};

use crate::dtype::{self, Raw};
use crate::{DeviceGenerator, accumulator, module, optimizer, scheduler};

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

/// Burn's loop for one device, exact: `with_training_strategy(exact.strategy())`.
///
/// The loader given here is the one that is trained on; the training loader that `SupervisedTraining::new` asks for is
/// not read. Burn's own checkpointers have nothing to do and should be left off.
pub struct Exact<M: LearnerModel> {
    shared: Arc<Shared<M>>,
}

struct Shared<M: LearnerModel> {
    device: Device,
    start: Mutex<Option<(Options, Loader<<M as TrainStep>::Input>)>>,
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
        let (start, result) = (Mutex::new(Some((options, loader))), Mutex::new(Ok(())));
        Exact {
            shared: Arc::new(Shared {
                device,
                start,
                result,
            }),
        }
    }

    /// For `SupervisedTraining::with_training_strategy`.
    pub fn strategy(&self) -> TrainingStrategy<M> {
        TrainingStrategy::Custom(Arc::new(Strategy(Arc::clone(&self.shared))))
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
        mut learner: Learner<M>,
        _loader: TrainLoader<M>,
        valid: ValidLoader<M>,
        _starting_epoch: usize,
    ) -> (M, SupervisedTrainingEventProcessor<M>) {
        let Some((options, loader)) = lock(&self.0.start).take() else {
            components
                .interrupter
                .fail(DatasetError::new(Error::invalid("a strategy is launched once")));
            return (learner.model(), components.event_processor);
        };
        learner.fork(&self.0.device);
        let valid = valid.to_device(&self.0.device.clone().inner());
        let mut state = State {
            learner,
            device: self.0.device.clone(),
            taps: Taps::new(Arc::clone(&components.event_store)),
            accumulator: GradientsAccumulator::new(),
            accumulated: 0,
            rate: 0.0,
            outputs: Vec::new(),
        };
        let options = options.epochs(components.num_epochs as u64);
        let result = fit(&mut components, &mut state, options, loader, &valid);
        match &result {
            Ok(()) => {}
            Err(Error::Stopped { reason, .. }) => components.interrupter.stop(Some(reason)),
            Err(error) => components
                .interrupter
                .fail(DatasetError::new(Error::invalid(error.to_string()))),
        }
        *lock(&self.0.result) = result;
        (state.learner.model(), components.event_processor)
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
    if let Some(path) = module::first_by_columns(&state.learner.model()) {
        // A Learner takes a model back through Burn's records only, and those bring back another layout in memory.
        return Err(Error::Unsupported {
            what: format!("the layout by columns of `{path}` under Burn's Learner"),
        });
    }
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
            let output = state.learner.train_step(step.take());
            let done = step.position() as usize + 1;
            let progress = progress(done);
            match components.grad_accumulation {
                None => state.update(output.grads),
                Some(count) => {
                    state.accumulator.accumulate(&state.learner.model(), output.grads);
                    state.accumulated += 1;
                    if state.accumulated >= count as u64 || progress.is_completed() {
                        let gradients = state.accumulator.grads();
                        state.update(gradients);
                        state.accumulated = 0;
                    }
                }
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
        state.accumulator = GradientsAccumulator::new();
        state.accumulated = 0;
        validate(&state.learner, processor, valid, epoch, &interrupter);
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
    learner: &Learner<M>,
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
    let model = learner.model().valid();
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
    learner: Learner<M>,
    device: Device,
    taps: Taps<M>,
    accumulator: GradientsAccumulator<M>,
    accumulated: u64,
    /// Learning rate of the last update.
    rate: f64,
    /// What the metrics were given in this epoch, and the learning rate that they were told.
    outputs: Vec<(<M as TrainStep>::Output, f64)>,
}

impl<M: LearnerModel> State<M> {
    fn update(&mut self, gradients: burn::optim::GradientsParams) {
        self.learner.lr_step();
        self.learner.optimizer_step(gradients);
        self.rate = self.learner.lr_current().base();
    }
}

impl<M: LearnerModel> Stateful for State<M>
where
    <M as TrainStep>::Output: Output,
{
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        let model = self.learner.model();
        module::settle(&model);
        out.scope("model", |out| module::write(&model, out))?;
        let State {
            learner,
            taps,
            accumulator,
            outputs,
            ..
        } = self;
        let bytes = 2 * module::sizes(&model).iter().sum::<u64>() + outputs.len() as u64 * PAGE;
        out.costly("trainer", bytes, |out| {
            let (optimizer, scheduler) = taps.records(learner);
            out.scope("optimizer", |out| optimizer::write_record(optimizer, &model, out))?;
            out.scope("scheduler", |out| scheduler::write_record(scheduler, out))?;
            out.scope("metrics", |out| {
                for (place, (output, rate)) in outputs.iter().enumerate() {
                    out.scope(&place.to_string(), |out| {
                        output.write(out)?;
                        out.value("rate", *rate)
                    })?;
                }
                Ok(())
            })
        })?;
        out.scope("gradients", |out| accumulator::write(accumulator, &model, out))?;
        out.value("accumulated", self.accumulated)?;
        out.value("rate", self.rate)
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
        let model = from.scope("model", |from| module::read(self.learner.model(), from))?;
        self.learner.load_model(model.clone().into_record());
        from.scope("trainer", |from| {
            let (record, count) = from.scope("optimizer", |from| optimizer::read_record(&model, from))?;
            self.learner.load_optim(record);
            let found = self.taps.records(&self.learner).0.len();
            optimizer::check_count(count, found)?;
            self.learner
                .load_scheduler(from.scope("scheduler", scheduler::read_record)?);
            self.outputs = from.scope("metrics", |from| {
                let device = self.device.clone().inner();
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
            Ok(())
        })?;
        self.accumulator = GradientsAccumulator::new();
        from.scope("gradients", |from| {
            accumulator::read(&mut self.accumulator, &model, from)
        })?;
        self.accumulated = from.int("accumulated")?.unsigned_abs();
        self.rate = from.float("rate")?;
        Ok(())
    }
}

/// Takes the optimizer's and the scheduler's record out of a Learner, as one of Burn's checkpointers.
struct Taps<M: LearnerModel> {
    checkpointer: LearningCheckpointer<M>,
    store: Arc<EventStoreClient>,
    optimizer: Receiver<OptimizerRecord>,
    scheduler: Receiver<LrSchedulerRecord>,
}

struct Always;

impl CheckpointingStrategy for Always {
    fn checkpointing(&mut self, _epoch: usize, _store: &EventStoreClient) -> Vec<CheckpointingAction> {
        vec![CheckpointingAction::Save]
    }
}

/// A checkpointer that hands records on instead of saving them.
struct Tap<R>(Mutex<Option<Sender<R>>>);

impl<R: Checkpoint> Checkpointer<R> for Tap<R> {
    fn save(&self, _epoch: usize, record: R) -> std::result::Result<(), CheckpointerError> {
        if let Some(sender) = &*lock(&self.0) {
            sender
                .send(record)
                .map_err(|error| CheckpointerError::Unknown(error.to_string()))?;
        }
        Ok(())
    }

    fn delete(&self, _epoch: usize) -> std::result::Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, _epoch: usize) -> std::result::Result<R, CheckpointerError> {
        Err(CheckpointerError::Unknown("nothing is saved here".to_owned()))
    }
}

impl<M: LearnerModel> Taps<M> {
    fn new(store: Arc<EventStoreClient>) -> Taps<M> {
        let ((to_optimizer, optimizer), (to_scheduler, scheduler)) = (channel(), channel());
        let checkpointer = LearningCheckpointer::new(
            // The module is had otherwise; its record is dropped.
            AsyncCheckpointer::new(Tap::<ModuleRecord>(Mutex::new(None))),
            AsyncCheckpointer::new(Tap(Mutex::new(Some(to_optimizer)))),
            AsyncCheckpointer::new(Tap(Mutex::new(Some(to_scheduler)))),
            Box::new(Always),
        );
        Taps {
            checkpointer,
            store,
            optimizer,
            scheduler,
        }
    }

    fn records(&mut self, learner: &Learner<M>) -> (OptimizerRecord, LrSchedulerRecord) {
        self.checkpointer.checkpoint(learner, 0, &self.store);
        let sent = "a checkpointer sends each record that it is given";
        (
            self.optimizer.recv().expect(sent),
            self.scheduler.recv().expect(sent),
        )
    }
}
