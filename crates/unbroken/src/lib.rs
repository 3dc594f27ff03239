//! Exact, proven, durable checkpoints of training runs: the core, free of any framework.
//!
//! A front (PyTorch, Burn, anything else) lowers what it wants to keep to a tree of [`state::Value`]s and a list of
//! storages; this crate writes them once, publishes them atomically, journals every step and proves on resume that a
//! step executed again is the same step. The bytes on disk are specified in `docs/format.md`.
//!
//! ```
//! use unbroken::format::value;
//! use unbroken::state::Value;
//!
//! let state = Value::dict(vec![(Value::Str("step".into()), Value::Int(1200))]);
//! let bytes = value::encode(&state)?;
//! assert_eq!(value::decode(&bytes)?, state);
//! # Ok::<(), unbroken::error::Error>(())
//! ```

pub mod arena;
pub mod cause;
pub mod certificate;
pub mod digest;
pub mod elements;
pub mod error;
pub mod fork;
pub mod format;
pub mod journal;
pub mod key;
mod lending;
pub mod localise;
pub mod outline;
pub mod repair;
pub mod run;
pub mod saver;
pub mod state;
pub mod storage;
pub mod store;
pub mod train;
mod trial;

pub use digest::{Digest, Fingerprint};
pub use error::{Error, Result};
pub use state::Value;
