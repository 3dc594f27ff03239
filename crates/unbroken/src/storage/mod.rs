//! Storage: the few operations on named files that a run needs, and nothing about what the bytes mean.
//!
//! Touches: what its implementations touch: [`disk`] a directory, [`memory`] nothing, [`faulty`] another storage.
//! Names are relative to the storage's root: `run.toml` or `checkpoints/NAME`, never deeper, never `..`.

pub mod disk;
pub mod faulty;
mod lock;
pub mod memory;
pub mod probe;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// What the address, the place in the file and the length of a read or write past the system's cache are multiples of.
pub const DIRECT_ALIGNMENT: usize = 4096;

/// One file being written, at any position, from any thread.
pub trait Output: Send + Sync + fmt::Debug {
    /// Writes some of `bytes` at `offset` and returns how many; may be fewer, may be interrupted.
    ///
    /// # Durability
    ///
    /// None. After a power cut each byte written since the last sync is what it was before, or what was written, or
    /// zero where the file has grown; each for itself.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;

    /// Makes the file exactly `length` bytes long and sets the space for all of it aside, where the file system can.
    /// Bytes that are new are zero.
    ///
    /// # Durability
    ///
    /// None. After a power cut the length may be what it was before.
    fn reserve(&self, length: u64) -> io::Result<()>;

    /// Makes what was written, and the length, survive a power cut. Must not be called again after it failed: the
    /// operating system may have dropped the pages and would then report success.
    fn sync(&self) -> io::Result<()>;
}

/// One file being read, at any position, from any thread.
pub trait Input: Send + Sync + fmt::Debug {
    /// Reads some bytes at `offset` and returns how many; 0 at the end of the file.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize>;

    /// Whether this part comes faster past the system's cache, which does not have it. Costs little.
    fn is_cold(&self, offset: u64, length: usize) -> bool {
        let _ = (offset, length);
        false
    }

    /// Asks the system to bring a part into its cache, and does not wait for it. Only advice.
    fn fetch(&self, offset: u64, length: usize) {
        let _ = (offset, length);
    }

    /// Reads like [`Input::read_at`], past the system's cache where that can be. The memory's address and length and
    /// the place in the file are multiples of [`DIRECT_ALIGNMENT`].
    fn read_past_cache(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.read_at(offset, into)
    }

    /// Returns the length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file holds nothing.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// The one writer's claim on a storage. Dropping it gives the claim back.
pub trait Lock: Send + Sync + fmt::Debug {
    /// Fails if the claim is no longer this process's: taken over, or its file replaced.
    fn check(&self) -> io::Result<()>;
}

/// What an attempt to lock came to.
#[derive(Debug)]
pub enum Claim {
    /// The storage is ours until the lock is dropped or the process dies.
    Held(Box<dyn Lock>),
    /// Somebody else has it: the process id that the lock's file names, if it names one.
    Refused(Option<u32>),
}

/// Named files with the operations that durable, never-overwriting writing is made of.
///
/// Operations are primitive: they may be interrupted and may write less than asked. [`Directory`] retries and says
/// what failed where.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Where this is, for messages and for people.
    fn location(&self) -> &Path;

    /// Makes a directory below the root; one that is there already is fine.
    ///
    /// # Durability
    ///
    /// As a name in its parent: with the parent's [`Storage::sync_dir`].
    fn create_dir(&self, name: &str) -> io::Result<()>;

    /// Makes an empty file and opens it for writing; `AlreadyExists` if the name is taken.
    ///
    /// # Durability
    ///
    /// The name survives a power cut after [`Storage::sync_dir`], the bytes after [`Output::sync`]; neither waits for
    /// the other.
    fn create_new(&self, name: &str) -> io::Result<Box<dyn Output>>;

    /// Opens a file that is there for writing over its bytes, which keeps its blocks on the disk. `None` where
    /// anybody else could see the bytes change: the file has another name, or somebody has it open; or where that
    /// cannot be known. The caller has made sure that its bytes are nobody's any more, also after a power cut.
    ///
    /// # Durability
    ///
    /// Changes nothing by itself. The name that the file had before the last [`Storage::sync_dir`] may lead to it
    /// after a power cut, and then to what was written over its bytes.
    fn reuse(&self, name: &str) -> io::Result<Option<Box<dyn Output>>>;

