//! A network by hand, in plain Rust, that survives anything: kill it at any instant and start the same command again.
//!
//! Two layers, dropout, momentum and a falling learning rate on the 8x8 digits, with random shifts of each image. Shows
//! the three things a program gives to a training: its state, its samples by number, its logged numbers.
//!
//!     cargo run --release --example plain -- runs/plain [--epochs 30] [--workers 3] [--save-every 20]
//!
//! Ends with `epoch 29: accuracy 0.9...` and the digest of the final weights, the same after any number of kills.

use std::process::ExitCode;
use std::time::Duration;

use unbroken::Result;
use unbroken::digest::Fingerprint;
use unbroken::train::{
    Draws, Failure, Loader, Policy, Sample, Source, StateReader, StateWriter, Stateful, Training, exit_code,
};

const SEED: u64 = 1;
const BATCH: u64 = 32;
const TEST: usize = 297;
const HIDDEN: usize = 48;
const CLASSES: usize = 10;
const PIXELS: usize = 64;
const LEARNING_RATE: f32 = 0.1;
const MOMENTUM: f32 = 0.9;
const DROPOUT: f64 = 0.2;

/// Rows of 64 pixels and a digit; `fixtures/digits/README.md` says where they are from.
static DIGITS: &[u8] = include_bytes!("../../../fixtures/digits/digits.bin");

fn row(index: usize) -> ([f32; PIXELS], usize) {
    let row = &DIGITS[index * (PIXELS + 1)..][..PIXELS + 1];
    (
        std::array::from_fn(|pixel| f32::from(row[pixel]) / 16.0),
        usize::from(row[PIXELS]),
    )
}

/// All digits but the last 297, each shifted by up to one pixel at random.
struct Shifted;

impl Source for Shifted {
    type Item = ([f32; PIXELS], usize);

    fn len(&self) -> u64 {
        (DIGITS.len() / (PIXELS + 1) - TEST) as u64
    }

    fn at(&self, sample: &Sample) -> std::result::Result<Self::Item, Failure> {
        let (image, digit) = row(sample.index as usize);
        let mut draws = sample.draws();
        let (down, right) = (draws.below(3) as usize + 7, draws.below(3) as usize + 7);
        Ok((
            std::array::from_fn(|at| image[(at / 8 + down) % 8 * 8 + (at % 8 + right) % 8]),
            digit,
        ))
    }
}

/// One layer, its momentum and its gradient of the current step.
struct Layer {
    inputs: usize,
    weight: Vec<f32>,
    bias: Vec<f32>,
    weight_momentum: Vec<f32>,
    bias_momentum: Vec<f32>,
}

impl Layer {
    fn new(inputs: usize, outputs: usize, draws: &mut Draws) -> Layer {
        let bound = (6.0 / inputs as f64).sqrt();
        let weight = (0..inputs * outputs)
            .map(|_| ((draws.uniform() * 2.0 - 1.0) * bound) as f32)
            .collect();
        Layer {
            inputs,
            weight,
            bias: vec![0.0; outputs],
            weight_momentum: vec![0.0; inputs * outputs],
            bias_momentum: vec![0.0; outputs],
        }
    }

    fn forward(&self, input: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(self.inputs).zip(&self.bias);
        rows.map(|(row, bias)| bias + row.iter().zip(input).map(|(w, x)| w * x).sum::<f32>())
            .collect()
    }

    /// Adds one sample's gradient to `into` (weights, then biases); returns the gradient of the input.
    fn backward(&self, input: &[f32], output: &[f32], into: &mut [f32]) -> Vec<f32> {
        let mut gradient = vec![0.0; self.inputs];
        let (weights, biases) = into.split_at_mut(self.weight.len());
        for (place, slope) in output.iter().enumerate() {
            let row = place * self.inputs..(place + 1) * self.inputs;
            biases[place] += slope;
            for ((into, weight), (x, back)) in weights[row.clone()]
                .iter_mut()
                .zip(&self.weight[row])
                .zip(input.iter().zip(&mut gradient))
            {
                *into += slope * x;
                *back += slope * weight;
            }
        }
        gradient
    }

    fn update(&mut self, gradient: &[f32], rate: f32) {
        let (weights, biases) = gradient.split_at(self.weight.len());
        let parts = [
            (&mut self.weight, &mut self.weight_momentum, weights),
            (&mut self.bias, &mut self.bias_momentum, biases),
        ];
        for (numbers, momenta, gradient) in parts {
            for ((number, momentum), slope) in numbers.iter_mut().zip(momenta).zip(gradient) {
                *momentum = MOMENTUM * *momentum + slope;
                *number -= rate * *momentum;
            }
        }
    }
}

impl Stateful for Layer {
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        let (inputs, outputs) = (self.inputs as u64, self.bias.len() as u64);
        out.tensor("weight", &[outputs, inputs], &self.weight)?;
        out.tensor("bias", &[outputs], &self.bias)?;
        out.tensor("weight_momentum", &[outputs, inputs], &self.weight_momentum)?;
        out.tensor("bias_momentum", &[outputs], &self.bias_momentum)
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
        let (inputs, outputs) = (self.inputs as u64, self.bias.len() as u64);
        from.tensor_into("weight", &[outputs, inputs], &mut self.weight)?;
        from.tensor_into("bias", &[outputs], &mut self.bias)?;
        from.tensor_into("weight_momentum", &[outputs, inputs], &mut self.weight_momentum)?;
        from.tensor_into("bias_momentum", &[outputs], &mut self.bias_momentum)
    }
}

