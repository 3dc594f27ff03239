//! What a step costs more for being recorded, and what a save needs in memory.
//!
//!     cargo run --release -p unbroken-burn --example cost -- [WIDTH] [STEPS]
//!
//! Recorded steps and steps of a twin that nobody records take turns, so that both see the same machine. Prints, for each
//! level of the journal, microseconds of the training thread's own CPU time, mean and median: what `next_step` and `commit`
//! take in steps that save nothing, more than the twin's loader takes for the same batch; the steps that save; and the
//! step's own work beside its twin's. Then, on Linux, the memory that a save takes at its peak, in copies of the state.

use std::time::Duration;

use burn::module::Module;
use burn::nn::{BatchNorm, BatchNormConfig, Dropout, DropoutConfig, Linear, LinearConfig};
use burn::optim::AdamWConfig;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor};
use unbroken::Result;
use unbroken::train::{Failure, Level, Loader, Policy, Sample, Source, Training};
use unbroken_burn::{DeviceGenerator, Trained};

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

fn measure(width: usize, steps: u64, level: Level) -> Result<()> {
    let device = Device::flex().autodiff();
    let directory = std::env::temp_dir().join(format!("unbroken-cost-{}-{level:?}", std::process::id()));
    let fresh = || Trained::new(Net::new(width, 1, &device), AdamWConfig::new().init(), 1e-3);
    let (mut trained, mut twin) = (fresh(), fresh());
    let mut loader = Loader::new(Noise(steps), BATCH).shuffled().workers(1).ahead(8);
    let mut batches = loader.pass(1, 0, 0)?;
    let mut training = Training::at(&directory)
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
    drop(training);
    std::fs::remove_dir_all(&directory)
        .map_err(|error| unbroken::Error::io("remove the run", &directory, error))
}

/// A line of /proc/self/status, in bytes.
fn status(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// What a save takes more than the training itself, at its peak, of a net of several layers.
fn memory(width: usize) -> Result<()> {
    let device = Device::flex().autodiff();
    let directory = std::env::temp_dir().join(format!("unbroken-cost-{}-memory", std::process::id()));
    let mut trained = Trained::new(Net::new(width, 8, &device), AdamWConfig::new().init(), 1e-3);
    let mut loader = Loader::new(Noise(4), BATCH);
    let mut training = Training::at(&directory)
        .seed(1)
        .policy(Policy::every_steps(4).not_at_epoch_ends())
        .generator("device", DeviceGenerator::new(&device))
        .start(&mut trained)?;
    // Weights and two moments of each.
    let state = 3 * 4 * trained.model.num_params() as u64;
    training.next_epoch(&mut trained)?;
    while let Some(mut step) = training.next_step(&mut loader)? {
        train(&mut trained, &step.take(), &device);
        // The peak from here on; elsewhere than on Linux there is nothing to write to.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let (before, saves) = (status("VmRSS:"), step.number() == 4);
        step.commit(&mut trained)?;
        if let (true, Some(before), Some(peak)) = (saves, before, status("VmHWM:")) {
            let more = peak.saturating_sub(before) as f64;
            println!(
                "a save of {} MiB takes {:.0} MiB at its peak: {:.2} of the state",
                state >> 20,
                more / (1 << 20) as f64,
                more / state as f64
            );
        }
    }
    drop(training);
    std::fs::remove_dir_all(&directory)
        .map_err(|error| unbroken::Error::io("remove the run", &directory, error))
}

fn main() -> Result<()> {
    let number = |place, default| {
        let word = std::env::args().nth(place);
        word.and_then(|word| word.parse().ok()).unwrap_or(default)
    };
    let (width, steps) = (number(1, 1024), number(2, 320));
    let net = Net::new(width as usize, 1, &Device::flex());
    println!("{} parameters, batch of {BATCH}", net.num_params());
    measure(width as usize, steps, Level::Sampled)?;
    measure(width as usize, steps, Level::Full)?;
    memory(width as usize)
}
