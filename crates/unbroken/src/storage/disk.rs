//! A directory on a file system, with every write durable when it says so.
//!
//! Touches: one directory, through a handle that was opened once; it may be moved meanwhile. Below it no symbolic
//! link is followed and nothing but plain files is opened, so that a stranger's directory leads nowhere else.

use std::ffi::c_void;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Dir, FallocateFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{Claim, DIRECT_ALIGNMENT, Input, Output, Storage, lock, split};

/// Permissions before the user's umask.
const FILE_MODE: Mode = Mode::from_raw_mode(0o666);
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o777);

/// Shorter transfers go through the page cache: they are few, and one sync takes all writes among them.
const DIRECT_FROM: usize = 256 << 10;

/// A directory on disk.
#[derive(Debug)]
pub struct DiskStorage {
    root: OwnedFd,
    location: PathBuf,
}

impl DiskStorage {
    /// Opens a directory that is there.
    pub fn open(path: &Path) -> io::Result<Self> {
        // The user names the root, so that links on the way to it are the user's own.
        let root = rustix::fs::openat(CWD, path, directory_flags() - OFlags::NOFOLLOW, Mode::empty())?;
        Ok(Self {
            root,
            location: path.to_path_buf(),
        })
    }

    /// Opens a directory, making it and its missing parents first.
    ///
    /// # Durability
    ///
    /// On return the names of the directories that it made survive a power cut.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut missing = Vec::new();
        let mut present = path;
        while !present.as_os_str().is_empty() {
            match fs::metadata(present) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(present),
                Err(error) => return Err(error),
            }
            present = present.parent().unwrap_or(Path::new(""));
        }
        for directory in missing.into_iter().rev() {
            match fs::create_dir(directory) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {} // Another process was as fast.
                Err(error) => return Err(error),
            }
            fs::File::open(parent_of(directory))?.sync_all()?;
        }
        Self::open(path)
    }

    /// Opens the directory that a name lies in.
    fn parent(&self, dir: &str) -> io::Result<OwnedFd> {
        if dir.is_empty() {
            return self.root.try_clone();
        }
        Ok(rustix::fs::openat(
            &self.root,
            dir,
            directory_flags(),
            Mode::empty(),
        )?)
    }
}

/// A directory that is filled beside its place and then takes it, whole, with one rename.
///
/// It is called `.NAME.RANDOM.unfinished` until then. Dropped before, it is removed with what is in it; one that a killed
/// process left is removed by the next that stages the same place, which sees that nobody holds its lock.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    place: PathBuf,
    published: bool,
}

const UNFINISHED: &str = ".unfinished";

impl Staging {
    /// Makes an empty directory beside `place`, and the missing parents of both. `random` makes its name unlike others.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` where `place` is anything but an empty directory or nothing.
    pub fn begin(place: &Path, random: &str, lock_name: &str) -> io::Result<Self> {
        check_vacant(place)?;
        let name = place
            .file_name()
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?
            .to_string_lossy();
        let parent = parent_of(place);
        DiskStorage::create(parent)?;
        sweep_unfinished(parent, &format!(".{name}."), lock_name)?;
        let path = parent.join(format!(".{name}.{random}{UNFINISHED}"));
        fs::create_dir(&path)?;
        Ok(Self {
            path,
            place: place.to_path_buf(),
            published: false,
        })
    }

