//! Burn's data sets and loaders over the exact ones, and the device's generator.
//!
//! Touches: the device's generator, which Burn keeps once for the whole process: keyed before each batch is handed out.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::data::dataset::{Dataset, DatasetError};
use burn::tensor::Device;
use unbroken::Result;
use unbroken::key::derive_key;
use unbroken::train::{Failure, Loader, Pass, Reseed, Sample, Source};

/// A device's generator, which Burn can seed and not read.
#[derive(Clone, Debug)]
pub struct DeviceGenerator(Device);

impl DeviceGenerator {
    /// The generator of this device.
    pub fn new(device: &Device) -> DeviceGenerator {
        DeviceGenerator(device.clone())
    }
}

impl Reseed for DeviceGenerator {
    fn reseed(&mut self, key: [u8; 32]) -> Result<()> {
        self.0.seed(u64::from_le_bytes(
            key[..8].try_into().expect("eight of 32 bytes"),
        ));
        Ok(())
    }
}

/// A Burn data set as a source of samples. Whatever it draws at random is not exact: it has no key to draw from.
#[derive(Clone, Copy, Debug)]
pub struct DatasetSource<D>(pub D);

impl<D> DatasetSource<D> {
    /// The samples of a data set with this type of item.
    pub fn of<I>(dataset: D) -> impl Source<Item = I>
    where
        D: Dataset<I>,
        I: Send,
    {
        struct Typed<D, I>(D, std::marker::PhantomData<fn() -> I>);
        impl<D: Dataset<I>, I: Send> Source for Typed<D, I> {
            type Item = I;
            fn len(&self) -> u64 {
                self.0.len() as u64
            }
            fn at(&self, sample: &Sample) -> std::result::Result<I, Failure> {
                Ok(self.0.get(sample.index as usize)?)
            }
        }
        Typed(dataset, std::marker::PhantomData)
    }
}

type Build<B> = dyn Fn(Device, Range<u64>) -> Loader<B> + Send + Sync;

/// A loader for Burn's own training loops: the same batches for any number of workers, each epoch in an order of its
/// own that the seed alone decides, the device's generator keyed before each batch.
///
/// Each call of `iter` is the next epoch, as Burn's loops call it.
pub struct ExactLoader<B> {
    build: Arc<Build<B>>,
    loader: Loader<B>,
    range: Range<u64>,
    seed: u64,
    epoch: Arc<AtomicU64>,
    device: Device,
    /// Whether batches are trained on: evaluation leaves the generator alone.
    keys_device: bool,
}

impl<B: Send + 'static> ExactLoader<B> {
    /// Batches of this many samples, made by `batcher` on the loader's threads. `configure` says how they are to come:
    /// `|loader| loader.shuffled().workers(3)`.
    pub fn new<S>(
        source: S,
        batcher: impl Batcher<S::Item, B> + 'static,
        batch: u64,
        device: &Device,
        configure: impl Fn(Loader<B>) -> Loader<B> + Send + Sync + 'static,
    ) -> ExactLoader<B>
    where
        S: Source + 'static,
    {
        let (source, batcher) = (Arc::new(source), Arc::new(batcher));
        let range = 0..source.len();
        let build = move |device: Device, range: Range<u64>| {
            let part = Part {
                source: Arc::clone(&source),
                range,
            };
            let batcher = Arc::clone(&batcher);
            configure(Loader::batched(part, batch, move |items| {
                Ok(batcher.batch(items, &device))
            }))
        };
        let loader = build(device.clone(), range.clone());
        ExactLoader {
            build: Arc::new(build),
            loader,
            range,
            seed: 0,
            epoch: Arc::default(),
            device: device.clone(),
            keys_device: false,
        }
    }

    /// For training: orders and generators come from this seed, and the first epoch has this number, counted from 0.
    pub fn training(self, seed: u64, first_epoch: u64) -> ExactLoader<B> {
        ExactLoader {
            seed,
            epoch: Arc::new(AtomicU64::new(first_epoch)),
            keys_device: true,
            ..self
        }
    }

    /// The batches without Burn, for a loop of one's own.
    pub fn loader(&self) -> Loader<B> {
        self.loader.clone()
    }

    fn part(&self, device: &Device, range: Range<u64>) -> ExactLoader<B> {
        ExactLoader {
            build: Arc::clone(&self.build),
            loader: (self.build)(device.clone(), range.clone()),
            range,
            epoch: Arc::clone(&self.epoch),
            device: device.clone(),
            ..*self
        }
    }
}

/// Some of a source's samples.
struct Part<S> {
    source: Arc<S>,
    range: Range<u64>,
}

impl<S: Source> Source for Part<S> {
    type Item = S::Item;

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn at(&self, sample: &Sample) -> std::result::Result<S::Item, Failure> {
        self.source
            .at(&sample.with_index(self.range.start + sample.index))
    }
}

impl<B: Send + 'static> DataLoader<B> for ExactLoader<B> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<B> + 'a> {
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed);
        let pass = self.loader.pass(self.seed, epoch, 0);
        Box::new(Batches {
            loader: self,
            epoch,
            pass: Some(pass),
            done: 0,
        })
    }

    fn num_items(&self) -> usize {
        self.loader.samples() as usize
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<B>> {
        Arc::new(self.part(device, self.range.clone()))
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B>> {
        let (first, end) = (self.range.start + start as u64, self.range.start + end as u64);
        Arc::new(self.part(&self.device, first..end.min(self.range.end)))
    }
}

struct Batches<'l, B> {
    loader: &'l ExactLoader<B>,
    epoch: u64,
    /// The pass, or why it could not be opened.
    pass: Option<Result<Pass<B>>>,
    done: u64,
}

impl<B> Batches<'_, B> {
    fn failed(error: unbroken::Error) -> DatasetError {
        DatasetError::new(error)
    }
}

impl<B> Iterator for Batches<'_, B> {
    type Item = std::result::Result<B, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let pass = match self.pass.take()? {
            Ok(pass) => self.pass.insert(Ok(pass)).as_mut().ok()?,
            Err(error) => return Some(Err(Self::failed(error))),
        };
        let batch = match pass.next()? {
            Ok(batch) => batch,
            Err(error) => return Some(Err(Self::failed(error))),
        };
        self.done = pass.samples_done();
        if self.loader.keys_device {
            let key = derive_key(self.loader.seed, "generator/device", self.epoch, batch.position);
            self.loader.device.seed(u64::from_le_bytes(
                key[..8].try_into().expect("eight of 32 bytes"),
            ));
        }
        Some(Ok(batch.content))
    }
}

impl<B> DataLoaderIterator<B> for Batches<'_, B> {
    fn progress(&self) -> Progress {
        let total = self.loader.loader.samples() as usize;
        Progress::new(self.done as usize, total, Some("items".to_owned()))
    }
}
