//! What a file system really does: each operation that durable writing needs, tried in a directory of its own.
//!
//! Touches: one directory `.unbroken-doctor.RANDOM` below the one that is asked about, for a moment; a helper process
//! that removes it should this one be killed meanwhile. What is asked of the system is what [`super::disk`] asks of it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::disk::DiskStorage;
use super::{Claim, DIRECT_ALIGNMENT, Storage, lock};

/// Bytes that are written to see how fast it goes.
const BULK: usize = 64 << 20;
/// Free space below which nothing large is written.
const ROOM: u64 = 1 << 30;
/// Small files that are committed one after the other; their median counts.
const COMMITS: usize = 9;

/// What came of trying one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It does what it should.
    Works,
    /// The system says that it does not do this.
    Refused(String),
    /// It says that it did, and did something else.
    Broken(String),
    /// It was not tried, and why.
    Untried(String),
}

/// What a file system does, and how fast.
#[derive(Clone, Debug, PartialEq)]
pub struct FileSystem {
    /// The directory that was tried.
    pub path: PathBuf,
    /// Its kind, such as `ext4`; a number where it has no name here.
    pub kind: String,
    /// Whether what is written there is on something that outlasts a power cut.
    pub lasting: bool,
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// Files that can still be made; `None` where that is not counted.
    pub free_files: Option<u64>,
    /// A rename that fails where the name is taken.
    pub rename_new: Outcome,
    /// A second name for a file.
    pub hard_links: Outcome,
    /// Making names durable.
    pub sync_dir: Outcome,
    /// A lock that keeps another process out.
    pub lock: Outcome,
    /// Writes past the page cache.
    pub direct: Outcome,
    /// Time of one commit of a small file: create, write, sync, rename, sync the directory. The median of some.
    pub commit: Option<Duration>,
    /// Bytes a second of one large file, written and synced as packs are.
    pub bytes_per_s: Option<u64>,
}

/// Tries a directory.
///
/// # Errors
///
/// Where nothing can be made in it.
pub fn probe(path: &Path) -> io::Result<FileSystem> {
    let path = fs::canonicalize(path)?;
    let about = rustix::fs::statfs(&path)?;
    let space = rustix::fs::statvfs(&path)?;
    let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
    let (kind, lasting) = kind_of(about.f_type as u64);
    sweep(&path)?;
    let bench = Bench::open(&path)?;
    let large = free_bytes >= ROOM;
    let found = FileSystem {
        kind,
        lasting,
        free_bytes,
        free_files: (space.f_files > 0).then_some(space.f_favail),
        rename_new: bench.rename_new(),
        hard_links: bench.hard_links(),
        sync_dir: told(bench.storage.sync_dir("")),
        lock: bench.lock(),
        direct: bench.direct(),
        commit: bench.commit().ok(),
        bytes_per_s: if large { bench.bulk().ok() } else { None },
        path,
    };
    bench.close()?;
    Ok(found)
}

/// Names of file systems by their magic numbers (Linux, statfs(2)), and whether they outlast a power cut.
fn kind_of(magic: u64) -> (String, bool) {
    let name = match magic & 0xffff_ffff {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x2fc1_2fc1 => "zfs",
        0xca45_1a4e => "bcachefs",
        0xf2f5_2010 => "f2fs",
        0x794c_7630 => "overlay",
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0x6969 => "nfs",
        0xff53_4d42 | 0xfe53_4d42 => "smb",
        0x6573_5546 => "fuse",
        0x0102_1997 => "9p",
        0x0bd0_0bd0 => "lustre",
        0x4750_4653 => "gpfs",
        0x1983_0326 => "beegfs",
        0x00c3_6400 => "ceph",
        0x4d44 => "fat",
        0x2011_bab0 => "exfat",
        other => return (format!("{other:#x}"), true),
    };
    (name.to_owned(), !matches!(name, "tmpfs" | "ramfs"))
}

fn told(outcome: io::Result<()>) -> Outcome {
    match outcome {
        Ok(()) => Outcome::Works,
        Err(error) => Outcome::Refused(error.to_string()),
    }
}