    /// Where it is filled.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its place. The caller has synced what is in it.
    ///
    /// # Durability
    ///
    /// On return the place survives a power cut.
    ///
    /// # Errors
    ///
    /// Where something has appeared in its place meanwhile; nothing of that is touched.
    pub fn publish(mut self) -> io::Result<()> {
        // A rename replaces nothing but an empty directory, on every file system.
        fs::rename(&self.path, &self.place)?;
        self.published = true;
        fs::File::open(parent_of(&self.place))?.sync_all()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            // What made us give up is the error to tell; a left-over says by its name that it is one.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn check_vacant(place: &Path) -> io::Result<()> {
    match fs::symlink_metadata(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(found) if found.is_dir() && fs::read_dir(place)?.next().is_none() => Ok(()),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
    }
}

fn parent_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// How long a staged directory may be without a lock's file before it counts as left: it is made within moments.
const MAKING: Duration = Duration::from_secs(60);

/// Removes what killed processes staged under a prefix.
fn sweep_unfinished(parent: &Path, prefix: &str, lock_name: &str) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let random = name
            .strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix(UNFINISHED));
        let ours = random.is_some_and(|random| random.len() == 32 && !random.contains('.'));
        if !ours || !entry.file_type()?.is_dir() {
            continue;
        }
        let path = entry.path();
        if path.join(lock_name).exists() {
            if let Claim::Held(_lock) = DiskStorage::open(&path)?.lock(lock_name)? {
                remove_lock_last(&path, lock_name)?;
            }
        } else if entry
            .metadata()?
            .modified()?
            .elapsed()
            .is_ok_and(|age| age > MAKING)
        {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// Removes a staged directory so that, cut short, it is still one that a lock tells to be left.
fn remove_lock_last(path: &Path, lock_name: &str) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else if entry.file_name() != lock_name {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir_all(path)
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

impl Storage for DiskStorage {
    fn location(&self) -> &Path {
        &self.location
    }

    fn create_dir(&self, name: &str) -> io::Result<()> {
        let (dir, last) = split(name)?;
        match rustix::fs::mkdirat(self.parent(dir)?, last, DIRECTORY_MODE) {
            Err(Errno::EXIST) => self.parent(name).map(drop), // It has to be a directory, not a link or a file.
            outcome => Ok(outcome?),
        }
    }

    fn create_new(&self, name: &str) -> io::Result<Box<dyn Output>> {
        let (dir, file) = split(name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Box::new(DiskOutput::new(rustix::fs::openat(
            self.parent(dir)?,
            file,
            flags,
            FILE_MODE,
        )?)))
    }

    fn reuse(&self, name: &str) -> io::Result<Option<Box<dyn Output>>> {
        let (dir, file) = split(name)?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(self.parent(dir)?, file, flags, Mode::empty())?;
        let about = rustix::fs::fstat(&fd)?;
        let plain = FileType::from_raw_mode(about.st_mode) == FileType::RegularFile;
        // Another name would be somebody's copy of a run, made of links; so would be a process that still reads it.
        if !plain || about.st_nlink != 1 || !nobody_else_has_open(&fd) {
            return Ok(None);
        }
        Ok(Some(Box::new(DiskOutput::new(fd))))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Input>> {
        let (dir, file) = split(name)?;
        // Without waiting: opening a named pipe would otherwise wait for its writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(self.parent(dir)?, file, flags, Mode::empty()) {
            Err(Errno::LOOP) => return Err(not_plain("a symbolic link")),
            Err(Errno::NXIO) => return Err(not_plain("a device or socket")),
            opened => opened?,
        };
        match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::RegularFile => Ok(Box::new(DiskFile::new(fd))),
            FileType::Directory => Err(not_plain("a directory")),
            _ => Err(not_plain("a device, pipe or socket")),
        }
    }

    fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        let (from_dir, from_file) = split(from)?;
        let (to_dir, to_file) = split(to)?;
        let (from_fd, to_fd) = (self.parent(from_dir)?, self.parent(to_dir)?);
        match rustix::fs::renameat_with(&from_fd, from_file, &to_fd, to_file, RenameFlags::NOREPLACE) {
            // Some network and user-space file systems know no conditional rename. A link never replaces either; a
            // crash between the two calls leaves a second name in tmp/, which is swept.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::linkat(&from_fd, from_file, &to_fd, to_file, AtFlags::empty())?;
                Ok(rustix::fs::unlinkat(&from_fd, from_file, AtFlags::empty())?)
            }
            outcome => Ok(outcome?),
        }
    }

    fn rename_over(&self, from: &str, to: &str) -> io::Result<()> {
        let (from_dir, from_file) = split(from)?;
        let (to_dir, to_file) = split(to)?;
        let (from_fd, to_fd) = (self.parent(from_dir)?, self.parent(to_dir)?);
        Ok(rustix::fs::renameat(&from_fd, from_file, &to_fd, to_file)?)
    }

    fn link_new(&self, from: &dyn Storage, name: &str, to: &str) -> io::Result<()> {
        let (from_dir, from_file) = split(name)?;
        let (to_dir, to_file) = split(to)?;
        let (from_fd, to_fd) = (from.open_dir(from_dir)?, self.parent(to_dir)?);
        // Without following: a link under a pack's name gets another name itself, and is refused when it is opened.
        Ok(rustix::fs::linkat(
            &from_fd,
            from_file,
            &to_fd,
            to_file,
            AtFlags::empty(),
        )?)
    }

    fn open_dir(&self, name: &str) -> io::Result<OwnedFd> {
        self.parent(name)
    }

    fn sync_dir(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::fsync(self.parent(name)?)?)
    }

    fn list(&self, name: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(self.parent(name)?)? {
            let entry = entry?;
            // A name that is not UTF-8 is none of ours; shown by its readable parts.
            let entry_name = entry.file_name().to_string_lossy().into_owned();
            if entry_name != "." && entry_name != ".." {
                names.push(entry_name);
            }
        }
        Ok(names)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let (dir, file) = split(name)?;
        Ok(rustix::fs::unlinkat(self.parent(dir)?, file, AtFlags::empty())?)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let space = rustix::fs::fstatvfs(&self.root)?;
        if space.f_blocks == 0 {
            return Ok(u64::MAX); // A file system that does not count.
        }
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }

    fn lock(&self, name: &str) -> io::Result<Claim> {
        let (dir, file) = split(name)?;
        lock::claim(&self.parent(dir)?, file, FILE_MODE)
    }
}