    /// Opens a plain file for reading; follows no link and refuses whatever is not a plain file.
    fn open(&self, name: &str) -> io::Result<Box<dyn Input>>;

    /// Gives a file another name; `AlreadyExists` if that name is taken. Never replaces.
    ///
    /// # Durability
    ///
    /// The new name survives a power cut after [`Storage::sync_dir`] of its directory, the old one is gone for good
    /// after that of its own. Before, there may be both, either or, between two directories, neither.
    fn rename_new(&self, from: &str, to: &str) -> io::Result<()>;

    /// Gives a file another name, in the place of what has it now: at no instant is there nothing under that name.
    ///
    /// Only for a repair, of which the replaced file has a second name already. A storage that has no such call takes two.
    ///
    /// # Durability
    ///
    /// That of [`Storage::rename_new`]; before, either file may be under the name.
    fn rename_over(&self, from: &str, to: &str) -> io::Result<()> {
        match self.remove(to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed?,
        }
        self.rename_new(from, to)
    }

    /// Gives a file of another storage a second name here, its bytes shared; `AlreadyExists` if the name is taken.
    ///
    /// `Unsupported` where the two have no bytes that can be shared.
    fn link_new(&self, from: &dyn Storage, name: &str, to: &str) -> io::Result<()> {
        let _ = (from, name, to);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Opens one of its directories (`""` is the root) for calls that take two; `Unsupported` where it has none.
    fn open_dir(&self, name: &str) -> io::Result<OwnedFd> {
        let _ = name;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes the names in a directory (`""` is the root) survive a power cut, and those that are gone from it be gone.
    fn sync_dir(&self, name: &str) -> io::Result<()>;

    /// Returns the names in a directory (`""` is the root), in no order.
    fn list(&self, name: &str) -> io::Result<Vec<String>>;

    /// Removes a file (or a link, never what it leads to).
    ///
    /// # Durability
    ///
    /// The name may come back after a power cut until [`Storage::sync_dir`].
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Returns how many bytes can still be written.
    fn free_bytes(&self) -> io::Result<u64>;

    /// Tries to become the one writer, without waiting. `name` is the lock's file.
    fn lock(&self, name: &str) -> io::Result<Claim>;
}

/// Splits `dir/file` into its directory (`""` for the root) and its last part, refusing names that lead elsewhere.
fn split(name: &str) -> io::Result<(&str, &str)> {
    let (dir, file) = name.rsplit_once('/').unwrap_or(("", name));
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['/', '\0']);
    if !plain(file) || !(dir.is_empty() || plain(dir)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("`{name}` is not a plain name"),
        ));
    }
    Ok((dir, file))
}

/// Calls `attempt` until it is not interrupted by a signal.
fn uninterrupted<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            done => return done,
        }
    }
}

/// A storage with manners: retries what was interrupted or cut short, and names call and path in every error.
#[derive(Clone, Debug)]
pub struct Directory {
    storage: Arc<dyn Storage>,
}

