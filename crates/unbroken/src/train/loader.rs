//! Batches in an order that depends on nothing but the seed: the same for any number of threads, from any place on.
//!
//! Touches: threads of its own, from the first batch of a pass until the pass is dropped.
//!
//! Thread k of w makes batches k, k + w, ... and puts them into a bounded channel of its own; the consumer goes round
//! the channels. So the order is the plan's, never that of arrival.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::source::{Failure, Sample, Source};
use crate::digest::Fingerprint;
use crate::error::{Error, Result};
use crate::key::Order;
use crate::state::Value;

type Make<T> = dyn Fn(&[Sample]) -> std::result::Result<T, Failure> + Send + Sync;
type DigestOf<T> = dyn Fn(&T) -> Fingerprint + Send + Sync;

/// Batches of one source, epoch after epoch.
///
/// By default in the source's order, made on the asking thread, a short last batch included.
pub struct Loader<T> {
    plan: Plan<T>,
    length: u64,
    shuffled: bool,
    workers: usize,
    ahead: usize,
    /// The pass that a training draws from, and its epoch.
    pub(super) open: Option<(u64, Pass<T>)>,
}

/// What every thread knows.
struct Plan<T> {
    batch: u64,
    drop_last: bool,
    make: Arc<Make<T>>,
    digest: Option<Arc<DigestOf<T>>>,
}

impl<T> Clone for Plan<T> {
    fn clone(&self) -> Plan<T> {
        let Plan {
            batch,
            drop_last,
            ref make,
            ref digest,
        } = *self;
        Plan {
            batch,
            drop_last,
            make: Arc::clone(make),
            digest: digest.clone(),
        }
    }
}

impl<T> Clone for Loader<T> {
    /// The same plan; a pass that is open stays with the original.
    fn clone(&self) -> Loader<T> {
        Loader {
            plan: self.plan.clone(),
            open: None,
            ..*self
        }
    }
}

/// One batch, and what it is made of.
#[derive(Clone, Debug)]
pub struct Batch<T> {
    /// Which batch of its epoch it is, counted from 0.
    pub position: u64,
    /// Numbers of its samples in the source.
    pub indices: Vec<u64>,
    /// The samples.
    pub content: T,
    /// What [`Loader::digested`] made of it.
    pub digest: Option<Fingerprint>,
}

impl<I: Send + 'static> Loader<Vec<I>> {
    /// Batches of this many samples each.
    pub fn new(source: impl Source<Item = I> + 'static, batch: u64) -> Loader<Vec<I>> {
        Loader::batched(source, batch, Ok)
    }
}

impl<T> Loader<T> {
    /// How many samples an epoch has, those of a dropped last batch included.
    pub fn samples(&self) -> u64 {
        self.length
    }

    /// How many samples a batch has, but perhaps the last.
    pub fn batch_size(&self) -> u64 {
        self.plan.batch
    }

    /// How many batches an epoch has.
    pub fn batches(&self) -> u64 {
        if self.plan.drop_last {
            self.length / self.plan.batch
        } else {
            self.length.div_ceil(self.plan.batch)
        }
    }
}

impl<T: Send + 'static> Loader<T> {
    /// Batches that `collate` makes of this many samples each, on the loader's threads.
    ///
    /// `collate` may not draw random numbers: which thread it runs on, and when, is not repeatable.
    pub fn batched<S: Source + 'static>(
        source: S,
        batch: u64,
        collate: impl Fn(Vec<S::Item>) -> std::result::Result<T, Failure> + Send + Sync + 'static,
    ) -> Loader<T> {
        let length = source.len();
        let make = move |samples: &[Sample]| {
            let items: Vec<S::Item> = samples
                .iter()
                .map(|sample| {
                    source
                        .at(sample)
                        .map_err(|failure| format!("sample {}: {failure}", sample.index))
                })
                .collect::<std::result::Result<_, _>>()?;
            collate(items)
        };
        let plan = Plan {
            batch: batch.max(1),
            drop_last: false,
            make: Arc::new(make),
            digest: None,
        };
        Loader {
            plan,
            length,
            shuffled: false,
            workers: 0,
            ahead: 2,
            open: None,
        }
    }

    /// In another order each epoch, which the seed alone decides.
    pub fn shuffled(self) -> Loader<T> {
        Loader {
            shuffled: true,
            ..self
        }
    }

    /// Makes batches on this many threads; 0 is the asking thread. Changes no number.
    pub fn workers(self, workers: usize) -> Loader<T> {
        Loader { workers, ..self }
    }

    /// Lets each thread be this many batches ahead, at least one. Changes no number.
    pub fn ahead(self, batches: usize) -> Loader<T> {
        Loader {
            ahead: batches.max(1),
            ..self
        }
    }

    /// Leaves a short last batch out.
    pub fn drop_last(mut self) -> Loader<T> {
        self.plan.drop_last = true;
        self
    }

    /// Puts a digest of each batch's content into the journal, taken on the loader's threads.
    pub fn digested(mut self, digest: impl Fn(&T) -> Fingerprint + Send + Sync + 'static) -> Loader<T> {
        self.plan.digest = Some(Arc::new(digest));
        self
    }

    /// What may not change between lives, by name.
    pub(super) fn identity(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("samples", self.length.into()),
            ("batch", self.plan.batch.into()),
            ("drop_last", self.plan.drop_last.into()),
            ("shuffled", self.shuffled.into()),
        ]
    }

    /// The batches of one epoch from position `from` on. Costs the same from anywhere.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the source is too long for an order.
    pub fn pass(&self, seed: u64, epoch: u64, from: u64) -> Result<Pass<T>> {
        let order = if self.shuffled {
            Some(Order::new(seed, epoch, self.length)?)
        } else {
            None
        };
        let maker = Maker {
            plan: self.plan.clone(),
            order,
            seed,
            epoch,
            length: self.length,
            batches: self.batches(),
        };
        let next = from.min(maker.batches);
        let left = maker.batches - next;
        let workers = self.workers.min(usize::try_from(left).unwrap_or(usize::MAX));
        let maker = Arc::new(maker);
        let lanes = (0..workers)
            .map(|worker| {
                Lane::open(
                    Arc::clone(&maker),
                    next + worker as u64,
                    workers as u64,
                    self.ahead,
                )
            })
            .collect::<Result<VecDeque<_>>>()?;
        Ok(Pass {
            maker,
            lanes,
            next,
            failed: false,
        })
    }
}

