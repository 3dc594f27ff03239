//! What a step costs more for being recorded, and what a save needs in memory.
//!
//!     cargo run --release -p unbroken-burn --example cost -- [WIDTH] [STEPS]
//!
//! Recorded steps and steps of a twin that nobody records take turns, so that both see the same machine. Prints, for each
//! level of the journal, microseconds of the training thread's own CPU time, mean and median: what `next_step` and `commit`
//! take in steps that save nothing, more than the twin's loader takes for the same batch; the steps that save; and the
//! step's own work beside its twin's. Then, on Linux, the memory that a save takes at its peak, in copies of the state, in
//! a loop of one's own and under Burn's Learner.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use burn::data::dataloader::batcher::Batcher;
use burn::module::Module;
use burn::nn::{BatchNorm, BatchNormConfig, Dropout, DropoutConfig, Linear, LinearConfig};
use burn::optim::AdamWConfig;
use burn::tensor::activation::relu;
use burn::tensor::{Device, ExecutionError, Tensor};
use burn::train::metric::ItemLazy;
use burn::train::{InferenceStep, SupervisedTraining, TrainOutput, TrainStep};
use unbroken::Result;
use unbroken::train::{
    Failure, Level, Loader, Options, Policy, Sample, Source, StateReader, StateWriter, Training,
};
use unbroken_burn::learner::{Exact, Output};
use unbroken_burn::{DeviceGenerator, ExactLoader, Trained};

const BATCH: u64 = 128;
const INPUTS: usize = 64;

struct Noise(u64);

impl Source for Noise {
    type Item = Vec<f32>;

    fn len(&self) -> u64 {
        self.0 * BATCH
    }

    fn at(&self, sample: &Sample) -> std::result::Result<Vec<f32>, Failure> {
        let mut draws = sample.draws();
        Ok((0..INPUTS).map(|_| draws.uniform() as f32).collect())
    }
}

#[derive(Module, Debug)]
struct Net {
    first: Linear,
    norm: BatchNorm,
    dropout: Dropout,
    inner: Vec<Linear>,
    last: Linear,
}

impl Net {
    fn new(width: usize, inner: usize, device: &Device) -> Net {
        Net {
            first: LinearConfig::new(INPUTS, width).init(device),
            norm: BatchNormConfig::new(width).init(device),
            dropout: DropoutConfig::new(0.3).init(),
            inner: (0..inner)
                .map(|_| LinearConfig::new(width, width).init(device))
                .collect(),
            last: LinearConfig::new(width, 10).init(device),
        }
    }

    fn loss(&self, input: Tensor<2>) -> Tensor<1> {
        let hidden = self
            .dropout
            .forward(relu(self.norm.forward(self.first.forward(input))));
        let hidden = self
            .inner
            .iter()
            .fold(hidden, |hidden, layer| relu(layer.forward(hidden)));
        self.last.forward(hidden).powi_scalar(2).mean()
    }
}

/// CPU time of this thread: what else runs on the machine does not count.
fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Mean and median, in microseconds.
fn words(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let Some(median) = times.get(times.len() / 2).copied() else {
        return "-".to_owned();
    };
    let sum: Duration = times.iter().sum();
    format!(
        "{:.0} (median {:.0})",
        micros(sum) / times.len() as f64,
        micros(median)
    )
}

fn train(trained: &mut Trained<Net>, batch: &[Vec<f32>], device: &Device) -> f32 {
    let input = Tensor::<1>::from_floats(batch.concat().as_slice(), device).reshape([batch.len(), INPUTS]);
    let loss = trained.model.loss(input);
    let number = loss.clone().into_scalar::<f32>();
    trained.step(loss.backward());
    number
}

fn measure(width: usize, steps: u64, level: Level, directory: &Path) -> Result<()> {
    let device = Device::flex().autodiff();
    let fresh = || Trained::new(Net::new(width, 1, &device), AdamWConfig::new().init(), 1e-3);
    let (mut trained, mut twin) = (fresh(), fresh());
    let mut loader = Loader::new(Noise(steps), BATCH).shuffled().workers(1).ahead(8);
    let mut batches = loader.pass(1, 0, 0)?;
    let mut training = Training::at(directory)
        .seed(1)
        .policy(Policy::every_steps(64).not_at_epoch_ends())
        .journal(level)
        .generator("device", DeviceGenerator::new(&device))
        .start(&mut trained)?;
    let (mut own, mut alone, mut recorded, mut saved) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    training.next_epoch(&mut trained)?;
    loop {
        let start = now();
        let Some(mut step) = training.next_step(&mut loader)? else {
            break;
        };
        let asking = now() - start;
        let batch = step.take();
        let start = now();
        step.log("loss", train(&mut trained, &batch, &device).into());
        own.push(now() - start);
        let saves = step.number().is_multiple_of(64);
        let start = now();
        step.commit(&mut trained)?;
        let committing = now() - start;
        let start = now();
        let batch = batches.next().expect("the twin has as many batches")?;
        let loading = now() - start;
        let cost = (asking + committing).saturating_sub(loading);
        if saves { &mut saved } else { &mut recorded }.push(cost);
        let start = now();
        train(&mut twin, &batch.content, &device);
        alone.push(now() - start);
    }
    println!(
        "{level:?}: recording {}, a save {}; the step {}, its twin {}",
        words(recorded),
        words(saved),
        words(own),
        words(alone)
    );
    Ok(())
}

/// A line of /proc/self/status, in bytes. Elsewhere than on Linux there is none.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name));
    let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// Memory of this process when it was last looked at.
static BEFORE: AtomicU64 = AtomicU64::new(0);

/// Looks at the memory in use; the peak counts from here.
fn look() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    BEFORE.store(status("VmRSS:"), Ordering::Relaxed);
}