impl Directory {
    /// Wraps a storage.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage }
    }

    /// Where this is.
    pub fn location(&self) -> &Path {
        self.storage.location()
    }

    /// The path of a name, for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() {
            self.location().to_path_buf()
        } else {
            self.location().join(name)
        }
    }

    fn told<T>(&self, doing: &'static str, name: &str, outcome: io::Result<T>) -> Result<T> {
        outcome.map_err(|source| Error::io(doing, self.path(name), source))
    }

    /// Makes a directory below the root; one that is there already is fine.
    pub fn create_dir(&self, name: &str) -> Result<()> {
        self.told(
            "create directory",
            name,
            uninterrupted(|| self.storage.create_dir(name)),
        )
    }

    /// Makes an empty file and opens it for writing.
    ///
    /// # Errors
    ///
    /// `Io` with `AlreadyExists` if the name is taken.
    pub fn create_new(&self, name: &str) -> Result<File> {
        let output = self.told("create", name, uninterrupted(|| self.storage.create_new(name)))?;
        Ok(self.file(output, name))
    }

    /// Opens a file for writing over its bytes; `None` where somebody else could see them change.
    pub fn reuse(&self, name: &str) -> Result<Option<File>> {
        let output = self.told("reuse", name, uninterrupted(|| self.storage.reuse(name)))?;
        Ok(output.map(|output| self.file(output, name)))
    }

    fn file(&self, output: Box<dyn Output>, name: &str) -> File {
        File {
            output: output.into(),
            directory: self.clone(),
            name: name.to_owned(),
            written: 0,
        }
    }

    /// Opens a plain file for reading.
    pub fn open(&self, name: &str) -> Result<Source> {
        let input = self.told("open", name, uninterrupted(|| self.storage.open(name)))?;
        Ok(Source {
            input,
            directory: self.clone(),
            name: name.to_owned(),
        })
    }

    /// Gives a file another name, never replacing one.
    pub fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        self.told(
            "rename into place",
            to,
            uninterrupted(|| self.storage.rename_new(from, to)),
        )
    }

    /// Gives a file another name, in the place of what has it now. See [`Storage::rename_over`].
    pub fn rename_over(&self, from: &str, to: &str) -> Result<()> {
        self.told(
            "rename into place",
            to,
            uninterrupted(|| self.storage.rename_over(from, to)),
        )
    }

    /// Gives a file of another directory a second name here, its bytes shared; never replaces.
    pub fn link_new(&self, from: &Directory, name: &str, to: &str) -> Result<()> {
        self.told(
            "link into place",
            to,
            uninterrupted(|| self.storage.link_new(&*from.storage, name, to)),
        )
    }

    /// Makes the names in a directory survive a power cut. Never retried after a failure other than an interruption.
    pub fn sync_dir(&self, name: &str) -> Result<()> {
        self.told(
            "sync directory",
            name,
            uninterrupted(|| self.storage.sync_dir(name)),
        )
    }

    /// Returns the names in a directory, sorted.
    pub fn list(&self, name: &str) -> Result<Vec<String>> {
        let mut names = self.told("list", name, uninterrupted(|| self.storage.list(name)))?;
        names.sort();
        Ok(names)
    }

    /// Like [`Directory::list`], with no names where there is no such directory.
    pub fn list_if_there(&self, name: &str) -> Result<Vec<String>> {
        match self.list(name) {
            Err(error) if not_found(&error) => Ok(Vec::new()),
            listed => listed,
        }
    }

    /// Removes a file; one that is gone already is fine.
    pub fn remove(&self, name: &str) -> Result<()> {
        match uninterrupted(|| self.storage.remove(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => self.told("remove", name, outcome),
        }
    }

    /// Returns how many bytes can still be written.
    pub fn free_bytes(&self) -> Result<u64> {
        self.told(
            "measure free space",
            "",
            uninterrupted(|| self.storage.free_bytes()),
        )
    }

    /// Tries to become the one writer, without waiting.
    pub fn lock(&self, name: &str) -> Result<Claim> {
        self.told("lock", name, uninterrupted(|| self.storage.lock(name)))
    }

    /// Reads a whole file of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// `Io` with `FileTooLarge` if it is longer; nothing is allocated for it then.
    pub fn read_all(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        self.open(name)?.read_all(limit)
    }
}

