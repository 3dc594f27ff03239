//! A storage that breaks on request: the n-th operation fails, or nothing works from it on.
//!
//! Touches: the storage that it wraps. Operations are counted from 0, reads included, in the order of their calls.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::{Claim, Input, Output, Storage};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The disk gets full: from the operation on nothing can be written until healed. There is room before.
    NoSpace,
    /// The device fails once.
    Device,
    /// A signal arrives once.
    Interrupted,
    /// A write takes only half of the bytes, at least one; other operations succeed.
    ShortWrite,
    /// No more file descriptors, once.
    TooManyFiles,
    /// The process dies before the operation.
    Crash,
    /// The process dies in the operation: half of a write arrives, other operations are done.
    CrashAfter,
}

#[derive(Debug, Default)]
struct Plan {
    operations: Vec<&'static str>,
    /// What failed: operation and file.
    failed: Vec<(&'static str, String)>,
    fault: Option<(usize, Fault)>,
    crashed: bool,
    /// Whether something had no space.
    full: bool,
    /// Syncs asked of files of which one had failed.
    retried: usize,
}

/// A storage that fails as planned.
#[derive(Clone, Debug)]
pub struct FaultyStorage {
    inner: Arc<dyn Storage>,
    plan: Arc<Mutex<Plan>>,
}

impl FaultyStorage {
    /// Wraps a storage; without a plan everything works.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self {
            inner,
            plan: Arc::default(),
        }
    }

    /// Plans a fault at the `index`-th operation from now on, counting from 0.
    pub fn fail_at(&self, index: usize, fault: Fault) {
        *self.plan() = Plan {
            fault: Some((index, fault)),
            ..Plan::default()
        };
    }

    /// Makes everything work again.
    pub fn heal(&self) {
        *self.plan() = Plan::default();
    }

    /// Returns the names of the operations since the last plan.
    pub fn operations(&self) -> Vec<&'static str> {
        self.plan().operations.clone()
    }

    /// Returns the operations that failed as planned since then, each with the name that it was for.
    pub fn failed(&self) -> Vec<(&'static str, String)> {
        self.plan().failed.clone()
    }

    /// Returns how often a file was synced again after that had failed, since the last plan: each time is a mistake.
    pub fn retried_syncs(&self) -> usize {
        self.plan().retried
    }

    fn output(&self, output: Box<dyn Output>, name: &str) -> Box<dyn Output> {
        Box::new(FaultyOutput {
            output,
            name: name.to_owned(),
            plan: Arc::clone(&self.plan),
            dropped: AtomicBool::new(false),
        })
    }

    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What one operation has to do.
enum Turn {
    Work,
    Half,
    HalfThenDie,
    WorkThenDie,
}

fn dead() -> io::Error {
    io::Error::other("the process is dead")
}

/// Counts one operation and decides what becomes of it.
fn turn(plan: &Mutex<Plan>, operation: &'static str, name: &str) -> io::Result<Turn> {
    let mut plan = plan.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let decided = plan.decide(operation);
    if decided.is_err() {
        plan.failed.push((operation, name.to_owned()));
    }
    decided
}

impl Plan {
    fn decide(&mut self, operation: &'static str) -> io::Result<Turn> {
        if self.crashed {
            return Err(dead());
        }
        let index = self.operations.len();
        self.operations.push(operation);
        let writes = matches!(
            operation,
            "write" | "reserve" | "create" | "create directory" | "rename" | "link"
        );
        match self.fault {
            Some((planned, Fault::NoSpace)) if index >= planned && writes => {
                self.full = true;
                Err(Errno::NOSPC.into())
            }
            Some((planned, fault)) if index == planned => match fault {
                Fault::NoSpace => Ok(Turn::Work),
                Fault::Device => Err(Errno::IO.into()),
                Fault::Interrupted => Err(Errno::INTR.into()),
                Fault::TooManyFiles => Err(Errno::MFILE.into()),
                Fault::ShortWrite if operation == "write" => Ok(Turn::Half),
                Fault::ShortWrite => Ok(Turn::Work),
                Fault::Crash => {
                    self.crashed = true;
                    Err(dead())
                }
                Fault::CrashAfter => {
                    self.crashed = true;
                    Ok(if operation == "write" {
                        Turn::HalfThenDie
                    } else {
                        Turn::WorkThenDie
                    })
                }
            },
            _ => Ok(Turn::Work),
        }
    }
}

