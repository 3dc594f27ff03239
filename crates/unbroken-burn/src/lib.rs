//! Exact resume for Burn: a training that is killed goes on bit for bit, in a loop of your own or under Burn's Learner.
//!
//! Touches: nothing by itself; the run is [`unbroken::train::Training`]'s. State is named by module path (Burn's own
//! records are keyed by random parameter ids), batch norm's statistics are brought up to date before they are read
//! (Burn's records are one update behind), the device's generator is keyed before each step, and batches come in an
//! order that no thread's speed can change.
//!
//! ```no_run
//! # use burn::{module::Module, nn::{Linear, LinearConfig}, optim::AdamWConfig, tensor::{Device, Tensor}};
//! # use unbroken::train::{Failure, Loader, Sample, Source, Training};
//! # use unbroken_burn::{DeviceGenerator, Trained};
//! # struct Data;
//! # impl Source for Data {
//! #     type Item = f32;
//! #     fn len(&self) -> u64 { 100 }
//! #     fn at(&self, sample: &Sample) -> Result<f32, Failure> { Ok(sample.index as f32) }
//! # }
//! # fn main() -> unbroken::Result<()> {
//! let device = Device::default().autodiff();
//! let net: Linear = LinearConfig::new(1, 1).init(&device);
//! let mut trained = Trained::new(net, AdamWConfig::new().init(), 1e-3);
//! let mut loader = Loader::new(Data, 10).shuffled().workers(3);
//! let mut training = Training::at("runs/line")
//!     .epochs(20)
//!     .generator("device", DeviceGenerator::new(&device))
//!     .start(&mut trained)?;
//! while training.next_epoch(&mut trained)?.is_some() {
//!     while let Some(mut step) = training.next_step(&mut loader)? {
//!         let numbers = Tensor::<1>::from_floats(step.take().as_slice(), &device).reshape([-1, 1]);
//!         let loss = (trained.model.forward(numbers.clone()) - numbers).powi_scalar(2).mean();
//!         step.log("loss", loss.clone().into_scalar::<f32>().into());
//!         trained.step(loss.backward());
//!         step.commit(&mut trained)?;
//!     }
//! }
//! # Ok(())
//! # }
//! ```

pub mod accumulator;
mod dtype;
#[cfg(feature = "learner")]
pub mod learner;
mod loader;
pub mod module;
pub mod optimizer;
pub mod scheduler;
pub mod torch;
mod trained;

pub use loader::{DatasetSource, DeviceGenerator, ExactLoader};
pub use trained::Trained;