const PREFIX: &str = ".unbroken-doctor.";
/// Every file that is made in the bench.
const FILES: [&str; 5] = ["a", "b", "c", "bulk", "lock"];

/// A directory to try things in, gone when dropped; its helper removes it when this process is killed.
#[derive(Debug)]
struct Bench {
    path: PathBuf,
    storage: DiskStorage,
    root: OwnedFd,
    helper: Option<Child>,
}

impl Bench {
    fn open(parent: &Path) -> io::Result<Bench> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
        let random = u64::from_le_bytes(random);
        let path = parent.join(format!("{PREFIX}{random:016x}"));
        // Before there is anything to remove: between the two, a kill leaves nothing either.
        let helper = spawn_helper(&path);
        fs::create_dir(&path)?;
        let storage = DiskStorage::open(&path)?;
        let root = storage.open_dir("")?;
        Ok(Bench {
            path,
            storage,
            root,
            helper,
        })
    }

    fn rename_new(&self) -> Outcome {
        let try_it = || -> io::Result<Outcome> {
            self.put("a", b"a")?;
            self.put("b", b"b")?;
            let onto = |name: &str| {
                rustix::fs::renameat_with(&self.root, "a", &self.root, name, RenameFlags::NOREPLACE)
            };
            match onto("b") {
                Err(Errno::EXIST) => {}
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    return Ok(Outcome::Refused("no conditional rename".to_owned()));
                }
                Err(error) => return Err(error.into()),
                Ok(()) => return Ok(Outcome::Broken("it replaced a file".to_owned())),
            }
            onto("c")?;
            Ok(match (self.get("a"), self.get("c")) {
                (Err(_), Ok(bytes)) if bytes == b"a" => Outcome::Works,
                _ => Outcome::Broken("the file is not under its new name".to_owned()),
            })
        };
        self.tidy(try_it())
    }

    fn hard_links(&self) -> Outcome {
        let try_it = || -> io::Result<Outcome> {
            self.put("a", b"a")?;
            self.put("b", b"b")?;
            let onto = |name: &str| rustix::fs::linkat(&self.root, "a", &self.root, name, AtFlags::empty());
            if onto("b") != Err(Errno::EXIST) {
                return Ok(Outcome::Broken("a link replaced a file".to_owned()));
            }
            onto("c")?;
            let about = rustix::fs::statat(&self.root, "c", AtFlags::SYMLINK_NOFOLLOW)?;
            rustix::fs::unlinkat(&self.root, "a", AtFlags::empty())?;
            Ok(match self.get("c") {
                Ok(bytes) if bytes == b"a" && about.st_nlink == 2 => Outcome::Works,
                _ => Outcome::Broken("the second name does not show the file".to_owned()),
            })
        };
        self.tidy(try_it())
    }

    /// A lock is asked for as a run asks for it; then by somebody else.
    fn lock(&self) -> Outcome {
        let try_it = || -> io::Result<Outcome> {
            let Claim::Held(held) = lock::claim(&self.root, "lock", Mode::from_raw_mode(0o600))? else {
                return Ok(Outcome::Broken("a lock that nobody holds is refused".to_owned()));
            };
            let kept_out = somebody_else_is_kept_out(&self.path.join("lock"));
            drop(held);
            kept_out
        };
        self.tidy(try_it())
    }

    fn direct(&self) -> Outcome {
        #[cfg(target_os = "linux")]
        let try_it = || -> io::Result<Outcome> {
            self.put("a", b"")?;
            let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(&self.root, "a", flags, Mode::empty())?;
            let memory = vec![7; 2 * DIRECT_ALIGNMENT];
            let start = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
            rustix::io::pwrite(&fd, &memory[start..start + DIRECT_ALIGNMENT], 0)?;
            Ok(match self.get("a") {
                Ok(bytes) if bytes == memory[..DIRECT_ALIGNMENT] => Outcome::Works,
                _ => Outcome::Broken("what was written is not what is read".to_owned()),
            })
        };
        #[cfg(not(target_os = "linux"))]
        let try_it = || -> io::Result<Outcome> { Ok(Outcome::Untried("not on this system".to_owned())) };
        self.tidy(try_it())
    }

    fn commit(&self) -> io::Result<Duration> {
        let mut times = Vec::new();
        for _ in 0..COMMITS {
            let begun = Instant::now();
            let file = self.storage.create_new("a")?;
            file.write_at(0, &[7; 4096])?;
            file.sync()?;
            self.storage.rename_new("a", "b")?;
            self.storage.sync_dir("")?;
            times.push(begun.elapsed());
            self.storage.remove("b")?;
        }
        times.sort();
        Ok(times[COMMITS / 2])
    }

    /// Bytes a second of a new file, one writer, as large and as aligned as packs are written.
    fn bulk(&self) -> io::Result<u64> {
        const PIECE: usize = 4 << 20;
        let memory = vec![7; PIECE + DIRECT_ALIGNMENT];
        let start = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
        let piece = &memory[start..start + PIECE];
        let begun = Instant::now();
        let file = self.storage.create_new("bulk")?;
        file.reserve(BULK as u64)?;
        let mut done = 0;
        while done < BULK {
            let left = piece.len().min(BULK - done);
            done += file.write_at(done as u64, &piece[..left])?;
        }
        file.sync()?;
        let took = begun.elapsed();
        self.storage.remove("bulk")?;
        Ok((BULK as f64 / took.as_secs_f64().max(1e-9)) as u64)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let file = self.storage.create_new(name)?;
        if bytes.is_empty() {
            return Ok(());
        }
        file.write_at(0, bytes).map(drop)
    }

    fn get(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path.join(name))
    }

    /// Removes what an attempt left, and puts its error into words.
    fn tidy(&self, outcome: io::Result<Outcome>) -> Outcome {
        empty(&self.path);
        outcome.unwrap_or_else(|error| Outcome::Refused(error.to_string()))
    }

    fn close(mut self) -> io::Result<()> {
        empty(&self.path);
        fs::remove_dir(&self.path)?;
        self.dismiss();
        Ok(())
    }

    /// Ends the helper, which finds nothing to remove.
    fn dismiss(&mut self) {
        if let Some(mut helper) = self.helper.take() {
            drop(helper.stdin.take());
            let _ = helper.wait();
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        empty(&self.path);
        let _ = fs::remove_dir(&self.path);
        self.dismiss();
    }
}