struct Net {
    hidden: Layer,
    out: Layer,
    rate: f32,
}

impl Stateful for Net {
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        out.part("hidden", &mut self.hidden)?;
        out.part("out", &mut self.out)?;
        out.value("rate", f64::from(self.rate))
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
        from.part("hidden", &mut self.hidden)?;
        from.part("out", &mut self.out)?;
        self.rate = from.float("rate")? as f32;
        Ok(())
    }
}

impl Net {
    fn new(seed: u64) -> Net {
        let mut draws = Draws::new(unbroken::key::derive_key(seed, "weights", 0, 0));
        let (hidden, out) = (
            Layer::new(PIXELS, HIDDEN, &mut draws),
            Layer::new(HIDDEN, CLASSES, &mut draws),
        );
        Net {
            hidden,
            out,
            rate: LEARNING_RATE,
        }
    }

    /// One update on a batch; returns the mean loss.
    fn train(&mut self, batch: &[([f32; PIXELS], usize)], draws: &mut Draws) -> f32 {
        let mut hidden_gradient = vec![0.0; self.hidden.weight.len() + HIDDEN];
        let mut out_gradient = vec![0.0; self.out.weight.len() + CLASSES];
        let mut loss = 0.0;
        for (image, digit) in batch {
            let mut hidden = self.hidden.forward(image);
            for unit in &mut hidden {
                let kept = *unit > 0.0 && !draws.chance(DROPOUT);
                *unit = if kept { *unit / (1.0 - DROPOUT as f32) } else { 0.0 };
            }
            let mut slopes = softmax(&self.out.forward(&hidden));
            loss -= slopes[*digit].ln() / batch.len() as f32;
            slopes[*digit] -= 1.0;
            slopes.iter_mut().for_each(|slope| *slope /= batch.len() as f32);
            let mut back = self.out.backward(&hidden, &slopes, &mut out_gradient);
            for (slope, unit) in back.iter_mut().zip(&hidden) {
                *slope = if *unit > 0.0 {
                    *slope / (1.0 - DROPOUT as f32)
                } else {
                    0.0
                };
            }
            self.hidden.backward(image, &back, &mut hidden_gradient);
        }
        self.hidden.update(&hidden_gradient, self.rate);
        self.out.update(&out_gradient, self.rate);
        loss
    }

    fn accuracy(&self) -> f64 {
        let count = DIGITS.len() / (PIXELS + 1);
        let right = (count - TEST..count).filter(|&index| {
            let (image, digit) = row(index);
            let hidden: Vec<f32> = self
                .hidden
                .forward(&image)
                .into_iter()
                .map(|unit| unit.max(0.0))
                .collect();
            let scores = self.out.forward(&hidden);
            scores
                .iter()
                .enumerate()
                .max_by(|a, b| a.1.total_cmp(b.1))
                .is_some_and(|(best, _)| best == digit)
        });
        right.count() as f64 / TEST as f64
    }
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let highest = scores.iter().copied().fold(f32::MIN, f32::max);
    let powers: Vec<f32> = scores.iter().map(|score| (score - highest).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

struct Arguments {
    directory: String,
    epochs: u64,
    workers: usize,
    save_every: u64,
    /// Milliseconds that each step takes at least, for those who want to kill it in time.
    step_ms: u64,
}

fn arguments() -> Arguments {
    let mut arguments = Arguments {
        directory: "runs/plain".to_owned(),
        epochs: 30,
        workers: 3,
        save_every: 20,
        step_ms: 0,
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
            "--step-ms" => arguments.step_ms = number(),
            _ => arguments.directory = word,
        }
    }
    arguments
}

fn train(arguments: &Arguments) -> Result<()> {
    let mut net = Net::new(SEED);
    let mut loader = Loader::new(Shifted, BATCH)
        .shuffled()
        .workers(arguments.workers)
        .digested(|batch| {
            Fingerprint::of(
                &batch
                    .iter()
                    .flat_map(|(i, _)| i)
                    .flat_map(|p| p.to_le_bytes())
                    .collect::<Vec<_>>(),
            )
        });
    let mut training = Training::at(&arguments.directory)
        .seed(SEED)
        .epochs(arguments.epochs)
        .policy(Policy::every_steps(arguments.save_every))
        .start(&mut net)?;
    training.notes().iter().for_each(|note| eprintln!("{note}"));
    eprintln!("life {} starts at step {}", training.life(), training.step());
    while let Some(epoch) = training.next_epoch(&mut net)? {
        while let Some(mut step) = training.next_step(&mut loader)? {
            let batch = step.take();
            let loss = net.train(&batch, &mut step.draws("dropout"));
            step.log("loss", f64::from(loss));
            std::thread::sleep(Duration::from_millis(arguments.step_ms));
            step.commit(&mut net)?;
        }
        net.rate *= 0.9;
        let accuracy = net.accuracy();
        training.log("accuracy", accuracy);
        println!("epoch {epoch}: accuracy {accuracy:.4}");
    }
    let numbers = net
        .hidden
        .weight
        .iter()
        .chain(&net.hidden.bias)
        .chain(&net.out.weight)
        .chain(&net.out.bias);
    let bytes: Vec<u8> = numbers.flat_map(|number| number.to_le_bytes()).collect();
    println!("{} steps, weights {}", training.step(), Fingerprint::of(&bytes));
    Ok(())
}

fn main() -> ExitCode {
    let result = train(&arguments());
    if let Err(error) = &result {
        eprintln!("{error}");
        error.hint().iter().for_each(|hint| eprintln!("hint: {hint}"));
    }
    exit_code(&result)
}
