//! What a step costs more for being recorded: the time inside `next_step` and `commit`, against the step's own.
//!
//!     cargo run --release -p unbroken-burn --example cost -- [WIDTH]
//!
//! Prints microseconds a step: the median over steps that save nothing, in each level of the journal, and the saves.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::nn::{BatchNorm, BatchNormConfig, Dropout, DropoutConfig, Linear, LinearConfig};
use burn::optim::AdamWConfig;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor};
use unbroken::Result;
use unbroken::train::{Failure, Level, Loader, Policy, Sample, Source, Training};
use unbroken_burn::{DeviceGenerator, Trained};

const STEPS: u64 = 256;
const BATCH: u64 = 128;
const INPUTS: usize = 64;

struct Noise;

impl Source for Noise {
    type Item = Vec<f32>;

    fn len(&self) -> u64 {
        STEPS * BATCH
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
    second: Linear,
    last: Linear,
}

impl Net {
    fn new(width: usize, device: &Device) -> Net {
        Net {
            first: LinearConfig::new(INPUTS, width).init(device),
            norm: BatchNormConfig::new(width).init(device),
            dropout: DropoutConfig::new(0.3).init(),
            second: LinearConfig::new(width, width).init(device),
            last: LinearConfig::new(width, 10).init(device),
        }
    }

    fn loss(&self, input: Tensor<2>) -> Tensor<1> {
        let hidden = self
            .dropout
            .forward(relu(self.norm.forward(self.first.forward(input))));
        self.last
            .forward(relu(self.second.forward(hidden)))
            .powi_scalar(2)
            .mean()
    }
}

fn microseconds(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times
        .get(times.len() / 2)
        .map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}

fn measure(width: usize, level: Level) -> Result<()> {
    let device = Device::flex().autodiff();
    let directory = std::env::temp_dir().join(format!("unbroken-cost-{}-{level:?}", std::process::id()));
    let mut trained = Trained::new(Net::new(width, &device), AdamWConfig::new().init(), 1e-3);
    let mut loader = Loader::new(Noise, BATCH).shuffled().workers(1).ahead(8);
    let mut training = Training::at(&directory)
        .seed(1)
        .policy(Policy::every_steps(64).not_at_epoch_ends())
        .journal(level)
        .generator("device", DeviceGenerator::new(&device))
        .start(&mut trained)?;
    let (mut own, mut next, mut recorded, mut saved) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    while training.next_epoch(&mut trained)?.is_some() {
        loop {
            let start = Instant::now();
            let Some(mut step) = training.next_step(&mut loader)? else {
                break;
            };
            next.push(start.elapsed());
            let start = Instant::now();
            let batch = step.take();
            let input =
                Tensor::<1>::from_floats(batch.concat().as_slice(), &device).reshape([batch.len(), INPUTS]);
            let loss = trained.model.loss(input);
            step.log("loss", loss.clone().into_scalar::<f32>().into());
            trained.step(loss.backward());
            own.push(start.elapsed());
            let saves = step.number().is_multiple_of(64);
            let start = Instant::now();
            step.commit(&mut trained)?;
            if saves { &mut saved } else { &mut recorded }.push(start.elapsed());
        }
    }
    let (own, next, recorded, saved) = (
        microseconds(own),
        microseconds(next),
        microseconds(recorded),
        microseconds(saved),
    );
    println!(
        "{level:?}: step {own:.0}, next_step {next:.0}, commit {recorded:.0}, commit that saves {saved:.0} microseconds"
    );
    drop(training);
    std::fs::remove_dir_all(&directory)
        .map_err(|error| unbroken::Error::io("remove the run", &directory, error))
}

fn main() -> Result<()> {
    let width = std::env::args()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or(1024);
    let net = Net::new(width, &Device::flex());
    println!("{} parameters, batch of {BATCH}", net.num_params());
    measure(width, Level::Sampled)?;
    measure(width, Level::Full)
}