/// Follows symbolic links to a file that a person named. Inside a run none is followed.
pub fn resolve(path: &Path) -> io::Result<PathBuf> {
    fs::canonicalize(path)
}

pub(super) fn not_plain(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("it is {what}, not a plain file"),
    )
}

/// Whether this descriptor is the only one of its file, anywhere; no where that cannot be asked.
#[cfg(target_os = "linux")]
fn nobody_else_has_open(fd: &OwnedFd) -> bool {
    // A lease for writing is given for a file that nobody else has open or mapped, and to nobody else.
    // SAFETY: plain calls on a descriptor that is open, with integers.
    unsafe {
        libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) == 0
            && libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) == 0
    }
}

#[cfg(not(target_os = "linux"))]
fn nobody_else_has_open(_fd: &OwnedFd) -> bool {
    false
}

/// A file being written: through the page cache, and past it where a write is large and aligned.
#[derive(Debug)]
struct DiskOutput {
    fd: OwnedFd,
    direct: OnceLock<Option<OwnedFd>>,
    /// A file system that opens a file for direct writes may still refuse them.
    refused: AtomicBool,
}

impl DiskOutput {
    fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            direct: OnceLock::new(),
            refused: AtomicBool::new(false),
        }
    }

    /// The descriptor for a write past the page cache, where this one can be one, and how much of it.
    fn direct<'b>(&self, offset: u64, bytes: &'b [u8]) -> Option<(&OwnedFd, &'b [u8])> {
        let suits = bytes.len() >= DIRECT_FROM
            && bytes.as_ptr().addr().is_multiple_of(DIRECT_ALIGNMENT)
            && offset.is_multiple_of(DIRECT_ALIGNMENT as u64)
            && !self.refused.load(Ordering::Relaxed);
        if !suits {
            return None;
        }
        let open = || open_direct(&self.fd, OFlags::WRONLY);
        let whole = bytes.len() / DIRECT_ALIGNMENT * DIRECT_ALIGNMENT; // The rest is another write.
        Some((self.direct.get_or_init(open).as_ref()?, &bytes[..whole]))
    }
}

/// Opens an open file again, for transfers past the page cache.
#[cfg(target_os = "linux")]
fn open_direct(fd: &OwnedFd, access: OFlags) -> Option<OwnedFd> {
    let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, name, flags, Mode::empty()).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_fd: &OwnedFd, _access: OFlags) -> Option<OwnedFd> {
    None
}

