//! A directory on a file system, with every write durable when it says so.
//!
//! Touches: one directory, through a handle that was opened once; it may be moved meanwhile. Below it no symbolic
//! link is followed and nothing but plain files is opened, so that a stranger's directory leads nowhere else.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{Claim, Input, Output, Storage, lock, split};

/// Permissions before the user's umask.
const FILE_MODE: Mode = Mode::from_raw_mode(0o666);
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o777);

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
            let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
            fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
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
        Ok(Box::new(DiskFile(rustix::fs::openat(
            self.parent(dir)?,
            file,
            flags,
            FILE_MODE,
        )?)))
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
            FileType::RegularFile => Ok(Box::new(DiskFile(fd))),
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
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }

    fn lock(&self, name: &str) -> io::Result<Claim> {
        let (dir, file) = split(name)?;
        lock::claim(&self.parent(dir)?, file, FILE_MODE)
    }
}

fn not_plain(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("it is {what}, not a plain file"),
    )
}

/// An open file, for one of the two directions.
#[derive(Debug)]
struct DiskFile(OwnedFd);

impl Output for DiskFile {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(&self.0, bytes)?)
    }

    fn sync(&self) -> io::Result<()> {
        #[cfg(target_vendor = "apple")]
        return Ok(rustix::fs::fcntl_fullfsync(self.0.as_fd())?);
        #[cfg(not(target_vendor = "apple"))]
        return Ok(rustix::fs::fsync(self.0.as_fd())?);
    }
}

impl Input for DiskFile {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::pread(&self.0, into, offset)?)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.0)?.st_size).unwrap_or(0))
    }
}
