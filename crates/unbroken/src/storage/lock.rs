//! One writer on a directory: a POSIX record lock, which dies with its holder.
//!
//! Touches: the lock's file, and a list of this process's locks. Not `flock` and no open-file-description lock: a
//! forked data-loader worker would inherit those and keep them after its parent was killed.
//! A POSIX lock belongs to the process, and goes when the process closes *any* descriptor of the file. Hence the
//! list: the file is never opened while this process holds it.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::disk::not_plain;
use super::{Claim, Lock};

/// Device and inode of each lock file that this process holds.
static HELD: Mutex<BTreeSet<(u64, u64)>> = Mutex::new(BTreeSet::new());

fn held() -> MutexGuard<'static, BTreeSet<(u64, u64)>> {
    HELD.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Tries to lock `file` in `dir`, making it if needed.
pub(super) fn claim(dir: &OwnedFd, file: &str, mode: Mode) -> io::Result<Claim> {
    let mut held = held();
    let own_pid = std::process::id();
    match identity_at(dir, file) {
        Ok(identity) if held.contains(&identity) => return Ok(Claim::Refused(Some(own_pid))),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(dir, file, flags, mode) {
        Err(Errno::LOOP) => return Err(not_plain("a symbolic link")),
        Err(Errno::ISDIR) => return Err(not_plain("a directory")),
        opened => opened?,
    };
    match rustix::fs::fcntl_lock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::ACCESS | Errno::AGAIN) => return Ok(Claim::Refused(read_pid(&fd))),
        outcome => outcome?,
    }
    // The pid is for people; the lock is the truth. A file that cannot take it (a full disk) is locked all the same.
    let text = format!("{own_pid}\n");
    let _ = rustix::fs::ftruncate(&fd, 0).and_then(|()| rustix::io::pwrite(&fd, text.as_bytes(), 0));
    let stat = rustix::fs::fstat(&fd)?;
    let identity = (stat.st_dev, stat.st_ino);
    held.insert(identity);
    Ok(Claim::Held(Box::new(DiskLock {
        fd: Some(fd),
        identity,
        owner_pid: own_pid,
        dir: dir.try_clone()?,
        file: file.to_owned(),
    })))
}

fn identity_at(dir: &OwnedFd, file: &str) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statat(dir, file, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((stat.st_dev, stat.st_ino))
}

fn read_pid(fd: &OwnedFd) -> Option<u32> {
    let mut text = [0; 16];
    let count = rustix::io::pread(fd, &mut text, 0).ok()?;
    std::str::from_utf8(&text[..count]).ok()?.trim().parse().ok()
}

/// A held lock.
#[derive(Debug)]
struct DiskLock {
    /// `Some` until dropped.
    fd: Option<OwnedFd>,
    identity: (u64, u64),
    owner_pid: u32,
    dir: OwnedFd,
    file: String,
}

impl Lock for DiskLock {
    fn check(&self) -> io::Result<()> {
        let lost = |text: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, text.to_owned()));
        if self.owner_pid != std::process::id() {
            return lost("this process is a fork of the one that holds the lock");
        }
        if identity_at(&self.dir, &self.file).ok() != Some(self.identity) {
            return lost("the lock's file was removed or replaced");
        }
        // Locking what we hold changes nothing; it takes the lock again if code in this process opened and closed
        // the file, which drops a POSIX lock.
        let fd = self
            .fd
            .as_ref()
            .expect("a lock that was not dropped has its file");
        match rustix::fs::fcntl_lock(fd.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::ACCESS | Errno::AGAIN) => lost("another process took the lock"),
            outcome => Ok(outcome?),
        }
    }
}

impl Drop for DiskLock {
    fn drop(&mut self) {
        // Closed under the list's guard: another thread must not open the file between the two.
        let mut held = held();
        drop(self.fd.take());
        held.remove(&self.identity);
    }
}