impl Output for DiskOutput {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        if let Some((direct, whole)) = self.direct(offset, bytes) {
            match rustix::io::pwrite(direct, whole, offset) {
                Err(Errno::INVAL | Errno::OPNOTSUPP) => self.refused.store(true, Ordering::Relaxed),
                outcome => return Ok(outcome?),
            }
        }
        Ok(rustix::io::pwrite(&self.fd, bytes, offset)?)
    }

    fn reserve(&self, length: u64) -> io::Result<()> {
        rustix::fs::ftruncate(&self.fd, length)?;
        match rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()), // Then a full disk shows while writing.
            outcome => Ok(outcome?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        #[cfg(target_vendor = "apple")]
        return Ok(rustix::fs::fcntl_fullfsync(self.fd.as_fd())?);
        #[cfg(not(target_vendor = "apple"))]
        return Ok(rustix::fs::fsync(self.fd.as_fd())?);
    }
}

/// A file being read: through the page cache, and past it what that does not have.
#[derive(Debug)]
struct DiskFile {
    fd: OwnedFd,
    direct: OnceLock<Option<OwnedFd>>,
    /// A file system that opens a file for direct reads may still refuse them.
    refused: AtomicBool,
    view: OnceLock<Option<View>>,
}

impl DiskFile {
    fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            direct: OnceLock::new(),
            refused: AtomicBool::new(false),
            view: OnceLock::new(),
        }
    }

    fn direct(&self) -> Option<&OwnedFd> {
        if self.refused.load(Ordering::Relaxed) {
            return None;
        }
        let open = || open_direct(&self.fd, OFlags::RDONLY);
        self.direct.get_or_init(open).as_ref()
    }
}

impl Input for DiskFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::pread(&self.fd, into, offset)?)
    }

    fn is_cold(&self, offset: u64, length: usize) -> bool {
        length >= DIRECT_FROM
            && self.direct().is_some()
            && self
                .view
                .get_or_init(|| View::of(&self.fd).ok())
                .as_ref()
                .is_some_and(|view| view.is_absent(offset, length))
    }

    fn fetch(&self, offset: u64, length: usize) {
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fadvise(
            &self.fd,
            offset,
            std::num::NonZeroU64::new(length as u64),
            rustix::fs::Advice::WillNeed,
        );
    }

    fn read_past_cache(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        if let Some(direct) = self.direct() {
            match rustix::io::pread(direct, &mut *into, offset) {
                Err(Errno::INVAL | Errno::OPNOTSUPP) => self.refused.store(true, Ordering::Relaxed),
                outcome => return Ok(outcome?),
            }
        }
        self.read_at(offset, into)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).unwrap_or(0))
    }
}

/// A mapping of a file that is only asked which of its pages are in the page cache. Its bytes are never looked at.
#[derive(Debug)]
struct View {
    start: NonNull<c_void>,
    length: usize,
}

// SAFETY: the mapping belongs to the process, and nothing is read or written through it.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

/// Places of a part that are asked about.
const SAMPLES: usize = 4;

impl View {
    fn of(fd: &OwnedFd) -> io::Result<View> {
        let too_long = |_| io::Error::from(io::ErrorKind::OutOfMemory);
        let length = usize::try_from(rustix::fs::fstat(fd)?.st_size).map_err(too_long)?;
        // SAFETY: a new mapping, at an address that the kernel picks, takes nobody else's memory.
        let start = unsafe {
            let flags = rustix::mm::MapFlags::SHARED;
            rustix::mm::mmap(ptr::null_mut(), length, rustix::mm::ProtFlags::READ, flags, fd, 0)?
        };
        let start = NonNull::new(start).expect("a mapping is not at address 0");
        Ok(View { start, length })
    }

    /// Whether most of a part is not in the page cache. Where that is not told, because the file is somebody else's,
    /// everything counts as being there.
    fn is_absent(&self, offset: u64, length: usize) -> bool {
        let Ok(offset) = usize::try_from(offset) else {
            return false;
        };
        let step = length / SAMPLES;
        let absent = |sample: &usize| !self.has(offset + sample * step);
        (0..SAMPLES).filter(absent).count() > SAMPLES / 2
    }

