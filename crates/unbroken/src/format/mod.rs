//! Bytes to values and back: the tree, the manifest, the pack header, the journal record.
//!
//! Touches: nothing. Pure functions over byte slices; no file, no path, no clock. What is wrong with bytes is a
//! [`Flaw`]; whoever knows the file turns it into an [`Error`] with [`Flaw::at`]. Every length and count is checked
//! against what is there before it is believed. The specification is `docs/format.md`.

pub mod coded;
pub mod journal;
pub mod manifest;
pub mod pack;
mod record;
pub mod saved;
pub mod value;

use std::fmt;
use std::path::Path;

use crate::digest::Digest;
use crate::error::Error;

/// The version of `run.toml`, of journals and of packs, as written into files; manifests have versions of their own.
pub const FORMAT_VERSION: u32 = 1;

/// What is wrong with bytes, before anyone says which file they are from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flaw {
    /// They do not start like ours.
    NotOurs {
        /// What was looked for, such as `a manifest`.
        what: &'static str,
    },
    /// Ours, of a version that this release does not know.
    Version {
        /// What carries it, such as `a manifest`.
        what: &'static str,
        /// The version found.
        found: u32,
        /// The newest that this release reads; it reads all before it.
        newest: u32,
    },
    /// They were ours and whole once: they end early, or hash to something else.
    Damaged {
        /// Which part, such as `manifest`.
        part: String,
        /// What was promised.
        expected: String,
        /// What is there.
        found: String,
    },
    /// They break a rule of the format.
    Malformed {
        /// Which rule, and where.
        what: String,
    },
    /// They are larger than this format allows.
    Limit {
        /// Which limit, with both numbers.
        what: String,
    },
}

impl Flaw {
    /// Says which file the bytes are from.
    pub fn at(self, path: impl AsRef<Path>) -> Error {
        let path = path.as_ref().to_owned();
        match self {
            Flaw::Damaged {
                part,
                expected,
                found,
            } => Error::Damaged {
                path,
                part,
                expected,
                found,
            },
            flaw => Error::Format {
                path: Some(path),
                what: flaw.to_string(),
            },
        }
    }

    pub(crate) fn malformed(what: impl Into<String>) -> Flaw {
        Flaw::Malformed { what: what.into() }
    }

    pub(crate) fn limit(what: impl Into<String>) -> Flaw {
        Flaw::Limit { what: what.into() }
    }

    pub(crate) fn digest(part: &str, expected: &Digest, found: &Digest) -> Flaw {
        Flaw::Damaged {
            part: part.to_owned(),
            expected: expected.short(),
            found: found.short(),
        }
    }

    pub(crate) fn ends_early(part: &str, expected: u64, found: u64) -> Flaw {
        let (expected, found) = (format!("{expected} bytes long"), format!("{found} bytes"));
        Flaw::Damaged {
            part: part.to_owned(),
            expected,
            found,
        }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Flaw::NotOurs { what } => write!(f, "not {what} of unbroken"),
            Flaw::Version { what, found, newest } => {
                write!(
                    f,
                    "{what} of format version {found}; this release reads versions up to {newest}"
                )
            }
            Flaw::Damaged {
                part,
                expected,
                found,
            } => {
                write!(f, "\"{part}\" should be {expected}, found {found}")
            }
            Flaw::Malformed { what } | Flaw::Limit { what } => f.write_str(what),
        }
    }
}

impl std::error::Error for Flaw {}

/// Bytes in memory: no path to name.
impl From<Flaw> for Error {
    fn from(flaw: Flaw) -> Error {
        Error::Format {
            path: None,
            what: flaw.to_string(),
        }
    }
}
