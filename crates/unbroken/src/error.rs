//! The error type: what happened, where, and what to do about it.
//!
//! Touches: nothing. Messages are one line and start lower case; the remedy is a hint that the caller may show. Fields
//! survive every border: [`Error::fields`] hands them on under the names that a front gives to its own exceptions.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What this crate's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong outside our own code. A broken invariant of our own is a panic instead.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// Bytes read back differ from the bytes committed.
    Damaged {
        /// File that holds them.
        path: PathBuf,
        /// Which part of it, such as `optimizer/0/exp_avg` or `manifest`.
        part: String,
        /// What was committed, usually a short digest.
        expected: String,
        /// What was read.
        found: String,
    },
    /// Bytes that are not in a format that this version reads.
    Format {
        /// File that holds them; `None` for bytes in memory.
        path: Option<PathBuf>,
        /// What is wrong with them.
        what: String,
    },
    /// Another process holds the run.
    Locked {
        /// Lock file.
        path: PathBuf,
        /// Process id of the holder, where it could be found out.
        holder: Option<u32>,
    },
    /// The operating system refused.
    Io {
        /// What was being done, as a verb phrase: `write a pack`.
        doing: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Bytes that the operation needed, where known.
        needed_bytes: Option<u64>,
        /// Bytes that the file system had left, where known.
        free_bytes: Option<u64>,
        /// What the operating system said.
        source: io::Error,
    },
    /// The run on disk is another one than the caller describes.
    Identity {
        /// Run directory.
        path: PathBuf,
        /// (name, recorded value, given value) of each difference.
        differences: Vec<(String, String, String)>,
    },
    /// There are checkpoints, and none of them is whole.
    NoWholeCheckpoint {
        /// Run directory.
        path: PathBuf,
        /// (checkpoint name, why it was rejected), newest first.
        rejected: Vec<(String, String)>,
    },
    /// Something that this platform, file system or version does not offer.
    Unsupported {
        /// What is missing.
        what: String,
    },
    /// A batch cannot be made: the program's own code failed.
    Data {
        /// Epoch counted from 0.
        epoch: u64,
        /// Which batch of the epoch, counted from 0.
        position: u64,
        /// What failed.
        what: String,
    },
    /// A step executed again did not come out as an earlier life recorded it.
    Diverged {
        /// Run directory.
        path: PathBuf,
        /// The step.
        step: u64,
        /// The first component that differs.
        component: String,
        /// What an earlier life recorded.
        expected: String,
        /// What this life found.
        found: String,
    },
    /// The training stopped because it was asked to; everything is saved.
    Stopped {
        /// Run directory.
        path: PathBuf,
        /// The last step, which is saved.
        step: u64,
        /// Who asked: a signal's name.
        reason: String,
    },
    /// The caller's argument is wrong.
    Invalid {
        /// Which argument, and why.
        what: String,
    },
}

/// The value of one field of an error, for a front that keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldValue {
    /// Text.
    Text(String),
    /// A file or directory; `None` where the bytes were in memory.
    Path(Option<PathBuf>),
    /// A number, where known.
    Number(Option<u64>),
    /// Rows of text: differences, rejected checkpoints.
    Rows(Vec<Vec<String>>),
}