    fn has(&self, offset: usize) -> bool {
        let page = rustix::param::page_size();
        let first = offset / page * page;
        if first >= self.length {
            return true;
        }
        let mut there = 0u8;
        // SAFETY: one page of the mapping, and one byte for the answer about it.
        let outcome =
            unsafe { libc::mincore(self.start.as_ptr().byte_add(first), 1, (&raw mut there).cast()) };
        outcome != 0 || there & 1 == 1
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, which nothing uses any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr(), self.length) };
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::arena::Arena;

    /// An arena of bytes that differ from page to page, and an empty file with two descriptors.
    fn bytes_and_file(dir: &Path) -> (Arena, OwnedFd) {
        let mut arena = Arena::new(2 << 20).unwrap();
        for (page, bytes) in arena.bytes_mut().chunks_mut(4096).enumerate() {
            bytes.fill(page as u8);
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, dir.join("file"), flags, FILE_MODE).unwrap();
        (arena, fd)
    }

    #[test]
    fn a_write_that_is_refused_past_the_page_cache_goes_through_it_and_so_do_all_later_ones() {
        // A file of the kernel's refuses any write of ours with the error of a file system without direct writes.
        let dir = tempfile::tempdir().unwrap();
        let (arena, fd) = bytes_and_file(dir.path());
        let output = DiskOutput::new(fd);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let refuses = rustix::fs::openat(CWD, "/proc/self/oom_score_adj", flags, Mode::empty()).unwrap();
        output.direct.set(Some(refuses)).unwrap();
        let (first, second) = arena.bytes().split_at(1 << 20);
        assert_eq!(output.write_at(0, first).unwrap(), first.len());
        assert!(output.refused.load(Ordering::Relaxed));
        assert!(output.direct(first.len() as u64, second).is_none());
        assert_eq!(output.write_at(first.len() as u64, second).unwrap(), second.len());
        assert!(fs::read(dir.path().join("file")).unwrap() == arena.bytes());
    }

    #[test]
    fn a_file_that_cannot_be_opened_past_the_page_cache_is_written_and_read_through_it() {
        let dir = tempfile::tempdir().unwrap();
        let (arena, fd) = bytes_and_file(dir.path());
        let output = DiskOutput::new(fd.try_clone().unwrap());
        output.direct.set(None).unwrap();
        assert_eq!(output.write_at(0, arena.bytes()).unwrap(), arena.len());
        let file = DiskFile::new(fd);
        file.direct.set(None).unwrap();
        assert!(!file.is_cold(0, arena.len()));
        let mut found = vec![0; arena.len()];
        assert_eq!(file.read_past_cache(0, &mut found).unwrap(), arena.len());
        assert!(found == arena.bytes());
    }

    #[test]
    fn a_read_that_is_refused_past_the_page_cache_comes_through_it() {
        // Where direct reads are, those from odd places are refused; elsewhere there is nothing to refuse.
        let dir = tempfile::tempdir().unwrap();
        let (arena, fd) = bytes_and_file(dir.path());
        fs::write(dir.path().join("file"), arena.bytes()).unwrap();
        let file = DiskFile::new(fd);
        let mut found = vec![0; 10_000];
        assert_eq!(file.read_past_cache(4095, &mut found).unwrap(), found.len());
        assert!(found == arena.bytes()[4095..14_095]);
    }
    #[test]
    fn what_is_fetched_comes_into_the_page_cache_without_being_read() {
        let dir = tempfile::tempdir().unwrap();
        let (arena, fd) = bytes_and_file(dir.path());
        fs::write(dir.path().join("file"), arena.bytes()).unwrap();
        rustix::fs::fsync(&fd).unwrap();
        rustix::fs::fadvise(&fd, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let file = DiskFile::new(fd);
        if !file.is_cold(0, arena.len()) {
            return; // A file system in memory, or without direct reads: there is nothing to fetch.
        }
        file.fetch(0, arena.len());
        while file.is_cold(0, arena.len()) {
            std::thread::yield_now();
        }
    }
}
