//! Training in Rust, with any framework or none: the traits a program implements, and the loop that is exact.
//!
//! Touches: a run directory through [`crate::run`]; the signal handlers of SIGTERM, SIGINT and SIGUSR1 from
//! [`Options::start`] on; threads of its own while a [`Loader`] is open. Prints nothing and never ends the process.
//!
//! A program gives its state ([`Stateful`]), its samples by number ([`Source`]) and the generators that can only be
//! seeded ([`Reseed`]); [`Training`] hands out steps. The same command starts a run and goes on with it.
//!
//! ```
//! use unbroken::train::{Loader, Policy, Sample, Source, StateReader, StateWriter, Stateful, Training};
//!
//! struct Numbers;
//! impl Source for Numbers {
//!     type Item = f64;
//!     fn len(&self) -> u64 {
//!         10
//!     }
//!     fn at(&self, sample: &Sample) -> Result<f64, unbroken::train::Failure> {
//!         Ok(sample.index as f64 + sample.draws().uniform()) // The same draw for the same sample, in every life.
//!     }
//! }
//!
//! struct Mean(f64);
//! impl Stateful for Mean {
//!     fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> unbroken::Result<()> {
//!         out.value("mean", self.0)
//!     }
//!     fn restore(&mut self, from: &mut StateReader<'_>) -> unbroken::Result<()> {
//!         self.0 = from.float("mean")?;
//!         Ok(())
//!     }
//! }
//!
//! # let directory = tempfile::tempdir().unwrap();
//! # let path = directory.path().join("run");
//! let mut mean = Mean(0.0);
//! let mut loader = Loader::new(Numbers, 2).workers(3).shuffled();
//! let mut training = Training::at(path).seed(1).epochs(2).policy(Policy::every_steps(3)).start(&mut mean)?;
//! while training.next_epoch(&mut mean)?.is_some() {
//!     while let Some(mut step) = training.next_step(&mut loader)? {
//!         for number in step.take() {
//!             mean.0 += 0.1 * (number - mean.0);
//!         }
//!         step.log("mean", mean.0);
//!         step.commit(&mut mean)?;
//!     }
//! }
//! assert_eq!(training.step(), 10);
//! # Ok::<(), unbroken::Error>(())
//! ```

mod draws;
mod full;
mod loader;
mod policy;
mod proving;
mod source;
mod state;
mod stop;
mod training;

pub use draws::Draws;
pub use full::OnFull;
pub use loader::{Batch, Loader, Pass};
pub use policy::Policy;
pub use source::{Failure, Reseed, Sample, Source};
pub use state::{Bytes, Element, StateReader, StateWriter, Stateful, TensorView};
pub use training::{Level, Options, REQUEUE_CODE, Step, Training, exit_code};
