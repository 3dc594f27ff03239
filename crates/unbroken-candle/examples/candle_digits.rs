//! Handwritten digits with candle: kill it at any instant, start the same command again, get the same bits.
//!
//!     cargo run --release -p unbroken-candle --example candle_digits -- runs/candle [EPOCHS]
//!
//! Ends with `accuracy 0.9..., weights ...`: the same digest after any number of kills.

use std::process::ExitCode;

use candle_core::{D, Device, Tensor, Var};
use unbroken::Result;
use unbroken::digest::Fingerprint;
use unbroken::key::derive_key;
use unbroken::train::{Draws, Failure, Loader, Policy, Sample, Source, Training, exit_code};
use unbroken_candle::{AdamW, failed};

const SEED: u64 = 1;
const BATCH: u64 = 32;
const TEST: usize = 297;
const PIXELS: usize = 64;
const HIDDEN: usize = 64;

/// Rows of 64 pixels and a digit; `fixtures/digits/README.md` says where they are from.
static DIGITS: &[u8] = include_bytes!("../../../fixtures/digits/digits.bin");

struct Digits;

impl Source for Digits {
    type Item = ([f32; PIXELS], u32);

    fn len(&self) -> u64 {
        (DIGITS.len() / (PIXELS + 1) - TEST) as u64
    }

    fn at(&self, sample: &Sample) -> std::result::Result<Self::Item, Failure> {
        let (mut image, digit) = row(sample.index as usize);
        let mut draws = sample.draws();
        image
            .iter_mut()
            .for_each(|pixel| *pixel += 0.1 * (draws.uniform() as f32 - 0.5));
        Ok((image, digit))
    }
}

fn row(index: usize) -> ([f32; PIXELS], u32) {
    let row = &DIGITS[index * (PIXELS + 1)..][..PIXELS + 1];
    (
        std::array::from_fn(|pixel| f32::from(row[pixel]) / 16.0),
        u32::from(row[PIXELS]),
    )
}

struct Net {
    weights: [Var; 2],
    biases: [Var; 2],
}

impl Net {
    fn new(optimizer: &mut AdamW) -> Result<Net> {
        let mut draws = Draws::new(derive_key(SEED, "weights", 0, 0));
        let mut layer = |name: &str, inputs: usize, outputs: usize| -> Result<(Var, Var)> {
            let bound = 1.0 / (inputs as f64).sqrt();
            let weight =
                optimizer.variable(&format!("{name}.weight"), &[inputs, outputs], bound, &mut draws)?;
            Ok((
                weight,
                optimizer.variable(&format!("{name}.bias"), &[outputs], bound, &mut draws)?,
            ))
        };
        let ((w1, b1), (w2, b2)) = (layer("hidden", PIXELS, HIDDEN)?, layer("out", HIDDEN, 10)?);
        Ok(Net {
            weights: [w1, w2],
            biases: [b1, b2],
        })
    }

    fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let hidden = images
            .matmul(&self.weights[0])?
            .broadcast_add(&self.biases[0])?
            .relu()?;
        hidden.matmul(&self.weights[1])?.broadcast_add(&self.biases[1])
    }

    fn loss(&self, images: &Tensor, digits: &Tensor) -> candle_core::Result<Tensor> {
        let scores = self.forward(images)?;
        // Softmax by hand: shifted by its highest score, which changes nothing but keeps it finite.
        let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?;
        let logs = scores.broadcast_sub(&scores.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
        logs.gather(&digits.unsqueeze(1)?, 1)?.mean_all()?.neg()
    }
}

fn tensors(items: &[([f32; PIXELS], u32)]) -> candle_core::Result<(Tensor, Tensor)> {
    let images: Vec<f32> = items.iter().flat_map(|(image, _)| *image).collect();
    let digits: Vec<u32> = items.iter().map(|(_, digit)| *digit).collect();
    let count = items.len();
    Ok((
        Tensor::from_vec(images, (count, PIXELS), &Device::Cpu)?,
        Tensor::from_vec(digits, count, &Device::Cpu)?,
    ))
}

fn accuracy(net: &Net) -> candle_core::Result<f64> {
    let count = DIGITS.len() / (PIXELS + 1);
    let items: Vec<_> = (count - TEST..count).map(row).collect();
    let (images, digits) = tensors(&items)?;
    let right = net
        .forward(&images)?
        .argmax(D::Minus1)?
        .eq(&digits)?
        .to_vec1::<u8>()?;
    Ok(right.iter().map(|right| f64::from(*right)).sum::<f64>() / TEST as f64)
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().unwrap_or_else(|| "runs/candle".to_owned());
    let epochs = arguments.next().and_then(|word| word.parse().ok()).unwrap_or(20);
    let mut optimizer = AdamW::new(3e-3, 1e-2);
    let net = Net::new(&mut optimizer)?;
    let mut loader = Loader::new(Digits, BATCH).shuffled().workers(2);
    let mut training = Training::at(directory)
        .seed(SEED)
        .epochs(epochs)
        .policy(Policy::every_steps(20))
        .start(&mut optimizer)?;
    eprintln!("life {} starts at step {}", training.life(), training.step());
    while training.next_epoch(&mut optimizer)?.is_some() {
        while let Some(mut step) = training.next_step(&mut loader)? {
            let (images, digits) = tensors(&step.take()).map_err(failed)?;
            let loss = net.loss(&images, &digits).map_err(failed)?;
            step.log("loss", loss.to_scalar::<f32>().map_err(failed)?.into());
            optimizer.update(&loss.backward().map_err(failed)?)?;
            step.commit(&mut optimizer)?;
        }
        let accuracy = accuracy(&net).map_err(failed)?;
        training.log("accuracy", accuracy);
    }
    let weights = net
        .weights
        .iter()
        .chain(&net.biases)
        .map(|var| var.flatten_all()?.to_vec1::<f32>());
    let weights: Vec<Vec<f32>> = weights.collect::<candle_core::Result<_>>().map_err(failed)?;
    let bytes: Vec<u8> = weights
        .concat()
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    println!(
        "accuracy {:.4}, weights {}",
        accuracy(&net).map_err(failed)?,
        Fingerprint::of(&bytes)
    );
    Ok(())
}

fn main() -> ExitCode {
    let result = run();
    if let Err(error) = &result {
        eprintln!("{error}");
        error.hint().iter().for_each(|hint| eprintln!("hint: {hint}"));
    }
    exit_code(&result)
}
