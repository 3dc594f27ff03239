//! What a program gives to the loop: samples by number, and generators that can only be seeded.
//!
//! Touches: nothing.

use super::draws::Draws;
use crate::error::Result;
use crate::key;

/// Whatever went wrong in a program's own code.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Samples by number, read from several threads at once.
pub trait Source: Send + Sync {
    /// One sample, ready to be batched.
    type Item: Send;

    /// How many samples there are. The same in every life.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One sample. Whatever is random about it comes from [`Sample::draws`], and nothing else may: which thread asks,
    /// and when, is not repeatable.
    ///
    /// # Errors
    ///
    /// The program's own; it ends the training with the sample's number in the message.
    fn at(&self, sample: &Sample) -> std::result::Result<Self::Item, Failure>;
}

impl<S: Source + ?Sized> Source for std::sync::Arc<S> {
    type Item = S::Item;

    fn len(&self) -> u64 {
        (**self).len()
    }

    fn at(&self, sample: &Sample) -> std::result::Result<S::Item, Failure> {
        (**self).at(sample)
    }
}

/// Which sample is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Epoch counted from 0.
    pub epoch: u64,
    /// Where in the epoch's order it stands, counted from 0.
    pub position: u64,
    /// Its number in the source.
    pub index: u64,
    /// Seed of the loader.
    pub(super) seed: u64,
}

impl Sample {
    /// Its key: a pure function of the run's seed, the epoch and the position (`docs/format.md`, "Keys").
    pub fn key(&self) -> [u8; 32] {
        key::derive_key(self.seed, "sample", self.epoch, self.position)
    }

    /// The same place in the order, and another number: for a source that serves a part of another one.
    pub fn with_index(self, index: u64) -> Sample {
        Sample { index, ..self }
    }

    /// Random numbers of its own.
    pub fn draws(&self) -> Draws {
        Draws::new(self.key())
    }
}

/// A generator whose state cannot be read, only set from a seed.
///
/// It is set before every step and at each epoch's end from a key of its own, so that its draws are a pure function
/// of the run's seed and the place in the run, whatever was drawn before.
pub trait Reseed {
    /// Sets the generator. The same key must give the same draws in every process.
    ///
    /// # Errors
    ///
    /// Whatever keeps the generator from being set; the step does not begin.
    fn reseed(&mut self, key: [u8; 32]) -> Result<()>;
}

impl<F: FnMut([u8; 32]) -> Result<()>> Reseed for F {
    fn reseed(&mut self, key: [u8; 32]) -> Result<()> {
        self(key)
    }
}