impl Error {
    /// Whether there was no room: the disk, a quota or the process's own limit has none left.
    pub fn is_full(&self) -> bool {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        matches!(self, Error::Io { source, .. }
            if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
    }

    /// Wraps an error of the operating system.
    pub fn io(doing: &'static str, path: impl AsRef<Path>, source: io::Error) -> Error {
        Error::Io {
            doing,
            path: path.as_ref().to_owned(),
            needed_bytes: None,
            free_bytes: None,
            source,
        }
    }

    /// Says that an argument is wrong.
    pub fn invalid(what: impl Into<String>) -> Error {
        Error::Invalid { what: what.into() }
    }

    /// Name of the exception class that fronts give to this error.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::Damaged { .. } => "DamagedCheckpoint",
            Error::Format { .. } => "FormatError",
            Error::Locked { .. } => "RunLocked",
            Error::Io { .. } => "StorageError",
            Error::Identity { .. } => "IdentityError",
            Error::NoWholeCheckpoint { .. } => "NoWholeCheckpoint",
            Error::Unsupported { .. } => "UnsupportedError",
            Error::Data { .. } => "DataError",
            Error::Diverged { .. } => "DivergedFromJournal",
            Error::Stopped { .. } => "Stopped",
            Error::Invalid { .. } => "InvalidArgument",
        }
    }

    /// What to do about it, if there is something to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Damaged { path, .. } | Error::Format { path: Some(path), .. } if names(path, "run.toml") => Some(
                "nothing was changed; unless another version of unbroken wrote it, `unbroken repair --from COPY` takes \
                 it from a copy of the run"
                    .into(),
            ),
            Error::Damaged { .. } => Some(
                "an older checkpoint may be whole: open the run without `strict` to fall back to it, or run \
                 `unbroken verify` to see which ones are"
                    .into(),
            ),
            Error::Format { .. } => Some(
                "nothing was changed; check the path, or use the version of unbroken that wrote the file"
                    .into(),
            ),
            Error::Locked {
                holder: Some(pid), ..
            } => Some(format!(
                "wait for process {pid} or stop it; the lock goes away with it"
            )),
            Error::Locked { holder: None, .. } => {
                Some("wait for the other process or stop it; the lock goes away with it".into())
            }
            Error::Io { path, source, .. } => match source.kind() {
                io::ErrorKind::InvalidInput if names(path, "lock") => {
                    Some("move it away; the lock's file is made again, in the run's directory itself".into())
                }
                _ if self.is_full() => Some(
                    "free some space or prune older checkpoints; what was committed before is untouched"
                        .into(),
                ),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    Some("make the directory writable, or give another one".into())
                }
                io::ErrorKind::NotFound => Some("check the path".into()),
                io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
                    Some("give a directory that does not exist yet, or one that holds a run".into())
                }
                _ => None,
            },
            Error::Identity { .. } => Some(
                "give the recorded values to go on with this run, or another directory to start a new one"
                    .into(),
            ),
            Error::NoWholeCheckpoint { .. } => {
                Some("nothing was deleted; restore the directory from a copy, or start in another one".into())
            }
            Error::Diverged { .. } => Some(
                "the run is not exact from here; look at both with `unbroken log` and `unbroken diff`, or go on and \
                 have the run marked"
                    .into(),
            ),
            Error::Stopped { .. } => Some("start the same command to go on".into()),
            Error::Data { .. } | Error::Unsupported { .. } | Error::Invalid { .. } => None,
        }
    }

    /// Its fields by name, in a fixed order.
    pub fn fields(&self) -> Vec<(&'static str, FieldValue)> {
        let text = |text: &String| FieldValue::Text(text.clone());
        let some = |path: &PathBuf| FieldValue::Path(Some(path.clone()));
        match self {
            Error::Damaged {
                path,
                part,
                expected,
                found,
            } => vec![
                ("path", some(path)),
                ("part", text(part)),
                ("expected", text(expected)),
                ("found", text(found)),
            ],
            Error::Format { path, what } => {
                vec![("path", FieldValue::Path(path.clone())), ("what", text(what))]
            }
            Error::Locked { path, holder } => {
                vec![
                    ("path", some(path)),
                    ("holder", FieldValue::Number(holder.map(u64::from))),
                ]
            }
            Error::Io {
                doing,
                path,
                needed_bytes,
                free_bytes,
                source,
            } => vec![
                ("doing", FieldValue::Text((*doing).to_owned())),
                ("path", some(path)),
                ("needed_bytes", FieldValue::Number(*needed_bytes)),
                ("free_bytes", FieldValue::Number(*free_bytes)),
                (
                    "errno",
                    FieldValue::Number(source.raw_os_error().and_then(|code| u64::try_from(code).ok())),
                ),
            ],
            Error::Identity { path, differences } => {
                let rows = differences
                    .iter()
                    .map(|(name, old, new)| vec![name.clone(), old.clone(), new.clone()]);
                vec![
                    ("path", some(path)),
                    ("differences", FieldValue::Rows(rows.collect())),
                ]
            }
            Error::NoWholeCheckpoint { path, rejected } => {
                let rows = rejected.iter().map(|(name, why)| vec![name.clone(), why.clone()]);
                vec![
                    ("path", some(path)),
                    ("rejected", FieldValue::Rows(rows.collect())),
                ]
            }
            Error::Data {
                epoch,
                position,
                what,
            } => vec![
                ("epoch", FieldValue::Number(Some(*epoch))),
                ("position", FieldValue::Number(Some(*position))),
                ("what", text(what)),
            ],
            Error::Diverged {
                path,
                step,
                component,
                expected,
                found,
            } => vec![
                ("path", some(path)),
                ("step", FieldValue::Number(Some(*step))),
                ("component", text(component)),
                ("expected", text(expected)),
                ("found", text(found)),
            ],
            Error::Stopped { path, step, reason } => vec![
                ("path", some(path)),
                ("step", FieldValue::Number(Some(*step))),
                ("reason", text(reason)),
            ],
            Error::Unsupported { what } | Error::Invalid { what } => vec![("what", text(what))],
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Damaged {
                path,
                part,
                expected,
                found,
            } => write!(
                f,
                "{} is damaged: \"{}\" should be {}, found {}",
                Line(&path.display()),
                Line(part),
                Line(expected),
                Line(found)
            ),
            Error::Format {
                path: Some(path),
                what,
            } => {
                write!(f, "cannot read \"{}\": {}", Line(&path.display()), Line(what))
            }
            Error::Format { path: None, what } => write!(f, "cannot read these bytes: {}", Line(what)),
            Error::Locked {
                path,
                holder: Some(pid),
            } => {
                write!(f, "\"{}\" is held by process {pid}", Line(&path.display()))
            }
            Error::Locked { path, holder: None } => {
                write!(f, "\"{}\" is held by another process", Line(&path.display()))
            }
            Error::Io {
                doing,
                path,
                needed_bytes,
                free_bytes,
                source,
            } => {
                write!(
                    f,
                    "cannot {doing} at \"{}\": {}",
                    Line(&path.display()),
                    Line(source)
                )?;
                match (needed_bytes, free_bytes) {
                    (Some(needed), Some(free)) => write!(f, " ({needed} bytes needed, {free} bytes free)"),
                    (Some(needed), None) => write!(f, " ({needed} bytes needed)"),
                    (None, Some(free)) => write!(f, " ({free} bytes free)"),
                    (None, None) => Ok(()),
                }
            }
            Error::Identity { path, differences } => {
                write!(f, "\"{}\" holds another run:", Line(&path.display()))?;
                for (index, (name, old, new)) in differences.iter().enumerate() {
                    let comma = if index == 0 { "" } else { "," };
                    write!(
                        f,
                        "{comma} \"{}\" is {} there and {} here",
                        Line(name),
                        Line(old),
                        Line(new)
                    )?;
                }
                Ok(())
            }
            Error::NoWholeCheckpoint { path, rejected } => {
                write!(f, "no checkpoint in \"{}\" is whole", Line(&path.display()))?;
                match rejected.first() {
                    Some((name, why)) if rejected.len() == 1 => {
                        write!(f, ": \"{}\": {}", Line(name), Line(why))
                    }
                    Some((name, why)) => write!(
                        f,
                        ": {} were rejected, the newest, \"{}\", because: {}",
                        rejected.len(),
                        Line(name),
                        Line(why)
                    ),
                    None => Ok(()),
                }
            }
            Error::Unsupported { what } => write!(f, "not supported: {}", Line(what)),
            Error::Data {
                epoch,
                position,
                what,
            } => {
                write!(
                    f,
                    "batch {position} of epoch {epoch} cannot be made: {}",
                    Line(what)
                )
            }
            Error::Diverged {
                path,
                step,
                component,
                expected,
                found,
            } => write!(
                f,
                "step {step} of \"{}\", executed again, differs from the journal in \"{}\": was {}, is {}",
                Line(&path.display()),
                Line(component),
                Line(expected),
                Line(found)
            ),
            Error::Stopped { path, step, reason } => write!(
                f,
                "\"{}\" was stopped by {} at step {step}, which is saved",
                Line(&path.display()),
                Line(reason)
            ),
            Error::Invalid { what } => write!(f, "{}", Line(what)),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

fn names(path: &Path, name: &str) -> bool {
    path.file_name().is_some_and(|last| last == name)
}

/// Shows a value on one line: a path or a name from a file may hold line breaks or terminal controls.
struct Line<'a, T: ?Sized>(&'a T);

impl<T: fmt::Display + ?Sized> fmt::Display for Line<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;
        struct Escape<'a, 'b>(&'a mut fmt::Formatter<'b>);
        impl fmt::Write for Escape<'_, '_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                text.chars().try_for_each(|c| {
                    if c.is_control() {
                        write!(self.0, "{}", c.escape_default())
                    } else {
                        self.0.write_char(c)
                    }
                })
            }
        }
        write!(Escape(f), "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_one_line_that_starts_lower_case_or_with_a_name() {
        let path = PathBuf::from("runs/a\nb");
        let errors = [
            Error::Damaged {
                path: path.clone(),
                part: "optimizer/0".into(),
                expected: "9f3c51".into(),
                found: "41aae0".into(),
            },
            Error::Format {
                path: Some(path.clone()),
                what: "format version 9".into(),
            },
            Error::Format {
                path: None,
                what: "ends\x1b[31m early".into(),
            },
            Error::Locked {
                path: path.clone(),
                holder: Some(7),
            },
            Error::io("write a pack", &path, io::Error::from(io::ErrorKind::StorageFull)),
            Error::Identity {
                path: path.clone(),
                differences: vec![("seed".into(), "1".into(), "2".into())],
            },
            Error::NoWholeCheckpoint {
                path,
                rejected: vec![("000000001-0-ab".into(), "torn".into())],
            },
            Error::Unsupported {
                what: "locks on this file system".into(),
            },
            Error::Data {
                epoch: 3,
                position: 4,
                what: "the file\nis gone".into(),
            },
            Error::Diverged {
                path: "runs/a".into(),
                step: 7,
                component: "log/loss".into(),
                expected: "0.5".into(),
                found: "0.25".into(),
            },
            Error::Stopped {
                path: "runs/a".into(),
                step: 7,
                reason: "SIGTERM".into(),
            },
            Error::invalid("`last` must be at least 1"),
        ];
        for error in errors {
            let message = error.to_string();
            assert!(!message.chars().any(char::is_control), "{message:?}");
            assert!(!message.starts_with(char::is_uppercase), "{message:?}");
            assert!(!error.fields().is_empty());
        }
    }

    #[test]
    fn a_full_disk_says_how_much_was_needed_and_what_to_do() {
        let error = Error::Io {
            doing: "write a pack",
            path: "runs/a/tmp/1".into(),
            needed_bytes: Some(4096),
            free_bytes: Some(512),
            source: io::Error::from(io::ErrorKind::StorageFull),
        };
        assert!(
            error.to_string().ends_with("(4096 bytes needed, 512 bytes free)"),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("free some space"));
        assert_eq!(error.kind(), "StorageError");
    }
}