/// Removes the files that a bench may hold; the first error of trying is the one to tell.
fn empty(path: &Path) {
    for name in FILES {
        let _ = fs::remove_file(path.join(name));
    }
}

/// Starts a process that waits for this one's end, however it comes, and removes the directory. Without a shell there
/// is none; what a kill leaves then goes with the next attempt.
fn spawn_helper(path: &Path) -> Option<Child> {
    let remove = "cat > /dev/null; cd \"$1\" 2> /dev/null && rm -f a b c bulk lock && cd .. && rmdir \"$1\"";
    Command::new("/bin/sh")
        .args([
            OsStr::new("-c"),
            OsStr::new(remove),
            OsStr::new("sh"),
            path.as_os_str(),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0) // A signal to the whole group must not take it along.
        .spawn()
        .ok()
}

/// Removes benches that a killed process left, if its helper did not come to it. A young one may be in use.
fn sweep(parent: &Path) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let ours = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(PREFIX));
        let old = || entry.metadata()?.modified()?.elapsed().map_err(io::Error::other);
        if ours && old().is_ok_and(|age| age > Duration::from_secs(600)) {
            empty(&entry.path());
            let _ = fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

/// Whether a lock that this process holds keeps another holder out.
#[cfg(target_os = "linux")]
fn somebody_else_is_kept_out(file: &Path) -> io::Result<Outcome> {
    // A lock of the open file, not of the process, is somebody else's even here.
    let fd = rustix::fs::openat(CWD, file, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let wanted = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: a call on a descriptor that is open, with a pointer to a struct that outlives it.
    let code = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) };
    if code == 0 {
        return Ok(Outcome::Broken("two holders at once".to_owned()));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(Outcome::Works),
        _ => Ok(Outcome::Untried(error.to_string())),
    }
}

#[cfg(not(target_os = "linux"))]
fn somebody_else_is_kept_out(_file: &Path) -> io::Result<Outcome> {
    Ok(Outcome::Untried("not on this system".to_owned()))
}