/// Memory for what a file says it has; a file with holes may say more than there is.
pub(crate) fn zeros(length: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
    // Asked for first, because a vector of zeros that the system refuses ends the process.
    let refused = Vec::<u8>::new().try_reserve_exact(length).is_err();
    if refused {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    Ok(vec![0; length])
}

/// Whether an error says that a file or directory is not there.
pub(crate) fn not_found(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

/// Whether an error says that a name is taken.
pub(crate) fn already_exists(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
}

/// A file being written through a [`Directory`].
#[derive(Debug)]
pub struct File {
    output: Arc<dyn Output>,
    directory: Directory,
    name: String,
    written: u64,
}

impl File {
    /// The name it was created under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path, for messages.
    pub fn path(&self) -> PathBuf {
        self.directory.path(&self.name)
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes all of `bytes` behind what this wrote before. After an error, how many arrived is in [`File::written`].
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        let outcome = self.write_from(self.written, bytes, &mut done);
        self.written += done;
        outcome
    }

    /// Writes all of `bytes` at `offset`. Threads may do so at once, each in a place of its own.
    pub fn write_all_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_from(offset, bytes, &mut 0)
    }

    fn write_from(&self, offset: u64, bytes: &[u8], done: &mut u64) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let outcome = match uninterrupted(|| self.output.write_at(offset + *done, rest)) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                outcome => outcome,
            };
            let count = self.directory.told("write", &self.name, outcome)?;
            rest = &rest[count..];
            *done += count as u64;
        }
        Ok(())
    }

    /// Makes the file exactly `length` bytes long, their space set aside.
    pub fn reserve(&self, length: u64) -> Result<()> {
        self.directory.told(
            "reserve space",
            &self.name,
            uninterrupted(|| self.output.reserve(length)),
        )
    }

    /// Makes what was written survive a power cut. An error is final: write another file.
    pub fn sync(&self) -> Result<()> {
        self.syncer().sync()
    }

    /// Returns a handle that syncs this file while it is written further.
    pub fn syncer(&self) -> Syncer {
        let (output, directory) = (Arc::clone(&self.output), self.directory.clone());
        Syncer {
            output,
            directory,
            name: self.name.clone(),
        }
    }
}

/// Syncs a [`File`] from elsewhere.
#[derive(Debug)]
pub struct Syncer {
    output: Arc<dyn Output>,
    directory: Directory,
    name: String,
}

impl Syncer {
    /// Makes what was written before this call survive a power cut. An error is final for the file.
    pub fn sync(&self) -> Result<()> {
        // An interrupted fsync is not retried either: whether its pages were dropped cannot be known.
        self.directory.told("sync", &self.name, self.output.sync())
    }
}

/// A file being read through a [`Directory`].
#[derive(Debug)]
pub struct Source {
    input: Box<dyn Input>,
    directory: Directory,
    name: String,
}

impl Source {
    /// Its path, for messages.
    pub fn path(&self) -> PathBuf {
        self.directory.path(&self.name)
    }

    /// Returns the length in bytes.
    #[allow(clippy::len_without_is_empty)] // Asked once, before bytes are believed.
    pub fn len(&self) -> Result<u64> {
        self.directory
            .told("measure", &self.name, uninterrupted(|| self.input.len()))
    }

    /// Reads all of it, at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// `Io` with `FileTooLarge` if it is longer; nothing is allocated for it then.
    pub fn read_all(&self, limit: u64) -> Result<Vec<u8>> {
        let length = self.len()?;
        let allocated = if length > limit {
            let text = format!("{length} bytes, of at most {limit} bytes");
            Err(io::Error::new(io::ErrorKind::FileTooLarge, text))
        } else {
            zeros(length)
        };
        let mut bytes = self.directory.told("read", &self.name, allocated)?;
        self.read_exact_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    ///
    /// `Io` with `UnexpectedEof` if the file ends before.
    pub fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < into.len() {
            let outcome = match uninterrupted(|| self.input.read_at(offset + done as u64, &mut into[done..]))
            {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                outcome => outcome,
            };
            done += self.directory.told("read", &self.name, outcome)?;
        }
        Ok(())
    }

    /// Whether this part comes faster past the system's cache, which does not have it.
    pub fn is_cold(&self, offset: u64, length: usize) -> bool {
        self.input.is_cold(offset, length)
    }

    /// Asks the system to bring a part into its cache, and does not wait for it.
    pub fn fetch(&self, offset: u64, length: usize) {
        self.input.fetch(offset, length);
    }

    /// Fills the first `needed` bytes of `into` from `offset` on, past the system's cache where that can be. Address and
    /// length of the memory, and `offset`, are multiples of [`DIRECT_ALIGNMENT`].
    ///
    /// # Errors
    ///
    /// Those of [`Source::read_exact_at`].
    pub fn read_past_cache(&self, offset: u64, into: &mut [u8], needed: usize) -> Result<()> {
        let outcome = uninterrupted(|| self.input.read_past_cache(offset, into));
        let done = self.directory.told("read", &self.name, outcome)?;
        if done < needed {
            // Cut short, at a place that may not be aligned; or the end of the file, which is told there.
            return self.read_exact_at(offset + done as u64, &mut into[done..needed]);
        }
        Ok(())
    }
}