/// Says what was used more at the peak since then, in copies of the state: weights and two moments of each.
fn say_peak(of: &str, net: &Net) {
    let state = 3 * 4 * net.num_params() as u64;
    let more = status("VmHWM:").saturating_sub(BEFORE.load(Ordering::Relaxed));
    println!(
        "{of}: a save of {} MiB takes {} MiB at its peak, {:.2} of the state",
        state >> 20,
        more >> 20,
        more as f64 / state as f64
    );
}

/// The step that is saved, of five.
const SAVED: u64 = 4;

fn saving(directory: &Path) -> Options {
    Training::at(directory)
        .seed(1)
        .policy(Policy::every_steps(SAVED).not_at_epoch_ends())
}

/// What a save takes more than the training itself, at its peak, of a net of several layers.
fn memory(width: usize, directory: &Path) -> Result<()> {
    let device = Device::flex().autodiff();
    let mut trained = Trained::new(Net::new(width, 8, &device), AdamWConfig::new().init(), 1e-3);
    let mut loader = Loader::new(Noise(SAVED + 1), BATCH);
    let mut training = saving(directory)
        .generator("device", DeviceGenerator::new(&device))
        .start(&mut trained)?;
    training.next_epoch(&mut trained)?;
    while let Some(mut step) = training.next_step(&mut loader)? {
        train(&mut trained, &step.take(), &device);
        let saves = step.number() == SAVED;
        look();
        step.commit(&mut trained)?;
        if saves {
            say_peak("a loop of one's own", &trained.model);
        }
    }
    Ok(())
}

/// What Burn's metrics are told of a step: nothing but its loss.
struct Loss(f32);

impl ItemLazy for Loss {
    fn sync(self) -> std::result::Result<Loss, ExecutionError> {
        Ok(self)
    }
}

impl Output for Loss {
    fn kept(&self) -> Loss {
        Loss(self.0)
    }

    /// Asked for right before the step is recorded and saved.
    fn numbers(&self) -> Vec<(&'static str, f64)> {
        look();
        vec![("loss", self.0.into())]
    }

    fn write(&self, out: &mut StateWriter<'_>) -> Result<()> {
        out.value("loss", f64::from(self.0))
    }

    fn read(from: &mut StateReader<'_>, _device: &Device) -> Result<Loss> {
        Ok(Loss(from.float("loss")? as f32))
    }
}

impl TrainStep for Net {
    type Input = Vec<Vec<f32>>;
    type Output = Loss;

    fn step(&self, batch: Vec<Vec<f32>>) -> TrainOutput<Loss> {
        static STEPS: AtomicU64 = AtomicU64::new(0);
        if STEPS.fetch_add(1, Ordering::Relaxed) == SAVED {
            say_peak("under the Learner", self);
        }
        let device = self.first.weight.device();
        let input = Tensor::<1>::from_floats(batch.concat().as_slice(), &device);
        let loss = self.loss(input.reshape([batch.len(), INPUTS]));
        let number = loss.clone().into_scalar::<f32>();
        TrainOutput::new(self, loss.backward(), Loss(number))
    }
}

impl InferenceStep for Net {
    type Input = Vec<Vec<f32>>;
    type Output = Loss;

    fn step(&self, _batch: Vec<Vec<f32>>) -> Loss {
        Loss(0.0)
    }
}

struct Rows;

impl Batcher<Vec<f32>, Vec<Vec<f32>>> for Rows {
    fn batch(&self, items: Vec<Vec<f32>>, _device: &Device) -> Vec<Vec<f32>> {
        items
    }
}

/// The same under Burn's Learner.
fn memory_under_learner(width: usize, directory: &Path) -> Result<()> {
    let device = Device::flex().autodiff();
    let loader = || ExactLoader::new(Noise(SAVED + 1), Rows, BATCH, &device, |loader| loader);
    let exact = Exact::<Net>::new(saving(directory), &device, loader().loader());
    SupervisedTraining::new(directory.join("metrics"), Arc::new(loader()), Arc::new(loader()))
        .with_application_logger(None)
        .num_epochs(1)
        .with_training_strategy(exact.strategy())
        .launch(exact.learner(Net::new(width, 8, &device), AdamWConfig::new().init(), 1e-3));
    exact.result()
}

/// Runs one measurement in a directory of its own.
fn in_directory(name: &str, run: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("unbroken-cost-{}-{name}", std::process::id()));
    run(&directory)?;
    std::fs::remove_dir_all(&directory)
        .map_err(|error| unbroken::Error::io("remove the run", &directory, error))
}

/// Runs this program again for one measurement of memory: what an earlier one freed would be used again.
fn in_process(what: &str, width: usize) -> Result<()> {
    let failed = |error| unbroken::Error::io("start", what, error);
    let program = std::env::current_exe().map_err(failed)?;
    let status = Command::new(program)
        .args([what, &width.to_string()])
        .status()
        .map_err(failed)?;
    assert!(status.success(), "{what}: {status}");
    Ok(())
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize, default| {
        let word = words.get(place);
        word.and_then(|word| word.parse().ok()).unwrap_or(default)
    };
    match words.first().map(String::as_str) {
        Some("own") => return in_directory("own", |place| memory(number(1, 1024), place)),
        Some("learner") => {
            return in_directory("learner", |place| memory_under_learner(number(1, 1024), place));
        }
        _ => {}
    }
    let (width, steps) = (number(0, 1024), number(1, 320) as u64);
    let net = Net::new(width, 1, &Device::flex());
    println!("{} parameters, batch of {BATCH}", net.num_params());
    in_directory("sampled", |place| measure(width, steps, Level::Sampled, place))?;
    in_directory("full", |place| measure(width, steps, Level::Full, place))?;
    in_process("own", width)?;
    in_process("learner", width)
}