/// Makes any batch of one epoch.
struct Maker<T> {
    plan: Plan<T>,
    order: Option<Order>,
    seed: u64,
    epoch: u64,
    length: u64,
    batches: u64,
}

impl<T> Maker<T> {
    fn samples(&self, position: u64) -> Result<Vec<Sample>> {
        let start = position * self.plan.batch;
        let stop = start.saturating_add(self.plan.batch).min(self.length);
        (start..stop)
            .map(|position| {
                let index = match &self.order {
                    Some(order) => order.at(position)?,
                    None => position,
                };
                Ok(Sample {
                    epoch: self.epoch,
                    position,
                    index,
                    seed: self.seed,
                })
            })
            .collect()
    }

    /// The batch at a position. A panic of the program's code becomes an error that says where.
    fn batch(&self, position: u64) -> Result<Batch<T>> {
        let failed = |what: String| Error::Data {
            epoch: self.epoch,
            position,
            what,
        };
        let samples = self.samples(position)?;
        let made = catch_unwind(AssertUnwindSafe(|| {
            let content = (self.plan.make)(&samples)?;
            let digest = self.plan.digest.as_ref().map(|digest| digest(&content));
            Ok((content, digest))
        }));
        let made: std::result::Result<_, Failure> =
            made.map_err(|panic| failed(format!("panicked: {}", panic_text(panic.as_ref()))))?;
        let (content, digest) = made.map_err(|failure| failed(failure.to_string()))?;
        let indices = samples.iter().map(|sample| sample.index).collect();
        Ok(Batch {
            position,
            indices,
            content,
            digest,
        })
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// One thread and its channel.
struct Lane<T> {
    /// Behind a mutex that nobody locks, so that a loader can be shared between threads that do not draw from it.
    channel: Option<Mutex<Receiver<Result<Batch<T>>>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Lane<T> {
    fn open(maker: Arc<Maker<T>>, first: u64, step: u64, ahead: usize) -> Result<Lane<T>> {
        let (sender, channel) = sync_channel(ahead);
        let thread = std::thread::Builder::new()
            .name(format!("unbroken-loader-{first}"))
            .spawn(move || fill(&maker, first, step, &sender))
            .map_err(|error| Error::Unsupported {
                what: format!("another thread for the loader ({error})"),
            })?;
        Ok(Lane {
            channel: Some(Mutex::new(channel)),
            thread: Some(thread),
        })
    }
}

/// Sends a lane's batches until they are over, one fails, or nobody listens.
fn fill<T>(maker: &Maker<T>, first: u64, step: u64, sender: &SyncSender<Result<Batch<T>>>) {
    let mut position = first;
    while position < maker.batches {
        let batch = maker.batch(position);
        let failed = batch.is_err();
        if sender.send(batch).is_err() || failed {
            return;
        }
        position += step;
    }
}

impl<T> Drop for Lane<T> {
    fn drop(&mut self) {
        // The channel first: a thread that waits to send must hear that nobody listens.
        drop(self.channel.take());
        if let Some(thread) = self.thread.take() {
            // Its panics are errors already; there is nothing to hear from it.
            let _ = thread.join();
        }
    }
}

/// The batches of one epoch that are left.
pub struct Pass<T> {
    maker: Arc<Maker<T>>,
    /// The lane whose turn it is comes first.
    lanes: VecDeque<Lane<T>>,
    next: u64,
    failed: bool,
}

impl<T> Pass<T> {
    /// Position of the batch that comes next.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// How many samples were in the batches up to here, those before a resume included.
    pub fn samples_done(&self) -> u64 {
        (self.next * self.maker.plan.batch).min(self.maker.length)
    }
}

impl<T> Iterator for Pass<T> {
    type Item = Result<Batch<T>>;

    fn next(&mut self) -> Option<Result<Batch<T>>> {
        if self.failed || self.next >= self.maker.batches {
            return None;
        }
        let batch = match self.lanes.front_mut() {
            None => self.maker.batch(self.next),
            Some(lane) => {
                let channel = lane.channel.as_mut().expect("an open lane has its channel");
                let channel = channel
                    .get_mut()
                    .expect("nobody locks it, so nobody panics while holding it");
                channel.recv().unwrap_or_else(|_| {
                    let what = "a thread of the loader ended early".to_owned();
                    Err(Error::Data {
                        epoch: self.maker.epoch,
                        position: self.next,
                        what,
                    })
                })
            }
        };
        self.lanes.rotate_left(usize::from(!self.lanes.is_empty()));
        self.failed = batch.is_err();
        self.next += 1;
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Squares(u64);

    impl Source for Squares {
        type Item = (u64, u64);

        fn len(&self) -> u64 {
            self.0
        }

        fn at(&self, sample: &Sample) -> std::result::Result<(u64, u64), Failure> {
            match sample.index {
                90 => Err("the file is gone".into()),
                91 => panic!("index 91 has no square"),
                index => Ok((index * index, sample.draws().word())),
            }
        }
    }

    type Squared = Vec<(u64, u64)>;

    fn contents(loader: &Loader<Vec<(u64, u64)>>, from: u64) -> Vec<(Vec<u64>, Squared)> {
        let pass = loader.pass(5, 2, from).unwrap();
        pass.map(|batch| batch.map(|batch| (batch.indices, batch.content)).unwrap())
            .collect()
    }

    proptest! {
        #[test]
        fn any_number_of_workers_from_any_place_gives_the_same_batches(
            length in 0u64..90, batch in 1u64..20, workers in 0usize..5, ahead in 1usize..4, from in 0u64..95,
            drop_last: bool,
        ) {
            let plain = Loader::new(Squares(length), batch).shuffled();
            let plain = if drop_last { plain.drop_last() } else { plain };
            let threaded = plain.clone().workers(workers).ahead(ahead);
            let whole = contents(&plain, 0);
            prop_assert_eq!(whole.len() as u64, plain.batches());
            let skip = usize::try_from(from).unwrap().min(whole.len());
            prop_assert_eq!(contents(&threaded, from), &whole[skip..]);
        }
    }

    #[test]
    fn an_epoch_has_every_sample_once_and_its_own_order() {
        let loader = Loader::new(Squares(50), 8).shuffled();
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let pass = loader.pass(1, epoch, 0).unwrap();
            let indices: Vec<u64> = pass.flat_map(|batch| batch.unwrap().indices).collect();
            let mut sorted = indices.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
            orders.push(indices);
        }
        assert_ne!(orders[0], orders[1]);
        assert_ne!(orders[1], orders[2]);
    }

    #[test]
    fn a_failing_sample_ends_the_pass_with_its_place() {
        for workers in [0, 3] {
            let mut pass = Loader::new(Squares(91), 10)
                .workers(workers)
                .pass(1, 4, 8)
                .unwrap();
            assert!(pass.next().unwrap().is_ok());
            let error = pass.next().unwrap().unwrap_err();
            assert_eq!(
                error.to_string(),
                "batch 9 of epoch 4 cannot be made: sample 90: the file is gone"
            );
            assert!(pass.next().is_none());
        }
    }

    #[test]
    fn a_panicking_worker_becomes_an_error_and_the_process_lives() {
        for workers in [0, 1, 3] {
            let source = |index| {
                Loader::new(Squares(92), 1)
                    .workers(workers)
                    .pass(1, 0, index)
                    .unwrap()
            };
            let error = source(91).next().unwrap().unwrap_err();
            assert_eq!(
                error.to_string(),
                "batch 91 of epoch 0 cannot be made: panicked: index 91 has no square"
            );
        }
    }

    #[test]
    fn dropping_a_pass_early_leaves_no_thread_behind() {
        let source = Arc::new(Squares(90));
        let mut pass = Loader::new(Arc::clone(&source), 1)
            .workers(4)
            .ahead(1)
            .pass(1, 0, 0)
            .unwrap();
        assert!(pass.next().unwrap().is_ok());
        drop(pass);
        assert_eq!(Arc::strong_count(&source), 1);
    }
}