/// Does an operation that cannot be done by halves.
fn whole<T>(
    plan: &Mutex<Plan>,
    operation: &'static str,
    name: &str,
    work: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    match turn(plan, operation, name)? {
        Turn::Work | Turn::Half => work(),
        Turn::HalfThenDie | Turn::WorkThenDie => {
            work()?;
            Err(dead())
        }
    }
}

impl Storage for FaultyStorage {
    fn location(&self) -> &Path {
        self.inner.location()
    }

    fn create_dir(&self, name: &str) -> io::Result<()> {
        whole(&self.plan, "create directory", name, || {
            self.inner.create_dir(name)
        })
    }

    fn create_new(&self, name: &str) -> io::Result<Box<dyn Output>> {
        let output = whole(&self.plan, "create", name, || self.inner.create_new(name))?;
        Ok(self.output(output, name))
    }

    fn reuse(&self, name: &str) -> io::Result<Option<Box<dyn Output>>> {
        let output = whole(&self.plan, "reuse", name, || self.inner.reuse(name))?;
        Ok(output.map(|output| self.output(output, name)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Input>> {
        let input = whole(&self.plan, "open", name, || self.inner.open(name))?;
        Ok(Box::new(FaultyInput {
            input,
            name: name.to_owned(),
            plan: Arc::clone(&self.plan),
        }))
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        whole(&self.plan, "rename", to, || self.inner.rename_new(from, to))
    }

    fn rename_over(&self, from: &str, to: &str) -> io::Result<()> {
        whole(&self.plan, "rename", to, || self.inner.rename_over(from, to))
    }

    fn link_new(&self, from: &dyn Storage, name: &str, to: &str) -> io::Result<()> {
        whole(&self.plan, "link", to, || self.inner.link_new(from, name, to))
    }

    fn open_dir(&self, name: &str) -> io::Result<OwnedFd> {
        self.inner.open_dir(name)
    }

    fn sync_dir(&self, name: &str) -> io::Result<()> {
        whole(&self.plan, "sync directory", name, || self.inner.sync_dir(name))
    }

    fn list(&self, name: &str) -> io::Result<Vec<String>> {
        whole(&self.plan, "list", name, || self.inner.list(name))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        whole(&self.plan, "remove", name, || self.inner.remove(name))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        if self.plan().full {
            Ok(4096)
        } else {
            self.inner.free_bytes()
        }
    }

    fn lock(&self, name: &str) -> io::Result<Claim> {
        whole(&self.plan, "lock", name, || self.inner.lock(name))
    }
}

#[derive(Debug)]
struct FaultyOutput {
    output: Box<dyn Output>,
    name: String,
    plan: Arc<Mutex<Plan>>,
    /// Whether a sync failed. As on real systems, the next one then says that all is well, and it is not.
    dropped: AtomicBool,
}

impl Output for FaultyOutput {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let half = &bytes[..bytes.len().div_ceil(2)];
        match turn(&self.plan, "write", &self.name)? {
            Turn::Work | Turn::WorkThenDie => self.output.write_at(offset, bytes),
            Turn::Half => self.output.write_at(offset, half),
            Turn::HalfThenDie => {
                self.output.write_at(offset, half)?;
                Err(dead())
            }
        }
    }

    fn reserve(&self, length: u64) -> io::Result<()> {
        whole(&self.plan, "reserve", &self.name, || self.output.reserve(length))
    }

    fn sync(&self) -> io::Result<()> {
        let outcome = whole(&self.plan, "sync", &self.name, || {
            if self.dropped.load(Ordering::Relaxed) {
                let mut plan = self.plan.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                plan.retried += 1;
                Ok(())
            } else {
                self.output.sync()
            }
        });
        if outcome.is_err() {
            self.dropped.store(true, Ordering::Relaxed);
        }
        outcome
    }
}

#[derive(Debug)]
struct FaultyInput {
    input: Box<dyn Input>,
    name: String,
    plan: Arc<Mutex<Plan>>,
}

impl Input for FaultyInput {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        whole(&self.plan, "read", &self.name, || {
            self.input.read_at(offset, into)
        })
    }

    fn is_cold(&self, offset: u64, length: usize) -> bool {
        self.input.is_cold(offset, length)
    }

    fn fetch(&self, offset: u64, length: usize) {
        self.input.fetch(offset, length);
    }

    fn read_past_cache(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        whole(&self.plan, "read", &self.name, || {
            self.input.read_past_cache(offset, into)
        })
    }

    fn len(&self) -> io::Result<u64> {
        whole(&self.plan, "measure", &self.name, || self.input.len())
    }
}
