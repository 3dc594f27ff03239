//! Handwritten digits with Burn: kill it at any instant, start the same command again, get the same bits.
//!
//! A small convolutional net with batch norm, dropout, gradient accumulation, AdamW and a cosine schedule; images are
//! shifted at random on the loader's threads. With `--learner` the same under Burn's own training loop and metrics.
//!
//!     cargo run --release -p unbroken-burn --example digits -- runs/digits [--epochs 8] [--workers 3] [--learner]
//!
//! `--torch FILE` writes the final weights as PyTorch's `load_state_dict` takes them; `--from RUN` starts from the weights
//! of a PyTorch run of the same net, tracked as `model`.
//!
//! Ends with `accuracy 0.9..., weights ...`: the same digest after any number of kills.

use std::process::ExitCode;
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrSchedulerConfig;
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{MaxPool2d, MaxPool2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Dropout, DropoutConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::optim::AdamWConfig;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn::train::metric::{AccuracyMetric, LearningRateMetric, LossMetric};
use burn::train::{ClassificationOutput, InferenceStep, SupervisedTraining, TrainOutput, TrainStep};
use unbroken::Result;
use unbroken::digest::Fingerprint;
use unbroken::run::read_checkpoint;
use unbroken::train::{Failure, Options, Policy, Sample, Source, Training, exit_code};
use unbroken_burn::learner::Exact;
use unbroken_burn::{DeviceGenerator, ExactLoader, Trained, module, torch};

const SEED: u64 = 1;
const BATCH: u64 = 32;
const TEST: usize = 297;
const PIXELS: usize = 64;
const ACCUMULATION: u64 = 2;
const LEARNING_RATE: f64 = 4e-3;

/// Rows of 64 pixels and a digit; `fixtures/digits/README.md` says where they are from.
static DIGITS: &[u8] = include_bytes!("../../../fixtures/digits/digits.bin");

type Item = ([f32; PIXELS], u8);

fn row(index: usize) -> Item {
    let row = &DIGITS[index * (PIXELS + 1)..][..PIXELS + 1];
    (
        std::array::from_fn(|pixel| f32::from(row[pixel]) / 16.0),
        row[PIXELS],
    )
}

/// Some of the digits, each shifted by up to one pixel if they are trained on.
struct Digits {
    first: usize,
    count: usize,
    shifted: bool,
}

impl Digits {
    fn train() -> Digits {
        Digits {
            first: 0,
            count: DIGITS.len() / (PIXELS + 1) - TEST,
            shifted: true,
        }
    }

    fn test() -> Digits {
        Digits {
            first: DIGITS.len() / (PIXELS + 1) - TEST,
            count: TEST,
            shifted: false,
        }
    }
}

impl Source for Digits {
    type Item = Item;

    fn len(&self) -> u64 {
        self.count as u64
    }

    fn at(&self, sample: &Sample) -> std::result::Result<Item, Failure> {
        let (image, digit) = row(self.first + sample.index as usize);
        if !self.shifted {
            return Ok((image, digit));
        }
        let mut draws = sample.draws();
        let (down, right) = (draws.below(3) as usize + 7, draws.below(3) as usize + 7);
        Ok((
            std::array::from_fn(|at| image[(at / 8 + down) % 8 * 8 + (at % 8 + right) % 8]),
            digit,
        ))
    }
}

#[derive(Clone, Debug)]
struct Batch {
    images: Tensor<4>,
    digits: Tensor<1, Int>,
}

struct ToTensors;

impl Batcher<Item, Batch> for ToTensors {
    fn batch(&self, items: Vec<Item>, device: &Device) -> Batch {
        let images: Vec<f32> = items.iter().flat_map(|(image, _)| *image).collect();
        let digits: Vec<i64> = items.iter().map(|(_, digit)| i64::from(*digit)).collect();
        let count = items.len();
        Batch {
            images: Tensor::from_data(TensorData::new(images, [count, 1, 8, 8]), device),
            digits: Tensor::from_data(TensorData::new(digits, [count]), device),
        }
    }
}

#[derive(Module, Debug)]
struct Net {
    conv1: Conv2d,
    norm1: BatchNorm,
    conv2: Conv2d,
    norm2: BatchNorm,
    pool: MaxPool2d,
    dropout: Dropout,
    fc1: Linear,
    fc2: Linear,
}

impl Net {
    fn new(device: &Device) -> Net {
        let conv = |channels| {
            Conv2dConfig::new(channels, [3, 3])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .init(device)
        };
        Net {
            conv1: conv([1, 16]),
            norm1: BatchNormConfig::new(16).init(device),
            conv2: conv([16, 32]),
            norm2: BatchNormConfig::new(32).init(device),
            pool: MaxPool2dConfig::new([2, 2]).with_strides([2, 2]).init(),
            dropout: DropoutConfig::new(0.3).init(),
            fc1: LinearConfig::new(32 * 16, 64).init(device),
            fc2: LinearConfig::new(64, 10).init(device),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = relu(self.norm1.forward(self.conv1.forward(images)));
        let x = self.pool.forward(relu(self.norm2.forward(self.conv2.forward(x))));
        let x = relu(self.fc1.forward(self.dropout.forward(x.flatten(1, 3))));
        self.fc2.forward(x)
    }

    fn classify(&self, batch: Batch) -> ClassificationOutput {
        let output = self.forward(batch.images);
        let loss = CrossEntropyLossConfig::new()
            .init(&output.device())
            .forward(output.clone(), batch.digits.clone());
        ClassificationOutput::new(loss, output, batch.digits)
    }
}

impl TrainStep for Net {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> TrainOutput<ClassificationOutput> {
        let output = self.classify(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Net {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> ClassificationOutput {
        self.classify(batch)
    }
}

fn accuracy(net: &Net, device: &Device) -> f64 {
    let net = net.valid();
    let batch = ToTensors.batch(
        (0..TEST)
            .map(|index| row(DIGITS.len() / (PIXELS + 1) - TEST + index))
            .collect(),
        device,
    );
    let right = net
        .forward(batch.images)
        .argmax(1)
        .flatten::<1>(0, 1)
        .equal(batch.digits)
        .int()
        .sum();
    right.into_scalar::<i64>() as f64 / TEST as f64
}

/// Digest of every tensor of the net, in order.
fn weights(net: &Net) -> Fingerprint {
    module::settle(net);
    let bytes = net
        .clone()
        .into_record()
        .into_bytes()
        .expect("a record of plain tensors can be written");
    // Burn's own records hold parameter ids, which are drawn anew in every process: the tensors alone are compared.
    let reader = burn_pack::Reader::from_bytes(bytes).expect("a record that was just written can be read");
    let tensors = reader.into_tensors().expect("its tensors are there");
    let tensors: Vec<_> = tensors
        .iter()
        .map(|tensor| tensor.to_bytes().expect("its bytes are there"))
        .collect();
    Fingerprint::of_regions(&tensors.iter().map(|tensor| &tensor[..]).collect::<Vec<_>>())
}

struct Arguments {
    directory: String,
    epochs: u64,
    workers: usize,
    save_every: u64,
    learner: bool,
    torch: Option<String>,
    from: Option<String>,
}

fn arguments() -> Arguments {
    let mut arguments = Arguments {
        directory: "runs/digits".to_owned(),
        epochs: 8,
        workers: 3,
        save_every: 20,
        learner: false,
        torch: None,
        from: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            words
                .next()
                .and_then(|word| word.parse().ok())
                .expect("a number after the option")
        };
        match word.as_str() {
            "--epochs" => arguments.epochs = number(),
            "--workers" => arguments.workers = number() as usize,
            "--save-every" => arguments.save_every = number(),
            "--learner" => arguments.learner = true,
            "--torch" => arguments.torch = words.next(),
            "--from" => arguments.from = words.next(),
            _ => arguments.directory = word,
        }
    }
    arguments
}

fn options(arguments: &Arguments) -> Options {
    Training::at(&arguments.directory)
        .seed(SEED)
        .policy(Policy::every_steps(arguments.save_every))
}

fn loader(arguments: &Arguments, device: &Device) -> ExactLoader<Batch> {
    let workers = arguments.workers;
    ExactLoader::new(Digits::train(), ToTensors, BATCH, device, move |loader| {
        loader.shuffled().workers(workers)
    })
}

fn updates(arguments: &Arguments) -> usize {
    (arguments.epochs * Digits::train().len().div_ceil(BATCH) / ACCUMULATION).max(1) as usize
}

fn schedule(arguments: &Arguments) -> burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler {
    let cosine = CosineAnnealingLrSchedulerConfig::new(LEARNING_RATE, updates(arguments));
    ModuleLrSchedulerConfig::new(cosine.into())
        .init()
        .expect("a rate between 0 and 1")
}

/// The loop by hand.
fn train(arguments: &Arguments, device: &Device) -> Result<Net> {
    let net = match &arguments.from {
        None => Net::new(device),
        Some(run) => torch::read(Net::new(device), &read_checkpoint(run.as_ref())?, "model")?,
    };
    let mut trained =
        Trained::new(net, AdamWConfig::new().init(), schedule(arguments)).accumulating(ACCUMULATION);
    let mut loader = loader(arguments, device).loader();
    let mut training = options(arguments)
        .epochs(arguments.epochs)
        .generator("device", DeviceGenerator::new(device))
        .start(&mut trained)?;
    training.notes().iter().for_each(|note| eprintln!("{note}"));
    eprintln!("life {} starts at step {}", training.life(), training.step());
    while training.next_epoch(&mut trained)?.is_some() {
        while let Some(mut step) = training.next_step(&mut loader)? {
            let output = trained.model.classify(step.take());
            step.log("loss", f64::from(output.loss.clone().into_scalar::<f32>()));
            if let Some(rate) = trained.step(output.loss.backward()) {
                step.log("rate", rate);
            }
            step.commit(&mut trained)?;
        }
        let accuracy = accuracy(&trained.model, &device.clone().inner());
        training.log("accuracy", accuracy);
        eprintln!("epoch {}: accuracy {accuracy:.4}", training.epoch());
    }
    Ok(trained.model)
}

/// The same under Burn's own loop, with its metrics.
fn train_with_learner(arguments: &Arguments, device: &Device) -> Result<Net> {
    let train = loader(arguments, device);
    let plain = device.clone().inner();
    let valid = ExactLoader::new(Digits::test(), ToTensors, 99, &plain, |loader| loader);
    let exact = Exact::<Net>::new(options(arguments), device, train.loader());
    let metrics = format!("{}-metrics", arguments.directory);
    let result = SupervisedTraining::new(metrics, Arc::new(train), Arc::new(valid))
        .metrics((AccuracyMetric::new(), LossMetric::new()))
        .metric_train_numeric(LearningRateMetric::new())
        .with_application_logger(None)
        .num_epochs(arguments.epochs as usize)
        .grads_accumulation(ACCUMULATION as usize)
        .with_training_strategy(exact.strategy())
        .launch(exact.learner(Net::new(device), AdamWConfig::new().init(), schedule(arguments)));
    exact.result()?;
    Ok(result.model)
}

fn run(arguments: &Arguments) -> Result<()> {
    let device = Device::flex().autodiff();
    // Burn draws a module's first weights from the device's generator, when they are first touched.
    device.seed(SEED);
    let net = if arguments.learner {
        train_with_learner(arguments, &device)?
    } else {
        train(arguments, &device)?
    };
    if let Some(file) = &arguments.torch {
        let failed = |error| unbroken::Error::io("write the weights", file, error);
        std::fs::write(file, torch::safetensors(&net)?).map_err(failed)?;
    }
    println!(
        "accuracy {:.4}, weights {}",
        accuracy(&net, &device.inner()),
        weights(&net)
    );
    Ok(())
}

fn main() -> ExitCode {
    let result = run(&arguments());
    if let Err(error) = &result {
        eprintln!("{error}");
        error.hint().iter().for_each(|hint| eprintln!("hint: {hint}"));
    }
    exit_code(&result)
}
